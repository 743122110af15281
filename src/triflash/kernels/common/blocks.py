"""Block masks: walking the lists of blocks that are not empty, and finding those blocks.

BlockLists is `(counts, entries, rows_b, rows_h, length)`, or None. The list of a block is row
batch * rows_b + head * rows_h + block, of which the first counts[row] of `length` entries count. An
entry is 4 * a block on the other side, and 1 more if the block is full, or 2 more if it is partial
only by causal, a window or the ends: the mask's modification hides nothing else; they rise. Entries
behind the count are the empty blocks as if they were partial, so to visit them is only a waste. For
lists of queries a tensor like entries stands behind `length`: how many blocks come before in the
list that leads back, and 65536 times how many come behind.
"""

import triton
import triton.language as tl

from triflash.kernels.common.mask import visible
from triflash.kernels.common.mods import shown


@triton.jit
def block_list(BlockLists, batch, head, block):
    """How many entries the list of a block has, and where they are."""
    row = batch.to(tl.int64) * BlockLists[2] + head * BlockLists[3] + block
    return tl.load(BlockLists[0] + row), BlockLists[1] + row * BlockLists[4]


@triton.jit
def rank(BlockLists, batch, head, block, i):
    """How many blocks come before a block of keys in the list of entry i of its own, and 65536
    times how many come behind it."""
    row = batch.to(tl.int64) * BlockLists[2] + head * BlockLists[3] + block
    return tl.load(BlockLists[5] + row * BlockLists[4] + i)


@triton.jit
def most_listed(BlockLists, batch, head, heads, block):
    """The most entries that the list of a block has for `heads` heads from `head` on."""
    most, _ = block_list(BlockLists, batch, head, block)
    for other in tl.range(1, heads):
        count, _ = block_list(BlockLists, batch, head + other, block)
        most = tl.maximum(most, count)
    return most


@triton.jit
def visited(entries, walked, SIZE: tl.constexpr):
    """The row where a walk stands that has `walked` rows of listed blocks behind it, whether its
    block is only partly seen, and whether the mask's modification is to be asked."""
    entry = tl.load(entries + walked // SIZE)
    return entry // 4 * SIZE + walked % SIZE, entry % 2 == 0, entry % 4 == 0


@triton.jit(
    do_not_specialize=["nheads", "seqlen_q", "seqlen_k", "window_left", "window_right"],
)
def states_kernel(States, MaskMod, nheads, seqlen_q, seqlen_k, window_left, window_right,
                  SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr, BLOCK: tl.constexpr,
                  CAUSAL: tl.constexpr):  # fmt: skip
    """0 for a block that is empty, 1 for one that is partial, 2 for a full one; a program a block.
    3 for one that is partial and MaskMod hides nothing that causal and window show.

    Full are those whose queries that exist see all SIZE_K keys, which must exist.
    """
    blocks_q, blocks_k = tl.cdiv(seqlen_q, SIZE_Q), tl.cdiv(seqlen_k, SIZE_K)
    pid = tl.program_id(0).to(tl.int64)
    block_k = pid % blocks_k
    block_q = pid // blocks_k % blocks_q
    head = (pid // blocks_k // blocks_q % nheads).to(tl.int32)
    batch = (pid // blocks_k // blocks_q // nheads).to(tl.int32)
    start_m, start_n = block_q.to(tl.int32) * SIZE_Q, block_k.to(tl.int32) * SIZE_K
    some = tl.zeros([BLOCK, BLOCK], tl.int1)
    every = tl.full([BLOCK, BLOCK], True, tl.int1)
    same = tl.full([BLOCK, BLOCK], True, tl.int1)
    for tile in tl.range(0, (SIZE_Q // BLOCK) * (SIZE_K // BLOCK)):
        q_idx = start_m + tile // (SIZE_K // BLOCK) * BLOCK + tl.arange(0, BLOCK)[:, None]
        k_idx = start_n + tile % (SIZE_K // BLOCK) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL, False, window_left, window_right)
        inside = inside & (k_idx < seqlen_k)  # which causal does not say to queries past the end
        seen = inside & shown(batch, head, q_idx, k_idx, seqlen_q, seqlen_k, MaskMod)
        same = same & ((seen == inside) | (q_idx >= seqlen_q))
        some = some | (seen & (q_idx < seqlen_q))
        every = every & (seen | (q_idx >= seqlen_q))
    found = tl.max(tl.max(some.to(tl.int32), 1), 0)
    full = tl.min(tl.min(every.to(tl.int32), 1), 0)
    cut = tl.min(tl.min(same.to(tl.int32), 1), 0)
    tl.store(States + pid, found * tl.where(full > 0, 2, 1 + 2 * cut))
