"""Which keys a query sees, element by element and as ranges of blocks.

Masks are aligned to the bottom right: query i stands at p = i + seqlen_k - seqlen_q. A causal mask
shows it keys j <= p, a window p - window_left <= j <= p + window_right; None is no bound.
"""

import triton
import triton.language as tl


@triton.jit
def visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL: tl.constexpr,
            KEYS_ARE_ROWS: tl.constexpr = False, window_left=None,
            window_right=None):  # fmt: skip
    """Whether the query at q_idx sees the key at k_idx; the two must broadcast.

    A causal mask also hides keys past seqlen_k from every query that exists. The shift of its
    diagonal goes to the rows of the tile, of which a thread holds fewer than columns.
    """
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        if KEYS_ARE_ROWS:
            seen = k_idx - shift <= q_idx
        else:
            seen = k_idx <= q_idx + shift
    else:
        seen = k_idx < seqlen_k
    if window_right is not None:
        seen = seen & (k_idx <= q_idx + (seqlen_k - seqlen_q + window_right))
    if window_left is not None:
        seen = seen & (k_idx >= q_idx + (seqlen_k - seqlen_q - window_left))
    return seen


@triton.jit
def key_range(start_m, seqlen_q, seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              CAUSAL: tl.constexpr, window_right=None):  # fmt: skip
    """Keys for the queries [start_m, start_m + BLOCK_M), as (full, end).

    Blocks in [0, full) need no mask, those in [full, end) do, later ones are hidden from all.
    """
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        end = tl.minimum(seqlen_k, tl.maximum(0, start_m + BLOCK_M + shift))
        full = tl.minimum(seqlen_k, tl.maximum(0, start_m + 1 + shift))
    elif window_right is not None:
        shift = seqlen_k - seqlen_q + window_right
        end = tl.minimum(seqlen_k, tl.maximum(0, start_m + BLOCK_M + shift))
        full = tl.minimum(seqlen_k, tl.maximum(0, start_m + 1 + shift))
    else:
        end = seqlen_k
        full = seqlen_k
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def key_begin(start_m, seqlen_q, seqlen_k, window_left, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Where a left window begins for the queries [start_m, start_m + BLOCK_M), as (begin, full).

    Blocks before begin are hidden from all, those in [begin, full) need a mask. Both are multiples
    of BLOCK_N.
    """
    first = start_m + seqlen_k - seqlen_q - window_left
    begin = tl.maximum(0, first) // BLOCK_N * BLOCK_N
    full = tl.cdiv(tl.maximum(0, first + BLOCK_M - 1), BLOCK_N) * BLOCK_N
    return begin, full


@triton.jit
def query_range(start_n, seqlen_q, seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                CAUSAL: tl.constexpr, window_right=None):  # fmt: skip
    """Queries that see the keys [start_n, start_n + BLOCK_N), as (start, full).

    Blocks before start see none of them, those in [start, full) need a mask, those from full on
    see all of them. start is a multiple of BLOCK_M.
    """
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        start = tl.maximum(0, start_n - shift) // BLOCK_M * BLOCK_M
        full = tl.maximum(0, start_n + BLOCK_N - 1 - shift)
    elif window_right is not None:
        shift = seqlen_k - seqlen_q + window_right
        start = tl.maximum(0, start_n - shift) // BLOCK_M * BLOCK_M
        full = tl.maximum(0, start_n + BLOCK_N - 1 - shift)
    else:
        start = 0
        full = 0
    return start, full


@triton.jit
def query_end(start_n, seqlen_q, seqlen_k, window_left, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Where queries whose left window holds the keys [start_n, start_n + BLOCK_N) end, (full, end).

    Blocks that begin in [full, end) need a mask, later ones see none of the keys.
    """
    last = start_n - (seqlen_k - seqlen_q) + window_left
    full = tl.maximum(0, last + 1) // BLOCK_M * BLOCK_M
    end = tl.minimum(seqlen_q, tl.maximum(0, last + BLOCK_N))
    return full, end
