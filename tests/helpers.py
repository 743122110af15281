"""Short ways to say what most tests say."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest
import torch

from triflash import attention, registry, testing, tuning
from triflash.spec import make_spec
from triflash.target import Target, target_of
from triflash.testing import Case

T = TypeVar("T")
GPU = torch.cuda.is_available()
ROWS = registry.implementations()
DIFFERENTIABLE = [row.name for row in registry.IMPLEMENTATIONS if row.backward is not None]
KERNEL_ROWS = [row.name for row in registry.IMPLEMENTATIONS if row.needs_kernels]
TRITON_ROWS = [name for name in KERNEL_ROWS if not registry.get(name).nvidia_only]
# The interpreter's tl.dot is wrong for bfloat16, and the registry says so.
KERNEL_DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if GPU else [])]
LOW_PRECISION = torch.bfloat16 if GPU else torch.float16

every_row = pytest.mark.parametrize("implementation", ROWS)
every_differentiable_row = pytest.mark.parametrize("implementation", DIFFERENTIABLE)
every_kernel_row = pytest.mark.parametrize("implementation", KERNEL_ROWS)
every_triton_row = pytest.mark.parametrize("implementation", TRITON_ROWS)
every_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda t: str(t)[6:])
both_causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def skip_unsupported(case: Case, implementation: str, device: torch.device) -> None:
    """Skip with the registry's own sentence."""
    reason = testing.unsupported(case, implementation, device)
    if reason is not None:
        pytest.skip(reason)


def skip_unreadable(implementation: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Skip what a row refuses because of how these tensors lie in memory, after it refused."""
    if not registry.get(implementation).needs_tma:
        return
    aligned = all(t.data_ptr() % 16 == 0 for t in (q, k, v))
    if make_spec(q, k, v, None, False, False, False, aligned).tma:
        return
    with pytest.raises(NotImplementedError, match="multiples of 16 bytes"):
        attention(q, k, v, implementation=implementation)
    pytest.skip(f"{implementation} needs TMA, and said so")


def check(case: Case, implementation: str, device: torch.device) -> None:
    """Every tensor of the case is within the error budget."""
    skip_unsupported(case, implementation, device)
    assert_within_budget(case, testing.check_case(case, implementation, device))


def assert_within_budget(case: Case, records: list[testing.Record]) -> None:
    over = [r for r in records if not r.ok]
    assert not over, f"{case}: " + ", ".join(
        f"{r.name} is off by {r.error:.2e}, allowed {r.allowed:.2e}" for r in over
    )


def results(case: Case, implementation: str, device: torch.device) -> dict[str, torch.Tensor]:
    """out, lse and the gradients there are, on fresh inputs and poisoned memory."""
    skip_unsupported(case, implementation, device)
    backward = registry.get(implementation).backward is not None
    return testing.run_case(case, testing.make_inputs(case, device), implementation, backward)


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(_bits(a[name]), _bits(b[name]))
        assert same, f"{name} differs in {int((_bits(a[name]) != _bits(b[name])).sum())} elements"


def assert_repeated(
    implementation: str,
    case: Case,
    inputs: testing.Inputs,
    first: dict[str, torch.Tensor],
    again: dict[str, torch.Tensor],
) -> None:
    """Bitwise equal, but dq of a row that adds to it in any order only within the budget."""
    if not registry.get(implementation).deterministic:
        assert_within_budget(case, testing.compare(case, inputs, {"dq": again["dq"]}))
        first, again = ({n: t for n, t in some.items() if n != "dq"} for some in (first, again))
    assert_bitwise_equal(first, again)


def repeatable(implementation: str) -> dict[str, bool]:
    """Options with which the row gives the same bits again."""
    return {} if registry.get(implementation).deterministic else {"deterministic": True}


def compiled_and_not(call: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> tuple:
    """(compiled, as it is) of what `call` gives in one graph, and a list of these of each leaf's
    gradient."""
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    expected, got = call(*leaves), compiled(*leaves)
    dout = torch.randn_like(got)
    gradients = (torch.autograd.grad(out, leaves, dout) for out in (got, expected))
    pairs = list(zip(*gradients, strict=True))
    torch._dynamo.reset()
    return (got, expected), pairs


def in_a_new_process(function: Callable[..., object], *arguments: object) -> None:
    """Fails if it raises there or ends the process.

    The process has imported PyTorch and Triton and done nothing: it is forked from one like it,
    since these imports take longer than most that is tested so.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._inductor.config", "triton", "pytest", "hypothesis"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            pytest.fail("it ended the process")


def captured(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what `call` launches, and what it gave, which every replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # first calls compile and prepare, and no graph may hold that
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@contextmanager
def multiprocessors(number: int) -> Iterator[None]:
    """Within, v3 is launched as if the GPU had so many, so that few tiles are several a program."""

    def few(device: torch.device) -> Target:
        return replace(target_of(device), num_sms=number)

    modules = [importlib.import_module(f"triflash.kernels.v3.{x}") for x in ("forward", "backward")]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "target_of", few))
        yield


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within, what waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unexplained_races(report: str) -> list[str]:
    """What racecheck reports of v3's kernels, but for the false reports of docs/adr/0011.

    Those are on lines that dispatch partitions, or of a store that hands on the index of a tile:
    what such a store conflicts with reads the index, on whatever line its first use is. A report
    that cannot be read is unexplained.
    """
    dispatch = r"def \w+_kernel\(|gl\.warp_specialize\(|if CONSUMERS == 2:"
    folder = Path(registry.__file__).parent / "kernels" / "v3"
    errors = [part.rstrip("= \n") for part in report.split("= Error: ")[1:]]

    def line(file: str, number: str) -> str:
        """Of v3's own files; nothing in others, such as Triton's, explains a report."""
        path = folder / file
        return path.read_text().splitlines()[int(number) - 1] if path.exists() else ""

    def is_explained(error: str) -> bool:
        accesses = re.findall(r"(Read|Write) access at .* in (\w+\.py):(\d+)", error)
        lines = [(kind, line(*place)) for kind, *place in accesses]
        if any(kind == "Write" and "tile_smem.index(" in text for kind, text in lines):
            return True
        return len(lines) > 1 and all(re.search(dispatch, text) for _, text in lines)

    return [error for error in errors or [report] if not is_explained(error)]


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN equals itself and -0 is not 0."""
    return x.detach().contiguous().view(torch.uint8)


def tuning_functions() -> dict[str, Callable[..., tuning.TileConfig]]:
    """The functions of `tuning` that give a kernel's tile configuration."""
    return {
        name: function
        for name, function in inspect.getmembers(tuning, inspect.isfunction)
        if function.__module__ == tuning.__name__
        and not name.startswith("_")
        and "TileConfig" in str(inspect.signature(function).return_annotation)
    }


def forget_prepared_launches() -> None:
    """Host functions remember the configuration of a spec; let them ask `tuning` again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("triflash.kernels."):
            for value in vars(module).values():
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


class Tuning:
    """Lets a test decide what `tuning` decides; undone when the test ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def use_tma(self, value: bool) -> None:
        self._monkeypatch.setattr(tuning, "tma_pays", lambda *_: value)
        forget_prepared_launches()

    def of_target(self, target: Target) -> None:
        """Run with the tile configurations that `target` would run with."""
        functions = tuning_functions()
        assert functions, "no function of tuning gives a TileConfig; the test would test nothing"
        for name, function in functions.items():

            def elsewhere(spec, _, *rest, function=function):
                return function(spec, target, *rest)

            self._monkeypatch.setattr(tuning, name, elsewhere)
        forget_prepared_launches()
