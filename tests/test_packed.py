"""qkv and kv in one tensor: the same bits as apart, and gradients in one tensor without a copy."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import (
    DIFFERENTIABLE,
    GPU,
    LOW_PRECISION,
    assert_bitwise_equal,
    both_causal,
    repeatable,
    skip_unsupported,
)

import triflash
from triflash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    registry,
    testing,
)

every_row = pytest.mark.parametrize("implementation", DIFFERENTIABLE)
every_varlen_row = pytest.mark.parametrize(
    "implementation", [row.name for row in registry.IMPLEMENTATIONS if "varlen" in row.features]
)
SEQLEN = 700 if GPU else 40
LENGTHS = (SEQLEN // 2, 0, SEQLEN, 5)
CU_SEQLENS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]


def normal(device, *shape, dtype=LOW_PRECISION):
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()


def results(function, *tensors):
    """out, lse and a gradient for each of `tensors`, on poisoned memory."""
    with testing.poisoned():
        out, lse, _ = function(*tensors)
        dout = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        grads = torch.autograd.grad((out, lse), tensors, (dout, lse.detach().clamp(-1, 1)))
    return out.detach(), lse.detach(), *grads


def compare(packed, apart, packed_tensors, dim):
    """Packed results against those of the same tensors apart; `dim` is where they are stacked."""
    *inputs, stack = packed_tensors
    split = [x.detach().requires_grad_() for x in (*inputs, *stack.detach().unbind(dim))]
    out, lse, *grads = results(packed, *packed_tensors)
    expected = results(apart, *split)
    together = [*grads[:-1], *grads[-1].unbind(dim)]
    for name, a, b in zip(
        ("out", "lse", "dq", "dk", "dv"), (out, lse, *together), expected, strict=True
    ):
        assert_bitwise_equal({name: a}, {name: b})


def skip_what_is_refused(implementation, device, seqlen=SEQLEN):
    case = testing.Case(seqlen_q=seqlen, seqlen_k=seqlen, headdim=64, dtype=LOW_PRECISION)
    skip_unsupported(case, implementation, device)
    row = registry.get(implementation)
    if not (row.deterministic or row.obeys_deterministic):
        pytest.skip("bits differ from run to run")


@every_row
@both_causal
def test_qkvpacked(implementation, causal, device):
    skip_what_is_refused(implementation, device)
    options = {"causal": causal, "return_attn_probs": True, "implementation": implementation}
    options |= repeatable(implementation)
    qkv = normal(device, 2, SEQLEN, 3, 2, 64)
    compare(
        lambda qkv: flash_attn_qkvpacked_func(qkv, **options),
        lambda q, k, v: flash_attn_func(q, k, v, **options),
        (qkv,), 2,
    )  # fmt: skip


@every_row
@both_causal
def test_kvpacked(implementation, causal, device):
    skip_what_is_refused(implementation, device)
    options = {"causal": causal, "return_attn_probs": True, "implementation": implementation}
    options |= repeatable(implementation)
    q, kv = normal(device, 2, SEQLEN, 4, 64), normal(device, 2, SEQLEN + 30, 2, 2, 64)
    compare(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, **options),
        lambda q, k, v: flash_attn_func(q, k, v, **options),
        (q, kv), 2,
    )  # fmt: skip


@every_varlen_row
@both_causal
def test_varlen_qkvpacked(implementation, causal, device):
    skip_what_is_refused(implementation, device)
    options = {"causal": causal, "return_attn_probs": True, "implementation": implementation}
    options |= repeatable(implementation)
    cu = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=device)
    qkv = normal(device, CU_SEQLENS[-1], 3, 2, 64)
    compare(
        lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, cu, SEQLEN, **options),
        lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, SEQLEN, SEQLEN, **options),
        (qkv,), 1,
    )  # fmt: skip


@every_varlen_row
@both_causal
def test_varlen_kvpacked(implementation, causal, device):
    skip_what_is_refused(implementation, device)
    options = {"causal": causal, "return_attn_probs": True, "implementation": implementation}
    options |= repeatable(implementation)
    cu = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=device)
    lengths_k = (3, 9, SEQLEN, 0)
    cu_k = torch.tensor(
        [sum(lengths_k[:i]) for i in range(len(lengths_k) + 1)], dtype=torch.int32, device=device
    )
    sequences = (cu, cu_k, SEQLEN, SEQLEN)
    q, kv = normal(device, CU_SEQLENS[-1], 4, 64), normal(device, sum(lengths_k), 2, 2, 64)
    compare(
        lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, *sequences, **options),
        lambda q, k, v: flash_attn_varlen_func(q, k, v, *sequences, **options),
        (q, kv), 1,
    )  # fmt: skip


@pytest.mark.gpu
def test_no_copy_of_the_gradients(device):
    """The backward's peak is the packed gradient and delta, not another copy of either."""
    qkv = normal(device, 2, 4096, 3, 8, 64)
    out = flash_attn_qkvpacked_func(qkv, implementation="v2")
    dout = torch.ones_like(out)
    torch.autograd.grad(out, qkv, dout, retain_graph=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, qkv, dout)
    size = qkv.numel() * qkv.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * size


def test_gradients_share_one_buffer(monkeypatch, device):
    """The rows that can are given the parts of one tensor to write to."""
    from triflash.kernels.v2 import backward

    skip_what_is_refused("v2", device)
    given = []
    plain = backward.backward

    def spy(*arguments, grads=None, **rest):
        given.append(grads)
        return plain(*arguments, grads=grads, **rest)

    monkeypatch.setattr(backward, "backward", spy)
    registry._load.cache_clear()
    try:
        qkv = normal(device, 1, 33, 3, 2, 16)
        out = flash_attn_qkvpacked_func(qkv, implementation="v2")
        (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    finally:
        registry._load.cache_clear()
    assert [g.data_ptr() for g in given[0]] == [g.data_ptr() for g in dqkv.unbind(2)]


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_compile(implementation, device):
    """One graph each for forward and backward, and the same bits."""
    skip_what_is_refused(implementation, device)
    options = {"causal": True, "return_attn_probs": True, "implementation": implementation}
    qkv = normal(device, 2, 33, 3, 2, 16)

    def call(qkv):
        return flash_attn_qkvpacked_func(qkv * 1, **options)

    backend = "inductor" if GPU else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for a, b in zip(results(call, qkv), results(compiled, qkv), strict=True):
        assert_bitwise_equal({"": a}, {"": b})
    torch._dynamo.reset()


BAD = {
    "qkv's rank": (
        lambda: flash_attn_qkvpacked_func(torch.randn(2, 8, 3, 16)),
        r"qkv must have shape \(batch, seqlen, 3, nheads, headdim\), got \(2, 8, 3, 16\)",
    ),
    "kv's middle": (
        lambda: flash_attn_kvpacked_func(torch.randn(2, 8, 2, 16), torch.randn(2, 8, 3, 2, 16)),
        r"kv must have shape \(batch, seqlen_k, 2, nheads_k, headdim\), got \(2, 8, 3, 2, 16\)",
    ),
    "qkv's stride": (
        lambda: flash_attn_qkvpacked_func(torch.randn(2, 8, 3, 2, 32)[..., ::2]),
        r"qkv must have a contiguous last dimension .* got stride 2; call qkv.contiguous\(\)",
    ),
    "packed qkv": (
        lambda: flash_attn_varlen_qkvpacked_func(
            torch.randn(1, 8, 3, 2, 16), torch.tensor([0, 8], dtype=torch.int32), 8
        ),
        r"qkv must have shape \(total, 3, nheads, headdim\), got \(1, 8, 3, 2, 16\)",
    ),
    "cu_seqlens": (
        lambda: flash_attn_varlen_qkvpacked_func(
            torch.randn(8, 3, 2, 16), torch.tensor([0, 7], dtype=torch.int32), 8
        ),
        "cu_seqlens must end with the 8 rows of q, got 7",
    ),
    "cu_seqlens' rank": (
        lambda: flash_attn_varlen_qkvpacked_func(
            torch.randn(8, 3, 2, 16), torch.tensor([[0, 8]], dtype=torch.int32), 8
        ),
        r"^cu_seqlens must have 1 dimension, got shape \(1, 2\)",
    ),
    "max_seqlen": (
        lambda: flash_attn_varlen_qkvpacked_func(
            torch.randn(8, 3, 2, 16), torch.tensor([0, 8], dtype=torch.int32), 7
        ),
        "^max_seqlen must be at least the longest sequence of cu_seqlens, 8 rows, got 7",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


_OPTIONS = [
    ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)),
    ("softcap", 0.0), ("alibi_slopes", None), ("deterministic", False),
    ("return_attn_probs", False),
]  # fmt: skip
_SEQUENCES = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("flash_attn_qkvpacked_func", ["qkv"]),
        ("flash_attn_kvpacked_func", ["q", "kv"]),
        ("flash_attn_varlen_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen"]),
        ("flash_attn_varlen_kvpacked_func", ["q", "kv", *_SEQUENCES]),
    ],
)
def test_signatures_of_flash_attn(name, inputs):
    """flash-attn 2.8's parameters, order and defaults; ours come behind, by keyword."""
    parameters = inspect.signature(getattr(triflash, name)).parameters.values()
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in positional[: len(inputs)]] == inputs
    assert [(p.name, p.default) for p in positional[len(inputs) :]] == _OPTIONS
