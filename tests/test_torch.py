"""What PyTorch does around a call: compile, export, checkpoint, autocast, transforms."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    GPU,
    LOW_PRECISION,
    both_causal,
    every_differentiable_row,
    every_row,
    skip_unsupported,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import triflash
from triflash import attention, flash_attn_func, registry
from triflash.testing import Case, make_inputs

N = 200 if GPU else 9
DTYPE = torch.bfloat16 if GPU else torch.float32  # what every row takes
CASE = Case(
    batch=2, seqlen_q=N, seqlen_k=N + 2, nheads=2, nheads_k=1, headdim=16, dtype=DTYPE,
    causal=True, with_dlse=True,
)  # fmt: skip
# Inductor generates C++ on a CPU, for which there may be no compiler.
BACKENDS = ["inductor"] if GPU else ["aot_eager"]

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _leaves(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    inputs = make_inputs(case, device)
    return tuple(t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))


def _outputs_and_grads(function, leaves, case, device):
    inputs = make_inputs(case, device)
    out, lse = function(*leaves)
    grads = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
    return out, lse, *grads


def _assert_repeated(implementation, got, expected) -> None:
    """The same bits, if the row gives the same bits in every run."""
    exact = {"rtol": 0, "atol": 0} if registry.get(implementation).deterministic else {}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **exact)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@every_differentiable_row
@every_backend
def test_compile_fullgraph(implementation, backend, device):
    """Forward and backward in one graph each, and the same bits as without."""
    skip_unsupported(CASE, implementation, device)

    def call(q, k, v):
        out, lse = attention(
            q * 1, k, v, causal=True, return_lse=True, implementation=implementation
        )
        return out + 0, lse

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    leaves = _leaves(CASE, device)
    expected = _outputs_and_grads(call, leaves, CASE, device)
    got = _outputs_and_grads(compiled, leaves, CASE, device)
    _assert_repeated(implementation, got, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves)[0], expected[0], rtol=0, atol=0)


@every_backend
def test_compile_flash_attn_func_and_the_lazy_module(backend, device):
    def call(q, k, v):
        return triflash.flash_attn_func(q, k, v, causal=True)

    q, k, v = _leaves(CASE, device)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(q, k, v), flash_attn_func(q, k, v, causal=True))


def test_compile_before_the_first_use():
    """`triflash.attention` is imported on first use, which may be while it is traced."""
    code = (
        "import torch, triflash\n"
        "q = torch.randn(1, 3, 2, 8)\n"
        "f = torch.compile(lambda q: triflash.attention(q, q, q), fullgraph=True,"
        " backend='eager')\n"
        "out = f(q)\n"
        "assert torch.equal(out, triflash.attention(q, q, q))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@every_differentiable_row
@every_backend
def test_compile_with_dynamic_shapes(implementation, backend, device):
    """One graph serves every length, batch and number of heads."""
    skip_unsupported(CASE, implementation, device)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def call(q, k, v):
        return attention(q, k, v, causal=True, return_lse=True, implementation=implementation)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for batch, seqlen_q, seqlen_k in ((2, N, N + 3), (3, N + 5, N + 4), (4, N + 1, N + 9)):
        case = Case(**{**vars(CASE), "batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k})
        leaves = _leaves(case, device)
        expected = _outputs_and_grads(call, leaves, case, device)
        got = _outputs_and_grads(compiled, leaves, case, device)
        _assert_repeated(implementation, got, expected)
    # seqlen_q against seqlen_k may be guarded on, no more.
    assert counter.frame_count <= 2


@every_backend
def test_compile_still_validates(backend, device):
    q, k, v = _leaves(CASE, device)
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True, backend=backend
    )
    with pytest.raises(Exception, match="headdim"):
        compiled(q, k[..., :8], v)


def test_inductor_on_a_cpu(device):
    if GPU:
        pytest.skip("the tests above use inductor")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is none")
    q, k, v = _leaves(CASE, device)

    def call(q, k, v):
        return attention(q, k, v, causal=True).sin()

    compiled = torch.compile(call, fullgraph=True)
    try:
        out = compiled(q, k, v)
    except torch._inductor.exc.CppCompileError as error:
        pytest.skip(f"the C++ compiler does not work: {str(error).splitlines()[0]}")
    torch.testing.assert_close(out, call(q, k, v))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(call(q, k, v).sum(), (q, k, v))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_row
def test_export(implementation, device):
    skip_unsupported(CASE, implementation, device)

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True, implementation=implementation)

    tensors = tuple(t.detach() for t in _leaves(CASE, device))
    seqlen = torch.export.Dim("seqlen_q", min=2, max=4096)
    program = torch.export.export(
        Module(), tensors, dynamic_shapes={"q": {1: seqlen}, "k": None, "v": None}
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert "triflash.attention_forward.default" in targets
    q = torch.randn(2, N + 5, 2, 16, device=device, dtype=DTYPE)
    expected = attention(q, *tensors[1:], causal=True, implementation=implementation)
    torch.testing.assert_close(program.module()(q, *tensors[1:]), expected, rtol=0, atol=0)


def _attention_and_gradients(q, k, v):
    out = attention(q, k, v, causal=True)
    return out, *torch.autograd.grad(out.sum(), (q, k, v))


def _packed_and_gradient(qkv, cu_seqlens):
    longest = qkv.shape[0]
    out = triflash.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, causal=True)
    return out, *torch.autograd.grad(out.sum(), qkv)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_make_fx(packed, mode, device):
    """A traced call is the call; with symbolic sizes at other sizes too."""

    def arguments(seqlen: int) -> tuple[torch.Tensor, ...]:
        def leaf(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=DTYPE, requires_grad=True)

        if not packed:
            return tuple(leaf(2, seqlen, 2, 16) for _ in range(3))
        cu_seqlens = torch.tensor([0, 3, seqlen], device=device, dtype=torch.int32)
        return leaf(seqlen, 3, 2, 16), cu_seqlens

    call = _packed_and_gradient if packed else _attention_and_gradients
    traced = make_fx(call, tracing_mode=mode)(*arguments(N))
    for seqlen in (N, N + 3) if mode == "symbolic" else (N,):
        given = arguments(seqlen)
        for a, b in zip(traced(*given), call(*given), strict=True):
            torch.testing.assert_close(a, b)


@every_differentiable_row
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(implementation, use_reentrant, device):
    skip_unsupported(CASE, implementation, device)

    def call(q, k, v):
        return attention(q, k, v, causal=True, return_lse=True, implementation=implementation)

    leaves = _leaves(CASE, device)
    expected = _outputs_and_grads(call, leaves, CASE, device)
    leaves = _leaves(CASE, device)
    inputs = make_inputs(CASE, device)
    outputs = checkpoint(call, *leaves, use_reentrant=use_reentrant)
    torch.autograd.backward(outputs, (inputs.dout, inputs.dlse))
    _assert_repeated(implementation, (*outputs, *(t.grad for t in leaves)), expected)


@every_differentiable_row
@pytest.mark.parametrize("amp_dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast(implementation, amp_dtype, device):
    """Computes in autocast's dtype, and gradients arrive in that of the leaves."""
    skip_unsupported(Case(**{**vars(CASE), "dtype": amp_dtype}), implementation, device)
    q, k, v = _leaves(Case(**{**vars(CASE), "dtype": torch.float32}), device)
    with torch.autocast(device.type, amp_dtype):
        out, lse = attention(
            q, k, v.to(amp_dtype), causal=True, return_lse=True, implementation=implementation
        )
    assert out.dtype == amp_dtype
    assert lse.dtype == torch.float32
    expected = attention(
        *(t.detach().to(amp_dtype) for t in (q, k, v)), causal=True, implementation=implementation
    )
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in grads)
    assert all(g.isfinite().all() for g in grads)


def test_autocast_leaves_float64_alone(device):
    q = torch.randn(1, 3, 1, 8, device=device, dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        out = attention(q, q, q, implementation="reference")
    assert out.dtype == torch.float64


def test_autocast_in_the_operator(device):
    """A graph that calls the operator itself, as an exported program does."""
    q = torch.randn(1, 3, 1, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out, _, _ = torch.ops.triflash.attention_forward(
            q, q, q.bfloat16(), 1.0, False, False, False, "reference"
        )
    assert out.dtype == torch.bfloat16


@every_row
@both_causal
def test_opcheck_forward(implementation, causal, device):
    skip_unsupported(CASE, implementation, device)
    inputs = make_inputs(CASE, device)
    torch.library.opcheck(
        torch.ops.triflash.attention_forward.default,
        (inputs.q, inputs.k, inputs.v, 0.25, causal, False, False, implementation),
    )


@every_differentiable_row
@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck_backward(implementation, with_dlse, device):
    skip_unsupported(CASE, implementation, device)
    inputs = make_inputs(CASE, device)
    options = (0.25, True, False, False, implementation)
    out, lse, saved = torch.ops.triflash.attention_forward(inputs.q, inputs.k, inputs.v, *options)
    dlse = inputs.dlse if with_dlse else None
    torch.library.opcheck(
        torch.ops.triflash.attention_backward.default,
        (inputs.dout, dlse, inputs.q, inputs.k, inputs.v, out, lse, saved, *options),
    )


@pytest.mark.parametrize("implementation", ["v2", "reference"])
def test_modes_see_the_operators_and_change_nothing(implementation, device):
    """As FlopCounterMode is one; the reference's own use of autograd is inside of an operator."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    q, k, v = _leaves(replace(CASE, dtype=torch.float16), device)
    skip_unsupported(replace(CASE, dtype=torch.float16), implementation, device)
    bias = torch.randn(1, 2, N, 1, device=device, requires_grad=True)
    slopes = torch.ones(2, device=device)

    def gradients():
        out = attention(
            q, k, v, softcap=3.0, alibi_slopes=slopes, bias=bias, implementation=implementation
        )
        return torch.autograd.grad(out.float().sum(), (q, k, v, bias))

    expected, names = gradients(), []
    with Seen():
        got = gradients()
    assert {"triflash.attention_forward.default", "triflash.attention_backward.default"} <= {*names}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # bias's is added in any order


@every_row
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [LOW_PRECISION, torch.float32], ids=str)
def test_fake_tensors_have_the_real_metadata(implementation, layout, dtype, device):
    """Inductor plans memory by them."""
    case = Case(**{**vars(CASE), "layout": layout, "dtype": dtype, "headdim_v": 8})
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    arguments = (inputs.q, inputs.k, inputs.v, 0.25, True, False, False, implementation)
    out, lse, saved = torch.ops.triflash.attention_forward(*arguments)
    real = [out, lse, *saved]
    if registry.get(implementation).backward is not None:
        options = arguments[3:]
        backward = (inputs.dout, inputs.dlse, *arguments[:3], out, lse, saved, *options)
        real += torch.ops.triflash.attention_backward(*backward)[:3]
    mode = torch._subclasses.FakeTensorMode()

    def fake(x):
        return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

    with mode:
        out, lse, saved = torch.ops.triflash.attention_forward(*map(fake, arguments))
        fakes = [out, lse, *saved]
        if registry.get(implementation).backward is not None:
            fakes += torch.ops.triflash.attention_backward(
                *(fake(x) if x is not backward[7] else saved for x in backward)
            )[:3]
    for a, b in zip(real, fakes, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, b.device.type)
        assert _strides(a) == _strides(b)


def _strides(x: torch.Tensor) -> list[int]:
    """Those that mean something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@every_differentiable_row
def test_vmap_raises(implementation, device):
    skip_unsupported(CASE, implementation, device)
    q = torch.randn(3, 1, 4, 1, 16, device=device, dtype=DTYPE)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: attention(q, q, q, implementation=implementation))(q)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: attention(q, q, q, implementation=implementation))(q.requires_grad_())


@every_differentiable_row
def test_forward_mode_raises(implementation, device):
    skip_unsupported(CASE, implementation, device)
    q = torch.randn(1, 4, 1, 16, device=device, dtype=DTYPE)

    def call(q):
        return attention(q, q, q, implementation=implementation)

    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(call, (q,), (q,))
    from torch.autograd import forward_ad

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        call(forward_ad.make_dual(q, q))


@every_differentiable_row
def test_functional_grad_raises(implementation, device):
    """torch.func.grad over an operator without the rule must not give zeros."""
    skip_unsupported(CASE, implementation, device)
    q = torch.randn(1, 4, 1, 16, device=device, dtype=DTYPE)

    def loss(q):
        return attention(q, q, q, implementation=implementation).square().sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func .*grad"):
        torch.func.grad(loss)(q)


@every_backend
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_transforms_raise_when_compiled(packed, backend, device):
    """There no autograd.Function is asked for a rule; gradients and tangents were 0."""
    from torch.autograd import forward_ad

    x = torch.randn(1, 4, 3, 1, 16, device=device, dtype=DTYPE)

    def call(x):
        return triflash.flash_attn_qkvpacked_func(x) if packed else attention(*x.unbind(2))

    def loss(x):
        return call(x).square().sum()

    def forward_mode(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x))).tangent

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, backend=backend)

    for raises in (
        lambda: compiled(torch.func.grad(loss))(x),
        lambda: torch.func.grad(compiled(loss))(x),
        lambda: compiled(lambda x: torch.func.jvp(call, (x,), (x,)))(x),
        lambda: compiled(forward_mode)(x),
    ):
        with pytest.raises(NotImplementedError, match="jvp"):
            raises()


@every_differentiable_row
def test_double_backward_raises(implementation, device):
    skip_unsupported(CASE, implementation, device)
    q = torch.randn(1, 4, 1, 16, device=device, dtype=DTYPE, requires_grad=True)
    out = attention(q, q, q, implementation=implementation)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), q)


def test_a_profiler_sees_the_operators_that_eager_calls_leave_out(device):
    q = torch.randn(1, 9, 2, 16, device=device, requires_grad=True)

    def gradient():
        out = triflash.attention(q, q, q, implementation="reference")
        return torch.autograd.grad(out.sum(), q)[0]

    alone = gradient()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        watched = gradient()
    names = {event.key for event in profile.key_averages()}
    assert {"triflash::attention_forward", "triflash::attention_backward"} <= names
    assert torch.equal(alone, watched)


@every_differentiable_row
def test_gradients_accumulate_in_leaves(implementation, device):
    skip_unsupported(CASE, implementation, device)
    q, k, v = _leaves(CASE, device)
    for _ in range(2):
        attention(q, k, v, causal=True, implementation=implementation).sum().backward()
    once = torch.autograd.grad(
        attention(q, k, v, causal=True, implementation=implementation).sum(), (q, k, v)
    )
    for leaf, grad in zip((q, k, v), once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


@every_row
def test_parameters_and_subclasses_work(implementation, device):
    skip_unsupported(CASE, implementation, device)
    q = torch.nn.Parameter(torch.randn(1, 4, 1, 16, device=device, dtype=DTYPE))
    out = attention(q, q, q, implementation=implementation)
    assert type(out) is torch.Tensor


@every_row
def test_tensors_that_are_negated_when_they_are_read(implementation, device):
    """PyTorch has such views of complex numbers; kernels would read what lies there."""
    skip_unsupported(CASE, implementation, device)
    inputs = make_inputs(CASE, device)
    plain = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    negated = [torch._neg_view(-x.detach()).requires_grad_() for x in plain]
    assert all(x.is_neg() for x in negated)
    options = {"causal": True, "implementation": implementation}
    out, same = (attention(*x, **options) for x in (plain, negated))
    assert torch.equal(out, same)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, plain, dout)
    gradients = torch.autograd.grad(same, negated, torch._neg_view(-dout))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    with torch.no_grad():
        assert torch.equal(attention(*negated, **options), out)


@every_row
def test_many_threads(implementation, device):
    """Gradients in threads of their own, as autograd and data loaders do."""
    from concurrent.futures import ThreadPoolExecutor

    skip_unsupported(CASE, implementation, device)
    if not GPU and registry.get(implementation).needs_kernels:
        pytest.skip("Triton's interpreter is not thread-safe")
    inputs = make_inputs(CASE, device)

    def call(_):
        return attention(inputs.q, inputs.k, inputs.v, causal=True, implementation=implementation)

    expected = call(0)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(call, range(32)):
            assert torch.equal(out, expected)
