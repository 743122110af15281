"""What the starting documents claim, beside what was measured here: theirs, ours, GPU.

A line is filled from records, or says that nothing was measured yet. Nothing is filled in by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triflash.bench.contestants import first_choice
from triflash.bench.record import Record
from triflash.bench.tables import Table, geometric_mean, label, number, ordered

MISSING = "not measured yet"


@dataclass(frozen=True)
class Claim:
    """One of SEEDS' rows: its ids, what it says and on what, and how to read ours off records."""

    ids: str
    what: str
    theirs: str
    their_gpu: str
    ours: Callable[[Sequence[Record]], str | None]


def table(records: Sequence[Record]) -> Table:
    """One line a claim."""
    found = Table(
        "The documents' numbers and ours",
        ["id", "what", "theirs", "on", "ours", "on"],
        index=6,
    )
    for claim in CLAIMS:
        used: list[Record] = []
        ours = claim.ours(_Noting(records, used))
        gpus = dict.fromkeys(str(record["gpu"]) for record in used)
        found.rows.append(
            [claim.ids, claim.what, claim.theirs, claim.their_gpu, ours or MISSING,
             ", ".join(gpus) if ours else ""]
        )  # fmt: skip
    return found


class _Noting(list[Record]):
    """The records, and a list of those that a claim chose, for the GPU's name."""

    def __init__(self, records: Sequence[Record], used: list[Record]) -> None:
        super().__init__(records)
        self.used = used


def _pick(records: Sequence[Record], **wanted: object) -> list[Record]:
    chosen = [
        record
        for record in records
        if record["reason"] is None and all(record[name] == value for name, value in wanted.items())
    ]
    if isinstance(records, _Noting):
        records.used.extend(chosen)
    return chosen


def _pairs(
    records: Sequence[Record], preset: str, direction: str, fast: Sequence[str], slow: Sequence[str]
) -> list[float]:
    """How many times as fast the best of `fast` is as the best of `slow`, by case."""
    cells: dict[tuple[object, ...], dict[str, float]] = {}
    for record in _pick(records, preset=preset, direction=direction):
        case = tuple(record[n] for n in ("dtype", "batch", "seqlen_q", "nheads", "head_dim"))
        cells.setdefault(case, {})[record["contestant"]] = record["ms_median"]
    ratios = []
    for times in cells.values():
        ours = [times[name] for name in fast if name in times]
        theirs = [times[name] for name in slow if name in times]
        if ours and theirs:
            ratios.append(min(theirs) / min(ours))
    return ratios


def _range(ratios: Sequence[float]) -> str | None:
    if not ratios:
        return None
    low, high = number(min(ratios)), number(max(ratios))
    return f"{low}x" if low == high else f"{low}-{high}x"


SDPA = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient")


def _step(
    direction: str, fast: Sequence[str], slow: Sequence[str]
) -> Callable[[Sequence[Record]], str | None]:
    return lambda records: _range(_pairs(records, "backward-step", direction, fast, slow))


def _tflops(dtype: str, contestant: str | None = None) -> Callable[[Sequence[Record]], str | None]:
    def ours(records: Sequence[Record]) -> str | None:
        found = []
        for name in [contestant] if contestant else first_choice():
            found += _pick(records, preset="tflops", direction="fwd", dtype=dtype, contestant=name)
        values = [record["tflops"] for record in found]
        if not values:
            return None
        text = f"{number(min(values))}-{number(max(values))} TFLOP/s"
        if found[0]["peak_tflops"]:
            text += f", at most {max(values) / found[0]['peak_tflops']:.0%} of peak"
        if found[0]["matmul_tflops"]:
            text += f", {max(values) / found[0]['matmul_tflops']:.0%} of the matmul"
        return text

    return ours


def _latency(
    direction: str, contestant: str, seqlen: int
) -> Callable[[Sequence[Record]], str | None]:
    def ours(records: Sequence[Record]) -> str | None:
        found = _pick(
            records, preset="latency", direction=direction, contestant=contestant,
            seqlen_q=seqlen, batch=2,
        )  # fmt: skip
        return f"{number(found[0]['ms_median'])} ms" if found else None

    return ours


def _oom(records: Sequence[Record]) -> str | None:
    """What naive PyTorch does at the lengths where the document prints "inf"."""
    texts = []
    for seqlen in (8192, 16384):
        for record in records:
            about = (record["preset"], record["contestant"], record["direction"])
            if about == ("latency", "naive", "fwd") and record["seqlen_q"] == seqlen:
                if record["batch"] != 2:
                    continue
                if isinstance(records, _Noting):
                    records.used.append(record)
                ms = record["ms_median"]
                texts.append(f"{seqlen}: {record['reason'] or number(ms) + ' ms'}")
    return "; ".join(texts) or None


def _faster(
    direction: str, fast: str, slow: str, least: int
) -> Callable[[Sequence[Record]], str | None]:
    def ours(records: Sequence[Record]) -> str | None:
        long = [r for r in records if r["preset"] == "latency" and r["seqlen_q"] >= least]
        if isinstance(records, _Noting):
            long = _Noting(long, records.used)
        return _range(_pairs(long, "latency", direction, (fast,), (slow,)))

    return ours


def _errors(contestant: str) -> Callable[[Sequence[Record]], str | None]:
    def ours(records: Sequence[Record]) -> str | None:
        found = _pick(records, preset="error", dtype="float16", contestant=contestant, causal=False)
        if not found:
            return None
        fields = ("err_out", "err_dq", "err_dk", "err_dv")
        return ", ".join(f"{found[0][f]:.2e}" for f in fields if found[0][f] is not None)

    return ours


def _runtime(fast: Sequence[str], slow: Sequence[str]) -> Callable[[Sequence[Record]], str | None]:
    return lambda records: _range(_pairs(records, "runtime", "fwd", fast, slow))


def _memory(records: Sequence[Record]) -> str | None:
    grid = [record for record in records if record["batch"] > 1]
    if isinstance(records, _Noting):
        grid = _Noting(grid, records.used)
    found = []
    for name in first_choice():
        found += _pick(grid, preset="memory", direction="fwd", contestant=name)
    if not found:
        return None
    peaks = sorted({record["peak_mib"] for record in found})
    spare = max(record["workspace_mib"] for record in found)
    return (
        f"{' and '.join(f'{peak:.3f}' for peak in peaks)} MiB, of which workspace at most "
        f"{spare:.3f}; lse is smaller with fewer heads"
    )


def _linear(records: Sequence[Record]) -> str | None:
    """How peak memory of forward and backward grows when the sequence grows sixteenfold."""
    texts = []
    for name in (*first_choice(), "naive"):
        found = _pick(records, preset="memory", direction="fwd+bwd", contestant=name, batch=1)
        by_length = {record["seqlen_q"]: record["peak_mib"] for record in found}
        if {1024, 16384} <= by_length.keys():
            texts.append(f"{name} {number(by_length[16384] / by_length[1024])}x")
    return ", ".join(texts) or None


def _paper(direction: str) -> Callable[[Sequence[Record]], str | None]:
    def ours(records: Sequence[Record]) -> str | None:
        found = _pick(records, preset="paper", direction=direction)
        peers = {record["contestant"] for record in found} - set(first_choice())
        cells: dict[tuple[object, ...], dict[str, float]] = {}
        for record in found:
            case = (record["head_dim"], record["causal"], record["seqlen_q"])
            cells.setdefault(case, {})[record["contestant"]] = record["ms_median"]
        ratios = [
            min(times[n] for n in times if n in peers)
            / min(times[n] for n in times if n not in peers)
            for times in cells.values()
            if peers & times.keys() and times.keys() - peers
        ]
        if not ratios:
            return None
        among = ", ".join(label(name) for name in ordered(peers))
        return f"{geometric_mean(ratios):.2f}x ({_range(ratios)}); the best of {among}"

    return ours


CLAIMS: tuple[Claim, ...] = (
    Claim("0.7", "backward, PyTorch's against SDPA (FA-2; v2_torch)", "0.001-0.004x", "not said",
          _step("bwd", ("v2_torch",), SDPA)),
    Claim("0.7", "backward, Triton's against SDPA (FULL; ours)", "0.31-0.47x", "not said",
          lambda records: _step("bwd", first_choice(), SDPA)(records)),
    Claim("0.8", "Triton's backward against PyTorch's", "94-468x", "not said",
          _step("bwd", ("v2",), ("v2_torch",))),
    Claim("0.9", "forward against SDPA", "0.30-1.16x", "not said",
          lambda records: _step("fwd", first_choice(), SDPA)(records)),
    Claim("1.6", "forward, float32 by tf32, H 32, D 64", "17.5-37.0 TFLOP/s, 24% of peak",
          "A100 PCIe 40 GB", _tflops("tf32")),
    Claim("1.6", "the same by PyTorch, naive", "4.9-5.4 TFLOP/s", "A100 PCIe 40 GB",
          _tflops("tf32", "naive")),
    Claim("1.9", "the same in true float32", "none", "", _tflops("float32")),
    Claim("1.6", "the same in bfloat16", "none (to do)", "", _tflops("bfloat16")),
    *(
        Claim("2.7", f"{what} at 16384, {name}", theirs, "T4", _latency(direction, name, 16384))
        for direction, what, times in (
            ("fwd", "forward",
             {"v2": "95.8 ms", "v1": "108.3 ms", "sdpa_flash": "186.7 ms"}),
            ("fwd+bwd", "forward and backward",
             {"v2": "572.3 ms", "v2_atomic": "835.8 ms", "v1": "646.2 ms",
              "sdpa_flash": "930.6 ms"}),
        )
        for name, theirs in times.items()
    ),
    Claim("2.7", "naive PyTorch at 8192 and 16384, forward", "inf (written, not measured)", "T4",
          _oom),
    *(
        Claim("2.10", f"errors of out, dQ, dK, dV in fp16, {name}", theirs, "T4", _errors(name))
        for name, theirs in (
            ("v1", "9.77e-4, 1.46e-3, 1.95e-3, 9.77e-4"),
            ("v2_atomic", "9.77e-4, 1.46e-3, 1.95e-3, 9.77e-4"),
            ("v2", "9.77e-4, 9.77e-4, 1.95e-3, 9.77e-4"),
            ("sdpa_flash", "9.77e-4, 9.77e-4, 1.95e-3, 1.95e-3"),
        )
    ),
    Claim("2.13", "v2 against v1, forward, 1024 and up", "\"2x\"; its table: 0.97-1.14x", "T4",
          _faster("fwd", "v2", "v1", 1024)),
    Claim("2.13", "v2 against v2_atomic, forward and backward, 1024 and up",
          "1.41-1.49x", "T4", _faster("fwd+bwd", "v2", "v2_atomic", 1024)),
    Claim("2.13", "v2 against SDPA flash, forward, 16384", "1.95x", "T4",
          _faster("fwd", "v2", "sdpa_flash", 16384)),
    Claim("3.4", "forward, CUDA against the baseline", "3.7-7.6x", "RTX 4070 Laptop",
          _runtime(("cuda_v1",), ("naive",))),
    Claim("3.4", "forward, CUDA against Triton v1", "1.1-1.4x", "RTX 4070 Laptop",
          _runtime(("cuda_v1",), ("v1",))),
    Claim("3.4", "forward, ours against the baseline", "none", "",
          lambda records: _runtime(first_choice(), ("naive",))(records)),
    Claim("2.4", "peak memory, 16384 against 1024 tokens", "O(N), not measured", "", _linear),
    Claim("3.5", "peak memory of the forward", "72.125 MiB", "RTX 4070 Laptop", _memory),
    Claim("FA", "forward against the best peer, papers' grid", "none", "", _paper("fwd")),
    Claim("FA", "backward against the best peer, papers' grid", "none", "", _paper("bwd")),
)  # fmt: skip
