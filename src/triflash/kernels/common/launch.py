"""The host side of a launch: prepared launches, and TMA descriptors of attention tensors."""

from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16  # bytes; what Triton specialises pointers on and TMA demands of bases and strides


class Launch:
    """A kernel with everything fixed but its tensors.

    Binding some twenty-five arguments costs Triton about 20 us a call, so the compiled kernel is
    kept after the first call and run directly. Whoever keeps a Launch must keep one for each device
    and each combination of dtypes, layouts and alignments of the tensors.

    Args:
        kernel: a `@triton.jit` function whose parameters are tensors, scalars, constexprs in order.
        programs: size of the one-dimensional grid.
        config: has `num_warps` and `num_stages`.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        scalars: tuple[float, ...],
        constexprs: tuple[Any, ...],
        config: Any,
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.scalars = scalars
        self.constexprs = constexprs
        self.config = config
        self._values = (*scalars, *constexprs)
        self._run: Any = None

    def __call__(self, *tensors: Any) -> None:
        """Run on the current device and stream."""
        if self._run is not None:
            self._run(*tensors, *self._values)
            return
        compiled = self.kernel[self.grid](
            *tensors,
            *self._values,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
        )
        if compiled is not None:  # None from the interpreter
            self._run = compiled[self.grid]


def strides_of(seqlen: int, nheads: int, headdim: int) -> tuple[int, int, int]:
    """The first three strides of a contiguous `(batch, seqlen, nheads, headdim)`."""
    return seqlen * nheads * headdim, nheads * headdim, headdim


def aligned(*tensors: Any) -> tuple[bool, ...]:
    """Which tensors start at a multiple of 16 bytes."""
    return tuple(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)


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
