"""The host side of forward.cu: which configuration, compiled when, launched how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from triflash import tuning
from triflash.kernels.cuda.compile import load_cubin
from triflash.spec import AttentionSpec
from triflash.target import Target, target_of

_SOURCE = Path(__file__).with_name("forward.cu")
_ELEMENTS = {torch.float16: "cute::half_t", torch.bfloat16: "cute::bfloat16_t"}
_WIDTHS = (32, 64, 96, 128, 192, 256)
_VECTOR = 16  # bytes that cp.async copies at once


@dataclass(frozen=True)
class KernelConfig:
    """One instantiation of forward.cu, whose header says what each field means."""

    dtype: torch.dtype
    width: int
    tiles: tuning.CudaTileConfig
    aligned: bool

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a tile of q, and rings of k and v."""
        rows = self.tiles.block_m + 2 * self.tiles.num_stages * self.tiles.block_n
        return rows * self.width * self.dtype.itemsize

    @property
    def macros(self) -> tuple[tuple[str, str], ...]:
        tiles = self.tiles
        return (
            ("ELEMENT", _ELEMENTS[self.dtype]),
            ("HEADDIM", str(self.width)),
            ("BLOCK_M", str(tiles.block_m)),
            ("BLOCK_N", str(tiles.block_n)),
            ("NUM_WARPS", str(tiles.num_warps)),
            ("MIN_BLOCKS", str(tiles.min_blocks)),
            ("STAGES", str(tiles.num_stages)),
            ("Q_IN_REGISTERS", str(int(tiles.q_in_registers))),
            ("ALIGNED", str(int(self.aligned))),
        )


def kernel_config(spec: AttentionSpec, target: Target, aligned: bool) -> KernelConfig:
    """The configuration that runs `spec`; `aligned` if rows are whole 16-byte vectors."""
    headdim = max(spec.headdim, spec.headdim_v)
    width = next(width for width in _WIDTHS if width >= headdim)
    tiles = tuning.cuda_v1_forward(spec, target, aligned)
    return KernelConfig(spec.dtype, width, tiles, aligned)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse float32 `(batch, nheads, seqlen_q)`.

    The first call of a configuration compiles it, which takes some seconds once for a machine.
    """
    out = q.new_empty((spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v))
    lse = q.new_empty((spec.batch, spec.nheads, spec.seqlen_q), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, []
    launch = _prepare(
        spec, target_of(q.device), q.device.index, q.stride()[:3], k.stride()[:3], v.stride()[:3],
        rows_are_vectors(q, k, v),
    )  # fmt: skip
    launch(q, k, v, out, lse)
    return out, lse, []


def rows_are_vectors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether every row of q, k, v and out starts and ends at a multiple of 16 bytes."""
    size = q.element_size()
    return all(
        tensor.data_ptr() % _VECTOR == 0
        and tensor.shape[3] * size % _VECTOR == 0
        and all(
            # The stride of a dimension of size 1 may be junk, and is never used.
            length == 1 or stride * size % _VECTOR == 0
            for length, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        )
        for tensor in (q, k, v)
    )


@dataclass(frozen=True)
class Launch:
    """A compiled kernel with everything but its tensors."""

    config: KernelConfig
    blocks: int
    scalars: tuple[float | int, ...]
    device: int
    arch: str

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Run on torch's current stream of the device, which must be the current one."""
        from cuda.bindings import driver
        from cuda.core import Device, launch

        # torch makes its context current in a thread at the first call that needs one, which may
        # be this one.
        if int(driver.cuCtxGetCurrent()[1]) == 0:
            Device(self.device).set_current()
        kernel = load_kernel(self.config, self.device, self.arch)
        stream = _stream(torch.cuda.current_stream(self.device).cuda_stream)
        pointers = [tensor.data_ptr() for tensor in tensors]
        grid = _grid(self.blocks, self.config)
        launch(stream, grid, kernel, *pointers, *self.scalars)


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: int,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
    aligned: bool,
) -> Launch:
    config = kernel_config(spec, target, aligned)
    return Launch(
        config,
        math.ceil(spec.seqlen_q / config.tiles.block_m) * spec.nheads * spec.batch,
        (spec.softmax_scale * math.log2(math.e), *stride_q, *stride_k, *stride_v, spec.nheads,
         spec.group_size, spec.seqlen_q, spec.seqlen_k, spec.headdim, spec.headdim_v,
         int(spec.causal)),
        device,
        target.arch,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def load_kernel(config: KernelConfig, device: int, arch: str) -> Any:
    """The kernel of `config`, compiled or read from the cache, ready to launch on `device`."""
    cubin = load_cubin(_SOURCE, config.macros, arch, config.tiles.opt_level)
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    kernel = ObjectCode.from_cubin(cubin).get_kernel("attention_forward")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(attribute, config.shared_bytes, kernel.handle, device)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"cuda_v1 needs {config.shared_bytes} bytes of shared memory a block, which {arch} "
            f"refuses: {error.name}"
        )
    return kernel


@lru_cache(maxsize=4096)
def _grid(blocks: int, config: KernelConfig) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(
        grid=blocks, block=32 * config.tiles.num_warps, shmem_size=config.shared_bytes
    )


@lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    from cuda.core import LEGACY_DEFAULT_STREAM, Stream

    return Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM
