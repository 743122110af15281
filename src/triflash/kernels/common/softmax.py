"""The online softmax in base 2 (FlashAttention-2, arXiv:2307.08691, section 3.1)."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(s, m_i, scale_log2, MASKED: tl.constexpr, SLACK: tl.constexpr = 0.0,
                 HEADROOM: tl.constexpr = 0.0):  # fmt: skip
    """One block of scores against the running maximum.

    s: [BLOCK_M, BLOCK_N] unscaled scores; -inf where hidden, which needs MASKED. scale_log2 > 0.
    Returns the new maximum (base-2 units), p = 2^(s * scale_log2 - maximum), and the factor for
    sums over earlier blocks. With SLACK the maximum stays what it was until it is too small by more
    than that, so p goes up to 2^SLACK and the factor is seldom other than 1 (FlashAttention-4).
    With HEADROOM the maximum, of a first block, is larger by that, for blocks that come to keep it.
    """
    # Scaling after the maximum makes scale and subtraction one fused multiply-add an element.
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    if HEADROOM > 0.0:
        m_new += HEADROOM
    if SLACK > 0.0:
        m_new = tl.where(m_new - m_i <= SLACK, m_i, m_new)  # -inf - (-inf) is NaN: m_new, -inf
    # A row that has seen no key yet: -inf - (-inf) would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s * scale_log2 - m_safe[:, None])
    return m_new, p, tl.exp2(m_i - m_safe)


@triton.jit
def finish(m_i, l_i, sink=None):
    """lse in natural log, and the factor that normalises acc; a row without keys gives -inf, 1.

    sink, in natural units, is a score more, of a key whose value is 0: it enters lse and the
    factor, and is the lse of a row without keys.
    """
    scale = 1.0
    if sink is not None:
        before, m_i = m_i, tl.maximum(m_i, sink * LOG2_E)
        m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
        scale = tl.exp2(before - m_safe)
        l_i = l_i * scale + tl.exp2(sink * LOG2_E - m_safe)
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_safe)) * LN_2)
    return lse, scale / l_safe


@triton.jit
def lse_to_log2(lse):
    """lse for recomputing p = 2^(s - lse): base 2, and +inf for a row without keys, so p is 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
