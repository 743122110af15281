"""FlashAttention-2 backward (arXiv:2307.08691, Algorithm 2) in one pass, dq by atomic adds.

What it changes against v2: the program that owns a block of keys, and walks the queries for dk and
dv, also has ds, and so adds ds @ k to dq right away. Scores and dp are computed once: 5 matrix
products instead of 7. But programs with other keys add to the same rows of dq, so these live in
memory, in float32, and are added to atomically; the order of the additions, and with it the last
bits of dq, differ from run to run. dk and dv do not.

FLOPs: 10 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: as v2's first
pass; dq's block is added to once for each block of keys, 4 * headdim bytes a row, in L2.
Workspace: delta, float32 `(batch, nheads, seqlen_q)`, and dq's sums, float32 and of dq's size.
Never to be run by an autotuner that repeats it without zeroing dq.
Measured (H200, bf16, docs/perf-log.md): 1.1 to 1.3 times the time of v2's backward at d64, 1.4 to
1.6 at d128, at every length from 256 to 16384: the additions cost more than two products. From run
to run dq differs by at most one rounding, in 0.1 to 0.3% of its elements in fp16.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from triflash import tuning
from triflash.kernels.common.launch import (
    Launch,
    aligned,
    strides_of,
    tile_descriptor,
    tma_can_read,
)
from triflash.kernels.common.mask import query_range, visible
from triflash.kernels.common.softmax import LOG2_E, lse_to_log2
from triflash.kernels.common.tiles import load_tile, store_tile
from triflash.spec import AttentionSpec
from triflash.target import Target, target_of


@triton.jit
def add_rows(X, tile, rows, HEADDIM: tl.constexpr, ROWS: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """Add the first `rows` rows of [ROWS, BLOCK_D] to contiguous rows of float32 at X, atomically
    for each element."""
    offs_r = tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    exist = (offs_r < rows) & (offs_d < HEADDIM)
    # Only the sums matter, not what else is visible when: no fences.
    tl.atomic_add(X + offs_r * HEADDIM + offs_d, tile, mask=exist, sem="relaxed")


@triton.jit(do_not_specialize=["nheads", "seqlen_q"])
def delta_kernel(Out, dOut, dLse, Delta, stride_ob, stride_os, stride_oh, stride_gb, stride_gs,
                 stride_gh, nheads, seqlen_q, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr):  # fmt: skip
    """delta = rowsum(out * dout) - dlse, one program a block of queries."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    batch = pid // tiles_m // nheads
    head = pid // tiles_m % nheads
    start_m = pid % tiles_m * BLOCK_M
    out = load_tile(Out, batch, head, start_m, stride_ob, stride_os, stride_oh, seqlen_q,
                    HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
    dout = load_tile(dOut, batch, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                     HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = (batch.to(tl.int64) * nheads + head) * seqlen_q
    if HAS_DLSE:  # d lse / d scores = p, so dlse joins delta with the opposite sign
        delta -= tl.load(dLse + row + offs_m, mask=offs_m < seqlen_q, other=0.0)
    tl.store(Delta + row + offs_m, delta, mask=offs_m < seqlen_q)


@triton.jit(do_not_specialize=["nheads_k", "seqlen_q", "seqlen_k"])
def backward_kernel(Q, K, V, dOut, Lse, Delta, dQ, dK, dV, softmax_scale, stride_qb, stride_qs,
                    stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                    stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh,
                    stride_dvb, stride_dvs, stride_dvh, nheads_k, group_size, seqlen_q, seqlen_k,
                    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
                    GQA: tl.constexpr, CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
                    USE_TMA: tl.constexpr):  # fmt: skip
    """One program a block of keys of a key head: it walks the queries of all heads that share it.

    Scores are computed transposed, so that p and ds are left operands of two products that they
    enter. Queries past seqlen_q have lse +inf, so p 0. Keys past seqlen_k are masked for dq's sake:
    far below the others, their p would be infinite, and infinity times their zeros NaN. dQ is
    unscaled, and `(batch, nheads, seqlen_q, headdim)`: rows a constant apart leave most of their
    pointers' arithmetic, and registers, to the compiler.
    """
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % tiles_n * BLOCK_N
    batch = pid // tiles_n // nheads_k
    head_k = pid // tiles_n % nheads_k
    offs_m = tl.arange(0, BLOCK_M)
    scale_log2 = softmax_scale * LOG2_E

    k = load_tile(K, batch, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k, HEADDIM,
                  BLOCK_N, BLOCK_D, True, USE_TMA)  # fmt: skip
    v = load_tile(V, batch, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k, HEADDIM_V,
                  BLOCK_N, BLOCK_DV, True, USE_TMA)  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start, full = query_range(start_n, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    if CHECK_KEYS:
        if start_n + BLOCK_N > seqlen_k:
            full = seqlen_q
    blocks = tl.cdiv(tl.maximum(seqlen_q - start, 0), BLOCK_M)
    for i in tl.range(0, group_size * blocks):  # one loop, so that head follows head without a gap
        head = head_k * group_size + (i // blocks if GQA else 0)
        start_m = start + (i % blocks if GQA else i) * BLOCK_M
        row = (batch.to(tl.int64) * nheads_k * group_size + head) * seqlen_q + start_m
        exist = offs_m < seqlen_q - start_m
        q = load_tile(Q, batch, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                      BLOCK_M, BLOCK_D, True, USE_TMA)  # fmt: skip
        lse = tl.load(Lse + row + offs_m, mask=exist, other=float("inf"))
        s_t = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        s_t = s_t * scale_log2 - lse_to_log2(lse)[None, :]
        p_t = tl.exp2(s_t)
        if CAUSAL or CHECK_KEYS:
            if start_m < full:  # only tiles on the edge of the mask pay for it
                q_idx = start_m + tl.arange(0, BLOCK_M)[None, :]
                k_idx = start_n + tl.arange(0, BLOCK_N)[:, None]
                seen = visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL, KEYS_ARE_ROWS=True)
                p_t = tl.exp2(tl.where(seen, s_t, float("-inf")))
        dout = load_tile(dOut, batch, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                         HEADDIM_V, BLOCK_M, BLOCK_DV, True, USE_TMA)  # fmt: skip
        dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp_t = tl.dot(v, dout.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        delta = tl.load(Delta + row + offs_m, mask=exist, other=0.0)
        ds_t = (p_t * (dp_t - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds_t, q, dk, input_precision=PRECISION)
        dq = tl.dot(ds_t.T, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        add_rows(dQ + row * HEADDIM, dq, seqlen_q - start_m, HEADDIM, BLOCK_M, BLOCK_D)

    store_tile(dK, dk * softmax_scale, batch, head_k, start_n, stride_dkb, stride_dks, stride_dkh,
               seqlen_k, HEADDIM, BLOCK_N, BLOCK_D)  # fmt: skip
    store_tile(dV, dv, batch, head_k, start_n, stride_dvb, stride_dvs, stride_dvh, seqlen_k,
               HEADDIM_V, BLOCK_N, BLOCK_DV)  # fmt: skip


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    saved: list[torch.Tensor],
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, contiguous, in the shapes and dtype of q, k, v; dlse has lse's shape or is None.

    dout needs a contiguous last dimension; out, lse and dlse are contiguous.
    """
    dk, dv = (t.new_empty(t.shape) for t in (k, v))
    # Zeroed in every call: the kernel only adds.
    sums = q.new_zeros((spec.batch, spec.nheads, spec.seqlen_q, spec.headdim), dtype=torch.float32)
    delta = torch.empty_like(lse)
    target = target_of(q.device)
    use_tma = tuning.tma_pays(spec, target) and tma_can_read(q, k, v, dout)
    launch_delta, launch_backward = _prepare(
        spec, target, q.device, q.stride(), k.stride(), v.stride(), dout.stride(),
        aligned(q, k, v, dout, out, lse), dlse is not None and aligned(dlse), use_tma,
    )  # fmt: skip
    if lse.numel():
        launch_delta(out, dout, lse if dlse is None else dlse, delta)
    if dk.numel():
        inputs: tuple[object, ...] = (q, k, v, dout)
        if use_tma:
            m, n = launch_backward.config.block_m, launch_backward.config.block_n
            inputs = tuple(
                tile_descriptor(x, rows, tuning.block_d(x.shape[-1]))
                for x, rows in ((q, m), (k, n), (v, n), (dout, m))
            )
        launch_backward(*inputs, lse, delta, sums, dk, dv)
    dq = q.new_empty(q.shape)
    torch.mul(sums.transpose(1, 2), spec.softmax_scale, out=dq)  # rounded once, here
    return dq, dk, dv


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: torch.device,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
    stride_dout: tuple[int, ...],
    aligned_inputs: tuple[bool, ...],
    aligned_dlse: tuple[bool, ...] | bool,
    use_tma: bool,
) -> tuple[Launch, Launch]:
    block_d, block_dv = tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v)

    config = tuning.v2_delta(spec, target)
    delta = Launch(
        delta_kernel,
        triton.cdiv(spec.seqlen_q, config.block_m) * spec.nheads * spec.batch,
        (*strides_of(spec.seqlen_q, spec.nheads, spec.headdim_v), *stride_dout[:3], spec.nheads,
         spec.seqlen_q),
        (spec.headdim_v, config.block_m, block_dv, aligned_dlse is not False),
        config,
    )  # fmt: skip

    config = tuning.v2_atomic(spec, target, use_tma)
    backward = Launch(
        backward_kernel,
        triton.cdiv(spec.seqlen_k, config.block_n) * spec.nheads_k * spec.batch,
        (spec.softmax_scale, *stride_q[:3], *stride_k[:3], *stride_v[:3], *stride_dout[:3],
         *strides_of(spec.seqlen_k, spec.nheads_k, spec.headdim),
         *strides_of(spec.seqlen_k, spec.nheads_k, spec.headdim_v), spec.nheads_k, spec.group_size,
         spec.seqlen_q, spec.seqlen_k),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n, block_d, block_dv,
         spec.causal, spec.group_size > 1, spec.seqlen_k % config.block_n != 0,
         tuning.dot_precision(spec, target), use_tma),
        config,
    )  # fmt: skip
    return delta, backward
