"""v3's backward for head dimensions above 128: three warpgroups, each with a product of its own.

dk and dv of 64 keys fill the registers of two warpgroups, so one holds dk and the other dv, and a
third makes p and ds for both. p and ds go through shared memory, as [queries, keys]; of dq the
first makes the odd parts of 64 columns and the second the even ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triflash.kernels.common.mask import visible
from triflash.kernels.common.mods import derive
from triflash.kernels.common.softmax import LOG2_E
from triflash.kernels.v3.backward_shared import (
    DQ_BUFFERS,
    KEYS,
    PART,
    PART_COLUMNS,
    PART_ROWS,
    UNSPECIALIZED,
    adder,
    buffer_of,
    column_of,
    columns_of,
    edges,
    head_of,
    listed,
    locate,
    masked,
    modified,
    next_block,
    pack,
    positions,
    producer,
    width_of,
    zeros,
)
from triflash.kernels.v3.products import add_products, finished, products
from triflash.kernels.v3.tma import barriers, parts, rings, tile, tiles_of

P_STAGES = gl.constexpr(2)  # blocks of p, and of ds


@gluon.jit
def scores(shared, softmax_scale, sizes, window_left, window_right, ScoreMods, MaskMod,
           BlockLists, C: gl.constexpr):  # fmt: skip
    """The warpgroup that makes p and ds."""
    BLOCK_M: gl.constexpr = C.block_m
    k_smem, v_smem, q_smem, do_smem, stats_smem, pairs, _, bars, _, _, _ = shared
    k_full, v_full, q_full, q_empty, do_full, do_empty, _ = bars
    p_smem, ds_smem, p_full, p_empty, ds_full, ds_empty = pairs
    group_size = sizes[2]
    MODIFIED: gl.constexpr = ScoreMods is not None or MaskMod is not None
    WINDOW: gl.constexpr = window_left is not None or window_right is not None
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    QUERIES: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    tile_n, batch, head_k, start, full, blocks, places = locate(
        gl.program_id(0), sizes, window_left, window_right, BlockLists, C
    )
    _entry_q, _entry_k, _rows_k, seqlen_q, seqlen_k = places
    scale_log2 = softmax_scale * LOG2_E
    # Masks count from the first query and the first key that it sees, which saves registers.
    first = start + seqlen_k - seqlen_q - tile_n * KEYS
    keys = 0 if C.causal else seqlen_k - tile_n * KEYS
    always, zero = group_size > 0, gl.minimum(group_size, 0)  # which LLVM does not know
    edge = edges(start, full, C)
    m = blocks - 1 if C.backwards else 0
    k = tiles_of(k_smem, 0)
    v = tiles_of(v_smem, 0)
    mbarrier.wait(k_full.index(0), 0)
    mbarrier.wait(v_full.index(0), 0)
    steps = group_size * blocks
    nothing = gl.zeros([BLOCK_M, KEYS], gl.float32, LAYOUT)
    s_next = nothing
    if C.ahead:  # one product more than steps, of whatever lies there
        if steps > 0:
            mbarrier.wait(q_full.index(0), 0)
        s_next = products(tiles_of(q_smem, 0), k, nothing, False)
        s_next = warpgroup_mma_wait(0, deps=(s_next,))
    for i in range(steps):
        if MODIFIED:
            head = head_of(i, head_k, blocks, group_size, C)
            start_m, partial = start + m * BLOCK_M, masked(m, edge, window_left)
            if BlockLists is not None:
                start_m, partial = listed(BlockLists, batch, head, tile_n, m, C)
        q_slot = i % C.stages
        do_slot = i % C.dout_stages
        slot = i % P_STAGES
        q = tiles_of(q_smem, q_slot)
        dout = tiles_of(do_smem, do_slot)
        stats = stats_smem.index(q_slot).reshape([2 * BLOCK_M])
        nothing = gl.zeros([BLOCK_M, KEYS], gl.float32, LAYOUT)
        if C.ahead:
            s = s_next
        else:
            mbarrier.wait(q_full.index(q_slot), i // C.stages & 1)
            s = products(q, k, nothing, False)
        if not C.late_dp:
            mbarrier.wait(do_full.index(do_slot), i // C.dout_stages & 1)
            dp = products(dout, v, nothing, False)
        lse = stats.slice(0, BLOCK_M).load(QUERIES)
        minus_delta = stats.slice(BLOCK_M, BLOCK_M).load(QUERIES)
        if C.ahead:
            if i + 1 < steps:
                mbarrier.wait(q_full.index((i + 1) % C.stages), (i + 1) // C.stages & 1)
            s_next = products(tiles_of(q_smem, (i + 1) % C.stages), k, nothing, False)
        else:
            s = warpgroup_mma_wait(0 if C.late_dp else len(dout), deps=(s,))
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        if MODIFIED:
            p, derived = s, s
            if always:  # see backward.py
                q_pos = positions(start_m, BLOCK_M, QUERIES)[:, None]
                k_pos = positions(tile_n * KEYS + i * zero, KEYS, COLUMNS)[None, :]
                p, derived = modified(
                    s, lse[:, None], batch, head, q_pos, k_pos, softmax_scale, seqlen_q, seqlen_k,
                    partial, window_left, window_right, ScoreMods, MaskMod, False, C,
                )  # fmt: skip
        else:
            p = gl.exp2(s * scale_log2 - lse[:, None])
            if C.causal or C.check_keys or WINDOW:
                if masked(m, edge, window_left):  # only tiles on the edge of the mask pay for it
                    q_idx = first + m * BLOCK_M + gl.arange(0, BLOCK_M, QUERIES)[:, None]
                    k_idx = gl.arange(0, KEYS, COLUMNS)[None, :]
                    seen = visible(q_idx, k_idx, keys if WINDOW else 0, keys, C.causal, False,
                                   window_left, window_right)  # fmt: skip
                    p = gl.where(seen, p, 0.0)
            derived = p
        mbarrier.wait(p_empty.index(slot), i // P_STAGES & 1 ^ 1)
        p_smem.index(slot).store(p.to(p_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(p_full.index(slot), count=1)
        if C.late_dp:
            mbarrier.wait(do_full.index(do_slot), i // C.dout_stages & 1)
            dp = products(dout, v, nothing, False)
        if C.ahead:
            dp, s_next = warpgroup_mma_wait(0, deps=(dp, s_next))
        else:
            dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(do_empty.index(do_slot), count=1)
        ds = derived * (dp + minus_delta[:, None])
        if C.scatter:
            q_pos = positions(start_m + zero, BLOCK_M, QUERIES)[:, None]
            k_pos = positions(tile_n * KEYS + i * zero, KEYS, COLUMNS)[None, :]
            ds = derive(ds, s * softmax_scale, batch, head, q_pos, k_pos, seqlen_q, seqlen_k,
                        ScoreMods, True, C.inside)  # fmt: skip
        mbarrier.wait(ds_empty.index(slot), i // P_STAGES & 1 ^ 1)
        ds_smem.index(slot).store(ds.to(ds_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(ds_full.index(slot), count=1)
        m = next_block(m, blocks, C)


@gluon.jit
def start_dq(ds, k, PART_COLUMN: gl.constexpr, C: gl.constexpr):
    """A part of dq, begun."""
    WIDTH: gl.constexpr = width_of(C, PART_COLUMN)
    COLUMN: gl.constexpr = column_of(C, PART_COLUMN)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    nothing = gl.zeros([PART, WIDTH], gl.float32, LAYOUT)
    if COLUMN < k[0].shape[1]:
        columns = k[0].slice(COLUMN, WIDTH, dim=1)
    elif WIDTH == PART:
        columns = k[1]
    else:
        columns = k[1].slice(COLUMN - k[0].shape[1], WIDTH, dim=1)
    return warpgroup_mma(ds, columns, nothing, use_acc=False, is_async=True)


@gluon.jit
def gradient(shared, softmax_scale, sizes, window_left, window_right, BlockLists,
             IS_DK: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """A warpgroup that makes dv or dk, and every other part of dq."""
    k_smem, _, q_smem, do_smem, _, pairs, dq_smem, bars, dq_full, dq_empty, done = shared
    k_full, _, _, q_empty, do_full, do_empty, _ = bars
    p_smem, ds_smem, p_full, p_empty, ds_full, ds_empty = pairs
    group_size = sizes[2]
    W: gl.constexpr = 1 if IS_DK else 0
    ring = q_smem if IS_DK else do_smem
    ring_empty = q_empty if IS_DK else do_empty
    STAGES: gl.constexpr = C.stages if IS_DK else C.dout_stages
    ROUNDS: gl.constexpr = (columns_of(C) - W + 1) // DQ_BUFFERS
    _tile_n, _batch, _head_k, _start, _full, blocks, _places = locate(
        gl.program_id(0), sizes, window_left, window_right, BlockLists, C
    )
    k = tiles_of(k_smem, 0)
    acc = zeros(ring)
    mbarrier.wait(k_full.index(0), 0)
    for i in range(group_size * blocks):
        slot = i % P_STAGES
        phase = i // P_STAGES & 1
        ring_slot = i % STAGES
        ds = ds_smem.index(slot)
        if IS_DK:
            mbarrier.wait(ds_full.index(slot), phase)
            ds_t = ds.permute((1, 0))
            acc = add_products((ds_t, ds_t), tiles_of(ring, ring_slot), acc)
        else:
            mbarrier.wait(p_full.index(slot), phase)
            if C.late_dp:  # else dout was there before p
                mbarrier.wait(do_full.index(ring_slot), i // STAGES & 1)
            p_t = p_smem.index(slot).permute((1, 0))
            acc = add_products((p_t, p_t), tiles_of(ring, ring_slot), acc)
            mbarrier.wait(ds_full.index(slot), phase)
        for r in gl.static_range(ROUNDS):
            dq = start_dq(ds, k, r * DQ_BUFFERS + W, C)
            if r == 0:
                acc = finished(acc, 1)
                mbarrier.arrive(ring_empty.index(ring_slot), count=1)
                if not IS_DK:
                    mbarrier.arrive(p_empty.index(slot), count=1)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            if r == ROUNDS - 1:
                mbarrier.arrive(ds_empty.index(slot), count=1)
            mbarrier.wait(dq_empty.index(W), i * ROUNDS + r & 1)
            buffer_of(dq_smem, W, dq.shape[1]).store(pack(dq))
            fence_async_shared()
            mbarrier.arrive(dq_full.index(W), count=1)

    # dk and dv leave through the memory of q and dout: all loads have come and have been used.
    for part in gl.static_range(len(ring)):
        total = acc[part]
        if IS_DK:
            total = total * softmax_scale
        tile(ring[part], 0).store(total.to(ring[part].dtype))
    fence_async_shared()
    mbarrier.arrive(done.index(0), count=1)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(Q, K, V, dOut, Stats, Sums, dQ, dK, dV, Q1, K1, V1, dOut1, Sums1, dQ1, dK1, dV1,
                    Turn, Blocks, ScoreMods, MaskMod, BlockLists, softmax_scale, nheads, nheads_k,
                    group_size, seqlen_q, seqlen_k, window_left, window_right, tiles, section,
                    C: gl.constexpr):  # fmt: skip
    """One program a block of 64 keys of a key head; parameters as in backward.py."""
    BLOCK_M: gl.constexpr = C.block_m
    if C.packed:
        if gl.program_id(0) >= gl.load(Blocks) * nheads_k:  # there are not so many
            return
    # What those of dk and dv do not need goes to the warpgroup that makes p and ds.
    WIDEST: gl.constexpr = C.width if C.width > C.width_v else C.width_v
    REGISTERS: gl.constexpr = 192 if WIDEST > 192 else 160 if C.halves else 176
    k_smem = rings(parts(K, K1), 1)
    v_smem = rings(parts(V, V1), 1)
    q_smem = rings(parts(Q, Q1), C.stages)
    do_smem = rings(parts(dOut, dOut1), C.dout_stages)
    stats_smem = gl.allocate_shared_memory(gl.float32, [C.stages, 1, 2 * BLOCK_M], Stats.layout)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, KEYS], Q.dtype)
    pairs = (
        gl.allocate_shared_memory(Q.dtype, [P_STAGES, BLOCK_M, KEYS], LAYOUT),
        gl.allocate_shared_memory(Q.dtype, [P_STAGES, BLOCK_M, KEYS], LAYOUT),
        barriers(P_STAGES, 1),
        barriers(P_STAGES, 1),
        barriers(P_STAGES, 1),
        barriers(P_STAGES, 2),
    )
    dq_smem = gl.allocate_shared_memory(
        gl.float32, [DQ_BUFFERS, PART_ROWS, PART_COLUMNS], Sums.layout
    )
    bars = (
        barriers(1, 1),
        barriers(1, 1),
        barriers(C.stages, 1),
        barriers(C.stages, 2),
        barriers(C.dout_stages, 1),
        barriers(C.dout_stages, 2),
        barriers(1, 1),
    )
    dq_full = barriers(DQ_BUFFERS, 1)
    dq_empty = barriers(DQ_BUFFERS, 1)
    done = barriers(1, 2)
    fence_async_shared()
    shared = (k_smem, v_smem, q_smem, do_smem, stats_smem, pairs, dq_smem, bars, dq_full,
              dq_empty, done)  # fmt: skip
    sizes = (nheads, nheads_k, group_size, seqlen_q, seqlen_k, Blocks, tiles, section)
    gl.warp_specialize(
        [
            (scores, (shared, softmax_scale, sizes, window_left, window_right, ScoreMods, MaskMod,
                      BlockLists, C)),
            (gradient, (shared, softmax_scale, sizes, window_left, window_right, BlockLists,
                        False, C)),
            (gradient, (shared, softmax_scale, sizes, window_left, window_right, BlockLists,
                        True, C)),
            (producer, (shared, parts(Q, Q1), parts(K, K1), parts(V, V1), parts(dOut, dOut1),
                        Stats, sizes, window_left, window_right, BlockLists, C)),
            (adder, (shared, q_smem, do_smem, parts(Sums, Sums1), parts(dQ, dQ1), parts(dK, dK1),
                     parts(dV, dV1), Turn, sizes, window_left, window_right, BlockLists, C)),
        ],
        [4, 4, 1, 1],
        [REGISTERS, REGISTERS, 24, 24],
    )  # fmt: skip
