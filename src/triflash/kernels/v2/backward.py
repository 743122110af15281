"""FlashAttention-2 backward (arXiv:2307.08691, section 3.1.2 and Algorithm 2), in two passes.

A pre-pass makes delta = rowsum(out * dout) - dlse. Then one kernel owns a block of keys and walks
the queries for dk and dv, and another owns a block of queries and walks the keys for dq. Nothing is
added by two programs, so the result is bitwise the same in every run; the price is that scores and
dp are computed twice: 7 matrix products where a single pass with atomic adds needs 5.

FLOPs: 14 * seqlen_q * seqlen_k * headdim a head, half of that when causal (2.5 times the forward is
what benchmarks count: 10). Workspace: delta, float32 `(batch, nheads, seqlen_q)`.
"""

import torch
import triton
import triton.language as tl

from triflash import tuning
from triflash.kernels.common.launch import launch, tile_descriptor, tma_can_read
from triflash.kernels.common.mask import key_range, query_range, visible
from triflash.kernels.common.softmax import LOG2_E, lse_to_log2
from triflash.kernels.v2.tiles import load_tile, store_tile
from triflash.spec import AttentionSpec
from triflash.target import target_of


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
                    HEADDIM_V, BLOCK_M, BLOCK_DV, True, False)  # fmt: skip
    dout = load_tile(dOut, batch, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                     HEADDIM_V, BLOCK_M, BLOCK_DV, True, False)  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = (batch.to(tl.int64) * nheads + head) * seqlen_q
    if HAS_DLSE:  # d lse / d scores = p, so dlse joins delta with the opposite sign
        delta -= tl.load(dLse + row + offs_m, mask=offs_m < seqlen_q, other=0.0)
    tl.store(Delta + row + offs_m, delta, mask=offs_m < seqlen_q)


@triton.jit
def _walk_queries(dk, dv, k, v, Q, dOut, lse_row, delta_row, stride_qb, stride_qs, stride_qh,
                  stride_gb, stride_gs, stride_gh, scale_log2, batch, head, start_n, seqlen_q,
                  seqlen_k, first, last, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
                  USE_TMA: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add the queries [first, last) to dk [BLOCK_N, BLOCK_D] and dv [BLOCK_N, BLOCK_DV].

    Scores are computed transposed, so that p and ds are left operands of the products they enter.
    Rows past seqlen_q have lse +inf, which makes their p zero.
    """
    for start_m in tl.range(first, last, BLOCK_M):
        q = load_tile(Q, batch, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                      BLOCK_M, BLOCK_D, True, USE_TMA)  # fmt: skip
        q_idx = start_m + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_row + q_idx, mask=q_idx < seqlen_q, other=float("inf"))
        s_t = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        p_t = tl.exp2(s_t * scale_log2 - lse_to_log2(lse)[None, :])
        if MASKED:
            k_idx = start_n + tl.arange(0, BLOCK_N)
            seen = visible(q_idx[None, :], k_idx[:, None], seqlen_q, seqlen_k, CAUSAL)
            p_t = tl.where(seen, p_t, 0.0)
        dout = load_tile(dOut, batch, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                         HEADDIM_V, BLOCK_M, BLOCK_DV, True, USE_TMA)  # fmt: skip
        dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp_t = tl.dot(v, dout.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        delta = tl.load(delta_row + q_idx, mask=q_idx < seqlen_q, other=0.0)
        ds_t = p_t * (dp_t - delta[None, :])
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["nheads_k", "seqlen_q", "seqlen_k"])
def dkdv_kernel(Q, K, V, dOut, Lse, Delta, dK, dV, softmax_scale, stride_qb, stride_qs, stride_qh,
                stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_gb,
                stride_gs, stride_gh, stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs,
                stride_dvh, nheads_k, group_size, seqlen_q, seqlen_k, HEADDIM: tl.constexpr,
                HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
                PRECISION: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """One program a block of keys and a key head: it walks all query heads that share it."""
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    # When causal the first keys are seen by the most queries, so the longest programs come first.
    start_n = pid % tiles_n * BLOCK_N
    batch = pid // tiles_n // nheads_k
    head_k = pid // tiles_n % nheads_k

    k = load_tile(K, batch, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k, HEADDIM,
                  BLOCK_N, BLOCK_D, True, USE_TMA)  # fmt: skip
    v = load_tile(V, batch, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k, HEADDIM_V,
                  BLOCK_N, BLOCK_DV, True, USE_TMA)  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start, full = query_range(start_n, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    for g in range(group_size):
        head = head_k * group_size + g
        row = (batch.to(tl.int64) * nheads_k * group_size + head) * seqlen_q
        for MASKED in tl.static_range(1 if CAUSAL else 0, -1, -1):
            first = start if MASKED else full
            last = full if MASKED else seqlen_q
            dk, dv = _walk_queries(
                dk, dv, k, v, Q, dOut, Lse + row, Delta + row, stride_qb, stride_qs, stride_qh,
                stride_gb, stride_gs, stride_gh, softmax_scale * LOG2_E, batch, head, start_n,
                seqlen_q, seqlen_k, first, last, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, BLOCK_D,
                BLOCK_DV, CAUSAL, PRECISION, USE_TMA, MASKED)  # fmt: skip

    store_tile(dK, dk * softmax_scale, batch, head_k, start_n, stride_dkb, stride_dks, stride_dkh,
               seqlen_k, HEADDIM, BLOCK_N, BLOCK_D)  # fmt: skip
    store_tile(dV, dv, batch, head_k, start_n, stride_dvb, stride_dvs, stride_dvh, seqlen_k,
               HEADDIM_V, BLOCK_N, BLOCK_DV)  # fmt: skip


@triton.jit
def _walk_keys(dq, q, dout, lse_log2, delta, K, V, stride_kb, stride_ks, stride_kh, stride_vb,
               stride_vs, stride_vh, scale_log2, batch, head_k, start_m, seqlen_q, seqlen_k, first,
               last, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               CAUSAL: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """Add the keys [first, last) to dq [BLOCK_M, BLOCK_D]."""
    for start_n in tl.range(first, last, BLOCK_N):
        k = load_tile(K, batch, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k,
                      HEADDIM, BLOCK_N, BLOCK_D, MASKED, USE_TMA)  # fmt: skip
        s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        if MASKED:
            q_idx = start_m + tl.arange(0, BLOCK_M)
            k_idx = start_n + tl.arange(0, BLOCK_N)
            seen = visible(q_idx[:, None], k_idx[None, :], seqlen_q, seqlen_k, CAUSAL)
            p = tl.where(seen, p, 0.0)
        v = load_tile(V, batch, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k,
                      HEADDIM_V, BLOCK_N, BLOCK_DV, MASKED, USE_TMA)  # fmt: skip
        dp = tl.dot(dout, v.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "seqlen_k"])
def dq_kernel(Q, K, V, dOut, Lse, Delta, dQ, softmax_scale, stride_qb, stride_qs, stride_qh,
              stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_gb,
              stride_gs, stride_gh, stride_dqb, stride_dqs, stride_dqh, nheads, group_size,
              seqlen_q, seqlen_k, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
              USE_TMA: tl.constexpr):  # fmt: skip
    """One program a block of queries, as in the forward."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    if CAUSAL:
        tile_m = tiles_m - 1 - tile_m  # the longest first
    batch = pid // tiles_m // nheads
    head = pid // tiles_m % nheads
    head_k = head // group_size
    start_m = tile_m * BLOCK_M

    q = load_tile(Q, batch, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                  BLOCK_M, BLOCK_D, True, USE_TMA)  # fmt: skip
    dout = load_tile(dOut, batch, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                     HEADDIM_V, BLOCK_M, BLOCK_DV, True, USE_TMA)  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = (batch.to(tl.int64) * nheads + head) * seqlen_q
    lse = tl.load(Lse + row + offs_m, mask=offs_m < seqlen_q, other=float("inf"))
    lse_log2 = lse_to_log2(lse)
    delta = tl.load(Delta + row + offs_m, mask=offs_m < seqlen_q, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full, end = key_range(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    for MASKED in tl.static_range(2):
        first = full if MASKED else 0
        last = end if MASKED else full
        dq = _walk_keys(
            dq, q, dout, lse_log2, delta, K, V, stride_kb, stride_ks, stride_kh, stride_vb,
            stride_vs, stride_vh, softmax_scale * LOG2_E, batch, head_k, start_m, seqlen_q,
            seqlen_k, first, last, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL,
            PRECISION, USE_TMA, MASKED)  # fmt: skip
    store_tile(dQ, dq * softmax_scale, batch, head, start_m, stride_dqb, stride_dqs, stride_dqh,
               seqlen_q, HEADDIM, BLOCK_M, BLOCK_D)  # fmt: skip


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

    dout needs a contiguous last dimension.
    """
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    target = target_of(q.device)
    block_d, block_dv = tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v)
    strides = [s for t in (q, k, v, dout) for s in t.stride()[:3]]
    flags = (spec.causal, tuning.dot_precision(spec))
    tma_fits = tma_can_read(q, k, v, dout)
    delta = torch.empty_like(lse)

    if lse.numel():
        config = tuning.v2_delta(spec, target)
        launch(
            delta_kernel,
            (triton.cdiv(spec.seqlen_q, config.block_m) * spec.nheads * spec.batch, 1, 1),
            (out, dout, lse if dlse is None else dlse, delta,
             *out.stride()[:3], *dout.stride()[:3], spec.nheads, spec.seqlen_q),
            (spec.headdim_v, config.block_m, block_dv, dlse is not None),
            config,
        )  # fmt: skip

    if dk.numel():
        config = tuning.v2_dkdv(spec, target)
        blocks = (config.block_m, config.block_n, block_d, block_dv)
        use_tma = config.use_tma and tma_fits
        operands = _operands(use_tma, q, k, v, dout, *blocks)
        launch(
            dkdv_kernel,
            (triton.cdiv(spec.seqlen_k, config.block_n) * spec.nheads_k * spec.batch, 1, 1),
            (*operands, lse, delta, dk, dv, spec.softmax_scale,
             *strides, *dk.stride()[:3], *dv.stride()[:3],
             spec.nheads_k, spec.group_size, spec.seqlen_q, spec.seqlen_k),
            (spec.headdim, spec.headdim_v, *blocks, *flags, use_tma),
            config,
        )  # fmt: skip

    if dq.numel():
        config = tuning.v2_dq(spec, target)
        blocks = (config.block_m, config.block_n, block_d, block_dv)
        use_tma = config.use_tma and tma_fits
        operands = _operands(use_tma, q, k, v, dout, *blocks)
        launch(
            dq_kernel,
            (triton.cdiv(spec.seqlen_q, config.block_m) * spec.nheads * spec.batch, 1, 1),
            (*operands, lse, delta, dq, spec.softmax_scale,
             *strides, *dq.stride()[:3],
             spec.nheads, spec.group_size, spec.seqlen_q, spec.seqlen_k),
            (spec.headdim, spec.headdim_v, *blocks, *flags, use_tma),
            config,
        )  # fmt: skip
    return dq, dk, dv


def _operands(
    use_tma: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    block_m: int,
    block_n: int,
    block_d: int,
    block_dv: int,
) -> tuple[object, ...]:
    """q, k, v and dout as the kernels take them: descriptors of their tiles, or the tensors."""
    if not use_tma:
        return q, k, v, dout
    return (
        tile_descriptor(q, block_m, block_d),
        tile_descriptor(k, block_n, block_d),
        tile_descriptor(v, block_n, block_dv),
        tile_descriptor(dout, block_m, block_dv),
    )
