"""FlashAttention-3 backward for Hopper (arXiv:2407.08608, Algorithm 3), in Gluon.

A program owns 128 keys and walks the queries of all heads that share them. Two warpgroups hold 64
keys each, and dk and dv of these in registers; a warp loads q, dout, lse and delta through rings;
a warp adds dq to float32 sums in memory by TMA. Scores and dp are computed transposed, so that p
and ds leave their products in the registers where dv = p^T dout and dk = ds^T q want them; only
dq = ds k, whose sum runs over the keys of both warpgroups, takes ds through shared memory.

A kernel before it makes lse in base 2 and delta = rowsum(out * dout) - dlse and zeroes the sums;
one behind it rounds them to dq. The sums of a tile lie as the threads hold them, see `pack`.

FLOPs: 10 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Workspace, float32: the
sums, of dq's size with seqlen_q a multiple of 64 or 128 and headdim one of 64; and 2 numbers a row.
With deterministic=True programs add to a tile of dq in the order of their keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triflash import tuning
from triflash.kernels.common.launch import Launch, aligned, strides_of, tma_can_read
from triflash.kernels.common.mask import query_range, visible
from triflash.kernels.common.softmax import LOG2_E, lse_to_log2
from triflash.kernels.v3.tma import (
    barriers,
    buffers,
    fence_async_global,
    flat_view,
    load,
    meet,
    reduce_add,
    tile,
    view,
    wait_for_reductions,
)
from triflash.spec import AttentionSpec
from triflash.target import Target, target_of


@dataclass(frozen=True)
class Schedule:
    """What a kernel is compiled for; fields of tuning.HopperBackwardConfig mean the same here."""

    block_m: int
    stages: int
    late_dv: bool
    causal: bool
    check_keys: bool  # the last block of keys has some past seqlen_k
    gqa: bool
    deterministic: bool  # programs add to a tile of dq in the order of their keys


KEYS = gl.constexpr(64)  # of one warpgroup, the rows of one wgmma
CONSUMERS = gl.constexpr(2)
DS_STAGES = gl.constexpr(2)  # blocks of ds; with one the warpgroups would meet twice a step
BLOCK_N = gl.constexpr(128)
PART = gl.constexpr(64)  # dq is computed and added to in parts of [PART, PART]
PART_ROWS = gl.constexpr(32)  # a part as rows of PART_COLUMNS for TMA
PART_COLUMNS = gl.constexpr(128)


@triton.jit(do_not_specialize=["nheads", "seqlen_q"])
def before_kernel(Out, dOut, Lse, dLse, Stats, Sums, stride_ob, stride_os, stride_oh, stride_gb,
                  stride_gs, stride_gh, nheads, seqlen_q, HEADDIM_V: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                  HAS_DLSE: tl.constexpr):  # fmt: skip
    """One tile of queries: lse in base 2 and delta to Stats [2, BLOCK_M], and zero to its sums."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    batch = (pid // tiles_m // nheads).to(tl.int64)
    head = (pid // tiles_m % nheads).to(tl.int64)
    start_m = pid % tiles_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    exist = offs_m < seqlen_q
    inside = exist[:, None] & (offs_d < HEADDIM_V)[None, :]
    Out += batch * stride_ob + head * stride_oh
    dOut += batch * stride_gb + head * stride_gh
    rows = offs_m.to(tl.int64)[:, None]
    out = tl.load(Out + rows * stride_os + offs_d[None, :], mask=inside, other=0.0)
    dout = tl.load(dOut + rows * stride_gs + offs_d[None, :], mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = (batch * nheads + head) * seqlen_q
    lse = tl.load(Lse + row + offs_m, mask=exist, other=float("-inf"))
    if HAS_DLSE:  # d lse / d scores = p, so dlse joins delta with the opposite sign
        delta -= tl.load(dLse + row + offs_m, mask=exist, other=0.0)
    stats = Stats + pid.to(tl.int64) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(stats, lse_to_log2(lse))  # +inf also for rows past the end: their p is 0
    tl.store(stats + BLOCK_M, -delta)
    sums = Sums + pid.to(tl.int64) * (BLOCK_M * BLOCK_D)
    tl.store(sums + tl.arange(0, BLOCK_M * BLOCK_D), tl.zeros([BLOCK_M * BLOCK_D], tl.float32))


@triton.jit(do_not_specialize=["nheads", "seqlen_q"])
def after_kernel(Sums, dQ, softmax_scale, nheads, seqlen_q, HEADDIM: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One part of the sums to dq `(batch, seqlen_q, nheads, headdim)`."""
    PARTS: tl.constexpr = BLOCK_M * BLOCK_D // 4096
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    row = pid // PARTS // tiles_m
    part = pid % PARTS
    offs_m = pid // PARTS % tiles_m * BLOCK_M + part // (BLOCK_D // 64) * 64 + tl.arange(0, 64)
    offs_d = part % (BLOCK_D // 64) * 64 + tl.arange(0, 64)
    packed = tl.load(Sums + pid.to(tl.int64) * 4096 + tl.arange(0, 4096))
    packed = tl.reshape(packed, [8, 4, 8, 4, 2, 2])  # as pack left it
    dq = tl.reshape(tl.permute(packed, (1, 4, 2, 0, 3, 5)), [64, 64]) * softmax_scale
    dQ += (row // nheads).to(tl.int64) * seqlen_q * nheads * HEADDIM + row % nheads * HEADDIM
    rows = offs_m.to(tl.int64)[:, None] * (nheads * HEADDIM)
    inside = (offs_m < seqlen_q)[:, None] & (offs_d < HEADDIM)[None, :]
    tl.store(dQ + rows + offs_d[None, :], dq.to(dQ.dtype.element_ty), mask=inside)


@gluon.jit
def pack(part):
    """[PART, PART] in wgmma's layout as [PART_ROWS, PART_COLUMNS], without moving a number.

    A thread has rows r and r + 8 and columns c, c + 1 of every 8 columns: these four lie together,
    so that it stores 16 bytes at a time and a warp 512 in a row.
    """
    part = gl.reshape(part, [4, 2, 8, 8, 4, 2])  # warp, half, r, 8 columns, c, 2
    part = gl.permute(part, [3, 0, 2, 4, 1, 5])
    return gl.reshape(part, [PART_ROWS, PART_COLUMNS])


@gluon.jit
def locate(seqlen_q, seqlen_k, nheads_k, C: gl.constexpr):
    """What this program works on: (tile_n, batch, head_k, first query, blocks a head).

    When causal the first keys are seen by the most queries, so the longest programs come first.
    """
    tiles_n = gl.cdiv(seqlen_k, BLOCK_N)
    pid = gl.program_id(0)
    tile_n = pid % tiles_n
    row = pid // tiles_n
    start, full = query_range(tile_n * BLOCK_N, seqlen_q, seqlen_k, C.block_m, BLOCK_N, C.causal)
    if C.check_keys:
        if (tile_n + 1) * BLOCK_N > seqlen_k:
            full = seqlen_q
    blocks = gl.cdiv(seqlen_q - start, C.block_m)
    return tile_n, row // nheads_k, row % nheads_k, start, full, blocks


@gluon.jit
def walk(i, head_k, start, blocks, group_size, C: gl.constexpr):
    """Step i as (head, start_m): head after head, so that one follows the other without a gap."""
    if C.gqa:
        head = head_k * group_size + i // blocks
        start_m = start + i % blocks * C.block_m
    else:
        head = head_k
        start_m = start + i * C.block_m
    return head, start_m


@gluon.jit
def producer(shared, Q, K, V, dOut, Stats, sizes, C: gl.constexpr):
    """The warp that loads: k and v once, then q, lse, delta and dout of every step."""
    STAGES: gl.constexpr = C.stages
    k_smem, v_smem, q_smem, do_smem, stats_smem, _, _, bars, _, _, _ = shared
    k_full, v_full, q_full, q_empty, do_full, do_empty = bars
    nheads, nheads_k, group_size, seqlen_q, seqlen_k = sizes
    tile_n, batch, head_k, start, _full, blocks = locate(seqlen_q, seqlen_k, nheads_k, C)
    tiles_m = gl.cdiv(seqlen_q, C.block_m)
    for w in gl.static_range(CONSUMERS):
        row = tile_n * BLOCK_N + w * KEYS
        mbarrier.expect(k_full.index(w), K.block_type.nbytes)
        load(K, batch, head_k, row, k_full.index(w), k_smem.index(w))
        mbarrier.expect(v_full.index(w), V.block_type.nbytes)
        load(V, batch, head_k, row, v_full.index(w), v_smem.index(w))
    for i in range(group_size * blocks):
        head, start_m = walk(i, head_k, start, blocks, group_size, C)
        slot = i % STAGES
        mbarrier.wait(q_empty.index(slot), i // STAGES & 1 ^ 1)
        mbarrier.expect(q_full.index(slot), Q.block_type.nbytes + Stats.block_type.nbytes)
        load(Q, batch, head, start_m, q_full.index(slot), q_smem.index(slot))
        row = (batch * nheads + head) * tiles_m + start_m // C.block_m
        tma.async_copy_global_to_shared(Stats, [row, 0], q_full.index(slot), stats_smem.index(slot))
        mbarrier.wait(do_empty.index(slot), i // STAGES & 1 ^ 1)
        mbarrier.expect(do_full.index(slot), dOut.block_type.nbytes)
        load(dOut, batch, head, start_m, do_full.index(slot), do_smem.index(slot))


@gluon.jit
def adder(shared, Sums, dK, dV, Turn, sizes, C: gl.constexpr):
    """The warp that adds dq to the sums, and stores dk and dv."""
    k_smem, v_smem, _, _, _, _, dq_smem, _, dq_full, dq_empty, done = shared
    BLOCK_D: gl.constexpr = k_smem.shape[4]
    PARTS: gl.constexpr = C.block_m // PART * (BLOCK_D // PART)
    nheads, nheads_k, group_size, seqlen_q, seqlen_k = sizes
    tile_n, batch, head_k, start, _full, blocks = locate(seqlen_q, seqlen_k, nheads_k, C)
    tiles_m = gl.cdiv(seqlen_q, C.block_m)
    for i in range(group_size * blocks):
        head, start_m = walk(i, head_k, start, blocks, group_size, C)
        row = (batch * nheads + head) * tiles_m + start_m // C.block_m
        if C.deterministic:
            # Programs of earlier keys have smaller numbers, so they are running or done.
            while gl.atomic_add(Turn + row, 0, sem="acquire") != tile_n:
                pass
            fence_async_global()
        for w in gl.static_range(PARTS):
            mbarrier.wait(dq_full.index(w), i & 1)
            reduce_add(Sums, [(row * PARTS + w) * PART_ROWS, 0], dq_smem.index(w))
        for w in gl.static_range(PARTS):
            tma.store_wait(PARTS - 1 - w)
            mbarrier.arrive(dq_empty.index(w), count=1)
        if C.deterministic:
            wait_for_reductions()
            fence_async_global()
            gl.atomic_add(Turn + row, 1, sem="release")

    # The consumers have no registers left for where dk and dv go.
    mbarrier.wait(done.index(0), 0)
    for w in gl.static_range(CONSUMERS):
        row = tile_n * BLOCK_N + w * KEYS  # of the box, keys past the end stay behind
        tma.async_copy_shared_to_global(dV, [batch, head_k, row, 0], v_smem.index(w))
        tma.async_copy_shared_to_global(dK, [batch, head_k, row, 0], k_smem.index(w))
    tma.store_wait(0)


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
def consumer(shared, softmax_scale, sizes, W: gl.constexpr, C: gl.constexpr):
    """Warpgroup W: keys [64 W, 64 W + 64) of the program's 128, and part W of every dq."""
    BLOCK_M: gl.constexpr = C.block_m
    STAGES: gl.constexpr = C.stages
    k_smem, v_smem, q_smem, do_smem, stats_smem, ds_smem, dq_smem, bars, dq_full, dq_empty, done = (
        shared
    )
    k_full, v_full, q_full, q_empty, do_full, do_empty = bars
    _nheads, nheads_k, group_size, seqlen_q, seqlen_k = sizes
    BLOCK_D: gl.constexpr = k_smem.shape[4]
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LAYOUT_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    LAYOUT_P: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    QUERIES: gl.constexpr = gl.SliceLayout(0, LAYOUT_S)
    PART_ROW: gl.constexpr = W // (BLOCK_D // PART)
    PART_COLUMN: gl.constexpr = W % (BLOCK_D // PART)
    tile_n, _batch, _head_k, start, full, blocks = locate(seqlen_q, seqlen_k, nheads_k, C)
    scale_log2 = softmax_scale * LOG2_E
    # Masks count from the first query and the first key that it sees, which saves registers.
    k_idx = tile_n * BLOCK_N + W * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT_S))[:, None]
    keys = seqlen_k
    if C.causal:
        k_idx -= start + seqlen_k - seqlen_q
        keys = 0
    edge = gl.cdiv(full - start, BLOCK_M)
    m = 0
    k = tile(k_smem, W)
    v = tile(v_smem, W)
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, LAYOUT_D)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, LAYOUT_D)

    mbarrier.wait(k_full.index(W), 0)
    mbarrier.wait(v_full.index(W), 0)
    for i in range(group_size * blocks):
        slot = i % STAGES
        phase = i // STAGES & 1
        q = tile(q_smem, slot)
        dout = tile(do_smem, slot)
        stats = stats_smem.index(slot).reshape([2 * BLOCK_M])
        # Both before the first product: else the copies of -delta sink between the products.
        mbarrier.wait(q_full.index(slot), phase)
        mbarrier.wait(do_full.index(slot), phase)
        # dp's product begins with -delta, which then takes no registers of its own.
        minus_delta = stats.slice(BLOCK_M, BLOCK_M).load(QUERIES)
        dp_t = gl.zeros([KEYS, BLOCK_M], gl.float32, LAYOUT_S)
        dp_t, _same = gl.broadcast(minus_delta[None, :], dp_t)
        s_t = warpgroup_mma(k, q.permute((1, 0)), gl.zeros([KEYS, BLOCK_M], gl.float32, LAYOUT_S),
                            use_acc=False, is_async=True)  # fmt: skip
        dp_t = warpgroup_mma(v, dout.permute((1, 0)), dp_t, is_async=True)
        lse = stats.slice(0, BLOCK_M).load(QUERIES)
        s_t = warpgroup_mma_wait(1, deps=(s_t,))
        p_t = gl.exp2(s_t * scale_log2 - lse[None, :])
        if C.causal or C.check_keys:
            if m < edge:  # only tiles on the edge of the mask pay for it
                q_idx = m * BLOCK_M + gl.arange(0, BLOCK_M, QUERIES)[None, :]
                seen = visible(q_idx, k_idx, 0, keys, C.causal, KEYS_ARE_ROWS=True)
                p_t = gl.where(seen, p_t, 0.0)
        p_16 = gl.convert_layout(p_t.to(q.dtype), gl.DotOperandLayout(0, LAYOUT_D, 2))
        if C.late_dv:
            dp_t = warpgroup_mma_wait(0, deps=(dp_t,))
            ds_t = (p_t * dp_t).to(q.dtype)
            dv = warpgroup_mma(p_16, dout, dv, is_async=True)
        else:
            dv = warpgroup_mma(p_16, dout, dv, is_async=True)
            dp_t = warpgroup_mma_wait(1, deps=(dp_t,))
            ds_t = (p_t * dp_t).to(q.dtype)
        ds_slot = i % DS_STAGES * CONSUMERS
        ds_smem.index(ds_slot + W).store(ds_t)
        ds_16 = gl.convert_layout(ds_t, gl.DotOperandLayout(0, LAYOUT_D, 2))
        fence_async_shared()
        meet(256)
        dq = gl.zeros([PART, PART], gl.float32, LAYOUT_P)
        for w in gl.static_range(CONSUMERS):
            dq = warpgroup_mma(part_of_ds(ds_smem, ds_slot + w, PART_ROW),
                               part_of_k(k_smem, w, PART_COLUMN), dq,
                               use_acc=w > 0, is_async=True)  # fmt: skip
        dk = warpgroup_mma(ds_16, q, dk, is_async=True)  # hides storing dq
        dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
        mbarrier.arrive(do_empty.index(slot), count=1)
        mbarrier.wait(dq_empty.index(W), i & 1 ^ 1)
        dq_smem.index(W).store(pack(dq))
        fence_async_shared()
        mbarrier.arrive(dq_full.index(W), count=1)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        mbarrier.arrive(q_empty.index(slot), count=1)
        m += 1
        if C.gqa:  # as in walk, without its division
            m = gl.where(m < blocks, m, 0)

    # dv and dk leave through the memory of v and k.
    v.store(dv.to(v.dtype))
    meet(256)  # both have read all of k
    k.store((dk * softmax_scale).to(k.dtype))
    fence_async_shared()
    mbarrier.arrive(done.index(0), count=1)


@gluon.jit(do_not_specialize=["nheads", "nheads_k", "group_size", "seqlen_q", "seqlen_k"])
def backward_kernel(Q, K, V, dOut, Stats, Sums, dK, dV, Turn, softmax_scale, nheads, nheads_k,
                    group_size, seqlen_q, seqlen_k, C: gl.constexpr):  # fmt: skip
    """One program a block of keys of a key head."""
    k_smem = buffers(K, CONSUMERS)
    v_smem = buffers(V, CONSUMERS)
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
        barriers(CONSUMERS, 1),
        barriers(CONSUMERS, 1),
        barriers(C.stages, 1),
        barriers(C.stages, CONSUMERS),
        barriers(C.stages, 1),
        barriers(C.stages, CONSUMERS),
    )
    dq_full = barriers(CONSUMERS, 1)
    dq_empty = barriers(CONSUMERS, 1)
    done = barriers(1, CONSUMERS)
    fence_async_shared()
    shared = (k_smem, v_smem, q_smem, do_smem, stats_smem, ds_smem, dq_smem, bars, dq_full,
              dq_empty, done)  # fmt: skip
    sizes = (nheads, nheads_k, group_size, seqlen_q, seqlen_k)
    gl.warp_specialize(
        [
            (consumer, (shared, softmax_scale, sizes, 0, C)),
            (consumer, (shared, softmax_scale, sizes, 1, C)),
            (producer, (shared, Q, K, V, dOut, Stats, sizes, C)),
            (adder, (shared, Sums, dK, dV, Turn, sizes, C)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


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

    Head dimensions up to 128, `spec.tma`. dout needs a contiguous last dimension, and is copied if
    TMA cannot read it as it lies; out, lse and dlse are contiguous.
    """
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    if 0 in (dq.numel(), dk.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    if not tma_can_read(dout):
        dout = dout.clone(memory_format=torch.contiguous_format)
    plan = _prepare(
        spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(), dout.stride(),
        aligned(dout, out, lse), dlse is not None and aligned(dlse),
    )  # fmt: skip
    sums = q.new_empty(plan.sums, dtype=torch.float32)
    stats = q.new_empty(plan.stats, dtype=torch.float32)
    turn = q.new_zeros(plan.turn, dtype=torch.int32) if spec.deterministic else stats
    plan.before(out, dout, lse, lse if dlse is None else dlse, stats, sums)
    plan.backward(q, k, v, dout, stats, sums, dk, dv, turn)
    plan.after(sums, dq)
    return dq, dk, dv


@dataclass(frozen=True)
class Plan:
    """Launches, and the shapes of the workspaces."""

    before: Launch
    backward: Launch
    after: Launch
    sums: tuple[int, int]
    stats: tuple[int, int]
    turn: int


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
) -> Plan:
    config = tuning.v3_backward(spec, target)
    block_m, width = config.block_m, config.width
    tiles = -(-spec.seqlen_q // block_m) * spec.nheads * spec.batch
    shape_q = (spec.batch, spec.seqlen_q, spec.nheads, spec.headdim)
    shape_k = (spec.batch, spec.seqlen_k, spec.nheads_k, spec.headdim)
    shape_v = (spec.batch, spec.seqlen_k, spec.nheads_k, spec.headdim_v)
    shape_o = (spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v)
    keys = KEYS.value
    sums = (tiles * block_m * width // PART_COLUMNS.value, PART_COLUMNS.value)
    stats = (tiles, 2 * block_m)
    views = (
        view(shape_q, stride_q, block_m, width, spec.dtype),
        view(shape_k, stride_k, keys, width, spec.dtype),
        view(shape_v, stride_v, keys, width, spec.dtype),
        view(shape_o, stride_dout, block_m, width, spec.dtype),
        flat_view(*stats, 1),
        flat_view(*sums, PART_ROWS.value),
        view(shape_k, strides_of(*shape_k[1:]), keys, width, spec.dtype),
        view(shape_v, strides_of(*shape_v[1:]), keys, width, spec.dtype),
    )
    around = tuning.v3_around_backward(spec, target)
    before = Launch(
        before_kernel,
        tiles,
        (*strides_of(*shape_o[1:]), *stride_dout[:3], spec.nheads, spec.seqlen_q),
        (spec.headdim_v, block_m, width, aligned_dlse is not False),
        around,
    )
    backward = Launch(
        backward_kernel,
        -(-spec.seqlen_k // BLOCK_N.value) * spec.nheads_k * spec.batch,
        (spec.softmax_scale, spec.nheads, spec.nheads_k, spec.group_size, spec.seqlen_q,
         spec.seqlen_k),
        (
            Schedule(
                block_m, config.stages, config.late_dv, spec.causal,
                spec.seqlen_k % BLOCK_N.value != 0, spec.group_size > 1, spec.deterministic,
            ),
        ),
        config,
        views,
    )  # fmt: skip
    after = Launch(
        after_kernel,
        tiles * (block_m // PART.value) * (width // PART.value),
        (spec.softmax_scale, spec.nheads, spec.seqlen_q),
        (spec.headdim, block_m, width),
        around,
    )
    return Plan(before, backward, after, sums, stats, tiles)
