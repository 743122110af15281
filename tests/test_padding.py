"""unpad_input, pad_input and index_first_axis against straightforward loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triflash import index_first_axis, pad_input, unpad_input

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
    indices = torch.tensor([0, 1], device=device)
    with pytest.raises(ValueError, match=r"attention_mask must .* \(2, 4\), got shape \(2, 3\)"):
        unpad_input(hidden, torch.ones(2, 3, device=device))
    with pytest.raises(ValueError, match=r"unused_mask must .* got shape \(8,\)"):
        unpad_input(hidden, torch.ones(2, 4, device=device), torch.ones(8, device=device))
    with pytest.raises(ValueError, match="input must have at least 2 dimensions"):
        index_first_axis(hidden[0, 0], indices)
    with pytest.raises(ValueError, match="indices must have 1 dimension"):
        index_first_axis(hidden, indices[None])
    with pytest.raises(ValueError, match="hidden_states must have one row for each of 2 indices"):
        pad_input(hidden[0], indices, 2, 4)
    with pytest.raises(TypeError, match=r"attention_mask must be a torch\.Tensor, got list"):
        unpad_input(hidden, [[1, 1, 1, 0]] * 2)
    with pytest.raises(TypeError, match=r"indices must be a torch\.Tensor, got list"):
        index_first_axis(hidden, [0, 1])


def test_names_of_flash_attn(device):
    from triflash import bert_padding

    assert bert_padding.unpad_input is unpad_input
    assert bert_padding.pad_input is pad_input
    hidden = torch.randn(3, 2, device=device)
    put = bert_padding.index_put_first_axis(hidden, torch.tensor([3, 0, 1], device=device), 5)
    zero = torch.zeros(2, device=device)
    assert torch.equal(put, torch.stack([hidden[1], hidden[2], zero, hidden[0], zero]))
