"""Where a sequence lies in packed `(total, nheads, headdim)` tensors.

Its first row takes the place of a batch index: the launcher gives the stride of a row as that of a
batch entry too, so tiles of packed and of padded tensors are addressed by the same code.
"""

import triton
import triton.language as tl

# int32 tensors, which kernels take under these names, and None for tensors that are not packed.
PACKED = ("CuSeqlensQ", "CuSeqlensK", "SeqUsedQ", "SeqUsedK", "Order")


@triton.jit
def sequence(CuSeqlens, SeqUsed, batch, total):
    """First row of a sequence, its rows, and how many of them take part (all if SeqUsed is None).

    The rows lie in [0, total), whatever stands in the two tensors.
    """
    start = tl.minimum(tl.maximum(tl.load(CuSeqlens + batch), 0), total)
    end = tl.minimum(tl.maximum(tl.load(CuSeqlens + batch + 1), start), total)
    rows = end - start
    seqlen = rows
    if SeqUsed is not None:
        seqlen = tl.minimum(tl.maximum(tl.load(SeqUsed + batch), 0), rows)
    return start, rows, seqlen


@triton.jit
def lse_offset(batch, head, start, nheads, seqlen, total):
    """Where a head's part of lse begins, (batch, nheads, seqlen) or packed (nheads, total).

    total is None if it is not packed.
    """
    if total is None:
        offset = (batch.to(tl.int64) * nheads + head) * seqlen
    else:
        offset = head.to(tl.int64) * total + start
    return offset
