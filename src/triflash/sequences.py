"""What only the values of cu_seqlens and seqused tell: their order, their ends, their range."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import torch

from triflash.spec import AttentionSpec, Sequences

Tensor = torch.Tensor

# By the id of a tensor: the tensor, and the last check that it passed, so that the layers of a
# model check it once.
_checked: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...]]] = {}


def check_sequences(
    spec: AttentionSpec, sequences: Sequences, totals: tuple[int | None, int | None]
) -> None:
    """Check the values of the tensors of a packed call, once for each tensor and version of it.

    On a CPU a wrong value is a ValueError. On a GPU nothing may wait for values, so the check is
    queued like a kernel, and a wrong value is a device-side assertion, as with an index of
    PyTorch's own that is out of range: the next call that waits for the GPU raises RuntimeError.
    A CUDA graph that is being captured gets the check in any case, for the values of its replays.

    Raises:
        ValueError: cu_seqlens does not begin with 0, decreases, does not end with the total, or has
            a sequence longer than max_seqlen; or seqused is not in [0, length].
    """
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = sequences
    total_q, total_k = totals
    capturing = _capturing(cu_seqlens_q)
    # One tensor for both is what functions of packed qkv call cu_seqlens, and the first check of it
    # is that of both. Nobody is there to rename it in a message from a GPU.
    one = cu_seqlens_q is cu_seqlens_k
    for side, cu_seqlens, seqused, total, longest in (
        ("q", cu_seqlens_q, seqused_q, total_q, spec.seqlen_q),
        ("k", cu_seqlens_k, seqused_k, total_k, spec.seqlen_k),
    ):
        assert cu_seqlens is not None  # for the type checker: the spec is of a packed call
        assert total is not None
        ending = "" if one else f"_{side}"
        bounds = (_version(cu_seqlens), total, longest)
        if capturing or not _passed(cu_seqlens, bounds):
            _check_cu_seqlens(side, ending, cu_seqlens, total, longest)
            if not capturing:  # what is captured has not run
                _remember(cu_seqlens, bounds)
        if seqused is not None:
            used = (_version(seqused), cu_seqlens.data_ptr(), bounds)
            if capturing or not _passed(seqused, used):
                _check_seqused(side, seqused, cu_seqlens)
                if not capturing:
                    _remember(seqused, used)


def _capturing(tensor: Tensor | None) -> bool:
    """Whether what is queued for the tensor's device goes into a CUDA graph."""
    return tensor is not None and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _passed(tensor: Tensor, bounds: tuple[Any, ...]) -> bool:
    reference, checked = _checked.get(id(tensor), (None, None))
    return checked == bounds and reference is not None and reference() is tensor


def _remember(tensor: Tensor, bounds: tuple[Any, ...]) -> None:
    key = id(tensor)
    _checked[key] = weakref.ref(tensor, lambda _: _checked.pop(key, None)), bounds


def _check_cu_seqlens(side: str, ending: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    if cu_seqlens.device.type != "cpu":
        lengths = cu_seqlens.diff()
        right = ((lengths >= 0) & (lengths <= longest)).all()
        right = right & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
        torch._assert_async(
            right,
            f"triflash: cu_seqlens{ending} must rise from 0 to {total}, the rows of {side}, by at "
            f"most max_seqlen{ending}",
        )
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens_{side} must begin with 0, got {values[0]}")
    rows = [end - start for start, end in pairwise(values)]
    for i, length in enumerate(rows):
        if length < 0:
            raise ValueError(
                f"cu_seqlens_{side} must not decrease, got {values[i + 1]} after {values[i]} at "
                f"index {i + 1}"
            )
    if values[-1] != total:
        raise ValueError(
            f"cu_seqlens_{side} must end with the {total} rows of {side}, got {values[-1]}"
        )
    if max(rows, default=0) > longest:
        raise ValueError(
            f"max_seqlen_{side} must be at least the longest sequence of cu_seqlens_{side}, "
            f"{max(rows)} rows, got {longest}"
        )


def _check_seqused(side: str, seqused: Tensor, cu_seqlens: Tensor) -> None:
    lengths = cu_seqlens.diff()
    wrong = (seqused < 0) | (seqused > lengths)
    if seqused.device.type != "cpu":
        torch._assert_async(
            ~wrong.any(), f"triflash: seqused_{side} must be from 0 to the sequence's length"
        )
    elif wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"seqused_{side} must be from 0 to the sequence's length {int(lengths[i])}, got "
            f"{int(seqused[i])} at index {i}"
        )
