"""Dropout: which probabilities are kept, by a counter-based generator from where they stand.

The bits are those of triflash/dropout.py, which says how they are drawn. A thread of a matrix
product's result holds rows 8 apart and columns 8 apart, whether a tile is [queries, keys] or
transposed, so that it calls the generator seldom more often than it must.
"""

import triton
import triton.language as tl


@triton.jit
def kept(b, h, start_m, start_n, offs_m, offs_n, Dropout):
    """Whether the probabilities of queries start_m + offs_m and keys start_n + offs_n stay.

    start_m and start_n are multiples of the tile's sides, and those of 16 or of a power of two
    beyond. offs_m and offs_n broadcast: what is equal between elements of a thread is to be seen in
    them, or the compiler calls the generator for each. Dropout is (seed, dropout_p).
    """
    row = ((start_m >> 4) << 3) + (((offs_m >> 4) << 3) | (offs_m & 7))
    column = ((start_n >> 5) << 3) + (((offs_n >> 5) << 3) | (offs_n & 7))
    w0, w1, w2, w3 = tl.philox(tl.load(Dropout[0]), column, row, h, b, 7)
    even = (offs_n & 8) == 0
    first = ((start_n | offs_n) & 16) == 0
    word = tl.where(first, tl.where(even, w0, w1), tl.where(even, w2, w3))
    word = tl.where((offs_m & 8) == 0, word << 16, word)  # its low half, or its high half
    return word >= tl.cast(Dropout[1] * 4294967296.0, tl.uint32)


@triton.jit
def rescaling(Dropout):
    """1 / (1 - dropout_p), by which what is kept grows."""
    return 1.0 / (1.0 - Dropout[1])
