"""unpad_input, pad_input and index_first_axis against straightforward loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triflash import index_first_axis, pad_input, unpad_input
from triflash.bert_padding import index_put_first_axis

MASKS = {
    "right padding": [[1, 1, 0, 0], [1, 1, 1, 1]],
    "left padding": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 0, 0, 1]],
    "an empty sequence": [[0, 0, 0], [1, 1, 0], [0, 0, 0]],
    "nothing": [[0, 0], [0, 0]],
}


def unpad_by_loops(hidden, mask, unused):
    rows, indices, lengths, used = [], [], [], []
    batch, seqlen = mask.shape
    for b in range(batch):
        kept = [s for s in range(seqlen) if mask[b, s] or unused[b, s]]
        rows += [hidden[b, s] for s in kept]
        indices += [b * seqlen + s for s in kept]
        lengths.append(len(kept))
        used.append(int(mask[b].sum()))
    cu_seqlens = [sum(lengths[:b]) for b in range(batch + 1)]
    packed = torch.stack(rows) if rows else hidden.new_empty(0, *hidden.shape[2:])
    return packed, indices, cu_seqlens, max(lengths), used


def check_unpad(hidden, mask, unused=None):
    packed, indices, cu_seqlens, max_seqlen, used = unpad_input(hidden, mask, unused)
    unused = torch.zeros_like(mask) if unused is None else unused
    expected = unpad_by_loops(hidden, mask, unused)
    assert torch.equal(packed, expected[0])
    assert indices.dtype == torch.int64
    assert indices.tolist() == expected[1]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == expected[2]
    assert type(max_seqlen) is int
    assert max_seqlen == expected[3]
    assert used.dtype == torch.int32
    assert used.tolist() == expected[4]
    padded = pad_input(packed, indices, *mask.shape)
    kept = (mask + unused > 0).reshape(*mask.shape, *[1] * (hidden.dim() - 2))
    assert torch.equal(padded, hidden * kept)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_unpad_and_pad(mask, dtype, device):
    mask = torch.tensor(mask, device=device).to(dtype)
    check_unpad(torch.randn(*mask.shape, 2, 3, device=device), mask)
    check_unpad(torch.randn(*mask.shape, 5, device=device), mask)


@given(data=st.data())
def test_any_masks(data, device):
    batch, seqlen = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    drawn = st.lists(st.integers(0, 2), min_size=batch * seqlen, max_size=batch * seqlen)
    kinds = torch.tensor(data.draw(drawn), device=device).reshape(batch, seqlen)
    hidden = torch.randn(batch, seqlen, 3, device=device)
    check_unpad(hidden, kinds == 1, kinds == 2)
    check_unpad(hidden, (kinds == 1).int(), (kinds == 2).int())
    check_unpad(hidden, (kinds == 1).float(), (kinds == 2).float())


def test_no_sequences(device):
    hidden = torch.randn(0, 3, 2, device=device)
    packed, indices, cu_seqlens, max_seqlen, used = unpad_input(hidden, hidden.sum(-1) > 0)
    assert packed.shape == (0, 2)
    assert indices.numel() == 0
    assert used.numel() == 0
    assert cu_seqlens.tolist() == [0]
    assert max_seqlen == 0
    assert pad_input(packed, indices, 0, 3).shape == hidden.shape


def test_gradients(device):
    mask = torch.tensor(MASKS["holes"], device=device).bool()
    hidden = torch.randn(2, 4, 3, device=device, requires_grad=True)
    weight = torch.randn(2, 4, 3, device=device)
    packed, indices, *_ = unpad_input(hidden, mask)
    (pad_input(packed.square(), indices, 2, 4) * weight).sum().backward()
    assert torch.equal(hidden.grad, 2 * hidden.detach() * weight * mask[..., None])


def test_an_index_that_comes_twice(device):
    rows = torch.randn(3, 2, device=device, requires_grad=True)
    indices = torch.tensor([2, 0, 2], device=device)
    chosen = index_first_axis(rows, indices)
    assert torch.equal(chosen, torch.stack([rows[i] for i in indices.tolist()]))
    weight = torch.randn(3, 2, device=device)
    (chosen * weight).sum().backward()
    expected = torch.stack([weight[1], torch.zeros_like(weight[0]), weight[0] + weight[2]])
    assert torch.equal(rows.grad, expected)


def test_bad_input(device):
    hidden = torch.randn(2, 4, 3, device=device)
    mask = torch.ones(2, 4, device=device, dtype=torch.int64)
    indices = torch.tensor([0, 1], device=device)
    elsewhere = indices.to("meta")
    wrong = (
        (lambda: unpad_input(hidden, mask[:, :3]), ValueError, r"attention_mask must .*\(2, 3\)"),
        (lambda: unpad_input(hidden, mask, mask.flatten()), ValueError, r"unused_mask .*\(8,\)"),
        (lambda: unpad_input(hidden, [[1] * 4] * 2), TypeError, "attention_mask .*, got list"),
        (lambda: unpad_input(hidden, mask * 1j), TypeError, "attention_mask .*got torch.complex"),
        (lambda: unpad_input(hidden, mask * -torch.inf), ValueError, "attention_mask .*0 and 1"),
        (lambda: unpad_input(hidden, mask * 0.5), ValueError, "attention_mask .*0 and 1"),
        (lambda: unpad_input(hidden, mask.to("meta")), ValueError, "attention_mask .*device"),
        (lambda: index_first_axis(hidden[0, 0], indices), ValueError, "input .* 2 dimensions"),
        (lambda: index_first_axis(hidden, indices[None]), ValueError, "indices .* 1 dimension"),
        (lambda: index_first_axis(hidden, [0, 1]), TypeError, r"indices .*Tensor, got list"),
        (lambda: index_first_axis(hidden, indices.int()), TypeError, "indices .*int64"),
        (lambda: index_first_axis(hidden, elsewhere), ValueError, "indices .*input's device"),
        (lambda: pad_input(hidden[0], indices, 2, 4), ValueError, "hidden_states .* 2 indices"),
        (lambda: pad_input(hidden[0, :2], indices.int(), 2, 4), TypeError, "indices .*int64"),
        (lambda: pad_input(hidden[0, :2], indices, None, 4), TypeError, "batch .*int, got None"),
        (lambda: pad_input(hidden[0, :2], indices, 2, 4.0), TypeError, "seqlen .*int, got float"),
        (lambda: pad_input(hidden[0, :2], indices, -2, -4), ValueError, "batch .*at least 0"),
        (lambda: pad_input(hidden[0, :2], indices, True, 4), TypeError, "batch .*int, got bool"),
        (
            lambda: index_put_first_axis(hidden[0, :2], indices, indices), TypeError,
            "first_axis_dim .*int, got Tensor",
        ),
    )  # fmt: skip
    for call, error, words in wrong:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("number", [2, -1])
def test_masks_hold_0_and_1(number, device):
    """A mask that numbers documents would make lengths of sums of these numbers."""
    hidden = torch.randn(2, 4, 3, device=device)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], device=device)
    with pytest.raises(ValueError, match="attention_mask must hold 0 and 1 alone"):
        unpad_input(hidden, torch.where(mask == 0, 0, mask.cumsum(-1) * number))
    with pytest.raises(ValueError, match=r"attention_mask and unused_mask must .* no row in both"):
        unpad_input(hidden, mask, torch.ones_like(mask))


def test_indices_out_of_range():
    """On a CPU; a GPU asserts, as PyTorch's indexing does."""
    rows = torch.randn(2, 3)
    for wrong in (-1, 2):
        indices = torch.tensor([0, wrong])
        with pytest.raises(ValueError, match=r"indices .*below the 2 rows of input"):
            index_first_axis(rows, indices)
        with pytest.raises(ValueError, match=r"indices .*below the 2 rows there"):
            pad_input(rows, indices, 1, 2)
    with pytest.raises(ValueError, match=r"indices .*below the 0 rows"):
        index_first_axis(rows[:0], indices)
    with pytest.raises(ValueError, match=r"indices .*below the 0 rows"):
        pad_input(rows, indices, 0, 2)


def test_names_of_flash_attn(device):
    from triflash import bert_padding

    assert bert_padding.unpad_input is unpad_input
    assert bert_padding.pad_input is pad_input
    hidden = torch.randn(3, 2, device=device)
    put = bert_padding.index_put_first_axis(hidden, torch.tensor([3, 0, 1], device=device), 5)
    zero = torch.zeros(2, device=device)
    assert torch.equal(put, torch.stack([hidden[1], hidden[2], zero, hidden[0], zero]))
