"""Records as tables, by preset, in words and numbers; and tables as Markdown, CSV or for rich."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from triflash.bench import machine
from triflash.bench.cases import PRESETS
from triflash.bench.contestants import CONTESTANTS, first_choice, names, ours
from triflash.bench.record import DIRECTIONS, FIELDS, Record
from triflash.bench.variants import NAMES

TITLES = {"fwd": "Forward", "bwd": "Backward", "fwd+bwd": "Forward and backward"}
HEADINGS = {
    "dtype": "dtype", "batch": "batch", "seqlen_q": "seqlen", "seqlen_k": "keys",
    "nheads": "heads", "nheads_k": "kv heads", "head_dim": "head dim", "causal": "mask",
    "variant": "variant",
}  # fmt: skip
_OOM = "OOM"


@dataclass
class Table:
    """A title, one column of text a heading, and notes below. `**x**` is bold."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    index: int = 0  # leading columns that say which case a row is

    def markdown(self) -> str:
        align = ["---"] * self.index + ["---:"] * (len(self.columns) - self.index)
        lines = [f"**{self.title}**", ""]
        lines += [_line(self.columns), _line(align)]
        lines += [_line(row) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables of all presets that have records, in the presets' order."""
    found: list[Table] = []
    present = {record["preset"] for record in records}
    for preset in [*PRESETS, *sorted(present - PRESETS.keys())]:
        mine = [record for record in records if record["preset"] == preset]
        if mine:
            found += _BY_PRESET.get(preset, _custom)(mine)
    return found


def as_csv(records: Iterable[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def where(records: Sequence[Record]) -> str:
    """One sentence on what the records were measured with."""
    parts = []
    for name, prefix in (
        ("gpu", ""), ("driver", "driver "), ("torch", "torch "), ("triton", "triton "),
        ("commit", "commit "), ("date", ""),
    ):  # fmt: skip
        values = sorted({str(record[name]) for record in records if record.get(name)})
        if values:
            parts.append(prefix + " and ".join(values))
    return ", ".join(parts)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def ordered(found: Iterable[str]) -> list[str]:
    """Contestants in the order they are listed in; names that are no more come last."""
    known = {name: index for index, name in enumerate(names())}
    return sorted(set(found), key=lambda name: (known.get(name, len(known)), name))


def label(name: str) -> str:
    return next((c.label for c in CONTESTANTS if c.name == name), name)


def timed(records: Iterable[Record], field: str = "ms_median") -> list[Record]:
    return [record for record in records if record.get(field) is not None]


class Pivot:
    """The records of one table: rows are cases, columns are contestants."""

    def __init__(self, records: Sequence[Record], index: Sequence[str] | None = None) -> None:
        self.records = records
        self.index = list(index if index is not None else _varying(records))
        self.cells: dict[tuple[Any, ...], dict[str, Record]] = {}
        for record in records:
            row = tuple(record[name] for name in self.index)
            self.cells.setdefault(row, {})[record["contestant"]] = record
        self.rows = sorted(self.cells, key=lambda row: tuple(map(_sortable, row)))
        found = ordered(record["contestant"] for record in records)
        able = {record["contestant"] for record in records if record["reason"] is None}
        # A contestant that ran nowhere is a note, not a column.
        oom = {r["contestant"] for r in records if _is_oom(r["reason"])}
        self.contestants = [name for name in found if name in able | oom]
        self._absent = [name for name in found if name not in able | oom]

    def table(
        self,
        title: str,
        value: Callable[[Record, dict[str, Record]], str],
        extra: dict[str, Callable[[dict[str, Record]], str]] | None = None,
    ) -> Table:
        """One text a record; `extra` columns are made of a whole row."""
        extra = extra or {}
        columns = [HEADINGS[name] for name in self.index] + [label(n) for n in self.contestants]
        table = Table(title, columns + list(extra), index=len(self.index))
        reasons: dict[str, int] = {}
        any_oom = False
        for key in self.rows:
            cells = self.cells[key]
            texts = [_text(name, part) for name, part in zip(self.index, key, strict=True)]
            for name in self.contestants:
                record = cells.get(name)
                if record is None:
                    texts.append("")
                elif record["reason"] is None:
                    texts.append(value(record, cells))
                elif _is_oom(record["reason"]):
                    any_oom = True
                    texts.append(_OOM)
                else:
                    note = f"{label(name)}: {record['reason']}"
                    texts.append(f"no ({reasons.setdefault(note, len(reasons) + 1)})")
            table.rows.append(texts + [make(cells) for make in extra.values()])
        table.notes += [f"({number}) {note}" for note, number in reasons.items()]
        if any_oom:
            table.notes.append(f"{_OOM}: it ran out of memory.")
        for name in self._absent:
            said = dict.fromkeys(r["reason"] for r in self.records if r["contestant"] == name)
            table.notes.append(f"{label(name)} did not run: {' '.join(said)}")
        return table


def _is_oom(reason: str | None) -> bool:
    return reason is not None and reason.startswith("out of memory")


def _varying(records: Sequence[Record]) -> list[str]:
    varying = [name for name in HEADINGS if len({record[name] for record in records}) > 1]
    for keys, queries in (("seqlen_k", "seqlen_q"), ("nheads_k", "nheads")):
        if keys in varying and all(record[keys] == record[queries] for record in records):
            varying.remove(keys)
    return varying or ["seqlen_q"]


def constants(records: Sequence[Record], besides: Sequence[str] = ()) -> str:
    """What all the records share, in words."""
    parts = []
    for name in HEADINGS:
        values = {record[name] for record in records}
        if len(values) != 1 or name in besides:
            continue
        value = values.pop()
        if value is None:
            continue
        if name == "seqlen_k" and all(record["seqlen_q"] == value for record in records):
            continue
        if name == "nheads_k" and all(record["nheads"] == value for record in records):
            continue
        text = _text(name, value)
        parts.append(text if name in ("dtype", "causal") else f"{HEADINGS[name]} {text}")
    return ", ".join(parts)


def _sortable(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


def _text(name: str, value: Any) -> str:
    return ("causal" if value else "full") if name == "causal" else str(value)


def number(value: float) -> str:
    """Three significant digits, without exponents for what a reader compares."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:#.3g}"


def _by_direction(records: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    for direction in DIRECTIONS:
        mine = [record for record in records if record["direction"] == direction]
        if mine:
            yield direction, mine


def _fastest(cells: dict[str, Record], among: Iterable[str]) -> Record | None:
    able = [cells[name] for name in among if name in cells and cells[name]["ms_median"]]
    return min(able, key=lambda record: float(record["ms_median"]), default=None)


def best_ratio(cells: dict[str, Record]) -> tuple[float, str] | None:
    """How many times as fast our fastest is as the fastest peer, and who that is."""
    mine = _fastest(cells, [name for name in ours() if name in cells])
    peer = _fastest(cells, [name for name in cells if name not in ours()])
    if mine is None or peer is None:
        return None
    return peer["ms_median"] / mine["ms_median"], peer["contestant"]


def _bold_best(text: str, record: Record, cells: dict[str, Record], field: str) -> str:
    best = min(cells.values(), key=lambda r: r[field] if r.get(field) is not None else math.inf)
    return f"**{text}**" if best is record else text


def _ms(record: Record, cells: dict[str, Record]) -> str:
    return _bold_best(number(record["ms_median"]), record, cells, "ms_median")


def _tflops(record: Record, cells: dict[str, Record]) -> str:
    if record["tflops"] is None:
        return number(record["ms_median"]) + " ms"
    return _bold_best(f"{record['tflops']:.0f}", record, cells, "ms_median")


def _ratio_column(cells: dict[str, Record]) -> str:
    ratio = best_ratio(cells)
    return "" if ratio is None else f"{ratio[0]:.2f}x ({label(ratio[1])})"


def _spread_note(records: Sequence[Record]) -> list[str]:
    shares = [r["ms_iqr"] / r["ms_median"] for r in timed(records) if r["ms_iqr"] is not None]
    if not shares:
        return []
    rounds = sorted({r["rounds"] for r in timed(records)})
    several = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
    return [
        f"Median of {several} rounds; interquartile range {statistics.median(shares):.1%} of it, "
        f"at most {max(shares):.1%}."
    ]


def _paper(records: list[Record]) -> list[Table]:
    found = []
    for direction, mine in _by_direction(records):
        pivot = Pivot(mine, ("head_dim", "causal", "seqlen_q"))
        shared = constants(mine, ("batch", "nheads", "nheads_k", "seqlen_k"))
        table = pivot.table(
            f"{TITLES[direction]}: TFLOP/s, {shared}, 16384 tokens, hidden size 2048",
            _tflops,
            {"ours / best peer": _ratio_column},
        )
        ratios = [ratio[0] for cells in pivot.cells.values() if (ratio := best_ratio(cells))]
        if ratios:
            table.notes.insert(
                0,
                f"Our fastest has {geometric_mean(ratios):.2f} times the speed of the fastest peer "
                f"in the table (geometric mean of {len(ratios)} cells, {min(ratios):.2f} to "
                f"{max(ratios):.2f}).",
            )
        table.notes += _spread_note(mine)
        found.append(table)
    return found


def _tflops_tables(records: list[Record]) -> list[Table]:
    found = []
    for tokens in sorted({r["batch"] * r["seqlen_q"] for r in records}, reverse=True):
        for direction, mine in _by_direction(records):
            for dtype in dict.fromkeys(r["dtype"] for r in mine):
                rows = [
                    r for r in mine
                    if r["batch"] * r["seqlen_q"] == tokens and r["dtype"] == dtype
                ]  # fmt: skip
                if rows:
                    found.append(_tflops_table(rows, tokens, direction))
    return found


def _tflops_table(records: list[Record], tokens: int, direction: str) -> Table:
    shared = constants(records, ("batch", "seqlen_q", "seqlen_k"))
    pivot = Pivot(records, ("seqlen_q", "batch"))
    peak = next((r["peak_tflops"] for r in records if r["peak_tflops"]), None)
    matmul = next((r["matmul_tflops"] for r in records if r["matmul_tflops"]), None)

    def value(record: Record, cells: dict[str, Record]) -> str:
        text = _tflops(record, cells)
        shares = [
            f"{record['tflops'] / ceiling:.0%}"
            for ceiling in (peak, matmul)
            if ceiling and record["tflops"]
        ]
        return f"{text} ({', '.join(shares)})" if shares else text

    table = pivot.table(f"{TITLES[direction]}: TFLOP/s, {shared}, {tokens} tokens", value)
    if peak:
        source = machine.peak_source(str(records[0]["gpu"])) or "source unknown"
        table.notes.append(f"First percentage: of the peak, {peak:g} TFLOP/s ({source}).")
    if matmul:
        table.notes.append(
            f"{'Second percentage' if peak else 'Percentage'}: of an 8192 x 8192 x 8192 matrix "
            f"product in the same run, {matmul:.0f} TFLOP/s."
        )
    table.notes += _spread_note(records)
    return table


def _backward_step(records: list[Record]) -> list[Table]:
    """The three tables of SEEDS 0.6 to 0.10."""
    index = ("seqlen_q", "head_dim")
    stepped = ["v2_torch", *first_choice()]
    peers = [r for r in ordered(r["contestant"] for r in records) if r not in ours()]
    rivals = [name for name in peers if name.startswith("sdpa")] or peers
    parts = {direction: mine for direction, mine in _by_direction(records)}

    def ratio(name: str, direction: str) -> Callable[[dict[str, Record]], str]:
        def make(cells: dict[str, Record]) -> str:
            mine, best = _fastest(cells, [name]), _fastest(cells, rivals)
            if mine is None or best is None:
                return ""
            return f"{number(best['ms_median'] / mine['ms_median'])}x"

        return make

    found = []
    for direction in ("bwd", "fwd"):
        if direction not in parts:
            continue
        mine = parts[direction]
        extra = {
            f"{name} / best SDPA": ratio(name, direction)
            for name in stepped
            if timed(r for r in mine if r["contestant"] == name)
        }
        title = f"{TITLES[direction]}: ms, {constants(mine, ('seqlen_k',))}"
        table = Pivot(mine, index).table(title, _ms, extra)
        table.notes.append("Ratios: how many times as fast as the fastest SDPA backend.")
        table.notes += _spread_note(mine)
        found.append(table)
        if direction == "bwd" and {"v2", "v2_torch"} <= {r["contestant"] for r in mine}:
            found.append(_winner(mine, index))
    return found


def _median(record: Record) -> float:
    return float(record["ms_median"])


def _winner(records: list[Record], index: tuple[str, ...]) -> Table:
    pivot = Pivot(records, index)
    table = Table(
        "The same forward with two backwards: v2_torch (PyTorch) and v2 (Triton), ms",
        [*(HEADINGS[name] for name in index), "v2_torch", "v2", "winner", "speedup"],
        index=len(index),
    )
    for key in pivot.rows:
        cells = pivot.cells[key]
        pair: dict[str, Record] = {
            name: cells[name] for name in ("v2_torch", "v2") if name in cells
        }
        row = [_text(n, part) for n, part in zip(index, key, strict=True)]
        row += [number(r["ms_median"]) if r["ms_median"] else "no" for r in pair.values()]
        winner, loser = _fastest(pair, pair), max(timed(pair.values()), key=_median, default=None)
        if len(timed(pair.values())) == 2 and winner is not None and loser is not None:
            speedup = loser["ms_median"] / winner["ms_median"]
            row += [f"**{winner['contestant']}**", f"{number(speedup)}x"]
        else:
            row += ["", ""]
        table.rows.append(row)
    return table


def _latency(records: list[Record]) -> list[Table]:
    found = []
    for direction, mine in _by_direction(records):
        batches = [r["batch"] for r in mine]
        usual = statistics.mode(batches)
        lengths = [r for r in mine if r["batch"] == usual]
        among = statistics.mode([r["seqlen_q"] for r in mine if r["batch"] != usual] or [0])
        rest = [r for r in mine if r["seqlen_q"] == among]
        for rows, index in ((lengths, ("seqlen_q",)), (rest, ("batch",))):
            if rows:
                shared = constants(rows, (*index, "seqlen_k"))
                table = Pivot(rows, index).table(f"{TITLES[direction]}: ms, {shared}", _ms)
                table.notes += _spread_note(rows)
                found.append(table)
    return found


def _runtime(records: list[Record]) -> list[Table]:
    table = Pivot(records, ("head_dim", "batch", "seqlen_q")).table(
        f"Forward: median ms (interquartile range), embedding 512, "
        f"{constants(records, ('batch', 'nheads', 'nheads_k'))}",
        lambda r, cells: f"{_ms(r, cells)} ({number(r['ms_iqr'])})",
    )
    return [table]


def _memory(records: list[Record]) -> list[Table]:
    """The document's grid of 16384 tokens, and one sequence that grows."""
    found = []
    for direction, mine in _by_direction(records):
        grid = [r for r in mine if r["batch"] > 1]
        growing = [r for r in mine if r["batch"] == 1]
        for rows, index in ((grid, ("head_dim", "batch", "seqlen_q")), (growing, ("seqlen_q",))):
            if rows:
                found.append(_memory_table(rows, index, direction))
    return found


def _memory_table(records: list[Record], index: tuple[str, ...], direction: str) -> Table:
    what = (
        "q, k, v, out and lse" if direction == "fwd" else "q, k, v, dout, out, lse, dq, dk and dv"
    )
    shared = constants(records, (*index, "nheads", "nheads_k", "seqlen_k"))
    table = Pivot(records, index).table(
        f"{TITLES[direction]}: peak MiB, and how much of it is workspace; embedding 512, {shared}",
        lambda r, cells: f"{r['peak_mib']:.2f} ({r['workspace_mib']:.2f})",
        {"tensors alone": _tensors_alone},
    )
    table.notes.append(f"Tensors alone: {what}. Workspace is what is left of the peak.")
    return table


def _tensors_alone(cells: dict[str, Record]) -> str:
    able = [r for r in cells.values() if r["inputs_mib"] is not None]
    return f"{able[0]['inputs_mib'] + able[0]['outputs_mib']:.2f}" if able else ""


ERRORS = {"err_out": "out", "err_dq": "dQ", "err_dk": "dK", "err_dv": "dV"}


def _error(records: list[Record]) -> list[Table]:
    found = []
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        for causal in (False, True):
            mine = [r for r in records if r["dtype"] == dtype and r["causal"] == causal]
            if not mine:
                continue
            by_name = {r["contestant"]: r for r in mine}
            table = Table(
                f"Largest error against float64: {constants(mine)}",
                ["implementation", *ERRORS.values(), "of its budget"],
                index=1,
            )
            for name in ordered(by_name):
                record = by_name[name]
                if record["reason"] is not None:
                    table.notes.append(f"{label(name)} did not run: {record['reason']}")
                    continue
                values = [record[field] for field in ERRORS]
                table.rows.append(
                    [
                        label(name),
                        *("" if value is None else f"{value:.2e}" for value in values),
                        f"{record['error_ratio']:.2f}",
                    ]
                )
            found.append(table)
    return found


def _overhead(records: list[Record]) -> list[Table]:
    by_name: dict[str, dict[str, Record]] = {}
    for record in records:
        by_name.setdefault(record["contestant"], {})[record["direction"]] = record
    table = Table(
        f"Host microseconds a call: {constants(records)}",
        ["contestant", *TITLES.values()],
        index=1,
        notes=["Forward is without gradients. The GPU is not waited for."],
    )
    for name in ordered(by_name):
        texts = []
        for direction in TITLES:
            found = by_name[name].get(direction)
            value = found["host_us_median"] if found else None
            texts.append("" if value is None else f"{value:.1f}")
        if any(texts):
            table.rows.append([label(name), *texts])
        else:
            said = dict.fromkeys(r["reason"] for r in by_name[name].values() if r["reason"])
            table.notes.append(f"{label(name)} did not run: {' '.join(said)}")
    return [table]


def _custom(records: list[Record]) -> list[Table]:
    found = []
    cases = dict.fromkeys(tuple(record[name] for name in HEADINGS) for record in records)
    for case in cases:
        mine = [r for r in records if tuple(r[name] for name in HEADINGS) == case]
        table = Table(
            f"ms (TFLOP/s): {constants(mine)}",
            ["contestant", *TITLES.values(), "peak MiB", "of error budget"],
            index=1,
        )
        for name in ordered(r["contestant"] for r in mine):
            parts = {r["direction"]: r for r in mine if r["contestant"] == name}
            texts = [_custom_cell(parts.get(direction)) for direction in TITLES]
            peak = [r["peak_mib"] for r in parts.values() if r["peak_mib"] is not None]
            ratio = [r["error_ratio"] for r in parts.values() if r["error_ratio"] is not None]
            if any(texts):
                texts.append(f"{max(peak):.1f}" if peak else "")
                texts.append(f"{max(ratio):.2f}" if ratio else "")
                table.rows.append([label(name), *texts])
            for reason in dict.fromkeys(r["reason"] for r in parts.values() if r["reason"]):
                table.notes.append(f"{label(name)}: {reason}")
        found.append(table)
    return found


def _custom_cell(record: Record | None) -> str:
    if record is None or record["ms_median"] is None:
        return ""
    text = number(record["ms_median"])
    return text if record["tflops"] is None else f"{text} ({record['tflops']:.0f})"


def _variants(records: list[Record]) -> list[Table]:
    """Of each length and direction: TFLOP/s of what is visible, and as a share of plain causal."""
    found = []
    for seqlen in sorted({r["seqlen_q"] for r in records}, reverse=True):
        for direction, mine in _by_direction([r for r in records if r["seqlen_q"] == seqlen]):
            plain = {r["contestant"]: r for r in timed(mine, "tflops") if r["variant"] == NAMES[0]}
            pivot = Pivot(mine, ("variant",))
            pivot.rows.sort(key=lambda row: _place(row[0]))

            def value(record: Record, cells: dict[str, Record], plain: Any = plain) -> str:
                text = _tflops(record, cells)
                own = plain.get(record["contestant"])
                if own is None or record["tflops"] is None or own is record:
                    return text
                return f"{text} ({record['tflops'] / own['tflops']:.2f})"

            table = pivot.table(
                f"{TITLES[direction]}: TFLOP/s of the pairs that are visible (and as a share of "
                f"the contestant's own causal), {constants(mine, ('variant', 'causal'))}",
                value,
                {f"ours / {label('flex')}": _over_flex},
            )
            table.notes += _spread_note(mine)
            found.append(table)
    return found


def _place(variant: str) -> int:
    return NAMES.index(variant) if variant in NAMES else len(NAMES)


def _over_flex(cells: dict[str, Record]) -> str:
    mine, flex = _fastest(cells, ours()), _fastest(cells, ["flex"])
    if mine is None or flex is None:
        return ""
    return f"{flex['ms_median'] / mine['ms_median']:.2f}x ({mine['contestant']})"


_BY_PRESET: dict[str, Callable[[list[Record]], list[Table]]] = {
    "paper": _paper,
    "tflops": _tflops_tables,
    "backward-step": _backward_step,
    "latency": _latency,
    "runtime": _runtime,
    "memory": _memory,
    "error": _error,
    "overhead": _overhead,
    "variants": _variants,
}
