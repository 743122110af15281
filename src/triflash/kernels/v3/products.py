"""Products of wgmma whose tiles lie in one or two parts of columns: tuples of one or two."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def products(a, b, acc, USE_ACC: gl.constexpr):
    """a b^T over all parts of columns, begun; on top of acc if USE_ACC."""
    acc = warpgroup_mma(a[0], b[0].permute((1, 0)), acc, use_acc=USE_ACC, is_async=True)
    if len(a) == 2:
        acc = warpgroup_mma(a[1], b[1].permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def add_products(x, b, acc):
    """acc + x b for each part of columns, begun; x is of `operands`."""
    first = warpgroup_mma(x[0], b[0], acc[0], is_async=True)
    if len(acc) == 1:
        result = (first,)
    else:
        result = (first, warpgroup_mma(x[1], b[1], acc[1], is_async=True))
    return result


@gluon.jit
def finished(acc, BEHIND: gl.constexpr = 0):
    """acc, waited for; BEHIND products that were begun later may go on."""
    if len(acc) == 1:
        result = (warpgroup_mma_wait(BEHIND, deps=acc),)
    else:
        result = warpgroup_mma_wait(BEHIND, deps=acc)
    return result


@gluon.jit
def operands(x, acc):
    """x as the left operand of the products that add to acc, which it is already."""
    if len(acc) == 1:
        result = (operand(x, acc[0]),)
    else:
        result = (operand(x, acc[0]), operand(x, acc[1]))
    return result


@gluon.jit
def operand(x, acc):
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(x, LAYOUT)
