"""Runs presets: checks, times, and records every contestant of every cell, and loses nothing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from triflash import testing
from triflash.bench import cases, contestants, machine, measure, record
from triflash.bench.cases import Cell, Plan, Preset
from triflash.bench.contestants import Bound, Contestant
from triflash.bench.oracle import MOST_SCORES, Errors, Oracle, checkable
from triflash.bench.record import Record
from triflash.target import target_of
from triflash.testing import Case, Inputs

# Said of a contestant after whose crash the process could not go on.
LOST = "took the GPU down: "
NEEDS_MEMORY_STATISTICS = "peak memory is measured on a GPU only."


@dataclass(frozen=True)
class Job:
    """One cell of a preset with the contestants whose records it makes."""

    preset: Preset
    cell: Cell
    names: tuple[str, ...]

    @property
    def units(self) -> int:
        return len(self.cell.directions) * len(self.names)


class OutOfTime(Exception):
    """The time limit came; what is recorded so far is complete."""


class GPULost(Exception):
    """A contestant left the GPU unusable for this process."""


@dataclass
class Session:
    """One run: where it runs, what it keeps, and who hears of it.

    Attributes:
        records: what there is, earlier runs included; `on_record` is called as it grows.
        plan: how long to measure which preset; off a GPU nothing is measured.
        tick: hears how many units (a contestant in one direction of one cell) are done.
        say: hears what is being done.
        deadline: time.monotonic() after which no cell is begun.
    """

    device: torch.device
    plan: Callable[[Preset], Plan] = lambda preset: preset.plan
    commit: str | None = None
    deadline: float | None = None
    records: list[Record] = field(default_factory=list)
    on_record: Callable[[], None] = lambda: None
    tick: Callable[[float], None] = lambda units: None
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.facts = machine.facts(self.device, self.commit)
        self._matmul: dict[tuple[str, str], float] = {}
        self._copy: float | None = None

    def plan_of(self, preset: Preset) -> Plan:
        if not on_gpu(self.device):
            return cases.INTERPRETED
        return self.plan(preset)

    def ceilings(self, case: Case, plan: Plan) -> dict[str, Any]:
        """What the GPU can do: the data sheet's word and what was measured in this run."""
        if not on_gpu(self.device):
            return {}
        dtype = record.dtype_name(case)
        if (dtype, plan.mode) not in self._matmul:
            self.say(f"matmul of {dtype}, for comparison")
            self._matmul[dtype, plan.mode] = round(
                measure.matmul_tflops(dtype, plan, self.device), 1
            )
        if self._copy is None:
            self._copy = round(measure.copy_gbs(plan, self.device))
        gpu = self.facts["gpu"]
        return {
            "matmul_tflops": self._matmul[dtype, plan.mode],
            "copy_gbs": self._copy,
            "peak_tflops": machine.peak_tflops(gpu, dtype),
            "peak_gbs": machine.peak_gbs(gpu),
        }

    def keep(self, new: list[Record]) -> None:
        """Add records, in place of older ones of the same measurement."""
        keys = {record.key(r) for r in new}
        self.records[:] = [r for r in self.records if record.key(r) not in keys] + new
        self.on_record()


def on_gpu(device: torch.device) -> bool:
    """Whether times mean something: compiled kernels on a GPU."""
    return device.type == "cuda" and not target_of(device).interpreter


def run(
    preset: str | Preset,
    *,
    contestants: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    plan: Plan | None = None,
    cells: Sequence[Cell] | None = None,
) -> list[Record]:
    """Measure a preset and give its records; see docs/benchmarks.md for their fields.

    Args:
        preset: a name of `PRESETS`, or a `cases.Preset` of your own.
        contestants: names of `CONTESTANTS`; by default those that the preset compares.
        device: by default a GPU if there is one. Without one a preset's sizes become tiny, and the
            times mean nothing.
        plan: how long to measure a contestant, by default as the preset says.
        cells: measure these instead of the preset's, at their own sizes.

    Raises:
        ValueError: the preset or a contestant is not known; the message lists those that are.
    """
    if isinstance(preset, str):
        if preset not in cases.PRESETS:
            raise ValueError(f"preset must be one of {', '.join(cases.PRESETS)}, got {preset!r}")
        preset = cases.PRESETS[preset]
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    session = Session(torch.device(device), lambda preset: plan or preset.plan)
    if cells is not None:
        wanted = list(cells)
        preset = replace(preset, cells=lambda: wanted)
    for job in jobs([preset], contestants, session.device, shrink=cells is None):
        with device_context(session.device):
            measure_job(job, session)
    return session.records


def jobs(
    presets: Iterable[Preset],
    names: Sequence[str] | None,
    device: torch.device,
    shrink: bool = True,
) -> list[Job]:
    """The work, cell by cell; off a GPU at sizes for the interpreter."""
    work = []
    for preset in presets:
        chosen = tuple(names if names is not None else preset.contestants())
        for name in chosen:
            contestants.get(name)
        cells = preset.cells()
        if shrink and not on_gpu(device):
            cells = cases.tiny(cells)
        work += [Job(preset, cell, chosen) for cell in cells]
    return work


def keys(work: list[Job]) -> set[tuple[Any, ...]]:
    """What records the work makes."""
    return {
        record.key(record.new(job.preset.name, name, direction, job.cell.case))
        for job in work
        for direction in job.cell.directions
        for name in job.names
    }


def remaining(work: list[Job], session: Session) -> list[Job]:
    """The work that the session's records do not cover yet.

    A direction of a cell is measured whole, since its contestants are compared. But one that took
    the GPU down is not tried again.
    """
    known = {record.key(r): r for r in session.records}
    left = []
    for job in work:
        directions, lost = [], set()
        for direction in job.cell.directions:
            missing = False
            for name in job.names:
                blank = record.new(job.preset.name, name, direction, job.cell.case)
                found = known.get(record.key(blank))
                missing |= found is None
                if found is not None and (found["reason"] or "").startswith(LOST):
                    lost.add(name)
            if missing:
                directions.append(direction)
        if directions:
            names = tuple(name for name in job.names if name not in lost)
            left.append(
                replace(job, cell=replace(job.cell, directions=tuple(directions)), names=names)
            )
    return left


def measure_job(job: Job, session: Session) -> None:
    """Measure one cell and keep its records.

    Raises:
        OutOfTime: the session's deadline has passed; nothing was begun.
        GPULost: the process can use the GPU no more; what was measured is kept.
    """
    if session.deadline is not None and time.monotonic() > session.deadline:
        raise OutOfTime
    case, plan = job.cell.case, session.plan_of(job.preset)
    session.say(f"{job.preset.name}: {case}")
    runnable: list[Contestant] = []
    refused: dict[str, str] = {}
    for name in job.names:
        contestant = contestants.get(name)
        reason = contestants.refusal(contestant, case, session.device)
        if reason is None:
            runnable.append(contestant)
        else:
            refused[name] = reason
    try:
        inputs = testing.make_inputs(case, session.device)
        checked = _check(job, runnable, refused, inputs, session)
        for direction in job.cell.directions:
            _measure_direction(job, direction, plan, checked, refused, session)
    except RuntimeError as error:
        if _alive(session.device) and not _is_oom(error):
            raise
        if not _alive(session.device):
            raise GPULost(contestants.explain(error, [])) from error
        reason = f"out of memory: the inputs and their check do not fit ({_asked(error)})."
        for direction in job.cell.directions:
            session.keep(
                [_record(job, name, direction, session, reason=reason) for name in job.names]
            )
        session.tick(job.units)
    finally:
        measure.release()


@dataclass
class _Checked:
    """A contestant that ran; bound once a cell, because some compile for each binding.

    `errors` and `reasons` tell for the forward alone (False) and with backward (True) how right it
    was and why it may not be timed.
    """

    contestant: Contestant
    bound: Bound
    errors: dict[bool, Errors] = field(default_factory=dict)
    reasons: dict[bool, str] = field(default_factory=dict)


def _check(
    job: Job,
    runnable: list[Contestant],
    refused: dict[str, str],
    inputs: Inputs,
    session: Session,
) -> dict[str, _Checked]:
    """Hold every contestant against float64; who cannot even be bound is added to `refused`."""
    if not runnable:
        return {}
    case = checkable(job.cell.case)
    whole = "error" in job.preset.measures
    small = inputs if case == job.cell.case else testing.make_inputs(case, session.device)
    oracle = Oracle(case, small, whole)
    wanted = dict.fromkeys(direction != "fwd" for direction in job.cell.directions)
    checked = {}
    for contestant in runnable:
        session.say(f"{job.preset.name}: {job.cell.case}: checking {contestant.name}")
        name = contestant.name
        with _failures(name, refused, job, session):
            bound = contestant.bind(case, small)
            check = _Checked(contestant, bound)
            for backward in wanted:
                failures: dict[str, str] = {}
                if backward and not contestant.backward and not whole:
                    check.reasons[backward] = f"{contestant.label} has no backward here."
                    continue
                # One whose backward is wrong, or does not fit, may still have a forward.
                with _failures(name, failures, job, session):
                    errors = oracle.judge(bound, backward and contestant.backward)
                    check.errors[backward] = errors
                    if errors.wrong is not None and not whole:
                        check.reasons[backward] = errors.wrong
                if name in failures:
                    check.reasons[backward] = failures[name]
            if small is not inputs:
                check.bound = contestant.bind(job.cell.case, inputs)
            checked[name] = check
    return checked


def _measure_direction(
    job: Job,
    direction: str,
    plan: Plan,
    checked: dict[str, _Checked],
    refused: dict[str, str],
    session: Session,
) -> None:
    measures = job.preset.measures
    backward = direction != "fwd"
    failed = dict(refused)
    for name, check in checked.items():
        if backward in check.reasons:
            failed[name] = check.reasons[backward]
    results: dict[str, dict[str, Any]] = {name: {} for name in job.names}
    alive = {name: check for name, check in checked.items() if name not in failed}
    for name, check in alive.items():
        results[name] = _error_fields(check.errors[backward])
    if "memory" in measures:
        _memory(job, direction, alive, failed, results, session)
    timed: dict[str, measure.Timed] = {}
    if measures & {"time", "host"}:
        for name, check in alive.items():
            if name in failed:
                continue
            with _failures(name, failed, job, session):
                # Compiled now, and not in anybody's round.
                call = measure.directed(check.bound, direction)
                with call.context():
                    call.call()
                measure.synchronize(session.device)
                timed[name] = call
    session.say(f"{job.preset.name}: {job.cell.case}: {direction}")
    done = 0.0

    def tick(fraction: float) -> None:
        nonlocal done
        done += fraction
        session.tick(fraction * len(job.names))

    if "time" in measures:
        _time(job, direction, plan, timed, failed, results, session, tick)
    if "host" in measures:
        rounds = max(plan.rounds, 7) if on_gpu(session.device) else plan.rounds
        for name, times in measure.host_time(timed, rounds, session.device).items():
            spread = measure.Spread.of(times)
            results[name].update(
                host_us_median=round(spread.median, 2),
                host_us_iqr=round(spread.iqr, 2),
                rounds=spread.rounds,
                mode=plan.mode,
            )
    timed.clear()
    session.tick((1.0 - done) * len(job.names))
    made = []
    for name in job.names:
        reason = failed.get(name)
        known = results[name] if reason is None else {}
        made.append(_record(job, name, direction, session, reason=reason, **known))
    session.keep(made)


def _time(
    job: Job,
    direction: str,
    plan: Plan,
    timed: dict[str, measure.Timed],
    failed: dict[str, str],
    results: dict[str, dict[str, Any]],
    session: Session,
    tick: Callable[[float], None],
) -> None:
    ceilings = session.ceilings(job.cell.case, plan) if timed else {}
    sampler = machine.Sampler(session.device) if plan.mode == "sustained" else nullcontext()
    with sampler as samples:
        start = time.time()
        times = _survivors(timed, failed, plan, job, session, tick)
        clock, power = samples.since(start) if samples is not None else (None, None)
    for name, rounds in times.items():
        spread = measure.Spread.of(rounds)
        blank = record.new(job.preset.name, name, direction, job.cell.case)
        tflops = record.flops(blank) / spread.median / 1e9
        results[name].update(
            ms_median=_significant(spread.median),
            ms_iqr=_significant(spread.iqr),
            rounds=spread.rounds,
            mode=plan.mode,
            tflops=round(tflops, 2) if on_gpu(session.device) else None,
            clock_mhz=clock,
            power_w=power,
            **ceilings,
        )


def _survivors(
    timed: dict[str, measure.Timed],
    failed: dict[str, str],
    plan: Plan,
    job: Job,
    session: Session,
    tick: Callable[[float], None],
) -> dict[str, list[float]]:
    """Time all of them; where that fails, each alone first, to tell who it was."""
    if not timed:
        return {}
    try:
        return measure.interleaved(timed, plan, session.device, tick)
    except RuntimeError as error:
        if not _alive(session.device):
            raise GPULost(contestants.explain(error, [])) from error
    for name in list(timed):
        measure.release()
        with _failures(name, failed, job, session):
            measure.interleaved({name: timed[name]}, replace(plan, rounds=1), session.device)
        if name in failed:
            del timed[name]
    return measure.interleaved(timed, plan, session.device) if timed else {}


def _memory(
    job: Job,
    direction: str,
    alive: dict[str, _Checked],
    failed: dict[str, str],
    results: dict[str, dict[str, Any]],
    session: Session,
) -> None:
    if session.device.type != "cuda":
        if "time" not in job.preset.measures:
            failed.update(dict.fromkeys(alive, NEEDS_MEMORY_STATISTICS))
        return
    if direction == "bwd":  # its peak is that of both together
        return
    for name, check in alive.items():
        with _failures(name, failed, job, session):
            memory = measure.peak_memory(check.bound, job.cell.case, direction, session.device)
            results[name].update(
                peak_mib=round(memory.peak, 3),
                inputs_mib=round(memory.inputs, 3),
                outputs_mib=round(memory.outputs, 3),
                workspace_mib=round(memory.workspace, 3),
            )


@contextmanager
def _failures(name: str, reasons: dict[str, str], job: Job, session: Session) -> Iterator[None]:
    """Turn what a contestant raises into its reason, as long as the GPU still answers."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            yield
            measure.synchronize(session.device)
            return
        except Exception as error:
            if _is_oom(error):
                reasons[name] = f"out of memory ({_asked(error)})."
            else:
                reasons[name] = contestants.explain(error, list(heard))
            failure: Exception = error.with_traceback(None)  # whose frames hold tensors
    if not _alive(session.device):
        reason = LOST + reasons[name]
        session.keep([_record(job, name, d, session, reason=reason) for d in job.cell.directions])
        raise GPULost(f"{name} on {job.cell.case}: {reasons[name]}") from failure
    del failure
    measure.release()


def _is_oom(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(said in str(error).lower() for said in ("out of memory", "can't allocate memory"))
    )


def _asked(error: BaseException) -> str:
    """What PyTorch says it tried to allocate."""
    _, found, rest = str(error).partition("Tried to allocate ")
    return f"asked for {rest.partition('. ')[0]}" if found else "at allocation"


def _alive(device: torch.device) -> bool:
    try:
        measure.synchronize(device)
    except RuntimeError:
        return False
    return True


def _error_fields(errors: Errors) -> dict[str, Any]:
    fields = {f"err_{name}": float(f"{value:.3e}") for name, value in errors.errors.items()}
    return {**fields, "error_ratio": _significant(errors.ratio)}


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def _record(job: Job, name: str, direction: str, session: Session, **known: Any) -> Record:
    contestant = contestants.get(name)
    version = contestant.version() if contestant.missing() is None else None
    return record.new(
        job.preset.name, name, direction, job.cell.case, **session.facts, version=version, **known
    )


@contextmanager
def device_context(device: torch.device) -> Iterator[None]:
    """Events and streams are those of the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def estimate_s(work: list[Job], session: Session) -> float:
    """Seconds that the work takes about; first calls compile, and nobody knows how fast."""
    total, families = 0.0, set()
    for job in work:
        plan = session.plan_of(job.preset)
        case = job.cell.case
        total += 0.3 + 2.0 * case.seqlen_q * case.seqlen_k / MOST_SCORES  # the oracle
        for name in job.names:
            contestant = contestants.get(name)
            if contestants.refusal(contestant, case, session.device) is not None:
                continue
            family = (name, case.dtype, case.allow_tf32, case.headdim, case.causal)
            if contestant.first_call_s > 2.0 or family not in families:
                total += max(contestant.first_call_s, 1.0 if contestant.ours else 0.0)
            families.add(family)
            for direction in job.cell.directions:
                if direction != "fwd" and not contestant.backward:
                    continue
                if "time" in job.preset.measures:
                    total += (plan.rounds * plan.round_ms + plan.settle_ms) / 1e3 + 0.03
                total += 0.05
    return total


def expected_not_to_fit(work: list[Job], device: torch.device) -> list[str]:
    """Sentences on what will probably run out of memory; it is tried all the same.

    Raises:
        MemoryError: the inputs and outputs of a case alone need more than the device has.
    """
    total = machine.total_memory(device)
    sentences = []
    for job in work:
        case = job.cell.case
        backward = any(direction != "fwd" for direction in job.cell.directions)
        size = case.dtype.itemsize
        tensors = size * sum(torch.Size(shape).numel() for shape in case.shapes())
        needed = tensors * (2 if backward else 1)
        if needed > total:
            raise MemoryError(
                f"{case} does not fit: its inputs and outputs alone need {needed / 2**30:.1f} GiB, "
                f"and {device} has {total / 2**30:.1f} GiB"
            )
        # Scores and probabilities forward; the same and their gradients backward.
        scores = size * case.batch * case.nheads * case.seqlen_q * case.seqlen_k
        needed += scores * (4 if backward else 2)
        if needed > total:
            names = [name for name in job.names if contestants.get(name).quadratic]
            if names:
                sentences.append(
                    f"{job.preset.name}, {case}: {', '.join(names)} will probably not fit: all "
                    f"scores need about {needed / 2**30:.0f} GiB of {total / 2**30:.0f}."
                )
    return sentences
