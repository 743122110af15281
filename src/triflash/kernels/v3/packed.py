"""Packed sequences in v3: a list of the blocks of all of them, those that take longest first.

Lengths are known on the GPU alone, so a small kernel makes the list there and nobody waits for it.
The grid is for the most blocks that so many rows and sequences can have; the list begins with how
many there are. In workspaces of whole blocks sequence b begins at block `start // BLOCK + b`, which
needs no list: rows may begin anywhere, and none is shared.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triflash.kernels.common.launch import Launch
from triflash.kernels.common.varlen import PACKED, sequence
from triflash.spec import AttentionSpec, Sequences
from triflash.tuning import TileConfig

FIELDS = tl.constexpr(8)  # numbers of a row of the list, which has one more than there are blocks
CHUNK = tl.constexpr(256)  # sequences, or blocks of one, that are looked at together


def most_blocks(total: int, batch: int, block: int) -> int:
    """Blocks that `total` rows in `batch` sequences have at most."""
    return total // block + batch


@triton.jit(do_not_specialize=["total_q", "total_k", "most", "number", "batch"],
            do_not_specialize_on_alignment=PACKED)  # fmt: skip
def list_kernel(Blocks, CuSeqlensQ, CuSeqlensK, SeqUsedQ, SeqUsedK, total_q, total_k, most, number,
                batch, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):  # fmt: skip
    """The blocks of one sequence, behind those of all sequences whose blocks take longer.

    Row 0 begins with how many blocks there are, and `number`. The others are the first row of the
    block, its sequence, and start_q, rows_q, seqlen_q, start_k, rows_k, seqlen_k of that.
    Blocks of queries come from the last to the first, blocks of keys from the first to the last:
    as a causal mask makes them shorter.
    """
    b = tl.program_id(0)
    start_q, rows_q, seqlen_q = sequence(CuSeqlensQ, SeqUsedQ, b, total_q)
    start_k, rows_k, seqlen_k = sequence(CuSeqlensK, SeqUsedK, b, total_k)
    work = seqlen_q if OF_KEYS else seqlen_k
    before = 0
    count = 0
    for begin in range(0, batch, CHUNK):
        c = begin + tl.arange(0, CHUNK)
        exist = c < batch
        c = tl.minimum(c, batch - 1)
        _, rows_cq, seqlen_cq = sequence(CuSeqlensQ, SeqUsedQ, c, total_q)
        _, rows_ck, seqlen_ck = sequence(CuSeqlensK, SeqUsedK, c, total_k)
        work_c = seqlen_cq if OF_KEYS else seqlen_ck
        blocks_c = tl.where(exist, tl.cdiv(rows_ck if OF_KEYS else rows_cq, BLOCK), 0)
        first = (work_c > work) | ((work_c == work) & (c < b))
        before += tl.sum(tl.where(first, blocks_c, 0))
        count += tl.sum(blocks_c)
    if b == 0:
        tl.store(Blocks, tl.minimum(count, most))  # more only if cu_seqlens is wrong
        tl.store(Blocks + 1, number)
    blocks = tl.cdiv(rows_k if OF_KEYS else rows_q, BLOCK)
    for begin in range(0, blocks, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        row = Blocks + (1 + before + i) * FIELDS
        inside = (i < blocks) & (before + i < most)
        start = (i if OF_KEYS else blocks - 1 - i) * BLOCK
        tl.store(row, start, inside)
        tl.store(row + 1, b, inside)
        tl.store(row + 2, start_q, inside)
        tl.store(row + 3, rows_q, inside)
        tl.store(row + 5, start_k, inside)
        tl.store(row + 6, rows_k, inside)
        # A block that takes no part has nothing on the other side.
        if OF_KEYS:
            tl.store(row + 4, tl.where(start < seqlen_k, seqlen_q, 0), inside)
            tl.store(row + 7, seqlen_k, inside)
        else:
            tl.store(row + 4, seqlen_q, inside)
            tl.store(row + 7, tl.where(start < seqlen_q, seqlen_k, 0), inside)


@gluon.jit
def place_at(Blocks, i):
    """Block i of the list, which must be there."""
    row = Blocks + (1 + i) * FIELDS
    start = gl.load(row)
    batch = gl.load(row + 1)
    start_q = gl.load(row + 2)
    rows_q = gl.load(row + 3)
    seqlen_q = gl.load(row + 4)
    start_k = gl.load(row + 5)
    rows_k = gl.load(row + 6)
    seqlen_k = gl.load(row + 7)
    return start, batch, start_q, rows_q, seqlen_q, start_k, rows_k, seqlen_k


@triton.jit
def place_of_block(CuSeqlens, SeqUsed, block, batch, total, BLOCK: tl.constexpr):
    """A block of a workspace as (first row of the block in its sequence, and of `sequence`).

    There are more blocks than rows fill: others begin at the end of a sequence or later.
    """
    count = 0
    for begin in range(0, batch, CHUNK):
        c = begin + tl.arange(0, CHUNK)
        start = tl.load(CuSeqlens + c, mask=c < batch, other=0)
        start = tl.minimum(tl.maximum(start, 0), total)
        count += tl.sum(((c < batch) & (start // BLOCK + c <= block)).to(tl.int32))
    b = tl.maximum(count - 1, 0)
    start, rows, seqlen = sequence(CuSeqlens, SeqUsed, b, total)
    block -= start // BLOCK + b
    first = tl.where(block < 0, rows, block * BLOCK)  # only if cu_seqlens is wrong
    return first, start, rows, seqlen


def list_launch(spec: AttentionSpec, block: int, of_keys: bool) -> Launch:
    """The launch of `list_kernel`, for `list_blocks`."""
    config = TileConfig(1, 1, 4, 1)
    return Launch(list_kernel, spec.batch, (spec.batch,), (block, of_keys), config)


def list_blocks(
    launch: Launch, q: torch.Tensor, k: torch.Tensor, sequences: Sequences, most: int, number: int
) -> torch.Tensor:
    """The list, with room for `most` blocks."""
    blocks = q.new_empty((1 + most, FIELDS.value), dtype=torch.int32)
    launch(blocks, *sequences, *sequences.totals(q, k), most, number)
    return blocks
