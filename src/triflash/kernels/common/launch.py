"""The host side of a launch: prepared launches, and TMA descriptors of attention tensors."""

import inspect
from collections.abc import Callable
from threading import local
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16  # bytes; what Triton specialises pointers on and TMA demands of bases and strides
_NUMBERS = (int, type(None))  # what may stand where a tensor may
_MOST_BOUND = 256  # sets of addresses whose arguments a Launch keeps


class _Thread(local):
    has_context = False


_thread = _Thread()


class Launch:
    """A kernel with everything fixed but its tensors.

    Binding some twenty-five arguments costs Triton about 20 us a call, so the compiled kernel is
    kept after the first call and run directly. Whoever keeps a Launch must keep one for each device
    and each combination of dtypes, layouts and alignments of the tensors.

    Args:
        kernel: a `@triton.jit` function whose parameters are tensors, scalars, constexprs in order.
        programs: size of the one-dimensional grid.
        config: has `num_warps` and `num_stages`.
        views: the first tensors reach the kernel as the TMA descriptors that these make of them,
            or as None where there is none.
        arrange: makes the kernel's arguments behind those of the other tensors, or of what stands
            for them: their addresses.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        scalars: tuple[float | None, ...],
        constexprs: tuple[Any, ...],
        config: Any,
        views: tuple[Callable[[Any], Any] | None, ...] = (),
        arrange: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.scalars = scalars
        self.constexprs = constexprs
        self.config = config
        self.views = views
        self.arrange = arrange or _as_they_are
        self._values = (*scalars, *constexprs)
        self._run: Any = None
        self._launcher: _Launcher | None = None
        self._bound: dict[tuple[int, ...], list[Any]] = {}

    @property
    def compiled(self) -> bool:
        """Whether the next call only runs the kernel."""
        return self._run is not None

    def __call__(self, *tensors: Any, programs: int | None = None) -> None:
        """Run on the current device and stream, with `programs` if the call has its own number."""
        if not _thread.has_context:
            _enter_context()
        grid = self.grid if programs is None else (programs, 1, 1)
        hooks = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
        if self._launcher is not None and not hooks:  # which the launcher would not call
            addresses = tuple([x if type(x) in _NUMBERS else x.data_ptr() for x in tensors])
            arguments = self._bound.get(addresses) or self._bind(addresses, tensors)
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            self._launcher.run(*grid, stream, *self._launcher.fixed, *arguments)
            return
        arguments = self.arguments(tensors)
        if self._run is not None:
            self._run[grid](*arguments)
            return
        compiled = self.kernel[grid](
            *arguments, num_warps=self.config.num_warps, num_stages=self.config.num_stages
        )
        if compiled is not None:  # None from the interpreter
            self._run = compiled
            # v2's modifications and descriptors come made, which addresses cannot stand for.
            if all(type(x) in _NUMBERS or hasattr(x, "data_ptr") for x in tensors):
                self._launcher = _launcher_of(compiled)

    def arguments(self, tensors: tuple[Any, ...]) -> list[Any]:
        """What the kernel is called with for these tensors."""
        count = len(self.views)
        described = [view and view(x) for view, x in zip(self.views, tensors[:count], strict=True)]
        return [*described, *self.arrange(*tensors[count:]), *self._values]

    def _bind(self, addresses: tuple[int, ...], tensors: tuple[Any, ...]) -> list[Any]:
        """The launcher's arguments for tensors at these addresses, kept for the next such call.

        They hold addresses and no tensor, so they are right for whatever lies there by then.
        """
        assert self._launcher is not None
        bound: list[Any] = []
        count = len(self.views)
        metadata = iter(self._launcher.descriptors)
        for view, x in zip(self.views, tensors[:count], strict=True):
            bound.extend(self._launcher.encode(view(x), next(metadata)) if view else (None,))
        bound.extend((*self.arrange(*addresses[count:]), *self._values))
        if len(self._bound) >= _MOST_BOUND:
            self._bound.clear()
        self._bound[addresses] = bound
        return bound


def _enter_context() -> None:
    """Give this thread a CUDA context, without which TMA descriptors cannot be encoded.

    PyTorch gives it one with its first call of the CUDA runtime, which a thread whose tensors come
    from kept memory may not have made yet.
    """
    if not knobs.runtime.interpret and driver.active.get_current_target().backend == "cuda":
        cuda = driver.active.get_device_interface()
        if not cuda.is_current_stream_capturing():  # else there is one
            cuda.mem_get_info()
    _thread.has_context = True


def _as_they_are(*tensors: Any) -> tuple[Any, ...]:
    return tensors


class _Launcher(NamedTuple):
    """Triton's C function that launches a kernel, and the encoding of its descriptors."""

    run: Callable[..., None]
    fixed: tuple[Any, ...]  # arguments between the stream and the kernel's own
    encode: Callable[[Any, Any], list[Any]]
    descriptors: list[Any]


def _launcher_of(compiled: Any) -> _Launcher | None:
    """What lies beneath Triton 3.6's launcher, which encodes every descriptor again in each call.

    That costs it more than the launch: 13 us against 4 with four descriptors. None for other
    versions of Triton, whose own way is then taken, on AMD, and for kernels that need scratch
    memory.
    """
    launcher = compiled.run
    if type(launcher).__name__ != "CudaLauncher" or not triton.__version__.startswith("3.6."):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    from triton.backends.nvidia.driver import make_tensordesc_arg

    fixed = (
        compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    if not inspect.isfunction(launcher.launch):  # Triton wraps only what takes descriptors
        return _Launcher(launcher.launch, fixed, make_tensordesc_arg, [])
    wrapped = inspect.getclosurevars(launcher.launch).nonlocals
    return _Launcher(wrapped["launcher"], fixed, make_tensordesc_arg, wrapped["tensordesc_meta"])


def strides_of(seqlen: int, nheads: int, headdim: int) -> tuple[int, int, int]:
    """The first three strides of a contiguous `(batch, seqlen, nheads, headdim)`."""
    return seqlen * nheads * headdim, nheads * headdim, headdim


def entry_strides(stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of batch entries, rows and heads; in packed tensors an entry may begin at any row."""
    return stride[:3] if len(stride) == 4 else (stride[0], *stride[:2])


def aligned(*tensors: Any) -> tuple[bool, ...]:
    """Which tensors start at a multiple of 16 bytes."""
    return tuple(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)


def kinds(*tensors: Any) -> tuple[tuple[Any, ...], ...]:
    """What Triton compiles anew for: dtypes, which tensors start at a multiple of 16 bytes, and
    strides where they are arguments."""
    return tuple(
        (x.dtype, x.data_ptr() % _ALIGNMENT == 0, x.stride(), tuple(n == 1 for n in x.shape))
        for x in tensors
    )


def tma_can_read(*tensors: Any) -> bool:
    """Whether TMA takes these padded or packed tensors as they lie in memory."""
    return all(
        tensor.numel() > 0
        and tensor.data_ptr() % _ALIGNMENT == 0
        and all(
            size == 1 or (stride > 0 and stride * tensor.element_size() % _ALIGNMENT == 0)
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
        for tensor in tensors
    )


def tile_descriptor(tensor: Any, rows: int, block_d: int) -> TensorDescriptor:
    """A descriptor of `(batch, nheads, seqlen, headdim)` that loads [1, 1, rows, block_d].

    Four dimensions, so that what lies past a sequence or a head is zero, not its neighbour. Packed
    tensors `(total, nheads, headdim)` get a `ragged_descriptor` for the same end.
    """
    if tensor.dim() == 3:
        return ragged_descriptor(tensor, rows, block_d)
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


def ragged_descriptor(tensor: Any, rows: int, block_d: int) -> TensorDescriptor:
    """A descriptor of packed `(total, nheads, headdim)` whose tiles end where their sequence does.

    TMA returns zeros only past the end of a dimension, so the row dimension ends at row 2^30, and
    the two dimensions in front shift it there: addresses wrap around at 2^64 bytes. Row r of the
    `seqlen` rows from `start` on is [2^30, start + seqlen, head, 2^30 - seqlen + r], since
    2^30 * 2^34 elements of 2 or 4 bytes are nothing (triton.tools.ragged_tma has it so).
    """
    total, nheads, headdim = tensor.shape
    row = tensor.stride(0) if total > 1 else _ALIGNMENT
    head = tensor.stride(1) if nheads > 1 else _ALIGNMENT
    many = 0x7FFF0000
    return TensorDescriptor(
        tensor,
        shape=[many, many, nheads, 1 << 30, headdim],
        strides=[2**34 - row, row, head, row, 1],
        block_shape=[1, 1, 1, rows, block_d],
    )
