"""FlashAttention-3 forward for Hopper (arXiv:2407.08608, Algorithm 2), in Gluon.

What v3 changes against v2: one warp does nothing but load by TMA, two to four warpgroups compute
64 queries each on k and v that they share through a ring in shared memory; the product q k^T of a
block runs while the softmax of the block before it and its product with v are under way; programs
stay on their multiprocessor and take one tile of queries after another.

FLOPs: 4 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: q, out and lse
once; k and v once for each tile of queries, mostly from L2.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from triflash import mods, tuning_v3
from triflash.kernels.common.blocks import block_list, visited
from triflash.kernels.common.launch import Launch, kinds, strides_of
from triflash.kernels.common.mask import key_begin, key_range
from triflash.kernels.common.mods import shown
from triflash.kernels.common.softmax import LOG2_E, finish
from triflash.kernels.common.varlen import lse_offset
from triflash.kernels.v3.counters import counter_for
from triflash.kernels.v3.packed import list_blocks, list_launch, most_blocks, place_at
from triflash.kernels.v3.products import add_products, finished, operands, products
from triflash.kernels.v3.tma import (
    barriers,
    load,
    opaque,
    ragged_view,
    rings,
    store,
    thread_barrier,
    tile,
    tiles_of,
    view,
)
from triflash.kernels.v3.weights import (
    SLACK,
    can_hide,
    held,
    keys_of,
    mask,
    mask_at_the_end,
    modified,
    not_within,
    rescaled,
    signed,
    sum_of_lanes,
    weights,
)
from triflash.spec import NOT_PACKED, AttentionSpec, Sequences
from triflash.target import Target, target_of


@dataclass(frozen=True)
class Schedule:
    """What a kernel is compiled for; fields that tuning_v3.HopperConfig has too mean the same."""

    block_n: int
    stages: int
    stages_k: int
    slots_q: int
    consumers: int
    dynamic: bool
    hold: bool
    turns: bool
    q_in_registers: bool
    half_q: bool
    alias: bool
    bounded: bool
    kept: bool  # a row's maximum is that of its first block; sums out of range raise a flag
    behind: bool  # runs only where the flag is raised
    parts: int  # of the columns of q and k
    parts_v: int  # of the columns of v and out
    causal: bool
    check_keys: bool  # the last block of keys has some past seqlen_k
    edges: bool  # a causal mask may cut blocks behind a tile's first, or hide all keys from a row
    scale_sign: int  # of softmax_scale: -1, 0 or 1
    base_2: bool  # a modification takes scores without the scale and gives them in base 2
    size_q: int | None  # of the blocks of a block mask
    size_k: int | None
    packed: bool
    used_q: bool  # rows of packed q may take no part

    @property
    def settled(self) -> bool:
        """Whether no maximum moves behind the first block."""
        return self.bounded or self.kept

    @property
    def fields(self) -> int:
        """Numbers that tell a warpgroup its tile."""
        return 7 if self.packed else 3

    @property
    def stages_q(self) -> int:
        """Tiles whose q may be on its way to one warpgroup."""
        return -(-self.slots_q // self.consumers)


ROWS = gl.constexpr(64)  # queries of one warpgroup, the rows of one wgmma
THREADS = gl.constexpr(128)  # of one warpgroup
FLAG, TICKET = gl.constexpr(8), gl.constexpr(16)  # in the memory of Counter


@gluon.jit
def locate(index, tiles_m, nheads, heads, section, CAUSAL: gl.constexpr):
    """Tile `index` as (tile_m, batch, head).

    Heads come in sections whose k and v fit L2. Within a section a causal mask has its longest
    tiles first, so that none is left over at the end.
    """
    first = index // (tiles_m * section) * section
    width = gl.minimum(section, heads - first)
    rest = index - first * tiles_m
    tile_m = rest // width
    if CAUSAL:
        tile_m = tiles_m - 1 - tile_m
    row = first + rest % width
    return tile_m, row // nheads, row % nheads


@gluon.jit
def blocks_of(start_m, seqlen_q, seqlen_k, window_left, window_right, BLOCK_M: gl.constexpr,
              BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    """Blocks of keys for queries [start_m, start_m + BLOCK_M), as (begin, inner, full, end).

    Those of [begin, end) are visited, begin < end; those of [inner, full) need no mask. Queries
    that see no key go through one block that is hidden from them.
    """
    full, end = key_range(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL, window_right)
    full = full // BLOCK_N
    end = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    begin, inner = 0, 0
    if window_left is not None:
        begin, inner = key_begin(start_m, seqlen_q, seqlen_k, window_left, BLOCK_M, BLOCK_N)
        begin = gl.minimum(begin // BLOCK_N, end - 1)
        inner = inner // BLOCK_N
    return begin, inner, full, end


@gluon.jit
def listed(BlockLists, batch, head, start_m, C: gl.constexpr):
    """How many blocks of keys are listed for a tile of queries, at least 1, and their list."""
    count, entries = block_list(BlockLists, batch, head, start_m // C.size_q)
    return gl.maximum(count * (C.size_k // C.block_n), 1), entries


@gluon.jit
def producer(shared, Q, K, V, Counter, BlockLists, sizes, window_left, window_right,
             C: gl.constexpr):  # fmt: skip
    """The warp that loads: q of each tile, then k and v in the order in which they are used.

    The last v of a tile comes behind the first k of the next one, whose first product then need
    not wait for it: 5% at d128 causal, 512 and 1024 (measured), 0 from 4096.
    """
    STAGES_K: gl.constexpr = C.stages_k
    CONSUMERS: gl.constexpr = C.consumers
    BLOCK_N: gl.constexpr = C.block_n
    q_smem, k_smem, _v, _out, tile_smem, q_full, q_empty, k_full, k_empty, _full, _empty = shared
    tiles, tiles_m, nheads, heads, group_size, section, seqlen_q, seqlen_k, Blocks = sizes
    if C.packed:
        tiles_m = gl.load(Blocks)
        tiles = tiles_m * nheads
    index = gl.program_id(0)
    t = 0  # tiles begun so far
    n = 0  # blocks loaded so far
    row_v, entry_v, head_v, seqlen_v = 0, 0, 0, 0  # of the block whose v is to come
    while index < tiles:
        if C.packed:
            i, _zero, head = locate(index, tiles_m, nheads, nheads, section, False)
            start_m, batch, entry_q, rows_q, seqlen_q, entry_k, _rows, seqlen_k = place_at(
                Blocks, i
            )
        else:
            tile_m, batch, head = locate(index, tiles_m, nheads, heads, section, C.causal)
            start_m = tile_m * (ROWS * CONSUMERS)
            entry_q = batch
            entry_k = batch
        head_k = head // group_size
        begin, _, _, end = blocks_of(start_m, seqlen_q, seqlen_k, window_left, window_right,
                                     ROWS * CONSUMERS, BLOCK_N, C.causal)  # fmt: skip
        if BlockLists is not None:
            begin = 0
            end, entries = listed(BlockLists, batch, head, start_m, C)
        blocks = end - begin
        following = index + gl.num_programs(0)
        for i in range(blocks):
            row = (end - 1 - i) * BLOCK_N
            if BlockLists is not None:
                row, _partial = visited(entries, row, C.size_k)
            mbarrier.wait(k_empty.index(n % STAGES_K), n // STAGES_K & 1 ^ 1)
            fill(K, entry_k, head_k, row, seqlen_k, k_full.index(n % STAGES_K), k_smem,
                 n % STAGES_K, C.parts)  # fmt: skip
            if n > 0:  # before q, which may wait for the end of the tile before this one
                fill_v(V, entry_v, head_v, row_v, seqlen_v, shared, n - 1, C)
            row_v, entry_v, head_v, seqlen_v = row, entry_k, head_k, seqlen_k
            if i == 0:  # q behind k, whose memory is free earlier
                for w in gl.static_range(CONSUMERS):
                    slot, phase = slot_of_q(t, w, C)
                    mbarrier.wait(q_empty.index(slot), phase ^ 1)
                    if C.packed:
                        publish(tile_smem, slot, (start_m, batch, head, entry_q, rows_q, seqlen_q,
                                                  seqlen_k))  # fmt: skip
                    else:
                        publish(tile_smem, slot, (start_m, batch, head))
                    thread_barrier()
                    ready, _phase = full_of_q(t, w, C)
                    fill(Q, entry_q, head, start_m + w * ROWS, seqlen_q, q_full.index(ready),
                         q_smem, slot, C.parts)  # fmt: skip
            if C.dynamic:
                # Behind the last load the next tile would wait for the counter: 303 against 322 at
                # d128 causal, 512. Much earlier, long tiles would be shared out before it is known
                # who is done first. Every tile has one such step.
                if i == gl.maximum(blocks - 3, 0):
                    following = gl.num_programs(0) + draw(Counter, tiles, C)
            n += 1
        t += 1
        index = following
    if n > 0:
        fill_v(V, entry_v, head_v, row_v, seqlen_v, shared, n - 1, C)
    for w in gl.static_range(CONSUMERS):
        slot, phase = slot_of_q(t, w, C)
        mbarrier.wait(q_empty.index(slot), phase ^ 1)
        if C.packed:
            publish(tile_smem, slot, (-1, 0, 0, 0, 0, 0, 0))
        else:
            publish(tile_smem, slot, (-1, 0, 0))
        ready, _phase = full_of_q(t, w, C)
        mbarrier.arrive(q_full.index(ready), count=1)


@gluon.jit
def full_of_q(t, W: gl.constexpr, C: gl.constexpr):
    """The barrier that says that warpgroup W has the q of its t-th tile, and its phase.

    Warpgroups have their own even if they share slots: parities are all that a wait knows, so one
    for a slot's second use would pass while the first is not over. The producer is never two uses
    ahead, as it has waited until all have released blocks of k that they used with the first.
    """
    return t % C.stages_q * C.consumers + W, t // C.stages_q & 1


@gluon.jit
def slot_of_q(t, W: gl.constexpr, C: gl.constexpr):
    """Where that q is, and the phase of the barrier that says that the slot is empty."""
    if C.slots_q % C.consumers == 0:
        slot, phase = full_of_q(t, W, C)
    else:
        slot = (t * C.consumers + W) % C.slots_q
        phase = (t * C.consumers + W) // C.slots_q & 1
    return slot, phase


@gluon.jit
def draw(Counter, tiles, C: gl.constexpr):
    """How many tiles were drawn before; there is one draw a tile, the last of which leaves 0."""
    drawn = gl.atomic_add(Counter, 1, sem="relaxed")  # nothing else is told by it
    if drawn == tiles - 1:
        gl.atomic_xchg(Counter, 0)
    return drawn


@gluon.jit
def fill(descs, entry, head, row, seqlen, bar, smem, slot, PARTS: gl.constexpr):
    """Load a tile, in parts of columns, and have bar wait for all of it."""
    if PARTS == 1:
        mbarrier.expect(bar, descs[0].block_type.nbytes)
    else:
        mbarrier.expect(bar, descs[0].block_type.nbytes + descs[1].block_type.nbytes)
        load(descs[1], entry, head, row, seqlen, bar, smem[1].index(slot),
             descs[0].block_type.shape[-1])  # fmt: skip
    load(descs[0], entry, head, row, seqlen, bar, smem[0].index(slot))


@gluon.jit
def fill_v(V, entry, head, row, seqlen, shared, p, C: gl.constexpr):
    """Load v of block p of all that are loaded."""
    v_smem, v_full, v_empty = shared[2], shared[9], shared[10]
    mbarrier.wait(v_empty.index(p % C.stages), p // C.stages & 1 ^ 1)
    fill(V, entry, head, row, seqlen, v_full.index(p % C.stages), v_smem, p % C.stages, C.parts_v)


@gluon.jit
def publish(tile_smem, slot, fields):
    """Tell a warpgroup its tile, so that it is spared the divisions; start_m < 0: there is none."""
    ONE: gl.constexpr = _one(1)
    for i in gl.static_range(len(fields)):
        tile_smem.index(len(fields) * slot + i).store(gl.full([1], fields[i], gl.int32, ONE))


@gluon.constexpr_function
def _one(num_warps):
    """The layout of a single value that every thread has."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@gluon.jit
def read(tile_smem, i):
    """Entry i of what was published."""
    return gl.max(tile_smem.index(i).load(_one(4)), 0)


@gluon.jit
def consumer(shared, Out, Lse, Counter, ScoreMods, MaskMod, Sinks, BlockLists, softmax_scale, sizes,
             window_left, window_right, W: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """Warpgroup W: rows [64 W, 64 W + 64) of every tile."""
    STAGES: gl.constexpr = C.stages
    STAGES_K: gl.constexpr = C.stages_k
    CONSUMERS: gl.constexpr = C.consumers
    BLOCK_N: gl.constexpr = C.block_n
    Q_IN_REGISTERS: gl.constexpr = C.q_in_registers
    PARTS: gl.constexpr = C.parts
    PARTS_V: gl.constexpr = C.parts_v
    q_smem, k_smem, v_smem, o_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = (
        shared
    )
    nheads, seqlen_q, seqlen_k, Blocks = sizes[2], sizes[6], sizes[7], sizes[8]
    total_q = None
    if C.packed:
        total_q = gl.load(Blocks + 1)
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    HALVES: gl.constexpr = C.q_in_registers and (C.half_q or q_smem[0].shape[-1] == 256)
    LAYOUT_Q: gl.constexpr = gl.DotOperandLayout(0, LAYOUT_S, 2)
    scale_log2 = softmax_scale * C.scale_sign * LOG2_E
    if C.scale_sign == 0:
        scale_log2 = 1.0
    FUSED: gl.constexpr = ScoreMods is not None and len(ScoreMods[0]) == 3
    if ScoreMods is not None and not FUSED:  # which get scores in natural units
        scale_log2 = 1.0 if C.base_2 else LOG2_E
    constant = softmax_scale
    LISTS: gl.constexpr = BlockLists is not None
    WINDOW: gl.constexpr = window_left is not None or window_right is not None
    bars = (k_full, k_empty, v_full, v_empty)

    t = 0
    n = 0
    # Else v of a block that one warpgroup passes by would come behind k of the next one, for which
    # the other has to have its turn.
    gl.static_assert(not C.turns or (STAGES > 1 and STAGES_K > 1))
    if C.turns and W == 0:  # the first turn is warpgroup 0's
        pass_turn(CONSUMERS - 1, CONSUMERS)
    mbarrier.wait(q_full.index(W), 0)
    start_m = read(tile_smem, C.fields * W)
    while start_m >= 0:
        q_slot, _phase = slot_of_q(t, W, C)
        batch = read(tile_smem, C.fields * q_slot + 1)
        head = read(tile_smem, C.fields * q_slot + 2)
        entry_q = batch
        rows_q = seqlen_q
        if C.packed:
            entry_q = read(tile_smem, C.fields * q_slot + 3)
            rows_q = read(tile_smem, C.fields * q_slot + 4)
            seqlen_q = read(tile_smem, C.fields * q_slot + 5)
            seqlen_k = read(tile_smem, C.fields * q_slot + 6)
        if FUSED:
            scale_log2, constant = ScoreMods[0][2](batch, head, softmax_scale, ScoreMods[0][1])
            scale_log2 *= LOG2_E
        first, _, _, last = blocks_of(start_m, seqlen_q, seqlen_k, window_left, window_right,
                                      ROWS * CONSUMERS, BLOCK_N, C.causal)  # fmt: skip
        start_m += W * ROWS
        begin, inner, full, end = blocks_of(start_m, seqlen_q, seqlen_k, window_left, window_right,
                                           ROWS, BLOCK_N, C.causal)  # fmt: skip
        if LISTS:
            first, begin = 0, 0
            last, entries = listed(BlockLists, batch, head, start_m, C)
            end = last
        if start_m >= seqlen_q:  # queries that do not exist
            begin, end = first, first + 1
        n = pass_by(last - end, n, bars, W, C)  # later than all of this warpgroup's queries

        if PARTS == 2:
            q = (tile(q_smem[0], q_slot), tile(q_smem[1], q_slot))
        elif HALVES:
            q = halves(tile(q_smem[0], q_slot))
        else:
            q = (tile(q_smem[0], q_slot),)
        if Q_IN_REGISTERS:
            if len(q) == 2:
                q = (q[0].load(LAYOUT_Q), q[1])
            else:
                q = (q[0].load(LAYOUT_Q),)
        if Q_IN_REGISTERS and len(q) == 1:
            mbarrier.arrive(q_empty.index(q_slot), count=1)
        q_idx = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT_S))[:, None]
        if ScoreMods is not None or MaskMod is not None:
            length_q, length_k = seqlen_q, seqlen_k
            if C.packed:  # of sequences of nothing, what stands for them in index 0
                length_q, length_k = gl.maximum(seqlen_q, 1), gl.maximum(seqlen_k, 1)
            q_idx = gl.minimum(q_idx, length_q - 1)  # so that what users load by it exists
        mbarrier.wait(k_full.index(n % STAGES_K), n // STAGES_K & 1)
        if C.turns:
            await_turn(W)
        s = scores(q, k_smem, n % STAGES_K, LAYOUT_S)
        if C.turns:
            pass_turn(W, CONSUMERS)
        s = warpgroup_mma_wait(0, deps=(s,))
        release(k_empty.index(n % STAGES_K))
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT_S))
        s = signed(s, C.scale_sign)
        start_n = (end - 1) * BLOCK_N
        if LISTS:
            start_n, _partial = visited(entries, start_n, C.size_k)
        if ScoreMods is not None:
            s = modified(s, constant, batch, head, q_idx, start_n, length_q, length_k, ScoreMods,
                         False, C.base_2)  # fmt: skip
        if WINDOW:
            s = mask(s, q_idx, start_n, seqlen_q, seqlen_k, window_left, window_right, C.causal)
        elif C.causal or C.check_keys:
            s = mask_at_the_end(s, q_idx, start_n, seqlen_q, seqlen_k, C.causal)
        if MaskMod is not None:
            seen = shown(batch, head, q_idx, keys_of(s, start_n), length_q, length_k, MaskMod)
            s = gl.where(seen, s, float("-inf"))
        HIDES: gl.constexpr = (
            C.causal or C.check_keys or WINDOW or MaskMod is not None or can_hide(ScoreMods)
        )
        m_i, p, _alpha = weights(s, m_i, scale_log2, HIDES, 0.0, C)
        l_i = sum_of_lanes(p)
        p = p.to(v_smem[0].dtype)
        if PARTS_V == 1:
            acc = (zeros(v_smem[0]),)
        else:
            acc = (zeros(v_smem[0]), zeros(v_smem[1]))

        for i in range(1, end - begin):
            block = end - 1 - i
            start_n = block * BLOCK_N
            edge = block >= full
            if window_left is not None:
                edge = edge | (block < inner)
            if LISTS:
                start_n, edge = visited(entries, start_n, C.size_k)
            acc, m_i, l_i, p = step(q, k_smem, v_smem, bars, n, acc, m_i, l_i, p, constant,
                                    scale_log2, batch, head, q_idx, start_n, edge, seqlen_q,
                                    seqlen_k, window_left, window_right, ScoreMods, MaskMod,
                                    LAYOUT_S, W, C)  # fmt: skip
            n += 1
        if not C.alias and not (Q_IN_REGISTERS and len(q) == 1):
            mbarrier.arrive(q_empty.index(q_slot), count=1)
        mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
        acc = add_products(operands(p, acc), tiles_of(v_smem, n % STAGES), acc)
        l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, LAYOUT_S))
        if C.kept:  # also where a sum is NaN
            flags = Counter + FLAG + gl.zeros_like(l_i).to(gl.int32)
            gl.store(flags, gl.full_like(l_i, 1.0).to(gl.int32), mask=not_within(l_i))
        sink = None
        if Sinks is not None:
            sink = gl.load(Sinks + head).to(gl.float32)
        lse, normaliser = finish(m_i, l_i, sink)
        acc = finished(acc)
        release(v_empty.index(n % STAGES))
        n += 1
        if window_left is not None:
            n = pass_by(begin - first, n, bars, W, C)  # before all of their windows

        if C.alias:  # q's slot, computed again, as registers are scarce
            o_slot, _phase = slot_of_q(opaque(t), W, C)
        else:
            o_slot = W
            tma.store_wait(0)  # the tile before this one
        for part in gl.static_range(PARTS_V):
            factor = gl.convert_layout(normaliser, gl.SliceLayout(1, acc[part].type.layout))
            out = (acc[part] * factor[:, None]).to(v_smem[0].dtype)
            if C.used_q:
                rows = gl.arange(0, ROWS, gl.SliceLayout(1, acc[part].type.layout))
                out = gl.where((rows < seqlen_q - start_m)[:, None], out, 0.0)
            tile(o_smem[part], o_slot).store(out)
        fence_async_shared()
        for part in gl.static_range(PARTS_V):
            store(Out[part], entry_q, head, start_m, rows_q, o_smem[part].index(o_slot),
                  part * v_smem[0].shape[-1])  # fmt: skip
        offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT_S))
        if C.used_q:
            lse = gl.where(offs_m < seqlen_q - start_m, lse, float("-inf"))
        lse_row = Lse + lse_offset(batch, head, entry_q, nheads, seqlen_q, total_q) + start_m
        gl.store(lse_row + offs_m, lse, mask=offs_m < rows_q - start_m)

        if C.alias:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(o_slot), count=1)
        t += 1
        ready, phase = full_of_q(t, W, C)
        mbarrier.wait(q_full.index(ready), phase)
        q_slot, _phase = slot_of_q(t, W, C)
        start_m = read(tile_smem, C.fields * q_slot)
    tma.store_wait(0)


@gluon.jit
def pass_by(count, n, bars, W: gl.constexpr, C: gl.constexpr):
    """Release blocks that only other warpgroups need; the number of the block behind them."""
    k_full, k_empty, v_full, v_empty = bars
    for _ in range(count):
        mbarrier.wait(k_full.index(n % C.stages_k), n // C.stages_k & 1)
        release(k_empty.index(n % C.stages_k))
        mbarrier.wait(v_full.index(n % C.stages), n // C.stages & 1)
        release(v_empty.index(n % C.stages))
        if C.turns:
            await_turn(W)
            pass_turn(W, C.consumers)
        n += 1
    return n


@gluon.jit
def release(bar):
    """This warpgroup has read a slot: each of its threads arrives.

    mbarrier.arrive would be one arrival, behind a barrier that holds all four warps up.
    """
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def await_turn(W: gl.constexpr):
    """Until the warpgroup before this one has begun its products. All have as many turns a tile."""
    gl.inline_asm_elementwise(_TURN("sync", W), "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(W: gl.constexpr, CONSUMERS: gl.constexpr):
    """To the next warpgroup, whose softmax will run beside this one's products."""
    NEXT: gl.constexpr = (W + 1) % CONSUMERS
    gl.inline_asm_elementwise(_TURN("arrive", NEXT), "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _TURN(kind, w):
    # One of the hardware's barriers for each warpgroup; Triton uses them from 0 upwards.
    return f"barrier.{kind} {12 + w}, 256; mov.u32 $0, 0;"


@gluon.jit
def halves(x):
    """The left and the right columns of a tile."""
    HALF: gl.constexpr = x.shape[1] // 2
    return x.slice(0, HALF, 1), x.slice(HALF, HALF, 1)


@gluon.jit
def scores(q, k_smem, slot, LAYOUT_S: gl.constexpr):
    """q k^T, begun."""
    BLOCK_N: gl.constexpr = k_smem[0].shape[-2]
    k = tiles_of(k_smem, slot)
    if len(k) < len(q):
        k = halves(k[0])
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT_S)
    return products(q, k, s, False)


@gluon.jit
def zeros(v_smem):
    """An accumulator of out."""
    WIDTH: gl.constexpr = v_smem.shape[-1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    return gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)


@gluon.jit
def step(q, k_smem, v_smem, bars, n, acc, m_i, l_i, p, constant, scale_log2, batch, head, q_idx,
         start_n, edge, seqlen_q, seqlen_k, window_left, window_right, ScoreMods, MaskMod,
         LAYOUT_S: gl.constexpr, W: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """Scores and softmax of block n + 1 while p v of block n runs."""
    STAGES: gl.constexpr = C.stages
    STAGES_K: gl.constexpr = C.stages_k
    k_full, k_empty, v_full, v_empty = bars
    slot = n % STAGES
    next_slot = (n + 1) % STAGES_K
    mbarrier.wait(k_full.index(next_slot), (n + 1) // STAGES_K & 1)
    if C.turns:
        await_turn(W)
    s = scores(q, k_smem, next_slot, LAYOUT_S)
    mbarrier.wait(v_full.index(slot), n // STAGES & 1)
    acc = add_products(operands(p, acc), tiles_of(v_smem, slot), acc)
    if C.turns:
        pass_turn(W, C.consumers)
    s = warpgroup_mma_wait(C.parts_v, deps=(s,))
    release(k_empty.index(next_slot))
    s = signed(s, C.scale_sign)
    # Keys past the end are in the first block alone, but where it is a part of a listed one.
    INSIDE: gl.constexpr = C.size_k is None or C.size_k == C.block_n
    if ScoreMods is not None:
        s = modified(s, constant, batch, head, q_idx, start_n, seqlen_q, seqlen_k, ScoreMods,
                     INSIDE, C.base_2)  # fmt: skip
    WINDOW: gl.constexpr = window_left is not None or window_right is not None
    EDGES: gl.constexpr = C.edges or WINDOW or (not INSIDE and C.check_keys)
    if EDGES:
        if edge:  # only blocks on the edge of the mask pay for it
            start = start_n
            if ScoreMods is not None:
                # Of indices that are there already LLVM would make comparisons in every block.
                start = opaque(start_n)
            s = mask(s, q_idx, start, seqlen_q, seqlen_k, window_left, window_right, C.causal)
    if MaskMod is not None:
        if C.size_k is None:
            edge = True
        if edge:
            seen = shown(batch, head, q_idx, keys_of(s, start_n), seqlen_q, seqlen_k, MaskMod,
                         INSIDE)  # fmt: skip
            s = gl.where(seen, s, float("-inf"))
    HIDES: gl.constexpr = EDGES or MaskMod is not None or can_hide(ScoreMods)
    m_i, p, alpha = weights(s, m_i, scale_log2, HIDES, SLACK, C)
    if C.settled:
        l_i += sum_of_lanes(p)
    else:
        alpha_of_lanes = gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))
        l_i = l_i * alpha_of_lanes[:, None] + sum_of_lanes(p)
    # ptxas would move the wait for p v above the softmax, which then would not overlap it. But it
    # moves no wait over a branch, which both of these are.
    if C.hold:
        l_i = held(l_i)
    else:  # over already; what ptxas keeps above it is the maximum alone
        mbarrier.wait(v_full.index(slot), n // STAGES & 1)
    acc = finished(acc)
    release(v_empty.index(slot))
    p = p.to(v_smem[0].dtype)
    if not C.settled:
        if C.parts_v == 1:
            acc = (rescaled(acc[0], alpha),)
        else:
            acc = (rescaled(acc[0], alpha), rescaled(acc[1], alpha))
    return acc, m_i, l_i, p


@gluon.jit(do_not_specialize=["tiles", "tiles_m", "nheads", "heads", "group_size", "section",
                              "seqlen_q", "seqlen_k", "window_left", "window_right",
                              "BlockLists"])  # fmt: skip
def forward_kernel(Q, K, V, Out, Q1, K1, V1, Out1, Lse, Counter, Blocks, ScoreMods, MaskMod, Sinks,
                   BlockLists, softmax_scale, tiles, tiles_m, nheads, heads, group_size, section,
                   seqlen_q, seqlen_k, window_left, window_right, C: gl.constexpr):  # fmt: skip
    """One program a multiprocessor; program i begins with tile i.

    Q1, K1, V1 and Out1 have the columns behind those of Q, K, V and Out, where there are parts.
    Blocks is the list of tiles of packed sequences, whose number is total_q, else None.
    """
    if C.behind:
        # By atomics, which one thread does for all: no warp may see what a later one put down.
        if gl.atomic_add(Counter + FLAG, 0) == 0:
            return
        if gl.atomic_add(Counter + TICKET, 1) == gl.num_programs(0) - 1:  # all have seen it
            gl.atomic_xchg(Counter + FLAG, 0)
            gl.atomic_xchg(Counter + TICKET, 0)
    STAGES: gl.constexpr = C.stages
    STAGES_K: gl.constexpr = C.stages_k
    CONSUMERS: gl.constexpr = C.consumers
    SLOTS_Q: gl.constexpr = C.slots_q
    if C.parts == 1:
        Q_K = ((Q,), (K,))
    else:
        Q_K = ((Q, Q1), (K, K1))
    if C.parts_v == 1:
        V_Out = ((V,), (Out,))
    else:
        V_Out = ((V, V1), (Out, Out1))
    q_smem = rings(Q_K[0], SLOTS_Q)
    k_smem = rings(Q_K[1], STAGES_K)
    v_smem = rings(V_Out[0], STAGES)
    if C.alias:  # out leaves through q's buffer
        o_smem = q_smem
    else:
        o_smem = rings(V_Out[1], CONSUMERS)
    tile_smem = gl.allocate_shared_memory(
        gl.int32, [C.fields * SLOTS_Q, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    q_full = barriers(C.stages_q * CONSUMERS, 1)
    q_empty = barriers(SLOTS_Q, 1)
    k_full = barriers(STAGES_K, 1)
    k_empty = barriers(STAGES_K, THREADS * CONSUMERS)
    v_full = barriers(STAGES, 1)
    v_empty = barriers(STAGES, THREADS * CONSUMERS)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, o_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full,
              v_empty)  # fmt: skip
    sizes = (tiles, tiles_m, nheads, heads, group_size, section, seqlen_q, seqlen_k, Blocks)
    # A tuple with constexprs must be written where it is used, or they become tensors.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 0, C)),
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 1, C)),
                (producer, (shared, Q_K[0], Q_K[1], V_Out[0], Counter, BlockLists, sizes,
                            window_left, window_right, C)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 0, C)),
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 1, C)),
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 2, C)),
                (producer, (shared, Q_K[0], Q_K[1], V_Out[0], Counter, BlockLists, sizes,
                            window_left, window_right, C)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 0, C)),
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 1, C)),
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 2, C)),
                (consumer, (shared, V_Out[1], Lse, Counter, ScoreMods, MaskMod, Sinks,
                            BlockLists, softmax_scale, sizes, window_left, window_right, 3, C)),
                (producer, (shared, Q_K[0], Q_K[1], V_Out[0], Counter, BlockLists, sizes,
                            window_left, window_right, C)),
            ],
            [4, 4, 4, 1],
            [112, 112, 112, 32],
        )  # fmt: skip


# Threads that share a stream share its flag: nothing of theirs may come between the two kernels.
_PAIR = Lock()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    extras: tuple[torch.Tensor, ...] = (),
    sequences: Sequences = NOT_PACKED,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse float32 `(batch, nheads, seqlen_q)`.

    Packed: out `(total_q, nheads, headdim_v)`, lse `(nheads, total_q)`. q, k and v lie so that TMA
    can read them (`spec.tma`).
    """
    out = q.new_empty((*q.shape[:-1], spec.headdim_v))
    lse = q.new_empty(spec.lse_shape(q), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, []
    # Without keys there is nothing to run, but that unused rows have no sink.
    if k.numel() == 0 and not (spec.features.sinks and sequences.seqused_q is not None):
        sinks = extras[-1][:, None] if spec.features.sinks else lse.new_tensor(float("-inf"))
        return out.zero_(), lse.copy_(sinks.expand_as(lse)), []
    if k.numel() == 0:
        k = v = q  # of which nothing is read
    launch, behind, list_tiles = _prepare(
        spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(), kinds(*extras),
        sequences.given, _of_one_another(sequences),
    )  # fmt: skip
    blocks = None
    if list_tiles is not None:
        most = most_blocks(q.shape[0], spec.batch, ROWS.value * launch.config.consumers)
        blocks = list_blocks(list_tiles, q, k, sequences, most, q.shape[0])
    schedule = launch.constexprs[0]
    counter = counter_for(q.device) if schedule.dynamic or schedule.kept else lse
    arguments = (q, k, v, out, q, k, v, out, lse, counter, blocks, *extras)
    with nullcontext() if launch.compiled else mods.explained(spec.features):
        if behind is None:
            launch(*arguments)
        else:
            with _PAIR:
                launch(*arguments)
                behind(*arguments)
    return out, lse, []


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: torch.device,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
    kinds_of_extras: tuple[object, ...],
    given: tuple[bool, ...],
    self_attention: bool,
) -> tuple[Launch, Launch | None, Launch | None]:
    """The launch, that behind it where a maximum is kept, and that of packed sequences' list."""
    config = tuning_v3.forward(spec, target)
    block_m = ROWS.value * config.consumers
    packed = spec.varlen is not None
    if packed:
        tiles_m = 0  # the list tells
        heads = spec.nheads
        programs = target.num_sms
        of_queries: tuple[int, ...] = (spec.nheads,)
        of_keys: tuple[int, ...] = (spec.nheads_k,)
        stride_o = (spec.nheads * spec.headdim_v, spec.headdim_v, 1)
    else:
        tiles_m = -(-spec.seqlen_q // block_m)
        heads = spec.batch * spec.nheads
        programs = min(tiles_m * heads, target.num_sms)
        of_queries = (spec.batch, spec.seqlen_q, spec.nheads)
        of_keys = (spec.batch, spec.seqlen_k, spec.nheads_k)
        stride_o = strides_of(spec.seqlen_q, spec.nheads, spec.headdim_v)
    tiles = tiles_m * heads
    tensors = (
        ((*of_queries, spec.headdim), stride_q, ROWS.value, config.widths),
        ((*of_keys, spec.headdim), stride_k, config.block_n, config.widths),
        ((*of_keys, spec.headdim_v), stride_v, config.block_n, config.widths_v),
        ((*of_queries, spec.headdim_v), stride_o, ROWS.value, config.widths_v),
    )
    sign = (spec.softmax_scale > 0) - (spec.softmax_scale < 0)
    base_2 = mods.in_base_2(spec.features)
    if spec.features.score_mods and not base_2:  # which scale by themselves
        sign = 1
    size_q, size_k = mods.block_sizes(spec.features)
    # The diagonal then begins at a block's corner, and every row has a key in its first block.
    shift = spec.seqlen_k - spec.seqlen_q
    whole = self_attention if packed else shift >= 0 and shift % config.block_n == 0
    whole = whole and spec.features.blocks is None
    schedule = Schedule(
        block_n=config.block_n,
        stages=config.stages,
        stages_k=config.stages_k,
        slots_q=config.slots_q,
        consumers=config.consumers,
        dynamic=config.dynamic,
        hold=config.hold,
        turns=config.turns,
        q_in_registers=config.q_in_registers,
        half_q=config.half_q,
        alias=config.alias,
        bounded=config.bounded,
        kept=config.kept and not config.bounded and _seen_at_once(spec, whole, given[2]),
        behind=False,
        parts=len(config.widths),
        parts_v=len(config.widths_v),
        causal=spec.causal,
        check_keys=packed or spec.seqlen_k % config.block_n != 0,
        edges=spec.causal and not whole,
        scale_sign=sign,
        base_2=base_2,
        size_q=size_q,
        size_k=size_k,
        packed=packed,
        used_q=given[2],
    )
    views = tuple(
        (ragged_view if packed else view)(shape, stride, rows, widths[part], spec.dtype)
        for part in (0, -1)  # the second is the first again where there is only one
        for shape, stride, rows, widths in tensors
    )
    scalars = (spec.softmax_scale, tiles, tiles_m, spec.nheads, heads, spec.group_size,
               min(config.section, heads), spec.seqlen_q, spec.seqlen_k,
               spec.features.window_left, spec.features.window_right)  # fmt: skip
    arrange = partial(_arguments, spec, tuning_v3.fuses(spec))
    launch, behind = (
        Launch(forward_kernel, programs, scalars, (of,), config, views, arrange)
        for of in (schedule, replace(schedule, kept=False, behind=True))
    )
    return (
        launch,
        behind if schedule.kept else None,
        list_launch(spec, block_m, of_keys=False) if packed else None,
    )


def _seen_at_once(spec: AttentionSpec, whole: bool, used_q: bool) -> bool:
    """Whether rows see a key of their first block for certain; rows not used may hold anything."""
    features = spec.features
    if features.mask_mod is not None or features.blocks is not None or used_q:
        return False
    if spec.causal:  # each its own
        return whole and features.window_right is None
    return features.window_left is None and features.window_right is None


def _of_one_another(sequences: Sequences) -> bool:
    """Whether every sequence certainly has as many keys as queries."""
    cu_seqlens_q, cu_seqlens_k, *used = sequences
    return (
        cu_seqlens_q is not None
        and cu_seqlens_k is not None
        and cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr()
        and used == [None, None]
    )


def _arguments(
    spec: AttentionSpec, fused: bool, lse: Any, counter: Any, blocks: Any, *extras: Any
) -> tuple[Any, ...]:
    """The kernel's arguments behind its descriptors."""
    features = spec.features
    sinks = extras[-1] if features.sinks else None
    if fused:
        modifications = mods.fused_forward(features, extras)
    elif mods.in_base_2(features):
        modifications = mods.base_2_forward(features, extras, spec.softmax_scale)
    else:
        modifications = mods.for_forward(features, extras, approximate=True)
    return lse, counter, blocks, *modifications, sinks, mods.key_lists(features, extras)
