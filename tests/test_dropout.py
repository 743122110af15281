"""Dropout: the same weights dropped everywhere, by a seed from PyTorch's generator."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import GPU, LOW_PRECISION, assert_bitwise_equal, captured, without_waiting
from torch.utils.checkpoint import checkpoint

from triflash import (
    attention,
    dropout,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from triflash.spec import features_of_text
from triflash.testing import Case, baseline, make_inputs, oracle

every_row = pytest.mark.parametrize("implementation", ["v2", "reference"])


def qkv(device, seqlen=40, nheads=2, headdim=16, dtype=torch.float32):
    torch.manual_seed(0)
    shape = (2, seqlen, nheads, headdim)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def places(device, *sizes):
    """b, h, q_idx and kv_idx, which broadcast."""
    return [
        torch.arange(n, device=device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate(sizes)
    ]


@every_row
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "dtype"),
    [(70, 64, LOW_PRECISION), (33, 100, torch.float32), (50, 17, LOW_PRECISION)],
)
def test_the_mask_is_that_of_the_seed(implementation, seqlen_q, seqlen_k, dtype, device):
    """Read out of the implementation: all weights equal, and v one-hot."""
    q = torch.zeros(2, seqlen_q, 3, 128, device=device, dtype=dtype)
    k = torch.zeros(2, seqlen_k, 3, 128, device=device, dtype=dtype)
    v = torch.eye(seqlen_k, 128, device=device, dtype=dtype)[None, :, None].expand_as(k)
    for number in (7, 2**62 + 12345):
        seed = torch.tensor([number], device=device)
        out, lse = attention(
            q, k, v, dropout_p=0.3, dropout_seed=seed, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        got = out.transpose(1, 2)[..., :seqlen_k]
        where = places(device, 2, 3, seqlen_q, seqlen_k)
        kept = dropout.kept(seed, dropout.checked(0.3), *where)
        torch.testing.assert_close(got > 0, kept)
        torch.testing.assert_close(got[kept].float().mean() * seqlen_k * 0.7, torch.ones_like(
            got[kept].float().mean()), rtol=2e-3, atol=0)  # fmt: skip
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(seqlen_k)))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_weights_are_dropped_independently(dropout_p, device):
    """Share, neighbours of all kinds, heads, batch entries and seeds, in standard deviations."""
    sizes, p = (2, 4, 256, 512), dropout.checked(dropout_p)
    where = places(device, *sizes)
    x, y = (
        dropout.kept(torch.tensor([seed], device=device), p, *where).double() - (1 - p)
        for seed in (1, 2)
    )
    variance = p * (1 - p)
    deviations = {"share": x.sum() / math.sqrt(x.numel() * variance)}
    pairs = {"heads": (x[:, 1:], x[:, :-1]), "batch": (x[1:], x[:-1]), "seeds": (x, y)}
    pairs |= {f"keys {n}": (x[..., n:], x[..., :-n]) for n in (1, 2, 8, 16, 24, 32, 64)}
    pairs |= {f"queries {n}": (x[..., n:, :], x[..., :-n, :]) for n in (1, 8, 16)}
    i, j = torch.triu_indices(256, 256, 1)
    pairs["transposed"] = (x[..., i, j], x[..., j, i])
    for name, (a, b) in pairs.items():
        deviations[name] = (a * b).sum() / (math.sqrt(a.numel()) * variance)
    rows = x.sum(-1) / math.sqrt(sizes[-1] * variance)
    deviations["rows"] = (rows.square().mean() - 1) * math.sqrt(rows.numel() / 2)
    assert all(abs(float(z)) < 4.5 for z in deviations.values()), deviations


@every_row
def test_seeds_are_drawn_from_the_generator_of_pytorch(implementation, device):
    q, k, v = qkv(device)

    def call(p=0.4):
        return attention(q, k, v, dropout_p=p, implementation=implementation)

    torch.manual_seed(3)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    torch.manual_seed(3)
    call(p=0.0)
    assert torch.equal(call(), first)  # without dropout nothing is drawn
    torch.testing.assert_close(call(p=2.0**-18), call(p=0.0), rtol=0, atol=0)


@every_row
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(implementation, reentrant, device):
    q, k, v = qkv(device)
    dout = torch.randn_like(q)

    def call(q, k, v):
        return attention(q, k, v, dropout_p=0.4, causal=True, implementation=implementation)

    results = []
    for function in (call, lambda *args: checkpoint(call, *args, use_reentrant=reentrant)):
        torch.manual_seed(3)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        torch.rand(5, device=device)  # the generator goes on
        out.backward(dout)
        results.append({"out": out.detach(), **{str(i): x.grad for i, x in enumerate(leaves)}})
    assert_bitwise_equal(*results)


@every_row
def test_compile(implementation, device):
    """In one graph; forward and backward agree, since out is linear in v: <out, dout> = <dv, v>."""
    leaves = qkv(device)
    dout = torch.randn_like(leaves[0])

    def call(q, k, v):
        return attention(q * 1, k, v, dropout_p=0.4, implementation=implementation)

    compiled = torch.compile(call, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    torch.manual_seed(3)
    first, second = compiled(*leaves), compiled(*leaves)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(compiled(*leaves), first)
    if not GPU:  # inductor draws by a generator of its own
        torch.manual_seed(3)
        assert torch.equal(call(*leaves), first)
    (dv,) = torch.autograd.grad(first, leaves[2], dout)
    torch.testing.assert_close((dv * leaves[2]).sum(), (first * dout).sum(), rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_the_oracle_against_autograd(device):
    """Its backward is written out; here PyTorch differentiates the forward, all in float64."""
    for fields in (
        {"dropout_p": 0.3}, {"bias": "hq -", "sinks": torch.float32, "dropout_p": 0.3},
        {"bias": "bk", "softcap": 2.0, "causal": True}, {"sinks": torch.float64, "causal": True},
    ):  # fmt: skip
        case = Case(
            seqlen_q=17, seqlen_k=13, nheads=4, headdim=16, dtype=torch.float64, with_dlse=True,
            **fields,
        )  # fmt: skip
        inputs = make_inputs(case, device)
        got, expected = oracle(case, inputs), baseline(case, inputs)
        assert got.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, check_dtype=False, rtol=1e-6, atol=1e-9)


@every_row
def test_probabilities_with_signs(implementation, device):
    """out follows from the third result; its negative entries are the dropped weights."""
    q, k, v = qkv(device, dtype=torch.float32)
    options = {"dropout_p": 0.25, "causal": True, "return_attn_probs": True}
    options["implementation"] = implementation
    torch.manual_seed(1)
    out, lse, signed = flash_attn_func(q, k, v, **options)
    assert signed.shape == (2, 2, 40, 40)
    assert signed.dtype == q.dtype
    kept = signed.clamp(min=0) / 0.75
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", kept, v), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(signed.abs().sum(-1), torch.ones_like(lse))
    torch.manual_seed(1)
    again = flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **options)
    torch.testing.assert_close(again, (out, lse, signed))
    torch.manual_seed(1)
    again = flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options)
    torch.testing.assert_close(again, (out, lse, signed))
    assert flash_attn_func(q, k, v, return_attn_probs=True)[2] is None


@every_row
def test_packed_sequences_drop_as_batch_entries(implementation, device):
    q, k, v = qkv(device)
    options = {"dropout_p": 0.25, "causal": True, "return_attn_probs": True}
    options["implementation"] = implementation
    dout = torch.randn_like(q)
    torch.manual_seed(1)
    out, _, signed = flash_attn_func(q, k, v, **options)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, 40, 80], device=device, dtype=torch.int32)
    torch.manual_seed(1)
    packed, _, packed_signed = flash_attn_varlen_func(
        *flat, cu_seqlens, cu_seqlens, 40, 50, **options
    )
    torch.testing.assert_close(packed, out.flatten(0, 1))
    torch.testing.assert_close(packed_signed[..., :40], signed)
    assert packed_signed.shape == (2, 2, 40, 50)
    assert not packed_signed[..., 40:].any()
    packed_grads = torch.autograd.grad(packed, flat, dout.flatten(0, 1))
    for a, b in zip(packed_grads, grads, strict=True):
        torch.testing.assert_close(a, b.flatten(0, 1))


def test_dropout_is_in_the_text_of_features():
    features = Case(dropout_p=0.3).spec().features
    assert features_of_text(features.text) == features
    assert features.names == ("dropout_seed",)
    assert features.dropout_p == round(0.3 * 65536) / 65536
    assert dropout.checked(1 - 1e-9) < 1.0


BAD = {
    "negative": ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1"]),
    "all": ({"dropout_p": 1.0}, ValueError, ["dropout_p", "below 1", "1.0"]),
    "not a number": ({"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan"]),
    "a word": ({"dropout_p": "0.1"}, TypeError, ["dropout_p", "str"]),
    "a flag": ({"dropout_p": True}, TypeError, ["dropout_p", "bool"]),
    "seed without dropout": ({"dropout_seed": 3}, TypeError, ["dropout_seed", "int"]),
    "seed a number": ({"dropout_p": 0.1, "dropout_seed": 3}, TypeError, ["dropout_seed", "int"]),
    "seed of float": (
        {"dropout_p": 0.1, "dropout_seed": torch.ones(1)}, TypeError, ["dropout_seed", "int64"],
    ),
    "two seeds": (
        {"dropout_p": 0.1, "dropout_seed": torch.ones(2).long()}, ValueError, ["(1,)", "(2,)"],
    ),
    "seed elsewhere": (
        {"dropout_p": 0.1, "dropout_seed": torch.ones(1, device="meta").long()}, ValueError,
        ["dropout_seed", "meta"],
    ),
    "no tensor": ({"dropout_p": 0.1, "q": [1.0]}, TypeError, ["q must be", "list"]),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad, device):
    options, error, words = BAD[bad]
    q, k, v = qkv(device)
    options = {
        name: x.to(device) if getattr(x, "is_cpu", False) else x for name, x in options.items()
    }
    with pytest.raises(error) as caught:
        attention(options.pop("q", q), k, v, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    if "dropout_seed" not in options and bad != "no tensor":
        with pytest.raises(error, match="dropout_p"):
            flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **options)


@pytest.mark.gpu
def test_a_graph_draws_anew_each_time_it_is_replayed(device):
    q, k, v = qkv(device, seqlen=300)
    dout = torch.randn_like(q)

    def both():
        out = attention(q, k, v, dropout_p=0.4, implementation="v2")
        return out, torch.autograd.grad(out, v, dout)[0]

    graph, drawn = captured(both)
    results = []
    for _ in range(2):
        graph.replay()
        out, dv = (x.clone() for x in drawn)
        torch.testing.assert_close((dv * v).sum(), (out * dout).sum(), rtol=1e-3, atol=0.1)
        results.append(out)
    assert not torch.equal(*results)


@pytest.mark.gpu
def test_no_call_waits_for_the_gpu(device):
    q, k, v = qkv(device)
    for context in (nullcontext(), without_waiting()):  # a first call may
        with context:
            attention(q, k, v, dropout_p=0.4, implementation="v2").sum().backward()
