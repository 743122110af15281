"""Is a contestant right? Its full-size result against float64, before it is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from triflash import testing
from triflash.bench import variants
from triflash.bench.contestants import Bound, with_head
from triflash.testing import Case, Inputs

Tensor = torch.Tensor

# Scores that the oracle holds at once, a few times over in float64: 16384 by 16384.
MOST_SCORES = 2**28
# Beyond this many times its error budget a result is wrong, not imprecise, and is not timed. The
# ratio itself is in the record.
WRONG = 4.0


@dataclass(frozen=True)
class Errors:
    """Largest errors against float64 by tensor, and the largest share of its budget used up."""

    errors: dict[str, float]
    ratio: float
    worst: str

    @property
    def wrong(self) -> str | None:
        if self.ratio <= WRONG:
            return None
        return (
            f"wrong: {self.worst} is off by {self.errors[self.worst]:.2g}, which is "
            f"{self.ratio:.3g} times its error budget; so it was not timed."
        )


@dataclass(frozen=True)
class _Part:
    """A sequence and one key head with its query heads, or everything."""

    batch: slice
    heads: slice
    heads_k: slice
    expected: dict[str, Tensor]
    allowed: dict[str, float]


class Oracle:
    """float64's answer to a case, and the error budget of triflash.testing.

    Sequences and key heads do not see each other. So of a large case the first key head of the
    first sequence and the last of the last are held against the oracle, in the result of the whole
    call; with `whole`, everything is.
    """

    def __init__(self, case: Case, inputs: Inputs, whole: bool = False) -> None:
        self._parts: list[_Part] = []
        case = variants.masked(case)
        extras = case.extras(inputs.q.device)
        if whole:
            corners = [(slice(None), slice(None), slice(None), case)]
        else:
            group = case.nheads // case.nheads_k
            corners = []
            for b, h in dict.fromkeys(((0, 0), (case.batch - 1, case.nheads_k - 1))):
                batch, heads_k = slice(b, b + 1), slice(h, h + 1)
                heads = slice(h * group, (h + 1) * group)
                corners.append((batch, heads, heads_k, with_head(case)))
        for batch, heads, heads_k, part in corners:
            of = Inputs(
                inputs.q[batch, :, heads],
                inputs.k[batch, :, heads_k],
                inputs.v[batch, :, heads_k],
                inputs.dout[batch, :, heads],
                None,
                variants.part_of(extras, batch, heads),
            )
            expected = testing.oracle(part, of)
            allowed = testing.budget(part, of, expected)
            self._parts.append(_Part(batch, heads, heads_k, expected, allowed))

    def judge(self, bound: Bound, backward: bool) -> Errors:
        """Call the contestant, and its backward too, and hold what it gives against float64."""
        with bound.context():
            if backward:
                out = bound.call()
                gradients = bound.gradients(out)
            else:
                with torch.no_grad():
                    out = bound.call()
                gradients = ()
        tensors = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=False))
        errors: dict[str, float] = {}
        ratio, worst = 0.0, "out"
        for name, tensor in tensors.items():
            tensor = bound.standard(tensor)
            for part in self._parts:
                heads = part.heads if name in ("out", "dq") else part.heads_k
                actual, expected = tensor[part.batch, :, heads], part.expected[name]
                if actual.shape != expected.shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
                difference = (actual.double() - expected).abs().nan_to_num(nan=float("inf"))
                error = float(difference.max())
                errors[name] = max(errors.get(name, 0.0), error)
                share = error / part.allowed[name] if error else 0.0
                if share > ratio:
                    ratio, worst = share, name
        return Errors(errors, ratio, worst)


def checkable(case: Case) -> Case:
    """The case, or one with shorter sequences where float64 could not hold all its scores."""
    if case.seqlen_q * case.seqlen_k <= MOST_SCORES:
        return case
    return replace(
        case, seqlen_q=min(case.seqlen_q, 2**14), seqlen_k=min(case.seqlen_k, 2**14), batch=1
    )
