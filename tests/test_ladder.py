"""What is particular to a rung of the ladder: v1, v1_paper, v2_torch and v2_atomic."""

from __future__ import annotations

import os

import aot
import pytest
import torch
from helpers import (
    GPU,
    LOW_PRECISION,
    assert_bitwise_equal,
    assert_within_budget,
    both_causal,
    in_a_new_process,
    skip_unsupported,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triflash import attention, reference, registry, testing
from triflash.target import Target
from triflash.testing import Case, make_inputs, run_case

RUNGS = ["v1", "v1_paper", "v2_torch", "v2_atomic"]
N = 300 if GPU else 50
RAGGED = Case(
    batch=2, seqlen_q=N, seqlen_k=N + 13, nheads=4, nheads_k=2, headdim=24, headdim_v=16,
    dtype=torch.float32, causal=True, with_dlse=True,
)  # fmt: skip
MORE_QUERIES = Case(
    batch=1, seqlen_q=N + 13, seqlen_k=N, headdim=16, dtype=torch.float32, causal=True
)


def _forward(case: Case, implementation: str, inputs):
    options = (case.spec().softmax_scale, case.causal, False, False, implementation)
    return torch.ops.triflash.attention_forward(inputs.q, inputs.k, inputs.v, *options)


def _backward(case: Case, implementation: str, inputs, out, lse, saved):
    arguments = (inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, saved)
    return registry.get(implementation).load_backward()(*arguments, case.spec())


@pytest.mark.parametrize("name", RUNGS)
def test_auto_never_picks_a_rung(name):
    row = registry.get(name)
    spec = Case(dtype=torch.float16).spec()
    gpus = (Target("cuda", "sm_90", 132), Target("hip", "gfx942", 304))
    for target in (*gpus, Target("cpu", interpreter=True)):
        assert registry.resolve("auto", spec, target).auto
        assert registry.resolve(name, spec, target) is row
    assert not row.auto
    with pytest.raises(NotImplementedError) as caught:
        registry.resolve("auto", spec, Target("cuda", "sm_75", 40))
    assert f"{name} " not in str(caught.value)


def test_what_each_version_saves():
    """SEEDS 2.1 to 2.3."""
    saves = {row.name: row.saves for row in registry.IMPLEMENTATIONS}
    assert saves["v1"] == saves["v1_paper"] == ("m", "l")
    assert saves["v2"] == saves["v2_torch"] == saves["v2_atomic"] == ()


@pytest.mark.parametrize("implementation", ["v1", "v1_paper"])
@pytest.mark.parametrize("case", [RAGGED, MORE_QUERIES], ids=["ragged", "rows without keys"])
def test_v1_saves_the_maximum_and_the_sum(implementation, case, device):
    """Of the scaled scores, in base e; a row without keys has -inf and 0."""
    inputs = make_inputs(case, device)
    _, lse, (m, l_i) = _forward(case, implementation, inputs)
    spec = case.spec()
    q, k = (t.double().transpose(1, 2) for t in (inputs.q, inputs.k))
    scores = q @ k.repeat_interleave(spec.group_size, dim=1).mT * spec.softmax_scale
    scores = scores.masked_fill(~reference.visible(spec, q.device), float("-inf"))
    maximum = scores.amax(-1)
    torch.testing.assert_close(m.double(), maximum, rtol=1e-5, atol=1e-5)
    sums = (scores - maximum.masked_fill(maximum == float("-inf"), 0.0)[..., None]).exp().sum(-1)
    torch.testing.assert_close(l_i.double(), sums, rtol=1e-5, atol=0)
    torch.testing.assert_close(lse, m + l_i.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["v1", "v1_paper"])
def test_v1s_backward_uses_m_and_l_and_not_lse(implementation, device):
    """Algorithm 4: p = exp(s - m) / l."""
    inputs = make_inputs(RAGGED, device)
    out, lse, (m, l_i) = _forward(RAGGED, implementation, inputs)
    nowhere = torch.full_like(lse, float("nan"))
    expected = _backward(RAGGED, implementation, inputs, out, nowhere, [m, l_i])
    allowed = testing.budget(RAGGED, inputs, testing.oracle(RAGGED, inputs))
    same = _backward(RAGGED, implementation, inputs, out, lse, [m + 1.0, l_i / torch.e])
    for name, a, b in zip(("dq", "dk", "dv"), expected, same, strict=True):
        assert (a - b).abs().max() <= 2 * allowed[name]
    for saved in ([m + 1.0, l_i], [m, l_i * 2]):
        other = _backward(RAGGED, implementation, inputs, out, lse, saved)
        for a, b in zip(expected, other, strict=True):
            assert (a - b).abs().max() > 0.1 * a.abs().max()


@pytest.mark.parametrize("nheads_k", [1, 6])
def test_v1_paper_runs_one_program_a_head(nheads_k):
    """More would race: every block of keys updates all rows of out, m and l."""
    call = {"batch": 3, "nheads": 6, "nheads_k": nheads_k, "seqlen": 1000}
    target = aot.TARGETS["sm_90"][1]
    forward, *_ = aot.record_call(target, implementation="v1_paper", **call)
    assert forward.grid == (18, 1, 1)
    forward, *_ = aot.record_call(target, implementation="v1", **call)
    assert forward.grid[0] == 18 * -(-1000 // forward.config.block_m)


@pytest.mark.parametrize("implementation", ["v1", "v1_paper"])
def test_v1s_output_is_rounded_once(implementation, device):
    """Many blocks of keys in half precision: rounding out once a block would add up."""
    n = 8192 if GPU else 320
    q, k = (torch.randn(1, n, 1, 16, device=device, dtype=torch.float16) for _ in range(2))
    v = torch.full_like(k, 0.3)
    out = attention(q[:, :40], k, v, implementation=implementation)
    assert (out - v[:, :40]).abs().max() <= torch.finfo(torch.float16).eps * 0.3


def test_v2_torch_is_v2s_forward(device):
    """SEEDS 0.2 and 0.3: one forward kernel object, two backwards."""
    mine, v2 = registry.get("v2_torch"), registry.get("v2")
    assert mine.forward == v2.forward
    assert mine.load_forward() is v2.load_forward()
    assert mine.load_backward() is not v2.load_backward()
    inputs = make_inputs(RAGGED, device)
    a, b = (run_case(RAGGED, inputs, name, backward=False) for name in ("v2_torch", "v2"))
    assert_bitwise_equal(a, b)


class Spy(TorchDispatchMode):
    """Sees every tensor that an operator of PyTorch gives, and the precision of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.precisions: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                # What it takes in memory: an expanded view takes none.
                real = [n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s]
                self.largest = max(self.largest, torch.Size(real).numel())
                self.shapes.add(tuple(tensor.shape))
        if "bmm" in str(function):
            self.precisions.add(getattr(torch.backends.cuda.matmul, "fp32_precision", "unknown"))
        return result


def _spied(case: Case, device: torch.device) -> Spy:
    inputs = make_inputs(case, device)
    expected = testing.oracle(case, inputs)
    with Spy() as spy:
        grads = _backward(
            case, "v2_torch", inputs, expected["out"].to(case.dtype), expected["lse"].float(), []
        )
    got = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert_within_budget(case, testing.compare(case, inputs, got))
    return spy


@both_causal
def test_v2_torch_holds_one_tile_of_scores(causal, device):
    """However long the sequences are (SEEDS 2.4)."""
    from triflash.kernels.v2_torch.backward import BLOCK_M, BLOCK_N

    case = Case(
        batch=1, seqlen_q=2 * BLOCK_M + 7, seqlen_k=2 * BLOCK_N + 9, nheads=2, nheads_k=1,
        headdim=16, dtype=torch.float32, causal=causal, with_dlse=True,
    )  # fmt: skip
    spy = _spied(case, device)
    assert (1, 1, 2 * BLOCK_M, BLOCK_N) in spy.shapes
    assert spy.largest == 2 * BLOCK_M * BLOCK_N


def test_v2_torch_does_not_expand_k_and_v(device):
    """With few queries nothing is larger than dk and dv in float32."""
    case = Case(
        batch=1, seqlen_q=3, seqlen_k=1500, nheads=8, nheads_k=1, headdim=64, dtype=torch.float32
    )
    assert _spied(case, device).largest == 1500 * 64


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, LOW_PRECISION], ids=str)
def test_v2_torch_chooses_the_precision_of_its_products(setting, dtype, device):
    """Float32 stays float32 whatever PyTorch was told, and PyTorch's setting stays what it was."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has one setting for all products, which test_gpu.py covers")
    before = torch.get_float32_matmul_precision()
    case = Case(**{**vars(RAGGED), "dtype": dtype})
    inputs = make_inputs(case, device)
    out, lse, saved = _forward(case, "v2_torch", inputs)
    try:
        torch.set_float32_matmul_precision(setting)
        with Spy() as spy:
            _backward(case, "v2_torch", inputs, out, lse, saved)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    tf32 = device.type == "cuda" and dtype != torch.float32
    assert spy.precisions == {"tf32" if tf32 else "ieee"}


def test_v2_atomic_refuses_deterministic(device):
    q = torch.randn(1, 4, 1, 16, device=device, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"v2_atomic refuses deterministic=True.*v2"):
        attention(q, q, q, deterministic=True, implementation="v2_atomic")
    for name in ("v1", "v1_paper", "v2_torch", "v2", "reference"):
        attention(q, q, q, deterministic=True, implementation=name)


@pytest.mark.parametrize("implementation", RUNGS)
def test_the_first_gradient_of_a_process_is_right(implementation, device, tmp_path):
    """Nothing is compiled, tuned or cached yet (the originals' first gradient was corrupt)."""
    case = Case(
        batch=1, seqlen_q=N, seqlen_k=N + 9, headdim=32, dtype=LOW_PRECISION, with_dlse=True
    )
    skip_unsupported(case, implementation, device)
    in_a_new_process(_first_gradient, case, implementation, device, str(tmp_path))


def _first_gradient(case: Case, implementation: str, device: torch.device, cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    assert_within_budget(case, testing.check_case(case, implementation, device))


def test_v2_atomic_starts_from_zero_in_every_call(device):
    """Prepared launches, reused memory: the second gradient is no sum of two."""
    inputs = make_inputs(RAGGED, device)
    for _ in range(3):
        got = run_case(RAGGED, inputs, "v2_atomic")
        assert_within_budget(RAGGED, testing.compare(RAGGED, inputs, got))


@pytest.mark.parametrize("implementation", [*RUNGS, "v2"])
def test_keys_past_the_end_stay_out_of_dq(implementation, device):
    """All scores far below zero: exp(0 - lse) of a key that does not exist would be infinite."""
    case = Case(
        batch=1, seqlen_q=20, seqlen_k=35, nheads=1, nheads_k=1, headdim=16, dtype=torch.float16,
        softmax_scale=-10.0,
    )  # fmt: skip
    inputs = make_inputs(case, device)
    inputs.q.abs_()
    inputs.k.abs_()
    got = run_case(case, inputs, implementation)
    assert got["lse"].max() < -10
    assert_within_budget(case, testing.compare(case, inputs, got))


@pytest.mark.gpu
@both_causal
def test_v2_atomic_differs_from_run_to_run_only_in_dq(causal, device):
    """By the order of float32 additions, rounded once; dk and dv have one owner."""
    case = Case(
        batch=2, seqlen_q=4096, seqlen_k=4096, nheads=8, nheads_k=4, headdim=64,
        dtype=torch.bfloat16, causal=causal,
    )  # fmt: skip
    inputs = make_inputs(case, device)
    first = run_case(case, inputs, "v2_atomic")
    for _ in range(10):
        again = run_case(case, inputs, "v2_atomic")
        for name in ("out", "lse", "dk", "dv"):
            assert torch.equal(first[name], again[name]), name
        torch.testing.assert_close(first["dq"], again["dq"], rtol=2**-7, atol=1e-5)
