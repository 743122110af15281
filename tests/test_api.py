"""The public functions: signatures, what they refuse, and how."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import GPU, ROWS, every_row, skip_unsupported

import triflash
from triflash import attention, flash_attn_func, registry, testing
from triflash.spec import make_spec
from triflash.target import Target
from triflash.testing import Case

DTYPE = torch.float16


@pytest.fixture
def qkv(device):
    return tuple(torch.randn(2, 5, 4, 16, device=device, dtype=DTYPE) for _ in range(3))


def test_public_names():
    for name in triflash.__all__:
        assert name in dir(triflash)
        getattr(triflash, name)
    with pytest.raises(AttributeError, match="nonsense"):
        triflash.nonsense  # noqa: B018


def test_every_public_function_is_documented():
    for function in (attention, flash_attn_func, triflash.implementations):
        assert function.__doc__
        for name in inspect.signature(function).parameters:
            assert name in function.__doc__, f"{function.__name__}: {name}"


def test_implementations_are_the_registry():
    assert triflash.implementations() == [row.name for row in registry.IMPLEMENTATIONS]
    assert "v2" in ROWS
    assert "reference" in ROWS
    assert len(set(ROWS)) == len(ROWS)
    assert "auto" not in ROWS


def test_flash_attn_func_has_flash_attn_2s_signature():
    """flash_attn 2.8, flash_attn_interface.py; what we add comes after and by keyword only."""
    theirs = [
        ("q", inspect.Parameter.empty), ("k", inspect.Parameter.empty),
        ("v", inspect.Parameter.empty), ("dropout_p", 0.0), ("softmax_scale", None),
        ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0), ("alibi_slopes", None),
        ("deterministic", False), ("return_attn_probs", False),
    ]  # fmt: skip
    parameters = list(inspect.signature(flash_attn_func).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == theirs
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(theirs) :])


def test_attention_takes_options_by_keyword_and_no_others():
    parameters = inspect.signature(attention).parameters
    kinds = {name: p.kind for name, p in parameters.items()}
    assert [n for n, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == [
        "q", "k", "v",
    ]  # fmt: skip
    assert inspect.Parameter.VAR_KEYWORD not in kinds.values()
    assert inspect.Parameter.VAR_POSITIONAL not in kinds.values()


@every_row
def test_flash_attn_func_is_attention(implementation, qkv, device):
    skip_unsupported(Case(headdim=16, dtype=DTYPE, seqlen_q=5, seqlen_k=5), implementation, device)
    q, k, v = qkv
    out, lse = attention(
        q, k, v, causal=True, softmax_scale=0.3, return_lse=True, implementation=implementation
    )
    same = flash_attn_func(
        q, k, v, 0.0, 0.3, True, (-1, -1), 0.0, None, False, True, implementation=implementation
    )
    assert torch.equal(out, same[0])
    assert torch.equal(lse, same[1])
    assert same[2] is None
    plain = flash_attn_func(q, k, v, 0.0, 0.3, True, implementation=implementation)
    assert torch.equal(out, plain)
    windowless = flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(None, None),
        implementation=implementation,
    )  # fmt: skip
    assert torch.equal(out, windowless)


def test_attention_returns_a_tensor_or_a_pair(qkv):
    assert isinstance(attention(*qkv), torch.Tensor)
    out, lse = attention(*qkv, return_lse=True)
    assert out.shape == (2, 5, 4, 16)
    assert out.dtype == DTYPE
    assert lse.shape == (2, 4, 5)
    assert lse.dtype == torch.float32


def _empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


GOOD = (2, 5, 4, 16)
INT, COMPLEX, FLOAT8 = torch.int32, torch.complex64, torch.float8_e4m3fn
FLOAT, BFLOAT = torch.float32, torch.bfloat16

# What differs from three tensors of shape GOOD, the error, and words of its message.
WRONG_TENSORS = {
    "a list": ({"q": [1.0]}, TypeError, ["q", "torch.Tensor", "list"]),
    "None": ({"v": None}, TypeError, ["v", "torch.Tensor", "NoneType"]),
    "rank of q": ({"q": _empty(5, 4, 16)}, ValueError, ["q", "4", "(5, 4, 16)"]),
    "rank of k": ({"k": _empty(5, 16)}, ValueError, ["k", "4", "(5, 16)"]),
    "rank of v": ({"v": _empty(1, *GOOD)}, ValueError, ["v", "4", "(1, 2, 5, 4, 16)"]),
    "integers": ({n: _empty(*GOOD, dtype=INT) for n in "qkv"}, TypeError, ["q", "int32"]),
    "complex": ({n: _empty(*GOOD, dtype=COMPLEX) for n in "qkv"}, TypeError, ["q", "complex64"]),
    "float8": ({n: _empty(*GOOD, dtype=FLOAT8) for n in "qkv"}, TypeError, ["q", "float8"]),
    "dtype of k": ({"k": _empty(*GOOD, dtype=FLOAT)}, TypeError, ["k", "float16", "float32"]),
    "dtype of v": ({"v": _empty(*GOOD, dtype=BFLOAT)}, TypeError, ["v", "float16", "bfloat16"]),
    "devices": ({"k": _empty(*GOOD).to("meta")}, ValueError, ["k", "cpu", "meta"]),
    "batch of k": ({"k": _empty(3, 5, 4, 16)}, ValueError, ["k", "batch", "2", "3"]),
    "batch of v": ({"v": _empty(1, 5, 4, 16)}, ValueError, ["v", "batch", "2", "1"]),
    "headdim of k": ({"k": _empty(2, 5, 4, 8)}, ValueError, ["k", "headdim", "16", "8"]),
    "seqlen of v": ({"v": _empty(2, 6, 4, 16)}, ValueError, ["v", "seqlen", "5", "6"]),
    "heads of v": ({"v": _empty(2, 5, 2, 16)}, ValueError, ["v", "nheads", "4", "2"]),
    "indivisible": ({n: _empty(2, 5, 3, 16) for n in "kv"}, ValueError, ["multiple", "4", "3"]),
    "more key heads": ({n: _empty(2, 5, 8, 16) for n in "kv"}, ValueError, ["multiple", "4", "8"]),
    "no key heads": ({n: _empty(2, 5, 0, 16) for n in "kv"}, ValueError, ["multiple", "4", "0"]),
    "headdim 0": ({n: _empty(2, 5, 4, 0) for n in "qk"}, ValueError, ["headdim of q", "0"]),
    "headdim_v 0": ({"v": _empty(2, 5, 4, 0)}, ValueError, ["headdim of v", "at least 1", "0"]),
    "strided q": ({"q": _empty(2, 5, 4, 32)[..., ::2]}, ValueError, ["q", "2", "q.contiguous()"]),
    "strided k": ({"k": _empty(2, 5, 16, 4).mT}, ValueError, ["k", "contiguous", "4"]),
    "strided v": ({"v": _empty(2, 5, 4, 1).expand(GOOD)}, ValueError, ["v", "contiguous", "0"]),
}


NOT_DENSE = {
    "sparse": lambda q: q.to_sparse(),
    "mkldnn": lambda q: q.to_mkldnn(),
    "nested": lambda q: torch.nested.nested_tensor(list(q)),
    "jagged": lambda q: torch.nested.nested_tensor(list(q), layout=torch.jagged),
}


@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_must_be_dense(kind):
    make = NOT_DENSE[kind]
    q, v = (torch.ones(2, 5, 4, n) for n in (16, 1))  # where strides of 0 would do
    what = "nested one" if kind in ("nested", "jagged") else "layout torch._?"
    for name, wrong in (("q", q), ("v", v)):
        tensors = {"q": q, "k": q, "v": v} | {name: make(wrong)}
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got .*{what}"):
            attention(**tensors)
    qkv = torch.ones(2, 5, 3, 4, 16)
    with pytest.raises(TypeError, match=f"qkv must be a dense tensor, got .*{what}"):
        triflash.flash_attn_qkvpacked_func(make(qkv))
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    packed = torch.ones(5, 4, 16)
    for name in ("q", "k"):
        tensors = dict.fromkeys("qkv", packed) | {name: make(packed)}
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got .*{what}"):
            triflash.flash_attn_varlen_func(**tensors, **_sequences(cu_seqlens, 5))


def test_extras_must_be_dense():
    q = torch.ones(2, 5, 4, 16)
    for name, shape in (("sinks", (4,)), ("bias", (1, 1, 5, 5)), ("alibi_slopes", (4,))):
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got .*sparse"):
            attention(q, q, q, **{name: torch.ones(shape).to_sparse()})


def _sequences(cu_seqlens: torch.Tensor, longest: int) -> dict[str, object]:
    return {
        "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }  # fmt: skip


@pytest.mark.parametrize("function", [attention, flash_attn_func])
@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors(name, function):
    different, error, words = WRONG_TENSORS[name]
    tensors = {n: _empty(*GOOD) for n in "qkv"} | different
    with pytest.raises(error) as caught:
        function(**tensors)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "error", "words"),
    [
        ("softmax_scale", float("nan"), ValueError, ["finite", "nan"]),
        ("softmax_scale", float("inf"), ValueError, ["finite", "inf"]),
        ("softmax_scale", 1e39, ValueError, ["finite", "1e+39"]),
        ("softmax_scale", "1", TypeError, ["number", "str"]),
        ("softmax_scale", True, TypeError, ["number", "bool"]),
        ("softmax_scale", torch.ones(1), TypeError, ["number", "Tensor"]),
        ("causal", 1, TypeError, ["bool", "1"]),
        ("causal", None, TypeError, ["bool", "None"]),
        ("causal", [True], TypeError, ["bool", "[True]"]),
        ("softmax_scale", [1.0], TypeError, ["number", "list"]),
        ("deterministic", "no", TypeError, ["bool", "no"]),
        ("deterministic", {}, TypeError, ["bool", "{}"]),
        ("allow_tf32", 0, TypeError, ["bool", "0"]),
        ("allow_tf32", [], TypeError, ["bool", "[]"]),
        ("return_lse", 1, TypeError, ["bool", "1"]),
        ("return_lse", None, TypeError, ["bool", "None"]),
        ("return_lse", torch.ones(2), TypeError, ["bool, got Tensor"]),
        ("window_size", torch.ones(2), TypeError, ["pair", "got Tensor"]),
        ("implementation", "v0", ValueError, ["v0", *ROWS]),
        ("implementation", "V2", ValueError, ["V2", "v2"]),
        ("implementation", "", ValueError, ["''"]),
        ("implementation", None, (ValueError, TypeError), ["None"]),
        ("implementation", ["v2"], ValueError, ["['v2']", *ROWS]),
    ],
    ids=str,
)
def test_wrong_options(option, value, error, words, qkv):
    with pytest.raises(error) as caught:
        attention(*qkv, **{option: value})
    for word in (option, *words):
        assert word in str(caught.value)


def test_return_attn_probs_must_be_a_bool(qkv):
    """In each function that has it."""
    q, k, v = qkv
    stacked, longest = torch.stack(qkv, dim=2), q.shape[1]
    cu_seqlens = torch.tensor([0, longest], device=q.device, dtype=torch.int32)
    sequences = _sequences(cu_seqlens, longest)
    for call in (
        partial(flash_attn_func, q, k, v),
        partial(triflash.flash_attn_qkvpacked_func, stacked),
        partial(triflash.flash_attn_kvpacked_func, q, stacked[:, :, 1:]),
        partial(triflash.flash_attn_varlen_func, q[0], k[0], v[0], **sequences),
        partial(triflash.flash_attn_varlen_qkvpacked_func, stacked[0], cu_seqlens, longest),
        partial(triflash.flash_attn_varlen_kvpacked_func, q[0], stacked[0, :, 1:], **sequences),
    ):
        for wrong in (1, None, cu_seqlens):
            with pytest.raises(TypeError, match="return_attn_probs must be a bool, got"):
                call(return_attn_probs=wrong)


def test_what_is_no_tensor_is_named_under_autocast(qkv, device):
    q, k, _ = qkv
    with (
        torch.autocast(device.type, torch.bfloat16),
        pytest.raises(TypeError, match=r"v must be a torch\.Tensor, got NoneType"),
    ):
        attention(q, k, None)


@pytest.mark.parametrize("option", ["causal", "deterministic", "allow_tf32", "softmax_scale"])
def test_wrong_options_are_refused_again(option, qkv):
    """Validation is remembered, and True == 1 == 1.0."""
    good = {"softmax_scale": 1.0}.get(option, True)
    bad = {"softmax_scale": True}.get(option, 1)
    attention(*qkv, **{option: good})
    with pytest.raises(TypeError, match=option):
        attention(*qkv, **{option: bad})
    attention(*qkv, **{option: good})


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(-0.1, ValueError, "-0.1"), (1.0, ValueError, "1.0"), ("0", TypeError, "str")],
)
def test_dropout_must_be_a_probability(value, error, words, qkv):
    with pytest.raises(error, match=f"dropout_p must .*{words}"):
        flash_attn_func(*qkv, dropout_p=value)


@pytest.mark.parametrize(
    ("row", "most", "headdim"), [("v1", 256, 257), ("v2", 512, 513), ("v2", 512, 576)]
)
def test_head_dimension_too_large_for_the_kernels(row, most, headdim, device):
    q = torch.zeros(1, 2, 1, headdim, device=device, dtype=DTYPE)
    narrow = q[..., :8]
    for tensors in ((q, q, q), (narrow, narrow, q), (q, q, narrow)):
        message = f"{row} takes head dimensions up to {most}, not {headdim}"
        with pytest.raises(NotImplementedError, match=message):
            attention(*tensors, implementation=row)
        attention(*tensors, implementation="reference")


def test_auto_on_a_gpu_never_means_the_quadratic_reference():
    gpu = Target("cuda", "sm_90", 132)
    case = Case(headdim=520)
    with pytest.raises(NotImplementedError, match="v2 takes head dimensions up to 512, not 520"):
        registry.resolve("auto", case.spec(), gpu)
    assert registry.resolve("reference", case.spec(), gpu).name == "reference"
    assert registry.resolve("auto", Case().spec(), gpu).needs_kernels


def test_auto_on_a_cpu_is_the_reference_unless_kernels_can_run():
    spec = Case(dtype=torch.float32).spec()
    assert registry.resolve("auto", spec, Target("cpu")).name == "reference"
    assert registry.resolve("auto", spec, Target("cpu", has_triton=False)).name == "reference"
    assert registry.resolve("auto", spec, Target("cpu", interpreter=True)).needs_kernels


@pytest.mark.parametrize(
    "implementation",
    [r.name for r in registry.IMPLEMENTATIONS if r.needs_kernels and not r.nvidia_only],
)
@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target("cpu"), ["cpu", "TRITON_INTERPRET=1"]),
        (Target("cpu", has_triton=False), ["triton", "not installed"]),
        (Target("cuda", "sm_75", 40), ["sm_75"]),
        (Target("mps"), ["mps"]),
    ],
    ids=lambda x: x.arch or x.kind if isinstance(x, Target) else "",
)
def test_kernels_say_what_they_need(implementation, target, words):
    by_auto = target.kind == "cuda" and registry.get(implementation).auto
    for name in (implementation, "auto") if by_auto else (implementation,):
        with pytest.raises(NotImplementedError) as caught:
            registry.resolve(name, Case().spec(), target)
        for word in (implementation, *words):
            assert word in str(caught.value)


@pytest.mark.parametrize("row", registry.IMPLEMENTATIONS, ids=lambda row: row.name)
def test_every_row_is_whole(row):
    assert row.name.isidentifier()
    assert row.summary
    assert callable(row.load_forward())
    if row.backward is not None:
        assert callable(row.load_backward())


def test_float64_is_for_the_reference(device):
    q = torch.randn(1, 3, 1, 8, device=device, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        attention(q, q, q, implementation="v2")
    assert attention(q, q, q, implementation="reference").dtype == torch.float64


def test_requires_grad_without_a_backward(qkv, monkeypatch):
    import dataclasses

    row = dataclasses.replace(registry.get("reference"), name="forward_only", backward=None)
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (*registry.IMPLEMENTATIONS, row))
    registry.resolve.cache_clear()
    try:
        q, k, v = qkv
        with pytest.raises(NotImplementedError, match=r"forward_only has no backward"):
            attention(q.requires_grad_(), k, v, implementation="forward_only")
        with torch.no_grad():
            attention(q, k, v, implementation="forward_only")
        attention(q.detach(), k, v, implementation="forward_only")
    finally:
        registry.resolve.cache_clear()


def test_a_spec_is_hashable_and_says_one_thing_once(qkv):
    q, k, v = qkv
    one = make_spec(q, k, v, None, True, False, False)
    same = make_spec(q, k, v, 0.25, True, False, False)
    assert one == same
    assert hash(one) == hash(same)
    assert one != make_spec(q, k, v, None, False, False, False)


def test_without_gpu_or_interpreter_the_reference_runs():
    """What a user without a GPU gets who sets nothing."""
    if GPU:
        pytest.skip("there is a GPU")
    code = (
        "import torch, triflash\n"
        "q = torch.randn(1, 3, 2, 8)\n"
        "a = triflash.attention(q, q, q)\n"
        "b = triflash.attention(q, q, q, implementation='reference')\n"
        "assert torch.equal(a, b)\n"
        "try:\n"
        "    triflash.attention(q, q, q, implementation='v2')\n"
        "except NotImplementedError as error:\n"
        "    assert 'TRITON_INTERPRET=1' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('v2 ran')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_testing_knows_why_not(device):
    reason = testing.unsupported(Case(headdim=520), "v2", device)
    assert reason is not None
    assert "520" in reason
    assert testing.unsupported(Case(headdim=520), "reference", device) is None
