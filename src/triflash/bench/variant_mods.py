"""The users' own functions of the preset `variants`, as docs/variants.md writes them."""

import triton
import triton.language as tl

from triflash import mods


@triton.jit
def soft_sign(score, b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
    return score * mods.reciprocal(1.0 + tl.abs(score) * (1.0 / aux[0]))


@triton.jit
def soft_sign_derivative(dscore, score, b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
    r = mods.reciprocal(1.0 + tl.abs(score) * (1.0 / aux[0]))
    return dscore * (r * r)


@triton.jit
def soft_sign_fused(s, b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
    ln_2 = 0.6931471805599453
    return s * mods.approximate_reciprocal(ln_2 / aux[1] + tl.abs(s) * (ln_2 / aux[0]))


def soft_sign_reference(score, b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
    return score / (1.0 + score.abs() / aux[0])


@triton.jit
def same_document(b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
    row = aux[0] + b * aux[2]  # aux ends in seqlen_q and seqlen_k
    return tl.load(row + q_idx) == tl.load(row + kv_idx)


def same_document_reference(b, h, q_idx, kv_idx, aux):  # type: ignore[no-untyped-def]
    return aux[0][b, q_idx] == aux[0][b, kv_idx]


SOFT_SIGN = mods.score_mod(
    soft_sign,
    derivative=soft_sign_derivative,
    reference=soft_sign_reference,
    bound=lambda aux: aux[0],
    fused=soft_sign_fused,
)
SAME_DOCUMENT = mods.mask_mod(same_document, reference=same_document_reference)
