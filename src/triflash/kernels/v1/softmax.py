"""The online softmax of FlashAttention (arXiv:2205.14135, Algorithm 1), in base e as the paper."""

import triton
import triton.language as tl


@triton.jit
def finite_maximum(m):
    """A maximum to subtract: 0 for a row without keys, where -inf - (-inf) would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def update(s, m_i, l_i):
    """Lines 10 to 12: one block of scores against the maximum and the sum of the blocks before.

    s: [BLOCK_M, BLOCK_N] scaled scores, -inf where hidden. m_i, l_i: [BLOCK_M].
    Returns the new m_i and l_i, p = exp(s - rowmax(s)), and two factors: with them the normalised
    output is now o * keep + (p @ v) * take.
    """
    m_block = tl.max(s, 1)
    p = tl.exp(s - finite_maximum(m_block)[:, None])
    m_new = tl.maximum(m_i, m_block)
    m_safe = finite_maximum(m_new)
    keep = l_i * tl.exp(m_i - m_safe)
    take = tl.exp(m_block - m_safe)
    l_new = keep + take * tl.sum(p, 1)
    normaliser = 1.0 / tl.where(l_new == 0.0, 1.0, l_new)
    return m_new, l_new, p, keep * normaliser, take * normaliser


@triton.jit
def load_statistics(M, L, row, offs_m, exist):
    """m and 1 / l for recomputing p = exp(s - m) / l; a row without keys has m +inf, so p is 0."""
    m = tl.load(M + row + offs_m, mask=exist, other=float("-inf"))
    l_i = tl.load(L + row + offs_m, mask=exist, other=0.0)
    return tl.where(m == float("-inf"), float("inf"), m), 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
