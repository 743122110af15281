"""Block masks: which blocks of a mask are empty, partial and full, found where the tensors are.

A mask modification is asked for every query and key once, a block at a time, and nothing as large
as the mask is ever held. From then on kernels walk lists of the blocks that are not empty.
"""

from __future__ import annotations

import importlib
import weakref
from collections import OrderedDict
from contextlib import nullcontext, suppress
from typing import Any

import torch

from triflash import mods, reference
from triflash.mods import BlockMask, MaskMod
from triflash.spec import AttentionSpec, Blocks, check_int, make_spec
from triflash.target import target_of

Tensor = torch.Tensor
_Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_MULTIPLE = 64  # tiles of kernels are cut down to what divides a block, but not further
_MOST_KEPT = 64

# Lists that were made, the longest unused first, each with the tensors of aux it was made from.
_made: OrderedDict[tuple[Any, ...], tuple[tuple[weakref.ref[Tensor], ...], _Lists]] = OrderedDict()


def create_block_mask(
    mask_mod: MaskMod,
    batch: int | None,
    nheads: int | None,
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    aux: tuple[Tensor | float, ...] = (),
    device: torch.device | str | None = None,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """The mask of causal, window_size and mask_mod, for `attention(..., block_mask=)`.

    Made on the device by a kernel that asks mask_mod of every query and key, without waiting for
    it. The lists of blocks are kept: another call with the same arguments, tensors that nobody
    wrote to since, gets them again; they are forgotten with the tensors, or when newer masks come.

    Args:
        mask_mod: from `triflash.mods.mask_mod`.
        batch: of the calls that it is for; None or 1 if the mask is the same for all entries, and
            then it is asked for entry 0.
        nheads: the same of the heads of q.
        seqlen_q, seqlen_k: lengths of the calls that it is for.
        causal, window_size, aux: as in `attention`.
        device: where aux is by default, or a GPU if there is one.
        block_size: queries and keys of a block, or one number for both; multiples of 64. Smaller
            blocks skip more, larger ones are walked faster.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: there is no GPU, and mask_mod has no reference.
    """
    if not isinstance(mask_mod, MaskMod):  # None would make a mask without one
        raise TypeError(
            f"mask_mod must come from triflash.mods.mask_mod(function), got "
            f"{type(mask_mod).__name__}"
        )
    for name, size in (("batch", batch), ("nheads", nheads)):
        check_int(name, 1 if size is None else size, 1)
    for name, size in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
        check_int(name, size, 0)
    size_q, size_k = _sizes(block_size)
    blocks = Blocks(size_q, size_k, batch or 1, nheads or 1, seqlen_q, seqlen_k)
    features, extras = mods.features_of(window_size, mask_mod=mask_mod, aux=aux)
    where = _device(device) if device is not None else _device_of(extras)
    # For its checks, which are those of attention, and its one form of windows.
    q, k = (
        torch.empty((), device=where).expand(blocks.batch, n, blocks.nheads, 1)
        for n in (seqlen_q, seqlen_k)
    )
    spec = make_spec(q, k, k, None, causal, False, False, True, features, extras)
    versions = mods.versions(extras)
    key = (spec, blocks, where, _stream(where), versions, tuple(map(id, extras)))
    lists = _kept(key, extras)
    if lists is None:
        lists = _lists(_states(spec, blocks, where, extras))
        _keep(key, extras, lists)
    window = spec.features.window_left, spec.features.window_right
    return BlockMask(mask_mod, tuple(aux), spec.causal, window, blocks, *lists, versions)


def _sizes(block_size: int | tuple[int, int]) -> tuple[int, int]:
    pair = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
        raise TypeError(f"block_size must be an int or two, got {block_size!r}")
    if any(n < 1 or n % _MULTIPLE for n in pair):
        raise ValueError(f"block_size must hold multiples of {_MULTIPLE}, got {block_size!r}")
    return pair[0], pair[1]


def _device(device: object) -> torch.device:
    """The device that `device` names, with its index."""
    try:
        where = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must be one of PyTorch's, got {device!r}: {error}") from error
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device must be one that is here, got {device!r}, and no GPU is")
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
    return where


def _device_of(extras: tuple[Tensor, ...]) -> torch.device:
    if extras:
        return extras[0].device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _stream(device: torch.device) -> int:
    """What is made on one stream may not be there yet for another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _kept(key: tuple[Any, ...], extras: tuple[Tensor, ...]) -> _Lists | None:
    found = _made.get(key)
    if found is None:
        return None
    tensors, lists = found
    if any(ref() is not t for ref, t in zip(tensors, extras, strict=True)):
        return None  # another tensor has the id of one that is gone
    with suppress(KeyError):  # another thread may have put it out by now
        _made.move_to_end(key)
    return lists


def _keep(key: tuple[Any, ...], extras: tuple[Tensor, ...], lists: _Lists) -> None:
    # Inference tensors do not tell when they are written to; what a CUDA graph is to make is not
    # there until it is replayed, and then belongs to it.
    if any(t.is_inference() for t in extras) or lists[0].is_inference():
        return
    if lists[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return
    refs = tuple(weakref.ref(t, lambda _: _made.pop(key, None)) for t in extras)
    _made[key] = refs, lists
    if len(_made) > _MOST_KEPT:
        _made.popitem(last=False)


def _states(
    spec: AttentionSpec, blocks: Blocks, device: torch.device, extras: tuple[Tensor, ...]
) -> Tensor:
    """int8 `(batch, nheads, blocks of queries, blocks of keys)`: 0 empty, 1 partial, 2 full."""
    shape = blocks.batch, blocks.nheads, *blocks.counts
    states = torch.empty(shape, dtype=torch.int8, device=device)
    if states.numel() == 0 or states.is_meta:  # which has no values
        return states
    if not target_of(device).runs_kernels:
        return _states_by_reference(states, spec, blocks, extras)
    # Lazily, because it needs triton.
    module = importlib.import_module("triflash.kernels.common.blocks")
    mask_mod = mods.for_forward(spec.features, extras)[1]
    window = spec.features.window_left, spec.features.window_right
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, mods.explained(spec.features):
        module.states_kernel[(states.numel(),)](
            states, mask_mod, blocks.nheads, blocks.seqlen_q, blocks.seqlen_k, *window,
            blocks.size_q, blocks.size_k, _MULTIPLE, spec.causal,
        )  # fmt: skip
    return states


def _states_by_reference(
    states: Tensor, spec: AttentionSpec, blocks: Blocks, extras: tuple[Tensor, ...]
) -> Tensor:
    """The same by the mask's PyTorch form, as many queries at a time as a block has."""
    for i, start in enumerate(range(0, blocks.seqlen_q, blocks.size_q)):
        queries = slice(start, min(start + blocks.size_q, blocks.seqlen_q))
        seen = reference.seen(spec, states.device, extras, queries=queries)
        shape = (*states.shape[:2], queries.stop - start, blocks.seqlen_k)
        # Keys that fill up the last block are not seen, so that it is not full.
        filled = seen.new_zeros(*shape[:3], states.shape[3] * blocks.size_k)
        filled[..., : blocks.seqlen_k] = seen
        tiles = filled.unflatten(-1, (-1, blocks.size_k))
        some, every = tiles.any(-1).any(2), tiles.all(-1).all(2)
        states[:, :, i] = some.to(torch.int8) + every
    return states


def _lists(states: Tensor) -> _Lists:
    kv_counts, kv_entries = _listed(states)
    q_counts, q_entries = _listed(states.transpose(-1, -2).contiguous())
    before = (states > 0).cumsum(-1, dtype=torch.int32) - 1
    ranks = before.transpose(-1, -2).gather(-1, q_entries // 2)
    return kv_counts, kv_entries.int(), q_counts, q_entries.int(), ranks


def _listed(states: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks how many are not empty, and their entries; then those of empty ones.

    A kernel that walks the lists of several heads as if all were as long as the longest visits some
    of these, and finds nothing in them.
    """
    above = 2 * states.shape[-1]
    block = torch.arange(0, above, 2, device=states.device)
    empty = states == 0
    entries = (block + (states == 2) + above * empty).sort(-1).values % max(1, above)
    return (~empty).sum(-1, dtype=torch.int32), entries
