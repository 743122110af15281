"""What both schedules of v3's backward share: kernels around, the walk, and the warps beside.

A kernel before makes lse in base 2 and delta = rowsum(out * dout) - dlse and zeroes the sums of dq;
one behind rounds them to dq, unless programs finish dq (backward.py). A program owns a block of
keys of one key head and walks the queries of all heads that share it: a warp loads q, dout, lse and
delta through rings, another adds dq to float32 sums in memory by TMA. Programs may walk several
such tiles, see `tiles_of_program`.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
)

from triflash.kernels.common.blocks import block_list, most_listed, rank, visited
from triflash.kernels.common.mask import key_begin, key_range, query_end, query_range, visible
from triflash.kernels.common.mods import derive, modify, shown
from triflash.kernels.common.softmax import LOG2_E, lse_to_log2
from triflash.kernels.common.varlen import PACKED, lse_offset
from triflash.kernels.v3.packed import place_at, place_of_block
from triflash.kernels.v3.tma import (
    async_load,
    async_store,
    expect,
    fence_async_global,
    load_parts,
    reduce_add,
    reinterpret,
    store,
    store_parts,
    wait_for_reductions,
)


@dataclass(frozen=True)
class Schedule:
    """What a kernel is compiled for; fields of tuning_v3.HopperBackwardConfig mean the same."""

    block_m: int
    block_n: int
    width: int
    width_v: int
    halves: bool
    ahead: bool
    stages: int
    dout_stages: int
    late_dp: bool
    late_dv: bool
    fused: bool
    fenced: bool
    fold: bool
    both: bool
    release: bool
    lag: bool
    backwards: bool
    causal: bool
    check_keys: bool  # the last block of keys has some past seqlen_k
    gqa: bool
    deterministic: bool  # programs add to a tile of dq in the order of their keys
    packed: bool
    inside: bool  # all queries and keys of all tiles exist; modifications want to know
    scatter: bool  # gradients of aux are wanted
    rows: int  # of Stats and Sums, a head's fill a multiple of it
    size_q: int | None  # of a block mask's blocks
    size_k: int | None
    persistent: bool  # programs walk several tiles of keys
    whole_heads: bool  # those of a head, one program
    ordered: bool  # programs finish dq, see `add_in_turn`
    kv_stages: int
    splits: int  # of nheads_k that the kernel is told, so many have the same keys


KEYS = gl.constexpr(64)  # of a tile of k or v, the rows of one wgmma
PART = gl.constexpr(64)  # dq is computed and added to in parts of [PART, PART], or half as wide
PART_ROWS = gl.constexpr(32)  # a part as rows of PART_COLUMNS for TMA, or half as many
PART_COLUMNS = gl.constexpr(128)
DQ_BUFFERS = gl.constexpr(2)  # a part each, one of either warpgroup that makes dq

# Parameters of the kernels that programs are not compiled anew for.
UNSPECIALIZED = [
    "nheads", "nheads_k", "group_size", "seqlen_q", "seqlen_k", "window_left", "window_right",
    "tiles", "section",
]  # fmt: skip


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "total_q", "sequences"],
            do_not_specialize_on_alignment=PACKED)  # fmt: skip
def before_kernel(Out, dOut, Lse, dLse, Stats, Sums, CuSeqlensQ, SeqUsedQ, total_q, stride_ob,
                  stride_os, stride_oh, stride_gb, stride_gs, stride_gh, nheads, seqlen_q,
                  sequences, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr,
                  ROWS: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """One tile of queries: lse in base 2 and delta to Stats [2, BLOCK_M], and zero to its sums.

    A head has tiles up to a multiple of ROWS. Sums are left alone if not ZERO. BLOCK_DV is a power
    of two, BLOCK_D that or 3/2 of one.
    """
    pid = tl.program_id(0)
    if CuSeqlensQ is None:
        tiles_m = tl.cdiv(seqlen_q, ROWS) * (ROWS // BLOCK_M)
        batch = (pid // tiles_m // nheads).to(tl.int64)
        head = (pid // tiles_m % nheads).to(tl.int64)
        start_m = pid % tiles_m * BLOCK_M
    else:
        most = total_q // BLOCK_M + sequences  # as most_blocks has it
        head = (pid // most).to(tl.int64)
        start_m, batch, rows, seqlen_q = place_of_block(
            CuSeqlensQ, SeqUsedQ, pid % most, sequences, total_q, BLOCK_M
        )
        batch = batch.to(tl.int64)
        if start_m >= rows:
            return
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    exist = offs_m < seqlen_q
    inside = exist[:, None] & (offs_d < HEADDIM_V)[None, :]
    Out += batch * stride_ob + head * stride_oh
    dOut += batch * stride_gb + head * stride_gh
    rows = offs_m.to(tl.int64)[:, None]
    out = tl.load(Out + rows * stride_os + offs_d[None, :], mask=inside, other=0.0)
    dout = tl.load(dOut + rows * stride_gs + offs_d[None, :], mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = lse_offset(batch, head, batch, nheads, seqlen_q, total_q)
    lse = tl.load(Lse + row + offs_m, mask=exist, other=float("-inf"))
    if HAS_DLSE:  # d lse / d scores = p, so dlse joins delta with the opposite sign
        delta -= tl.load(dLse + row + offs_m, mask=exist, other=0.0)
    stats = Stats + pid.to(tl.int64) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(stats, lse_to_log2(lse))  # +inf also for rows past the end: their p is 0
    tl.store(stats + BLOCK_M, -delta)
    if ZERO:
        sums = Sums + pid.to(tl.int64) * (BLOCK_M * BLOCK_D)
        REST: tl.constexpr = BLOCK_D % 64 if BLOCK_D < 128 else BLOCK_D % 128
        SIZE: tl.constexpr = BLOCK_M * (BLOCK_D - REST)
        tl.store(sums + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32))
        if REST > 0:
            rest = tl.arange(0, BLOCK_M * REST)
            tl.store(sums + SIZE + rest, tl.zeros([BLOCK_M * REST], tl.float32))


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "total_q", "sequences"],
            do_not_specialize_on_alignment=PACKED)  # fmt: skip
def after_kernel(Sums, dQ, CuSeqlensQ, total_q, softmax_scale, stride_dqb, stride_dqs, stride_dqh,
                 nheads, seqlen_q, sequences, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """One part of the sums to dq `(batch, seqlen_q, nheads, headdim)`; no strides: contiguous."""
    WIDTH: tl.constexpr = 64 if BLOCK_D % 64 == 0 else 32
    PARTS: tl.constexpr = BLOCK_M // 64 * (BLOCK_D // WIDTH)
    pid = tl.program_id(0)
    part = pid % PARTS
    if stride_dqs is None:
        stride_dqh = HEADDIM
        stride_dqs = nheads * HEADDIM
    if CuSeqlensQ is None:
        tiles_m = tl.cdiv(seqlen_q, ROWS) * (ROWS // BLOCK_M)
        start_m = pid // PARTS % tiles_m * BLOCK_M
        row = pid // PARTS // tiles_m
        head = row % nheads
        if stride_dqb is None:
            entry = (row // nheads).to(tl.int64) * seqlen_q * nheads * HEADDIM
        else:
            entry = (row // nheads).to(tl.int64) * stride_dqb
    else:
        most = total_q // BLOCK_M + sequences  # as most_blocks has it
        head = pid // PARTS // most
        start_m, batch, seqlen_q, _ = place_of_block(
            CuSeqlensQ, None, pid // PARTS % most, sequences, total_q, BLOCK_M
        )
        entry = batch.to(tl.int64) * stride_dqs
        if start_m >= seqlen_q:
            return
    offs_m = start_m + part // (BLOCK_D // WIDTH) * 64 + tl.arange(0, 64)
    offs_d = part % (BLOCK_D // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    packed = tl.load(Sums + pid.to(tl.int64) * (64 * WIDTH) + tl.arange(0, 64 * WIDTH))
    packed = tl.reshape(packed, [WIDTH // 8, 4, 8, 4, 2, 2])  # as pack left it
    dq = tl.reshape(tl.permute(packed, (1, 4, 2, 0, 3, 5)), [64, WIDTH]) * softmax_scale
    dQ += entry + head * stride_dqh
    rows = offs_m.to(tl.int64)[:, None] * stride_dqs
    inside = (offs_m < seqlen_q)[:, None] & (offs_d < HEADDIM)[None, :]
    tl.store(dQ + rows + offs_d[None, :], dq.to(dQ.dtype.element_ty), mask=inside)


@gluon.jit
def pack(part):
    """[PART, PART] in wgmma's layout as [PART_ROWS, PART_COLUMNS], without moving a number.

    A thread has rows r and r + 8 and columns c, c + 1 of every 8 columns: these four lie together,
    so that it stores 16 bytes at a time and a warp 512 in a row. 8 columns lie behind the 8 before
    them, so the halves of a part are parts of [PART, PART / 2].
    """
    EIGHTS: gl.constexpr = part.shape[1] // 8
    part = gl.reshape(part, [4, 2, 8, EIGHTS, 4, 2])  # warp, half, r, 8 columns, c, 2
    part = gl.permute(part, [3, 0, 2, 4, 1, 5])
    return gl.reshape(part, [EIGHTS * 4, PART_COLUMNS])


@gluon.jit
def unpack(sums):
    """What pack was given, again without moving a number."""
    EIGHTS: gl.constexpr = sums.shape[0] // 4
    sums = gl.reshape(sums, [EIGHTS, 4, 8, 4, 2, 2])
    return gl.reshape(gl.permute(sums, [1, 4, 2, 0, 3, 5]), [PART, EIGHTS * 8])


@gluon.jit
def buffer_of(dq_smem, w, WIDTH: gl.constexpr):
    """Buffer w of parts for one of [PART, WIDTH]."""
    buffer = dq_smem.index(w)
    if WIDTH < PART:
        SHAPE: gl.constexpr = [WIDTH * PART // PART_COLUMNS, PART_COLUMNS]
        buffer = reinterpret(buffer, buffer.dtype, SHAPE, buffer.layout)
    return buffer


@gluon.constexpr_function
def widths_of(C):
    """The parts of columns that dq is made in, in turn by either warpgroup."""
    widths = [PART.value] * (C.width // PART.value)
    if C.halves and len(widths) % 2:
        return widths[:-1] + [PART.value // 2] * 2
    return widths + [PART.value // 2] * (C.width % PART.value > 0)


@gluon.constexpr_function
def columns_of(C):
    """How many parts of columns there are."""
    return len(widths_of(C))


@gluon.constexpr_function
def width_of(C, part):
    return widths_of(C)[part % len(widths_of(C))]


@gluon.constexpr_function
def column_of(C, part):
    """The first column of a part."""
    return sum(widths_of(C)[: part % len(widths_of(C))])


@gluon.constexpr_function
def units_before(C, begin, end):
    """How much of a tile's sums parts [begin, end) are, in units of the narrowest part."""
    widths = widths_of(C) * (C.block_m // PART.value)
    return sum(widths[begin:end]) // widths[-1]


@gluon.constexpr_function
def rows_of_unit(C):
    """Rows of PART_COLUMNS of the narrowest part."""
    return widths_of(C)[-1] * PART.value // PART_COLUMNS.value


@gluon.jit
def rounded(dq_smem, w, dQ):
    """Buffer w of parts as one of dq in its dtype."""
    return reinterpret(dq_smem.index(w), dQ.dtype, dQ.block_type.shape, dQ.layout)


@gluon.jit
def zeros(ring):
    """Accumulators of dk or dv, one for each part of columns."""
    if len(ring) == 1:
        result = (accumulator(ring[0].shape[-1]),)
    else:
        result = (accumulator(ring[0].shape[-1]), accumulator(ring[1].shape[-1]))
    return result


@gluon.jit
def accumulator(WIDTH: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(WIDTH, 128), 16])
    return gl.zeros([KEYS, WIDTH], gl.float32, LAYOUT)


@gluon.jit
def tiles_of_program(sizes, C: gl.constexpr):
    """Which tiles a persistent program walks, as (first, how many, distance).

    With whole_heads those of some heads, one head after the other. Else heads in flight at a time
    are as few as they are with a program a tile: more of them do not stay in L2.
    """
    tiles = sizes[6]
    programs = gl.num_programs(0)
    first = gl.program_id(0)
    count = gl.cdiv(tiles - first, programs)
    apart = programs
    if C.whole_heads:
        tiles_n = gl.cdiv(sizes[4], C.block_n)
        share = gl.cdiv(tiles // tiles_n, programs) * tiles_n
        first *= share
        count = gl.minimum(share, tiles - first)
        apart = 1
    return first, count, apart


@gluon.jit
def last_visit(tile_n, seqlen_q, seqlen_k, C: gl.constexpr):
    """Queries before this one see none of the keys behind tile_n."""
    start_n = (tile_n + 1) * C.block_n
    start, _full = query_range(start_n, seqlen_q, seqlen_k, C.block_m, C.block_n, C.causal)
    return gl.where(start_n < seqlen_k, start, seqlen_q)


@gluon.jit
def end_of_earlier(tile_n, seqlen_q, seqlen_k, window_left, C: gl.constexpr):
    """Queries from this one on see none of the keys before tile_n."""
    start_n = (tile_n - 1) * C.block_n
    _full, end = query_end(start_n, seqlen_q, seqlen_k, window_left, C.block_m, C.block_n)
    return gl.where(tile_n > 0, end, 0)


@gluon.jit
def programs_behind(tile_n, start_m, seqlen_q, seqlen_k, C: gl.constexpr):
    """How many programs of keys behind tile_n add to a tile of dq."""
    _full, end = key_range(start_m, seqlen_q, seqlen_k, C.block_m, C.block_n, C.causal)
    return gl.cdiv(end, C.block_n) - 1 - tile_n


@gluon.jit
def place_of(pid, tiles_n, rows, section):
    """Program pid as (tile of tiles_n, row): row after row, or the first tiles of `section` rows,
    then their second ones and so on."""
    if section is None:
        tile_n, row = pid % tiles_n, pid // tiles_n
    else:
        first = pid // (section * tiles_n) * section
        heads = gl.minimum(section, rows - first)
        place = pid - first * tiles_n
        tile_n, row = place // heads, first + place % heads
    return tile_n, row


@gluon.jit
def locate(pid, sizes, window_left, window_right, BlockLists, C: gl.constexpr):
    """What tile pid is: (tile_n, batch, head_k, first query, full, blocks a head, places).

    Places are (entry_q, entry_k, rows_k, seqlen_q, seqlen_k).

    Blocks of queries from full[0] on, and before full[1] if there is a left window, need no mask.
    With BlockLists blocks are those listed, and what they need `listed` knows.
    When causal the first keys are seen by the most queries, so the longest programs come first, and
    with sections those of some heads together: else the last head's would begin when most is done.
    """
    _nheads, nheads_k, group_size, seqlen_q, seqlen_k, Blocks, tiles, section = sizes
    if C.packed:
        block, head_k = place_of(pid, gl.load(Blocks), nheads_k, section)
        start_n, batch, entry_q, _rows_q, seqlen_q, entry_k, rows_k, seqlen_k = place_at(
            Blocks, block
        )
        tile_n = start_n // C.block_n
    else:
        tiles_n = gl.cdiv(seqlen_k, C.block_n)
        tile_n, row = place_of(pid, tiles_n, tiles // tiles_n, section)
        if C.ordered:  # a program waits for those of later keys, which so have smaller numbers
            tile_n = tiles_n - 1 - tile_n
        batch = row // nheads_k
        head_k = row % nheads_k
        entry_q = batch
        entry_k = batch
        rows_k = seqlen_k
        start_n = tile_n * C.block_n
    start, full = query_range(
        start_n, seqlen_q, seqlen_k, C.block_m, C.block_n, C.causal, window_right
    )
    if C.check_keys:
        if (tile_n + 1) * C.block_n > seqlen_k:
            full = seqlen_q
    end, full_to = seqlen_q, seqlen_q
    if window_left is not None:
        full_to, end = query_end(start_n, seqlen_q, seqlen_k, window_left, C.block_m, C.block_n)
        end = gl.maximum(start, end)
    blocks = gl.cdiv(end - start, C.block_m)
    if C.packed:
        blocks = gl.maximum(blocks, 0)
    if BlockLists is not None:
        most = most_listed(BlockLists, batch, head_k * group_size, group_size, start_n // C.size_k)
        blocks = most * (C.size_q // C.block_m)
    places = (entry_q, entry_k, rows_k, seqlen_q, seqlen_k)
    return tile_n, batch, head_k, start, (full, full_to), blocks, places


@gluon.jit
def workspace(sizes, batch, places, C: gl.constexpr):
    """Where tiles of queries are in Stats and Sums: (first row of the entry, rows a head)."""
    nheads = sizes[0]
    if C.packed:
        tiles_m = gl.load(sizes[5] + 1)
        first = places[0] // C.block_m + batch
    else:
        tiles_m = gl.cdiv(places[3], C.rows) * (C.rows // C.block_m)
        first = batch * nheads
    return first, tiles_m


@gluon.jit
def row_of(head, start_m, first, tiles_m, C: gl.constexpr):
    """The row of a tile of queries in Stats and Sums."""
    if C.packed:
        row = head * tiles_m + first + start_m // C.block_m
    else:
        row = (first + head) * tiles_m + start_m // C.block_m
    return row


@gluon.jit
def listed(BlockLists, batch, head, tile_n, m, C: gl.constexpr):
    """Block m of a walk along the list of a program's keys, as (first query, partly seen)."""
    _count, entries = block_list(BlockLists, batch, head, tile_n * C.block_n // C.size_k)
    return visited(entries, m * C.block_m, C.size_q)


@gluon.jit
def in_list(BlockLists, batch, head, tile_n, m, C: gl.constexpr):
    """Whether block m of a walk is in the head's list; a walk is as long as the longest list of the
    heads that share its keys."""
    count, _entries = block_list(BlockLists, batch, head, tile_n * C.block_n // C.size_k)
    return m * C.block_m // C.size_q < count


@gluon.jit
def turn_in_list(BlockLists, batch, head, tile_n, m, C: gl.constexpr):
    """How many programs of earlier keys add to block m's dq."""
    PROGRAMS: gl.constexpr = C.size_k // C.block_n  # of one block of keys
    before = rank(BlockLists, batch, head, tile_n // PROGRAMS, m * C.block_m // C.size_q)
    return before * PROGRAMS + tile_n % PROGRAMS


@gluon.jit
def walk(i, head_k, blocks, group_size, C: gl.constexpr):
    """Step i as (head, m): head after head, so that one follows the other without a gap."""
    head = head_k
    m = i
    if C.gqa:
        head = head_k * group_size + i // blocks
        m = i % blocks
    if C.backwards:
        m = blocks - 1 - m
    return head, m


@gluon.jit
def next_block(m, blocks, C: gl.constexpr):
    """The block of queries after m, as in walk but without its division."""
    if C.backwards:
        m -= 1
        if C.gqa:
            m = gl.where(m >= 0, m, blocks - 1)
    else:
        m += 1
        if C.gqa:
            m = gl.where(m < blocks, m, 0)
    return m


@gluon.jit
def positions(start, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """start + arange, in a loop.

    Added up so that a thread's positions are one register and constants; LLVM would compute arange
    before the loop and keep it, 16 registers or more.
    """
    offs = gl.arange(0, BLOCK, LAYOUT)
    return start + (offs & 6) + (offs & (BLOCK - 7))


@gluon.jit
def edges(start, full, C: gl.constexpr):
    """`full` of `locate` in blocks from the first query on."""
    return gl.cdiv(full[0] - start, C.block_m), (full[1] - start) // C.block_m


@gluon.jit
def masked(m, edge, window_left):
    """Whether block m of a head needs a mask; edge is of `edges`."""
    outside = m < edge[0]
    if window_left is not None:
        outside = outside | (m >= edge[1])
    return outside


@gluon.jit
def head_of(i, head_k, blocks, group_size, C: gl.constexpr):
    """The head of step i, as in walk."""
    head = head_k
    if C.gqa:
        head = head_k * group_size + i // blocks
    return head


@gluon.jit
def modified(s, lse, batch, head, q_pos, k_pos, softmax_scale, seqlen_q, seqlen_k, partial,
             window_left, window_right, ScoreMods, MaskMod, KEYS_ARE_ROWS: gl.constexpr,
             C: gl.constexpr):  # fmt: skip
    """p for products s under modifications, and what makes ds of it, p * dscore / dmodified.

    Derivatives are linear in dscore, so p can take them on before dp is there, and scores are done
    with. Not if gradients of aux are wanted: then the second is p again. Only `partial` tiles need
    causal, window and the end of keys checked, and with lists of blocks MaskMod.
    """
    if C.fused:
        factor, constant = ScoreMods[0][2](batch, head, softmax_scale, ScoreMods[0][1])
        s = ScoreMods[0][0](s, q_pos, k_pos, seqlen_q, seqlen_k, constant)
        p = gl.exp2(s * (factor * LOG2_E) - lse)
    elif ScoreMods is not None:
        score = s * softmax_scale
        s = modify(score, batch, head, q_pos, k_pos, seqlen_q, seqlen_k, ScoreMods, C.inside)
        p = gl.exp2(s * LOG2_E - lse)
    else:
        p = gl.exp2(s * (softmax_scale * LOG2_E) - lse)
    if C.causal or C.check_keys or window_left is not None or window_right is not None:
        if partial:
            seen = visible(q_pos, k_pos, seqlen_q, seqlen_k, C.causal, KEYS_ARE_ROWS, window_left,
                           window_right)  # fmt: skip
            p = gl.where(seen, p, 0.0)
    if MaskMod is not None:
        if partial or C.size_q is None:
            seen = shown(batch, head, q_pos, k_pos, seqlen_q, seqlen_k, MaskMod, C.inside)
            p = gl.where(seen, p, 0.0)
    derived = p
    if C.fused:
        derived = ScoreMods[0][3](p, s)
    elif ScoreMods is not None and not C.scatter:
        derived = derive(p, score, batch, head, q_pos, k_pos, seqlen_q, seqlen_k, ScoreMods, False,
                         C.inside)  # fmt: skip
    return p, derived


@gluon.jit
def producer(shared, Q, K, V, dOut, Stats, sizes, window_left, window_right, BlockLists,
             C: gl.constexpr):  # fmt: skip
    """The warp that loads: k and v once a tile, then q, lse, delta and dout of every step."""
    if C.persistent:
        first, count, apart = tiles_of_program(sizes, C)
        step = 0
        for n in range(count):
            step = produce(shared, Q, K, V, dOut, Stats, sizes, window_left, window_right,
                           BlockLists, first + n * apart, n, step, C)  # fmt: skip
    else:
        produce(shared, Q, K, V, dOut, Stats, sizes, window_left, window_right, BlockLists,
                gl.program_id(0), 0, 0, C)  # fmt: skip


@gluon.jit
def produce(shared, Q, K, V, dOut, Stats, sizes, window_left, window_right, BlockLists, pid,
            before, step, C: gl.constexpr):  # fmt: skip
    """The producer's tile pid, behind `before` others and `step` steps; returns those behind it."""
    k_smem, v_smem, q_smem, do_smem, stats_smem, _, _, bars, _, _, _ = shared
    k_full, v_full, q_full, q_empty, do_full, do_empty, kv_empty = bars
    group_size = sizes[2]
    tile_n, batch, head_k, start, _full, blocks, places = locate(
        pid, sizes, window_left, window_right, BlockLists, C
    )
    entry_q, entry_k, _rows_k, seqlen_q, seqlen_k = places
    first, tiles_m = workspace(sizes, batch, places, C)
    TILES: gl.constexpr = C.block_n // KEYS
    kv = before % C.kv_stages
    mbarrier.wait(kv_empty.index(kv), before // C.kv_stages & 1 ^ 1)
    for w in gl.static_range(TILES):
        row = tile_n * C.block_n + w * KEYS
        at = kv * TILES + w
        expect(k_full.index(at), K)
        load_parts(K, entry_k, head_k // C.splits, row, seqlen_k, k_full.index(at), k_smem, at)
        expect(v_full.index(at), V)
        load_parts(V, entry_k, head_k // C.splits, row, seqlen_k, v_full.index(at), v_smem, at)
    for i in range(group_size * blocks):
        head, m = walk(i, head_k, blocks, group_size, C)
        start_m = start + m * C.block_m
        if BlockLists is not None:
            start_m, _partial = listed(BlockLists, batch, head, tile_n, m, C)
        slot = (step + i) % C.stages
        mbarrier.wait(q_empty.index(slot), (step + i) // C.stages & 1 ^ 1)
        expect(q_full.index(slot), Q, Stats.block_type.nbytes)
        load_parts(Q, entry_q, head, start_m, seqlen_q, q_full.index(slot), q_smem, slot)
        row = row_of(head, start_m, first, tiles_m, C)
        async_load(Stats, [row, 0], q_full.index(slot), stats_smem.index(slot))
        slot = (step + i) % C.dout_stages
        mbarrier.wait(do_empty.index(slot), (step + i) // C.dout_stages & 1 ^ 1)
        expect(do_full.index(slot), dOut)
        load_parts(dOut, entry_q, head, start_m, seqlen_q, do_full.index(slot), do_smem, slot)
    return step + group_size * blocks


@gluon.jit
def adder(shared, dk_smem, dv_smem, Sums, dQ, dK, dV, Turn, sizes, window_left, window_right,
          BlockLists, C: gl.constexpr):  # fmt: skip
    """The warp that adds dq to the sums, and stores dk and dv.

    Buffer w of dq_smem brings parts w, w + 2, ... of a tile. Sums are two descriptors if there are
    parts half as wide, the second for these, and so is dQ.
    """
    if C.persistent:
        first, count, apart = tiles_of_program(sizes, C)
        step = 0
        for n in range(count):
            step = add(shared, dk_smem, dv_smem, Sums, dQ, dK, dV, Turn, sizes, window_left,
                       window_right, BlockLists, first + n * apart, n, step, C)  # fmt: skip
    else:
        add(shared, dk_smem, dv_smem, Sums, dQ, dK, dV, Turn, sizes, window_left, window_right,
            BlockLists, gl.program_id(0), 0, 0, C)  # fmt: skip


@gluon.jit
def lend(Sums, place, dq_smem, dq_empty, filled, of: gl.constexpr, w: gl.constexpr,
         C: gl.constexpr):  # fmt: skip
    """Buffer w to who makes part `of` of dq, with its sums in it if `filled`.

    place is the part's among the sums, counted as in `units_before`.
    """
    WIDTH: gl.constexpr = width_of(C, of)
    if filled:
        mbarrier.expect(dq_empty.index(w), Sums[WIDTH < PART].block_type.nbytes)
        async_load(Sums[WIDTH < PART], [place * rows_of_unit(C), 0], dq_empty.index(w),
                   buffer_of(dq_smem, w, WIDTH))  # fmt: skip
    else:
        mbarrier.arrive(dq_empty.index(w), count=1)


@gluon.jit
def bring(Sums, place, dQ, places, head, start_m, alone, ends, dq_smem, of: gl.constexpr,
          w: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """Part `of` of dq from buffer w to where it belongs, place as in `lend`.

    Where programs finish dq: whether it is `alone` so far, and whether no other comes behind.
    """
    WIDTH: gl.constexpr = width_of(C, of)
    HALF: gl.constexpr = WIDTH < PART
    if C.whole_heads or C.ordered:
        if ends:
            store(dQ[HALF], places[0], head, start_m + of // columns_of(C) * PART, places[3],
                  rounded(dq_smem, w, dQ[HALF]), column_of(C, of))  # fmt: skip
        elif alone:
            async_store(Sums[HALF], [place * rows_of_unit(C), 0], buffer_of(dq_smem, w, WIDTH))
        else:
            reduce_add(Sums[HALF], [place * rows_of_unit(C), 0], buffer_of(dq_smem, w, WIDTH))
    else:
        reduce_add(Sums[HALF], [place * rows_of_unit(C), 0], buffer_of(dq_smem, w, WIDTH))


@gluon.jit
def await_others(Turn, row, turn):
    """Until so many programs have added to a tile of dq.

    They have smaller numbers, so they are running or done.
    """
    while gl.atomic_add(Turn + row, 0, sem="acquire") != turn:
        pass
    fence_async_global()


@gluon.jit
def pass_on(Turn, row, added):
    """The next program may add to a tile of dq, if this one has, once all of that is in memory."""
    wait_for_reductions()
    fence_async_global()
    if added:
        gl.atomic_add(Turn + row, 1, sem="release")


@gluon.jit
def add_in_turn(Sums, dQ, Turn, places, head, start_m, row, before_row, turn, ends, dq_smem,
                dq_full, dq_empty, step, C: gl.constexpr):  # fmt: skip
    """Adds to a tile of dq behind `turn` programs, and passes on the tile of the step before.

    Not earlier, as what was added to that takes its time to memory. Nobody whom this program waits
    for waits for it.
    """
    if not ends:
        for w in gl.static_range(DQ_BUFFERS):
            tma.store_wait(DQ_BUFFERS - 1 - w)
            mbarrier.arrive(dq_empty.index(w), count=1)
    if turn > 0:
        await_others(Turn, row, turn)
    pass_on(Turn, before_row, before_row >= 0)
    if ends:
        sums = gl.where(turn > 0, row, -1)  # in front of all rows TMA finds zeros
        for w in gl.static_range(DQ_BUFFERS):
            lend(Sums, sums * DQ_BUFFERS + w, dq_smem, dq_empty, True, w, w, C)
    for w in gl.static_range(DQ_BUFFERS):
        mbarrier.wait(dq_full.index(w), step & 1)
        bring(Sums, row * DQ_BUFFERS + w, dQ, places, head, start_m, turn == 0, ends, dq_smem, w,
              w, C)  # fmt: skip


@gluon.jit
def add(shared, dk_smem, dv_smem, Sums, dQ, dK, dV, Turn, sizes, window_left, window_right,
        BlockLists, pid, before, step, C: gl.constexpr):  # fmt: skip
    """The adder's tile pid, as in `produce`."""
    dq_smem, dq_full, dq_empty, done = shared[6], shared[8], shared[9], shared[10]
    kv_empty = shared[7][6]
    PARTS: gl.constexpr = C.block_m // PART * columns_of(C)
    ROUNDS: gl.constexpr = (PARTS + 1) // DQ_BUFFERS
    group_size = sizes[2]
    tile_n, batch, head_k, start, _full, blocks, places = locate(
        pid, sizes, window_left, window_right, BlockLists, C
    )
    seqlen_q, seqlen_k = places[3], places[4]
    first, tiles_m = workspace(sizes, batch, places, C)
    final = last_visit(tile_n, seqlen_q, seqlen_k, C)
    if C.ordered:
        gl.static_assert(PARTS == DQ_BUFFERS and width_of(C, 0) == width_of(C, 1))
        ending = end_of_earlier(tile_n, seqlen_q, seqlen_k, window_left, C)
        before_row = -1
    if C.lag:
        for w in gl.static_range(DQ_BUFFERS):  # dq of no step
            mbarrier.arrive(dq_empty.index(w), count=1)
            mbarrier.wait(dq_full.index(w), step & 1)
        step += 1
    for i in range(group_size * blocks):
        head, m = walk(i, head_k, blocks, group_size, C)
        start_m = start + m * C.block_m
        if BlockLists is not None:
            start_m, _partial = listed(BlockLists, batch, head, tile_n, m, C)
        row = row_of(head, start_m, first, tiles_m, C)
        if C.whole_heads:  # sums of a program's own
            row = (gl.program_id(0) * group_size + head - head_k * group_size) * tiles_m
            row += start_m // C.block_m
        if C.deterministic:
            turn = tile_n  # how many programs of earlier keys add to this tile
            if window_left is not None:
                begin = key_begin(start_m, seqlen_q, seqlen_k, window_left, C.block_m, C.block_n)
                turn -= begin[0] // C.block_n
            if BlockLists is not None:
                turn = turn_in_list(BlockLists, batch, head, tile_n, m, C)
            counted = True
            if BlockLists is not None and C.gqa:
                counted = in_list(BlockLists, batch, head, tile_n, m, C)
            if counted:
                await_others(Turn, row, turn)
        if C.ordered:
            turn = programs_behind(tile_n, start_m, seqlen_q, seqlen_k, C)
            add_in_turn(Sums, dQ, Turn, places, head, start_m, row, before_row, turn,
                        start_m >= ending, dq_smem, dq_full, dq_empty, step + i, C)  # fmt: skip
            before_row = row
        else:
            for r in gl.static_range(ROUNDS):
                place = row * units_before(C, 0, PARTS) + units_before(C, 0, r * DQ_BUFFERS)
                for w in gl.static_range(DQ_BUFFERS):
                    if r * DQ_BUFFERS + w < PARTS:
                        # The last of an odd number is followed by the first, of the same buffer.
                        tma.store_wait(0 if r == 0 and PARTS % 2 else DQ_BUFFERS - 1 - w)
                        if C.whole_heads:
                            lend(Sums, place + units_before(C, r * DQ_BUFFERS, r * DQ_BUFFERS + w),
                                 dq_smem, dq_empty, (start_m < final) & (tile_n > 0),
                                 r * DQ_BUFFERS + w, w, C)  # fmt: skip
                        else:
                            mbarrier.arrive(dq_empty.index(w), count=1)
                for w in gl.static_range(DQ_BUFFERS):
                    if r * DQ_BUFFERS + w < PARTS:
                        # A buffer's steps have (PARTS - w + 1) // DQ_BUFFERS parts.
                        made = (step + i) * ((PARTS - w + 1) // DQ_BUFFERS) + r
                        mbarrier.wait(dq_full.index(w), made & 1)
                        bring(Sums, place + units_before(C, r * DQ_BUFFERS, r * DQ_BUFFERS + w), dQ,
                              places, head, start_m, tile_n == 0, start_m < final, dq_smem,
                              r * DQ_BUFFERS + w, w, C)  # fmt: skip
        if C.deterministic:
            if counted:
                pass_on(Turn, row, True)
    if C.ordered:
        pass_on(Turn, before_row, before_row >= 0)

    # The consumers have no registers left for where dk and dv go.
    TILES: gl.constexpr = C.block_n // KEYS
    kv = before % C.kv_stages
    mbarrier.wait(done.index(kv), before // C.kv_stages & 1)
    for w in gl.static_range(TILES):
        row = tile_n * C.block_n + w * KEYS  # of the box, keys past the end stay behind
        store_parts(dV, places[1], head_k, row, places[2], dv_smem, kv * TILES + w)
        store_parts(dK, places[1], head_k, row, places[2], dk_smem, kv * TILES + w)
    if C.whole_heads:
        wait_for_reductions()  # the next tile reads and adds to them
        fence_async_global()
    else:
        tma.store_wait(0)
    if C.persistent:
        mbarrier.arrive(kv_empty.index(kv), count=1)
    return step + group_size * blocks
