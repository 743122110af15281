"""How v2_atomic reads, writes and adds to a tile: rows of one head, by TMA or by pointers."""

import triton
import triton.language as tl


@triton.jit
def rows_of(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM: tl.constexpr,
            ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Pointers to rows [row, row + ROWS) of a head, [ROWS, BLOCK_D], and which of them exist."""
    # 64 bits: a tensor can pass 2^31 elements, within one head too.
    base = X + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    base += tl.cast(row, tl.int64) * stride_s
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base + offs_r.to(tl.int64)[:, None] * stride_s + offs_d[None, :]
    exist = (offs_r < seqlen - row)[:, None]
    if HEADDIM != BLOCK_D:
        exist = exist & (offs_d < HEADDIM)[None, :]
    return ptrs, exist


@triton.jit
def load_rows(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM: tl.constexpr,
              ROWS: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_D], zero where there is nothing. X is a descriptor if USE_TMA, or a pointer."""
    if USE_TMA:
        tile = X.load([batch, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        ptrs, exist = rows_of(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM,
                              ROWS, BLOCK_D)  # fmt: skip
        tile = tl.load(ptrs, mask=exist, other=0.0)
    return tile


@triton.jit
def store_rows(X, tile, batch, head, row, stride_b, stride_s, stride_h, seqlen,
               HEADDIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write what exists of [ROWS, BLOCK_D]."""
    ptrs, exist = rows_of(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM, ROWS,
                          BLOCK_D)  # fmt: skip
    tl.store(ptrs, tile.to(X.dtype.element_ty), mask=exist)


@triton.jit
def add_rows(X, tile, rows, HEADDIM: tl.constexpr, ROWS: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """Add the first `rows` rows of [ROWS, BLOCK_D] to contiguous rows of float32 at X, atomically
    for each element."""
    offs_r = tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    exist = (offs_r < rows) & (offs_d < HEADDIM)
    # Only the sums matter, not what else is visible when: no fences.
    tl.atomic_add(X + offs_r * HEADDIM + offs_d, tile, mask=exist, sem="relaxed")
