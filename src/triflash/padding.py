"""Between padded `(batch, seqlen, ...)` and packed `(total, ...)` tensors, by flash-attn's names.

Plain PyTorch, any device, with gradients; the results are those of `flash_attn.bert_padding` 2.8.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor.

    Args:
        input: `(n, ...)`, at least two dimensions.
        indices: `(total,)`, int64, each in [0, n).

    Returns:
        `(total, ...)`: input[indices]. Where an index comes twice, its gradients add up.

    Raises:
        TypeError: input or indices is no tensor, or indices are not int64.
        ValueError: input has fewer than two dimensions, indices not one, or they are elsewhere. On
            a CPU also an index that is out of range; a GPU reports it as PyTorch does.
    """
    _check_rows("input", input, indices)
    rows = f"{input.shape[0]} rows of input"
    return _in_range(lambda: input.index_select(0, indices), indices, input.shape[0], rows)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse of `index_first_axis`: values at `indices` of zeros `(first_axis_dim, ...)`.

    Raises:
        TypeError, ValueError: as `index_first_axis`; first_axis_dim is no int, or negative; values
            has other than one row an index.
    """
    _check_size("first_axis_dim", first_axis_dim)
    return _put_rows("values", values, indices, first_axis_dim)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop padding, and say where the sequences are; waits for the GPU, to know how many rows stay.

    Args:
        hidden_states: `(batch, seqlen, ...)`.
        attention_mask: `(batch, seqlen)`, any real dtype, 1 for tokens, 0 for padding.
        unused_mask: `(batch, seqlen)`, 1 for rows that are kept but do not take part: room for more
            tokens, behind those of the mask. No row may be in both.

    Returns:
        hidden_states: `(total, ...)`, the rows of either mask.
        indices: `(total,)`, int64, where they are in the flattened `(batch * seqlen, ...)`.
        cu_seqlens: `(batch + 1,)`, int32, where each sequence starts, and the total.
        max_seqlen_in_batch: the most rows of a sequence.
        seqused: `(batch,)`, int32, the rows of attention_mask alone in each sequence.

    Raises:
        TypeError: hidden_states or a mask is no tensor, or a mask is complex.
        ValueError: a mask is not `(batch, seqlen)` of hidden_states, is elsewhere, or holds
            anything but 0 and 1, as documents' numbers or -inf for padding; a row is in both masks.
    """
    _check_tensors(hidden_states=hidden_states)
    masks = {"attention_mask": attention_mask}
    if unused_mask is not None:
        masks["unused_mask"] = unused_mask
    _check_tensors(**masks)
    for name, mask in masks.items():
        if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{name} must have hidden_states' first dimensions (batch, seqlen) = "
                f"{tuple(hidden_states.shape[:2])}, got shape {tuple(mask.shape)}"
            )
        if mask.is_complex():
            raise TypeError(f"{name} must be of 0 and 1, got {mask.dtype}")
        if mask.device != hidden_states.device:
            raise ValueError(
                f"{name} must be on hidden_states' device {hidden_states.device}, got {mask.device}"
            )
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqlens = kept.sum(dim=-1, dtype=torch.int32)
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten()).flatten()
    cu_seqlens = F.pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))
    # One transfer for both; sums of other values than 0 and 1 are not their number.
    longest = seqlens.max() if seqlens.numel() else cu_seqlens[-1]
    max_seqlen, total = torch.stack([longest, cu_seqlens[-1]]).tolist()
    if total != indices.shape[0]:
        raise ValueError(
            f"{' and '.join(masks)} must hold 0 and 1 alone, with no row in both; they sum up to "
            f"{total}, and {indices.shape[0]} rows are not 0"
        )
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, max_seqlen, seqused


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`, zeros where there was padding.

    Args:
        hidden_states: `(total, ...)`.
        indices: `(total,)`, as `unpad_input` gave them.

    Returns:
        `(batch, seqlen, ...)`.

    Raises:
        TypeError, ValueError: as `index_put_first_axis`; batch or seqlen is no int, or negative.
    """
    _check_size("batch", batch)
    _check_size("seqlen", seqlen)
    padded = _put_rows("hidden_states", hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def _put_rows(name: str, rows: Tensor, indices: Tensor, n: int) -> Tensor:
    """`(n, ...)`, the rows at `indices` and zeros elsewhere; errors call the rows `name`."""
    _check_rows(name, rows, indices)
    if rows.shape[0] != indices.shape[0]:
        raise ValueError(
            f"{name} must have one row for each of {indices.shape[0]} indices, "
            f"got shape {tuple(rows.shape)}"
        )

    def put() -> Tensor:
        return rows.new_zeros(n, *rows.shape[1:]).index_copy_(0, indices, rows)

    return _in_range(put, indices, n, f"{n} rows there are to be")


def _in_range(operation: Callable[[], Tensor], indices: Tensor, n: int, rows: str) -> Tensor:
    """What `operation` gives, whose indices into n rows PyTorch checks: on a GPU by an assertion,
    and not where there are none."""
    outside = ValueError(f"indices must be at least 0 and below the {rows}")
    if n == 0 and indices.shape[0] > 0:
        raise outside
    try:
        return operation()
    except IndexError as error:
        raise outside from error


def _check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_size(name: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{name} must be at least 0, got {size}")


def _check_rows(name: str, tensor: Tensor, indices: Tensor) -> None:
    _check_tensors(**{name: tensor, "indices": indices})
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(tensor.shape)}")
    if indices.dim() != 1:
        raise ValueError(f"indices must have 1 dimension, got shape {tuple(indices.shape)}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.device != tensor.device:
        raise ValueError(
            f"indices must be on {name}'s device {tensor.device}, got {indices.device}"
        )
