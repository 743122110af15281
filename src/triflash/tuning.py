"""Tile sizes, warps and stages: pure functions of spec and target, a reason beside each number."""

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
    use_tma: bool = False


def block_d(headdim: int) -> int:
    """The tile width for a head dimension: a power of two, and at least tl.dot's minimum of 16."""
    return max(16, 1 << (headdim - 1).bit_length())


def dot_precision(spec: AttentionSpec) -> str:
    """tl.dot's input_precision; it only matters for float32, where tf32 keeps 10 mantissa bits."""
    return "tf32" if spec.allow_tf32 else "ieee"


def v2_forward(spec: AttentionSpec, target: Target) -> TileConfig:
    d = max(block_d(spec.headdim), block_d(spec.headdim_v))
    if target.interpreter:
        return TileConfig(32, 32, 4, 1)
    if spec.dtype == torch.float32:
        return TileConfig(64, 32, 4, 1) if d <= 64 else TileConfig(32, 32, 4, 1)
    if target.sm == 90 :
        return TileConfig(128, 64, 4 if d <= 128 else 8, 2, True)
    return TileConfig(128, 64, 8, 2) if d<=128 else TileConfig(64, 32, 8, 2)


def v2_delta(spec: AttentionSpec, target: Target) -> TileConfig:
    return TileConfig(64, 1, 4, 1)


def v2_dkdv(spec: AttentionSpec, target: Target) -> TileConfig:
    d = max(block_d(spec.headdim), block_d(spec.headdim_v))
    if target.interpreter:
        return TileConfig(32, 32, 4, 1)
    if spec.dtype == torch.float32:
        return TileConfig(32, 32, 4, 1)
    if target.sm == 90 :
        return TileConfig(64, 128, 8, 2, True)
    return TileConfig(32, 64, 4, 2)


def v2_dq(spec: AttentionSpec, target: Target) -> TileConfig:
    d = max(block_d(spec.headdim), block_d(spec.headdim_v))
    if target.interpreter:
        return TileConfig(32, 32, 4, 1)
    if spec.dtype == torch.float32:
        return TileConfig(32, 32, 4, 1)
    if target.sm == 90 :
        return TileConfig(128, 64, 8, 2, True)
    return TileConfig(64, 32, 4, 2)
