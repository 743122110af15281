"""Block masks: their lists, when they are made again, and what is refused."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from helpers import GPU, compiled_and_not, skip_unsupported
from hypothesis import given
from hypothesis import strategies as st
from test_mods import DOCUMENT, RELATIVE, document

import triflash
from triflash import attention, block_mask, mods
from triflash.spec import BLOCK_LISTS
from triflash.target import Target
from triflash.testing import Case, make_inputs


@triton.jit
def stripes(b, h, q_idx, kv_idx, aux):
    stripe = q_idx // aux[0] + kv_idx // aux[0] + b + h
    return tl.where(stripe < 0, -stripe, stripe) % 3 == 0


@triton.jit
def before(b, h, q_idx, kv_idx, aux):
    return kv_idx <= q_idx


def _stripes_reference(b, h, q_idx, kv_idx, aux):
    return (q_idx // aux[0] + kv_idx // aux[0] + b + h) % 3 == 0


def _before_reference(b, h, q_idx, kv_idx, aux):
    return kv_idx <= q_idx


STRIPES = mods.mask_mod(stripes, reference=_stripes_reference)
BEFORE = mods.mask_mod(before, reference=_before_reference)
UNNAMED = mods.mask_mod(stripes)


def make(mask_mod=STRIPES, batch=2, nheads=3, seqlen_q=200, seqlen_k=300, **options):
    options = {"aux": (64,), "block_size": 64, **options}
    return triflash.create_block_mask(mask_mod, batch, nheads, seqlen_q, seqlen_k, **options)


def states_of(seen: torch.Tensor, size_q: int, size_k: int) -> torch.Tensor:
    """Of a bool `(batch, nheads, seqlen_q, seqlen_k)`, block by block."""
    rows = []
    for queries in seen.split(size_q, dim=2):
        row = []
        for part in queries.split(size_k, dim=3):
            full = part.flatten(2).all(-1) & (part.shape[3] == size_k)
            row.append(part.flatten(2).any(-1).char() + full)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, 2)


@st.composite
def masks(draw: st.DrawFn) -> dict[str, object]:
    longest = 1000 if GPU else 300
    return {
        "batch": draw(st.sampled_from([None, 2])),
        "nheads": draw(st.sampled_from([None, 3])),
        "seqlen_q": draw(st.integers(1, longest)),
        "seqlen_k": draw(st.integers(1, longest)),
        "causal": draw(st.booleans()),
        "window_size": draw(st.sampled_from([None, (70, 10), (None, 100)])),
        "aux": (draw(st.integers(1, 200)),),
        "block_size": draw(st.sampled_from([64, (64, 128), (192, 64)])),
    }


@pytest.mark.parametrize("by", ["kernel", "reference"])
@given(what=masks())
def test_lists(by, what, device):
    """Every list against the mask itself, by the kernel and by the PyTorch form."""
    with pytest.MonkeyPatch.context() as patch:
        if by == "reference":
            patch.setattr(block_mask, "target_of", lambda _: Target("cpu"))
        block_mask._made.clear()
        got = make(device=device, **what)
    size_q, size_k = got.blocks.size_q, got.blocks.size_k
    shape = got.shape
    b, h, q_idx, kv_idx = (
        torch.arange(n).view([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate(shape)
    )
    seen = _stripes_reference(b, h, q_idx, kv_idx, what["aux"]).expand(shape)
    position = q_idx + shape[3] - shape[2]
    left, right = what["window_size"] or (None, None)
    right = 0 if what["causal"] else right
    if left is not None:
        seen = seen & (kv_idx >= position - left)
    if right is not None:
        seen = seen & (kv_idx <= position + right)
    states = states_of(seen, size_q, size_k)
    assert torch.equal(got.states().cpu(), states)
    assert got.sparsity() == pytest.approx(100 * float((states == 0).float().mean()))
    for of, counts, entries in (
        (states, got.kv_counts, got.kv_entries),
        (states.transpose(2, 3), got.q_counts, got.q_entries),
    ):
        for row, count, listed in zip(
            of.flatten(0, 2).tolist(), counts.flatten().tolist(), entries.flatten(0, 2).tolist(),
            strict=True,
        ):  # fmt: skip
            kept = [2 * i + state - 1 for i, state in enumerate(row) if state]
            assert listed[:count] == kept
            assert listed[count:] == [2 * i for i, state in enumerate(row) if not state]
    order = (got.q_entries.cpu() // 2).long()
    ranks = ((states > 0).cumsum(3) - 1).transpose(2, 3).gather(3, order)
    assert torch.equal(got.q_ranks.cpu().long(), ranks)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_lists(lengths, device):
    got = make(nheads=2, seqlen_q=lengths[0], seqlen_k=lengths[1], device=device)
    assert got.states().numel() == 0
    q, k = (torch.randn(2, n, 2, 16, device=device) for n in lengths)
    out, lse = attention(q, k, k, block_mask=got, return_lse=True)
    assert out.shape == q.shape
    assert bool((lse == float("-inf")).all())


def test_it_says_what_it_is(device):
    got = make(BEFORE, None, None, 128, 192, aux=(), device=device)
    name = f"{__name__}.before"
    wanted = f"BlockMask({name}, shape=(1, 1, 128, 192), blocks of 64 x 64: 3 empty, 2 partial, 1 "
    assert repr(got) == wanted + "full)"
    assert got.sparsity() == 50.0


def test_kept_until_something_changes(device):
    """The same lists for the same call, made again for anything else, and let go of with aux."""
    block_mask._made.clear()
    ids = torch.zeros(1, 100, dtype=torch.int32, device=device)

    def lists(ids=ids, **options):
        made = make(DOCUMENT, None, None, 100, 100, aux=(ids,), **options)
        return tuple(getattr(made, name) for name in BLOCK_LISTS)

    first = lists()
    assert all(a is b for a, b in zip(first, lists(), strict=True))
    others = [
        lists(block_size=128), lists(causal=True), lists(window_size=(3, 3)), lists(ids.clone()),
    ]  # fmt: skip
    assert all(first[0] is not other[0] for other in others)
    ids[:, 50:] = 1
    changed = lists()
    assert changed[0] is not first[0]
    assert not torch.equal(changed[1], first[1])
    assert len(block_mask._made) == 5  # not that of the clone, which is gone
    del ids, lists
    gc.collect()
    assert not block_mask._made


def test_not_more_is_kept_than_is_said(device):
    block_mask._made.clear()
    for n in range(1, block_mask._MOST_KEPT + 5):
        make(batch=None, nheads=None, seqlen_q=10, seqlen_k=10, aux=(n,), device=device)
    assert len(block_mask._made) == block_mask._MOST_KEPT
    first = make(batch=None, nheads=None, seqlen_q=10, seqlen_k=10, aux=(5,), device=device)
    assert first.kv_counts is next(reversed(block_mask._made.values()))[1][0]


def test_copies_of_a_module_that_holds_a_mask(device):
    """As torch.optim.swa_utils makes them: its mask is as up to date as that which was copied."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ids = torch.nn.Buffer(torch.zeros(1, 70, dtype=torch.int32, device=device))
            self.ids[:, 3:] = 1
            self.ids[:, 9:] = 2  # its second version; a copy has had fewer
            self.mask = make(DOCUMENT, None, None, 70, 70, aux=(self.ids,))
            self.score_mod = RELATIVE

    q = torch.randn(1, 70, 2, 16, device=device)
    model = Model()
    copied = copy.deepcopy(model)
    assert copied.score_mod is RELATIVE
    assert copied.mask.mask_mod is DOCUMENT
    assert copied.mask.aux[0] is copied.ids
    outs = [attention(q, q, q, block_mask=m.mask) for m in (model, copied, copy.copy(model))]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    copied.ids.zero_()
    attention(q, q, q, block_mask=model.mask)
    for stale in (copied, copy.deepcopy(copied)):
        with pytest.raises(ValueError, match="block_mask is out of date"):
            attention(q, q, q, block_mask=stale.mask)


def test_out_of_date(device):
    ids = torch.zeros(1, 70, dtype=torch.int32, device=device)
    made = make(DOCUMENT, None, None, 70, 70, aux=(ids,))
    q = torch.randn(1, 70, 2, 16, device=device)
    attention(q, q, q, block_mask=made)
    ids[:, 3:] = 1
    with pytest.raises(ValueError, match=r"block_mask is out of date: .* make it again"):
        attention(q, q, q, block_mask=made)
    with torch.inference_mode():  # whose tensors do not tell
        ids = torch.zeros(1, 70, dtype=torch.int32, device=device)
        one, two = (make(DOCUMENT, None, None, 70, 70, aux=(ids,)) for _ in range(2))
        assert one.kv_counts is not two.kv_counts
        attention(q, q, q, block_mask=one)


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_with_a_score_mod_of_other_aux(implementation, device):
    """Both have their own aux, and the score's has a gradient."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, 90, 2, 16, device=device, generator=generator) for _ in range(4)
    )
    bias = torch.linspace(-1, 1, 30, device=device).view(2, 15).requires_grad_()
    made = make(nheads=2, seqlen_q=90, seqlen_k=90, aux=(32,), device=device)
    out = attention(
        q, k, v, score_mod=RELATIVE, aux=(bias, 7), block_mask=made, implementation=implementation
    )
    (grad,) = torch.autograd.grad(out, bias, dout)
    h, i, j = (torch.arange(n, device=device) for n in (2, 90, 90))
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 4
    scores = scores + bias[:, (j - i[:, None]).clamp(-7, 7) + 7]
    seen = _stripes_reference(
        h.view(2, 1, 1, 1), h.view(1, 2, 1, 1), i.view(1, 1, 90, 1), j.view(1, 1, 1, 90), (32,)
    )
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.transpose(1, 2)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-3, atol=1e-4)
    (wanted,) = torch.autograd.grad(expected.transpose(1, 2), bias, dout)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3)


def test_hidden_blocks_are_not_read(device):
    """NaN in keys that no block lists, and in queries, changes no bit of the others' results."""
    ids = (torch.arange(256, device=device) // 128).int()[None]
    made = make(DOCUMENT, None, None, 256, 256, aux=(ids,))
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, 256, 2, 16, device=device, generator=generator).half() for _ in range(3)
    )
    results = []
    for poison in (0.0, float("nan")):
        leaves = [
            torch.cat([x[:, :128], torch.full_like(x[:, 128:], poison)], 1).requires_grad_()
            for x in (q, k, v)
        ]
        out = attention(*leaves, block_mask=made, implementation="v2")
        grads = torch.autograd.grad(out[:, :128].sum(), leaves)
        results.append([out[:, :128], *(g[:, :128] for g in grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


def test_joined_masks(device):
    both, either = mods.and_masks(STRIPES, BEFORE), mods.or_masks(STRIPES, BEFORE)
    assert mods.and_masks(STRIPES, BEFORE) is both
    assert mods.or_masks(BEFORE) is BEFORE
    options = {"aux": (50,), "seqlen_q": 90, "seqlen_k": 90, "device": device}
    q = torch.randn(2, 90, 3, 16, device=device)
    b, h, q_idx, kv_idx = (
        torch.arange(n).view([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate((2, 3, 90, 90))
    )
    one, other = _stripes_reference(b, h, q_idx, kv_idx, (50,)), kv_idx <= q_idx
    for mod, seen in ((both, one & other), (either, one | other)):
        got = make(mod, **options)
        assert torch.equal(got.states().cpu(), states_of(seen, 64, 64))
        outs = [
            attention(q, q, q, implementation=name, **how)
            for name in ("v2", "reference")
            for how in ({"block_mask": got}, {"mask_mod": mod, "aux": (50,)})
        ]
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=1e-3, atol=1e-3)
    three = mods.and_masks(STRIPES, BEFORE, DOCUMENT)
    assert three.parts == (STRIPES, BEFORE, DOCUMENT)
    assert mods.or_masks(UNNAMED, BEFORE).reference is None


def test_bad_joins():
    with pytest.raises(ValueError, match="and_masks needs at least one"):
        mods.and_masks()
    with pytest.raises(TypeError, match=r"argument 1 of or_masks must come from .* got document"):
        mods.or_masks(STRIPES, document)
    with pytest.raises(ValueError, match=r"two functions that are both called .*stripes"):
        mods.and_masks(STRIPES, UNNAMED)


BAD = {
    "no mask": ({"mask_mod": before}, TypeError, ["mask_mod", "triflash.mods.mask_mod"]),
    "a float": ({"seqlen_q": 5.0}, TypeError, ["seqlen_q", "float"]),
    "negative": ({"seqlen_k": -1}, ValueError, ["seqlen_k", "-1"]),
    "no heads": ({"nheads": 0}, ValueError, ["nheads", "at least 1"]),
    "a flag": ({"batch": True}, TypeError, ["batch", "bool"]),
    "block of 32": ({"block_size": 32}, ValueError, ["block_size", "64", "32"]),
    "block of 0": ({"block_size": (64, 0)}, ValueError, ["block_size", "(64, 0)"]),
    "three sizes": ({"block_size": (64, 64, 64)}, TypeError, ["block_size", "(64, 64, 64)"]),
    "causal a word": ({"causal": "yes"}, TypeError, ["causal", "'yes'"]),
    "window": ({"window_size": (-2, 0)}, ValueError, ["window_size", "(-2, 0)"]),
    "causal a list": ({"causal": [True]}, TypeError, ["causal", "[True]"]),
    "no device": ({"device": "gpu"}, ValueError, ["device", "'gpu'"]),
    "device a number": ({"device": 3.5}, ValueError, ["device", "3.5"]),
    "device of half a name": ({"device": ""}, ValueError, ["device", "''"]),
    "aux": ({"aux": ("x",)}, TypeError, ["aux[0]", "str"]),
    "aux elsewhere": (
        {"aux": (torch.ones(3, device="meta"),), "device": "cpu"}, ValueError, ["aux0", "meta"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    options, error, words = BAD[bad]
    with pytest.raises(error) as caught:
        make(**options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_gpu_that_is_not_here():
    if GPU:
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"device must be .*'cuda'.* no GPU"):
        make(device="cuda")


def test_bad_calls(device):
    made = make(device=device)
    q, k = torch.randn(2, 200, 3, 16, device=device), torch.randn(2, 300, 3, 16, device=device)
    attention(q, k, k, block_mask=made, implementation="reference")
    for options, error, words in (
        ({"causal": True}, ValueError, "block_mask is the whole mask.*causal"),
        ({"window_size": (3, 3)}, ValueError, "block_mask is the whole mask.*window_size"),
        ({"mask_mod": BEFORE}, ValueError, "block_mask is the whole mask.*mask_mod"),
        ({"aux": (3,)}, ValueError, "aux is for score_mod and mask_mod"),
        ({"block_mask": STRIPES}, TypeError, "must come from triflash.create_block_mask"),
        ({"implementation": "v1"}, NotImplementedError, "v1 does not have"),
    ):
        with pytest.raises(error, match=words):
            attention(q, k, k, **{"block_mask": made, **options})
    for tensors, words in (
        ((q[:, 1:], k, k), "made for seqlen_q 199, got one for 200"),
        ((q, k[:, 1:], k[:, 1:]), "made for seqlen_k 299, got one for 300"),
        ((q[:1], k[:1], k[:1]), "made for batch 1, .* got one for 2"),
        ((q[:, :, :2], k[:, :, :2], k[:, :, :2]), "made for nheads 2, .* got one for 3"),
    ):
        with pytest.raises(ValueError, match=words):
            attention(*tensors, block_mask=made)
    wrong = replace(made, kv_counts=made.kv_counts.long())
    with pytest.raises(ValueError, match=r"kv_counts of block_mask must be int32 .* torch.int64"):
        attention(q, k, k, block_mask=wrong)
    elsewhere = replace(made, q_entries=made.q_entries.to("meta"))
    with pytest.raises(ValueError, match="q_entries must be on q's device"):
        attention(q, k, k, block_mask=elsewhere)


def test_masks_that_cannot_be_made(monkeypatch):
    monkeypatch.setattr(block_mask, "target_of", lambda _: Target("cpu"))
    with pytest.raises(NotImplementedError, match=r"stripes.*reference="):
        make(UNNAMED, device="cpu")
    wrong = mods.mask_mod(stripes, reference=lambda b, h, q_idx, kv_idx, aux: q_idx + kv_idx)
    with pytest.raises(TypeError, match=r"reference of .*stripes.* must return bool"):
        make(wrong, device="cpu")


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_compile(implementation, device):
    """In one graph, and the same bits as without."""
    made = make(nheads=2, seqlen_q=70, seqlen_k=70, aux=(32,), causal=True, device=device)
    leaves = [torch.randn(2, 70, 2, 16, device=device, requires_grad=True) for _ in range(3)]

    def call(q, k, v):
        return attention(q, k, v, block_mask=made, implementation=implementation)

    outputs, gradients = compiled_and_not(call, leaves)
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for a, b in gradients:
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
def test_deterministic_programs_wait_in_the_lists_of_their_own_heads(device):
    """Heads that share keys are walked as far as the longest of their lists, here longer ones."""
    case = Case(
        2, 900, 1000, nheads=4, nheads_k=2, headdim=128, dtype=torch.bfloat16, mask_mod=STRIPES,
        make_aux=lambda *_: (100,), block_size=(128, 128), block_heads=True,
    )  # fmt: skip
    skip_unsupported(case, "v3", device)
    inputs = make_inputs(case, device)
    leaves = tuple(t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))

    def gradients(deterministic):
        out = attention(*leaves, **inputs.extras, implementation="v3", deterministic=deterministic)
        return torch.autograd.grad(out, leaves, inputs.dout)

    first, again, usual = (gradients(x) for x in (True, True, False))
    for x, y, z in zip(first, again, usual, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=2e-2, atol=2e-2)
