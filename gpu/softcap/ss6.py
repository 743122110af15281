"""Soft signs, fused and bounded: reciprocals by MUFU, half by integers and three FFMA, all so."""
import triton, triton.language as tl
from triflash import mods
from triflash.bench.variant_mods import SOFT_SIGN, soft_sign, soft_sign_derivative, soft_sign_reference
_N = """sub.s32 y, 0x7EF31000, {x};
mov.b32 f, y;
neg.f32 n, {x};
fma.rn.f32 e, n, f, 0f3F800000;
fma.rn.f32 e, e, e, e;
fma.rn.f32 {o}, f, e, f;"""
_HALF = "{ .reg .b32 y; .reg .f32 e, f, n; rcp.approx.ftz.f32 $0, $2;" + _N.format(x="x", o="$1").replace("sub.s32 y, 0x7EF31000, x;", "mov.b32 y, $3; sub.s32 y, 0x7EF31000, y;").replace("neg.f32 n, x;", "neg.f32 n, $3;") + "}"
_ALL = "{ .reg .b32 y; .reg .f32 e, f, n;" + _N.format(x="x", o="$0").replace("sub.s32 y, 0x7EF31000, x;", "mov.b32 y, $1; sub.s32 y, 0x7EF31000, y;").replace("neg.f32 n, x;", "neg.f32 n, $1;") + "}"
HALF, ALL = tl.constexpr(_HALF), tl.constexpr(_ALL)
@triton.jit
def half_fused(s, b, h, q_idx, kv_idx, aux):
    ln_2 = 0.6931471805599453
    d = ln_2 / aux[1] + tl.abs(s) * (ln_2 / aux[0])
    return s * tl.inline_asm_elementwise(HALF, "=&f,=&f,f,f", [d], dtype=tl.float32, is_pure=True, pack=2)
@triton.jit
def all_fused(s, b, h, q_idx, kv_idx, aux):
    ln_2 = 0.6931471805599453
    d = ln_2 / aux[1] + tl.abs(s) * (ln_2 / aux[0])
    return s * tl.inline_asm_elementwise(ALL, "=&f,f", [d], dtype=tl.float32, is_pure=True, pack=1)
def make(fused):
    return mods.score_mod(soft_sign, derivative=soft_sign_derivative, reference=soft_sign_reference, bound=lambda aux: aux[0], fused=fused)
MODS = {"rcp": SOFT_SIGN, "half": make(half_fused), "all": make(all_fused)}
