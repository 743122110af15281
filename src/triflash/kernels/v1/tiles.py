"""Where v1 finds a tile: rows of one head, by pointers on every GPU."""

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
              ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_D], zero where there is nothing."""
    ptrs, exist = rows_of(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM, ROWS,
                          BLOCK_D)  # fmt: skip
    return tl.load(ptrs, mask=exist, other=0.0)


@triton.jit
def store_rows(X, tile, batch, head, row, stride_b, stride_s, stride_h, seqlen,
               HEADDIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write what exists of [ROWS, BLOCK_D]."""
    ptrs, exist = rows_of(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM, ROWS,
                          BLOCK_D)  # fmt: skip
    tl.store(ptrs, tile.to(X.dtype.element_ty), mask=exist)
