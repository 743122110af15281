"""FlashAttention backward (arXiv:2205.14135, Algorithm 4), in two passes instead of one.

What it keeps of the paper, and v2 changes: p = exp(s - m) / l is recomputed from both statistics,
D = rowsum(dout * out) is recomputed wherever it is needed, which reads out as often as dout, and
scores lie as the paper has them, queries by keys, so that p and ds are turned around on chip for dv
and dk. What it does not keep: there one pass over blocks of keys also adds to dq in memory, which
races unless one program owns a head. Here a second kernel owns a block of queries and makes dq, so
the result is bitwise the same in every run, for 7 matrix products instead of 5.

FLOPs: 14 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: q, out and dout
once for each block of keys; k and v once for each block of queries; dq, dk and dv once.
No workspace.
Measured (H200, fp16, docs/perf-log.md): 1.3 to 1.4 times v2's time at 512 and 1024, 1.7 to 1.8 at
2048 and 4096, where v2 uses TMA.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from triflash import tuning
from triflash.kernels.common.launch import Launch, aligned, strides_of
from triflash.kernels.common.mask import key_range, query_range, visible
from triflash.kernels.common.tiles import load_tile, store_tile
from triflash.kernels.v1.softmax import load_statistics
from triflash.spec import AttentionSpec
from triflash.target import Target, target_of


@triton.jit
def row_dot(out, dout, dLse, row, offs_m, exist, HAS_DLSE: tl.constexpr):
    """D = rowsum(dout * out), [BLOCK_M]. lse's own gradient joins it with the opposite sign."""
    d = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:  # d lse / d scores = p
        d -= tl.load(dLse + row + offs_m, mask=exist, other=0.0)
    return d


@triton.jit(do_not_specialize=["nheads_k", "seqlen_q", "seqlen_k"])
def dkdv_kernel(Q, K, V, Out, dOut, dLse, M, L, dK, dV, softmax_scale, stride_qb, stride_qs,
                stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_dkb,
                stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh, nheads_k, group_size,
                seqlen_q, seqlen_k, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, GQA: tl.constexpr,
                HAS_DLSE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program a block of keys of a key head: it walks the queries of all heads that share it.

    Keys past seqlen_k make rows that are not stored; queries past seqlen_q have p 0.
    """
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % tiles_n * BLOCK_N
    batch = pid // tiles_n // nheads_k
    head_k = pid // tiles_n % nheads_k
    offs_m = tl.arange(0, BLOCK_M)

    k = load_tile(K, batch, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k, HEADDIM,
                  BLOCK_N, BLOCK_D)  # fmt: skip
    v = load_tile(V, batch, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k, HEADDIM_V,
                  BLOCK_N, BLOCK_DV)  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start, _ = query_range(start_n, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    blocks = tl.cdiv(tl.maximum(seqlen_q - start, 0), BLOCK_M)
    for i in tl.range(0, group_size * blocks):  # one loop: two would hold more in registers
        head = head_k * group_size + (i // blocks if GQA else 0)
        start_m = start + (i % blocks if GQA else i) * BLOCK_M
        row = (batch.to(tl.int64) * nheads_k * group_size + head) * seqlen_q + start_m
        exist = offs_m < seqlen_q - start_m
        q = load_tile(Q, batch, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                      BLOCK_M, BLOCK_D)  # fmt: skip
        s = tl.dot(q, k.T, input_precision=PRECISION) * softmax_scale  # [BLOCK_M, BLOCK_N]
        if CAUSAL:
            q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
            k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL), s, float("-inf"))
        m_i, inverse_l = load_statistics(M, L, row, offs_m, exist)
        p = tl.exp(s - m_i[:, None]) * inverse_l[:, None]
        dout = load_tile(dOut, batch, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                         HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
        dv = tl.dot(p.to(dout.dtype).T, dout, dv, input_precision=PRECISION)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        out = load_tile(Out, batch, head, start_m, stride_ob, stride_os, stride_oh, seqlen_q,
                        HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
        ds = p * (dp - row_dot(out, dout, dLse, row, offs_m, exist, HAS_DLSE)[:, None])
        dk = tl.dot(ds.to(q.dtype).T, q, dk, input_precision=PRECISION)

    store_tile(dK, dk * softmax_scale, batch, head_k, start_n, stride_dkb, stride_dks, stride_dkh,
               seqlen_k, HEADDIM, BLOCK_N, BLOCK_D)  # fmt: skip
    store_tile(dV, dv, batch, head_k, start_n, stride_dvb, stride_dvs, stride_dvh, seqlen_k,
               HEADDIM_V, BLOCK_N, BLOCK_DV)  # fmt: skip


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "seqlen_k"])
def dq_kernel(Q, K, V, Out, dOut, dLse, M, L, dQ, softmax_scale, stride_qb, stride_qs, stride_qh,
              stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_ob,
              stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_dqb, stride_dqs,
              stride_dqh, nheads, group_size, seqlen_q, seqlen_k, HEADDIM: tl.constexpr,
              HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
              CHECK_KEYS: tl.constexpr, HAS_DLSE: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """One program a block of queries, as in the forward."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    batch = pid // tiles_m // nheads
    head = pid // tiles_m % nheads
    head_k = head // group_size
    start_m = pid % tiles_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    row = (batch.to(tl.int64) * nheads + head) * seqlen_q + start_m
    exist = offs_m < seqlen_q - start_m

    q = load_tile(Q, batch, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                  BLOCK_M, BLOCK_D)  # fmt: skip
    out = load_tile(Out, batch, head, start_m, stride_ob, stride_os, stride_oh, seqlen_q,
                    HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
    dout = load_tile(dOut, batch, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                     HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
    d = row_dot(out, dout, dLse, row, offs_m, exist, HAS_DLSE)
    m_i, inverse_l = load_statistics(M, L, row, offs_m, exist)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    _, end = key_range(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    for start_n in tl.range(0, end, BLOCK_N):
        k = load_tile(K, batch, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k,
                      HEADDIM, BLOCK_N, BLOCK_D)  # fmt: skip
        s = tl.dot(q, k.T, input_precision=PRECISION) * softmax_scale  # [BLOCK_M, BLOCK_N]
        if CAUSAL or CHECK_KEYS:
            q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
            k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL), s, float("-inf"))
        p = tl.exp(s - m_i[:, None]) * inverse_l[:, None]
        v = load_tile(V, batch, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k,
                      HEADDIM_V, BLOCK_N, BLOCK_DV)  # fmt: skip
        dp = tl.dot(dout, v.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - d[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
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

    saved is [m, l] of the forward, lse is not used. dout needs a contiguous last dimension; out,
    dlse, m and l are contiguous.
    """
    m, l_i = saved
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    launch_dkdv, launch_dq = _prepare(
        spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(), dout.stride(),
        aligned(q, k, v, dout, out, m, l_i), dlse is not None and aligned(dlse),
    )  # fmt: skip
    inputs = (q, k, v, out, dout, m if dlse is None else dlse, m, l_i)
    if dk.numel():
        launch_dkdv(*inputs, dk, dv)
    if dq.numel():
        launch_dq(*inputs, dq)
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
) -> tuple[Launch, Launch]:
    strides = (
        *stride_q[:3], *stride_k[:3], *stride_v[:3],
        *strides_of(spec.seqlen_q, spec.nheads, spec.headdim_v), *stride_dout[:3],
    )  # fmt: skip
    lengths = (spec.group_size, spec.seqlen_q, spec.seqlen_k)
    blocks = (tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v), spec.causal)
    has_dlse = aligned_dlse is not False
    precision = tuning.dot_precision(spec, target)

    config = tuning.v1_dkdv(spec, target)
    dkdv = Launch(
        dkdv_kernel,
        triton.cdiv(spec.seqlen_k, config.block_n) * spec.nheads_k * spec.batch,
        (spec.softmax_scale, *strides, *strides_of(spec.seqlen_k, spec.nheads_k, spec.headdim),
         *strides_of(spec.seqlen_k, spec.nheads_k, spec.headdim_v), spec.nheads_k, *lengths),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n, *blocks,
         spec.group_size > 1, has_dlse, precision),
        config,
    )  # fmt: skip

    config = tuning.v1_dq(spec, target)
    dq = Launch(
        dq_kernel,
        triton.cdiv(spec.seqlen_q, config.block_m) * spec.nheads * spec.batch,
        (spec.softmax_scale, *strides, *strides_of(spec.seqlen_q, spec.nheads, spec.headdim),
         spec.nheads, *lengths),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n, *blocks,
         spec.seqlen_k % config.block_n != 0, has_dlse, precision),
        config,
    )  # fmt: skip
    return dkdv, dq
