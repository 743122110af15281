"""How v2 reads and writes a tile: rows of one head, by TMA or by pointers."""

import triton
import triton.language as tl


@triton.jit
def load_tile(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM: tl.constexpr,
              ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr,
              USE_TMA: tl.constexpr):  # fmt: skip
    """Rows [row, row + ROWS) of a head as [ROWS, BLOCK_D]; zero past HEADDIM and past seqlen.

    X is a descriptor of (batch, nheads, seqlen, headdim) if USE_TMA, else a pointer. Without
    CHECK_ROWS the rows must exist.
    """
    if USE_TMA:
        tile = X.load([batch, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        # 64 bits: a tensor can pass 2^31 elements within one head.
        base = X + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        base += tl.cast(row, tl.int64) * stride_s
        offs_r = tl.arange(0, ROWS)
        offs_d = tl.arange(0, BLOCK_D)
        ptrs = base + offs_r[:, None].to(tl.int64) * stride_s + offs_d[None, :]
        if CHECK_ROWS:
            mask = (row + offs_r)[:, None] < seqlen
            if HEADDIM != BLOCK_D:
                mask = mask & (offs_d[None, :] < HEADDIM)
            tile = tl.load(ptrs, mask=mask, other=0.0)
        elif HEADDIM != BLOCK_D:
            tile = tl.load(ptrs, mask=offs_d[None, :] < HEADDIM, other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(X, tile, batch, head, row, stride_b, stride_s, stride_h, seqlen,
               HEADDIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write [ROWS, BLOCK_D] to rows [row, row + ROWS) of a head, nothing past HEADDIM or seqlen."""
    base = X + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    base += tl.cast(row, tl.int64) * stride_s
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base + offs_r[:, None].to(tl.int64) * stride_s + offs_d[None, :]
    mask = ((row + offs_r)[:, None] < seqlen) & (offs_d[None, :] < HEADDIM)
    tl.store(ptrs, tile.to(X.dtype.element_ty), mask=mask)
