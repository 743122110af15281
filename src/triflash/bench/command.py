"""`triflash bench`: flags in, tables or records out; `triflash bench report` is in report.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triflash import cli

if TYPE_CHECKING:
    from rich.console import Console

    from triflash.bench.cases import Plan, Preset
    from triflash.bench.record import Record
    from triflash.bench.runner import Job, Session

FORMATS = ("table", "markdown", "json", "csv")
INTERRUPTED = 130  # as shells say it


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Run `triflash bench` with what follows it, and give the exit status."""
    if list(arguments[:1]) == ["report"]:
        from triflash.bench import report

        return report.main(arguments[1:], f"{parser.prog} report")
    add_arguments(parser)
    args = cli.parse_known(parser, arguments)
    return run(args, list(arguments), parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from triflash.bench import cases, contestants, record

    width = max(len(name) for name in cases.PRESETS)
    presets = "\n".join(
        f"  {name:{width}}  {preset.summary}" for name, preset in cases.PRESETS.items()
    )
    people = "\n".join(f"  {c.name:14}  {c.summary}" for c in contestants.CONTESTANTS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"presets:\n{presets}\n  {'all':{width}}  all of them\n\ncontestants:\n{people}\n\n"
        "Without a preset one case is measured, in all directions, with the defaults below. With\n"
        "one, the flags of the case choose among the preset's cases.\n"
        "`triflash bench report FILES` makes pictures, a page and README tables of JSON files."
    )
    parser.add_argument("preset", nargs="*", metavar="PRESET", help="what to measure; see below")
    case = cli.add_case_arguments(parser)
    case.add_argument("--dtype", choices=record.DTYPES, help="default: float16")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--contestants", metavar="A,B", help="only these, or all (default: the preset's)"
    )
    length = how.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="short bursts: a look")
    length.add_argument(
        "--sustained", action="store_true", help="long enough for the power limit: to compare"
    )
    how.add_argument("--rounds", type=cli.count, metavar="N", help="rounds of each contestant")
    how.add_argument(
        "--time-limit", type=cli.count, metavar="S",
        help="begin nothing new after so many seconds; the same command goes on from --output",
    )  # fmt: skip
    how.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu (default: a GPU)")
    how.add_argument("--commit", help="what is measured, where there is no repository to ask")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--format", choices=FORMATS, help="on standard output (default: table)")
    out.add_argument("--markdown", action="store_true", help="the same as --format markdown")
    out.add_argument(
        "--output", type=Path, metavar="FILE",
        help="keep the records in this JSON file, after each cell; what is in it is not repeated",
    )  # fmt: skip
    out.add_argument("--overwrite", action="store_true", help="forget what --output holds")


def run(args: argparse.Namespace, given: list[str], parser: argparse.ArgumentParser) -> int:
    from rich.console import Console

    from triflash.bench import record, runner
    from triflash.target import target_of

    if args.markdown and args.format not in (None, "markdown"):
        parser.error(f"--markdown and --format {args.format} contradict each other")
    shape = "markdown" if args.markdown else args.format or "table"
    names = _contestants(args.contestants, parser)
    device = cli.device_of(args.device, parser)
    presets, shrink = _presets(args, parser, runner.on_gpu(device))
    console = Console(stderr=True, highlight=False)

    target = target_of(device)
    if target.has_triton and not target.runs_kernels:
        console.print("triflash: no GPU, so the kernels run in Triton's interpreter.")
        return cli.run_in_interpreter(["bench", *given])
    if not runner.on_gpu(device):
        sizes = "tiny sizes, and " if shrink else ""
        console.print(
            f"[bold]Times mean nothing here[/]: {sizes}kernels in Triton's interpreter. This only "
            "shows that everything runs."
        )

    session = runner.Session(device, _plan(args), args.commit)
    work = runner.jobs(presets, names, device, shrink)
    try:
        warnings = runner.expected_not_to_fit(work, device)
    except MemoryError as error:
        parser.error(str(error))
    if args.output is not None:
        _continue(args, session, parser)
        session.on_record = lambda: record.save(args.output, session.records)
    planned = len(work)
    left = runner.remaining(work, session)
    for sentence in warnings:
        console.print(sentence)
    if len(left) < planned:
        console.print(f"{planned - len(left)} of {planned} cells are in {args.output}.")
    if left and runner.on_gpu(device):
        _say_estimates(left, session, console)
    if args.time_limit is not None:
        session.deadline = time.monotonic() + args.time_limit
    status = _work(left, session, console)

    keys = runner.keys(work)
    shown = [r for r in session.records if record.key(r) in keys]
    _print(shown, shape, console)
    if args.output is not None:
        record.save(args.output, session.records)
        console.print(f"{len(session.records)} records are in {args.output}.")
    return status


def _contestants(text: str | None, parser: argparse.ArgumentParser) -> list[str] | None:
    from triflash.bench import contestants

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return contestants.names()
    unknown = [name for name in names if name not in contestants.names()]
    if unknown or not names:
        parser.error(
            f"argument --contestants: must be all, or some of {', '.join(contestants.names())}, "
            f"got {', '.join(unknown) or repr(text)}"
        )
    return list(dict.fromkeys(names))


def _presets(
    args: argparse.Namespace, parser: argparse.ArgumentParser, on_gpu: bool
) -> tuple[list[Preset], bool]:
    """The presets with the cells that the flags choose, and whether sizes may shrink off a GPU."""
    from triflash.bench import cases
    from triflash.bench.record import dtype_options

    names = list(cases.PRESETS) if args.preset == ["all"] else list(dict.fromkeys(args.preset))
    unknown = [name for name in names if name not in cases.PRESETS]
    if unknown:
        parser.error(
            f"argument PRESET: must be all, or some of {', '.join(cases.PRESETS)}, "
            f"got {', '.join(unknown)}"
        )
    wanted: dict[str, Any] = {
        "batch": args.batch_size,
        "nheads": args.num_heads,
        "nheads_k": args.num_heads_k,
        "seqlen_q": args.seq_len,
        "seqlen_k": args.seq_len_k,
        "headdim": args.head_dim,
        "causal": args.causal,
    }
    if args.dtype is not None:
        wanted["dtype"], wanted["allow_tf32"] = dtype_options(args.dtype)
    given = any(value is not None for value in wanted.values())
    if not names:
        case = cli.case_of(args, *dtype_options(args.dtype or "float16"))
        try:
            case.spec()
        except ValueError as error:
            parser.error(str(error))
        return [cases.custom(case)], not given
    chosen = []
    for name in names:
        preset = cases.PRESETS[name]
        cells = cases.matching(preset.cells(), **wanted)
        if not cells:
            parser.error(f"preset {name} has no such case; it has {_extent(preset)}")
        chosen.append(replace(preset, cells=partial(list, cells)))
    return chosen, True


def _extent(preset: Preset) -> str:
    """The values that a preset's cases have."""
    from triflash.bench.record import dtype_name

    found = [cell.case for cell in preset.cells()]
    values: dict[str, list[Any]] = {
        "--dtype": [dtype_name(case) for case in found],
        "--batch-size": [case.batch for case in found],
        "--num-heads": [case.nheads for case in found],
        "--seq-len": [case.seqlen_q for case in found],
        "--head-dim": [case.headdim for case in found],
        "--causal": ["yes" if case.causal else "no" for case in found],
    }
    return "; ".join(
        f"{flag} {', '.join(map(str, dict.fromkeys(all_of)))}" for flag, all_of in values.items()
    )


def _plan(args: argparse.Namespace) -> Callable[[Preset], Plan]:
    from triflash.bench import cases

    def plan(preset: Preset) -> Plan:
        plan = cases.SUSTAINED if args.sustained else cases.QUICK if args.quick else preset.plan
        return replace(plan, rounds=args.rounds) if args.rounds else plan

    return plan


def _continue(args: argparse.Namespace, session: Session, parser: argparse.ArgumentParser) -> None:
    """Take over what an earlier run left in --output, if it measured the same thing."""
    from triflash.bench import record

    if args.output.is_dir():
        parser.error(f"argument --output: {args.output} is a folder")
    if args.overwrite or not args.output.exists():
        return
    try:
        earlier = record.load([args.output])
    except ValueError as error:
        parser.error(f"argument --output: {error}")
    for name in ("gpu", "commit"):
        other = {str(r[name]) for r in earlier} - {str(session.facts[name])}
        if other:
            parser.error(
                f"argument --output: {args.output} has records of {name} {', '.join(other)}, and "
                f"this is {session.facts[name]}; name another file, or add --overwrite"
            )
    session.records.extend(earlier)


def _say_estimates(left: list[Job], session: Session, console: Console) -> None:
    from triflash.bench import runner

    total = 0.0
    for name in dict.fromkeys(job.preset.name for job in left):
        mine = [job for job in left if job.preset.name == name]
        seconds = runner.estimate_s(mine, session)
        total += seconds
        mode = session.plan_of(mine[0].preset).mode
        console.print(f"{name}: {len(mine)} cells, {mode}, about {_duration(seconds)}.")
    if len({job.preset.name for job in left}) > 1:
        console.print(f"Together about {_duration(total)}.")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _work(left: list[Job], session: Session, console: Console) -> int:
    """Measure what is left; 0, or why it did not come to its end."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeftColumn

    from triflash.bench import runner

    progress = Progress(
        BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
        TextColumn("left"), TimeLeftColumn(), TextColumn("{task.description}"),
        console=console, transient=True,
    )  # fmt: skip
    try:
        with progress, runner.device_context(session.device):
            task = progress.add_task("", total=sum(job.units for job in left))
            session.tick = lambda units: progress.advance(task, units)
            session.say = lambda text: progress.update(task, description=text)
            for index, job in enumerate(left, 1):
                start = time.perf_counter()
                runner.measure_job(job, session)
                if not console.is_terminal:  # where there is no bar
                    took = time.perf_counter() - start
                    name = f"{job.preset.name}: {job.cell.case}"
                    console.print(f"{index} of {len(left)}: {name}, {took:.1f} s")
    except runner.OutOfTime:
        console.print("The time limit came before the end; the same command goes on from there.")
        return 0
    except runner.GPULost as error:
        console.print(
            f"[red]The GPU cannot be used any more by this process[/], since {error}\n"
            "The same command with --output goes on without that contestant."
        )
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; what was measured is kept.")
        return INTERRUPTED
    return 0


def _print(records: list[Record], shape: str, console: Console) -> None:
    import json

    from triflash.bench import tables

    if shape == "json":
        print(json.dumps(records, indent=1))
    elif shape == "csv":
        print(tables.as_csv(records), end="")
    elif shape == "markdown":
        parts = [table.markdown() for table in tables.tables(records)]
        print("\n\n".join([*parts, tables.where(records)]))
    else:
        _print_rich(records)


def _print_rich(records: list[Record]) -> None:
    import re

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from triflash.bench import tables

    def rich(text: str) -> str:
        return re.sub(r"\*\*(.+?)\*\*", r"[bold green]\1[/]", escape(text))

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room
        console.width = 240
    for table in tables.tables(records):
        grid = Table(box=box.SIMPLE_HEAD, title=escape(table.title), title_justify="left")
        for index, column in enumerate(table.columns):
            grid.add_column(escape(column), justify="left" if index < table.index else "right")
        for row in table.rows:
            grid.add_row(*map(rich, row))
        console.print(grid)
        for note in table.notes:
            console.print(escape(note), style="dim")
        console.print()
    console.print(escape(tables.where(records)), style="dim")
