"""FlashAttention-2 backward (arXiv:2307.08691, section 3.1.2 and Algorithm 2), in two passes.

A pre-pass makes delta = rowsum(out * dout) - dlse. Then one kernel owns a block of keys and walks
the queries for dk and dv, and another owns a block of queries and walks the keys for dq. Nothing is
added by two programs, so the result is bitwise the same in every run; the price is that scores and
dp are computed twice: 7 matrix products where a single pass with atomic adds needs 5.

FLOPs: 14 * seqlen_q * seqlen_k * headdim a head, half of that when causal (2.5 times the forward is
what benchmarks count: 10). Workspace: delta, float32 `(batch, nheads, seqlen_q)`.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

from triflash import mods, tuning
from triflash.kernels.common.blocks import block_list, most_listed, visited
from triflash.kernels.common.dropout import kept, rescaling
from triflash.kernels.common.launch import (
    Launch,
    aligned,
    entry_strides,
    kinds,
    strides_of,
    tile_descriptor,
    tma_can_read,
)
from triflash.kernels.common.mask import key_begin, key_range, query_end, query_range, visible
from triflash.kernels.common.mods import derive, modify, shown
from triflash.kernels.common.softmax import LOG2_E, lse_to_log2
from triflash.kernels.common.tiles import load_tile, store_tile
from triflash.kernels.common.varlen import PACKED, lse_offset, sequence
from triflash.spec import NOT_PACKED, AttentionSpec, Sequences
from triflash.target import Target, target_of


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "total_q"],
            do_not_specialize_on_alignment=PACKED)  # fmt: skip
def delta_kernel(Out, dOut, dLse, Delta, CuSeqlensQ, SeqUsedQ, total_q, stride_ob, stride_os,
                 stride_oh, stride_gb, stride_gs, stride_gh, nheads, seqlen_q,
                 HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
                 HAS_DLSE: tl.constexpr):  # fmt: skip
    """delta = rowsum(out * dout) - dlse, one program a block of queries."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    batch = pid // tiles_m // nheads
    head = pid // tiles_m % nheads
    start_m = pid % tiles_m * BLOCK_M
    entry = batch
    if CuSeqlensQ is not None:
        entry, _, seqlen_q = sequence(CuSeqlensQ, SeqUsedQ, batch, total_q)
        if start_m >= seqlen_q:
            return
    out = load_tile(Out, entry, head, start_m, stride_ob, stride_os, stride_oh, seqlen_q,
                    HEADDIM_V, BLOCK_M, BLOCK_DV, True, False)  # fmt: skip
    dout = load_tile(dOut, entry, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                     HEADDIM_V, BLOCK_M, BLOCK_DV, True, False)  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = lse_offset(batch, head, entry, nheads, seqlen_q, total_q)
    if HAS_DLSE:  # d lse / d scores = p, so dlse joins delta with the opposite sign
        delta -= tl.load(dLse + row + offs_m, mask=offs_m < seqlen_q, other=0.0)
    tl.store(Delta + row + offs_m, delta, mask=offs_m < seqlen_q)


@triton.jit(
    do_not_specialize=[
        "nheads_k", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
        "BlockLists",
    ],
    do_not_specialize_on_alignment=PACKED,
)  # fmt: skip
def dkdv_kernel(Q, K, V, dOut, Lse, Delta, dK, dV, ScoreMods, MaskMod, BlockLists, Dropout,
                CuSeqlensQ, CuSeqlensK, SeqUsedQ, SeqUsedK, total_q, total_k, softmax_scale,
                stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb,
                stride_vs, stride_vh, stride_gb, stride_gs, stride_gh, stride_dkb, stride_dks,
                stride_dkh, stride_dvb, stride_dvs, stride_dvh, nheads_k, group_size, seqlen_q,
                seqlen_k, window_left, window_right, HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, GQA: tl.constexpr,
                CHECK_QUERIES: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
                SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr, INSIDE: tl.constexpr):  # fmt: skip
    """One program a block of keys of a key head: it walks the queries of all heads that share it.

    Scores are computed transposed, so that p and ds are left operands of the products they enter.
    Keys past seqlen_k make rows that are not stored; queries past seqlen_q have lse +inf, so p 0.
    """
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    # When causal the first keys are seen by the most queries, so the longest programs come first.
    start_n = pid % tiles_n * BLOCK_N
    batch = pid // tiles_n // nheads_k
    head_k = pid // tiles_n % nheads_k
    entry_q, entry_k, rows_k = batch, batch, seqlen_k
    if CuSeqlensQ is not None:
        entry_q, _, seqlen_q = sequence(CuSeqlensQ, SeqUsedQ, batch, total_q)
        entry_k, rows_k, seqlen_k = sequence(CuSeqlensK, SeqUsedK, batch, total_k)
        if start_n >= rows_k:
            return
    offs_m = tl.arange(0, BLOCK_M)
    scale_log2 = softmax_scale * LOG2_E

    k = load_tile(K, entry_k, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k, HEADDIM,
                  BLOCK_N, BLOCK_D, True, USE_TMA)  # fmt: skip
    v = load_tile(V, entry_k, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k, HEADDIM_V,
                  BLOCK_N, BLOCK_DV, True, USE_TMA)  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start, full = query_range(start_n, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL, window_right)
    end = seqlen_q
    if window_left is not None:
        full_to, end = query_end(start_n, seqlen_q, seqlen_k, window_left, BLOCK_M, BLOCK_N)
    span = tl.cdiv(tl.maximum(end - start, 0), BLOCK_M) * BLOCK_M
    if SeqUsedK is not None:
        span = tl.where(start_n < seqlen_k, span, 0)
    if BlockLists is not None:
        most = most_listed(BlockLists, batch, head_k * group_size, group_size, start_n // SIZE_K)
        start, span = 0, most * SIZE_Q
    # One loop over the heads of a group, so that one follows the other without a gap.
    for walked in tl.range(0, group_size * span, BLOCK_M):
        start_m, partial = start + (walked % span if GQA else walked), True
        head = head_k * group_size + (walked // span if GQA else 0)
        if BlockLists is not None:
            _, entries = block_list(BlockLists, batch, head, start_n // SIZE_K)
            start_m, partial, _asked = visited(entries, start_m, SIZE_Q)
        row = lse_offset(batch.to(tl.int64) * nheads_k, head, entry_q, group_size, seqlen_q,
                         total_q)  # fmt: skip
        q = load_tile(Q, entry_q, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q,
                      HEADDIM, BLOCK_M, BLOCK_D, CHECK_QUERIES, USE_TMA)  # fmt: skip
        in_rows = offs_m < seqlen_q - start_m
        lse = tl.load(Lse + row + start_m + offs_m, mask=in_rows, other=float("inf"))
        s_t = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        dout = load_tile(dOut, entry_q, head, start_m, stride_gb, stride_gs, stride_gh,
                         seqlen_q, HEADDIM_V, BLOCK_M, BLOCK_DV, CHECK_QUERIES,
                         USE_TMA)  # fmt: skip
        # As early as registers allow, so that the tensor cores work during the softmax.
        if BLOCK_M <= 64:
            dp_t = tl.dot(v, dout.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if ScoreMods is not None:
            q_idx = start_m + tl.arange(0, BLOCK_M)[None, :]
            k_idx = start_n + tl.arange(0, BLOCK_N)[:, None]
            score_t = s_t * softmax_scale
            s_t = modify(score_t, batch, head, q_idx, k_idx, seqlen_q, seqlen_k, ScoreMods,
                       INSIDE)  # fmt: skip
            s_t = s_t * LOG2_E - lse_to_log2(lse)[None, :]
        else:
            s_t = s_t * scale_log2 - lse_to_log2(lse)[None, :]
        if MaskMod is not None:
            if partial:  # as every block is without lists
                q_idx = start_m + tl.arange(0, BLOCK_M)[None, :]
                k_idx = start_n + tl.arange(0, BLOCK_N)[:, None]
                seen = shown(batch, head, q_idx, k_idx, seqlen_q, seqlen_k, MaskMod, INSIDE)
                s_t = tl.where(seen, s_t, float("-inf"))
        p_t = tl.exp2(s_t)
        if CAUSAL or window_left is not None or window_right is not None:
            edge = start_m < full
            if window_left is not None:
                edge = edge | (start_m >= full_to)
            if BlockLists is not None:
                edge = partial
            if edge:  # only tiles on the edge of the mask pay for it
                q_idx = start_m + tl.arange(0, BLOCK_M)[None, :]
                k_idx = start_n + tl.arange(0, BLOCK_N)[:, None]
                seen = visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL, True, window_left,
                               window_right)  # fmt: skip
                p_t = tl.exp2(tl.where(seen, s_t, float("-inf")))
        dropped_t = p_t
        if Dropout is not None:
            keep = kept(batch, head, start_m, start_n, tl.arange(0, BLOCK_M)[None, :],
                        tl.arange(0, BLOCK_N)[:, None], Dropout)  # fmt: skip
            dropped_t = tl.where(keep, p_t, 0.0)
        dv = tl.dot(dropped_t.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if BLOCK_M > 64:
            dp_t = tl.dot(v, dout.T, input_precision=PRECISION)
        if Dropout is not None:
            dp_t = tl.where(keep, dp_t * rescaling(Dropout), 0.0)
        delta = tl.load(Delta + row + start_m + offs_m, mask=in_rows, other=0.0)
        ds_t = p_t * (dp_t - delta[None, :])
        if ScoreMods is not None:
            q_idx = start_m + tl.arange(0, BLOCK_M)[None, :]
            k_idx = start_n + tl.arange(0, BLOCK_N)[:, None]
            ds_t = derive(ds_t, score_t, batch, head, q_idx, k_idx, seqlen_q, seqlen_k, ScoreMods,
                          INSIDE=INSIDE)  # fmt: skip
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)

    if Dropout is not None:
        dv *= rescaling(Dropout)
    if SeqUsedK is not None:
        used = tl.arange(0, BLOCK_N)[:, None] < seqlen_k - start_n
        dk = tl.where(used, dk, 0.0)
        dv = tl.where(used, dv, 0.0)
    store_tile(dK, dk * softmax_scale, entry_k, head_k, start_n, stride_dkb, stride_dks, stride_dkh,
               rows_k, HEADDIM, BLOCK_N, BLOCK_D)  # fmt: skip
    store_tile(dV, dv, entry_k, head_k, start_n, stride_dvb, stride_dvs, stride_dvh, rows_k,
               HEADDIM_V, BLOCK_N, BLOCK_DV)  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "nheads", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
        "BlockLists",
    ],
    do_not_specialize_on_alignment=PACKED,
)  # fmt: skip
def dq_kernel(Q, K, V, dOut, Lse, Delta, dQ, ScoreMods, MaskMod, BlockLists, Dropout, CuSeqlensQ,
              CuSeqlensK, SeqUsedQ, SeqUsedK, total_q, total_k, softmax_scale, stride_qb, stride_qs,
              stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
              stride_gb, stride_gs, stride_gh, stride_dqb, stride_dqs, stride_dqh, nheads,
              group_size, seqlen_q, seqlen_k, window_left, window_right, HEADDIM: tl.constexpr,
              HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
              CHECK_KEYS: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
              SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr, INSIDE: tl.constexpr):  # fmt: skip
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
    entry_q, entry_k, rows_q = batch, batch, seqlen_q
    if CuSeqlensQ is not None:
        entry_q, rows_q, seqlen_q = sequence(CuSeqlensQ, SeqUsedQ, batch, total_q)
        entry_k, _, seqlen_k = sequence(CuSeqlensK, SeqUsedK, batch, total_k)
        if start_m >= rows_q:
            return
    offs_m = tl.arange(0, BLOCK_M)
    scale_log2 = softmax_scale * LOG2_E

    q = load_tile(Q, entry_q, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                  BLOCK_M, BLOCK_D, True, USE_TMA)  # fmt: skip
    dout = load_tile(dOut, entry_q, head, start_m, stride_gb, stride_gs, stride_gh, seqlen_q,
                     HEADDIM_V, BLOCK_M, BLOCK_DV, True, USE_TMA)  # fmt: skip
    row = lse_offset(batch, head, entry_q, nheads, seqlen_q, total_q) + start_m
    in_rows = offs_m < seqlen_q - start_m
    lse_log2 = lse_to_log2(tl.load(Lse + row + offs_m, mask=in_rows, other=float("inf")))
    delta = tl.load(Delta + row + offs_m, mask=in_rows, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    _, end = key_range(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL, window_right)
    if SeqUsedQ is not None:
        end = tl.where(start_m < seqlen_q, end, 0)
    begin = 0
    if window_left is not None:
        begin, _ = key_begin(start_m, seqlen_q, seqlen_k, window_left, BLOCK_M, BLOCK_N)
    if BlockLists is not None:
        count, entries = block_list(BlockLists, batch, head, start_m // SIZE_Q)
        begin, end = 0, count * SIZE_K
    MASKED: tl.constexpr = (
        CAUSAL or CHECK_KEYS or window_left is not None or window_right is not None
    )
    for walked in tl.range(begin, end, BLOCK_N):
        start_n, partial = walked, True
        if BlockLists is not None:
            start_n, partial, _asked = visited(entries, walked, SIZE_K)
        k = load_tile(K, entry_k, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k,
                      HEADDIM, BLOCK_N, BLOCK_D, CHECK_KEYS, USE_TMA)  # fmt: skip
        s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if ScoreMods is not None:
            q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
            k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
            score = s * softmax_scale
            s = modify(score, batch, head, q_idx, k_idx, seqlen_q, seqlen_k, ScoreMods,
                       INSIDE)  # fmt: skip
            p = tl.exp2(s * LOG2_E - lse_log2[:, None])
        else:
            p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        if MASKED:  # in every block: a branch costs 5% at d128, saves it at d64
            if partial:
                q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
                k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
                seen = visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL, False, window_left,
                               window_right)  # fmt: skip
                p = tl.where(seen, p, 0.0)
        if MaskMod is not None:
            if partial:  # as every block is without lists
                q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
                k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
                seen = shown(batch, head, q_idx, k_idx, seqlen_q, seqlen_k, MaskMod, INSIDE)
                p = tl.where(seen, p, 0.0)
        v = load_tile(V, entry_k, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k,
                      HEADDIM_V, BLOCK_N, BLOCK_DV, CHECK_KEYS, USE_TMA)  # fmt: skip
        dp = tl.dot(dout, v.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if Dropout is not None:
            keep = kept(batch, head, start_m, start_n, tl.arange(0, BLOCK_M)[:, None],
                        tl.arange(0, BLOCK_N)[None, :], Dropout)  # fmt: skip
            dp = tl.where(keep, dp * rescaling(Dropout), 0.0)
        ds = p * (dp - delta[:, None])
        if ScoreMods is not None:
            q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
            k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
            ds = derive(ds, score, batch, head, q_idx, k_idx, seqlen_q, seqlen_k, ScoreMods,
                        SCATTER=True, INSIDE=INSIDE)  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tile(dQ, dq * softmax_scale, entry_q, head, start_m, stride_dqb, stride_dqs, stride_dqh,
               rows_q, HEADDIM, BLOCK_M, BLOCK_D)  # fmt: skip


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
    extras: tuple[torch.Tensor, ...] = (),
    sequences: Sequences = NOT_PACKED,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, in the shapes and dtype of q, k, v; dlse has lse's shape or is None.

    Behind them the gradients of extras that `spec.features.with_grad` names. dq, dk, dv are
    contiguous, or `grads`, which are written. dout needs a contiguous last dimension, as grads do;
    out, lse and dlse are contiguous.
    """
    dq, dk, dv = grads or (t.new_empty(t.shape) for t in (q, k, v))
    delta = torch.empty_like(lse)
    target = target_of(q.device)
    use_tma = tuning.tma_pays(spec, target) and tma_can_read(q, k, v, dout)
    launch_delta, launch_dkdv, launch_dq = _prepare(
        spec, target, q.device, q.stride(), k.stride(), v.stride(), dout.stride(),
        tuple(g.stride() for g in (dq, dk, dv)), aligned(q, k, v, dout, out, lse, dq, dk, dv),
        dlse is not None and aligned(dlse), use_tma, kinds(*extras), sequences.given,
    )  # fmt: skip
    modifications, dextras = mods.for_backward(spec.features, extras)
    dropout = mods.dropout_of(spec.features, extras)

    totals = sequences.totals(q, k)
    if lse.numel():
        inputs = (out, dout, lse if dlse is None else dlse)
        launch_delta(*inputs, delta, sequences.cu_seqlens_q, sequences.seqused_q, totals[0])
    for launch, written, lists in (
        (launch_dkdv, (dk, dv), mods.query_lists(spec.features, extras)),
        (launch_dq, (dq,), mods.key_lists(spec.features, extras)),
    ):
        if written[0].numel():
            operands = _descriptors(launch.config, q, k, v, dout) if use_tma else (q, k, v, dout)
            with mods.explained(spec.features) if spec.features.mods else nullcontext():
                rest = (*modifications, lists, dropout, *sequences, *totals)
                launch(*operands, lse, delta, *written, *rest)
    return dq, dk, dv, *dextras(lse, delta)


def _descriptors(config: tuning.TileConfig, *inputs: torch.Tensor) -> tuple[object, ...]:
    """TMA descriptors of q, k, v and dout, with the tiles that the kernels load."""
    rows = (config.block_m, config.block_n, config.block_n, config.block_m)
    return tuple(
        tile_descriptor(x, n, tuning.block_d(x.shape[-1]))
        for x, n in zip(inputs, rows, strict=True)
    )


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: torch.device,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
    stride_dout: tuple[int, ...],
    stride_grads: tuple[tuple[int, ...], ...],
    aligned_tensors: tuple[bool, ...],
    aligned_dlse: tuple[bool, ...] | bool,
    use_tma: bool,
    kinds_of_extras: tuple[object, ...],
    given: tuple[bool, ...],
) -> tuple[Launch, Launch, Launch]:
    block_d, block_dv = tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v)
    inputs = (entry_strides(s) for s in (stride_q, stride_k, stride_v, stride_dout))
    strides = [n for stride in inputs for n in stride]
    stride_dq, stride_dk, stride_dv = (entry_strides(stride) for stride in stride_grads)
    stride_o = strides_of(1 if spec.varlen else spec.seqlen_q, spec.nheads, spec.headdim_v)
    lengths = (spec.seqlen_q, spec.seqlen_k)
    window = (spec.features.window_left, spec.features.window_right)
    precision = tuning.dot_precision(spec, target)
    packed = spec.varlen is not None
    queries, keys = spec.nheads * spec.batch, spec.nheads_k * spec.batch
    sizes = size_q, size_k = mods.block_sizes(spec.features)

    config = tuning.v2_delta(spec, target)
    delta = Launch(
        delta_kernel,
        triton.cdiv(spec.seqlen_q, config.block_m) * queries,
        (*stride_o, *entry_strides(stride_dout), spec.nheads, spec.seqlen_q),
        (spec.headdim_v, config.block_m, block_dv, aligned_dlse is not False),
        config,
    )  # fmt: skip

    config = tuning.v2_dkdv(spec, target, use_tma)
    dkdv = Launch(
        dkdv_kernel,
        triton.cdiv(spec.seqlen_k, config.block_n) * keys,
        (spec.softmax_scale, *strides, *stride_dk, *stride_dv, spec.nheads_k, spec.group_size,
         *lengths, *window),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n, block_d, block_dv,
         spec.causal, spec.group_size > 1,
         packed or spec.seqlen_q % (size_q or config.block_m) != 0, precision, use_tma, *sizes,
         mods.inside(spec, config.block_m, config.block_n)),
        config,
    )  # fmt: skip

    config = tuning.v2_dq(spec, target, use_tma)
    dq = Launch(
        dq_kernel,
        triton.cdiv(spec.seqlen_q, config.block_m) * queries,
        (spec.softmax_scale, *strides, *stride_dq, spec.nheads, spec.group_size, *lengths,
         *window),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n, block_d, block_dv,
         spec.causal, packed or spec.seqlen_k % (size_k or config.block_n) != 0, precision,
         use_tma, *sizes, mods.inside(spec, config.block_m, config.block_n)),
        config,
    )  # fmt: skip
    return delta, dkdv, dq
