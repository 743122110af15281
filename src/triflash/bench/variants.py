"""Attention that is not plain, for the preset `variants`: each once as triflash, once as
FlexAttention takes it, and how many pairs of queries and keys it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from triflash import mods
from triflash.testing import Case

Tensor = torch.Tensor

# Of 64 parts of a sequence: eight documents, one of them a third of it.
_DOCUMENTS = (5, 11, 2, 19, 7, 3, 13, 4)
_CAP = 30.0
_SOFT = 20.0

# What a contestant must have.
NEEDS = ("window", "softcap", "alibi", "score_mod", "mask_mod", "block_mask", "varlen")
# Said of one that has not; one sentence for all, so that a table has one note a contestant.
LACKS = "it has none, or only as a tensor of all pairs of queries and keys, which is not timed."


@dataclass(frozen=True)
class VariantCase(Case):
    """A case with a name.

    Attributes:
        variant: the name, of NAMES.
        needs: what it takes to run it, of NEEDS; "" for plain attention.
        packed: the documents are packed sequences; as a Case it hides the others by its mask_mod.
    """

    variant: str = ""
    needs: str = ""
    packed: bool = False


def variants(case: Case) -> list[VariantCase]:
    """The causal case and its variants, in the order of the tables."""
    fields = {**vars(case), "causal": True}
    soft, same_document = _mods()
    documents = {"mask_mod": same_document, "make_aux": _ids}
    sizes = (128, 128)
    given: dict[str, tuple[str, dict[str, Any]]] = {
        "causal": ("", {}),
        "window of an eighth": ("window", {"window_size": (case.seqlen_k // 8, 0)}),
        "softcap 30": ("softcap", {"softcap": _CAP}),
        "ALiBi": ("alibi", {"alibi": "heads"}),
        "own score_mod, a soft sign": ("score_mod", {"score_mod": soft, "make_aux": _soft_aux}),
        "documents, mask_mod": ("mask_mod", documents),
        "documents, block mask": ("block_mask", {**documents, "block_size": sizes}),
        "documents, packed": ("varlen", {**documents, "packed": True}),
    }
    return [
        VariantCase(**{**fields, **more, "variant": name, "needs": needs})
        for name, (needs, more) in given.items()
    ]


NAMES = (
    "causal", "window of an eighth", "softcap 30", "ALiBi", "own score_mod, a soft sign",
    "documents, mask_mod", "documents, block mask", "documents, packed",
)  # fmt: skip


def lacks(case: Case, has: frozenset[str]) -> str | None:
    """Why a contestant that `has` these of NEEDS cannot run the case; None if it can."""
    able = not isinstance(case, VariantCase) or not case.needs or case.needs in has
    return None if able else LACKS


def shrunk(case: Case, **sizes: Any) -> Case:
    """The case at other sizes; a window stays an eighth."""
    new = replace(case, **sizes)
    if isinstance(case, VariantCase) and case.needs == "window":
        new = replace(new, window_size=(new.seqlen_k // 8, 0))
    return new


def masked(case: Case) -> Case:
    """The same with its mask as a mask_mod, which the reference and PyTorch can take."""
    return replace(case, block_size=None)


def lengths(case: Case) -> list[int]:
    """Of the documents of each batch entry; some may be 0 in a short one."""
    ends = [0]
    for part in _DOCUMENTS:
        ends.append(ends[-1] + part)
    places = [end * case.seqlen_q // ends[-1] for end in ends]
    return [b - a for a, b in pairwise(places)]


def cu_seqlens(case: Case, device: torch.device) -> tuple[Tensor, int]:
    """Where documents begin in tensors that are packed of all batch entries, and the longest."""
    rows = torch.tensor([0, *lengths(case) * case.batch], dtype=torch.int32)
    return rows.cumsum(0, dtype=torch.int32).to(device), max(lengths(case))


def visible(case: Case) -> float | None:
    """The share of pairs of a query and a key that a variant shows; None of other cases."""
    if not isinstance(case, VariantCase):
        return None
    rows = torch.arange(case.seqlen_q)
    first = torch.zeros_like(rows)
    if case.mask_mod is not None:
        of = torch.tensor(lengths(case))
        first = (of.cumsum(0) - of).repeat_interleave(of)
    if case.window_size[0] is not None:
        first = torch.maximum(first, rows - case.window_size[0])
    return float((rows - first + 1).sum()) / (case.seqlen_q * case.seqlen_k)


def part_of(extras: dict[str, Any], batch: slice, heads: slice) -> dict[str, Any]:
    """The extras of a case that has these entries and heads of another."""
    slopes = extras.get("alibi_slopes")
    aux = tuple(x[batch] if isinstance(x, Tensor) else x for x in extras.get("aux", ()))
    return {**extras, "alibi_slopes": None if slopes is None else slopes[..., heads], "aux": aux}


def flex_functions(case: Case, device: torch.device) -> tuple[Callable[..., Any] | None, Any]:
    """score_mod for flex_attention, and mask_mod for its create_block_mask; None for neither."""
    shift = case.seqlen_k - case.seqlen_q
    extras = masked(case).extras(device)
    score_mod: Callable[..., Any] | None = None
    if case.softcap:

        def score_mod(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
            return case.softcap * torch.tanh(score / case.softcap)

    elif case.alibi:
        slopes = extras["alibi_slopes"]

        def score_mod(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
            return score - slopes[h] * (q_idx + shift - kv_idx).abs()

    elif case.score_mod is not None:

        def score_mod(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
            return score / (1.0 + score.abs() / _SOFT)

    if not case.causal:
        return score_mod, None
    ids = extras["aux"][0][0] if case.mask_mod is not None else None
    left = case.window_size[0]

    def mask_mod(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        seen = q_idx + shift >= kv_idx
        if left is not None:
            seen = seen & (q_idx + shift - kv_idx <= left)
        if ids is not None:
            seen = seen & (ids[q_idx] == ids[kv_idx])
        return seen

    return score_mod, mask_mod


def _ids(case: Case, device: torch.device) -> tuple[Tensor]:
    """The number of each token's document, `(batch, seqlen)`."""
    of = torch.tensor(lengths(case))
    row = torch.arange(len(of), dtype=torch.int32).repeat_interleave(of)
    return (row.expand(case.batch, -1).contiguous().to(device),)


def _soft_aux(case: Case, device: torch.device) -> tuple[float]:
    return (_SOFT,)


@cache
def _mods() -> tuple[mods.ScoreMod, mods.MaskMod]:
    """Lazily, because Triton need not be installed to bench PyTorch."""
    from triflash.bench import variant_mods

    return variant_mods.SOFT_SIGN, variant_mods.SAME_DOCUMENT
