"""Tile sizes, warps and stages: pure functions of spec and target, a reason beside each number.

"Measured" means TFLOP/s on an H200, bf16, 16384 tokens, hidden 2048, sequences of 4096 and 16384,
under sustained load: docs/perf-log.md has the story. Other GPUs get sizes that fit their shared
memory and registers, compiled but not timed. What v3 has instead of tiles is in tuning_v3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from math import gcd

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


def dot_precision(spec: AttentionSpec, target: Target) -> str:
    """tl.dot's input_precision; it only matters for float32, where tf32 keeps 10 mantissa bits."""
    allowed = spec.allow_tf32 and target.kind == "cuda"
    # Its tensor cores want 16 queries and keys at least: 128 KiB at head dimension 512.
    fits = widest(spec) <= 256 or _shared_kib(target) >= 163
    return "tf32" if allowed and fits else "ieee"


def tma_pays(spec: AttentionSpec, target: Target) -> bool:
    """Whether to load by TMA.

    It makes v2's kernels 2-25% faster on Hopper (measured), but building three descriptors costs
    the host about 30 us a call (measured), which a problem of less than about 100 us cannot hide.
    """
    return (
        target.sm == 90
        and not target.interpreter
        and spec.dtype != torch.float32
        and flops(spec) > 4e10
    )


def _within_blocks(
    tiles: Callable[[AttentionSpec, Target, bool], TileConfig],
) -> Callable[[AttentionSpec, Target, bool], TileConfig]:
    """Tiles that divide the blocks of a block mask."""

    @wraps(tiles)
    def within(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
        config, blocks = tiles(spec, target, use_tma), spec.features.blocks
        if blocks is None:
            return config
        block_m, block_n = gcd(config.block_m, blocks.size_q), gcd(config.block_n, blocks.size_k)
        return replace(config, block_m=block_m, block_n=block_n)

    return within


@_within_blocks
def v2_forward(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
    """Tiles of the forward kernel."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if d > 256:
        return _above_256(_FORWARD_512, _FORWARD_512_FLOAT32, spec, target, use_tma)
    if loads_modifications(spec):
        return _with_loads(spec, target)
    if spec.dtype == torch.float32:
        beside = modifies(spec) or spec.features.sinks
        if beside and d <= 64 and dot_precision(spec, target) == "ieee":
            return TileConfig(32, 32 if spec.features.dropout_p else 64, 8, 2)  # more spills
        return _float32(_FLOAT32_FORWARD, spec, target)
    if target.kind == "hip":
        return TileConfig(64, 64 if d <= 64 else 32 if d <= 128 else 16, 4, 1)
    if not _vectorises(spec) and not use_tma:
        return TileConfig(64, 32, 4, 3) if d <= 128 else TileConfig(32, 32, 4, 1)
    if d <= 64:
        # Measured with TMA: 394-458 against 360-428 with 64 keys a step, whose softmax bookkeeping
        # (maximum, rescaling) comes twice as often. Without TMA three stages of 64 were fastest.
        # With block masks those spill; measured: 0.219 ms with 64 keys, 0.327 with 128 x 128.
        if use_tma and spec.features.blocks is None:
            return TileConfig(64, 128, 4, 2)
        return TileConfig(64, 64, 4, 3)
    if d <= 128:
        if use_tma:
            # Measured: causal 460-532 against 428-489 with 4 warps; full 521-538 against 453-473
            # with 8. Under the power limit large tiles, which move fewer bytes, beat the 64 x 64
            # that wins short bursts.
            # 4 warps have no registers left for windows and modifications.
            if spec.causal:
                return TileConfig(128, 128, 8, 3)
            return TileConfig(128, 64, 8 if in_the_loop(spec) else 4, 2)
        return TileConfig(64, 64, 4, 3 if _has_227_kib(target) else 2)
    if _has_227_kib(target):
        return TileConfig(128, 64, 8, 2)
    return TileConfig(64, 32, 8, 2 if target.sm == 80 else 1)


def v2_delta(spec: AttentionSpec, target: Target) -> TileConfig:
    """Rows a program of the pre-pass, which is bound by memory: 16 to 128 measured the same."""
    return TileConfig(16, 1, 4, 1)


@_within_blocks
def v2_dkdv(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
    """Tiles of the dk, dv kernel."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if d > 256:
        return _above_256(_DKDV_512, _DKDV_512_FLOAT32, spec, target, use_tma)
    if loads_modifications(spec):
        return _with_loads_backward(spec, target)
    if spec.dtype == torch.float32:
        return _float32(_FLOAT32_DKDV, spec, target)
    if target.kind == "hip":
        return TileConfig(32 if d <= 128 else 16, 64 if d <= 64 else 32, 4, 1)
    if not _vectorises(spec) and d > 64:
        return TileConfig(32, 32, 8, 2 if target.sm == 80 or _has_227_kib(target) else 1)
    if use_tma:
        if d <= 64:
            # Measured: 438-501; every other size stayed under 320. Modified scores would spill.
            # Block masks do: 0.770 ms against 0.806 with 64 queries, 0.775 with 32.
            return TileConfig(64 if modifies(spec) else 128, 64, 4, 2)
        if d <= 128:
            # Measured: 462-553 against 405-512 with 128 keys and 8 warps: two small programs on a
            # multiprocessor hide each other's waiting. Masked head dimensions would spill there,
            # masks on both sides and modified scores too: softcap 6.46 ms against 6.92 with 64
            # queries at 8192. ALiBi does not: 4.52 ms against 4.87 with 32. Nor do block masks:
            # 1.195 ms against 1.288, and 2.97 with 8 warps for both kernels.
            roomy = _fills_tiles(spec) and not masks_both_sides(spec)
            mask = ("mask_mod", "block_mask")
            roomy = roomy and in_the_loop(spec) in ((), ("window",), ("alibi",), mask)
            return TileConfig(64 if roomy else 32, 64, 4, 2)
        # Measured: 64 x 64 gives 300 instead of 220 when full, but spills when causal.
        return TileConfig(32, 64, 8, 2)
    if d <= 64:
        return TileConfig(32, 64, 4, 3)  # 64 queries spill when pointers take registers too
    if d <= 128:
        return TileConfig(32, 64, 8 if modifies(spec) else 4, 2)
    return TileConfig(32, 32, 8, 2 if target.sm == 80 or _has_227_kib(target) else 1)


@_within_blocks
def v2_dq(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
    """Tiles of the dq kernel."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if d > 256:
        return _above_256(_DQ_512, _DQ_512_FLOAT32, spec, target, use_tma)
    if loads_modifications(spec):
        return _with_loads_backward(spec, target)
    if spec.dtype == torch.float32:
        return _float32(_FLOAT32_DQ, spec, target)
    if target.kind == "hip":
        return TileConfig(64 if d <= 64 else 32, 32 if d <= 128 else 16, 4, 1)
    if not _vectorises(spec) and not use_tma:
        return TileConfig(32, 32, 4, 1)
    if d <= 64:
        return TileConfig(64, 64, 4, 2)
    if d <= 128:
        if _has_227_kib(target):
            # Measured: causal 531-605 against 492-543 with 64 queries and 4 warps; full, those
            # are as fast (581-617) and take less shared memory.
            return TileConfig(128, 64, 8, 3) if spec.causal else TileConfig(64, 64, 4, 2)
        return TileConfig(64, 32, 4, 2)
    if _has_227_kib(target):
        return TileConfig(128, 32, 8, 2)
    return TileConfig(64, 32, 8, 1) if target.sm == 80 else TileConfig(32, 32, 4, 1)


def v1_forward(spec: AttentionSpec, target: Target) -> TileConfig:
    """Tiles of v1's forward kernel, which holds p @ v beside o: less room than v2 has."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if spec.dtype == torch.float32:
        return _float32(_V1_FLOAT32, spec, target, _V1_TF32)
    if target.kind == "hip":
        return TileConfig(64, 64 if d <= 64 else 32 if d <= 128 else 16, 4, 1)
    if not _vectorises(spec):
        return TileConfig(64, 32, 4, 2) if d <= 128 else TileConfig(32, 32, 4, 1)
    # Measured at 4096: fastest causal (268 at d64, 313 at d128), within 3% of the best when full.
    if d <= 64:
        return TileConfig(64, 64, 4, 3)
    if d <= 128:
        return TileConfig(64, 64, 4, 3) if _has_227_kib(target) else TileConfig(64, 32, 4, 2)
    return TileConfig(64, 32, 8, 2 if target.sm == 80 or _has_227_kib(target) else 1)


def v1_paper(spec: AttentionSpec, target: Target) -> TileConfig:
    """Tiles of v1's forward kernel in the paper's order; o comes and goes in every step."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if target.kind == "hip":  # one stage: Triton 3.6 fails to compile two in float32
        return TileConfig(32, 32 if d <= 128 else 16, 4, 1)
    if spec.dtype == torch.float32:
        return _float32(_V1_FLOAT32, spec, target, _V1_TF32)
    if not _vectorises(spec):
        return TileConfig(32, 64, 8, 1)
    if _has_227_kib(target) and d <= 128:
        # Measured at 4096: 100 full, 90 causal at d64 against 47 and 44 with 64 x 64; 48 and 44
        # at d128 against 22 with 128 x 32. More keys a step are fewer trips of o to memory.
        return TileConfig(128 if d <= 64 else 64, 128, 8, 1)
    if d <= 64:
        return TileConfig(64, 64, 4, 2)
    if d <= 128:
        return TileConfig(32, 32, 4, 1)
    return TileConfig(32, 64, 8, 1)


def v1_dkdv(spec: AttentionSpec, target: Target) -> TileConfig:
    """Tiles of v1's dk, dv kernel, which reads out as well."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if spec.dtype == torch.float32:
        return _float32(_V1_FLOAT32_DKDV, spec, target, _V1_TF32_DKDV)
    if target.kind == "hip":
        return TileConfig(32 if d <= 128 else 16, 64 if d <= 64 else 32, 4, 1)
    if not _vectorises(spec):
        return TileConfig(32, 64, 8, 1) if d <= 64 else TileConfig(32, 32, 4 if d <= 128 else 8, 1)
    if d <= 64:
        # Measured at 4096: 208 full, 181 causal; others at most 175 and 150.
        return TileConfig(64, 64, 4, 2) if _has_227_kib(target) else TileConfig(32, 64, 4, 2)
    if d <= 128:
        # Measured at 4096: 231 full, 177 causal; others at most 178 and 161. With 32 queries the
        # first product is no wgmma, and Triton 3.6 then overwrites tiles that another still reads.
        return TileConfig(64, 64, 4, 2) if _has_227_kib(target) else TileConfig(32, 64, 8, 2)
    return TileConfig(32, 64 if target.sm == 80 or _has_227_kib(target) else 32, 8, 1)


def v1_dq(spec: AttentionSpec, target: Target) -> TileConfig:
    """Tiles of v1's dq kernel. Measured at 4096: these and the next best are within 4%."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if spec.dtype == torch.float32:
        return _float32(_V1_FLOAT32, spec, target, _V1_TF32)
    if target.kind == "hip":
        return TileConfig(64 if d <= 64 else 32, 32 if d <= 128 else 16, 4, 1)
    if not _vectorises(spec):
        return TileConfig(32, 32, 4, 1)
    if d <= 64:
        return TileConfig(64, 64, 4, 2)
    if d <= 128:
        return TileConfig(128, 64, 8, 2) if _has_227_kib(target) else TileConfig(64, 32, 4, 2)
    if _has_227_kib(target):
        return TileConfig(128, 32, 8, 2)
    return TileConfig(64, 32, 8, 1) if target.sm == 80 else TileConfig(32, 32, 4, 1)


def v2_atomic(spec: AttentionSpec, target: Target, use_tma: bool) -> TileConfig:
    """Tiles of v2_atomic's one-pass backward."""
    d = widest(spec)
    if target.interpreter:
        return _INTERPRETER
    if spec.dtype == torch.float32:
        return _float32(_FLOAT32_DKDV, spec, target, _V2_ATOMIC_TF32)
    if target.kind == "hip":
        return TileConfig(32 if d <= 128 else 16, 64 if d <= 64 else 32, 4, 1)
    if use_tma:
        # Measured at 4096: 335 full, 270 causal at d64 against 244-256 and 225 with 128 keys;
        # 309 and 281 at d128 against 238 and 228 with 32 queries.
        if d <= 64:
            return TileConfig(128, 64, 4, 2)
        return TileConfig(64, 128, 8, 2) if d <= 128 else TileConfig(32, 32, 8, 2)
    if not _vectorises(spec) and d > 64:
        return TileConfig(32, 32, 8, 1)
    if d <= 64:
        large = _has_227_kib(target) and _vectorises(spec)
        return TileConfig(64 if large else 32, 64, 4, 2)
    if d <= 128:
        return TileConfig(32, 128 if _has_227_kib(target) else 64, 8, 2)
    return TileConfig(32, 32, 8, 2 if target.sm == 80 or _has_227_kib(target) else 1)


# Small tiles, so that short tests still cross several blocks.
_INTERPRETER = TileConfig(32, 32, 4, 1)


def flops(spec: AttentionSpec) -> float:
    """Of the forward; of packed sequences as if all had the same length."""
    scores = spec.batch * spec.seqlen_q * spec.seqlen_k
    if spec.varlen is not None:
        scores = spec.varlen.rows_q * spec.varlen.rows_k // max(1, spec.batch)
    full = 4 * spec.nheads * scores * spec.headdim
    return full * (0.5 if spec.causal else 1.0)


def widest(spec: AttentionSpec) -> int:
    """The wider of q's and v's tiles."""
    return max(block_d(spec.headdim), block_d(spec.headdim_v))


# Head dimensions above 256, by KiB of shared memory: tiles that fit and do not spill when causal.
# q, k, v and dout take 1 KiB a row and stage; acc of 64 queries, or dk and dv of 32 keys, half of
# all registers. "Measured" is at head dimension 512, 4096 long, full and causal.
_FORWARD_512: dict[str | int, TileConfig] = {
    # Measured: 240 and 241 against 202 and 236 with 32 keys a step and 2 stages.
    "TMA": TileConfig(64, 64, 8, 1),
    227: TileConfig(64, 32, 8, 2),
    163: TileConfig(64, 32, 8, 2),
    99: TileConfig(32, 32, 8, 1),
    64: TileConfig(32, 16, 4, 1),
}
_DKDV_512: dict[str | int, TileConfig] = {
    # Measured, of the whole backward: 94 and 98 against 83 and 85 with 32 queries and 2 stages,
    # 59 and 60 with 16. With 32 keys no product is a wgmma, but dk and dv of 64 have no room.
    "TMA": TileConfig(64, 32, 8, 1),
    227: TileConfig(32, 32, 8, 2),
    163: TileConfig(32, 16, 8, 1),
    99: TileConfig(16, 16, 8, 1),
    64: TileConfig(16, 16, 4, 1),
}
_DQ_512: dict[str | int, TileConfig] = {
    # Measured, of the whole backward: 67 and 68 against 59 and 60 with 32 queries and 2 stages.
    "TMA": TileConfig(64, 32, 8, 1),
    227: TileConfig(32, 32, 8, 2),
    163: TileConfig(32, 32, 8, 1),
    99: TileConfig(32, 16, 8, 1),
    64: TileConfig(16, 16, 4, 1),
}
# In float32 the backward spills about 2 KiB a thread in true float32, whatever the tile. Products
# sum over 16 rows at least, so with 99 KiB the other side is 8.
_FORWARD_512_FLOAT32: dict[str | int, TileConfig] = {
    227: TileConfig(16, 16, 8, 1),
    163: TileConfig(16, 16, 8, 1),
    99: TileConfig(16, 16, 8, 1),
    64: TileConfig(16, 16, 4, 1),
}
_DKDV_512_FLOAT32 = {**_FORWARD_512_FLOAT32, 99: TileConfig(16, 8, 8, 1)}
_DQ_512_FLOAT32 = {**_FORWARD_512_FLOAT32, 99: TileConfig(8, 16, 8, 1)}
# True float32 has no tensor cores: a product becomes FMAs on operands in registers, where it spills
# easily. These are the largest tiles that do not spill on sm_90; keys are the head dimension.
_FLOAT32_FORWARD = {
    64: TileConfig(64, 64, 8, 2),
    128: TileConfig(32, 16, 8, 2),
    256: TileConfig(32, 16, 8, 2),
}
_FLOAT32_DKDV = {
    64: TileConfig(32, 32, 8, 2),
    128: TileConfig(16, 32, 8, 2),
    256: TileConfig(16, 16, 8, 2),
}
_FLOAT32_DQ = {
    64: TileConfig(64, 32, 8, 2),
    128: TileConfig(32, 32, 8, 2),
    256: TileConfig(32, 16, 8, 2),
}
# tf32 runs on tensor cores, but its tiles are twice as wide in bytes as those of half precision.
_TF32 = {
    64: TileConfig(32, 32, 4, 1),
    128: TileConfig(32, 32, 8, 1),
    256: TileConfig(16, 16, 8, 1),
}
# v1 holds more beside its tiles: p @ v in the forward, out in the backward.
_V1_FLOAT32 = {
    64: TileConfig(32, 32, 8, 2),
    128: TileConfig(32, 16, 8, 2),
    256: TileConfig(32, 16, 8, 2),
}
_V1_FLOAT32_DKDV = {
    64: TileConfig(16, 32, 8, 1),
    128: TileConfig(16, 16, 8, 1),
    256: TileConfig(16, 16, 8, 1),
}
_V1_TF32 = {
    64: TileConfig(32, 32, 4, 1),
    128: TileConfig(16, 32, 8, 1),
    256: TileConfig(16, 16, 8, 1),
}
_V2_ATOMIC_TF32 = {**_TF32, 128: TileConfig(16, 32, 8, 1)}  # dq needs shared memory too
_V1_TF32_DKDV = {
    64: TileConfig(32, 32, 4, 1),
    128: TileConfig(32, 32, 8, 1),
    256: TileConfig(16, 16, 8, 2),
}


def _float32(
    table: dict[int, TileConfig],
    spec: AttentionSpec,
    target: Target,
    tf32: dict[int, TileConfig] = _TF32,
) -> TileConfig:
    if dot_precision(spec, target) == "tf32":
        table = tf32
    return next(config for width, config in table.items() if widest(spec) <= width)


def _above_256(
    half: dict[str | int, TileConfig],
    float32: dict[str | int, TileConfig],
    spec: AttentionSpec,
    target: Target,
    use_tma: bool,
) -> TileConfig:
    if use_tma:
        return half["TMA"]
    table = half if spec.dtype != torch.float32 else float32
    return table[64 if target.kind == "hip" else _shared_kib(target)]


def _shared_kib(target: Target) -> int:
    """Shared memory that a program may have on an NVIDIA GPU."""
    if _has_227_kib(target):
        return 227
    return 163 if target.sm in _HAS_163_KIB else 99


def _has_227_kib(target: Target) -> bool:
    """Data-centre GPUs from Hopper on have 227 KiB of shared memory a program; others 64 to 163."""
    return target.sm in (90, 100)


def _vectorises(spec: AttentionSpec) -> bool:
    """Whether Triton knows that rows start at 16 bytes; other pointer loads take more registers."""
    return spec.headdim % 16 == 0 and spec.headdim_v % 16 == 0


def loads_modifications(spec: AttentionSpec) -> bool:
    """Whether functions of users load from tensors; what they load for a tile, Triton may keep in
    shared memory, once for each stage. A block mask loads in few blocks, outside of the stages."""
    features = spec.features
    return any(
        any(isinstance(a, str) for a in mod.aux) and mod.key != "alibi"
        for mod in (features.mods if features.blocks is None else features.score_mods)
    )


def _with_loads(spec: AttentionSpec, target: Target) -> TileConfig:
    """A forward tile that leaves room for a float32 tile in each stage."""
    d = widest(spec)
    if spec.dtype == torch.float32:
        return TileConfig(32, 32 if d <= 64 else 16, 8, 1)
    if _has_227_kib(target) and d <= 128 and _vectorises(spec):
        # Measured at d128: documents 1.451 ms against 1.829 with 128 queries and 8 warps, a learned
        # bias 6.04 against 6.29.
        return TileConfig(64, 64, 4, 2)
    return TileConfig(32 if d > 128 else 64, 32, 4, 1)


def _with_loads_backward(spec: AttentionSpec, target: Target) -> TileConfig:
    """The same in the backward."""
    d = widest(spec)
    if spec.dtype == torch.float32:
        return TileConfig(16, 32 if d <= 64 else 16, 8, 1)
    if _has_227_kib(target) and d <= 128 and _vectorises(spec):
        # Measured at d128, though dkdv spills: documents 4.02 ms against 8.49 with 8 warps and 4.40
        # with 32 queries in dkdv, a learned bias 14.7 against 19.9 and 15.3.
        return TileConfig(64, 64, 4, 2)
    return TileConfig(32, 32, 8 if d > 64 else 4, 1)


def masks_both_sides(spec: AttentionSpec) -> bool:
    """Whether a window is checked on its left, and its right side is none of causal's."""
    return spec.features.window_left is not None and not spec.causal


def in_the_loop(spec: AttentionSpec) -> tuple[str, ...]:
    """The features that take registers in a kernel's loop; a sink comes behind it."""
    return tuple(feature for feature in spec.features.uses if feature != "sinks")


def modifies(spec: AttentionSpec) -> bool:
    """Whether scores are modified or weights dropped, which a kernel then holds beside others."""
    return bool(spec.features.score_mods) or spec.features.dropout_p > 0.0


def _fills_tiles(spec: AttentionSpec) -> bool:
    return spec.headdim == block_d(spec.headdim) and spec.headdim_v == block_d(spec.headdim_v)


@dataclass(frozen=True)
class CudaTileConfig(TileConfig):
    """How kernels/cuda/forward.cu runs; num_stages are tiles of K, and of V, in shared memory."""

    min_blocks: int
    q_in_registers: bool
    opt_level: int = 3  # of the assembler


def cuda_v1_forward(spec: AttentionSpec, target: Target, aligned: bool) -> CudaTileConfig:
    """Tiles of cuda_v1's forward kernel; `aligned` if rows are whole 16-byte vectors.

    A stage is enough: what waits for its tile leaves the tensor cores to the other block, or to
    warps that are elsewhere in the step. Measured: 2 stages change less than 2%.
    """
    d = max(spec.headdim, spec.headdim_v)
    large = target.sm in _HAS_163_KIB
    if not aligned:
        # Elements pass one by one through registers, of which a smaller tile leaves more.
        return CudaTileConfig(64, 32, 4, 1, 1, q_in_registers=d <= 64)
    # 32 rows a warp halve what it reads of k and v; two blocks a multiprocessor hide each other's
    # softmax and barriers.
    if d <= 32:
        return CudaTileConfig(128, 64, 4, 1, 2, q_in_registers=True)
    if d <= 64:
        # Measured at d64, full, 512 to 4096: 4-12% faster than 64 keys a step.
        return CudaTileConfig(128, 128, 4, 1, 2, q_in_registers=False)
    if d <= 96:
        return CudaTileConfig(128, 64, 4, 1, 2, q_in_registers=False)
    if d <= 128:
        # Above level 1 the assembler hoists more addresses than it has registers for. Without
        # 163 KiB 32 keys leave room for two blocks.
        block_n = 64 if large else 32
        return CudaTileConfig(128, block_n, 4, 1, 2, q_in_registers=False, opt_level=1)
    if d <= 192:
        # 32 rows a warp no longer fit the registers. Measured: 342 full, 312 causal with 128 keys,
        # 337 and 308 with 64, which fit 99 KiB.
        return CudaTileConfig(128, 128 if large else 64, 8, 1, 1, q_in_registers=not large)
    # Measured at level 1: 315 full, 299 causal against 301 and 276 with 128 queries.
    return CudaTileConfig(64, 64, 4, 1, 2, q_in_registers=False)


# 163 KiB of shared memory a block or more; other GPUs since sm_80 have 99.
_HAS_163_KIB = (80, 87, 90, 100, 103, 110)
