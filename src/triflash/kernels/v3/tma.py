"""TMA in Gluon: descriptors of attention tensors, loads, and the reduction that Gluon lacks."""

from collections.abc import Callable
from functools import partial

import torch
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.7 and 3.9 gave these other names.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_buffer = gl.shared_memory_descriptor
reinterpret = getattr(_buffer, "reinterpret", None) or _buffer._reinterpret


@builtin
def reduce_add(desc, coord, src, _semantic=None):  # type: ignore[no-untyped-def]
    """Add a tile in shared memory to the descriptor's tensor, as one bulk operation of L2.

    Gluon 3.6 has the operation but no name for it; later versions have. tma.store_wait waits for
    its reads of shared memory.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle
    )


@gluon.jit
def wait_for_reductions():
    """Until this thread's reductions are in memory; tma.store_wait only waits for their reads."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fence_async_global():
    """Orders reductions of TMA and other accesses of global memory, both ways."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def meet(THREADS: gl.constexpr):
    """A barrier of the threads of several partitions, which Gluon has no name for.

    Triton uses the hardware's barriers from 0 upwards, so this one is far from them. Not bar.sync,
    which promises that all threads come to it at one instruction.
    """
    gl.inline_asm_elementwise(
        _BAR_SYNC(THREADS), "=r", [], gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.constexpr_function
def _BAR_SYNC(threads):
    return f"barrier.sync 14, {threads}; mov.u32 $0, 0;"


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing, not even that it is the same in every step."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1
    )


END = gl.constexpr(1 << 30)  # where every sequence ends for a descriptor of `ragged_view`


@gluon.jit
def load(desc, entry, head, row, seqlen, bar, smem, column=0):
    """TMA of the tile at a row of an entry, zero from its row `seqlen` on; bar already expects it.

    An entry is a batch index, and then seqlen is that of the tensor; or, if the descriptor is a
    `ragged_view`, the first row of a sequence.
    """
    if len(desc.block_type.shape) == 5:
        async_load(desc, [END, entry + seqlen, head, END - seqlen + row, column], bar, smem)
    else:
        async_load(desc, [entry, head, row, column], bar, smem)


@gluon.jit
def store(desc, entry, head, row, rows, smem, column=0):
    """TMA of a tile to a row of an entry, as in `load`; nothing is written from row `rows` on."""
    if len(desc.block_type.shape) == 5:
        async_store(desc, [END, entry + rows, head, END - rows + row, column], smem)
    else:
        async_store(desc, [entry, head, row, column], smem)


@gluon.jit
def buffers(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of a descriptor."""
    SHAPE: gl.constexpr = _ring(COUNT, desc.block_type.shape)
    return gl.allocate_shared_memory(desc.dtype, SHAPE, desc.layout)


@gluon.constexpr_function
def _ring(count, shape):
    return [count, *shape]


@gluon.jit
def parts(desc, desc1):
    """The descriptors of a tensor's parts of columns, of which the second may be None."""
    if desc1 is None:
        result = (desc,)
    else:
        result = (desc, desc1)
    return result


@gluon.jit
def rings(descs, COUNT: gl.constexpr):
    """`buffers` for each part."""
    if len(descs) == 1:
        result = (buffers(descs[0], COUNT),)
    else:
        result = (buffers(descs[0], COUNT), buffers(descs[1], COUNT))
    return result


@gluon.jit
def expect(bar, descs, more=0):
    """Have bar wait for a tile in all its parts, and `more` bytes."""
    if len(descs) == 1:
        mbarrier.expect(bar, descs[0].block_type.nbytes + more)
    else:
        mbarrier.expect(bar, descs[0].block_type.nbytes + descs[1].block_type.nbytes + more)


@gluon.jit
def load_parts(descs, entry, head, row, seqlen, bar, smem, slot):
    """`load` of each part to a slot of its ring."""
    load(descs[0], entry, head, row, seqlen, bar, smem[0].index(slot))
    if len(descs) == 2:
        load(descs[1], entry, head, row, seqlen, bar, smem[1].index(slot),
             descs[0].block_type.shape[-1])  # fmt: skip


@gluon.jit
def store_parts(descs, entry, head, row, rows, smem, slot):
    """`store` of each part from a slot of its ring."""
    store(descs[0], entry, head, row, rows, smem[0].index(slot))
    if len(descs) == 2:
        store(descs[1], entry, head, row, rows, smem[1].index(slot),
              descs[0].block_type.shape[-1])  # fmt: skip


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def tile(ring, slot):
    """Slot of a ring as [rows, headdim]."""
    return ring.index(slot).reshape([ring.shape[-2], ring.shape[-1]])


@gluon.jit
def tiles_of(rings, slot):
    """`tile` of each part."""
    if len(rings) == 1:
        result = (tile(rings[0], slot),)
    else:
        result = (tile(rings[0], slot), tile(rings[1], slot))
    return result


def view(
    shape: tuple[int, ...], stride: tuple[int, ...], rows: int, width: int, dtype: torch.dtype
) -> Callable[[torch.Tensor], TensorDescriptor]:
    """Descriptors of `(batch, nheads, seqlen, headdim)` in tiles of [1, 1, rows, width].

    Four dimensions, so that what lies past a sequence, a head or headdim is loaded as zero and
    never stored to.
    """
    batch, seqlen, nheads, headdim = shape
    # The stride of a dimension of size 1 may be junk, which TMA would refuse.
    strides = [s if n > 1 else 16 for n, s in zip(shape[:3], stride[:3], strict=True)]
    block = [1, 1, rows, width]
    return partial(
        TensorDescriptor,
        shape=[batch, nheads, seqlen, headdim],
        strides=[strides[0], strides[2], strides[1], 1],
        block_shape=block,
        layout=gl.NVMMASharedLayout.get_default_for(block, _element(dtype)),
    )


def ragged_view(
    shape: tuple[int, ...], stride: tuple[int, ...], rows: int, width: int, dtype: torch.dtype
) -> Callable[[torch.Tensor], TensorDescriptor]:
    """Descriptors of packed `(total, nheads, headdim)` in tiles of [1, 1, 1, rows, width].

    shape is `(nheads, headdim)`: they are the same for any total.

    `kernels.common.launch.ragged_descriptor` says how they end where a sequence does.
    """
    nheads, headdim = shape
    # The strides of a single row and of a single head may be junk, which TMA would refuse.
    row = stride[0] if stride[0] > 0 and stride[0] % 8 == 0 else 16
    head = stride[1] if nheads > 1 else 16
    block = [1, 1, 1, rows, width]
    return partial(
        TensorDescriptor,
        shape=[0x7FFF0000, 0x7FFF0000, nheads, END.value, headdim],
        strides=[2**34 - row, row, head, row, 1],
        block_shape=block,
        layout=gl.NVMMASharedLayout.get_default_for(block, _element(dtype)),
    )


def _element(dtype: torch.dtype) -> gl.dtype:
    return gl.float16 if dtype == torch.float16 else gl.bfloat16


def flat_view(
    rows: int, columns: int, block_rows: int
) -> Callable[[torch.Tensor], TensorDescriptor]:
    """Descriptors of float32 `(rows, columns)` in tiles of [block_rows, columns]."""
    return partial(
        TensorDescriptor,
        shape=[rows, columns],
        strides=[columns, 1],
        block_shape=[block_rows, columns],
        layout=gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2),
    )
