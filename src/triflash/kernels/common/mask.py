"""Which keys a query sees, element by element and as ranges of blocks.

Causal masks are aligned to the bottom right: query i sees keys j <= i + seqlen_k - seqlen_q.
"""

import triton
import triton.language as tl


@triton.jit
def visible(q_off, k_off, start_m, start_n, seqlen_q, seqlen_k, CAUSAL: tl.constexpr,
            CHECK_KEYS: tl.constexpr):  # fmt: skip
    """Whether query start_m + q_off sees key start_n + k_off; the offsets must broadcast.

    CHECK_KEYS also hides keys past seqlen_k. Offsets are compared within the tile, so that an
    element costs one comparison with a number that is the same for the whole tile.
    """
    if CAUSAL:
        seen = k_off - q_off <= start_m - start_n + (seqlen_k - seqlen_q)
        if CHECK_KEYS:
            seen = seen & (k_off < seqlen_k - start_n)
    else:
        seen = k_off < seqlen_k - start_n
    return seen


@triton.jit
def hide(x, edge, fill, q_off, k_off, start_m, start_n, seqlen_q, seqlen_k, CAUSAL: tl.constexpr,
         CHECK_KEYS: tl.constexpr):  # fmt: skip
    """x with `fill` where a query does not see a key; only tiles on the mask's edge pay for it."""
    if CAUSAL or CHECK_KEYS:
        if edge:  # noqa: SIM102 (a constexpr and a runtime condition)
            seen = visible(q_off, k_off, start_m, start_n, seqlen_q, seqlen_k, CAUSAL, CHECK_KEYS)
            x = tl.where(seen, x, fill)
    return x


@triton.jit
def key_range(start_m, seqlen_q, seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              CAUSAL: tl.constexpr):  # fmt: skip
    """Keys for the queries [start_m, start_m + BLOCK_M), as (full, end).

    Blocks in [0, full) need no mask, those in [full, end) do, later ones are hidden from all.
    """
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        end = tl.minimum(seqlen_k, tl.maximum(0, start_m + BLOCK_M + shift))
        full = tl.minimum(seqlen_k, tl.maximum(0, start_m + 1 + shift))
    else:
        end = seqlen_k
        full = seqlen_k
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def query_range(start_n, seqlen_q, seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                CAUSAL: tl.constexpr):  # fmt: skip
    """Queries that see the keys [start_n, start_n + BLOCK_N), as (start, full).

    Blocks before start see none of them, those in [start, full) need a mask, those from full on
    see all of them. start is a multiple of BLOCK_M.
    """
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        start = tl.maximum(0, start_n - shift) // BLOCK_M * BLOCK_M
        full = tl.maximum(0, start_n + BLOCK_N - 1 - shift)
    else:
        start = 0
        full = 0
    return start, full
