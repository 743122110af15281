"""Score and mask modifications: small Triton functions that reach the kernels as they are.

A user's function is as good as a built-in one; those are in kernels/common/mods.py, softcap, ALiBi
and bias, written as a user would write them. The signatures, all `@triton.jit`:

    score_mod   (score, b, h, q_idx, kv_idx, aux) -> score
    derivative  (dscore, score, b, h, q_idx, kv_idx, aux) -> dscore
    gradient    (dscore, score, b, h, q_idx, kv_idx, aux, grads), adds to the tensors of grads
    mask_mod    (b, h, q_idx, kv_idx, aux) -> bool

score is a float32 tile: q k^T * softmax_scale, changed by the modifications before. b and h are
scalars, q_idx and kv_idx int32 tiles that broadcast to score's, always of positions that exist. aux
holds what the call gave as aux, tensors as pointers, and behind it seqlen_q and seqlen_k.
"""

from __future__ import annotations

import importlib.util
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import torch

from triflash.dropout import checked
from triflash.spec import (
    BLOCK_LISTS,
    PLAIN,
    SMALLEST_FLOAT32,
    AttentionSpec,
    Blocks,
    Features,
    Mod,
    check_tensors,
    window_of,
)

Tensor = torch.Tensor


class _Modification:
    """What is known by its key alone, so that a copy of a model which holds one holds the same."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # its functions are Triton's, with a lock inside


@dataclass(frozen=True, eq=False)
class ScoreMod(_Modification):
    """A score modification, as `score_mod` makes it."""

    key: str
    function: Any
    derivative: Any
    gradient: Any
    reference: Callable[..., Tensor] | None
    bound: Callable[[tuple[Any, ...]], float | None] | None = None
    fused: Any = None


@dataclass(frozen=True, eq=False)
class MaskMod(_Modification):
    """A mask modification, as `mask_mod` makes it; `parts` are those that it joins, if any."""

    key: str
    function: Any
    reference: Callable[..., Tensor] | None
    parts: tuple[MaskMod, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A mask with the blocks of it that are not empty, as `triflash.create_block_mask` makes it.

    Attributes:
        mask_mod, aux, causal, window_size: what makes the mask; a query sees a key if all show it.
        blocks: sizes, and what the mask was made for.
        kv_counts: `(batch, nheads, blocks of queries)` int32, how many blocks of keys each sees;
            batch and nheads are 1 if the mask is the same for all.
        kv_entries: `(batch, nheads, blocks of queries, blocks of keys)` int32, which, rising, as
            2 * block, and 1 more if each of its queries sees each of its keys; behind them
            the empty ones.
        q_counts, q_entries: the same of the queries for each block of keys.
        q_ranks: for each of q_entries how many blocks of keys its queries see before this one.
        versions: of the tensors of aux when the mask was made.
    """

    mask_mod: MaskMod
    aux: tuple[Any, ...]
    causal: bool
    window_size: tuple[int | None, int | None]
    blocks: Blocks
    kv_counts: Tensor
    kv_entries: Tensor
    q_counts: Tensor
    q_entries: Tensor
    q_ranks: Tensor
    versions: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, nheads, seqlen_q, seqlen_k)`; batch and nheads are 1 if it is one for all."""
        blocks = self.blocks
        return blocks.batch, blocks.nheads, blocks.seqlen_q, blocks.seqlen_k

    def states(self) -> Tensor:
        """int8 `(batch, nheads, blocks of queries, blocks of keys)`: 0 empty, 1 partial, 2 full."""
        of_keys = self.blocks.counts[1]
        listed = torch.arange(of_keys, device=self.kv_counts.device) < self.kv_counts[..., None]
        state = torch.where(listed, self.kv_entries % 2 + 1, 0).to(torch.int8)
        return torch.zeros_like(state).scatter_(-1, self.kv_entries.long() // 2, state)

    def sparsity(self) -> float:
        """Empty blocks of all, in percent; waits for the GPU."""
        states = self.states()
        return 100.0 * int((states == 0).sum()) / max(1, states.numel())

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockMask:
        """With tensors of its own, as up to date as this one is."""
        copied = {f.name: deepcopy(getattr(self, f.name), memo) for f in fields(self)}
        fresh = self.versions == versions(self.aux)
        copied["versions"] = versions(copied["aux"]) if fresh else (-1,) * len(self.versions)
        return BlockMask(**copied)

    def __repr__(self) -> str:
        """The counts, which wait for the GPU."""
        counts = torch.bincount(self.states().flatten().long(), minlength=3).tolist()
        words = ", ".join(
            f"{n} {name}" for n, name in zip(counts, ("empty", "partial", "full"), strict=True)
        )
        size = f"{self.blocks.size_q} x {self.blocks.size_k}"
        return f"BlockMask({self.mask_mod.key}, shape={self.shape}, blocks of {size}: {words})"


def score_mod(
    function: Any,
    *,
    derivative: Any = None,
    gradient: Any = None,
    reference: Callable[..., Tensor] | None = None,
    bound: Callable[[tuple[Any, ...]], float | None] | None = None,
    fused: Any = None,
) -> ScoreMod:
    """A score modification for `attention(..., score_mod=)`; make it once, not in every call.

    Args:
        function: `@triton.jit`, `(score, b, h, q_idx, kv_idx, aux) -> score`, float32 as it came.
        derivative: `@triton.jit`, `(dscore, score, b, h, q_idx, kv_idx, aux) -> dscore`, where
            score is what function got and dscore the gradient of what it returned; linear in
            dscore. None: calls that want gradients are refused.
        gradient: `@triton.jit`, `(dscore, score, b, h, q_idx, kv_idx, aux, grads)`: adds, with
            `tl.atomic_add`, to grads, which has a float32 tensor for each floating-point tensor of
            aux, in order and of its shape. dscore is 0 where a key is hidden. None: aux has no
            gradient.
        reference: function again, in PyTorch on tensors that broadcast to
            `(batch, nheads, seqlen_q, seqlen_k)`, for the implementation "reference".
        bound: `(aux) -> number or None`, in Python: what no score that function returns exceeds in
            absolute value, for the call's aux, which has None for tensors. With a small one v3 need
            not look for the largest score (bfloat16). If it is wrong, results may be too.
        fused: `@triton.jit`, of the same parameters: function of s * scale, times log2(e), so that
            both factors can go into constants of its own. scale > 0 is in aux, before seqlen_q and
            seqlen_k. For v3's forward, so NVIDIA GPUs alone; not where scores are modified twice.

    Raises:
        TypeError: not a `@triton.jit` function, or one with another number of parameters; a
            reference or bound that is no function of Python.
    """
    check_function("score_mod", function, "score, b, h, q_idx, kv_idx, aux")
    if derivative is not None:
        check_function("derivative", derivative, "dscore, score, b, h, q_idx, kv_idx, aux")
    if gradient is not None:
        check_function("gradient", gradient, "dscore, score, b, h, q_idx, kv_idx, aux, grads")
    _check_python("reference", reference, "score, b, h, q_idx, kv_idx, aux")
    _check_python("bound", bound, "aux")
    if fused is not None:
        check_function("fused", fused, "s, b, h, q_idx, kv_idx, aux")
    mod = ScoreMod(_new_key(function), function, derivative, gradient, reference, bound, fused)
    _mods[mod.key] = mod
    return mod


def mask_mod(function: Any, *, reference: Callable[..., Tensor] | None = None) -> MaskMod:
    """A mask modification for `attention(..., mask_mod=)`; make it once, not in every call.

    Args:
        function: `@triton.jit`, `(b, h, q_idx, kv_idx, aux) -> bool`, whether the query sees the
            key. Hidden keys stay hidden, whatever it says of them.
        reference: function again, in PyTorch on tensors that broadcast to
            `(batch, nheads, seqlen_q, seqlen_k)`, for the implementation "reference".

    Raises:
        TypeError: not a `@triton.jit` function, or one with another number of parameters; or
            reference is one, or no function.
    """
    check_function("mask_mod", function, "b, h, q_idx, kv_idx, aux")
    _check_python("reference", reference, "b, h, q_idx, kv_idx, aux")
    mod = MaskMod(_new_key(function), function, reference)
    _mods[mod.key] = mod
    return mod


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """A mask modification that shows a key if all of these do, each of which gets the call's aux.

    The same for the same modifications, so it may be called anywhere.

    Raises:
        TypeError: one is not from `mask_mod`.
        ValueError: there is none, or two functions have one name.
    """
    return _joined("and", mask_mods)


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """The same of what shows a key if any of these does."""
    return _joined("or", mask_mods)


def _joined(how: str, mask_mods: tuple[MaskMod, ...]) -> MaskMod:
    if not mask_mods:
        raise ValueError(f"{how}_masks needs at least one mask modification, got none")
    for i, mod in enumerate(mask_mods):
        if not isinstance(mod, MaskMod):
            raise TypeError(
                f"argument {i} of {how}_masks must come from triflash.mods.mask_mod(function), got "
                f"{_shown(mod)}"
            )
    first, *others = mask_mods
    for other in others:
        first = _joined_pair(how, first, other)
    return first


@cache
def _joined_pair(how: str, first: MaskMod, second: MaskMod) -> MaskMod:
    operation = {"and": operator.and_, "or": operator.or_}[how]
    of_first, of_second = first.reference, second.reference
    reference = None
    if of_first is not None and of_second is not None:

        def reference(*arguments: Any) -> Tensor:
            return operation(of_first(*arguments), of_second(*arguments))

    parts = tuple(dict.fromkeys((*(first.parts or (first,)), *(second.parts or (second,)))))
    names = [f"{part.function.fn.__module__}.{name_of(part.function)}" for part in parts]
    for name in names:
        if names.count(name) > 1:  # Triton would take one for the other
            raise ValueError(
                f"{how}_masks cannot join two functions that are both called {name}: give them "
                "names of their own"
            )
    # Lazily, because modifications exist without triton, though a function of it does not.
    join = getattr(importlib.import_module("triflash.kernels.common.mods"), f"{how}_functions")
    key = f"({first.key} {how} {second.key})"
    mod = MaskMod(key, join(first.function, second.function, key), reference, parts)
    _mods[key] = mod
    return mod


def get(key: str, approximate: bool = False) -> Any:
    """The modification called `key` in the text of features.

    approximate: built-in ones may be off by what half precision is.
    """
    if key in _BUILT_IN:
        return _built_in(key, approximate)
    if key not in _mods:
        raise ValueError(
            f"no modification is called {key!r} here; make it with triflash.mods before"
        )
    return _mods[key]


def features_of(
    window_size: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    aux: tuple[Any, ...] = (),
    block_mask: BlockMask | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Features, tuple[Tensor, ...]]:
    """What a call asks for beside plain attention, and the tensors that belong to it.

    dropout_seed is that of `dropout.seed_for`, if dropout_p is not 0.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    left, right = window_of(window_size)
    tensors: dict[str, Tensor] = {}
    scores = []
    if isinstance(softcap, bool) or not isinstance(softcap, int | float):
        raise TypeError(f"softcap must be a number, got {type(softcap).__name__}")
    if not 0.0 <= softcap < 3.0e38:
        raise ValueError(f"softcap must be at least 0 (0 is none) and finite, got {softcap}")
    if 0.0 < softcap < SMALLEST_FLOAT32:  # its inverse overflows, and 0 times that is NaN
        raise ValueError(f"softcap must be 0 (none) or at least 2^-126, got {softcap}")
    if softcap:
        scores.append(Mod("softcap", (float(softcap),)))
    if alibi_slopes is not None:
        check_tensors(alibi_slopes=alibi_slopes)
        tensors["alibi_slopes"] = alibi_slopes
        of_batch = alibi_slopes.shape[-1] if alibi_slopes.dim() == 2 else 0
        scores.append(Mod("alibi", ("alibi_slopes", of_batch)))
    bound = _bind(aux, tensors)
    if score_mod is None and mask_mod is None:
        if bound:
            raise ValueError("aux is for score_mod and mask_mod, and there is neither")
    else:
        if score_mod is not None:
            if not isinstance(score_mod, ScoreMod):
                raise TypeError(
                    "score_mod must come from triflash.mods.score_mod(function, derivative=...), "
                    f"got {_shown(score_mod)}"
                )
            scores.append(Mod(score_mod.key, bound))
        if mask_mod is not None and not isinstance(mask_mod, MaskMod):
            raise TypeError(
                f"mask_mod must come from triflash.mods.mask_mod(function), got {_shown(mask_mod)}"
            )
    dropout_p = checked(dropout_p)
    named = (("bias", bias), ("dropout_seed", dropout_seed), ("sinks", sinks))
    for name, tensor in named:
        if tensor is not None:
            check_tensors(**{name: tensor})
            tensors[name] = tensor
    if bias is not None:  # the last, so that -inf in it is no other one's input
        scores.append(Mod("bias", ("bias",)))
    mask = None if mask_mod is None else Mod(mask_mod.key, bound)
    blocks = None
    if block_mask is not None:
        _check_block_mask(block_mask, mask is None and left is None and right is None)
        left, right = block_mask.window_size
        mask = Mod(block_mask.mask_mod.key, _bind(block_mask.aux, tensors, "mask_aux"))
        blocks = block_mask.blocks
        tensors.update((name, getattr(block_mask, name)) for name in BLOCK_LISTS)
    plain = left is None and right is None and not scores and mask is None
    if plain and sinks is None and dropout_p == 0.0:
        return PLAIN, ()
    features = Features(
        left, right, tuple(scores), mask, sinks is not None, blocks=blocks, dropout_p=dropout_p
    )
    return features, tuple(tensors[name] for name in features.names)


def causal_of(causal: bool, block_mask: BlockMask | None) -> bool:
    """causal of a call: its own, or that of its block mask.

    Raises:
        ValueError: both are given.
    """
    if block_mask is None:
        return causal
    if causal is not False:
        raise ValueError(_WHOLE_MASK.format("causal"))
    return block_mask.causal


_WHOLE_MASK = (
    "block_mask is the whole mask, so there can be no {} beside it: give that to "
    "triflash.create_block_mask"
)


def _check_block_mask(block_mask: Any, alone: bool) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must come from triflash.create_block_mask, got {_shown(block_mask)}"
        )
    if not alone:
        raise ValueError(_WHOLE_MASK.format("mask_mod or window_size"))
    if torch.compiler.is_compiling():  # where tensors have no version
        return
    if block_mask.versions != versions(block_mask.aux):
        raise ValueError(
            "block_mask is out of date: a tensor of its aux was written to since it was made; "
            "make it again"
        )


def versions(aux: tuple[Any, ...]) -> tuple[int, ...]:
    """How often each tensor of aux was written to; those of inference mode do not tell."""
    tensors = [a for a in aux if isinstance(a, torch.Tensor)]
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def differentiable(features: Features, extras: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Names of the extras whose gradients are wanted.

    Raises:
        NotImplementedError: a modification cannot be differentiated, or not with respect to these.
    """
    wanted = tuple(name for name, t in zip(features.names, extras, strict=True) if t.requires_grad)
    for mod in features.score_mods:
        names = ", ".join(a for a in mod.aux if a in wanted)
        if mod.key in _BUILT_IN:  # not loaded: Dynamo traces this
            if names and mod.key != "bias":
                raise NotImplementedError(f"{names} cannot have a gradient: detach it")
            continue
        if get(mod.key).derivative is None:
            raise NotImplementedError(
                f"score_mod {mod.key} has no derivative: give it to "
                "triflash.mods.score_mod, or call under torch.no_grad()"
            )
        if names and get(mod.key).gradient is None:
            raise NotImplementedError(
                f"score_mod {mod.key} has no gradient for {names}: give one to "
                "triflash.mods.score_mod, or detach it"
            )
    return wanted


def for_forward(
    features: Features, extras: tuple[Any, ...], approximate: bool = False
) -> tuple[Any, Any]:
    """What kernels take as ScoreMods and MaskMod in a forward; see kernels/common/mods.py.

    approximate: of NVIDIA GPUs in half precision, which then take their own instructions.
    """
    if not features.mods:
        return None, None
    named = features.named(extras)
    scores = tuple(
        (get(m.key, approximate).function, _values(m, named)) for m in features.score_mods
    )
    mask = features.mask_mod
    return scores or None, mask and (get(mask.key).function, _values(mask, named))


def fused_forward(features: Features, extras: tuple[Any, ...]) -> tuple[Any, Any]:
    """`for_forward`, approximate, of a single built-in modification in its fused form.

    Its entry is `(function, aux, constants)`: `constants(b, h, softmax_scale, aux)`, called once a
    tile of queries, gives a factor > 0 and a constant, and `function(s, q_idx, kv_idx, seqlen_q,
    seqlen_k, constant)` the modified score divided by the factor, of q k^T.
    """
    [(_, values)], mask = for_forward(features, extras)
    key = features.score_mods[0].key
    module = importlib.import_module("triflash.kernels.common.mods")
    return ((getattr(module, f"fused_{key}"), values, getattr(module, f"{key}_constants")),), mask


def fused_backward(features: Features, extras: tuple[Any, ...]) -> tuple[Any, Any]:
    """The same for a backward; its entry has one function more.

    `derivative(dscore, modified)` takes what `function` gave, and is linear in dscore.
    """
    [entry], mask = fused_forward(features, extras)
    module = importlib.import_module("triflash.kernels.common.mods")
    return ((*entry, getattr(module, f"fused_{features.score_mods[0].key}_derivative")),), mask


def in_base_2(features: Features) -> bool:
    """Whether the only modification of scores is a user's that has a fused form."""
    keys = [mod.key for mod in features.score_mods]
    return len(keys) == 1 and keys[0] not in _BUILT_IN and get(keys[0]).fused is not None


def base_2_forward(
    features: Features, extras: tuple[Any, ...], softmax_scale: float
) -> tuple[Any, Any]:
    """`for_forward` where `in_base_2`: takes q k^T, gives scores in base 2."""
    [(_, values)], mask = for_forward(features, extras)
    fused = get(features.score_mods[0].key).fused
    return ((fused, (*values, abs(softmax_scale) or 1.0)),), mask


def score_bound(features: Features) -> float | None:
    """What no modified score exceeds in absolute value, if that is known."""
    if not features.score_mods:
        return None
    last = features.score_mods[-1]
    if last.key == "softcap":
        return float(last.aux[0])
    bound = None if last.key in _BUILT_IN else get(last.key).bound
    if bound is None:
        return None
    found = bound(tuple(None if isinstance(a, str) else a for a in last.aux))
    return None if found is None else float(found)


def dropout_of(features: Features, extras: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
    """What kernels take as Dropout; see kernels/common/dropout.py."""
    if features.dropout_p == 0.0:
        return None
    return features.named(extras)["dropout_seed"], features.dropout_p


def key_lists(features: Features, extras: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What kernels that own queries take as BlockLists; see kernels/common/blocks.py."""
    return _lists(features, extras, BLOCK_LISTS[:2])


def query_lists(features: Features, extras: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The same for kernels that own keys."""
    return _lists(features, extras, BLOCK_LISTS[2:])


def inside(spec: AttentionSpec, block_m: int, block_n: int) -> bool:
    """Whether all positions of all tiles exist, INSIDE of kernels that modify or mask.

    Modifications then load what lies side by side in one piece. False without modifications, where
    nothing depends on it.
    """
    size_q, size_k = block_sizes(spec.features)
    whole = spec.seqlen_q % (size_q or block_m) == 0 and spec.seqlen_k % (size_k or block_n) == 0
    return whole and spec.varlen is None and bool(spec.features.mods)


def block_sizes(features: Features) -> tuple[int | None, int | None]:
    """Queries and keys of a listed block, SIZE_Q and SIZE_K of kernels."""
    blocks = features.blocks
    return (None, None) if blocks is None else (blocks.size_q, blocks.size_k)


def _lists(
    features: Features, extras: tuple[Any, ...], names: tuple[str, ...]
) -> tuple[Any, ...] | None:
    blocks = features.blocks
    if blocks is None:
        return None
    named = features.named(extras)
    counts, entries, *ranks = (named[name] for name in names)
    *_, rows, length = blocks.shapes[BLOCK_LISTS.index(names[1])]
    rows_b = blocks.nheads * rows if blocks.batch > 1 else 0
    return counts, entries, rows_b, rows if blocks.nheads > 1 else 0, length, *ranks


def for_backward(
    features: Features, extras: tuple[Tensor, ...]
) -> tuple[tuple[Any, Any], Callable[[Tensor, Tensor], list[Tensor]]]:
    """The same in a backward, and what gives the gradients of extras once kernels have run.

    That takes lse and delta, as `gradient_of_sinks` does.
    """
    if features is PLAIN:
        return (None, None), lambda lse, delta: []
    sums = aux_sums(features, extras)
    arguments = backward_arguments(features, extras, sums)
    return arguments, partial(gradients, features, extras, sums)


def aux_sums(features: Features, extras: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What kernels of a backward add gradients of aux to, by name: float32, 0."""
    named = features.named(extras)
    return {
        name: named[name].new_zeros(named[name].shape, dtype=torch.float32)
        for mod in features.score_mods
        if any(name in features.with_grad for name in mod.aux)
        for name in mod.aux
        if isinstance(name, str) and named[name].is_floating_point()
    }


def backward_arguments(
    features: Features,
    extras: tuple[Any, ...],
    sums: Mapping[str, Any],
    approximate: bool = False,
) -> tuple[Any, Any]:
    """ScoreMods and MaskMod of a backward; `sums` as from `aux_sums`, the rest as `for_forward`."""
    if not features.mods:
        return None, None
    named = features.named(extras)
    scores: list[tuple[Any, ...]] = []
    for mod in features.score_mods:
        known = get(mod.key, approximate)
        entry: tuple[Any, ...] = (known.function, _values(mod, named), known.derivative)
        if any(name in features.with_grad for name in mod.aux):
            grads = replace(mod, aux=tuple(name for name in mod.aux if name in sums))
            entry = (*entry, known.gradient, _values(grads, sums))
        scores.append(entry)
    return tuple(scores) or None, for_forward(features, extras)[1]


def gradients(
    features: Features,
    extras: tuple[Tensor, ...],
    sums: dict[str, Tensor],
    lse: Tensor,
    delta: Tensor | None,
) -> list[Tensor]:
    """The gradients of extras, once kernels have run; lse and delta as in `gradient_of_sinks`.

    delta may be None if sinks have no gradient.
    """
    named = features.named(extras)
    if "sinks" in features.with_grad:
        assert delta is not None
        sums["sinks"] = gradient_of_sinks(named["sinks"], lse, delta)
    return [
        sums[name].to(named[name].dtype) if name in sums else torch.zeros_like(named[name])
        for name in features.names
        if name in features.with_grad
    ]


def gradient_of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """`(nheads,)`, in lse's dtype; bitwise the same in every run.

    A sink is a key whose value is 0, so ds = p (0 - delta), with p = exp(sink - lse).

    Args:
        lse: `(batch, nheads, seqlen_q)`, packed `(nheads, total_q)`.
        delta: rowsum(out * dout) - dlse, of lse's shape; where lse is -inf it may be anything.
    """
    p = torch.exp(sinks.to(lse.dtype).unsqueeze(-1) - lse)
    terms = torch.where(lse == float("-inf"), 0.0, p * delta)
    return -terms.sum(-1).reshape(-1, lse.shape[-2]).sum(0)


@contextmanager
def explained(features: Features) -> Iterator[None]:
    """Names the function in errors of kernels/common/mods.py, which are raised in compiling."""
    try:
        yield
    except Exception as error:
        blamable = {
            "score_mod": features.score_mods,
            "derivative": features.score_mods,
            "mask_mod": (features.mask_mod,),
        }
        cause: BaseException | None = error
        while cause is not None:
            for what, mods in blamable.items():
                found = re.search(rf"a {what} must return [^\"']*", str(cause))
                if found:
                    keys = [mod.key for mod in mods if mod and mod.key not in _BUILT_IN]
                    raise TypeError(f"{', '.join(keys)}: {found[0].strip()}") from error
            if re.search(r"GluonSemantic.*'layout'", str(cause)):
                keys = [mod.key for mod in features.mods if mod.key not in _BUILT_IN]
                raise TypeError(
                    f"{', '.join(keys)}: v3 cannot compile tl.arange, tl.full or tl.zeros in it; "
                    'compute from the indices, or call with implementation="v2"'
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _values(mod: Mod, named: Mapping[str, Any]) -> tuple[Any, ...]:
    values = tuple(named[a] if isinstance(a, str) else a for a in mod.aux)
    return (*values, *_strides(named["bias"])) if mod.key == "bias" else values


def _strides(tensor: Tensor) -> tuple[tuple[int, ...], ...]:
    """Each in a tuple, which is empty for dimensions of size 1, which stand for any size."""
    return tuple((s,) if n > 1 else () for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def check_function(what: str, function: Any, parameters: str) -> None:
    """Raise a TypeError that says what `function` must be if it is something else."""
    inner = getattr(function, "fn", None)
    # Triton's own classes, compiled and interpreted, without importing triton for the check.
    if not callable(inner) or not type(function).__module__.startswith("triton."):
        raise TypeError(
            f"{what} must be a @triton.jit function ({parameters}), got {_shown(function)}"
        )
    names = list(inspect.signature(inner).parameters)
    if len(names) != len(parameters.split(",")):
        raise TypeError(
            f"{what} {name_of(function)} must take ({parameters}), got ({', '.join(names)})"
        )


def _check_python(what: str, function: Any, parameters: str) -> None:
    """The same of what is not given, or a function of Python and not of Triton."""
    if function is None:
        return
    if not callable(function) or type(function).__module__.startswith("triton."):
        raise TypeError(
            f"{what} must be a function ({parameters}) of Python, got {_shown(function)}"
        )


def name_of(function: Any) -> str:
    """The name of a jit function, as its author wrote it."""
    return str(getattr(function.fn, "__qualname__", function.fn))


def softcap_reference(score: Tensor, b, h, q_idx, kv_idx, aux) -> Tensor:  # type: ignore[no-untyped-def]
    """kernels/common/mods.py `softcap` in PyTorch."""
    return aux[0] * torch.tanh(score / aux[0])


def alibi_reference(score: Tensor, b, h, q_idx, kv_idx, aux) -> Tensor:  # type: ignore[no-untyped-def]
    """kernels/common/mods.py `alibi` in PyTorch."""
    slopes, of_batch, seqlen_q, seqlen_k = aux
    slope = slopes[b, h] if of_batch else slopes[h]
    return score - slope.to(score.dtype) * (q_idx + seqlen_k - seqlen_q - kv_idx).abs()


def bias_reference(score: Tensor, b, h, q_idx, kv_idx, aux) -> Tensor:  # type: ignore[no-untyped-def]
    """kernels/common/mods.py `bias` in PyTorch; in base 2 the least numbers of float32 are -inf."""
    score = score + aux[0].to(score.dtype)
    return score.masked_fill(score < -2.3e38, float("-inf"))


_mods: dict[str, ScoreMod | MaskMod] = {}
_BUILT_IN = {"softcap": softcap_reference, "alibi": alibi_reference, "bias": bias_reference}


@cache
def _built_in(key: str, approximate: bool) -> ScoreMod:
    """Lazily, because kernels need triton, which need not be installed for the reference."""
    reference = _BUILT_IN[key]
    if importlib.util.find_spec("triton") is None:
        return ScoreMod(key, None, None, None, reference)
    module = importlib.import_module("triflash.kernels.common.mods")
    function, derivative = (
        getattr(module, f"approximate_{name}" if approximate else name, getattr(module, name))
        for name in (key, f"{key}_derivative")
    )
    return ScoreMod(key, function, derivative, getattr(module, f"{key}_gradient", None), reference)


def _new_key(function: Any) -> str:
    """A name that stands in features' text: the function's, told apart from its namesakes."""
    name = f"{function.fn.__module__}.{name_of(function)}"
    name = "".join(c if c.isalnum() or c in "._" else "_" for c in name)
    key, n = name, 1
    while key in _mods:
        n += 1
        key = f"{name}#{n}"
    return key


def _bind(
    aux: Any, tensors: dict[str, Tensor], prefix: str = "aux"
) -> tuple[str | int | float, ...]:
    """aux with a name for each tensor, which goes into `tensors`."""
    if not isinstance(aux, tuple | list):
        raise TypeError(f"aux must be a tuple of tensors and numbers, got {type(aux).__name__}")
    bound: list[str | int | float] = []
    for i, value in enumerate(aux):
        if isinstance(value, torch.Tensor):
            if value.is_complex() or value.is_quantized:
                raise TypeError(f"aux[{i}] must be of ints, floats or bools, got {value.dtype}")
            tensors[f"{prefix}{i}"] = value
            bound.append(f"{prefix}{i}")
        elif isinstance(value, bool):
            bound.append(int(value))
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"aux[{i}] must fit into 64 bits, got {value}")
        elif isinstance(value, int | float):
            bound.append(value)
        else:
            raise TypeError(f"aux[{i}] must be a tensor or a number, got {type(value).__name__}")
    return tuple(bound)


def _shown(value: Any) -> str:
    inner = getattr(value, "fn", value)
    return str(getattr(inner, "__qualname__", None) or type(value).__name__)


def __getattr__(name: str) -> Any:
    """Functions for modifications; lazily, because they need triton."""
    if name not in ("reciprocal", "approximate_reciprocal"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("triflash.kernels.common.mods"), name)
