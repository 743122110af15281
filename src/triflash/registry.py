"""The table of implementations; "auto" tries those that allow it in this order."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from triflash.spec import FEATURES, KERNEL_DTYPES, REFERENCE_DTYPES, AttentionSpec
from triflash.target import Target


@dataclass(frozen=True)
class Implementation:
    """One row: a forward paired with a backward, and what the pair can do.

    Attributes:
        name: what users pass as `implementation=`.
        summary: one line for `triflash info`.
        forward: "module:function", `(q, k, v, spec) -> (out, lse, saved)`; of calls whose features
            have tensors, `(q, k, v, spec, extras)`; of packed ones with `sequences=`.
        backward: "module:function", `(dout, dlse, q, k, v, out, lse, saved, spec) ->
            (dq, dk, dv)`, or None; with tensors, `(..., spec, extras) -> (dq, dk, dv, *dextras)`,
            see `Features.gradients_of`.
        saves: names of the tensors beside out and lse that the backward needs; each is float32 of
            lse's shape.
        features: which of spec.FEATURES the pair has.
        dtypes: dtypes of q, k and v.
        max_headdim: largest head dimension, None for any.
        needs_kernels: runs Triton kernels, so needs a GPU or the interpreter.
        auto: "auto" may pick it; the others are there to be read and compared, and run by name.
        deterministic: gradients are bitwise the same in every run.
        obeys_deterministic: with deterministic=True they are, even if not else.
        nvidia_only: runs what Triton and its interpreter cannot stand in for.
        archs: the only architectures it runs on, () for any; Triton's interpreter is none of them.
        triton: the oldest (major, minor) of Triton that has what the kernels use, None for any.
        headdim_multiple: what head dimensions must be a multiple of.
        block_multiple: what the sizes of a block mask's blocks must be a multiple of.
        needs_tma: q, k and v must lie as TMA reads them, see AttentionSpec.tma.
        pays: "module:function", `(spec, target) -> bool`: whether "auto" takes the row where it can
            run; None for always.
        extra: the optional dependency that brings `packages`, and those by their import names.
        writes_gradients: `backward` takes `grads=(dq, dk, dv)` and writes there.
    """

    name: str
    summary: str
    forward: str
    backward: str | None
    saves: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    max_headdim: int | None = 256
    needs_kernels: bool = True
    auto: bool = True
    deterministic: bool = True
    obeys_deterministic: bool = False
    nvidia_only: bool = False
    archs: tuple[str, ...] = ()
    triton: tuple[int, int] | None = None
    headdim_multiple: int = 1
    block_multiple: int = 64
    needs_tma: bool = False
    pays: str | None = None
    extra: str | None = None
    packages: tuple[str, ...] = ()
    writes_gradients: bool = False

    def supports(self, spec: AttentionSpec, target: Target) -> str | None:
        """None if this row can run `spec` on `target`, else the reason as a sentence."""
        if spec.dtype not in self.dtypes:
            return f"{self.name} takes {_names(self.dtypes)}, not {_name(spec.dtype)}."
        for feature in spec.uses:
            if feature not in self.features:
                having = [row.name for row in IMPLEMENTATIONS if feature in row.features]
                return (
                    f"{self.name} does not have {FEATURES[feature]}; {', '.join(having)} "
                    f"{'has' if len(having) == 1 else 'have'}."
                )
        if spec.deterministic and spec.features.scattered and self.needs_kernels:
            return (
                f"{self.name} refuses deterministic=True with a gradient of "
                f"{', '.join(spec.features.scattered)}, to which programs add in any order."
            )
        headdim, blocks = max(spec.headdim, spec.headdim_v), spec.features.blocks
        if self.max_headdim is not None and headdim > self.max_headdim:
            return f"{self.name} takes head dimensions up to {self.max_headdim}, not {headdim}."
        if spec.headdim % self.headdim_multiple or spec.headdim_v % self.headdim_multiple:
            return (
                f"{self.name} takes head dimensions that are multiples of {self.headdim_multiple}, "
                f"not {spec.headdim} and {spec.headdim_v}."
            )
        if blocks is not None and (blocks.size_q | blocks.size_k) % self.block_multiple:
            return (
                f"{self.name} takes a block mask with blocks of multiples of {self.block_multiple},"
                f" not {blocks.size_q} x {blocks.size_k}."
            )
        if spec.deterministic and not (self.deterministic or self.obeys_deterministic):
            return (
                f"{self.name} refuses deterministic=True: it adds to dq atomically, in an order "
                "that differs from run to run; v2 makes the same gradients deterministically."
            )
        if not self.needs_kernels:
            return None
        if self.nvidia_only and target.kind != "cuda":
            return f"{self.name} runs on NVIDIA GPUs only, and q is on {target.kind}."
        if self.archs and (target.interpreter or target.arch not in self.archs):
            where = "Triton's interpreter" if target.interpreter else target.arch or target.kind
            return f"{self.name} runs on {', '.join(self.archs)} only, not on {where}."
        if not all(_installed(package) for package in self.packages):
            return f"{self.name} needs the optional packages: pip install triflash[{self.extra}]."
        if not target.has_triton:
            return f"{self.name} needs the triton package, which is not installed."
        if self.triton is not None and _triton_version() < self.triton:
            oldest, found = (".".join(map(str, v)) for v in (self.triton, _triton_version()))
            return f"{self.name} needs Triton {oldest} or later, and {found} is installed."
        if not target.runs_kernels:
            return (
                f"{self.name} runs on a GPU, and q is on {target.kind}; move the tensors to a GPU, "
                "or set TRITON_INTERPRET=1 before triflash is imported to run its kernels in "
                "Triton's interpreter."
            )
        if target.interpreter and spec.dtype == torch.bfloat16:
            return (
                f"{self.name} refuses bfloat16 in Triton's interpreter, whose tl.dot is wrong "
                "for it; use float16 or float32 there."
            )
        if not target.interpreter and target.kind == "cuda" and target.sm < 80:
            return f"{self.name} needs an NVIDIA GPU of sm_80 (Ampere) or later, not {target.arch}."
        if self.needs_tma and not spec.tma:
            return (
                f"{self.name} loads by TMA, which needs q, k and v to start at multiples of 16 "
                "bytes and to have strides that are multiples of 16 bytes and not 0; v2 reads any "
                "layout."
            )
        return None

    def load_forward(self) -> Callable[..., Any]:
        return _load(self.forward)

    def load_backward(self) -> Callable[..., Any]:
        if self.backward is None:
            raise NotImplementedError(f"{self.name} has no backward.")
        return _load(self.backward)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        name="v3",
        summary="FlashAttention-3 for Hopper in Gluon",
        forward="triflash.kernels.v3.forward:forward",
        backward="triflash.kernels.v3.backward:backward",
        features=frozenset(
            {"window", "softcap", "alibi", "score_mod", "mask_mod", "block_mask", "sinks", "varlen"}
        ),
        dtypes=(torch.float16, torch.bfloat16),
        deterministic=False,  # dq is added up in any order
        obeys_deterministic=True,
        nvidia_only=True,
        archs=("sm_90",),
        triton=(3, 6),  # Gluon
        headdim_multiple=8,  # rows of 16 bytes, for TMA
        block_multiple=128,  # two warpgroups of 64 queries, or of 64 keys
        needs_tma=True,
        pays="triflash.tuning_v3:pays",
        writes_gradients=True,
    ),
    Implementation(
        name="v2",
        summary="FlashAttention-2 in Triton: portable, two-pass deterministic backward",
        forward="triflash.kernels.v2.forward:forward",
        backward="triflash.kernels.v2.backward:backward",
        features=frozenset(FEATURES),
        max_headdim=512,
        writes_gradients=True,
    ),
    Implementation(
        name="v2_torch",
        summary="v2's forward with a backward in tiles of plain PyTorch: the didactic middle step",
        forward="triflash.kernels.v2.forward:forward",
        backward="triflash.kernels.v2_torch.backward:backward",
        auto=False,
    ),
    Implementation(
        name="v2_atomic",
        summary="v2's forward with a one-pass backward, dq by atomic adds: not deterministic",
        forward="triflash.kernels.v2.forward:forward",
        backward="triflash.kernels.v2_atomic.backward:backward",
        auto=False,
        deterministic=False,
    ),
    Implementation(
        name="v1",
        summary="FlashAttention in Triton: output normalised at every step, m and l saved",
        forward="triflash.kernels.v1.forward:forward",
        backward="triflash.kernels.v1.backward:backward",
        saves=("m", "l"),
        auto=False,
    ),
    Implementation(
        name="v1_paper",
        summary="v1 in the paper's order of loops, keys outside: one program a head",
        forward="triflash.kernels.v1.paper_forward:forward",
        backward="triflash.kernels.v1.backward:backward",
        saves=("m", "l"),
        auto=False,
    ),
    Implementation(
        name="cuda_v1",
        summary="FlashAttention forward in CUDA C++ with CuTe, compiled at run time; v2's backward",
        forward="triflash.kernels.cuda.forward:forward",
        backward="triflash.kernels.v2.backward:backward",
        dtypes=(torch.float16, torch.bfloat16),
        auto=False,
        nvidia_only=True,
        extra="cuda",
        packages=("cuda.core", "cuda.bindings", "cutlass_library"),
    ),
    Implementation(
        name="reference",
        summary="textbook attention in PyTorch: any device, quadratic memory, the oracle",
        forward="triflash.reference:forward",
        backward="triflash.reference:backward",
        features=frozenset(FEATURES),
        dtypes=REFERENCE_DTYPES,
        max_headdim=None,
        needs_kernels=False,
    ),
)


def implementations() -> list[str]:
    """Names that `implementation=` takes beside "auto"."""
    return [row.name for row in IMPLEMENTATIONS]


def get(name: str) -> Implementation:
    """The row called `name`; ValueError lists the known names."""
    for row in IMPLEMENTATIONS:
        if row.name == name:
            return row
    raise ValueError(
        f'implementation must be "auto" or one of {", ".join(implementations())}, got {name!r}'
    )


def features_table() -> str:
    """What each row can do, as a table in Markdown; the README's is this one."""
    yes = {True: "✔", False: ""}
    lines: dict[str, list[str]] = {
        "dtypes": [
            "any" if row.dtypes == REFERENCE_DTYPES else _brief(row.dtypes)
            for row in IMPLEMENTATIONS
        ],
        "head dimension": [
            f"to {row.max_headdim}" if row.max_headdim else "any" for row in IMPLEMENTATIONS
        ],
        "gradients": [yes[row.backward is not None] for row in IMPLEMENTATIONS],
        "`deterministic=True`": [
            yes[row.deterministic or row.obeys_deterministic] for row in IMPLEMENTATIONS
        ],
    }
    for feature, words in FEATURES.items():
        lines[words] = [yes[feature in row.features] for row in IMPLEMENTATIONS]
    head = ["", *(f"`{row.name}`" for row in IMPLEMENTATIONS)]
    table = [head, ["---"] * len(head), *([name, *cells] for name, cells in lines.items())]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in table)


def _brief(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(
        _name(dtype).replace("bfloat", "bf").replace("float", "fp") for dtype in dtypes
    )


def check_backward(row: Implementation) -> None:
    """Raises NotImplementedError if gradients are wanted of a row that has none."""
    if row.backward is None:
        raise NotImplementedError(
            f"{row.name} has no backward; call it under torch.no_grad() or choose another of "
            f"{', '.join(implementations())}."
        )


@lru_cache(maxsize=4096)
def resolve(name: str, spec: AttentionSpec, target: Target) -> Implementation:
    """The row that runs `spec` on `target`: the named one, or for "auto" the first that can.

    Raises:
        ValueError: no row is called `name`.
        NotImplementedError: the row cannot run the call; the message is its reason.
    """
    if name != "auto":
        row = get(name)
        reason = row.supports(spec, target)
        if reason is not None:
            raise NotImplementedError(reason)
        return row
    reasons = []
    for row in IMPLEMENTATIONS:
        if not row.auto:
            continue
        # On a GPU a quadratic stand-in would be a silent fallback; there "auto" means a kernel.
        if not row.needs_kernels and target.kind in ("cuda", "hip"):
            continue
        reason = row.supports(spec, target)
        if reason is None:
            if row.pays is None or _load(row.pays)(spec, target):
                return row
            continue
        reasons.append(reason)
    raise NotImplementedError(" ".join(reasons))


@lru_cache(maxsize=64)
def _installed(package: str) -> bool:
    parent = package.rpartition(".")[0]
    return (not parent or _installed(parent)) and importlib.util.find_spec(package) is not None


@lru_cache(maxsize=1)
def _triton_version() -> tuple[int, int]:
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


@lru_cache(maxsize=64)
def _load(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(_name(dtype) for dtype in dtypes)
