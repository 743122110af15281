"""The presets: the tables of the starting documents and papers as cases, contestants and rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch

from triflash.bench import contestants, variants
from triflash.bench.record import dtype_options
from triflash.testing import Case

FWD, BWD, BOTH = "fwd", "bwd", "fwd+bwd"


@dataclass(frozen=True)
class Cell:
    """One case in the directions that a preset asks for; what is compared within it interleaves."""

    case: Case
    directions: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        mode: "sustained" runs every contestant long enough for the card's power limit to act, so
            that it compares fairly; "quick" is a look, in short bursts.
        rounds: each contestant is timed once a round, and the median of the rounds counts.
        round_ms: length of one contestant's turn.
        settle_ms: warm-up of each contestant before the first round.
        longest_ms: what one contestant may take in all; a slow one gets fewer rounds, at least 3.
    """

    mode: str
    rounds: int
    round_ms: float
    settle_ms: float
    longest_ms: float = 4000.0


SUSTAINED = Plan("sustained", rounds=5, round_ms=100.0, settle_ms=40.0)
QUICK = Plan("quick", rounds=7, round_ms=12.0, settle_ms=8.0)
# Interpreted kernels: it only has to run.
INTERPRETED = Plan("interpreted", rounds=2, round_ms=0.0, settle_ms=0.0)


@dataclass(frozen=True)
class Preset:
    """What `triflash bench NAME` measures.

    Attributes:
        measures: of "time", "memory", "error", "host".
        cells: makes the cells.
        contestants: makes the names measured by default, in the order of the tables.
        seeds: rows of the starting documents that it answers.
    """

    name: str
    summary: str
    measures: frozenset[str]
    cells: Callable[[], list[Cell]]
    contestants: Callable[[], list[str]]
    plan: Plan = QUICK
    seeds: str = ""


def _case(
    batch: int,
    seqlen: int,
    nheads: int,
    headdim: int,
    dtype: str = "bfloat16",
    causal: bool = False,
) -> Case:
    torch_dtype, allow_tf32 = dtype_options(dtype)
    return Case(
        batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, nheads=nheads, nheads_k=nheads,
        headdim=headdim, dtype=torch_dtype, causal=causal, allow_tf32=allow_tf32,
    )  # fmt: skip


def _backward_step() -> list[Cell]:
    cases = (_case(4, s, 8, d) for s, d in product((1024, 2048), (32, 64)))
    return [Cell(case, (FWD, BWD)) for case in cases]


def _tflops() -> list[Cell]:
    cells = []
    for dtype, tokens in product(("bfloat16", "tf32", "float32"), (16384, 8192)):
        for seqlen in (512, 1024, 2048, 4096, 8192):
            case = _case(tokens // seqlen, seqlen, 32, 64, dtype)
            # The document has float32 forward; its "to do" are half precision and backward.
            cells.append(Cell(case, (FWD, BWD) if dtype == "bfloat16" else (FWD,)))
    return cells


def _latency() -> list[Cell]:
    lengths = [_case(2, 2**n, 8, 64, "float16") for n in range(8, 15)]
    batches = [_case(batch, 2048, 8, 64, "float16") for batch in (1, 4, 8, 16, 32)]
    return [Cell(case, (FWD, BOTH)) for case in lengths + batches]


def _error() -> list[Cell]:
    dtypes = ("float16", "bfloat16", "float32", "tf32")
    cases = (
        _case(2, 1024, 8, 64, dtype, causal) for dtype, causal in product(dtypes, (False, True))
    )
    return [Cell(case, (BOTH,)) for case in cases]


def _runtime_cases() -> list[Case]:
    sizes = ((32, 512), (16, 1024), (8, 2048), (4, 4096))
    return [_case(b, s, 512 // d, d, "float16") for d, (b, s) in product((64, 128), sizes)]


def _growing() -> list[Case]:
    """One sequence of 1024 to 16384: is memory linear in it?"""
    return [_case(1, 2**n, 8, 64, "float16") for n in range(10, 15)]


def _paper() -> list[Cell]:
    cells = []
    for headdim, causal in product((64, 128, 256), (False, True)):
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
            case = _case(16384 // seqlen, seqlen, 2048 // headdim, headdim, causal=causal)
            cells.append(Cell(case, (FWD, BWD)))
    return cells


def _variants() -> list[Cell]:
    sizes = ((2, 8192), (8, 2048))
    return [
        Cell(case, (FWD, BWD)) for b, s in sizes for case in variants.variants(_case(b, s, 16, 128))
    ]


def _overhead() -> list[Cell]:
    # Small enough for the GPU to be done before Python is.
    return [Cell(_case(1, 128, 8, 64), (FWD, BWD, BOTH))]


def _rows(*names: str) -> list[str]:
    """Those of the names that the registry has."""
    return [name for name in names if name in contestants.ours()]


def _rows_but_reference() -> list[str]:
    return [name for name in contestants.ours() if name != "reference"]


def _peers() -> list[str]:
    return ["sdpa_flash", "sdpa_cudnn", "flex", "fa2", "fa3", "fa3_fwd", "fa4", "xformers"]


TIME, MEMORY = frozenset({"time"}), frozenset({"memory"})
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "backward-step",
            "what a Triton backward brings over a PyTorch one: sequences 1024 and 2048, "
            "head dimensions 32 and 64",
            TIME,
            _backward_step,
            lambda: [
                *_rows("v2_torch"),
                *contestants.first_choice(),
                "naive",
                "sdpa_flash",
                "sdpa_cudnn",
                "sdpa_efficient",
            ],
            seeds="0.6-0.10",
        ),
        Preset(
            "tflops",
            "TFLOP/s by sequence length, 32 heads of 64, 16384 and 8192 tokens, beside the peak",
            TIME,
            _tflops,
            lambda: [
                *contestants.first_choice(),
                *_rows("v1"),
                "naive",
                "sdpa_flash",
                "sdpa_cudnn",
                "sdpa_efficient",
            ],
            seeds="1.6-1.8",
        ),
        Preset(
            "latency",
            "milliseconds, forward and forward with backward, sequences 256 to 16384, and batches",
            TIME,
            _latency,
            lambda: [*_rows_but_reference(), "sdpa_flash", "sdpa_cudnn", "naive"],
            seeds="2.7-2.9",
        ),
        Preset(
            "error",
            "largest errors of out, dq, dk and dv against float64, by dtype",
            frozenset({"error"}),
            _error,
            lambda: [*contestants.ours(), "naive", *_sdpa(), *_peers()[2:]],
            seeds="2.10",
        ),
        Preset(
            "runtime",
            "milliseconds forward at embedding 512 and 16384 tokens: baseline, CUDA, Triton",
            TIME,
            lambda: [Cell(case, (FWD,)) for case in _runtime_cases()],
            lambda: [
                "naive",
                *_rows("cuda_v1", "v1", "v1_paper"),
                *contestants.first_choice(),
                "sdpa_flash",
                "sdpa_cudnn",
            ],
            seeds="3.4",
        ),
        Preset(
            "memory",
            "peak memory, the workspace apart: the sizes of `runtime`, and one growing sequence",
            MEMORY,
            lambda: [Cell(case, (FWD, BOTH)) for case in _runtime_cases() + _growing()],
            lambda: ["naive", *_rows_but_reference(), "sdpa_flash", "sdpa_cudnn"],
            seeds="3.5, 2.4",
        ),
        Preset(
            "paper",
            "the FlashAttention papers' grid against all peers: hidden 2048, 16384 tokens",
            TIME,
            _paper,
            lambda: [*contestants.first_choice(), *_peers()],
            plan=SUSTAINED,
            seeds="FlashAttention-2 and -3, section 4.1",
        ),
        Preset(
            "variants",
            "windows, softcap, ALiBi, modifications, documents: against plain attention and "
            "FlexAttention",
            TIME,
            _variants,
            lambda: [*contestants.first_choice(), "flex", "fa2", "fa3", "fa3_fwd", "sdpa_cudnn"],
            plan=Plan("sustained", rounds=3, round_ms=60.0, settle_ms=40.0),
        ),
        Preset(
            "overhead",
            "microseconds of Python a call",
            frozenset({"host"}),
            _overhead,
            lambda: [*contestants.ours(), "naive", *_sdpa(), *_peers()[2:]],
        ),
    )
}


def _sdpa() -> list[str]:
    return ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math"]


def custom(case: Case) -> Preset:
    """One case of the user's own, in all directions: time and memory."""
    return Preset(
        "custom",
        f"one case: {case}",
        TIME | MEMORY,
        lambda: [Cell(case, (FWD, BWD, BOTH))],
        lambda: [*contestants.ours(), "naive", *_sdpa(), *_peers()[2:]],
        plan=QUICK,
        seeds="4.6-4.9",
    )


def known() -> dict[str, str]:
    """Names and summaries of the presets."""
    return {name: preset.summary for name, preset in PRESETS.items()}


def tiny(cells: Iterable[Cell]) -> list[Cell]:
    """The same cells at sizes for Triton's interpreter, those that become one left out.

    Its tl.dot is wrong for bfloat16, which becomes float16.
    """
    small: dict[Cell, None] = {}
    for cell in cells:
        case = cell.case
        group = case.nheads // case.nheads_k
        nheads_k = min(case.nheads_k, 2 // min(group, 2))
        shrunk = variants.shrunk(
            case,
            batch=1,
            seqlen_q=_tiny_length(case.seqlen_q),
            seqlen_k=_tiny_length(case.seqlen_k),
            nheads=nheads_k * group,
            nheads_k=nheads_k,
            headdim=max(8, case.headdim // 4),
            dtype=torch.float16 if case.dtype == torch.bfloat16 else case.dtype,
        )
        small[replace(cell, case=shrunk)] = None
    return list(small)


def _tiny_length(seqlen: int) -> int:
    return 16 if seqlen <= 1024 else 32 if seqlen <= 4096 else 48


def matching(cells: list[Cell], **wanted: object) -> list[Cell]:
    """The cells whose case has every attribute in `wanted` that is not None."""
    return [
        cell
        for cell in cells
        if all(
            getattr(cell.case, name) == value for name, value in wanted.items() if value is not None
        )
    ]
