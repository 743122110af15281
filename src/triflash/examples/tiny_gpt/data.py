"""Real text as bytes: the standard library's own sources, or a file or folder of the user's."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Tests, tables of characters and installed packages: long, and not what Python reads like.
_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_HELD_OUT = 10  # one byte in ten, from the end


@dataclass(frozen=True)
class Text:
    """Tokens to learn from and to be judged by, uint8, 1-dimensional.

    Attributes:
        train: the first nine tenths.
        held_out: the last tenth, never trained on.
        source: where they come from, for people.
    """

    train: Tensor
    held_out: Tensor
    source: str

    def to(self, device: torch.device) -> Text:
        return Text(self.train.to(device), self.held_out.to(device), self.source)


def load(path: Path | None, seq_len: int) -> Text:
    """The text of `path`, or of the standard library if it is None.

    A folder is read with its subfolders, hidden and binary files left out. Files come in an order
    that is shuffled, so that the held-out end is like the rest, and the same in every run.

    Args:
        path: a file or a folder.
        seq_len: tokens in a training sequence; both parts must be longer.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no text in it, or too little.
        OSError: it cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        source = f"Python's standard library ({root})"
        data = _join(_python_files(root))
    elif path.is_dir():
        source = str(path)
        data = _join(_text_files(path))
    elif path.exists():
        source = str(path)
        data = path.read_bytes()
    else:
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not data:
        raise ValueError(f"there is no text in {source}")
    split = len(data) - len(data) // _HELD_OUT
    needed = (seq_len + 1) * _HELD_OUT
    if len(data) < needed:
        raise ValueError(
            f"{source} has {len(data)} bytes; sequences of {seq_len} need at least {needed}, "
            "a tenth of which is held out"
        )
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Text(tokens[:split], tokens[split:], source)


def training_batches(text: Text, batch_size: int, seq_len: int, seed: int) -> Iterable[Tensor]:
    """Without end: int64 `(batch_size, seq_len + 1)` from random places, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    last = len(text.train) - seq_len
    while True:
        starts = torch.randint(last, (batch_size,), generator=generator)
        yield _windows(text.train, starts, seq_len)


def held_out_batches(text: Text, batch_size: int, seq_len: int, count: int) -> Iterable[Tensor]:
    """`count` batches as in `training_batches`, evenly spread over the held-out text."""
    last = len(text.held_out) - seq_len - 1
    starts = torch.linspace(0, last, batch_size * count, dtype=torch.float64).long()
    for batch in starts.split(batch_size):
        yield _windows(text.held_out, batch, seq_len)


def _windows(tokens: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    index = starts.unsqueeze(1) + torch.arange(seq_len + 1)
    return tokens[index.to(tokens.device)].long()


def _python_files(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED.intersection(path.relative_to(root).parts)
    ]


def _text_files(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    ]


def _join(paths: list[Path]) -> bytes:
    random.Random(0).shuffle(paths)
    contents = (path.read_bytes() for path in paths)
    # A NUL byte is how git tells binary files too.
    return b"\n".join(content for content in contents if content and b"\0" not in content)
