"""Clocks: time on the GPU in interleaved rounds, host time, peak memory, and what a GPU can do."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from triflash.bench.cases import Plan
from triflash.bench.contestants import Bound
from triflash.bench.record import dtype_options
from triflash.testing import Case

# Calls ahead of the GPU that fit into its queue of launches.
_AHEAD = 40
_HOST_CALLS = 100


@dataclass(frozen=True)
class Timed:
    """Something to be called many times."""

    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class _Pace:
    """How often to call in one turn, how many turns, and whether Python is slower than the GPU."""

    calls: int
    rounds: int
    head_start_s: float


@dataclass(frozen=True)
class Spread:
    """Median, interquartile range and number of the rounds."""

    median: float
    iqr: float
    rounds: int

    @classmethod
    def of(cls, rounds: list[float]) -> Spread:
        if len(rounds) < 2:
            return cls(rounds[0], 0.0, len(rounds))
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(median, high - low, len(rounds))


def directed(bound: Bound, direction: str) -> Timed:
    """What is timed: the forward alone, the backward alone on a kept graph, or both."""
    if direction == "fwd":
        return Timed(torch.no_grad()(bound.call), bound.context)
    if direction == "bwd":
        with bound.context():
            out = bound.call()
        return Timed(lambda: bound.gradients(out, retain_graph=True), bound.context)
    return Timed(lambda: bound.gradients(bound.call()), bound.context)


def interleaved(
    contestants: dict[str, Timed],
    plan: Plan,
    device: torch.device,
    tick: Callable[[float], None] = lambda fraction: None,
) -> dict[str, list[float]]:
    """Milliseconds a call, by contestant and round.

    Every round times all contestants, in an order drawn anew (the same in every process): a card
    at its power limit punishes whoever follows a hot one, by up to 8% (measured on an H200), so
    nobody may always follow the same. Before each call the L2 cache is
    filled with something else. On a GPU, events around each call are what counts, and the GPU gets
    enough of a head start that it never waits for Python. `tick` hears what fraction is done.
    """
    turn = _gpu_turn if device.type == "cuda" else _cpu_turn
    paces = {name: _pace(timed, plan, device) for name, timed in contestants.items()}
    rounds: dict[str, list[float]] = {name: [] for name in contestants}
    draw = random.Random(0)
    for index in range(plan.rounds):
        for name in draw.sample(list(contestants), len(contestants)):
            if index < paces[name].rounds:
                rounds[name].append(turn(contestants[name], paces[name], device))
        tick(1.0 / plan.rounds)
    return rounds


def _pace(timed: Timed, plan: Plan, device: torch.device) -> _Pace:
    if device.type != "cuda":
        return _Pace(1, plan.rounds, 0.0)
    _gpu_turn(timed, _Pace(2, 1, 0.0), device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    with timed.context():
        for _ in range(3):
            timed.call()
    host_s = (time.perf_counter() - start) / 3
    torch.cuda.synchronize(device)
    call_s = (time.perf_counter() - start) / 3
    slow_host = host_s > 0.7 * call_s  # as it also looks when the queue of launches is full
    calls = max(1, round(plan.round_ms / 1e3 / call_s))
    if slow_host and call_s < 2e-3:
        calls = min(calls, _AHEAD)
    pace = _Pace(calls, 1, min(0.02, 1.5 * host_s * calls) if slow_host else 0.0)
    ends = time.perf_counter() + plan.settle_ms / 1e3
    while time.perf_counter() < ends:
        _gpu_turn(timed, pace, device)
    pace.rounds = min(plan.rounds, max(3, int(plan.longest_ms / 1e3 / (call_s * calls))))
    return pace


def _gpu_turn(timed: Timed, pace: _Pace, device: torch.device) -> float:
    flush, sink = _flush_buffer(device)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(pace.calls)
    ]
    if pace.head_start_s:
        torch.cuda._sleep(int(pace.head_start_s * 2e9))  # in clock cycles
    with timed.context():
        for start, end in events:
            torch.sum(flush, dim=0, out=sink)
            start.record()
            timed.call()
            end.record()
    torch.cuda.synchronize(device)
    return sum(start.elapsed_time(end) for start, end in events) / len(events)


def _cpu_turn(timed: Timed, pace: _Pace, device: torch.device) -> float:
    start = time.perf_counter()
    with timed.context():
        timed.call()
    return (time.perf_counter() - start) * 1e3


@lru_cache(maxsize=8)
def _flush_buffer(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice the L2 cache; reading it leaves no lines that would have to be written back."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(max(2 * size, 2**25) // 4, device=device), torch.zeros((), device=device)


def host_time(
    contestants: dict[str, Timed], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds of the calling thread a call, by contestant and round: nothing is waited for."""
    calls = _HOST_CALLS if device.type == "cuda" else 1
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds + 1):
        for name, timed in contestants.items():
            synchronize(device)
            with timed.context():
                start = time.perf_counter()
                for _ in range(calls):
                    timed.call()
                elapsed = time.perf_counter() - start
            synchronize(device)
            if index:  # the first round is the warm-up
                measured[name].append(elapsed / calls * 1e6)
    return measured


@dataclass(frozen=True)
class Memory:
    """MiB. `peak` is inputs, outputs (out, lse and gradients), and the workspace."""

    peak: float
    inputs: float
    outputs: float

    @property
    def workspace(self) -> float:
        return self.peak - self.inputs - self.outputs


def peak_memory(bound: Bound, case: Case, direction: str, device: torch.device) -> Memory:
    """The most memory that PyTorch's allocator held during one call, a GPU only.

    cuBLAS keeps a workspace of its own from its first call on, which is not counted.
    """
    with_backward = direction != "fwd"
    timed = directed(bound, "fwd+bwd" if with_backward else "fwd")
    _extra_memory(timed, device)  # whatever a first call keeps
    peak = _extra_memory(timed, device)
    size = case.dtype.itemsize
    q, k, v, out = (size * torch.Size(shape).numel() for shape in case.shapes())
    lse = 4 * case.batch * case.nheads * case.seqlen_q
    inputs, outputs = q + k + v, out + lse
    if with_backward:
        inputs, outputs = inputs + out, outputs + q + k + v
    mib = 2.0**20
    return Memory((inputs + peak) / mib, inputs / mib, outputs / mib)


def _extra_memory(timed: Timed, device: torch.device) -> int:
    """The most bytes that one call held beside what was held before."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with timed.context():
        timed.call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def matmul_tflops(dtype: str, plan: Plan, device: torch.device) -> float:
    """TFLOP/s of an 8192^3 matrix product, as long as a contestant would run."""
    torch_dtype, allow_tf32 = dtype_options(dtype)
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch_dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        rounds = interleaved({"matmul": Timed(lambda: torch.mm(a, b, out=out))}, plan, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * size**3 / statistics.median(rounds["matmul"]) / 1e9


def copy_gbs(plan: Plan, device: torch.device) -> float:
    """GB/s read and written by a copy of 1 GiB."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    rounds = interleaved({"copy": Timed(lambda: target.copy_(source))}, plan, device)
    return 2.0 * 2**30 / statistics.median(rounds["copy"]) / 1e6


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Give memory back after a contestant that had too little."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a GPU that is lost, which was said already
            torch.cuda.empty_cache()
