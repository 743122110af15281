"""Exponentials of v3's forward, of which some are polynomials.

The special function unit gives 16 results a cycle and multiprocessor. At head dimension 64, or with
a softcap's tanh beside each exponential, it takes as long as the tensor cores do; so some of the
exponentials are left to the multiply-add units, as in FlashAttention-4.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triflash.kernels.common.softmax import maximum_step, softmax_step


@gluon.jit
def weights(s, m_i, scale_log2, MASKED: gl.constexpr, SLACK: gl.constexpr, C: gl.constexpr):
    """`softmax_step` by the schedule C; bounded, the maximum is 0 for all, and the factor 1."""
    if C.bounded:
        m_new = gl.zeros_like(m_i)
        alpha = gl.full_like(m_i, 1.0)
        if C.polynomials == 0:
            p = gl.exp2(s * scale_log2)
        else:
            p = exponentials(s, scale_log2, m_new, C.polynomials)
    elif C.polynomials == 0:
        m_new, p, alpha = softmax_step(s, m_i, scale_log2, MASKED, SLACK)
    else:
        m_new, m_safe = maximum_step(s, m_i, scale_log2, MASKED, SLACK)
        p = exponentials(s, scale_log2, m_safe, C.polynomials)
        alpha = gl.exp2(m_i - m_safe)
    return m_new, p, alpha


@gluon.jit
def exponentials(s, scale_log2, m_safe, POLYNOMIALS: gl.constexpr):
    """2^(s * scale_log2 - m_safe[:, None]), at most 2^128; 0 below 2^-127, and of -inf."""
    scale = gl.full(s.shape, scale_log2, gl.float32, s.type.layout)
    shift, s = gl.broadcast(-m_safe[:, None], s)
    shift_of_y, s = gl.broadcast((127.0 - m_safe[:, None]) * (1.0 / 256.0), s)
    return gl.inline_asm_elementwise(
        _EXPONENTIALS(POLYNOMIALS), _CONSTRAINTS(5, 8),
        [s, scale, shift, scale * (1.0 / 256.0), shift_of_y],
        gl.float32, is_pure=True, pack=8,
    )  # fmt: skip


@gluon.constexpr_function
def _CONSTRAINTS(inputs, n):
    return ",".join(["=f"] * n + ["f"] * (n * inputs))


@gluon.constexpr_function
def _EXPONENTIALS(polynomials):
    # y = (x + 127) / 256, kept within [0, 1] for nothing; round(x) comes out of a sum whose last
    # bit is 1/256 of y, and goes to the exponent by a shift; y is then what is left of x, / 256.
    # Its polynomial is 2^x for |x| <= 1/2, 1 at 0 so that 2^-127 becomes 0: off by 2.9e-6 at most.
    magic = "0f473FFF81"  # 1.5 * 2^15 - 127 / 256
    one, *rest = "0f3F800000 0f43317096 0f467601BC 0f4964FE23 0f4C1D0166".split()
    n = 8
    chosen = [(2 * i + 1) * n // (2 * polynomials) for i in range(polynomials)]
    lines = ["{ .reg .f32 x, y, t, e, r; .reg .b32 i, j;"]
    for i in range(n):
        s, scale, shift, scale_of_y, shift_of_y = (f"${n * k + i}" for k in range(1, 6))
        if i not in chosen:
            lines += [f"fma.rn.f32 x, {s}, {scale}, {shift};", f"ex2.approx.ftz.f32 ${i}, x;"]
            continue
        lines += [
            f"fma.rn.ftz.sat.f32 y, {s}, {scale_of_y}, {shift_of_y};",
            f"add.rn.f32 t, y, {magic};",
            f"sub.rn.f32 e, t, {magic};",
            "sub.rn.f32 y, y, e;",
            f"mov.f32 r, {rest[3]};",
            *(f"fma.rn.f32 r, r, y, {x};" for x in (rest[2], rest[1], rest[0], one)),
            "mov.b32 i, t;",
            "mov.b32 j, r;",
            "shl.b32 i, i, 23;",
            "add.s32 j, j, i;",
            f"mov.b32 ${i}, j;",
        ]
    return "\n".join([*lines, "}"])
