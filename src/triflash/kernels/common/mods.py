"""Modifications of scores and masks: how kernels call them, and the built-in ones.

Kernels take them as a tuple of entries `(function, derivative, gradient, grads, aux)`, functions
and all, as an ordinary argument: Triton then compiles for these functions, and knows them by their
source.
"""

import triton
import triton.language as tl


@triton.jit
def softcap(score, b, h, q_idx, kv_idx, aux):
    """cap * tanh(score / cap), by an exponential that cannot overflow to NaN."""
    return aux[0] - 2.0 * aux[0] / (1.0 + tl.exp(score * (2.0 / aux[0])))


@triton.jit
def softcap_derivative(dscore, score, b, h, q_idx, kv_idx, aux):
    """1 - tanh^2."""
    tanh = 1.0 - 2.0 / (1.0 + tl.exp(score * (2.0 / aux[0])))
    return dscore * (1.0 - tanh * tanh)


@triton.jit
def alibi(score, b, h, q_idx, kv_idx, aux):
    """-slope * distance, positions aligned to the bottom right as flash-attn does; aux: slopes of
    (nheads,) or (batch, nheads), and 0 or nheads."""
    slopes, of_batch, seqlen_q, seqlen_k = aux
    distance = tl.abs(q_idx + (seqlen_k - seqlen_q) - kv_idx)
    return score - tl.load(slopes + b * of_batch + h) * distance.to(tl.float32)


@triton.jit
def alibi_derivative(dscore, score, b, h, q_idx, kv_idx, aux):
    """The bias is added."""
    return dscore
