"""FlashAttention-2 forward (arXiv:2307.08691, Algorithm 1).

What v2 changes against v1: the output stays unnormalised until the last block, exponents are in
base 2, one program owns a block of queries (so nothing is shared between programs), and only lse
is saved for the backward. Blocks that a causal mask hides are never visited, and only those on its
edge pay for masking.

FLOPs: 4 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: q, out and lse
once; k and v once for each block of queries, mostly from L2.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

from triflash import mods, tuning
from triflash.kernels.common.blocks import block_list, visited
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
from triflash.kernels.common.mask import key_begin, key_range, visible
from triflash.kernels.common.mods import modify, shown
from triflash.kernels.common.softmax import LOG2_E, finish, softmax_step
from triflash.kernels.common.tiles import load_tile, store_tile
from triflash.kernels.common.varlen import PACKED, lse_offset, sequence
from triflash.spec import NOT_PACKED, AttentionSpec, Sequences
from triflash.target import Target, target_of


@triton.jit(
    do_not_specialize=[
        "nheads", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
        "BlockLists",
    ],
    do_not_specialize_on_alignment=PACKED,
)  # fmt: skip
def forward_kernel(Q, K, V, Out, Lse, ScoreMods, MaskMod, BlockLists, Sinks, Dropout, CuSeqlensQ,
                   CuSeqlensK, SeqUsedQ, SeqUsedK, total_q, total_k, softmax_scale, stride_qb,
                   stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
                   stride_vh, stride_ob, stride_os, stride_oh, nheads, group_size, seqlen_q,
                   seqlen_k, window_left, window_right, HEADDIM: tl.constexpr,
                   HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
                   CHECK_KEYS: tl.constexpr, SCALE_SIGN: tl.constexpr, PRECISION: tl.constexpr,
                   USE_TMA: tl.constexpr, SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr,
                   INSIDE: tl.constexpr):  # fmt: skip
    """One program a block of queries; programs of one head are neighbours, to share k, v in L2.

    With CuSeqlensQ, a batch entry is a sequence of packed tensors, and seqlen_q and seqlen_k are
    the largest: programs past the end of theirs leave, those of unused rows write that. With
    BlockLists, a program walks the listed blocks of SIZE_K keys.
    """
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    if CAUSAL:
        tile_m = tiles_m - 1 - tile_m  # the longest first, so that none is left over at the end
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

    q = load_tile(Q, entry_q, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                  BLOCK_M, BLOCK_D, True, USE_TMA)  # fmt: skip
    # softmax_step wants a positive scale: the sign goes into q, and scores scaled by 0 are q = 0.
    scale_log2 = softmax_scale * SCALE_SIGN * LOG2_E
    if SCALE_SIGN < 0:
        q = -q
    elif SCALE_SIGN == 0:
        q = tl.zeros_like(q)
        scale_log2 = 1.0
    if ScoreMods is not None:  # which get scores in natural units
        scale_log2 = LOG2_E

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    full, end = key_range(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL, window_right)
    if SeqUsedQ is not None:
        end = tl.where(start_m < seqlen_q, end, 0)
    begin = 0
    if window_left is not None:
        begin, full_from = key_begin(start_m, seqlen_q, seqlen_k, window_left, BLOCK_M, BLOCK_N)
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
            s = modify(s * softmax_scale, batch, head, q_idx, k_idx, seqlen_q, seqlen_k, ScoreMods,
                       INSIDE)  # fmt: skip
        if MASKED:
            edge = start_n >= full
            if window_left is not None:
                edge = edge | (start_n < full_from)
            if BlockLists is not None:
                edge = partial
            if edge:  # only tiles on the edge of the mask pay for it
                q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
                k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
                seen = visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL, False, window_left,
                               window_right)  # fmt: skip
                s = tl.where(seen, s, float("-inf"))
        if MaskMod is not None:
            if partial:  # as every block is without lists
                q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
                k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
                seen = shown(batch, head, q_idx, k_idx, seqlen_q, seqlen_k, MaskMod, INSIDE)
                s = tl.where(seen, s, float("-inf"))
        hides: tl.constexpr = MASKED or MaskMod is not None or ScoreMods is not None
        m_i, p, alpha = softmax_step(s, m_i, scale_log2, hides)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if Dropout is not None:  # of what meets v, not of lse
            keep = kept(batch, head, start_m, start_n, tl.arange(0, BLOCK_M)[:, None],
                        tl.arange(0, BLOCK_N)[None, :], Dropout)  # fmt: skip
            p = tl.where(keep, p, 0.0)
        v = load_tile(V, entry_k, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k,
                      HEADDIM_V, BLOCK_N, BLOCK_DV, CHECK_KEYS, USE_TMA)  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    sink = None
    if Sinks is not None:
        sink = tl.load(Sinks + head).to(tl.float32)
    if SeqUsedQ is not None:
        used = tl.arange(0, BLOCK_M) < seqlen_q - start_m
        l_i = tl.where(used, l_i, 0.0)
        acc = tl.where(used[:, None], acc, 0.0)
        if Sinks is not None:
            m_i = tl.where(used, m_i, float("-inf"))
            sink = tl.where(used, sink, float("-inf"))
    lse, normaliser = finish(m_i, l_i, sink)
    if Dropout is not None:
        normaliser *= rescaling(Dropout)
    store_tile(Out, acc * normaliser[:, None], entry_q, head, start_m, stride_ob, stride_os,
               stride_oh, rows_q, HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    lse_row = Lse + lse_offset(batch, head, entry_q, nheads, rows_q, total_q) + start_m
    tl.store(lse_row + offs_m, lse, mask=offs_m < rows_q - start_m)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    extras: tuple[torch.Tensor, ...] = (),
    sequences: Sequences = NOT_PACKED,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse float32 `(batch, nheads, seqlen_q)`.

    Packed: out `(total_q, nheads, headdim_v)`, lse `(nheads, total_q)`.
    """
    out = q.new_empty((*q.shape[:-1], spec.headdim_v))
    lse = q.new_empty(spec.lse_shape(q), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, []
    use_tma = tuning.tma_pays(spec, target_of(q.device)) and tma_can_read(q, k, v)
    launch = _prepare(
        spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(), aligned(q, k, v),
        use_tma, kinds(*extras), sequences.given,
    )  # fmt: skip
    totals = sequences.totals(q, k)
    if use_tma:
        block_d, block_dv = tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v)
        q = tile_descriptor(q, launch.config.block_m, block_d)
        k = tile_descriptor(k, launch.config.block_n, block_d)
        v = tile_descriptor(v, launch.config.block_n, block_dv)
    with mods.explained(spec.features) if spec.features.mods else nullcontext():
        modifications = mods.for_forward(spec.features, extras)
        lists = mods.key_lists(spec.features, extras)
        sinks = extras[-1] if spec.features.sinks else None
        rest = (lists, sinks, mods.dropout_of(spec.features, extras), *sequences, *totals)
        launch(q, k, v, out, lse, *modifications, *rest)
    return out, lse, []


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: torch.device,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
    aligned_qkv: tuple[bool, ...],
    use_tma: bool,
    kinds_of_extras: tuple[object, ...],
    given: tuple[bool, ...],
) -> Launch:
    config = tuning.v2_forward(spec, target, use_tma)
    stride_o = strides_of(1 if spec.varlen else spec.seqlen_q, spec.nheads, spec.headdim_v)
    strides = (s for stride in (stride_q, stride_k, stride_v) for s in entry_strides(stride))
    sign = (spec.softmax_scale > 0) - (spec.softmax_scale < 0)
    if spec.features.score_mods:  # which scale by themselves
        sign = 1
    size_q, size_k = mods.block_sizes(spec.features)
    return Launch(
        forward_kernel,
        triton.cdiv(spec.seqlen_q, config.block_m) * spec.nheads * spec.batch,
        (spec.softmax_scale, *strides, *stride_o, spec.nheads, spec.group_size, spec.seqlen_q,
         spec.seqlen_k, spec.features.window_left, spec.features.window_right),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n,
         tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v), spec.causal,
         spec.varlen is not None or spec.seqlen_k % (size_k or config.block_n) != 0, sign,
         tuning.dot_precision(spec, target), use_tma, size_q, size_k,
         mods.inside(spec, config.block_m, config.block_n)),
        config,
    )  # fmt: skip
