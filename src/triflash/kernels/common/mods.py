"""Modifications of scores and masks: how kernels call them, and the built-in ones.

Kernels take them as ordinary arguments, functions and all: Triton then compiles for these functions
and knows them by their source. ScoreMods is a tuple of `(function, aux)`, in the backward of
`(function, aux, derivative)` or, if gradients of aux are wanted, `(function, aux, derivative,
gradient, grads)`; MaskMod is one `(function, aux)`. Either may be None. Tiles of indices are passed
in, so that any layout will do. With INSIDE all their positions exist, which saves a comparison a
score.
"""

from types import FunctionType

import triton
import triton.language as tl


@triton.jit
def modify(score, b, h, q_idx, kv_idx, seqlen_q, seqlen_k, ScoreMods,
           INSIDE: tl.constexpr = False):  # fmt: skip
    """The scaled scores behind all modifications."""
    if not INSIDE:
        q_idx = tl.minimum(q_idx, seqlen_q - 1)  # so that what users load by them exists
        kv_idx = tl.minimum(kv_idx, seqlen_k - 1)
    for i in tl.static_range(len(ScoreMods)):
        aux = ScoreMods[i][1] + (seqlen_q, seqlen_k)
        before = score
        score = ScoreMods[i][0](before, b, h, q_idx, kv_idx, aux)
        tl.static_assert(
            score.dtype == tl.float32 and score.shape == before.shape,
            "a score_mod must return float32 scores of the shape it got",
        )
    return score


@triton.jit
def derive(dscore, score, b, h, q_idx, kv_idx, seqlen_q, seqlen_k, ScoreMods,
           SCATTER: tl.constexpr = False, INSIDE: tl.constexpr = False):  # fmt: skip
    """From the gradient of modified scores that of the scaled ones, `score`; 0 past the ends.

    With SCATTER, gradients of aux are added to memory; dscore must then be 0 where keys are hidden.
    """
    if not INSIDE:
        exist = (q_idx < seqlen_q) & (kv_idx < seqlen_k)
        q_idx = tl.minimum(q_idx, seqlen_q - 1)
        kv_idx = tl.minimum(kv_idx, seqlen_k - 1)
    for i in tl.static_range(len(ScoreMods) - 1, -1, -1):
        before = score  # what modification i got
        for n in tl.static_range(i):
            aux = ScoreMods[n][1] + (seqlen_q, seqlen_k)
            before = ScoreMods[n][0](before, b, h, q_idx, kv_idx, aux)
        aux = ScoreMods[i][1] + (seqlen_q, seqlen_k)
        if SCATTER and len(ScoreMods[i]) > 3:
            ScoreMods[i][3](dscore, before, b, h, q_idx, kv_idx, aux, ScoreMods[i][4])
        dscore = ScoreMods[i][2](dscore, before, b, h, q_idx, kv_idx, aux)
        tl.static_assert(
            dscore.dtype == tl.float32 and dscore.shape == score.shape,
            "a derivative must return float32 of the shape it got",
        )
    if not INSIDE:
        dscore = tl.where(exist, dscore, 0.0)  # padding is not what a derivative was written for
    return dscore


@triton.jit
def shown(b, h, q_idx, kv_idx, seqlen_q, seqlen_k, MaskMod, INSIDE: tl.constexpr = False):
    """Whether the mask modification lets the query see the key."""
    if not INSIDE:
        q_idx = tl.minimum(q_idx, seqlen_q - 1)
        kv_idx = tl.minimum(kv_idx, seqlen_k - 1)
    seen = MaskMod[0](b, h, q_idx, kv_idx, MaskMod[1] + (seqlen_q, seqlen_k))
    tl.static_assert(seen.dtype == tl.int1, "a mask_mod must return bool (tl.int1)")
    return seen


def and_functions(first, second, name):
    """The mask modification that shows what both functions show."""

    def both(b, h, q_idx, kv_idx, aux):
        return first(b, h, q_idx, kv_idx, aux) & second(b, h, q_idx, kv_idx, aux)

    return _joined(both, first, second, name)


def or_functions(first, second, name):
    """The mask modification that shows what one of the functions shows."""

    def either(b, h, q_idx, kv_idx, aux):
        return first(b, h, q_idx, kv_idx, aux) | second(b, h, q_idx, kv_idx, aux)

    return _joined(either, first, second, name)


def _joined(function, first, second, name):
    # The interpreter runs a function's source, which finds nothing but globals.
    its_globals = {**function.__globals__, "first": first, "second": second}
    joined = FunctionType(function.__code__, its_globals, closure=function.__closure__)
    joined.__qualname__ = name  # by which Triton tells functions of a kernel apart
    return triton.jit(joined)


@triton.jit
def reciprocal(x):
    """1 / x for x > 0, off by at most 2^-21 of it; 0 from 2^126 on.

    Where `/` is eight instructions of NVIDIA GPUs this is three, on every target.
    """
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def approximate_reciprocal(x):
    """1 / x in one instruction of NVIDIA GPUs, off by at most 2^-23 of it; 0 from 2^126 on."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh(x):
    """By an exponential whose overflow gives 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def approximate_tanh(x):
    """One instruction of NVIDIA GPUs since sm_75, off by at most 2^-11 of the result."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softcap(score, b, h, q_idx, kv_idx, aux):
    """cap * tanh(score / cap)."""
    return aux[0] * tanh(score * (1.0 / aux[0]))


@triton.jit
def approximate_softcap(score, b, h, q_idx, kv_idx, aux):
    """softcap to about the precision of half."""
    return aux[0] * approximate_tanh(score * (1.0 / aux[0]))


@triton.jit
def fused_softcap(s, q_idx, kv_idx, seqlen_q, seqlen_k, constant):
    """tanh(score / cap) of q k^T; constant: softmax_scale / cap."""
    return approximate_tanh(s * constant)


# Degree: largest |score / cap|, and coefficients of the odd polynomial that is nearest to tanh up to
# there: off by 1.3e-4 and 2.3e-5 of it (tanh.approx: 4.9e-4).
_SMALL = {
    3: (0.3, 0.999870178, -0.321713324, 0.0),
    5: (0.5, 0.999977436, -0.331691508, 0.115209767),
}


@triton.constexpr_function
def _small(degree, i):
    return _SMALL[degree][i]


@triton.jit
def _base_2_softcap(s, aux, DEGREE: tl.constexpr, PACK: tl.constexpr):
    """cap * tanh(score / cap) in base 2, of q k^T; aux: cap, softmax_scale.

    Warps whose scores are all small take a polynomial: the special function unit has enough to do
    with the exponentials.
    """
    c = tl.minimum(aux[1] * (1.0 / aux[0]), 3.0e38)
    d = aux[0] * 1.4426950408889634
    limit = _small(DEGREE, 0) / c
    x2 = c * c
    a1 = c * d * _small(DEGREE, 1)
    a3 = c * d * x2 * _small(DEGREE, 2)
    a5 = c * d * x2 * x2 * _small(DEGREE, 3)
    return tl.inline_asm_elementwise(
        _SOFTCAP(PACK, DEGREE), _KINDS(PACK), [s, c, d, limit * limit, a1, a3, a5],
        dtype=tl.float32, is_pure=True, pack=PACK,
    )  # fmt: skip


@triton.jit
def base_2_softcap_3_8(s, b, h, q_idx, kv_idx, aux):
    return _base_2_softcap(s, aux, 3, 8)


@triton.jit
def base_2_softcap_3_16(s, b, h, q_idx, kv_idx, aux):
    return _base_2_softcap(s, aux, 3, 16)


@triton.jit
def base_2_softcap_3_32(s, b, h, q_idx, kv_idx, aux):
    return _base_2_softcap(s, aux, 3, 32)


@triton.jit
def base_2_softcap_5_8(s, b, h, q_idx, kv_idx, aux):
    return _base_2_softcap(s, aux, 5, 8)


@triton.jit
def base_2_softcap_5_16(s, b, h, q_idx, kv_idx, aux):
    return _base_2_softcap(s, aux, 5, 16)


@triton.jit
def base_2_softcap_5_32(s, b, h, q_idx, kv_idx, aux):
    return _base_2_softcap(s, aux, 5, 32)


@triton.constexpr_function
def _KINDS(n):
    return ",".join(["=&f"] * n + ["f"] * (7 * n))


@triton.constexpr_function
def _SOFTCAP(n, degree):
    y = [f"${i}" for i in range(n)]
    s = [f"${n + i}" for i in range(n)]
    c, d, limit, a1, a3, a5 = (f"${n * k}" for k in range(2, 8))
    squares = ",".join(f"u{i}" for i in range(n))
    lines = [f"{{ .reg .pred p; .reg .b32 m, l, {squares}; .reg .f32 t;", f"mov.b32 l, {limit};"]
    for i in range(n):
        lines += [f"mul.f32 {y[i]}, {s[i]}, {s[i]};", f"mov.b32 u{i}, {y[i]};"]
    # As integers, of which one instruction takes three; NaN is larger than any limit.
    lines += ["mov.b32 m, u0;", *(f"max.s32 m, m, u{i};" for i in range(1, n))]
    lines += ["setp.le.s32 p, m, l;", "vote.sync.all.pred p, p, 0xffffffff;", "@!p bra LARGE;"]
    for i in range(n):
        if degree == 3:
            lines.append(f"fma.rn.f32 t, {y[i]}, {a3}, {a1};")
        else:
            lines.append(f"fma.rn.f32 t, {y[i]}, {a5}, {a3};")
            lines.append(f"fma.rn.f32 t, {y[i]}, t, {a1};")
        lines.append(f"mul.f32 {y[i]}, {s[i]}, t;")
    lines += ["bra.uni DONE;", "LARGE:"]
    for i in range(n):
        lines.append(f"mul.f32 {y[i]}, {s[i]}, {c};")
        lines.append(f"tanh.approx.f32 {y[i]}, {y[i]};")
        lines.append(f"mul.f32 {y[i]}, {y[i]}, {d};")
    lines.append("DONE: }")
    return "\n".join(lines)


@triton.jit
def softcap_constants(b, h, softmax_scale, aux):
    """The factor of what fused_softcap gives that makes it a score, and its constant."""
    # Finite, so that it makes 0 of 0.
    return aux[0], tl.minimum(tl.maximum(softmax_scale * (1.0 / aux[0]), -3.0e38), 3.0e38)


@triton.jit
def fused_softcap_derivative(dscore, modified):
    """1 - tanh^2 of what fused_softcap gave."""
    return dscore - dscore * (modified * modified)


@triton.jit
def softcap_derivative(dscore, score, b, h, q_idx, kv_idx, aux):
    """1 - tanh^2."""
    t = tanh(score * (1.0 / aux[0]))
    return dscore * (1.0 - t * t)


@triton.jit
def approximate_softcap_derivative(dscore, score, b, h, q_idx, kv_idx, aux):
    """softcap_derivative to about the precision of half."""
    t = approximate_tanh(score * (1.0 / aux[0]))
    return dscore * (1.0 - t * t)


@triton.jit
def alibi(score, b, h, q_idx, kv_idx, aux):
    """-slope * distance, positions aligned to the bottom right as flash-attn does; aux: slopes of
    (nheads,) or (batch, nheads), and 0 or nheads."""
    slopes, of_batch, seqlen_q, seqlen_k = aux
    # Subtracted as floats, a tile is converted by rows and columns.
    distance = (q_idx + (seqlen_k - seqlen_q)).to(tl.float32) - kv_idx.to(tl.float32)
    return score - tl.load(slopes + b * of_batch + h) * tl.abs(distance)


@triton.jit
def fused_alibi(s, q_idx, kv_idx, seqlen_q, seqlen_k, constant):
    """alibi's score / softmax_scale of q k^T; constant: slope / softmax_scale."""
    distance = (q_idx + (seqlen_k - seqlen_q)).to(tl.float32) - kv_idx.to(tl.float32)
    return s - constant * tl.abs(distance)


@triton.jit
def alibi_constants(b, h, softmax_scale, aux):
    """The factor of what fused_alibi gives that makes it a score, and its constant."""
    return softmax_scale, tl.load(aux[0] + b * aux[1] + h) / softmax_scale


@triton.jit
def fused_alibi_derivative(dscore, modified):
    """The bias is added."""
    return dscore


@triton.jit
def alibi_derivative(dscore, score, b, h, q_idx, kv_idx, aux):
    """The bias is added."""
    return dscore


@triton.jit
def bias(score, b, h, q_idx, kv_idx, aux):
    """A tensor added; aux: it, and four strides, each (stride,), or () where it has one entry."""
    return score + tl.load(aux[0] + element(b, h, q_idx, kv_idx, aux)).to(tl.float32)


@triton.jit
def bias_derivative(dscore, score, b, h, q_idx, kv_idx, aux):
    """The bias is added."""
    return dscore


@triton.jit
def bias_gradient(dscore, score, b, h, q_idx, kv_idx, aux, grads):
    """Tiles [queries, keys] are summed along what they share before they meet in memory."""
    tl.static_assert(kv_idx.shape[0] == 1)
    if len(grads[3]) == 0:
        dscore = tl.sum(dscore, 0, keep_dims=True)
    if len(grads[4]) == 0:
        dscore = tl.sum(dscore, 1, keep_dims=True)
    tl.atomic_add(grads[0] + element(b, h, q_idx, kv_idx, grads), dscore, sem="relaxed")


@triton.jit
def element(b, h, q_idx, kv_idx, strided):
    """Offsets in a tensor (batch, nheads, seqlen_q, seqlen_k), which its strides follow."""
    offset = tl.zeros([1, 1], tl.int64)
    if len(strided[1]) > 0:
        offset = offset + b.to(tl.int64) * strided[1][0]
    if len(strided[2]) > 0:
        offset = offset + h.to(tl.int64) * strided[2][0]
    if len(strided[3]) > 0:
        offset = offset + q_idx.to(tl.int64) * strided[3][0]
    if len(strided[4]) > 0:
        offset = offset + kv_idx.to(tl.int64) * strided[4][0]
    return offset
