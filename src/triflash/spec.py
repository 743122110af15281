"""One meaning for every argument: all validation ends here, and kernels see only the result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REFERENCE_DTYPES = (*KERNEL_DTYPES, torch.float64)
_SMALLEST_FLOAT32 = 2.0**-126  # that is not subnormal


@dataclass(frozen=True)
class AttentionSpec:
    """A validated attention call, without its tensors.

    Tensors are `(batch, seqlen, nheads, headdim)`; `headdim` is that of q and k, `headdim_v` that
    of v and out. docs/semantics.md states what each field means. `tma`: q, k and v lie in memory as
    TMA can read them, which is no part of the call's meaning (docs/adr/0010).
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    dtype: torch.dtype
    softmax_scale: float
    causal: bool = False
    deterministic: bool = False
    allow_tf32: bool = False
    tma: bool = True

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (1 without GQA)."""
        return self.nheads // self.nheads_k if self.nheads_k else 1


def make_spec(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    aligned_bases: bool = True,
) -> AttentionSpec:
    """Validate a call by its metadata alone and give its spec.

    Args:
        aligned_bases: q, k and v start at multiples of 16 bytes. Only who has the memory, as
            operators do, can know.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not floating point or not supported.
        ValueError: ranks, shapes, dtypes, devices or strides that do not fit together.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    # Dynamo cannot hash symbolic sizes, and needs to see the comparisons to guard on them.
    validate = _validate.__wrapped__ if torch.compiler.is_compiling() else _validate
    return validate(
        q.shape, k.shape, v.shape,
        q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device,
        q.stride(), k.stride(), v.stride(),
        softmax_scale, causal, deterministic, allow_tf32, aligned_bases,
    )  # fmt: skip


@lru_cache(maxsize=4096, typed=True)  # True and 1 are one key otherwise
def _validate(
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
    q_device: torch.device,
    k_device: torch.device,
    v_device: torch.device,
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    aligned_bases: bool,
) -> AttentionSpec:
    shapes = (("q", q_shape), ("k", k_shape), ("v", v_shape))
    for name, shape in shapes:
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, seqlen, nheads, headdim), "
                f"got shape {tuple(shape)}"
            )
    if q_dtype not in REFERENCE_DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q_dtype}")
    for name, dtype in (("k", k_dtype), ("v", v_dtype)):
        if dtype != q_dtype:
            raise TypeError(f"{name} must have q's dtype {q_dtype}, got {dtype}")
    for name, device in (("k", k_device), ("v", v_device)):
        if device != q_device:
            raise ValueError(f"{name} must be on q's device {q_device}, got {device}")

    batch, seqlen_q, nheads, headdim = q_shape
    _, seqlen_k, nheads_k, headdim_v = v_shape
    for name, shape in shapes[1:]:
        if shape[0] != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {shape[0]}")
    if k_shape[3] != headdim:
        raise ValueError(f"k must have q's headdim {headdim}, got {k_shape[3]}")
    if k_shape[1] != seqlen_k:
        raise ValueError(f"v must have k's seqlen {k_shape[1]}, got {seqlen_k}")
    if k_shape[2] != nheads_k:
        raise ValueError(f"v must have k's nheads {k_shape[2]}, got {nheads_k}")
    if (nheads_k == 0 and nheads != 0) or (nheads_k != 0 and nheads % nheads_k != 0):
        raise ValueError(f"nheads of q ({nheads}) must be a multiple of nheads of k ({nheads_k})")
    for name, size in (("headdim of q and k", headdim), ("headdim of v", headdim_v)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    layouts = (("q", q_shape, q_stride), ("k", k_shape, k_stride), ("v", v_shape, v_stride))
    for name, shape, stride in layouts:
        if stride[3] != 1 and shape[3] > 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension (stride 1), got stride {stride[3]}; "
                f"call {name}.contiguous() first"
            )
    if softmax_scale is None:
        softmax_scale = headdim**-0.5
    elif isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise TypeError(
            f"softmax_scale must be a number or None, got {type(softmax_scale).__name__}"
        )
    elif not -3.0e38 < softmax_scale < 3.0e38:
        raise ValueError(f"softmax_scale must be finite in float32, got {softmax_scale}")
    elif abs(softmax_scale) < _SMALLEST_FLOAT32 and q_dtype != torch.float64:
        softmax_scale = 0.0  # as a GPU flushes it; kernels treat 0 by itself
    for name, flag in (
        ("causal", causal),
        ("deterministic", deterministic),
        ("allow_tf32", allow_tf32),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    return AttentionSpec(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        nheads=nheads,
        nheads_k=nheads_k,
        headdim=headdim,
        headdim_v=headdim_v,
        dtype=q_dtype,
        softmax_scale=float(softmax_scale),
        causal=causal,
        deterministic=deterministic,
        allow_tf32=allow_tf32,
        # While compiling, strides may be symbols; the operator will see numbers.
        tma=torch.compiler.is_compiling()
        or (aligned_bases and all(_tma_can_read(s, st, q_dtype) for _, s, st in layouts)),
    )


def _tma_can_read(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Strides are multiples of 16 bytes and not 0, but for dimensions of size 1, where any will do.

    Nothing is read of an empty tensor.
    """
    return 0 in shape or all(
        n == 1 or (s > 0 and s * dtype.itemsize % 16 == 0)
        for n, s in zip(shape[:3], stride[:3], strict=True)
    )
