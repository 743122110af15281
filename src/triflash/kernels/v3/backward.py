"""FlashAttention-3 backward for Hopper (arXiv:2407.08608, Algorithm 3), in Gluon.

A program owns 128 keys and walks the queries of all heads that share them. Two warpgroups hold 64
keys each, and dk and dv of these in registers; a warp loads q, dout, lse and delta through rings;
a warp adds dq to float32 sums in memory by TMA. Scores and dp are computed transposed, so that p
and ds leave their products in the registers where dv = p^T dout and dk = ds^T q want them; only
dq = ds k, whose sum runs over the keys of both warpgroups, takes ds through shared memory.
Head dimensions above 128 have a schedule of their own, in backward_wide.py. 96 and 192 columns lie
in two parts, 64 + 32 and 128 + 64, as tiles are powers of two: a product of theirs is two.

A kernel before it makes lse in base 2 and delta = rowsum(out * dout) - dlse and zeroes the sums;
one behind it rounds them to dq. The sums of a tile lie as the threads hold them, see `pack`.

Where that is faster (tuning) there are only as many programs as multiprocessors, and each walks
several tiles of keys: it loads the next while it ends one. If these are all tiles of a head, in the
order of its keys, then the first stores its dq instead of adding it, the last adds the sums to it
and stores dq, and sums are a program's own; nothing is zeroed and there is no kernel behind.

Where tiles of keys are few and heads share them (tuning), `splits` programs share out a group's
heads. Each stores its part of dk and dv, in their dtype, and the parts are summed in float32.

With causal windows (tuning) programs of one tile finish dq, too. Those of a head's last keys come
first, and each walks from the first query on that sees its keys: on a tile of queries those of
later keys are ahead. They take turns in this order, for which nobody has to wait: the first stores
its dq, the last adds the sums to its own and stores dq.

FLOPs: 10 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Workspace, float32: the
sums, of dq's size with seqlen_q a multiple of 64 or 128 and headdim what it is filled up to, one of
64, 96, 128, 192, 256; and 2 numbers a row. Whole heads: sums for the heads that are in flight. With
deterministic=True programs add to a tile of dq in the order of their keys. Turns: a number a tile.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triflash import mods, tuning_v3
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
    KEYS,
    PART,
    PART_COLUMNS,
    PART_ROWS,
    UNSPECIALIZED,
    Schedule,
    adder,
    after_kernel,
    before_kernel,
    buffer_of,
    columns_of,
    edges,
    end_of_earlier,
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
    width_of,
    zeros,
)
from triflash.kernels.v3.packed import list_blocks, list_launch, most_blocks
from triflash.kernels.v3.products import add_products, finished, operands, products
from triflash.kernels.v3.tma import (
    barriers,
    flat_view,
    meet,
    opaque,
    parts,
    ragged_view,
    rings,
    tile,
    tiles_of,
    view,
)
from triflash.spec import NOT_PACKED, AttentionSpec, Features, Sequences
from triflash.target import Target, target_of
from triflash.tuning import block_d

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
    """k [KEYS, PART] of one warpgroup's keys and the columns of a part, or half as wide."""
    if len(k_smem) == 2:
        k = tile(k_smem[PART_COLUMN], w)
    else:
        k = tile(k_smem[0], w)
        if k.shape[1] > PART:
            k = k.slice(PART_COLUMN * PART, PART, dim=1)
    return k


@gluon.jit
def start_dq(ds_smem, k_smem, slot, kv, W: gl.constexpr, C: gl.constexpr):
    """Part W of dq, as an asynchronous product."""
    COLUMNS: gl.constexpr = columns_of(C)
    WIDTH: gl.constexpr = width_of(C, W)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    dq = gl.zeros([PART, WIDTH], gl.float32, LAYOUT)
    for w in gl.static_range(CONSUMERS):
        dq = warpgroup_mma(part_of_ds(ds_smem, slot + w, W // COLUMNS),
                           part_of_k(k_smem, kv + w, W % COLUMNS), dq,
                           use_acc=w > 0, is_async=True)  # fmt: skip
    return dq


@gluon.jit
def hand_on(dq, dq_smem, dq_full, dq_empty, i, W: gl.constexpr):
    """Part W of dq to the warp that adds it."""
    mbarrier.wait(dq_empty.index(W), i & 1)
    buffer_of(dq_smem, W, dq.shape[1]).store(pack(dq))
    fence_async_shared()
    mbarrier.arrive(dq_full.index(W), count=1)


@gluon.jit
def finish(dq, dq_smem, dq_full, dq_empty, i, begun, softmax_scale, dQ, at, W: gl.constexpr):
    """Part W of dq, with what other keys gave it if it is begun, to the warp that stores it.

    Buffer `at` is W. If that is not known when this is compiled, addresses are computed here; else
    they are kept in registers through the loop.
    """
    HALF: gl.constexpr = dq.shape[1] < PART
    mbarrier.wait(dq_empty.index(W), i & 1)
    buffer = buffer_of(dq_smem, at, dq.shape[1])
    dq = pack(dq)
    if begun:
        dq += buffer.load(dq.type.layout)
    dq = unpack((dq * softmax_scale).to(dQ[HALF].dtype))
    rounded(dq_smem, at, dQ[HALF]).store(gl.reshape(dq, dQ[HALF].block_type.shape))
    fence_async_shared()
    mbarrier.arrive(dq_full.index(W), count=1)


@gluon.jit
def has_read(bar, C: gl.constexpr):
    """This warpgroup has read a slot. mbarrier.arrive waits for all of its warps."""
    if C.release:
        async_copy.mbarrier_arrive(bar, increment_count=False)
    else:
        mbarrier.arrive(bar, count=1)


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
     done) = shared  # fmt: skip
    ds_smem, ds_full, ds_empty = ds_ring
    k_full, v_full, q_full, q_empty, do_full, do_empty, _kv_empty = bars
    group_size = sizes[2]
    WINDOW: gl.constexpr = window_left is not None or window_right is not None
    MODIFIED: gl.constexpr = ScoreMods is not None or MaskMod is not None
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
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
    if C.ordered:
        ending = end_of_earlier(tile_n, seqlen_q, seqlen_k, window_left, C)
        ending = gl.cdiv(ending - start, BLOCK_M)
    always, zero = group_size > 0, gl.minimum(group_size, 0)  # which LLVM does not know
    m = blocks - 1 if C.backwards else 0
    if C.persistent and not C.gqa:
        # Blocks count on from tile to tile, like steps, which saves a register.
        m = step
        edge = edge[0] + step, edge[1]
        final += step
        if C.causal:
            k_idx += step * BLOCK_M
    kv = before % C.kv_stages * CONSUMERS
    phase_kv = before // C.kv_stages & 1
    k = tiles_of(k_smem, kv + W)
    v = tiles_of(v_smem, kv + W)
    dk = zeros(k_smem)
    dv = zeros(v_smem)

    late = before if C.lag and C.persistent else 0  # blocks of ds that were none of a step
    if C.lag:  # the first step takes this for the step before it
        i = step + late
        if C.persistent:
            mbarrier.wait(ds_empty.index(i % DS_STAGES), i // DS_STAGES & 1 ^ 1)
        ds_smem.index(i % DS_STAGES * CONSUMERS + W).store(
            gl.zeros([KEYS, BLOCK_M], ds_smem.dtype, LAYOUT_S)
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
        q = tiles_of(q_smem, slot)
        dout = tiles_of(do_smem, slot)
        stats = stats_smem.index(slot).reshape([2 * BLOCK_M])
        mbarrier.wait(q_full.index(slot), phase)
        nothing = gl.zeros([KEYS, BLOCK_M], gl.float32, LAYOUT_S)
        if C.late_dp:
            s_t = products(k, q, nothing, False)
            dp_t = nothing
        elif C.fold:
            # Both before the first product: else the copies of -delta sink between the products.
            mbarrier.wait(do_full.index(slot), phase)
            # Then -delta takes no registers of its own; but ptxas lets one warpgroup wait for s.
            dp_t = start_of_dp(stats, BLOCK_M, LAYOUT_S)
            s_t = products(k, q, nothing, False)
            dp_t = products(v, dout, dp_t, True)
        else:
            s_t = products(k, q, nothing, False)
            mbarrier.wait(do_full.index(slot), phase)
            dp_t = products(v, dout, nothing, False)
        lse = stats.slice(0, BLOCK_M).load(QUERIES)
        if C.both:
            s_t, dp_t = warpgroup_mma_wait(0, deps=(s_t, dp_t))
        else:
            s_t = warpgroup_mma_wait(0 if C.late_dp else len(dout), deps=(s_t,))
        if MODIFIED:
            p_16, ds_t = s_t.to(ds_smem.dtype), s_t
            if not C.fenced or always:  # over a branch ptxas moves nothing
                q_pos = positions(start_m, BLOCK_M, QUERIES)[None, :]
                p_t, ds_t = modified(
                    s_t, lse[None, :], batch, head, q_pos, k_pos, softmax_scale, seqlen_q, seqlen_k,
                    partial, window_left, window_right, ScoreMods, MaskMod, True, C,
                )  # fmt: skip
                p_16 = p_t.to(ds_smem.dtype)
            p_t = ds_t
        else:
            p_t = gl.exp2(s_t * scale_log2 - lse[None, :])
            if C.causal or C.check_keys or WINDOW:
                if masked(m, edge, window_left):  # only tiles on the edge of the mask pay for it
                    q_idx = positions(m * BLOCK_M, BLOCK_M, QUERIES)[None, :]
                    seen = visible(q_idx, k_idx, keys if WINDOW else 0, keys, C.causal, True,
                                   window_left, window_right)  # fmt: skip
                    p_t = gl.where(seen, p_t, 0.0)
            p_16 = p_t.to(ds_smem.dtype)
        p_16 = operands(p_16, dv)
        if C.late_dp:
            mbarrier.wait(do_full.index(slot), phase)
            if C.fold:
                dp_t = start_of_dp(stats, BLOCK_M, LAYOUT_S)
            dp_t = products(v, dout, dp_t, C.fold)
        if C.late_dv:
            if not C.both:
                dp_t = warpgroup_mma_wait(0, deps=(dp_t,))
        else:
            dv = add_products(p_16, dout, dv)
            dp_t = warpgroup_mma_wait(len(dv), deps=(dp_t,))
        if not C.fold:
            dp_t += stats.slice(BLOCK_M, BLOCK_M).load(QUERIES)[None, :]
        ds_t = p_t * dp_t
        if C.scatter:
            # With zero, as LLVM would keep the addresses that scores were modified by.
            q_pos = positions(start_m + zero, BLOCK_M, QUERIES)[None, :]
            ds_t = derive(ds_t, s_t * softmax_scale, batch, head, q_pos, k_pos, seqlen_q, seqlen_k,
                          ScoreMods, True, C.inside)  # fmt: skip
        ds_t = ds_t.to(ds_smem.dtype)
        if C.late_dv:
            dv = add_products(p_16, dout, dv)
        ds_16 = operands(ds_t, dk)
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
        dq = start_dq(ds_smem, k_smem, i % DS_STAGES * CONSUMERS, kv, W, C)
        dk = add_products(ds_16, q, dk)  # hides storing dq
        if len(dv) == 1:
            first, dq = warpgroup_mma_wait(len(dk), deps=(dv[0], dq))
            dv = (first,)
        else:
            first, second, dq = warpgroup_mma_wait(len(dk), deps=(dv[0], dv[1], dq))
            dv = (first, second)
        has_read(do_empty.index(slot), C)
        if C.lag:
            has_read(ds_empty.index(i % DS_STAGES), C)
        if C.whole_heads:
            if m < final:
                finish(dq, dq_smem, dq_full, dq_empty, i, tile_n > 0, softmax_scale, dQ, W, W)
            else:
                hand_on(dq, dq_smem, dq_full, dq_empty, i, W)
        elif C.ordered:
            if m >= ending:
                finish(dq, dq_smem, dq_full, dq_empty, i, True, softmax_scale, dQ, opaque(W), W)
            else:
                hand_on(dq, dq_smem, dq_full, dq_empty, i, W)
        else:
            hand_on(dq, dq_smem, dq_full, dq_empty, i, W)
        dk = finished(dk)
        has_read(q_empty.index(slot), C)
        m = next_block(m, blocks, C)

    step += group_size * blocks
    if C.lag:
        i = step + late
        mbarrier.wait(ds_full.index(i % DS_STAGES), i // DS_STAGES & 1)
        dq = start_dq(ds_smem, k_smem, i % DS_STAGES * CONSUMERS, kv, W, C)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        if C.persistent:
            has_read(ds_empty.index(i % DS_STAGES), C)
        hand_on(dq, dq_smem, dq_full, dq_empty, i, W)

    # dv and dk leave through the memory of v and k.
    for part in gl.static_range(len(v)):
        v[part].store(dv[part].to(v[part].dtype))
    meet(256)  # both have read all of k
    for part in gl.static_range(len(k)):
        k[part].store((dk[part] * softmax_scale).to(k[part].dtype))
    fence_async_shared()
    mbarrier.arrive(done.index(before % C.kv_stages), count=1)
    return step


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(Q, K, V, dOut, Stats, Sums, dQ, dK, dV, Q1, K1, V1, dOut1, Sums1, dQ1, dK1, dV1,
                    Turn, Blocks, ScoreMods, MaskMod, BlockLists, softmax_scale, nheads, nheads_k,
                    group_size, seqlen_q, seqlen_k, window_left, window_right, tiles, section,
                    C: gl.constexpr):  # fmt: skip
    """One program a block of keys of a key head.

    Q1 and the others with a 1 are for the columns behind those of Q, where there are two parts.
    Blocks is the list of blocks of keys of packed sequences, whose number is that of the tiles of
    queries a head in Stats and Sums, else None.
    """
    if C.packed:
        if gl.program_id(0) >= gl.load(Blocks) * nheads_k:  # there are not so many
            return
    k_smem = rings(parts(K, K1), C.kv_stages * CONSUMERS)
    v_smem = rings(parts(V, V1), C.kv_stages * CONSUMERS)
    q_smem = rings(parts(Q, Q1), C.stages)
    do_smem = rings(parts(dOut, dOut1), C.stages)
    stats_smem = gl.allocate_shared_memory(gl.float32, [C.stages, 1, 2 * C.block_m], Stats.layout)
    ds_smem = gl.allocate_shared_memory(
        Q.dtype, [DS_STAGES * CONSUMERS, KEYS, C.block_m],
        gl.NVMMASharedLayout.get_default_for([KEYS, C.block_m], Q.dtype),
    )  # fmt: skip
    dq_smem = gl.allocate_shared_memory(
        gl.float32, [CONSUMERS, PART_ROWS, PART_COLUMNS], Sums.layout
    )
    READERS: gl.constexpr = CONSUMERS * 128 if C.release else CONSUMERS
    bars = (
        barriers(C.kv_stages * CONSUMERS, 1),
        barriers(C.kv_stages * CONSUMERS, 1),
        barriers(C.stages, 1),
        barriers(C.stages, READERS),
        barriers(C.stages, 1),
        barriers(C.stages, READERS),
        barriers(C.kv_stages, 1),
    )
    ds_ring = (ds_smem, barriers(DS_STAGES, CONSUMERS), barriers(DS_STAGES, READERS))
    dq_full = barriers(CONSUMERS, 1)
    dq_empty = barriers(CONSUMERS, 1)
    done = barriers(C.kv_stages, CONSUMERS)
    fence_async_shared()
    shared = (k_smem, v_smem, q_smem, do_smem, stats_smem, ds_ring, dq_smem, bars, dq_full,
              dq_empty, done)  # fmt: skip
    sizes = (nheads, nheads_k, group_size, seqlen_q, seqlen_k, Blocks, tiles, section)
    gl.warp_specialize(
        [
            (consumer, (shared, parts(dQ, dQ1), softmax_scale, sizes, window_left, window_right,
                        ScoreMods, MaskMod, BlockLists, 0, C)),
            (consumer, (shared, parts(dQ, dQ1), softmax_scale, sizes, window_left, window_right,
                        ScoreMods, MaskMod, BlockLists, 1, C)),
            (producer, (shared, parts(Q, Q1), parts(K, K1), parts(V, V1), parts(dOut, dOut1),
                        Stats, sizes, window_left, window_right, BlockLists, C)),
            (adder, (shared, k_smem, v_smem, parts(Sums, Sums1), parts(dQ, dQ1), parts(dK, dK1),
                     parts(dV, dV1), Turn, sizes, window_left, window_right, BlockLists, C)),
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
        tiles, programs = tiles_m * spec.nheads, most * spec.nheads_k * plan.splits
    sums = q.new_empty((plan.tiles_of_sums or tiles) * plan.size_of_sums, dtype=torch.float32)
    stats = q.new_empty(tiles * 2 * plan.block_m, dtype=torch.float32)
    turn = q.new_zeros(tiles, dtype=torch.int32) if plan.takes_turns else stats
    cu_seqlens_q, seqused_q = sequences.cu_seqlens_q, sequences.seqused_q
    total_q, _ = sequences.totals(q, k)
    dlse = lse if dlse is None else dlse
    inputs = (out, dout, lse, dlse)
    plan.before(*inputs, stats, sums, cu_seqlens_q, seqused_q, total_q, programs=tiles)
    with mods.explained(features) if features.mods else nullcontext():
        written = _parts(k, v, plan.splits) if plan.splits > 1 else (dk, dv)
        described = (q, k, v, dout, stats, sums, dq, *written, q, k, v, dout, sums, dq, *written)
        plan.backward(*described, turn, blocks, *extras, *aux_sums.values(), programs=programs)
    if plan.after is not None:
        plan.after(sums, dq, cu_seqlens_q, total_q, programs=tiles * plan.parts)
    if plan.splits > 1:
        for whole, part in zip((dk, dv), written, strict=True):
            torch.sum(part.unflatten(-2, (-1, plan.splits)), -2, out=whole)
    if not features.with_grad:
        return dq, dk, dv
    delta = None
    if "sinks" in features.with_grad:  # which alone need it
        delta = -_rows_of(stats, plan.block_m, spec, q, cu_seqlens_q)
    return dq, dk, dv, *mods.gradients(features, extras, aux_sums, lse, delta)


def _parts(k: torch.Tensor, v: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for parts of dk and dv, as if there were so many times the heads."""
    part_k, part_v = (x.new_empty(*x.shape[:-2], x.shape[-2] * splits, x.shape[-1]) for x in (k, v))
    return part_k, part_v


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
    features: Features,
    names_of_sums: tuple[str, ...],
    fused: bool,
    turn: Any,
    blocks: Any,
    *tensors: Any,
) -> tuple[Any, ...]:
    """The kernel's arguments behind its descriptors."""
    extras, aux_sums = tensors[: len(features.names)], tensors[len(features.names) :]
    if fused:
        modifications = mods.fused_backward(features, extras)
    else:
        named = dict(zip(names_of_sums, aux_sums, strict=True))
        modifications = mods.backward_arguments(features, extras, named, approximate=True)
    return turn, blocks, *modifications, mods.query_lists(features, extras)


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
    parts: int  # of these, one a program of `after`
    block_m: int
    block_n: int
    splits: int
    takes_turns: bool  # to add to a tile of dq


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
    config = tuning_v3.backward(spec, target)
    block_m, block_n = config.block_m, config.block_n
    widths, widths_v = tuning_v3.widths_of(config.width), tuning_v3.widths_of(config.width_v)
    widths_dq = (PART.value, PART.value // 2)[
        : 1 + (config.width % PART.value > 0 or config.halves)
    ]
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
    nheads_k = spec.nheads_k * config.splits
    shape_dk, shape_dv = ((*x[:-2], nheads_k, x[-1]) for x in (shape_k, shape_v))
    if config.splits > 1:
        entry = 1 if packed else spec.seqlen_k
        stride_dk = strides_of(entry, nheads_k, spec.headdim)[packed:]
        stride_dv = strides_of(entry, nheads_k, spec.headdim_v)[packed:]
    contiguous_dq = strides_of(1 if packed else spec.seqlen_q, spec.nheads, spec.headdim)
    lies_dq = stride_dq or contiguous_dq[packed:]
    describe = ragged_view if packed else view
    keys = KEYS.value
    # Only modifications ask, so that nothing else is compiled anew.
    inside = bool(spec.features.mods) and not packed
    inside = inside and spec.seqlen_q % rows == spec.seqlen_k % block_n == 0
    size_of_sums = block_m * config.width
    tiles_k = -(-spec.seqlen_k // block_n) * nheads_k * spec.batch
    programs = min(config.programs or tiles_k, tiles_k)
    tiles_of_sums = None
    if config.whole_heads:
        programs = -(-spec.nheads_k * spec.batch // -(-spec.nheads_k * spec.batch // programs))
        tiles_of_sums = programs * spec.group_size * -(-spec.seqlen_q // block_m)
    rows_of_sums = (tiles_of_sums or tiles) * size_of_sums // PART_COLUMNS.value

    def views_of(part: int) -> list[Callable[[torch.Tensor], TensorDescriptor] | None]:
        """Those of a part of columns, where there is one."""

        def columns(
            shape: tuple[int, ...], stride: tuple[int, ...], rows: int, widths: tuple[int, ...]
        ) -> Callable[[torch.Tensor], TensorDescriptor] | None:
            if part == len(widths):
                return None
            return describe(shape, stride, rows, widths[part], spec.dtype)

        of_sums = flat_view(rows_of_sums, PART_COLUMNS.value, PART_ROWS.value >> part)
        return [
            columns(shape_q, stride_q, block_m, widths),
            columns(shape_k, stride_k, keys, widths),
            columns(shape_v, stride_v, keys, widths_v),
            columns(shape_o, stride_dout, block_m, widths_v),
            of_sums if part < len(widths_dq) else None,
            columns(shape_q, lies_dq, PART.value, widths_dq),
            columns(shape_dk, stride_dk, keys, widths),
            columns(shape_dv, stride_dv, keys, widths_v),
        ]

    views, more_views = views_of(0), views_of(1)
    views.insert(4, flat_view(tiles, 2 * block_m, 1))
    finishes = config.whole_heads or config.ordered
    deterministic = spec.deterministic and not finishes
    around = tuning_v3.around_backward(spec, target)
    before = Launch(
        before_kernel,
        tiles,
        (*stride_o, *entry_strides(stride_dout), spec.nheads, spec.seqlen_q, sequences),
        (
            spec.headdim_v,
            block_m,
            config.width,
            block_d(config.width_v),
            aligned_dlse is not False,
            rows,
            not finishes,
        ),
        around,
    )
    backward = Launch(
        backward_wide.backward_kernel if config.wide else backward_kernel,
        programs,
        (spec.softmax_scale, spec.nheads, nheads_k, spec.nheads // nheads_k, spec.seqlen_q,
         spec.seqlen_k, spec.features.window_left, spec.features.window_right,
         tiles_k, tuning_v3.backward_section(spec, target, config)),
        (
            Schedule(
                block_m=block_m,
                block_n=block_n,
                width=config.width,
                width_v=config.width_v,
                halves=config.halves,
                ahead=config.ahead,
                stages=config.stages,
                dout_stages=config.dout_stages,
                late_dp=config.late_dp,
                late_dv=config.late_dv,
                fused=config.fused,
                fenced=config.fenced,
                fold=config.fold,
                both=config.both,
                release=config.release,
                lag=config.lag,
                backwards=config.backwards,
                causal=spec.causal,
                check_keys=packed or spec.seqlen_k % block_n != 0,
                gqa=spec.nheads > nheads_k,
                deterministic=deterministic,
                packed=packed,
                inside=inside,
                scatter=bool(names_of_sums),
                rows=rows,
                size_q=size_q,
                size_k=size_k,
                persistent=programs < tiles_k,
                whole_heads=config.whole_heads,
                ordered=config.ordered,
                kv_stages=config.kv_stages,
                splits=config.splits,
            ),
        ),
        config,
        (*views, *more_views),
        partial(_arguments, spec.features, names_of_sums, config.fused),
    )  # fmt: skip
    parts_of_sums = size_of_sums // (PART.value * (64 if config.width % 64 == 0 else 32))
    after = Launch(
        after_kernel,
        tiles * parts_of_sums,
        (spec.softmax_scale, *(entry_strides(stride_dq) if stride_dq else (None,) * 3),
         spec.nheads, spec.seqlen_q, sequences),
        (spec.headdim, block_m, config.width, rows),
        around,
    )  # fmt: skip
    list_keys = list_launch(spec, block_n, of_keys=True) if packed else None
    finish = None if finishes else after
    return Plan(before, backward, finish, list_keys, tiles, tiles_of_sums, size_of_sums,
                parts_of_sums, block_m, block_n, config.splits,
                config.ordered or deterministic)  # fmt: skip
