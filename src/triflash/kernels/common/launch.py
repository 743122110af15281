"""The host side of a launch: cached compiled kernels, and TMA descriptors of attention tensors."""

from collections.abc import Hashable
from typing import Any

import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16  # bytes; what Triton specialises pointers on and TMA demands of bases and strides
_MAX_CACHED = 8192  # a bound for callers whose shapes never repeat

_runners: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constexprs: tuple[Hashable, ...],
    config: Any,
) -> None:
    """Run `kernel` on the current device and stream.

    Binding some twenty-five arguments costs Triton about 20 us a call. The compiled kernel depends
    on nothing but what is in the key below, so a repeated call goes straight to it.

    Args:
        kernel: a `@triton.jit` function whose parameters are `args`, then `constexprs`, in order.
        config: has `num_warps` and `num_stages`.
    """
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if isinstance(kernel, InterpretedFunction):
        kernel[grid](*args, *constexprs, **options)
        return
    device = triton.runtime.driver.active.get_current_device()
    key = (kernel, device, grid, constexprs, config, *map(_specialisation, args))
    runner = _runners.get(key)
    if runner is None:
        compiled = kernel[grid](*args, *constexprs, **options)
        if len(_runners) >= _MAX_CACHED:
            _runners.clear()
        _runners[key] = compiled[grid]
    else:
        runner(*args, *constexprs)


def _specialisation(arg: Any) -> Hashable:
    """All that Triton can specialise a kernel on: more than it does, never less."""
    if isinstance(arg, int):
        return arg
    if isinstance(arg, float):
        return float
    if isinstance(arg, TensorDescriptor):
        return (arg.base.dtype, *arg.block_shape)
    return (arg.dtype, arg.data_ptr() % _ALIGNMENT)


def tma_can_read(*tensors: Any) -> bool:
    """Whether TMA takes these `(batch, seqlen, nheads, headdim)` tensors as they lie in memory."""
    return all(
        tensor.numel() > 0
        and tensor.data_ptr() % _ALIGNMENT == 0
        and all(
            size == 1 or (stride > 0 and stride * tensor.element_size() % _ALIGNMENT == 0)
            for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        )
        for tensor in tensors
    )


def tile_descriptor(tensor: Any, rows: int, block_d: int) -> TensorDescriptor:
    """A descriptor of `(batch, nheads, seqlen, headdim)` that loads [1, 1, rows, block_d].

    Four dimensions, so that what lies past a sequence or a head is zero, not its neighbour.
    """
    batch, seqlen, nheads, headdim = tensor.shape
    # The stride of a dimension of size 1 may be junk, which TMA would refuse.
    strides = [
        stride if size > 1 else _ALIGNMENT
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    ]
    return TensorDescriptor(
        tensor,
        shape=[batch, nheads, seqlen, headdim],
        strides=[strides[0], strides[2], strides[1], 1],
        block_shape=[1, 1, rows, block_d],
    )
