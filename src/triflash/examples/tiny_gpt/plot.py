"""The figure of two training runs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure


def save(path: Path, curves: dict[str, list[float]], title: str) -> None:
    """Write a PNG: two loss curves by name over each other, and below, how far they are apart.

    Args:
        path: where to; its folder exists.
        curves: two names, each with one loss (nats a byte) a step.
        title: above the figure.
    """
    (wide, first), (dashed, second) = curves.items()
    steps = range(1, len(first) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    losses, difference = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))

    # A dashed line on a wide pale one, so that both are seen where they lie on each other.
    losses.plot(steps, first, color="#f2b05e", linewidth=5, label=wide)
    losses.plot(steps, second, color="#1f4e8c", linewidth=1.3, linestyle=(0, (4, 2)), label=dashed)
    losses.set_ylabel("training loss (nats per byte)")
    losses.legend()
    losses.grid(alpha=0.3)

    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    marker = "." if len(apart) <= 200 else None
    difference.plot(steps, apart, color="#7a2048", linewidth=1, marker=marker)
    positive = [value for value in apart if value]
    if positive and max(positive) > 100 * min(positive):
        difference.set_yscale("log", nonpositive="mask")
    else:
        difference.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    difference.set_ylabel("|difference| (nats)")
    difference.set_xlabel("step")
    difference.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
