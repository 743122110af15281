"""Exponentials of v3's forward that are begun before their maximum is known.

The maximum of a row seldom moves (SLACK), so exponentials relative to what it was are nearly always
the right ones. The first columns' are begun with it, while the maximum is looked for; a warp in
which it moved does them again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def first_weights(s, m_i, m_safe, alpha, scale_log2, PARTS: gl.constexpr):
    """2^(s * scale_log2 - m_safe) of the first of PARTS parts of the columns; alpha = 1 in rows
    whose maximum, m_i before, has not moved."""
    kept = pieces(s, PARTS)[0]
    p = gl.exp2(pieces(s * scale_log2 - m_i[:, None], PARTS)[0])
    N: gl.constexpr = p.shape[1] // 2  # elements of a thread
    ROWS: gl.constexpr = gl.SliceLayout(1, p.type.layout)
    m_safe, _p = gl.broadcast(gl.convert_layout(m_safe, ROWS)[:, None], p)
    alpha, _p = gl.broadcast(gl.convert_layout(alpha, ROWS)[:, None], p)
    scale = gl.full(p.shape, scale_log2, gl.float32, p.type.layout)
    return gl.inline_asm_elementwise(
        _AGAIN(N), _OPERANDS(N, 4), [p, kept, m_safe, alpha, scale], gl.float32, is_pure=False,
        pack=N,
    )  # fmt: skip


@gluon.jit
def all_weights(first, s, m_safe, scale_log2, PARTS: gl.constexpr):
    """2^(s * scale_log2 - m_safe), the first part of which is there."""
    x = pieces(s * scale_log2 - m_safe[:, None], PARTS)
    if PARTS == 2:
        p = joined(first, gl.exp2(x[1]))
    else:
        p = joined(joined(first, gl.exp2(x[1])), gl.exp2(x[2]))
    return gl.convert_layout(p, s.type.layout)


@gluon.jit
def pieces(x, PARTS: gl.constexpr):
    """The columns of a tile in registers: two halves, or two quarters and a half."""
    left, right = halves(x)
    if PARTS == 2:
        result = (left, right)
    else:
        first, second = halves(left)
        result = (first, second, right)
    return result


@gluon.jit
def halves(x):
    """The left and the right columns, without a move."""
    N: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, N // 2]), (0, 2, 1)))


@gluon.jit
def joined(left, right):
    """What `halves` took apart."""
    N: gl.constexpr = 2 * right.shape[1]
    left = gl.convert_layout(left, right.type.layout)
    return gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [right.shape[0], N])


@gluon.constexpr_function
def _OPERANDS(n, inputs):
    # n float32 that are changed, and n operands for each input beside them.
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * (n * inputs))


@gluon.constexpr_function
def _AGAIN(n):
    # A thread has two rows: elements 0, 1, 4, 5 ... and 2, 3, 6, 7 ...
    s, m_safe, alpha, scale = 2 * n, 3 * n, 4 * n, 5 * n
    lines = [
        "{ .reg .pred p; .reg .f32 x, first, second;",
        f"setp.eq.f32 p, ${alpha}, 0f3F800000;",
        f"setp.eq.and.f32 p, ${alpha + 2}, 0f3F800000, p;",
        "vote.sync.all.pred p, p, 0xffffffff;",
        "@p bra DONE;",
        f"neg.f32 first, ${m_safe};",
        f"neg.f32 second, ${m_safe + 2};",
    ]
    for i in range(n):
        row = ("first", "second")[i // 2 % 2]
        lines.append(f"fma.rn.f32 x, ${s + i}, ${scale}, {row};")
        lines.append(f"ex2.approx.ftz.f32 ${i}, x;")
    return "\n".join([*lines, "DONE: }"])
