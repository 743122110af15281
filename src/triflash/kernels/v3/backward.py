"""FlashAttention-3 backward for Hopper (arXiv:2407.08608, Algorithm 3), in Gluon.

A program owns 128 keys and walks the queries of all heads that share them. Two warpgroups hold 64
keys each, and dk and dv of these in registers; a warp loads q, dout, lse and delta through rings;
a warp adds dq to float32 sums in memory by TMA. Scores and dp are computed transposed, so that p
and ds leave their products in the registers where dv = p^T dout and dk = ds^T q want them; only
dq = ds k, whose sum runs over the keys of both warpgroups, takes ds through shared memory.
Head dimensions above 128 have a schedule of their own, in backward_wide.py.

A kernel before it makes lse in base 2 and delta = rowsum(out * dout) - dlse and zeroes the sums;
one behind it rounds them to dq. The sums of a tile lie as the threads hold them, see `pack`.

Where that is faster (tuning) there are only as many programs as multiprocessors, and each walks
several tiles of keys: it loads the next while it ends one. If these are all tiles of a head, in the
order of its keys, then the first stores its dq instead of adding it, the last adds the sums to it
and stores dq, and sums are a program's own; nothing is zeroed and there is no kernel behind.

FLOPs: 10 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Workspace, float32: the
sums, of dq's size with seqlen_q a multiple of 64 or 128 and headdim one of 64 or 128; and 2 numbers
a row. Whole heads: sums for the heads that are in flight. With deterministic=True programs add to a
tile of dq in the order of their keys.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triflash import mods, tuning
from triflash.kernels.common.launch import (
    Launch,
    aligned,
    entry_strides,
    kinds,
    strides_of,
    tma_can_read,
)
from triflash.kernels.common.mask import visible
from triflash.kernels.common.mods import derive
from triflash.kernels.common.softmax import LOG2_E
from triflash.kernels.v3 import backward_wide
from triflash.kernels.v3.backward_shared import (
    AHEAD,
    KEYS,
    PART,
    PART_COLUMNS,
    PART_ROWS,
    UNSPECIALIZED,
    Schedule,
    adder,
    after_kernel,
    before_kernel,
    edges,
    finisher,
    head_of,
    last_visit,
    listed,
    locate,
    masked,
    modified,
    next_block,
    pack,
    positions,
    producer,
    rounded,
    tiles_of_program,
    unpack,
)
from triflash.kernels.v3.packed import list_blocks, list_launch, most_blocks
from triflash.kernels.v3.tma import barriers, buffers, flat_view, meet, ragged_view, tile, view
from triflash.spec import NOT_PACKED, AttentionSpec, Features, Sequences
from triflash.target import Target, target_of

CONSUMERS = gl.constexpr(2)
DS_STAGES = gl.constexpr(2)  # blocks of ds; with one the warpgroups would meet twice a step


@gluon.jit
def part_of_ds(ds_smem, slot, PART_ROW: gl.constexpr):
    """ds [PART, KEYS] of one warpgroup's keys and the queries of a part."""
    ds_t = ds_smem.index(slot)
    if ds_t.shape[1] > PART:
        ds_t = ds_t.slice(PART_ROW * PART, PART, dim=1)
    return ds_t.permute((1, 0))


@gluon.jit
def part_of_k(k_smem, w, PART_COLUMN: gl.constexpr):
    """k [KEYS, PART] of one warpgroup's keys and the columns of a part."""
    k = tile(k_smem, w)
    if k.shape[1] > PART:
        k = k.slice(PART_COLUMN * PART, PART, dim=1)
    return k


@gluon.jit
def start_dq(ds_smem, k_smem, slot, kv, W: gl.constexpr):
    """Part W of dq, as an asynchronous product."""
    BLOCK_D: gl.constexpr = k_smem.shape[-1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    dq = gl.zeros([PART, PART], gl.float32, LAYOUT)
    for w in gl.static_range(CONSUMERS):
        dq = warpgroup_mma(part_of_ds(ds_smem, slot + w, W // (BLOCK_D // PART)),
                           part_of_k(k_smem, kv + w, W % (BLOCK_D // PART)), dq,
                           use_acc=w > 0, is_async=True)  # fmt: skip
    return dq


@gluon.jit
def hand_on(dq, dq_smem, dq_full, dq_empty, i, W: gl.constexpr):
    """Part W of dq to the warp that adds it."""
    mbarrier.wait(dq_empty.index(W), i & 1)
    dq_smem.index(W).store(pack(dq))
    fence_async_shared()
    mbarrier.arrive(dq_full.index(W), count=1)


@gluon.jit
def finish(dq, dq_smem, dq_full, dq_empty, i, begun, softmax_scale, dQ, W: gl.constexpr):
    """Part W of dq, with what earlier keys gave it if it is begun, to the warp that stores it."""
    mbarrier.wait(dq_empty.index(W), i & 1)
    dq = pack(dq)
    if begun:
        dq += dq_smem.index(W).load(dq.type.layout)
    dq = unpack((dq * softmax_scale).to(dQ.dtype))
    rounded(dq_smem, W, dQ).store(gl.reshape(dq, dQ.block_type.shape))
    fence_async_shared()
    mbarrier.arrive(dq_full.index(W), count=1)


@gluon.jit
def start_of_dp(stats, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """-delta as an accumulator."""
    minus_delta = stats.slice(BLOCK_M, BLOCK_M).load(gl.SliceLayout(0, LAYOUT))
    dp_t = gl.zeros([KEYS, BLOCK_M], gl.float32, LAYOUT)
    dp_t, _same = gl.broadcast(minus_delta[None, :], dp_t)
    return dp_t


@gluon.jit
def consumer(shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods, MaskMod,
             BlockLists, W: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """Warpgroup W: keys [64 W, 64 W + 64) of a tile's 128, and part W of every dq."""
    if C.persistent:
        first, count, apart = tiles_of_program(sizes, C)
        step = 0
        for n in range(count):
            step = consume(shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods,
                           MaskMod, BlockLists, first + n * apart, n, step, W, C)  # fmt: skip
    else:
        consume(shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods, MaskMod,
                BlockLists, gl.program_id(0), 0, 0, W, C)  # fmt: skip


@gluon.jit
def consume(shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods, MaskMod,
            BlockLists, pid, before, step, W: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """The consumer's tile pid, as in `produce`."""
    BLOCK_M: gl.constexpr = C.block_m
    STAGES: gl.constexpr = C.stages
    (k_smem, v_smem, q_smem, do_smem, stats_smem, ds_ring, dq_smem, bars, dq_full, dq_empty,
     done, _finish) = shared  # fmt: skip
    ds_smem, ds_full, ds_empty = ds_ring
    k_full, v_full, q_full, q_empty, do_full, do_empty, _kv_empty = bars
    group_size = sizes[2]
    WINDOW: gl.constexpr = window_left is not None or window_right is not None
    MODIFIED: gl.constexpr = ScoreMods is not None or MaskMod is not None
    BLOCK_D: gl.constexpr = k_smem.shape[-1]
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LAYOUT_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    QUERIES: gl.constexpr = gl.SliceLayout(0, LAYOUT_S)
    tile_n, batch, head_k, start, full, blocks, places = locate(
        pid, sizes, window_left, window_right, BlockLists, C
    )
    _entry_q, _entry_k, _rows_k, seqlen_q, seqlen_k = places
    scale_log2 = softmax_scale * LOG2_E
    k_pos = tile_n * C.block_n + W * KEYS
    k_pos += gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT_S))[:, None]
    # Masks count from the first query and the first key that it sees, which saves registers.
    k_idx = k_pos
    keys = seqlen_k
    if C.causal or WINDOW:
        k_idx -= start + seqlen_k - seqlen_q
        keys = 0 if C.causal else keys - (start + seqlen_k - seqlen_q)
    elif C.packed:
        k_idx -= seqlen_k
        keys = 0
    edge = edges(start, full, C)
    final = gl.cdiv(last_visit(tile_n, seqlen_q, seqlen_k, C) - start, BLOCK_M)
    always, zero = group_size > 0, gl.minimum(group_size, 0)  # which LLVM does not know
    m = blocks - 1 if C.backwards else 0
    if C.persistent and not C.gqa and not MODIFIED:
        # Blocks count on from tile to tile, like steps, which saves a register.
        m = step
        edge = edge[0] + step, edge[1]
        final += step
        if C.causal:
            k_idx += step * BLOCK_M
    kv = before % C.kv_stages * CONSUMERS
    phase_kv = before // C.kv_stages & 1
    k = tile(k_smem, kv + W)
    v = tile(v_smem, kv + W)
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, LAYOUT_D)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, LAYOUT_D)

    late = before if C.lag and C.persistent else 0  # blocks of ds that were none of a step
    if C.lag:  # the first step takes this for the step before it
        i = step + late
        if C.persistent:
            mbarrier.wait(ds_empty.index(i % DS_STAGES), i // DS_STAGES & 1 ^ 1)
        ds_smem.index(i % DS_STAGES * CONSUMERS + W).store(
            gl.zeros([KEYS, BLOCK_M], k_smem.dtype, LAYOUT_S)
        )
        fence_async_shared()
        mbarrier.arrive(ds_full.index(i % DS_STAGES), count=1)
    mbarrier.wait(k_full.index(kv + W), phase_kv)
    mbarrier.wait(v_full.index(kv + W), phase_kv)
    if C.persistent:  # Triton 3.6 takes a variable for dead that only bounds an inner loop
        mbarrier.wait(q_full.index(step % STAGES), step // STAGES & 1)
    for at in range(step, step + group_size * blocks):
        i = at + late
        if MODIFIED:
            head = head_of(at, head_k, blocks, group_size, C)
            start_m, partial = start + m * BLOCK_M, masked(m, edge, window_left)
            if BlockLists is not None:
                start_m, partial = listed(BlockLists, batch, head, tile_n, m, C)
        slot = at % STAGES
        phase = at // STAGES & 1
        q = tile(q_smem, slot)
        dout = tile(do_smem, slot)
        stats = stats_smem.index(slot).reshape([2 * BLOCK_M])
        mbarrier.wait(q_full.index(slot), phase)
        zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, LAYOUT_S)
        if C.late_dp:
            s_t = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dp_t = zeros
        elif C.fold:
            # Both before the first product: else the copies of -delta sink between the products.
            mbarrier.wait(do_full.index(slot), phase)
            # Then -delta takes no registers of its own; but ptxas lets one warpgroup wait for s.
            dp_t = start_of_dp(stats, BLOCK_M, LAYOUT_S)
            s_t = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dp_t = warpgroup_mma(v, dout.permute((1, 0)), dp_t, is_async=True)
        else:
            s_t = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(slot), phase)
            dp_t = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
        lse = stats.slice(0, BLOCK_M).load(QUERIES)
        s_t = warpgroup_mma_wait(0 if C.late_dp else 1, deps=(s_t,))
        if MODIFIED and C.straight:
            q_pos = positions(start_m, BLOCK_M, QUERIES)[None, :]
            p_t, ds_t = modified(
                s_t, lse[None, :], batch, head, q_pos, k_pos, softmax_scale, seqlen_q, seqlen_k,
                partial, window_left, window_right, ScoreMods, MaskMod, True, C,
            )  # fmt: skip
            p_16 = p_t.to(q.dtype)
            p_t = ds_t
        elif MODIFIED:
            p_16, ds_t = s_t.to(q.dtype), s_t
            if always:  # over a branch ptxas moves nothing; else it begins with too much at once
                q_pos = positions(start_m, BLOCK_M, QUERIES)[None, :]
                p_t, ds_t = modified(
                    s_t, lse[None, :], batch, head, q_pos, k_pos, softmax_scale, seqlen_q, seqlen_k,
                    partial, window_left, window_right, ScoreMods, MaskMod, True, C,
                )  # fmt: skip
                p_16 = p_t.to(q.dtype)
            p_t = ds_t
        else:
            p_t = gl.exp2(s_t * scale_log2 - lse[None, :])
            if C.causal or C.check_keys or WINDOW:
                if masked(m, edge, window_left):  # only tiles on the edge of the mask pay for it
                    q_idx = positions(m * BLOCK_M, BLOCK_M, QUERIES)[None, :]
                    seen = visible(q_idx, k_idx, keys if WINDOW else 0, keys, C.causal, True,
                                   window_left, window_right)  # fmt: skip
                    p_t = gl.where(seen, p_t, 0.0)
            p_16 = p_t.to(q.dtype)
        p_16 = gl.convert_layout(p_16, gl.DotOperandLayout(0, LAYOUT_D, 2))
        if C.late_dp:
            mbarrier.wait(do_full.index(slot), phase)
            if C.fold:
                dp_t = start_of_dp(stats, BLOCK_M, LAYOUT_S)
            dp_t = warpgroup_mma(v, dout.permute((1, 0)), dp_t, use_acc=C.fold, is_async=True)
        if C.late_dv:
            dp_t = warpgroup_mma_wait(0, deps=(dp_t,))
        else:
            dv = warpgroup_mma(p_16, dout, dv, is_async=True)
            dp_t = warpgroup_mma_wait(1, deps=(dp_t,))
        if not C.fold:
            dp_t += stats.slice(BLOCK_M, BLOCK_M).load(QUERIES)[None, :]
        ds_t = p_t * dp_t
        if C.scatter:
            # With zero, as LLVM would keep the addresses that scores were modified by.
            q_pos = positions(start_m + zero, BLOCK_M, QUERIES)[None, :]
            ds_t = derive(ds_t, s_t * softmax_scale, batch, head, q_pos, k_pos, seqlen_q, seqlen_k,
                          ScoreMods, True, C.inside)  # fmt: skip
        ds_t = ds_t.to(q.dtype)
        if C.late_dv:
            dv = warpgroup_mma(p_16, dout, dv, is_async=True)
        ds_16 = gl.convert_layout(ds_t, gl.DotOperandLayout(0, LAYOUT_D, 2))
        if C.lag:
            # To be read in the next step; here goes what the other warpgroup, too, has long stored.
            j = i + 1
            mbarrier.wait(ds_empty.index(j % DS_STAGES), j // DS_STAGES & 1 ^ 1)
            ds_smem.index(j % DS_STAGES * CONSUMERS + W).store(ds_t)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(j % DS_STAGES), count=1)
            mbarrier.wait(ds_full.index(i % DS_STAGES), i // DS_STAGES & 1)
        else:
            ds_smem.index(i % DS_STAGES * CONSUMERS + W).store(ds_t)
            fence_async_shared()
            meet(256)
        dq = start_dq(ds_smem, k_smem, i % DS_STAGES * CONSUMERS, kv, W)
        dk = warpgroup_mma(ds_16, q, dk, is_async=True)  # hides storing dq
        dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
        mbarrier.arrive(do_empty.index(slot), count=1)
        if C.lag:
            mbarrier.arrive(ds_empty.index(i % DS_STAGES), count=1)
        if C.whole_heads:
            if m < final:
                finish(dq, dq_smem, dq_full, dq_empty, i, tile_n > 0, softmax_scale, dQ, W)
            else:
                hand_on(dq, dq_smem, dq_full, dq_empty, i, W)
        else:
            hand_on(dq, dq_smem, dq_full, dq_empty, i, W)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(q_empty.index(slot), count=1)
        m = next_block(m, blocks, C)

    step += group_size * blocks
    if C.lag:
        i = step + late
        mbarrier.wait(ds_full.index(i % DS_STAGES), i // DS_STAGES & 1)
        dq = start_dq(ds_smem, k_smem, i % DS_STAGES * CONSUMERS, kv, W)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        if C.persistent:
            mbarrier.arrive(ds_empty.index(i % DS_STAGES), count=1)
        hand_on(dq, dq_smem, dq_full, dq_empty, i, W)

    # dv and dk leave through the memory of v and k.
    v.store(dv.to(v.dtype))
    meet(256)  # both have read all of k
    k.store((dk * softmax_scale).to(k.dtype))
    fence_async_shared()
    mbarrier.arrive(done.index(before % C.kv_stages), count=1)
    return step


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(Q, K, V, dOut, Stats, Sums, dQ, dK, dV, Turn, Blocks, ScoreMods, MaskMod,
                    BlockLists, softmax_scale, nheads, nheads_k, group_size, seqlen_q, seqlen_k,
                    window_left, window_right, tiles, C: gl.constexpr):  # fmt: skip
    """One program a block of keys of a key head.

    Blocks is the list of blocks of keys of packed sequences, whose number is that of the tiles of
    queries a head in Stats and Sums, else None.
    """
    if C.packed:
        if gl.program_id(0) >= gl.load(Blocks) * nheads_k:  # there are not so many
            return
    k_smem = buffers(K, C.kv_stages * CONSUMERS)
    v_smem = buffers(V, C.kv_stages * CONSUMERS)
    q_smem = buffers(Q, C.stages)
    do_smem = buffers(dOut, C.stages)
    stats_smem = gl.allocate_shared_memory(gl.float32, [C.stages, 1, 2 * C.block_m], Stats.layout)
    ds_smem = gl.allocate_shared_memory(
        Q.dtype, [DS_STAGES * CONSUMERS, KEYS, C.block_m],
        gl.NVMMASharedLayout.get_default_for([KEYS, C.block_m], Q.dtype),
    )  # fmt: skip
    dq_smem = gl.allocate_shared_memory(
        gl.float32, [CONSUMERS, PART_ROWS, PART_COLUMNS], Sums.layout
    )
    bars = (
        barriers(C.kv_stages * CONSUMERS, 1),
        barriers(C.kv_stages * CONSUMERS, 1),
        barriers(C.stages, 1),
        barriers(C.stages, CONSUMERS),
        barriers(C.stages, 1),
        barriers(C.stages, CONSUMERS),
        barriers(C.kv_stages, 1),
    )
    ds_ring = (ds_smem, barriers(DS_STAGES, CONSUMERS), barriers(DS_STAGES, CONSUMERS))
    dq_full = barriers(CONSUMERS, 1)
    dq_empty = barriers(CONSUMERS, 1)
    done = barriers(C.kv_stages, CONSUMERS)
    finishing = done
    if C.finish:
        finishing = (
            barriers(AHEAD, 1), barriers(AHEAD, 1), barriers(1, 1),
            gl.allocate_shared_memory(gl.float32, [1, PART_ROWS, PART_COLUMNS], Sums.layout),
            buffers(dQ, 2),
        )
    fence_async_shared()
    shared = (k_smem, v_smem, q_smem, do_smem, stats_smem, ds_ring, dq_smem, bars, dq_full,
              dq_empty, done, finishing)  # fmt: skip
    sizes = (nheads, nheads_k, group_size, seqlen_q, seqlen_k, Blocks, tiles)
    if C.finish:
        gl.warp_specialize(
            [
                (consumer, (shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods,
                            MaskMod, BlockLists, 0, C)),
                (consumer, (shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods,
                            MaskMod, BlockLists, 1, C)),
                (producer, (shared, Q, K, V, dOut, Stats, sizes, window_left, window_right,
                            BlockLists, C)),
                (adder, (shared, k_smem, v_smem, Sums, dQ, dK, dV, Turn, sizes, window_left,
                         window_right, BlockLists, C)),
                (finisher, (shared, Sums, dQ, Turn, sizes, softmax_scale, window_left, window_right,
                            BlockLists, C)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods,
                            MaskMod, BlockLists, 0, C)),
                (consumer, (shared, dQ, softmax_scale, sizes, window_left, window_right, ScoreMods,
                            MaskMod, BlockLists, 1, C)),
                (producer, (shared, Q, K, V, dOut, Stats, sizes, window_left, window_right,
                            BlockLists, C)),
                (adder, (shared, k_smem, v_smem, Sums, dQ, dK, dV, Turn, sizes, window_left,
                         window_right, BlockLists, C)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip


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
    contiguous, or `grads`, which are written and lie as TMA can write. Needs `spec.tma`. dout needs
    a contiguous last dimension, and is copied if TMA cannot read it as it lies; out, lse and dlse
    are contiguous.
    """
    dq, dk, dv = grads or (t.new_empty(t.shape) for t in (q, k, v))
    features = spec.features
    aux_sums = mods.aux_sums(features, extras)
    if 0 in (dq.numel(), dk.numel()):
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        dextras = mods.gradients(features, extras, aux_sums, lse, delta)
        return dq.zero_(), dk.zero_(), dv.zero_(), *dextras
    if not tma_can_read(dout):
        dout = dout.clone(memory_format=torch.contiguous_format)
    plan = _prepare(
        spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(), dout.stride(),
        None if dq.is_contiguous() else dq.stride(), dk.stride(), dv.stride(),
        aligned(dout, out, lse), dlse is not None and aligned(dlse), kinds(*extras),
        tuple(aux_sums), sequences.given,
    )  # fmt: skip
    tiles, programs, blocks = plan.tiles, None, None
    if plan.list_keys is not None:
        tiles_m = most_blocks(q.shape[0], spec.batch, plan.block_m)
        most = most_blocks(k.shape[0], spec.batch, plan.block_n)
        blocks = list_blocks(plan.list_keys, q, k, sequences, most, tiles_m)
        tiles, programs = tiles_m * spec.nheads, most * spec.nheads_k
    sums = q.new_empty((plan.tiles_of_sums or tiles) * plan.size_of_sums, dtype=torch.float32)
    stats = q.new_empty(tiles * 2 * plan.block_m, dtype=torch.float32)
    turn = q.new_zeros(tiles, dtype=torch.int32) if spec.deterministic or plan.finish else stats
    cu_seqlens_q, seqused_q = sequences.cu_seqlens_q, sequences.seqused_q
    total_q, _ = sequences.totals(q, k)
    dlse = lse if dlse is None else dlse
    inputs = (out, dout, lse, dlse)
    plan.before(*inputs, stats, sums, cu_seqlens_q, seqused_q, total_q, programs=tiles)
    with mods.explained(features) if features.mods else nullcontext():
        arguments = (q, k, v, dout, stats, sums, dq, dk, dv, turn, blocks)
        plan.backward(*arguments, *extras, *aux_sums.values(), programs=programs)
    if plan.after is not None:
        parts = plan.size_of_sums // PART.value**2
        plan.after(sums, dq, cu_seqlens_q, total_q, programs=tiles * parts)
    if not features.with_grad:
        return dq, dk, dv
    delta = None
    if "sinks" in features.with_grad:  # which alone need it
        delta = -_rows_of(stats, plan.block_m, spec, q, cu_seqlens_q)
    return dq, dk, dv, *mods.gradients(features, extras, aux_sums, lse, delta)


def _rows_of(
    stats: torch.Tensor,
    block_m: int,
    spec: AttentionSpec,
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
) -> torch.Tensor:
    """What before_kernel stored last for each row, in lse's shape."""
    if cu_seqlens_q is None:
        tiles = stats.view(spec.batch, spec.nheads, -1, 2, block_m)
        return tiles[..., 1, :].flatten(2)[..., : spec.seqlen_q]
    rows = torch.arange(q.shape[0], dtype=torch.int32, device=stats.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:], rows, right=True).clamp(max=spec.batch - 1)
    start = cu_seqlens_q[sequence]
    block = start // block_m + sequence + (rows - start) // block_m
    return stats.view(spec.nheads, -1, 2, block_m)[:, block, 1, (rows - start) % block_m]


def _arguments(
    features: Features, names_of_sums: tuple[str, ...], fused: bool, finish: bool, turn: Any, blocks: Any, *tensors: Any
) -> tuple[Any, ...]:
    """The kernel's arguments behind its descriptors."""
    extras, aux_sums = tensors[: len(features.names)], tensors[len(features.names) :]
    named = dict(zip(names_of_sums, aux_sums, strict=True))
    if fused:
        modifications = mods.fused_backward(features, extras)
    else:
        modifications = mods.backward_arguments(features, extras, named, approximate=True)
    lists = mods.query_lists(features, extras)
    if lists is not None and finish:
        counts, _, rows_b, rows_h, _ = mods.key_lists(features, extras)
        lists = (*lists, counts, rows_b, rows_h)
    return turn, blocks, *modifications, lists


@dataclass(frozen=True)
class Plan:
    """Launches, and the shapes of the workspaces."""

    before: Launch
    backward: Launch
    after: Launch | None  # if the kernel does not finish dq
    list_keys: Launch | None  # the blocks of keys of packed sequences
    tiles: int  # of queries of all heads, if not packed
    tiles_of_sums: int | None  # of the programs, if they have their own
    size_of_sums: int  # of a tile
    block_m: int
    block_n: int
    finish: bool = False


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: torch.device,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
    stride_dout: tuple[int, ...],
    stride_dq: tuple[int, ...] | None,
    stride_dk: tuple[int, ...],
    stride_dv: tuple[int, ...],
    aligned_inputs: tuple[bool, ...],
    aligned_dlse: tuple[bool, ...] | bool,
    kinds_of_extras: tuple[object, ...],
    names_of_sums: tuple[str, ...],
    given: tuple[bool, ...],
) -> Plan:
    config = tuning.v3_backward(spec, target)
    block_m, block_n = config.block_m, config.block_n
    width, width_v = config.width, config.width_v
    size_q, size_k = mods.block_sizes(spec.features)
    rows = size_q or block_m
    packed = spec.varlen is not None
    tiles = -(-spec.seqlen_q // rows) * (rows // block_m) * spec.nheads * spec.batch
    of_queries: tuple[int, ...] = (spec.batch, spec.seqlen_q, spec.nheads)
    of_keys: tuple[int, ...] = (spec.batch, spec.seqlen_k, spec.nheads_k)
    if packed:
        tiles = 1 << 23  # what descriptors allow for; calls have their own number
        of_queries, of_keys = (spec.nheads,), (spec.nheads_k,)
    sequences = spec.batch if packed else None
    shape_q, shape_o = (*of_queries, spec.headdim), (*of_queries, spec.headdim_v)
    stride_o = strides_of(1 if packed else spec.seqlen_q, spec.nheads, spec.headdim_v)
    shape_k, shape_v = (*of_keys, spec.headdim), (*of_keys, spec.headdim_v)
    contiguous_dq = strides_of(1 if packed else spec.seqlen_q, spec.nheads, spec.headdim)
    lies_dq = stride_dq or contiguous_dq[packed:]
    describe = ragged_view if packed else view
    keys = KEYS.value
    # Only modifications ask, so that nothing else is compiled anew.
    inside = bool(spec.features.mods) and not packed
    inside = inside and spec.seqlen_q % rows == spec.seqlen_k % block_n == 0
    size_of_sums = block_m * width
    tiles_k = -(-spec.seqlen_k // block_n) * spec.nheads_k * spec.batch
    programs = min(config.programs or tiles_k, tiles_k)
    tiles_of_sums = None
    if config.whole_heads:
        programs = -(-spec.nheads_k * spec.batch // -(-spec.nheads_k * spec.batch // programs))
        tiles_of_sums = programs * spec.group_size * -(-spec.seqlen_q // block_m)
    views = (
        describe(shape_q, stride_q, block_m, width, spec.dtype),
        describe(shape_k, stride_k, keys, width, spec.dtype),
        describe(shape_v, stride_v, keys, width_v, spec.dtype),
        describe(shape_o, stride_dout, block_m, width_v, spec.dtype),
        flat_view(tiles, 2 * block_m, 1),
        flat_view(
            (tiles_of_sums or tiles) * size_of_sums // PART_COLUMNS.value,
            PART_COLUMNS.value,
            PART_ROWS.value,
        ),
        describe(shape_q, lies_dq, PART.value, PART.value, spec.dtype),
        describe(shape_k, stride_dk, keys, width, spec.dtype),
        describe(shape_v, stride_dv, keys, width_v, spec.dtype),
    )
    around = tuning.v3_around_backward(spec, target)
    before = Launch(
        before_kernel,
        tiles,
        (*stride_o, *entry_strides(stride_dout), spec.nheads, spec.seqlen_q, sequences),
        (
            spec.headdim_v,
            block_m,
            width,
            width_v,
            aligned_dlse is not False,
            rows,
            not config.whole_heads,
        ),
        around,
    )
    backward = Launch(
        backward_wide.backward_kernel if config.wide else backward_kernel,
        programs,
        (spec.softmax_scale, spec.nheads, spec.nheads_k, spec.group_size, spec.seqlen_q,
         spec.seqlen_k, spec.features.window_left, spec.features.window_right,
         tiles_k),
        (
            Schedule(
                block_m=block_m,
                block_n=block_n,
                stages=config.stages,
                dout_stages=config.dout_stages,
                late_dp=config.late_dp,
                late_dv=config.late_dv,
                fold=config.fold,
                lag=config.lag,
                backwards=config.backwards,
                causal=spec.causal,
                check_keys=packed or spec.seqlen_k % block_n != 0,
                gqa=spec.group_size > 1,
                deterministic=spec.deterministic and not config.whole_heads,
                packed=packed,
                inside=inside,
                scatter=bool(names_of_sums),
                rows=rows,
                size_q=size_q,
                size_k=size_k,
                persistent=programs < tiles_k,
                whole_heads=config.whole_heads,
                kv_stages=config.kv_stages,
                section=config.section,
                fused=config.fused,
                poly=config.poly,
                straight=config.straight,
                finish=config.finish,
            ),
        ),
        config,
        views,
        partial(_arguments, spec.features, names_of_sums, config.fused, config.finish),
    )  # fmt: skip
    after = Launch(
        after_kernel,
        tiles * size_of_sums // PART.value**2,
        (spec.softmax_scale, *(entry_strides(stride_dq) if stride_dq else (None,) * 3),
         spec.nheads, spec.seqlen_q, sequences),
        (spec.headdim, block_m, width, rows),
        around,
    )  # fmt: skip
    list_keys = list_launch(spec, block_n, of_keys=True) if packed else None
    finish = None if config.whole_heads or config.finish else after
    return Plan(before, backward, finish, list_keys, tiles, tiles_of_sums, size_of_sums, block_m,
                block_n, config.finish)  # fmt: skip
