"""The `triflash` command: info, check, mask, bench and train. Torch is imported when needed."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import triflash

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from triflash.masks import Blocks
    from triflash.target import Target
    from triflash.testing import Case, Record

DTYPES = ("float16", "bfloat16", "float32")
_TENSORS = ("out", "lse", "dq", "dk", "dv")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status: 0, 1 for a failed check, 2 for bad usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    if arguments[:1] == ["train"]:
        from triflash.examples.tiny_gpt import train

        train.add_arguments(commands["train"])
        return train.run(parser.parse_args(arguments))
    if arguments[:1] == ["bench"]:
        from triflash.bench import command

        return command.main(arguments[1:], commands["bench"])
    args = parser.parse_args(arguments)
    if args.command == "info":
        return features() if args.features else info()
    if args.command == "mask":
        return mask(args, commands["mask"])
    return check(args, commands["check"])


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="triflash", description="FlashAttention in pure Python: Triton kernels, no build step."
    )
    parser.add_argument("--version", action="version", version=f"triflash {triflash.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {}
    for name, summary in (
        ("info", "show the GPU, versions, and which implementation runs which call"),
        ("check", "hold every implementation's results and gradients against float64"),
        ("mask", "draw which blocks of a mask are empty, partial and full"),
        ("bench", "measure every implementation beside its peers, and report it"),
        ("train", "train a tiny GPT on text through triflash and through PyTorch's attention"),
    ):
        commands[name] = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
    commands["info"].add_argument(
        "--features", action="store_true", help="only the README's table of what each can do"
    )
    _add_check_arguments(commands["check"])
    _add_mask_arguments(commands["mask"])
    return parser, commands


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Without any of the flags of a case, a built-in set of cases runs. One of them is enough "
        "to run a single case, in which the others have their defaults. The exit status is 1 if "
        "an error is over its budget, or if nothing could be checked."
    )
    case = add_case_arguments(parser)
    case.add_argument("--dtype", choices=DTYPES, help="of q, k and v (default: float16)")
    parser.add_argument(
        "--implementation", metavar="NAME", help="only this one (default: every one there is)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cuda, cuda:1, cpu (default: a GPU if there is one)"
    )


def _add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A key is seen if everything given shows it. In the picture queries go down and keys go "
        "right; blocks at the ends count as far as there are queries and keys. Of a mask that "
        "differs between batch entries and heads the first is drawn."
    )
    what = parser.add_argument_group("the mask")
    what.add_argument("--causal", action="store_true", help="aligned to the bottom right")
    what.add_argument(
        "--window", nargs=2, type=int, metavar=("LEFT", "RIGHT"),
        help="window_size: keys before and after a query's own; -1 is no bound",
    )  # fmt: skip
    what.add_argument(
        "--document", type=_lengths, metavar="LENGTHS",
        help="of documents that do not see each other, such as 300,500,224",
    )  # fmt: skip
    what.add_argument(
        "--mask", metavar="WHERE:NAME",
        help="a mask modification, of triflash.mods.mask_mod with reference=, or a block mask, of "
        "triflash.create_block_mask, in a module or a file: package.module:name, file.py:name",
    )  # fmt: skip
    what.add_argument(
        "--aux", nargs="+", type=_number, default=[], metavar="NUMBER", help="of --mask"
    )
    what.add_argument(
        "--seq-len", type=count, metavar="N", help="queries (default: 1024, or the documents' sum)"
    )
    what.add_argument(
        "--seq-len-k", type=count, metavar="N", help="keys (default: as many as queries)"
    )
    out = parser.add_argument_group("the picture")
    for flag, meaning in (("--block-m", "queries"), ("--block-n", "keys")):
        out.add_argument(flag, type=count, metavar="N", help=f"{meaning} of a block (default: 64)")
    out.add_argument(
        "--output", metavar="FILE", help="write it as PNG (needs matplotlib) instead of as text"
    )


def _lengths(text: str) -> list[int]:
    return [count(part.strip()) for part in text.split(",")]


def _number(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")


def add_case_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags of a case but for its dtype, in a group of their own; see `case_of`."""
    case = parser.add_argument_group("the case")
    for flag, default, meaning in (
        ("--batch-size", 4, "sequences"),
        ("--num-heads", 8, "query heads"),
        ("--num-heads-k", None, "key and value heads (default: as many as query heads)"),
        ("--seq-len", 512, "queries"),
        ("--seq-len-k", None, "keys (default: as many as queries)"),
        ("--head-dim", 64, "dimension of a head"),
    ):
        text = meaning if default is None else f"{meaning} (default: {default})"
        case.add_argument(flag, type=count, metavar="N", help=text)
    case.add_argument(
        "--causal", action="store_true", default=None, help="mask aligned to the bottom right"
    )
    return case


def count(text: str) -> int:
    """The type of an argument that is a whole number of at least 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def parse_known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse all of `arguments`; an error about an unknown one lists the flags there are."""
    args, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unknown: {' '.join(unknown)}; the flags are {', '.join(flags)}")
    return args


def features() -> int:
    """Print the README's table of what each implementation can do."""
    from triflash import registry

    print(registry.features_table(), end="")
    return 0


def info() -> int:
    """Print the machine, the versions, and what `implementation="auto"` does here."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from triflash import registry
    from triflash.target import target_of
    from triflash.testing import Case

    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = target_of(device)

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(device, target).items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)

    dtypes = [getattr(torch, name) for name in DTYPES]
    case = Case(batch=4, seqlen_q=512, seqlen_k=512, nheads=8, nheads_k=8, causal=True)
    table = Table(title=f"causal attention, head dimension {case.headdim}, on {device}")
    table.add_column("implementation", style="bold")
    table.add_column("what it is")
    for name in DTYPES:
        table.add_column(name, justify="center")
    picks = {dtype: _auto(replace(case, dtype=dtype), target) for dtype in dtypes}
    reasons: dict[str, None] = {}
    for row in registry.IMPLEMENTATIONS:
        cells = []
        for dtype in dtypes:
            reason = row.supports(replace(case, dtype=dtype).spec(), target)
            if reason is not None:
                reasons[reason] = None
                cells.append("[red]no[/]")
            elif picks[dtype] == row.name:
                cells.append("[green]auto[/]")
            else:
                cells.append("by name")
        table.add_row(row.name, row.summary, *cells)
    console.print(table)
    for reason in reasons:
        console.print(f"[red]no[/]: {reason}", highlight=False)
    if None in picks.values():
        console.print('"auto" picks nothing where no implementation says "auto".', highlight=False)
    return 0


def _facts(device: torch.device, target: Target) -> dict[str, str]:
    import torch

    from triflash.bench import machine

    facts = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["GPU"] = f"{properties.name}, {target.arch}, {target.num_sms} SMs, {memory}"
        if torch.cuda.device_count() > 1:
            facts["GPU"] += f" (the first of {torch.cuda.device_count()})"
        facts["driver"] = machine.driver()
    else:
        facts["GPU"] = "none that PyTorch can use"
    facts["kernels run"] = (
        "in Triton's interpreter"
        if target.runs_kernels and target.interpreter
        else "on the GPU"
        if target.runs_kernels
        else "not here; see below"
    )
    facts["triflash"] = triflash.__version__
    cuda, hip = torch.version.cuda, torch.version.hip
    toolkit = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only"
    facts["torch"] = f"{torch.__version__} ({toolkit})"
    facts["triton"] = _triton_version() if target.has_triton else "not installed"
    facts["python"] = f"{platform.python_version()} on {platform.platform()}"
    return facts


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _auto(case: Case, target: Target) -> str | None:
    from triflash import registry

    try:
        return registry.resolve("auto", case.spec(), target).name
    except NotImplementedError:
        return None


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the cases through the implementations and print each error beside its budget."""
    import torch
    from rich.console import Console

    from triflash import registry
    from triflash.target import target_of

    device = device_of(args.device, parser)
    target = target_of(device)
    single = _case(args)
    cases = (
        [single] if single is not None else _cases(small=target.interpreter or device.type == "cpu")
    )
    for case in cases:
        try:
            case.spec()
        except ValueError as error:
            parser.error(str(error))
    names = registry.implementations()
    if args.implementation is not None:
        if args.implementation not in names:
            parser.error(
                f"argument --implementation: must be one of {', '.join(names)}, "
                f"got {args.implementation!r}"
            )
        names = [args.implementation]
    needs_kernels = any(registry.get(name).needs_kernels for name in names)
    if needs_kernels and target.has_triton and not target.runs_kernels:
        return _in_interpreter(["check", *_given(args)], device)

    console = Console()
    if target.runs_kernels and target.interpreter:
        where = f"{device}, in Triton's interpreter"
    elif device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = str(device)
    console.print(
        f"On {where}: the largest error against float64, and below it the largest allowed.",
        highlight=False,
    )
    return _run_checks(cases, names, device, console)


def mask(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw the blocks of the mask that the flags describe, and count them."""
    from triflash import masks

    if args.aux and args.mask is None:
        parser.error("argument --aux: is for --mask, which is not given")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's modules are here, as for `python -m`
    try:
        blocks = _blocks(args)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        parser.error(str(error))
    if args.output is not None:
        try:
            masks.save(blocks, args.output, _title(args))
        except ImportError as error:
            parser.error(f"--output needs matplotlib: pip install 'triflash[bench]' ({error})")
        except (OSError, ValueError) as error:
            parser.error(f"argument --output: {error}")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(masks.text(blocks, width))
    print(masks.summary(blocks))
    return 0


def _blocks(args: argparse.Namespace) -> Blocks:
    """What the flags describe, or the block mask that they name."""
    from triflash import masks, mods

    mask_mod = None if args.mask is None else masks.load(args.mask)
    if isinstance(mask_mod, mods.BlockMask):
        others = "causal window document aux seq_len seq_len_k block_m block_n"
        for name in others.split():
            if getattr(args, name):
                raise ValueError(
                    f"{args.mask} is a block mask, which has all but --output in itself, got "
                    f"--{name.replace('_', '-')}"
                )
        return masks.Blocks.listed(mask_mod)
    seqlen_q = args.seq_len or sum(args.document or [1024])
    seen = masks.seen(
        seqlen_q, args.seq_len_k or seqlen_q, causal=args.causal, window_size=args.window,
        documents=args.document, mask_mod=mask_mod, aux=tuple(args.aux),
    )  # fmt: skip
    return masks.Blocks.of(seen, args.block_m or 64, args.block_n or 64)


def _title(args: argparse.Namespace) -> str:
    """Over the picture of a mask: the flags that made it."""
    parts = ["causal"] * args.causal
    if args.window is not None:
        parts.append("window {}, {}".format(*args.window))
    if args.document is not None:
        parts.append("documents " + ", ".join(map(str, args.document)))
    if args.mask is not None:
        parts.append(" ".join([args.mask.rpartition(":")[2], *map(str, args.aux)]))
    return "; ".join(parts) or "full"


def _run_checks(cases: list[Case], names: list[str], device: torch.device, console: Console) -> int:
    from rich import box
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

    from triflash import testing

    table = Table("implementation\n[not bold]case[/]", box=box.SIMPLE_HEAD)
    for name in _TENSORS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    checked = failed = unsupported = 0
    notes: dict[str, None] = {}
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with progress:
        task = progress.add_task("", total=len(cases) * len(names))
        for case in cases:
            for name in names:
                progress.update(task, description=f"{name}: {case}")
                reason = testing.unsupported(case, name, device)
                if reason is not None:
                    unsupported += 1
                    verdict, cells = "[yellow]unsupported[/]", [""] * len(_TENSORS)
                    notes[f"[yellow]unsupported[/]: {escape(reason)}"] = None
                else:
                    checked += 1
                    try:
                        records = testing.check_case(case, name, device)
                    except Exception as error:  # one that does not run must not hide the others
                        ok, cells = False, [""] * len(_TENSORS)
                        message = escape(f"{name}, {case}: {type(error).__name__}: {error}")
                        notes[f"[red]FAIL[/]: {message}"] = None
                    else:
                        ok, cells = all(record.ok for record in records), _cells(records)
                    failed += not ok
                    verdict = "[green]pass[/]" if ok else "[bold red]FAIL[/]"
                table.add_row(f"[bold]{name}[/]\n{case}", *cells, verdict)
                progress.advance(task)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    summary = f"{checked - failed} of {checked} checks passed"
    if unsupported:
        summary += f", {unsupported} unsupported"
    colour = "red" if failed or not checked else "green"
    console.print(f"[{colour}]{summary}.[/]", highlight=False)
    return 1 if failed or not checked else 0


def _cells(records: list[Record]) -> list[str]:
    by_name = {record.name: record for record in records}
    cells = []
    for name in _TENSORS:
        record = by_name.get(name)
        if record is None:
            cells.append("[dim]no backward[/]")
            continue
        colour = "green" if record.ok else "red"
        cells.append(f"[{colour}]{record.error:.1e}[/]\n{record.allowed:.1e}")
    return cells


def _case(args: argparse.Namespace) -> Case | None:
    """The case that the flags describe, None if there are none."""
    import torch

    flags = (
        args.batch_size, args.num_heads, args.num_heads_k, args.seq_len, args.seq_len_k,
        args.head_dim, args.causal, args.dtype,
    )  # fmt: skip
    if all(flag is None for flag in flags):
        return None
    return case_of(args, getattr(torch, args.dtype or "float16"))


def case_of(args: argparse.Namespace, dtype: torch.dtype, allow_tf32: bool = False) -> Case:
    """The case of the flags of `add_case_arguments`, with the defaults of SEEDS 4.7."""
    from triflash.testing import Case

    nheads = args.num_heads or 8
    seqlen = args.seq_len or 512
    return Case(
        batch=args.batch_size or 4,
        seqlen_q=seqlen,
        seqlen_k=args.seq_len_k or seqlen,
        nheads=nheads,
        nheads_k=args.num_heads_k or nheads,
        headdim=args.head_dim or 64,
        dtype=dtype,
        allow_tf32=allow_tf32,
        causal=bool(args.causal),
    )


def _cases(small: bool) -> list[Case]:
    """The built-in set: what a kernel gets wrong first, at a size that suits the machine."""
    import torch

    from triflash.testing import Case

    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    n = 1 if small else 8
    square = Case(batch=1, seqlen_q=128 * n, seqlen_k=128 * n, nheads=2 * n, nheads_k=2 * n)
    ragged = replace(square, seqlen_q=113 * n, seqlen_k=203 * n, nheads_k=n)
    return [
        replace(square, dtype=fp16),
        replace(square, dtype=bf16, causal=True),
        replace(square, dtype=fp32, causal=True),
        replace(ragged, dtype=fp16, causal=True, with_dlse=True),
        replace(ragged, dtype=fp32, headdim=40, headdim_v=24),
        # More queries than keys: causal leaves the first ones without any.
        replace(ragged, dtype=fp16, causal=True, seqlen_q=203 * n, seqlen_k=113 * n),
        replace(ragged, dtype=fp16, headdim=256, seqlen_q=64, seqlen_k=64),
        replace(ragged, dtype=bf16, headdim=192, headdim_v=128, layout="transposed"),
        replace(ragged, dtype=fp16, layout="misaligned", headdim=33, softmax_scale=-0.3),
        replace(square, dtype=fp32, seqlen_q=1, seqlen_k=1),
        replace(square, dtype=fp32, seqlen_q=5, seqlen_k=0),
    ]


def device_of(name: str | None, parser: argparse.ArgumentParser) -> torch.device:
    """The device that `--device` names, a GPU if it names none and there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            parser.error(f"argument --device: got {name!r}, but PyTorch can use {count} GPUs here")
    return device


def _given(args: argparse.Namespace) -> list[str]:
    """The flags of `check` again, as a list."""
    flags = []
    for name, value in vars(args).items():
        if name == "command" or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def _in_interpreter(arguments: list[str], device: torch.device) -> int:
    """This command in a new process whose kernels run in Triton's interpreter, which it says."""
    why = "--device is cpu" if device.type == "cpu" and "--device" in arguments else "no GPU"
    print(
        f"triflash: {why}, so the kernels run in Triton's interpreter (TRITON_INTERPRET=1): "
        "the same code and arithmetic, but slow.",
        flush=True,
    )
    return run_in_interpreter(arguments)


def run_in_interpreter(arguments: list[str]) -> int:
    """`triflash` with these arguments in a new process, for Triton's interpreter.

    Triton reads the switch when it defines a kernel, so it has to be set before.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.call([sys.executable, "-m", "triflash", *arguments], env=environment)
