"""Which blocks of a mask are empty, partial or full, as numbers, as text and as a picture.

What a query sees is asked of the oracle, `reference.seen`, or of a block mask, whose lists say what
kernels will visit; `triflash mask` draws the result.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triflash import mods, reference
from triflash.spec import make_spec

EMPTY, PARTIAL, FULL = range(3)
NAMES = ("empty", "partial", "full")
_SIGNS = "·▒█"
_COLOURS = ("#eef1f4", "#8fb8de", "#0b3d91")
_MOST_PAIRS = 2**28  # the oracle holds several bytes for each


@dataclass(frozen=True)
class Blocks:
    """A mask `(seqlen_q, seqlen_k)` seen as blocks of `(block_m, block_n)`.

    Attributes:
        states: int64 `(ceil(seqlen_q / block_m), ceil(seqlen_k / block_n))`, each one EMPTY,
            PARTIAL or FULL.
        visible: how many pairs of query and key there are where the query sees the key, or None:
            a block mask does not know.
    """

    states: torch.Tensor
    visible: int | None
    seqlen_q: int
    seqlen_k: int
    block_m: int
    block_n: int

    @classmethod
    def of(cls, seen: torch.Tensor, block_m: int, block_n: int) -> Blocks:
        """The blocks of a bool `(seqlen_q, seqlen_k)`; those at the ends hold what exists."""
        if seen.dtype != torch.bool or seen.dim() != 2:
            raise TypeError(
                f"seen must be a bool tensor (seqlen_q, seqlen_k), got {seen.dtype} of shape "
                f"{tuple(seen.shape)}"
            )
        if block_m < 1 or block_n < 1:
            raise ValueError(f"block_m and block_n must be at least 1, got {block_m}, {block_n}")
        counts = _sums(seen, block_m, block_n)
        sizes = _sums(torch.ones_like(seen), block_m, block_n)
        states = (counts > 0).long() + (counts == sizes).long()
        seqlen_q, seqlen_k = seen.shape
        return cls(states, int(counts.sum()), seqlen_q, seqlen_k, block_m, block_n)

    @classmethod
    def listed(cls, block_mask: mods.BlockMask, batch: int = 0, head: int = 0) -> Blocks:
        """The blocks as `block_mask` lists them, where those with keys past the end are not full.

        Waits for the GPU.
        """
        states, of = block_mask.states()[batch, head].long().cpu(), block_mask.blocks
        return cls(states, None, of.seqlen_q, of.seqlen_k, of.size_q, of.size_k)

    def count(self, state: int) -> int:
        """How many blocks are EMPTY, PARTIAL or FULL."""
        return int((self.states == state).sum())

    @property
    def share(self) -> str:
        """Of all pairs of query and key, those where the query sees the key; if they were not
        counted, of all blocks those that are visited."""
        if self.visible is None:
            visited = 1 - self.count(EMPTY) / max(1, self.states.numel())
            return f"{visited:.1%} of blocks visited"
        return f"{self.visible / max(1, self.seqlen_q * self.seqlen_k):.1%} of pairs visible"


def _sums(x: torch.Tensor, block_m: int, block_n: int) -> torch.Tensor:
    m, n = (-(-x.shape[0] // block_m), -(-x.shape[1] // block_n))
    whole = x.new_zeros(m * block_m, n * block_n)
    whole[: x.shape[0], : x.shape[1]] = x
    return whole.view(m, block_m, n, block_n).sum(dim=(1, 3))


def seen(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: Sequence[int | None] | None = None,
    documents: Sequence[int] | None = None,
    mask_mod: mods.MaskMod | None = None,
    aux: tuple[Any, ...] = (),
) -> torch.Tensor:
    """bool `(seqlen_q, seqlen_k)`, on the CPU: what queries of batch entry 0, head 0 see.

    Args:
        documents: lengths of documents that do not see each other, as `flash_attn_varlen_func`
            has them; their sum is seqlen_q and seqlen_k.
        causal, window_size, mask_mod, aux: as in `attention`.

    Raises:
        TypeError, ValueError: an argument is wrong, or what mask_mod's reference gives.
        NotImplementedError: mask_mod has no reference.
    """
    if seqlen_q * seqlen_k > _MOST_PAIRS:
        raise ValueError(
            f"a mask of {seqlen_q} x {seqlen_k} is too large to draw: seqlen_q * seqlen_k may be "
            f"{_MOST_PAIRS}, as of 16384 x 16384"
        )
    window = None if window_size is None else tuple(window_size)
    if documents is None:
        return _seen(seqlen_q, seqlen_k, causal, window, mask_mod, aux)
    if mask_mod is not None:
        raise ValueError(
            "documents and mask_mod cannot be drawn together: a mask modification of documents "
            "counts from their starts or from the row's, and only its author knows which"
        )
    if sum(documents) != seqlen_q or sum(documents) != seqlen_k:
        raise ValueError(
            f"documents of {','.join(map(str, documents))} are {sum(documents)} queries and keys, "
            f"got seqlen_q = {seqlen_q} and seqlen_k = {seqlen_k}"
        )
    return torch.block_diag(*(_seen(n, n, causal, window, None, ()) for n in documents)).bool()


def _seen(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window: tuple[int | None, ...] | None,
    mask_mod: mods.MaskMod | None,
    aux: tuple[Any, ...],
) -> torch.Tensor:
    features, extras = mods.features_of(window, mask_mod=mask_mod, aux=aux)
    q, k = torch.empty(1, seqlen_q, 1, 1), torch.empty(1, seqlen_k, 1, 1)
    spec = make_spec(q, k, k, None, causal, False, False, True, features, extras)
    if mask_mod is None:
        return reference.seen(spec, q.device)
    shape = (1, 1, seqlen_q, seqlen_k)
    try:
        shown = reference.seen(spec, q.device, extras)
    except (NotImplementedError, reference.WrongResult):
        raise
    except Exception as error:  # the user's function may raise anything
        raise ValueError(
            f"the reference of {mask_mod.key} failed: {type(error).__name__}: {error}"
        ) from error
    return shown.expand(shape)[0, 0]


def load(where: str) -> mods.MaskMod | mods.BlockMask:
    """The mask modification or block mask at `package.module:name` or `file.py:name`, which is run.

    Raises:
        ValueError: not of this form.
        ImportError: the module or file cannot be imported, or has no such name.
        TypeError: it is neither.
    """
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ValueError(f"a mask must be package.module:name or file.py:name, got {where!r}")
    try:
        module = _run(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's code raises
        raise ImportError(f"cannot import {place}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ImportError(f"{place} has no {name}")
    mod = getattr(module, name)
    if not isinstance(mod, mods.MaskMod | mods.BlockMask):
        raise TypeError(
            f"{where} must be a mask modification, triflash.mods.mask_mod(function, reference=...)"
            f", or from triflash.create_block_mask, got {type(mod).__name__}"
        )
    return mod


def _run(path: Path) -> Any:
    name = f"_mask_of_{path.stem}"  # not the stem itself, which may hide a module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # because its suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def text(blocks: Blocks, width: int | None = None) -> str:
    """A line a row of blocks, in at most `width` columns if given, or why they do not fit."""
    columns = blocks.states.shape[1]
    if width is not None and columns > width:
        return (
            f"{columns} blocks of keys do not fit into {width} columns: take a larger --block-n, "
            "or write a picture with --output FILE."
        )
    # Two signs are about a square.
    repeat = 2 if width is None or 2 * columns <= width else 1
    rows = blocks.states.tolist()
    return "\n".join("".join(_SIGNS[state] * repeat for state in row) for row in rows)


def summary(blocks: Blocks) -> str:
    """The counts in words."""
    m, n = blocks.states.shape
    counts = ", ".join(
        f"{blocks.count(state)} {NAMES[state]} ({_SIGNS[state]})"
        for state in (EMPTY, PARTIAL, FULL)
    )
    sizes = f"{m} x {n} blocks of {blocks.block_m} queries and {blocks.block_n} keys: {counts}.\n"
    if blocks.visible is None:
        return f"{sizes}{blocks.share}."
    pairs = blocks.seqlen_q * blocks.seqlen_k
    share = blocks.visible / max(1, pairs)
    return f"{sizes}{blocks.visible} of {pairs} pairs are visible: {share:.1%}."


def save(blocks: Blocks, path: str | Path, title: str = "") -> None:
    """Write the picture as PNG, with `text` and `summary` as its description. Needs matplotlib.

    Raises:
        ValueError: the name does not end in .png.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG, so its name must end in .png, got {path.name!r}")

    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    m, n = blocks.states.shape
    figure = Figure(
        figsize=(4.6, 4.4 * min(2.0, max(0.5, blocks.seqlen_q / blocks.seqlen_k)) + 0.9)
    )
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.pcolormesh(
        [min(i * blocks.block_n, blocks.seqlen_k) for i in range(n + 1)],
        [min(i * blocks.block_m, blocks.seqlen_q) for i in range(m + 1)],
        blocks.states.tolist(),
        cmap=ListedColormap(_COLOURS), vmin=EMPTY, vmax=FULL,
        edgecolors="white", linewidth=0.6 if max(m, n) <= 64 else 0,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_aspect("equal" if 0.5 <= blocks.seqlen_q / blocks.seqlen_k <= 2 else "auto")
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_title(title, fontsize="medium")
    handles = [
        Patch(facecolor=_COLOURS[s], edgecolor="#999999", label=f"{blocks.count(s)} {NAMES[s]}")
        for s in (EMPTY, PARTIAL, FULL)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small",
        title=f"blocks of {blocks.block_m} x {blocks.block_n}; {blocks.share}",
        title_fontsize="small",
    )  # fmt: skip
    description = {"Title": title, "Description": f"{text(blocks)}\n{summary(blocks)}"}
    figure.savefig(path, dpi=100, format="png", metadata=description)
