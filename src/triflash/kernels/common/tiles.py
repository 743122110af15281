"""Where a tile is and which of it exists: rows of one head, by TMA or by pointers."""

import triton
import triton.language as tl


@triton.jit
def tile_pointers(X, batch, head, row, stride_b, stride_s, stride_h, ROWS: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    """Pointers to rows [row, row + ROWS) of a head, [ROWS, BLOCK_D]."""
    # 64 bits: a tensor can pass 2^31 elements, within one head too.
    base = X + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    base += tl.cast(row, tl.int64) * stride_s
    offs_r = tl.arange(0, ROWS).to(tl.int64)
    return base + offs_r[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(X, batch, head, row, stride_b, stride_s, stride_h, seqlen, HEADDIM: tl.constexpr,
              ROWS: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr = True,
              USE_TMA: tl.constexpr = False):  # fmt: skip
    """Rows [row, row + ROWS) of a head as [ROWS, BLOCK_D]; zero past HEADDIM and past seqlen.

    X is a descriptor of (batch, nheads, seqlen, headdim) if USE_TMA, or a ragged one of packed
    rows, else a pointer. Without CHECK_ROWS the rows must exist.
    """
    if USE_TMA:
        if len(X.shape) == 5:  # of launch.ragged_descriptor
            end: tl.constexpr = 1 << 30
            tile = X.load([end, batch + seqlen, head, end - seqlen + row, 0]).reshape(ROWS, BLOCK_D)
        else:
            tile = X.load([batch, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        ptrs = tile_pointers(X, batch, head, row, stride_b, stride_s, stride_h, ROWS, BLOCK_D)
        in_head = tl.arange(0, BLOCK_D)[None, :] < HEADDIM
        in_rows = tl.arange(0, ROWS)[:, None] < seqlen - row
        if CHECK_ROWS and HEADDIM == BLOCK_D:
            tile = tl.load(ptrs, mask=in_rows, other=0.0)
        elif CHECK_ROWS:
            tile = tl.load(ptrs, mask=in_rows & in_head, other=0.0)
        elif HEADDIM != BLOCK_D:
            tile = tl.load(ptrs, mask=in_head, other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(X, tile, batch, head, row, stride_b, stride_s, stride_h, seqlen,
               HEADDIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write [ROWS, BLOCK_D] to rows [row, row + ROWS) of a head, nothing past HEADDIM or seqlen."""
    ptrs = tile_pointers(X, batch, head, row, stride_b, stride_s, stride_h, ROWS, BLOCK_D)
    in_head = tl.arange(0, BLOCK_D)[None, :] < HEADDIM
    in_rows = tl.arange(0, ROWS)[:, None] < seqlen - row
    tl.store(ptrs, tile.to(X.dtype.element_ty), mask=in_rows & in_head)
