"""What only the values of cu_seqlens and seqused tell: whether they are right, and what is long."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from triflash.spec import AttentionSpec, Sequences

Tensor = torch.Tensor

# By the id of a tensor: the tensor, and the last check that it passed, so that the layers of a
# model check it once.
_checked: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...]]] = {}


def check_sequences(spec: AttentionSpec, sequences: Sequences) -> None:
    """Check the values of the tensors of a packed call, once for each tensor and version of it.

    On a CPU a wrong value is a ValueError. On a GPU nothing may wait for values, so the check is
    queued like a kernel, and a wrong value is a device-side assertion, as with an index of
    PyTorch's own that is out of range: the next call that waits for the GPU raises RuntimeError.

    Raises:
        ValueError: cu_seqlens does not begin with 0, decreases, does not end with the total, or has
            a sequence longer than max_seqlen; or seqused is not in [0, length].
    """
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, _ = sequences
    total_q, total_k = spec.totals
    for side, cu_seqlens, seqused, total, longest in (
        ("q", cu_seqlens_q, seqused_q, total_q, spec.seqlen_q),
        ("k", cu_seqlens_k, seqused_k, total_k, spec.seqlen_k),
    ):
        assert cu_seqlens is not None  # for the type checker: the spec is of a packed call
        assert total is not None
        bounds = (_version(cu_seqlens), total, longest)
        if not _passed(cu_seqlens, bounds):
            _check_cu_seqlens(side, cu_seqlens, total, longest)
            _remember(cu_seqlens, bounds)
        if seqused is not None:
            used = (_version(seqused), cu_seqlens.data_ptr(), bounds)
            if not _passed(seqused, used):
                _check_seqused(side, seqused, cu_seqlens)
                _remember(seqused, used)


def longest_first(sequences: Sequences) -> Sequences:
    """With their order by how much work they are, so that no long one is left over at the end.

    Found once for each pair of cu_seqlens. Not while a CUDA graph is captured: what was found
    before may be freed before the graph is, so the graph finds it by itself.
    """
    cu_seqlens_q, cu_seqlens_k = sequences.cu_seqlens_q, sequences.cu_seqlens_k
    assert cu_seqlens_q is not None  # for the type checker, as above
    assert cu_seqlens_k is not None
    if cu_seqlens_q.is_cuda and torch.cuda.is_current_stream_capturing():
        return sequences._replace(order=_by_work(cu_seqlens_q, cu_seqlens_k))
    key = (id(cu_seqlens_q), id(cu_seqlens_k))
    versions = (_version(cu_seqlens_q), _version(cu_seqlens_k))
    of_q, of_k, known, order = _orders.get(key, (None, None, None, None))
    if known != versions or of_q() is not cu_seqlens_q or of_k() is not cu_seqlens_k:
        order = _by_work(cu_seqlens_q, cu_seqlens_k)
        forget = partial(_forget, key)
        references = weakref.ref(cu_seqlens_q, forget), weakref.ref(cu_seqlens_k, forget)
        _orders[key] = *references, versions, order
    return sequences._replace(order=order)


def _by_work(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    work = cu_seqlens_q.diff().float() * cu_seqlens_k.diff()
    return torch.argsort(work, descending=True, stable=True).to(torch.int32)


_orders: dict[tuple[int, int], tuple[Any, ...]] = {}


def _forget(key: tuple[int, int], _: object) -> None:
    _orders.pop(key, None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _passed(tensor: Tensor, bounds: tuple[Any, ...]) -> bool:
    reference, checked = _checked.get(id(tensor), (None, None))
    return checked == bounds and reference is not None and reference() is tensor


def _remember(tensor: Tensor, bounds: tuple[Any, ...]) -> None:
    key = id(tensor)
    _checked[key] = weakref.ref(tensor, lambda _: _checked.pop(key, None)), bounds


def _check_cu_seqlens(side: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    if cu_seqlens.device.type != "cpu":
        lengths = cu_seqlens.diff()
        right = ((lengths >= 0) & (lengths <= longest)).all()
        right = right & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
        torch._assert_async(
            right,
            f"triflash: cu_seqlens_{side} must rise from 0 to {total}, the rows of {side}, by at "
            f"most max_seqlen_{side}",
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
