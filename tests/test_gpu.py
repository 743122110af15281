"""What only a GPU can show: streams, devices, graphs, memory, tf32, sanitizers, first calls."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_repeated,
    assert_within_budget,
    both_causal,
    captured,
    check,
    every_differentiable_row,
    every_kernel_row,
    every_row,
    skip_unsupported,
    unexplained_races,
)

from triflash import attention, registry, testing
from triflash.testing import Case, Inputs, make_inputs, run_case

pytestmark = pytest.mark.gpu

CASE = Case(
    batch=2, seqlen_q=1000, seqlen_k=1100, nheads=8, nheads_k=4, headdim=128,
    dtype=torch.bfloat16, causal=True, with_dlse=True,
)  # fmt: skip


def _with(case: Case, **changes) -> Case:
    return Case(**{**vars(case), **changes})


@every_row
def test_side_stream(implementation, device):
    """Work is queued on the current stream, and waits for what is queued there before."""
    skip_unsupported(CASE, implementation, device)
    inputs = make_inputs(CASE, device)
    expected = run_case(CASE, inputs, implementation)
    late = Inputs(**{name: torch.zeros_like(t) for name, t in inputs.tensors.items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, in which a wrong stream would run ahead
        for name, tensor in inputs.tensors.items():
            getattr(late, name).copy_(tensor)
        got = run_case(CASE, late, implementation)
    stream.synchronize()
    assert_repeated(implementation, CASE, inputs, expected, got)


@every_kernel_row
def test_memory_reused_while_a_kernel_runs(implementation, device):
    """Inputs freed right after the call, their memory filled again on the same stream."""
    skip_unsupported(CASE, implementation, device)
    inputs = make_inputs(CASE, device)
    expected = run_case(CASE, inputs, implementation)
    torch.cuda._sleep(200_000_000)
    copies = Inputs(**{name: t.clone() for name, t in inputs.tensors.items()})
    got = run_case(CASE, copies, implementation)
    del copies
    filler = [torch.full_like(inputs.q, float("nan")) for _ in range(16)]
    torch.cuda.synchronize()
    assert_repeated(implementation, CASE, inputs, expected, got)
    del filler


@pytest.mark.gpu(2)
@every_row
def test_tensors_on_another_device_than_the_current(implementation):
    other = torch.device("cuda", 1)
    skip_unsupported(CASE, implementation, other)
    torch.cuda.set_device(0)
    inputs = make_inputs(CASE, other)
    got = run_case(CASE, inputs, implementation)
    assert torch.cuda.current_device() == 0
    assert all(t.device == other for t in got.values())
    assert_within_budget(CASE, testing.compare(CASE, inputs, got))
    first = make_inputs(CASE, torch.device("cuda", 0))
    assert_within_budget(CASE, testing.compare(CASE, first, run_case(CASE, first, implementation)))


@pytest.mark.gpu(2)
def test_mixed_gpus_are_refused():
    q, k = (torch.zeros(1, 2, 1, 16, device=f"cuda:{i}") for i in range(2))
    with pytest.raises(ValueError, match="cuda:1"):
        attention(q, k, q)


@every_kernel_row
@both_causal
def test_cuda_graph(implementation, causal, device):
    """Forward and backward captured once, replayed on other data."""
    case = _with(CASE, causal=causal)
    skip_unsupported(case, implementation, device)
    static = make_inputs(case, device)
    leaves = tuple(t.requires_grad_() for t in (static.q, static.k, static.v))

    def step() -> dict[str, torch.Tensor]:
        out, lse = attention(*leaves, causal=causal, return_lse=True, implementation=implementation)
        grads = torch.autograd.grad((out, lse), leaves, (static.dout, static.dlse))
        return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    graph, got = captured(step)
    for seed in (1, 2):
        fresh = make_inputs(_with(case, seed=seed), device)
        with torch.no_grad():
            for name, tensor in fresh.tensors.items():
                getattr(static, name).copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        expected = run_case(case, fresh, implementation)
        assert_repeated(implementation, case, fresh, expected, got)


@every_kernel_row
def test_compile_with_cuda_graphs(implementation, device):
    """mode="reduce-overhead" captures what it compiles."""
    skip_unsupported(CASE, implementation, device)

    def call(q, k, v):
        return attention(q * 1, k, v, causal=True, implementation=implementation)

    inputs = make_inputs(CASE, device)
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    expected = call(inputs.q, inputs.k, inputs.v)
    for _ in range(4):
        assert torch.equal(compiled(inputs.q, inputs.k, inputs.v), expected)


def _allocated() -> int:
    """Bytes in use once all is done and garbage, such as other tests' graphs, is gone."""
    torch.cuda.synchronize()
    gc.collect()
    return torch.cuda.memory_allocated()


def _peak(implementation: str, seqlen: int, device: torch.device) -> tuple[int, int]:
    """Bytes above the inputs in forward and backward, and what out, lse, grads and delta take."""
    case = Case(
        batch=1, seqlen_q=seqlen, seqlen_k=seqlen, nheads=8, nheads_k=8, headdim=64,
        dtype=torch.bfloat16, causal=True,
    )  # fmt: skip
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    leaves = tuple(t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    for _ in range(2):  # the first compiles
        before = _allocated()
        torch.cuda.reset_peak_memory_stats()
        out = attention(*leaves, causal=True, implementation=implementation)
        grads = torch.autograd.grad(out, leaves, inputs.dout)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del out, grads
    tensor, lse = inputs.q.numel() * 2, 8 * seqlen * 4
    return peak, 4 * tensor + lse * (2 + len(registry.get(implementation).saves))


@pytest.mark.parametrize("implementation", ["v2"])
def test_memory_is_what_is_documented(implementation, device):
    """out, lse, dq, dk, dv and delta, nothing else and nothing quadratic (SEEDS 2.4)."""
    for seqlen in (2048, 16384):
        peak, expected = _peak(implementation, seqlen, device)
        assert expected <= peak <= expected + 6 * 2**20  # the allocator's rounding of six tensors


@every_differentiable_row
def test_memory_does_not_leak(implementation, device):
    skip_unsupported(CASE, implementation, device)
    inputs = make_inputs(CASE, device)
    run_case(CASE, inputs, implementation)
    before = _allocated()
    for _ in range(50):
        run_case(CASE, inputs, implementation)
    assert _allocated() <= before  # less if what another test held goes meanwhile


@every_kernel_row
@both_causal
def test_float32_stays_float32(implementation, causal, device):
    """Whatever PyTorch allows for its own products."""
    case = _with(CASE, dtype=torch.float32, causal=causal)
    skip_unsupported(case, implementation, device)
    before = torch.get_float32_matmul_precision()
    inputs = make_inputs(case, device)
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.matmul.allow_tf32 = True
        got = run_case(case, inputs, implementation)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_float32_matmul_precision(before)
    assert_within_budget(case, testing.compare(case, inputs, got))


@every_kernel_row
@both_causal
@pytest.mark.parametrize("headdim", [40, 64, 128, 256])
def test_tf32_by_choice(implementation, causal, headdim, device):
    case = _with(CASE, dtype=torch.float32, causal=causal, headdim=headdim, allow_tf32=True)
    check(case, implementation, device)
    inputs = make_inputs(case, device)
    exact = run_case(_with(case, allow_tf32=False), inputs, implementation)
    assert not torch.equal(run_case(case, inputs, implementation)["out"], exact["out"])


@every_kernel_row
@pytest.mark.parametrize("headdim", [64, 128])
@both_causal
def test_long_sequences(implementation, headdim, causal, device):
    """The last rows of 16384, which the oracle can hold."""
    seqlen, rows = 16384, 256
    whole = Case(
        batch=1, seqlen_q=seqlen, seqlen_k=seqlen, nheads=4, nheads_k=4, headdim=headdim,
        dtype=torch.bfloat16, causal=causal,
    )  # fmt: skip
    skip_unsupported(whole, implementation, device)
    inputs = make_inputs(whole, device)
    got = run_case(whole, inputs, implementation)
    last = slice(-rows, None)
    part = _with(whole, seqlen_q=rows)
    some = Inputs(inputs.q[:, last], inputs.k, inputs.v, inputs.dout[:, last], None)
    few = {"out": got["out"][:, last], "lse": got["lse"][..., last], "dq": got["dq"][:, last]}
    assert_within_budget(part, testing.compare(part, some, few))


@every_kernel_row
@both_causal
def test_first_call_compiles_in_five_seconds(implementation, causal, tmp_path, device):
    """Forward and backward each, from an empty cache."""
    skip_unsupported(CASE, implementation, device)
    code = (
        "import time, torch, triflash\n"
        "q = torch.randn(2, 1024, 8, 128, device='cuda').bfloat16().requires_grad_()\n"
        f"triflash.attention(q[:0], q[:0], q[:0], implementation={implementation!r})\n"
        "torch.cuda.synchronize(); a = time.perf_counter()\n"
        f"out = triflash.attention(q, q, q, causal={causal}, implementation={implementation!r})\n"
        "torch.cuda.synchronize(); b = time.perf_counter()\n"
        "out.backward(out)\n"
        "torch.cuda.synchronize(); c = time.perf_counter()\n"
        "print(b - a, c - b)\n"
    )
    took = []
    for attempt in range(3):  # other tests may be at work on the same cores
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / str(attempt))}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        took.append([float(seconds) for seconds in result.stdout.split()])
    assert min(forward for forward, _ in took) < 5
    assert min(backward for _, backward in took) < 5


@every_kernel_row
def test_calls_do_not_wait_for_the_gpu(implementation, device):
    """No hidden synchronisation: calls return while the GPU still sleeps."""
    skip_unsupported(CASE, implementation, device)
    inputs = make_inputs(CASE, device)
    leaves = tuple(t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))

    def step():
        attention(*leaves, causal=True, implementation=implementation).backward(inputs.dout)

    for _ in range(2):  # loading a kernel does wait; autograd adds to gradients at the second call
        step()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    step()
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    assert took < 0.3


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@every_kernel_row
def test_compute_sanitizer(implementation, tool, device):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    case = Case(batch=1, seqlen_q=150, seqlen_k=210, headdim=40, causal=True, with_dlse=True)
    skip_unsupported(case, implementation, device)
    few = "multiprocessors(2)" if implementation == "v3" else "nullcontext()"
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from contextlib import nullcontext\n"
        "from helpers import multiprocessors\n"
        "from triflash.testing import *\n"
        "sizes = dict(batch=1, seqlen_q=150, seqlen_k=210, causal=True)\n"
        "cases = [Case(**sizes, headdim=d) for d in (33, 40, 128, 256)]\n"
        "cases.append(Case(1, 300, 300, headdim=128, causal=True, window_size=(64, 0)))\n"
        "for case in cases:\n"
        f"    if unsupported(case, {implementation!r}, 'cuda') is None:\n"
        f"        with {few}:  # whose programs draw their tiles\n"
        f"            run_case(case, make_inputs(case, 'cuda'), {implementation!r})\n"
        "torch.cuda.synchronize()\n"
    )
    result = subprocess.run(
        # cuda-bindings asks the driver for functions that it does not have, which is no error.
        [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9",
         sys.executable, "-c", code],
        # The caching allocator would hide what lies past a tensor.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    if tool == "racecheck" and implementation == "v3" and result.returncode == 9:
        races = unexplained_races(result.stdout)
        assert not races, "\n".join(races)
        return
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
