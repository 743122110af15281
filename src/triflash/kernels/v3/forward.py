"""FlashAttention-3 forward for Hopper (arXiv:2407.08608, Algorithm 2), in Gluon.

What v3 changes against v2: one warp does nothing but load by TMA, two or three warpgroups compute
64 queries each on k and v that they share through a ring in shared memory; the product q k^T of a
block runs while the softmax of the block before it and its product with v are under way; programs
stay on their multiprocessor and take one tile of queries after another.

FLOPs: 4 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: q, out and lse
once; k and v once for each tile of queries, mostly from L2.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.runtime import driver

from triflash import tuning
from triflash.kernels.common.launch import Launch
from triflash.kernels.common.mask import key_range, visible
from triflash.kernels.common.softmax import LOG2_E, finish, softmax_step
from triflash.kernels.v3.tma import barriers, buffers, load, tile, view
from triflash.spec import AttentionSpec
from triflash.target import Target, target_of


@dataclass(frozen=True)
class Schedule:
    """What a kernel is compiled for; the fields that tuning.HopperConfig has too mean the same."""

    block_n: int
    stages: int
    consumers: int
    dynamic: bool
    pin: bool
    alias: bool
    causal: bool
    check_keys: bool  # the last block of keys has some past seqlen_k
    scale_sign: int  # of softmax_scale: -1, 0 or 1


ROWS = gl.constexpr(64)  # queries of one warpgroup, the rows of one wgmma


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
def blocks_of(start_m, seqlen_q, seqlen_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
              CAUSAL: gl.constexpr):  # fmt: skip
    """Blocks of keys for queries [start_m, start_m + BLOCK_M), as (unmasked, all); all >= 1.

    Queries that see no key go through one block that is hidden from them.
    """
    full, end = key_range(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    return full // BLOCK_N, gl.maximum(gl.cdiv(end, BLOCK_N), 1)


@gluon.jit
def producer(shared, Q, K, V, Counter, sizes, C: gl.constexpr):
    """The warp that loads: q of each tile, then k and v in the order in which they are used."""
    STAGES: gl.constexpr = C.stages
    CONSUMERS: gl.constexpr = C.consumers
    BLOCK_N: gl.constexpr = C.block_n
    q_smem, k_smem, v_smem, _, tile_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    tiles, tiles_m, nheads, heads, group_size, section, seqlen_q, seqlen_k, _ = sizes
    index = gl.program_id(0)
    q_phase = 1
    n = 0  # blocks loaded so far
    while index < tiles:
        tile_m, batch, head = locate(index, tiles_m, nheads, heads, section, C.causal)
        head_k = head // group_size
        start_m = tile_m * (ROWS * CONSUMERS)
        _, blocks = blocks_of(start_m, seqlen_q, seqlen_k, ROWS * CONSUMERS, BLOCK_N, C.causal)
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(w), q_phase)
            if C.dynamic:
                tile_smem.index(w).store(gl.full([1], index, gl.int32, _one(1)))
                gl.thread_barrier()
            mbarrier.expect(q_full.index(w), Q.block_type.nbytes)
            load(Q, batch, head, start_m + w * ROWS, q_full.index(w), q_smem.index(w))
        for i in range(blocks + 1):
            if i < blocks:
                mbarrier.wait(k_empty.index(n % STAGES), n // STAGES & 1 ^ 1)
                mbarrier.expect(k_full.index(n % STAGES), K.block_type.nbytes)
                load(K, batch, head_k, (blocks - 1 - i) * BLOCK_N, k_full.index(n % STAGES),
                     k_smem.index(n % STAGES))  # fmt: skip
            if i > 0:
                p = n - 1
                mbarrier.wait(v_empty.index(p % STAGES), p // STAGES & 1 ^ 1)
                mbarrier.expect(v_full.index(p % STAGES), V.block_type.nbytes)
                load(V, batch, head_k, (blocks - i) * BLOCK_N, v_full.index(p % STAGES),
                     v_smem.index(p % STAGES))  # fmt: skip
            n += 1
        n -= 1
        if C.dynamic:
            drawn = gl.atomic_add(Counter, 1)
            if drawn == tiles - 1:  # the last draw of this launch: ready for the next one
                gl.atomic_xchg(Counter, 0)
            index = gl.num_programs(0) + drawn
        else:
            index += gl.num_programs(0)
        q_phase ^= 1
    if C.dynamic:
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(w), q_phase)
            tile_smem.index(w).store(gl.full([1], index, gl.int32, _one(1)))
            mbarrier.arrive(q_full.index(w), count=1)


@gluon.constexpr_function
def _one(num_warps):
    """The layout of a single value that every thread has."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@gluon.jit
def consumer(shared, Out, Lse, softmax_scale, sizes, W: gl.constexpr, C: gl.constexpr):
    """Warpgroup W: rows [64 W, 64 W + 64) of every tile."""
    STAGES: gl.constexpr = C.stages
    CONSUMERS: gl.constexpr = C.consumers
    BLOCK_N: gl.constexpr = C.block_n
    q_smem, k_smem, v_smem, o_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = (
        shared
    )
    tiles, tiles_m, nheads, heads, _, section, seqlen_q, seqlen_k, programs = sizes
    BLOCK_DV: gl.constexpr = v_smem.shape[4]
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LAYOUT_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    scale_log2 = softmax_scale * C.scale_sign * LOG2_E
    if C.scale_sign == 0:
        scale_log2 = 1.0
    bars = (k_full, k_empty, v_full, v_empty)

    index = gl.program_id(0)
    q_phase = 0
    n = 0
    while index < tiles:
        tile_m, batch, head = locate(index, tiles_m, nheads, heads, section, C.causal)
        start_m = tile_m * (ROWS * CONSUMERS)
        _, blocks = blocks_of(start_m, seqlen_q, seqlen_k, ROWS * CONSUMERS, BLOCK_N, C.causal)
        start_m += W * ROWS
        unmasked, mine = blocks_of(start_m, seqlen_q, seqlen_k, ROWS, BLOCK_N, C.causal)
        for _ in range(blocks - mine):  # later than all of this warpgroup's queries
            mbarrier.wait(k_full.index(n % STAGES), n // STAGES & 1)
            mbarrier.arrive(k_empty.index(n % STAGES), count=1)
            mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
            mbarrier.arrive(v_empty.index(n % STAGES), count=1)
            n += 1

        q = q_smem.index(W).reshape([ROWS, q_smem.shape[4]])
        q_idx = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT_S))[:, None]
        mbarrier.wait(q_full.index(W), q_phase)
        mbarrier.wait(k_full.index(n % STAGES), n // STAGES & 1)
        s = warpgroup_mma(q, transposed(k_smem, n % STAGES),
                          gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT_S),
                          use_acc=False, is_async=True)  # fmt: skip
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, LAYOUT_O)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT_S))
        s = signed(s, C.scale_sign)
        if C.causal or C.check_keys:
            s = mask(s, q_idx, (mine - 1) * BLOCK_N, seqlen_q, seqlen_k, C.causal)
        m_i, p, _alpha = softmax_step(s, m_i, scale_log2, C.causal or C.check_keys)
        l_i = sum_of_lanes(p)
        p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, LAYOUT_O, 2))

        for i in range(1, mine):
            block = mine - 1 - i
            acc, m_i, l_i, p = step(q, k_smem, v_smem, bars, n, acc, m_i, l_i, p, scale_log2, q_idx,
                                    block * BLOCK_N, block >= unmasked, seqlen_q, seqlen_k,
                                    LAYOUT_S, LAYOUT_O, C)  # fmt: skip
            n += 1
        if not C.alias:
            mbarrier.arrive(q_empty.index(W), count=1)
        mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
        acc = warpgroup_mma(p, tile(v_smem, n % STAGES), acc, is_async=True)
        l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, LAYOUT_S))
        lse, normaliser = finish(m_i, l_i)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(n % STAGES), count=1)
        n += 1

        normaliser = gl.convert_layout(normaliser, gl.SliceLayout(1, LAYOUT_O))
        out = (acc * normaliser[:, None]).to(q.dtype)
        if not C.alias:
            tma.store_wait(0)  # the tile before this one
        o_smem.index(W).reshape([ROWS, BLOCK_DV]).store(out)
        fence_async_shared()
        tma.async_copy_shared_to_global(Out, [batch, head, start_m, 0], o_smem.index(W))
        offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT_S))
        lse_row = Lse + (batch.to(gl.int64) * nheads + head) * seqlen_q + start_m
        gl.store(lse_row + offs_m, lse, mask=offs_m < seqlen_q - start_m)

        if C.alias:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(W), count=1)
        q_phase ^= 1
        if C.dynamic:
            mbarrier.wait(q_full.index(W), q_phase)
            index = gl.max(tile_smem.index(W).load(_one(4)), 0)
        else:
            index += programs
    tma.store_wait(0)


@gluon.jit
def transposed(ring, slot):
    """Slot of a ring as [headdim, rows]."""
    return tile(ring, slot).permute((1, 0))


@gluon.jit
def signed(s, SCALE_SIGN: gl.constexpr):
    """Scores for softmax_step, which wants a positive scale."""
    if SCALE_SIGN < 0:
        s = -s
    elif SCALE_SIGN == 0:
        s = gl.zeros_like(s)
    return s


@gluon.jit
def mask(s, q_idx, start_n, seqlen_q, seqlen_k, CAUSAL: gl.constexpr):
    """Scores with -inf where hidden."""
    k_idx = start_n + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
    return gl.where(visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL), s, float("-inf"))


@gluon.jit
def sum_of_lanes(p):
    """[ROWS, 4] sums of the columns that each of four lanes has of a row.

    They are added up once a tile instead of once a step: 0 to 3% at any width (measured).
    """
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, N // 8, 4, 2]), 3), 1)


@gluon.jit
def step(q, k_smem, v_smem, bars, n, acc, m_i, l_i, p, scale_log2, q_idx, start_n, masked, seqlen_q,
         seqlen_k, LAYOUT_S: gl.constexpr, LAYOUT_O: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """Scores and softmax of block n + 1 while p v of block n runs."""
    STAGES: gl.constexpr = C.stages
    BLOCK_N: gl.constexpr = C.block_n
    k_full, k_empty, v_full, v_empty = bars
    slot = n % STAGES
    phase = n // STAGES & 1
    next_slot = (n + 1) % STAGES
    mbarrier.wait(k_full.index(next_slot), (n + 1) // STAGES & 1)
    s = warpgroup_mma(q, transposed(k_smem, next_slot),
                      gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT_S),
                      use_acc=False, is_async=True)  # fmt: skip
    mbarrier.wait(v_full.index(slot), phase)
    acc = warpgroup_mma(p, tile(v_smem, slot), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(next_slot), count=1)
    s = signed(s, C.scale_sign)
    if C.causal:
        if masked:  # only blocks on the edge of the mask pay for it
            s = mask(s, q_idx, start_n, seqlen_q, seqlen_k, True)
    m_i, p, alpha = softmax_step(s, m_i, scale_log2, C.causal)
    alpha_of_lanes = gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))
    l_i = l_i * alpha_of_lanes[:, None] + sum_of_lanes(p)
    p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, LAYOUT_O, 2))
    if C.pin:
        # ptxas would move the next line above the softmax, which then would not overlap p v. It
        # keeps it in its own basic block, so this wait, which is over already, holds it in place.
        mbarrier.wait(v_full.index(slot), phase)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(slot), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, LAYOUT_O))[:, None]
    return acc, m_i, l_i, p


@gluon.jit(do_not_specialize=["tiles", "tiles_m", "nheads", "heads", "group_size", "section",
                              "seqlen_q", "seqlen_k"])  # fmt: skip
def forward_kernel(Q, K, V, Out, Lse, Counter, softmax_scale, tiles, tiles_m, nheads, heads,
                   group_size, section, seqlen_q, seqlen_k, C: gl.constexpr):  # fmt: skip
    """One program a multiprocessor; program i begins with tile i."""
    STAGES: gl.constexpr = C.stages
    CONSUMERS: gl.constexpr = C.consumers
    q_smem = buffers(Q, CONSUMERS)
    k_smem = buffers(K, STAGES)
    v_smem = buffers(V, STAGES)
    if C.alias:  # out leaves through q's buffer
        o_smem = q_smem
    else:
        o_smem = buffers(Out, CONSUMERS)
    tile_smem = gl.allocate_shared_memory(
        gl.int32, [CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    q_full = barriers(CONSUMERS, 1)
    q_empty = barriers(CONSUMERS, 1)
    k_full = barriers(STAGES, 1)
    k_empty = barriers(STAGES, CONSUMERS)
    v_full = barriers(STAGES, 1)
    v_empty = barriers(STAGES, CONSUMERS)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, o_smem, tile_smem, q_full, q_empty, k_full, k_empty, v_full,
              v_empty)  # fmt: skip
    sizes = (tiles, tiles_m, nheads, heads, group_size, section, seqlen_q, seqlen_k,
             gl.num_programs(0))  # fmt: skip
    # A tuple with constexprs must be written where it is used, or they become tensors.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (shared, Out, Lse, softmax_scale, sizes, 0, C)),
                (consumer, (shared, Out, Lse, softmax_scale, sizes, 1, C)),
                (producer, (shared, Q, K, V, Counter, sizes, C)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (shared, Out, Lse, softmax_scale, sizes, 0, C)),
                (consumer, (shared, Out, Lse, softmax_scale, sizes, 1, C)),
                (consumer, (shared, Out, Lse, softmax_scale, sizes, 2, C)),
                (producer, (shared, Q, K, V, Counter, sizes, C)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse float32 `(batch, nheads, seqlen_q)`.

    q, k and v lie so that TMA can read them (`spec.tma`).
    """
    out = q.new_empty((spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v))
    lse = q.new_empty((spec.batch, spec.nheads, spec.seqlen_q), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, []
    if spec.seqlen_k == 0:
        return out.zero_(), lse.fill_(float("-inf")), []
    launch = _prepare(spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride())
    launch(q, k, v, out, lse, _counter(q.device) if launch.constexprs[0].dynamic else lse)
    return out, lse, []


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: torch.device,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
) -> Launch:
    config = tuning.v3_forward(spec, target)
    tiles_m = -(-spec.seqlen_q // (ROWS.value * config.consumers))
    heads = spec.batch * spec.nheads
    tiles = tiles_m * heads
    shape_q = (spec.batch, spec.seqlen_q, spec.nheads, spec.headdim)
    shape_k = (spec.batch, spec.seqlen_k, spec.nheads_k, spec.headdim)
    shape_v = (spec.batch, spec.seqlen_k, spec.nheads_k, spec.headdim_v)
    shape_o = (spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v)
    stride_o = (
        spec.seqlen_q * spec.nheads * spec.headdim_v,
        spec.nheads * spec.headdim_v,
        spec.headdim_v,
    )
    rows = ROWS.value
    width, width_v = tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v)
    views = (
        view(shape_q, stride_q, rows, width, spec.dtype),
        view(shape_k, stride_k, config.block_n, width, spec.dtype),
        view(shape_v, stride_v, config.block_n, width_v, spec.dtype),
        view(shape_o, stride_o, rows, width_v, spec.dtype),
    )
    sign = (spec.softmax_scale > 0) - (spec.softmax_scale < 0)
    return Launch(
        forward_kernel,
        min(tiles, target.num_sms),
        (spec.softmax_scale, tiles, tiles_m, spec.nheads, heads, spec.group_size,
         min(config.section, heads), spec.seqlen_q, spec.seqlen_k),
        (
            Schedule(
                config.block_n, config.stages, config.consumers, config.dynamic, config.pin,
                config.alias, spec.causal, spec.seqlen_k % config.block_n != 0, sign,
            ),
        ),
        config,
        views,
    )  # fmt: skip


def _counter(device: torch.device) -> torch.Tensor:
    """The counter that programs draw their tiles from: 0 before and after every launch.

    Launches that may run at the same time need one each, so there is one a stream, and a new one in
    every CUDA graph, which may be replayed beside anything.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        counter = _counter_of_stream(device, stream)
        if counter is not None:
            return counter
    return torch.zeros(1, dtype=torch.int32, device=device)


@cache
def _counter_of_stream(device: torch.device, stream: int) -> torch.Tensor | None:
    """One that no other stream has, as long as there are any."""
    counters = _counters(device)
    return counters.pop() if counters else None


@cache
def _counters(device: torch.device) -> list[torch.Tensor]:
    """Counters in cache lines of their own.

    torch.compile warms its CUDA graphs up with all that the thread allocates in their pool, where
    nothing may stay behind. So this is allocated by another thread, on its own stream.
    """

    def allocate() -> list[torch.Tensor]:
        with torch.cuda.device(device):
            counters = torch.zeros(256, 32, dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()
        return [row[:1] for row in counters]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(allocate).result()
