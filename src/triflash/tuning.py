"""Tile sizes, warps and stages: pure functions of spec and target, a reason beside each number.

"Measured" means on an H200, bf16, 16384 tokens, hidden 2048: docs/perf-log.md has the tables. Other
GPUs get sizes that fit their shared memory and registers, compiled but not timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from triflash.spec import AttentionSpec
from triflash.target import Target


@dataclass(frozen=True)
class TileConfig:
    """How one kernel runs: BLOCK_M queries by BLOCK_N keys a step, and Triton's options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_d(headdim: int) -> int:
    """The tile width for a head dimension: a power of two, and at least tl.dot's minimum of 16."""
    return max(16, 1 << (headdim - 1).bit_length())


def dot_precision(spec: AttentionSpec) -> str:
    """tl.dot's input_precision; it only matters for float32, where tf32 keeps 10 mantissa bits."""
    return "tf32" if spec.allow_tf32 else "ieee"


def tma_pays(spec: AttentionSpec, target: Target) -> bool:
    """Whether to load by TMA.

    It makes every v2 kernel 5-30% faster on Hopper (measured), but building three descriptors costs
    the host 32 us a call (measured), which a problem of less than about 100 us would not hide.
    """
    flops = 4 * spec.batch * spec.nheads * spec.seqlen_q * spec.seqlen_k * spec.headdim
    return (
        target.sm == 90
        and not target.interpreter
        and spec.dtype != torch.float32
        and flops * (0.5 if spec.causal else 1.0) > 4e10
    )


def v2_forward(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
    d = _widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if spec.dtype == torch.float32:
        return _float32(d)
    if use_tma:
        if d <= 64:
            return TileConfig(64, 128, 4, 2)
        if d <= 128:
            return TileConfig(64, 64, 4, 3)
        return TileConfig(128, 64, 8, 2)
    if target.kind == "hip":
        return TileConfig(128 if d <= 128 else 64, 32 if d > 64 else 64, 4, 1)
    if d <= 64:
        return TileConfig(64, 64, 4, 3)
    if d <= 128:
        return TileConfig(64, 64, 4, 2)
    return TileConfig(64, 32, 8 , 2)


def v2_delta(spec: AttentionSpec, target: Target) -> TileConfig:
    return TileConfig(16, 1, 4, 1)


def v2_dkdv(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
    d = _widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if spec.dtype == torch.float32:
        return _float32(d)
    if use_tma:
        if d <= 64:
            return TileConfig(128, 64, 4, 2)
        if d <= 128:
            return TileConfig(64, 64, 4, 2)
        return TileConfig(32, 64, 8, 2)
    if d <= 64:
        return TileConfig(64, 64, 4, 2)
    if d <= 128:
        return TileConfig(32, 64, 4, 2)
    return TileConfig(32, 32, 4, 1)


def v2_dq(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
    d = _widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if spec.dtype == torch.float32:
        return _float32(d)
    if use_tma:
        if d <= 64:
            return TileConfig(64, 64, 4, 2)
        if d <= 128:
            return TileConfig(64, 64, 4, 2)
        return TileConfig(64, 32, 8, 2)
    if d <= 64:
        return TileConfig(64, 64, 4, 2)
    if d <= 128:
        return TileConfig(64, 32, 4, 2)
    return TileConfig(32, 32, 4, 1)


# Small tiles, so that short tests still cross several blocks.
_INTERPRETER = TileConfig(32, 32, 4, 1)


def _widest(spec: AttentionSpec) -> int:
    return max(block_d(spec.headdim), block_d(spec.headdim_v))


def _float32(d: int) -> TileConfig:
    # True float32 has no tensor cores: products unroll into FMAs, so tiles stay small.
    return TileConfig(32, 32, 4, 1)
