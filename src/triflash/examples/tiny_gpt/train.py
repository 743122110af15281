"""`triflash train`: the same GPT trained through triflash's kernels and PyTorch's attention.

Both runs start from the same weights and see the same batches, so the curves should agree as far as
rounding lets them. Module level stays light, since the command line is built from it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from triflash.examples.tiny_gpt.data import Text
    from triflash.examples.tiny_gpt.loop import Run
    from triflash.examples.tiny_gpt.model import GPT, GPTConfig


@dataclass(frozen=True)
class _Size:
    """What the flags default to."""

    steps: int
    batch_size: int
    seq_len: int
    layers: int
    heads: int
    head_dim: int
    lr: float
    sample_len: int
    held_out_batches: int

    @property
    def architecture(self) -> str:
        return f"{_count(self.layers, 'layer')}, {_count(self.heads, 'head')} of {self.head_dim}"


# The interpreter takes some 20 ms for a program of a kernel, and a step has 56 of them. Sequences
# of two tiles, so that both unmasked and masked blocks are walked.
_SMALL = _Size(
    steps=48, batch_size=4, seq_len=64, layers=1, heads=2, head_dim=32, lr=1e-2, sample_len=40,
    held_out_batches=8,
)  # fmt: skip
# 5 million parameters and 32768 bytes a step: 40 million bytes in all, the library four times over.
_LARGE = _Size(
    steps=1200, batch_size=32, seq_len=1024, layers=6, heads=4, head_dim=64, lr=2e-3,
    sample_len=600, held_out_batches=16,
)  # fmt: skip

# Of the first losses, and of the first gradients relative to their size. Both runs have the same
# weights there, so only rounding can part them.
_FIRST_STEP_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


class _UsageError(Exception):
    """Something the user can put right; the message names the flag."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `triflash train` to parser."""

    def add(flag: str, kind: Callable[[str], object], what: str, metavar: str = "N") -> None:
        name = flag[2:].replace("-", "_")
        if hasattr(_SMALL, name):
            small, large = getattr(_SMALL, name), getattr(_LARGE, name)
            what += f" (default: {large} on a GPU, {small} without)"
        parser.add_argument(flag, type=kind, metavar=metavar, help=what)

    add("--data", Path, "text to learn: a file, or a folder with all its text files (default: the "
        "Python sources of the standard library)", "PATH")  # fmt: skip
    add("--out", Path, "PNG of the loss curves (default: out/tiny_gpt.png)", "PATH")
    add("--steps", _integer(1), "training steps of each run")
    add("--batch-size", _integer(1), "sequences a step")
    add("--seq-len", _integer(2), "bytes in a sequence")
    add("--layers", _integer(1), "transformer blocks")
    add("--heads", _integer(1), "attention heads")
    add("--head-dim", _integer(1), "dimensions of a head; the width is heads * head-dim")
    add("--lr", _positive, "highest learning rate", "X")
    add("--sample-len", _integer(0), "bytes of text to generate")
    add("--prompt", str, "start of the generated text", "TEXT")
    add("--seed", _integer(0), "of the weights, the batches and the sample (default: 0)")
    add("--device", str, "cpu, cuda or cuda:N (default: cuda if there is one)", "DEVICE")
    add("--dtype", _choice(*_FIRST_STEP_TOLERANCE), "float32, or bfloat16 by autocast (default: "
        "bfloat16 on a GPU, float32 without)", "DTYPE")  # fmt: skip
    add("--implementation", str, "triflash's attention: auto, or a name that `triflash info` lists "
        "(default: auto)", "NAME")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do the job; args come from a parser with `add_arguments`.

    Returns:
        0; 1 if the two runs disagree where only rounding may part them, or a loss is not finite; 2
        for a flag that cannot be used, after a message on stderr that names it; 130 after Ctrl-C.
    """
    try:
        return _run(args)
    except _UsageError as error:
        print(f"triflash train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("triflash train: interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise _UsageError("--out needs matplotlib: pip install 'triflash[demo]'")
    out = _output_file(args.out or Path("out", "tiny_gpt.png"))

    import torch
    from rich.console import Console

    from triflash import registry
    from triflash.target import target_of

    device = _device(args.device)
    target = target_of(device)
    implementation = args.implementation or "auto"
    try:
        needs_kernels = implementation == "auto" or registry.get(implementation).needs_kernels
    except ValueError as error:
        raise _UsageError(f"--implementation: {error}") from None
    if needs_kernels and not target.has_triton:
        raise _UsageError(
            "--implementation: the kernels need the triton package, which is not installed; "
            "without it there is only --implementation reference"
        )
    if needs_kernels and not target.runs_kernels:
        return _run_interpreted(args)

    slow = target.interpreter or device.type == "cpu"
    size = _size(args, _SMALL if slow else _LARGE)
    dtype_name = args.dtype or ("float32" if slow else "bfloat16")
    job = _Job(
        size=size,
        device=device,
        dtype=getattr(torch, dtype_name),
        implementation=_resolve(implementation, size, device, dtype_name),
        text=_text(args.data, size.seq_len).to(device),
        seed=args.seed or 0,
    )
    prompt = ("def " if args.data is None else "\n") if args.prompt is None else args.prompt
    if not prompt:
        raise _UsageError("--prompt must have at least one character, got ''")
    console = Console(highlight=False)
    if needs_kernels and target.interpreter:
        why = "TRITON_INTERPRET is set"
        if device.type == "cpu":
            why = f"--device is {device}" if torch.cuda.is_available() else "there is no GPU"
        console.print(
            f"Triton's interpreter runs the kernels, because {why}: the same code, statement by "
            "statement in Python. It is slow, so the defaults are tiny and its time means nothing."
        )
    console.print(job.describe(target.interpreter), markup=False)
    try:
        return _compare(job, prompt, out, console)
    except torch.cuda.OutOfMemoryError as error:
        raise _UsageError(
            f"--batch-size {size.batch_size}, --seq-len {size.seq_len}: not enough memory on "
            f"{device} ({str(error).splitlines()[0]})"
        ) from None


@dataclass(frozen=True)
class _Job:
    """Everything that both runs share."""

    size: _Size
    device: torch.device
    dtype: torch.dtype
    implementation: str
    text: Text
    seed: int

    @property
    def config(self) -> GPTConfig:
        from triflash.examples.tiny_gpt.model import GPTConfig

        return GPTConfig(self.size.layers, self.size.heads, self.size.head_dim, self.size.seq_len)

    def model(self, attention: str) -> GPT:
        """The network with its initial weights, which do not depend on the attention."""
        import torch

        from triflash.examples.tiny_gpt.model import GPT

        torch.manual_seed(self.seed)
        return GPT(self.config, attention).to(self.device)

    def describe(self, interpreter: bool) -> str:
        import torch

        where = "CPU"
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        if interpreter:
            where += " (Triton's interpreter)"
        size = self.size
        parameters = sum(p.numel() for p in self.model("torch").parameters())
        megabytes = (len(self.text.train) + len(self.text.held_out)) / 1e6
        return (
            f"Text: {megabytes:.2f} MB, {self.text.source}\n"
            f"Model: {size.architecture}, "
            f"{parameters / 1e6:.2f} million parameters; {_count(size.steps, 'step')} of "
            f"{size.batch_size} x {size.seq_len} bytes\n"
            f"Attention: triflash {self.implementation} against PyTorch's "
            f"F.scaled_dot_product_attention, {str(self.dtype).removeprefix('torch.')}, {where}"
        )


def _compare(job: _Job, prompt: str, out: Path, console: Console) -> int:
    """Train both ways, report, sample, plot."""
    from triflash.examples.tiny_gpt import plot, sample

    names = {job.implementation: f"triflash {job.implementation}", "torch": "PyTorch SDPA"}
    models = {attention: job.model(attention) for attention in names}
    _warm_up(job, models)
    runs = _train(job, models, names, console)
    ours, torchs = runs[job.implementation], runs["torch"]

    curves = {names[attention]: run.losses for attention, run in runs.items()}
    size = job.size
    plot.save(
        out,
        dict(reversed(curves.items())),
        f"Tiny GPT ({size.architecture}), the same weights "
        f"and batches\nthrough {' and '.join(curves)}",
    )
    agree = _report(job, {names[attention]: run for attention, run in runs.items()}, console)
    if size.sample_len and all(map(math.isfinite, ours.losses)):
        text = sample.generate(
            models[job.implementation],
            prompt.encode(errors="surrogateescape"),
            size.sample_len,
            seed=job.seed,
            dtype=job.dtype,
        )
        seen = size.steps * size.batch_size * size.seq_len
        console.rule(f"Text from the model triflash {job.implementation} trained on {seen:,} bytes")
        console.print(_printable(text), markup=False)
        console.rule()
    console.print(f"Loss curves: {out}", markup=False, soft_wrap=True)
    if not all(map(math.isfinite, ours.losses + torchs.losses)):
        console.print("[red]A loss is not finite; try a lower --lr.[/red]")
        return 1
    if not agree:
        console.print(
            "[red]The runs disagree at the first step, where their weights are the same.[/red]"
        )
        return 1
    return 0


def _warm_up(job: _Job, models: dict[str, GPT]) -> None:
    """On a GPU, compile before the clock starts. Gradients are cleared; weights stay."""
    import torch

    from triflash.examples.tiny_gpt import loop

    if job.device.type != "cuda":
        return
    tokens = torch.zeros(
        job.size.batch_size, job.size.seq_len + 1, dtype=torch.long, device=job.device
    )
    for model in models.values():
        with loop.autocast(job.device, job.dtype):
            loss = model.loss(tokens)
        loss.backward()
        model.zero_grad()
    torch.cuda.synchronize(job.device)


def _train(
    job: _Job, models: dict[str, GPT], names: dict[str, str], console: Console
) -> dict[str, Run]:
    """One run for each model, under a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from triflash.examples.tiny_gpt import data, loop

    size = job.size
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    runs = {}
    with Progress(*columns, console=console) as progress:
        tasks = {
            attention: progress.add_task(
                names[attention], total=size.steps, loss=math.nan, start=False
            )
            for attention in models
        }
        for attention, model in models.items():
            task = tasks[attention]
            progress.start_task(task)
            runs[attention] = loop.train(
                model,
                data.training_batches(job.text, size.batch_size, size.seq_len, job.seed),
                data.held_out_batches(
                    job.text, size.batch_size, size.seq_len, size.held_out_batches
                ),
                steps=size.steps,
                learning_rate=size.lr,
                dtype=job.dtype,
                on_step=lambda done, loss, task=task: progress.update(  # type: ignore[misc]
                    task, completed=done, loss=loss
                ),
            )
    return runs


def _report(job: _Job, runs: dict[str, Run], console: Console) -> bool:
    """Print the end points and the differences; whether the first steps agree."""
    from rich.table import Table

    table = Table("", "first loss", "last loss", "held-out loss", "training time")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{run.losses[0]:.5f}",
            f"{run.losses[-1]:.5f}",
            f"{run.held_out:.5f}",
            f"{run.seconds:.1f} s",
        )
    console.print(table)
    console.print("Losses in nats a byte; an even guess over 256 bytes has 5.545.")

    ours, torchs = runs.values()
    apart = [abs(a - b) for a, b in zip(ours.losses, torchs.losses, strict=True)]
    step = max(range(len(apart)), key=apart.__getitem__)
    moves = [abs(b - a) for a, b in zip(torchs.losses, torchs.losses[1:], strict=False)]
    scale = f"{apart[step] / torchs.losses[step]:.1e} of the loss there"
    if moves:
        scale += f"; one curve moves {sum(moves) / len(moves):.1e} a step on average"
    console.print(
        f"Largest difference of the curves: {apart[step]:.1e} nats, at step {step + 1} ({scale})."
    )
    errors = {
        name: float((ours.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-30))
        for name, gradient in torchs.gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    console.print(
        f"First step, where the weights are the same: losses differ by {apart[0]:.1e}, the "
        f"gradients of attention's projections by at most {errors[worst]:.1e} of their size "
        f"(layer and projection {worst}). Later steps amplify such rounding."
    )
    tolerance = _FIRST_STEP_TOLERANCE[str(job.dtype).removeprefix("torch.")]
    return apart[0] <= tolerance and errors[worst] <= tolerance


def _run_interpreted(args: argparse.Namespace) -> int:
    """The same job in a child with TRITON_INTERPRET=1, which counts before triflash is imported.

    The child's tensors are so small that threads would only wait for each other.
    """
    command = [sys.executable, "-m", "triflash.examples.tiny_gpt.train"]
    for name, value in vars(_parser().parse_args([])).items():
        value = getattr(args, name)
        if value is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "1"}
    try:
        return subprocess.call(command, env=environment)
    except KeyboardInterrupt:
        return 130


def _resolve(implementation: str, size: _Size, device: torch.device, dtype: str) -> str:
    """The row that will run, so that the report names it."""
    import torch

    from triflash import registry
    from triflash.spec import make_spec
    from triflash.target import target_of

    shape = (size.batch_size, size.seq_len, size.heads, size.head_dim)
    q = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    spec = make_spec(q, q, q, None, True, False, False)
    target = target_of(device)
    try:
        row = registry.resolve(implementation, spec, target)
        if implementation == "auto" and not row.needs_kernels:
            kernels = (row for row in registry.IMPLEMENTATIONS if row.needs_kernels)
            reasons = " ".join(str(row.supports(spec, target)) for row in kernels)
            raise NotImplementedError(f"no kernel can run this model. {reasons}")
    except NotImplementedError as error:
        raise _UsageError(f"--implementation {implementation}: {error}") from None
    if row.backward is None:
        raise _UsageError(f"--implementation {implementation}: it has no backward to train with")
    return row.name


def _size(args: argparse.Namespace, default: _Size) -> _Size:
    given = {name: getattr(args, name, None) for name in vars(default)}
    return _Size(**{**vars(default), **{k: v for k, v in given.items() if v is not None}})


def _text(path: Path | None, seq_len: int) -> Text:
    from triflash.examples.tiny_gpt import data

    try:
        return data.load(path, seq_len)
    except (OSError, ValueError) as error:
        raise _UsageError(f"--data: {error}") from None


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise _UsageError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise _UsageError(f"--device {name}: PyTorch sees {count} GPUs here")
    return device


def _output_file(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise _UsageError(f"--out must end in .png, got {path}")
    if path.is_dir():
        raise _UsageError(f"--out must be a file, and {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _UsageError(f"--out: {error}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _UsageError(f"--out: {path} cannot be written")
    return path


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _integer(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {least}, got {text!r}"
            )
        return value

    return convert


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _choice(*names: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {text!r}")
        return text

    return convert


def _printable(text: bytes) -> str:
    """As UTF-8, without the control characters that would disturb a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for c in text.decode(errors="replace")
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="triflash train",
        description="Train a tiny GPT through triflash and PyTorch's attention, and compare.",
    )
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(_parser().parse_args()))
