"""The record: one contestant, one direction, one case. A result file is a flat list of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from triflash.bench import variants
from triflash.testing import Case

Record = dict[str, Any]

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
DTYPES = ("float16", "bfloat16", "float32", "tf32")

# Every record has every field; docs/benchmarks.md says what each one means.
IDENTITY = (
    "preset", "contestant", "direction", "dtype", "batch", "seqlen_q", "seqlen_k", "nheads",
    "nheads_k", "head_dim", "causal", "variant",
)  # fmt: skip
RESULTS = (
    "visible", "ms_median", "ms_iqr", "rounds", "mode", "tflops", "host_us_median", "host_us_iqr",
    "peak_mib", "inputs_mib", "outputs_mib", "workspace_mib",
    "err_out", "err_dq", "err_dk", "err_dv", "error_ratio",
    "matmul_tflops", "copy_gbs", "peak_tflops", "peak_gbs", "clock_mhz", "power_w",
)  # fmt: skip
ORIGIN = (
    "power_limit_w", "gpu", "driver", "cuda", "torch", "triton", "triflash", "version", "commit",
    "date", "reason",
)  # fmt: skip
FIELDS = (*IDENTITY, *RESULTS, *ORIGIN)


def new(preset: str, contestant: str, direction: str, case: Case, **known: Any) -> Record:
    """A record with every field; those not `known` are None."""
    record: Record = dict.fromkeys(FIELDS)
    record.update(
        preset=preset,
        contestant=contestant,
        direction=direction,
        dtype=dtype_name(case),
        batch=case.batch,
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        nheads=case.nheads,
        nheads_k=case.nheads_k,
        head_dim=case.headdim,
        causal=case.causal,
        variant=getattr(case, "variant", None),
        visible=variants.visible(case),
    )
    unknown = known.keys() - record.keys()
    assert not unknown, f"not a field of a record: {', '.join(sorted(unknown))}"
    record.update(known)
    return record


def dtype_name(case: Case) -> str:
    """float16, bfloat16, float32, or tf32 for float32 inputs that may be multiplied in tf32."""
    return "tf32" if case.allow_tf32 else str(case.dtype).removeprefix("torch.")


def dtype_options(name: str) -> tuple[torch.dtype, bool]:
    """The dtype of the inputs and allow_tf32, from one of DTYPES."""
    return (torch.float32, True) if name == "tf32" else (getattr(torch, name), False)


def key(record: Record) -> tuple[Any, ...]:
    """What a record is about."""
    return tuple(record[field] for field in IDENTITY)


def flops(record: Record) -> float:
    """As the papers count: two products of 2 Sq Sk D forward, five backward; half when causal, and
    of a variant the share that it shows."""
    products = {"fwd": 2.0, "bwd": 5.0, "fwd+bwd": 7.0}[record["direction"]]
    heads = record["batch"] * record["nheads"]
    size = record["seqlen_q"] * record["seqlen_k"] * record["head_dim"]
    share = record["visible"] or (0.5 if record["causal"] else 1.0)
    return products * 2.0 * heads * size * share


def itemsize(record: Record) -> int:
    return 4 if record["dtype"] in ("float32", "tf32") else 2


def load(paths: Iterable[Path]) -> list[Record]:
    """The records of all files; later files replace the same measurement in earlier ones.

    Raises:
        ValueError: a file is no list of records.
    """
    found: dict[Any, Record] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of records, got {type(content).__name__}")
        for record in content:
            wanted = (f for f in IDENTITY if f != "variant")  # which older files have not
            missing = [f for f in wanted if not isinstance(record, dict) or f not in record]
            if missing:
                raise ValueError(f"{path} holds a record without {', '.join(missing)}")
            full = {**dict.fromkeys(FIELDS), **record}
            found[key(full), full["gpu"]] = full
    return list(found.values())


def save(path: Path, records: list[Record]) -> None:
    """Write the file whole or not at all, one record a line, so that differences can be read."""
    lines = ",\n".join(json.dumps(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(f"[\n{lines}\n]\n" if records else "[]\n")
    partial.replace(path)
