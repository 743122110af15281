"""Records as pictures: one function a picture, each giving a Figure or None without its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from triflash.bench import record as records_of
from triflash.bench.contestants import ours
from triflash.bench.record import Record
from triflash.bench.tables import (
    ERRORS,
    TITLES,
    Pivot,
    best_ratio,
    constants,
    label,
    ordered,
    timed,
    where,
)
from triflash.bench.variants import NAMES

# Ours in blue and green, PyTorch's in warm colours, the packages in violet and grey.
_COLOURS = {
    "v3": "#0b3d91", "v2": "#1f77b4", "v2_torch": "#7fb3d9", "v2_atomic": "#17a2a2",
    "v1": "#2e8b57", "v1_paper": "#8fd19e", "cuda_v1": "#9acd32", "reference": "#b5c7d3",
    "naive": "#7f7f7f", "sdpa_flash": "#ff7f0e", "sdpa_cudnn": "#d62728",
    "sdpa_efficient": "#f2b05e", "sdpa_math": "#c9a27a", "flex": "#e377c2", "fa2": "#c5b0d5",
    "fa3": "#9467bd", "fa3_fwd": "#9467bd", "fa4": "#5b2a86", "xformers": "#8c564b",
}  # fmt: skip
_MARKERS = "osD^v<>pPX*hd"


def save_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write every picture that there are records for as PNG and SVG; the paths of the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in PICTURES.items():
        figure = make(records)
        if figure is None:
            continue
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # which has done its work, and would again for each file
        # Without a date and with fixed ids the same records give the same file.
        with rc_context({"svg.hashsalt": "triflash"}):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def _colour(name: str) -> str:
    return _COLOURS.get(name, "#444444")


def _style(name: str) -> dict[str, Any]:
    mine = name in ours()
    order = ordered([*_COLOURS, name])
    return {
        "color": _colour(name),
        "marker": _MARKERS[order.index(name) % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 2.2 if mine else 1.4,
        "linestyle": "-" if mine else "--",
        "zorder": 3 if mine else 2,
    }


def _figure(title: str, records: Sequence[Record], size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize="large")
    figure.supxlabel(where(records), fontsize="x-small", color="#555555")
    return figure


def _of(records: Iterable[Record], preset: str, direction: str | None = None) -> list[Record]:
    return [
        r for r in records if r["preset"] == preset and direction in (None, r["direction"])
    ]  # fmt: skip


def _log2_axis(axes: Axes, values: Iterable[int]) -> None:
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _lines(axes: Axes, records: Sequence[Record], x: str, y: str) -> None:
    """One line a contestant; where it ran out of memory a cross stands above its last point."""
    for name in ordered(r["contestant"] for r in records):
        mine = sorted(
            (r for r in records if r["contestant"] == name and r[y] is not None),
            key=lambda r: r[x],
        )
        if not mine:
            continue
        axes.plot([r[x] for r in mine], [r[y] for r in mine], label=label(name), **_style(name))
        lost = sorted(
            r[x]
            for r in records
            if r["contestant"] == name and (r["reason"] or "").startswith("out of memory")
        )
        if lost:
            axes.annotate(
                "out of memory",
                (mine[-1][x], mine[-1][y]),
                xytext=(2, 8), textcoords="offset points", fontsize="x-small",
                color=_colour(name),
            )  # fmt: skip
    if axes.has_data():
        _log2_axis(axes, (r[x] for r in records))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.3, which="both")


def _latency(direction: str) -> Callable[[Sequence[Record]], Figure | None]:
    def make(records: Sequence[Record]) -> Figure | None:
        mine = _of(records, "latency", direction)
        lengths = [r for r in mine if r["batch"] == _usual_batch(mine)]
        among = [r["seqlen_q"] for r in mine if r not in lengths]
        batches = [r for r in mine if among and r["seqlen_q"] == among[0]]
        if not timed(lengths):
            return None
        figure = _figure(f"{TITLES[direction]}: milliseconds", mine, (11, 5.2))
        left, right = figure.subplots(1, 2)
        for axes, rows, x, name in (
            (left, lengths, "seqlen_q", "sequence length"),
            (right, batches, "batch", "batch size"),
        ):
            _lines(axes, rows, x, "ms_median")
            axes.set_xlabel(name)
            if rows:
                axes.set_title(constants(rows, (x, "seqlen_k")), fontsize="small")
        left.set_ylabel("ms (GPU time)")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure

    return make


def _usual_batch(records: Sequence[Record]) -> int | None:
    """The batch of the lengths: the one that has most of them."""
    lengths: dict[int, set[int]] = {}
    for record in records:
        lengths.setdefault(record["batch"], set()).add(record["seqlen_q"])
    return max(lengths, key=lambda batch: len(lengths[batch]), default=None)


def _paper(direction: str) -> Callable[[Sequence[Record]], Figure | None]:
    def make(records: Sequence[Record]) -> Figure | None:
        mine = [r for r in _of(records, "paper", direction) if r["tflops"] is not None]
        if not mine:
            return None
        names = ordered(r["contestant"] for r in mine)
        headdims = sorted({r["head_dim"] for r in mine})
        title = f"{TITLES[direction]}: TFLOP/s, {mine[0]['dtype']}, 16384 tokens, hidden 2048"
        figure = _figure(title, mine, (13, 3.1 * len(headdims) + 0.8))
        grid = figure.subplots(len(headdims), 2, squeeze=False, sharey="row")
        for row, headdim in enumerate(headdims):
            for column, causal in enumerate((False, True)):
                axes = grid[row][column]
                part = [r for r in mine if (r["head_dim"], r["causal"]) == (headdim, causal)]
                values = {(r["contestant"], r["seqlen_q"]): r["tflops"] for r in part}
                _grouped_bars(axes, names, sorted({r["seqlen_q"] for r in part}), values)
                axes.set_title(f"head dim {headdim}, {'causal' if causal else 'full'}")
                if column == 0:
                    axes.set_ylabel("TFLOP/s")
                if row == len(headdims) - 1:
                    axes.set_xlabel("sequence length")
        handles = grid[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", frameon=False)
        return figure

    return make


def _variants(direction: str) -> Callable[[Sequence[Record]], Figure | None]:
    def make(records: Sequence[Record]) -> Figure | None:
        mine = [r for r in _of(records, "variants", direction) if r["tflops"] is not None]
        if not mine:
            return None
        lengths = sorted({r["seqlen_q"] for r in mine}, reverse=True)
        title = f"{TITLES[direction]}: TFLOP/s of the pairs that are visible"
        figure = _figure(title, mine, (13, 3.4 * len(lengths) + 0.8))
        names = ordered(r["contestant"] for r in mine)
        grid = figure.subplots(len(lengths), 1, squeeze=False)
        for axes, seqlen in zip(grid[:, 0], lengths, strict=True):
            part = [r for r in mine if r["seqlen_q"] == seqlen]
            values = {(r["contestant"], _wrapped(r["variant"])): r["tflops"] for r in part}
            present = {r["variant"] for r in part}
            groups = [_wrapped(name) for name in NAMES if name in present]
            _grouped_bars(axes, names, groups, values)
            axes.set_title(constants(part, ("variant",)), fontsize="small")
            axes.set_ylabel("TFLOP/s")
        handles = [Patch(color=_colour(name), label=label(name)) for name in names]
        figure.legend(handles=handles, loc="outside right center", frameon=False)
        return figure

    return make


def _wrapped(variant: str) -> str:
    return variant.replace(", ", ",\n")


def _grouped_bars(
    axes: Axes,
    names: Sequence[str],
    groups: Sequence[Any],
    values: dict[tuple[str, Any], float],
    numbers: bool = True,
) -> None:
    """A group a value of `groups`, in it a bar a name, its number written above if asked for."""
    width = 0.86 / max(len(names), 1)
    for index, name in enumerate(names):
        places, heights = [], []
        for group_index, group in enumerate(groups):
            if (name, group) in values:
                places.append(group_index + (index - (len(names) - 1) / 2) * width)
                heights.append(values[name, group])
        bars = axes.bar(places, heights, width * 0.94, color=_colour(name), label=label(name))
        if numbers:
            axes.bar_label(bars, fmt="%.0f", fontsize=5.5, rotation=90, padding=2)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.margins(y=0.14)


def _against_peers(records: Sequence[Record]) -> Figure | None:
    """Speedup over the best peer in every cell of the paper grid."""
    mine = _of(records, "paper")
    cells = {
        direction: Pivot(_of(mine, "paper", direction), ("head_dim", "causal", "seqlen_q"))
        for direction in ("fwd", "bwd")
    }
    ratios = {
        (direction, *key): ratio
        for direction, pivot in cells.items()
        for key, row in pivot.cells.items()
        if (ratio := best_ratio(row)) is not None
    }
    if not ratios:
        return None
    figure = _figure("Speed of our fastest over the fastest peer, by cell", mine, (12, 6.4))
    for axes, direction in zip(figure.subplots(2, 1, sharey=True), ("fwd", "bwd"), strict=True):
        keys = sorted(key for key in ratios if key[0] == direction)
        values = [ratios[key][0] for key in keys]
        places = [index + 0.8 * _breaks(keys, index) for index in range(len(keys))]
        colours = ["#1f77b4" if value >= 1 else "#d9a5a0" for value in values]
        bars = axes.bar(places, [value - 1 for value in values], bottom=1, color=colours)
        axes.bar_label(bars, [f"{v:.2f}" for v in values], fontsize="x-small", padding=2)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xticks(places, [str(key[3]) for key in keys], rotation=60, fontsize="x-small")
        axes.set_ylabel(f"{TITLES[direction].lower()}: times as fast")
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        every = [ratio for ratio, *_ in ratios.values()]
        axes.set_ylim(min(0.97, *every) - 0.06, max(0.97, *every) + 0.06)
        for (headdim, causal), where_ in _panels(keys, places).items():
            axes.annotate(
                f"d{headdim} {'causal' if causal else 'full'}",
                (sum(where_) / len(where_), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3), textcoords="offset points", ha="center", va="bottom",
                fontsize="small",
            )  # fmt: skip
    return figure


def _breaks(keys: Sequence[tuple[Any, ...]], index: int) -> int:
    """How many times head dim or mask change before `index`."""
    return sum(a[1:3] != b[1:3] for a, b in pairwise(keys[: index + 1]))


def _panels(
    keys: Sequence[tuple[Any, ...]], places: Sequence[float]
) -> dict[tuple[Any, Any], list[float]]:
    panels: dict[tuple[Any, Any], list[float]] = {}
    for key, place in zip(keys, places, strict=True):
        panels.setdefault((key[1], key[2]), []).append(place)
    return panels


def _against_naive(records: Sequence[Record]) -> Figure | None:
    """SEEDS 4.8: bars, naive PyTorch against kernels; here as speedups over it."""
    mine = _of(records, "runtime", "fwd")
    pivot = Pivot(mine, ("head_dim", "batch", "seqlen_q"))
    values: dict[tuple[str, Any], float] = {}
    for key, row in pivot.cells.items():
        base = row.get("naive")
        if base is None or base["ms_median"] is None:
            continue
        group = "d{}\n{} x {}".format(*key)
        for name, record in row.items():
            if name != "naive" and record["ms_median"]:
                values[name, group] = base["ms_median"] / record["ms_median"]
    if not values:
        return None
    groups = ["d{}\n{} x {}".format(*key) for key in pivot.rows]
    figure = _figure("Forward: speedup over naive PyTorch, embedding 512", mine, (11, 4.8))
    axes = figure.subplots()
    _grouped_bars(axes, ordered(name for name, _ in values), groups, values, numbers=False)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xlabel("head dim, batch x sequence length")
    axes.set_ylabel("times as fast as naive PyTorch")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _error(records: Sequence[Record]) -> Figure | None:
    """SEEDS 2.11's third picture, a panel a dtype."""
    mine = [r for r in _of(records, "error") if r["err_out"] is not None and not r["causal"]]
    if not mine:
        return None
    dtypes = list(dict.fromkeys(r["dtype"] for r in mine))
    figure = _figure(
        f"Largest error against float64: {constants(mine, ('dtype', 'seqlen_k'))}",
        mine,
        (13, 2.5 * len(dtypes) + 0.8),
    )
    names = ordered(r["contestant"] for r in mine)
    grid = figure.subplots(len(dtypes), 1, squeeze=False)
    for axes, dtype in zip(grid[:, 0], dtypes, strict=True):
        values = {
            (r["contestant"], title): r[field]
            for r in mine
            for field, title in ERRORS.items()
            if r["dtype"] == dtype and r[field]
        }
        _grouped_bars(axes, names, list(ERRORS.values()), values, numbers=False)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_title(dtype, loc="left", fontsize="medium", pad=12)
        axes.set_ylabel("largest error")
    # Not the bars' own: who cannot run a dtype has none in its panel.
    handles = [Patch(color=_colour(name), label=label(name)) for name in names]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def _memory(records: Sequence[Record]) -> Figure | None:
    mine = [r for r in _of(records, "memory") if r["batch"] == 1]
    able = [r for r in mine if r["peak_mib"] is not None]
    if not able:
        return None
    figure = _figure(f"Peak memory: {constants(mine, ('seqlen_k',))}", mine, (11, 4.8))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, ("fwd", "fwd+bwd"), strict=True):
        part = [r for r in mine if r["direction"] == direction]
        _lines(axes, part, "seqlen_q", "peak_mib")
        axes.set_title(TITLES[direction], fontsize="medium")
        axes.set_xlabel("sequence length")
        exact = {
            r["seqlen_q"]: r["inputs_mib"] + r["outputs_mib"]
            for r in part
            if r["inputs_mib"] is not None
        }
        if exact:
            lengths = sorted(exact)
            axes.plot(
                lengths, [exact[n] for n in lengths], color="black", linewidth=5, alpha=0.18,
                label="the tensors alone", zorder=1,
            )  # fmt: skip
    panels[0].set_ylabel("MiB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _roofline(records: Sequence[Record]) -> Figure | None:
    """TFLOP/s over FLOP a byte that has to move, under the data sheet's and the measured roof."""
    mine = [
        r
        for r in records
        if r["preset"] in ("tflops", "paper")
        and r["dtype"] in ("bfloat16", "float16")
        and r["direction"] == "fwd"
        and r["tflops"]
        and r["matmul_tflops"]
        and r["copy_gbs"]
    ]
    if not mine:
        return None
    figure = _figure("Roofline, forward, half precision", mine, (9.5, 5.6))
    axes = figure.subplots()
    xs = [records_of.flops(r) / _bytes(r) for r in mine]
    low, high = min(40.0, *xs), 2 * max(xs)
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    roofs = [
        ("measured: copy and matmul", _best(mine, "copy_gbs"), _best(mine, "matmul_tflops"), "-")
    ]
    if mine[0]["peak_tflops"] and mine[0]["peak_gbs"]:
        peak = ("data sheet", mine[0]["peak_gbs"], mine[0]["peak_tflops"], "--")
        roofs.insert(0, peak)
    lines: dict[str, Any] = {}
    for name, gbs, tflops, style in roofs:
        roof = [min(x * gbs / 1e3, tflops) for x in steps]
        text = f"{name} ({gbs / 1e3:.1f} TB/s, {tflops:.0f} TFLOP/s)"
        (line,) = axes.plot(steps, roof, color="black", linewidth=1.4, linestyle=style)
        lines[text] = line
    axes.add_artist(axes.legend(list(lines.values()), list(lines), loc="lower right"))
    for name in ordered(r["contestant"] for r in mine):
        points = [
            (x, r["tflops"]) for x, r in zip(xs, mine, strict=True) if r["contestant"] == name
        ]
        look = {**_style(name), "linestyle": "none", "markersize": 6, "alpha": 0.75}
        axes.plot(*zip(*points, strict=True), label=label(name), **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("FLOP per byte of q, k, v, out and lse")
    axes.set_ylabel("TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _best(records: Sequence[Record], field: str) -> float:
    return max(float(r[field]) for r in records)


def _bytes(record: Record) -> float:
    """What a forward has to move: q and out, k and v once, and lse."""
    rows = record["nheads"] * record["seqlen_q"]
    keys = record["nheads_k"] * record["seqlen_k"]
    tensors = 2 * (rows + keys) * record["head_dim"] * records_of.itemsize(record)
    return float(record["batch"] * (tensors + 4 * rows))


def _overhead(records: Sequence[Record]) -> Figure | None:
    mine = [r for r in _of(records, "overhead") if r["host_us_median"] is not None]
    if not mine:
        return None
    names = ordered(r["contestant"] for r in mine)[::-1]
    figure = _figure(
        "Python's share: host microseconds a call", mine, (8.5, 0.42 * len(names) + 1.6)
    )
    axes = figure.subplots()
    shades = {"fwd": 1.0, "fwd+bwd": 0.45}
    for direction, alpha in shades.items():
        values = {r["contestant"]: r["host_us_median"] for r in mine if r["direction"] == direction}
        shift = 0.2 if direction == "fwd" else -0.2
        places = [i + shift for i, name in enumerate(names) if name in values]
        present = [name for name in names if name in values]
        bars = axes.barh(
            places, [values[n] for n in present], 0.38, alpha=alpha,
            color=[_colour(n) for n in present],
        )  # fmt: skip
        suffix = "" if direction == "fwd" else " (with backward)"
        texts = [f"{values[n]:.0f}{suffix}" for n in present]
        axes.bar_label(bars, texts, fontsize="x-small", padding=3)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_xlabel("microseconds")
    axes.margins(x=0.22)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    return figure


PICTURES: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "forward": _latency("fwd"),
    "forward_backward": _latency("fwd+bwd"),
    "error": _error,
    "paper_forward": _paper("fwd"),
    "paper_backward": _paper("bwd"),
    "against_peers": _against_peers,
    "against_naive": _against_naive,
    "memory": _memory,
    "roofline": _roofline,
    "overhead": _overhead,
    "variants_forward": _variants("fwd"),
    "variants_backward": _variants("bwd"),
}
