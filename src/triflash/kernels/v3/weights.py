"""What v3's forward makes of a tile of scores: modifications, masks, exponentials, sums.

Beside the arithmetic of `kernels/common` here is what keeps ptxas and LLVM from undoing it, each
with what it brought.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triflash.kernels.common.mask import visible
from triflash.kernels.common.mods import modify
from triflash.kernels.common.softmax import softmax_step

SLACK = gl.constexpr(8.0)  # p may be up to 2^8 before the maximum that it is relative to moves


@gluon.constexpr_function
def limit_of(dtype):
    """The largest sum of a row under a kept maximum, of p in dtype."""
    return 65504.0 if dtype == gl.float16 else 2.0**40  # then |v| may be up to 2^87


@gluon.constexpr_function
def headroom_of(dtype):
    """By how much a kept maximum is larger, in base 2.

    In float16 p ends at 2^16, and below 2^-14 has the same error at any size: one of 2^-20 of a
    row's first maximum, with five.
    """
    return 5.0 if dtype == gl.float16 else 0.0


@gluon.jit
def signed(s, SCALE_SIGN: gl.constexpr):
    """Scores for softmax_step, which wants a positive scale."""
    if SCALE_SIGN < 0:
        s = -s
    elif SCALE_SIGN == 0:
        s = gl.zeros_like(s)
    return s


@gluon.jit
def keys_of(s, start_n):
    """Indices of the keys of a tile of scores, [1, BLOCK_N]."""
    return start_n + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]


@gluon.jit
def modified(s, constant, batch, head, q_idx, start_n, seqlen_q, seqlen_k, ScoreMods,
             INSIDE: gl.constexpr, BASE_2: gl.constexpr):  # fmt: skip
    """q k^T behind the scale and all modifications. constant: the scale, or that of a fused one."""
    if len(ScoreMods[0]) == 3:
        # Relative to the block, so that its keys need no conversion of their own in each.
        s = ScoreMods[0][0](s, q_idx - start_n, keys_of(s, 0), seqlen_q, seqlen_k, constant)
    else:
        if not BASE_2:
            s = s * constant
        k_idx = keys_of(s, start_n)
        s = modify(s, batch, head, q_idx, k_idx, seqlen_q, seqlen_k, ScoreMods, INSIDE)
    return s


@gluon.constexpr_function
def can_hide(score_mods):
    """Whether a modification of scores may give -inf: a user's own, or a bias."""
    return score_mods is not None and len(score_mods[0]) == 2


@gluon.jit
def mask(s, q_idx, start_n, seqlen_q, seqlen_k, window_left, window_right, CAUSAL: gl.constexpr):
    """Scores with -inf where causal, a window or the end hides keys."""
    seen = visible(q_idx, keys_of(s, start_n), seqlen_q, seqlen_k, CAUSAL, False, window_left,
                   window_right)  # fmt: skip
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def mask_at_the_end(s, q_idx, start_n, seqlen_q, seqlen_k, CAUSAL: gl.constexpr):
    """`mask` without windows, for a tile's first block.

    There LLVM would make a word of bits of the comparisons and take it apart again, 350
    instructions: with `edges` 293 to 309 at d128 causal, 512.
    """
    N: gl.constexpr = s.shape[1] // 2  # elements of a thread
    last = q_idx + (seqlen_k - seqlen_q) if CAUSAL else seqlen_k - 1
    room, s = gl.broadcast(last - keys_of(s, start_n), s)
    return gl.inline_asm_elementwise(
        _HIDE(N), _IN_PLACE(N, "r"), [s, room], gl.float32, is_pure=True, pack=N
    )


@gluon.constexpr_function
def _HIDE(n):
    # The distance of a thread's columns from its first, against the room behind that in its row.
    lines = ["{ .reg .pred p;"]
    for i in range(n):
        column, row = i // 4 * 8 + i % 2, i // 2 % 2
        lines.append(f"setp.lt.s32 p, ${2 * n + 2 * row}, {column};")
        lines.append(f"@p mov.f32 ${i}, 0fFF800000;")
    return "\n".join([*lines, "}"])


@gluon.jit
def weights(s, m_i, scale_log2, MASKED: gl.constexpr, SLACK: gl.constexpr,
            HEADROOM: gl.constexpr, moving, C: gl.constexpr):  # fmt: skip
    """`softmax_step`, bounded with 0 for every maximum, and behind a tile's first block (SLACK)
    with the maximum that it kept (HEADROOM), unless that is `moving`."""
    if C.bounded:
        m_new, p, alpha = gl.zeros_like(m_i), gl.exp2(s * scale_log2), gl.full_like(m_i, 1.0)
    elif C.kept and SLACK > 0.0:
        m_new, alpha = m_i, gl.full_like(m_i, 1.0)
        m_safe = m_i
        if C.moves:
            if moving:
                m_new, _p, alpha = softmax_step(s, m_i, scale_log2, MASKED, SLACK)
            m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s * scale_log2 - m_safe[:, None])
    else:
        m_new, p, alpha = softmax_step(s, m_i, scale_log2, MASKED, SLACK, HEADROOM)
    return m_new, p, alpha


@gluon.jit
def sum_of_lanes(p):
    """[ROWS, 4] sums of the columns that each of four lanes has of a row.

    They are added up once a tile instead of once a step: 0 to 3% at any width (measured).
    """
    ROWS: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, N // 8, 4, 2]), 3), 1)


@gluon.jit
def not_within(l_i, LIMIT: gl.constexpr):
    """Whether sums are larger than LIMIT, or NaN."""
    return ~(l_i <= LIMIT)


@gluon.jit
def held(l_i):
    """l_i, behind a branch that nothing passes before l_i is there. It is never taken: sums of
    exponentials are not negative."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        HOLD: setp.lt.f32 p, $0, 0f00000000;
        setp.lt.or.f32 p, $1, 0f00000000, p;
        @!p bra DONE;
        nanosleep.u32 20;
        bra HOLD;
        DONE:
        }""",
        "=f,=f,0,1",
        [l_i],
        gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def rescaled(acc, alpha):
    """acc * alpha. A warp whose rows all have alpha = 1 skips the products, which SLACK makes the
    rule: 2% at d64 and d128, 5% at d256 (measured)."""
    N: gl.constexpr = min(acc.shape[1] // 2, 64)  # elements of a thread that go together
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))
    alpha, acc = gl.broadcast(alpha[:, None], acc)
    return gl.inline_asm_elementwise(
        _MULTIPLY(N), _IN_PLACE(N, "f"), [acc, alpha], gl.float32, is_pure=True, pack=N
    )


@gluon.constexpr_function
def _MULTIPLY(n):
    # A thread has two rows: elements 0, 1, 4, 5 ... and 2, 3, 6, 7 ... of acc.
    lines = [
        "{ .reg .pred p;",
        f"setp.eq.f32 p, ${2 * n}, 0f3F800000;",
        f"setp.eq.and.f32 p, ${2 * n + 2}, 0f3F800000, p;",
        "vote.sync.all.pred p, p, 0xffffffff;",
        "@p bra DONE;",
        *(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)),
        "DONE: }",
    ]
    return "\n".join(lines)


@gluon.constexpr_function
def _IN_PLACE(n, kind):
    # n float32 that are changed, and n operands beside them.
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + [kind] * n)
