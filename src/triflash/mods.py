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
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from triflash.spec import PLAIN, SMALLEST_FLOAT32, Features, Mod, window_of

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class ScoreMod:
    """A score modification, as `score_mod` makes it."""

    key: str
    function: Any
    derivative: Any
    gradient: Any
    reference: Callable[..., Tensor] | None


@dataclass(frozen=True, eq=False)
class MaskMod:
    """A mask modification, as `mask_mod` makes it."""

    key: str
    function: Any
    reference: Callable[..., Tensor] | None


def score_mod(
    function: Any,
    *,
    derivative: Any = None,
    gradient: Any = None,
    reference: Callable[..., Tensor] | None = None,
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

    Raises:
        TypeError: not a `@triton.jit` function, or one with another number of parameters.
    """
    check_function("score_mod", function, "score, b, h, q_idx, kv_idx, aux")
    if derivative is not None:
        check_function("derivative", derivative, "dscore, score, b, h, q_idx, kv_idx, aux")
    if gradient is not None:
        check_function("gradient", gradient, "dscore, score, b, h, q_idx, kv_idx, aux, grads")
    mod = ScoreMod(_new_key(function), function, derivative, gradient, reference)
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
        TypeError: not a `@triton.jit` function, or one with another number of parameters.
    """
    check_function("mask_mod", function, "b, h, q_idx, kv_idx, aux")
    mod = MaskMod(_new_key(function), function, reference)
    _mods[mod.key] = mod
    return mod


def get(key: str) -> Any:
    """The modification called `key` in the text of features."""
    if key in _BUILT_IN:
        return _built_in(key)
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
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Features, tuple[Tensor, ...]]:
    """What a call asks for beside plain attention, and the tensors that belong to it.

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
        if not isinstance(alibi_slopes, torch.Tensor):
            raise TypeError(
                f"alibi_slopes must be a torch.Tensor, got {type(alibi_slopes).__name__}"
            )
        tensors["alibi_slopes"] = alibi_slopes
        of_batch = alibi_slopes.shape[-1] if alibi_slopes.dim() == 2 else 0
        scores.append(Mod("alibi", ("alibi_slopes", of_batch)))
    if score_mod is None and mask_mod is None:
        if aux:
            raise ValueError("aux is for score_mod and mask_mod, and there is neither")
    else:
        bound = _bind(aux, tensors)
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
    for name, tensor in (("bias", bias), ("sinks", sinks)):
        if tensor is not None:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            tensors[name] = tensor
    if bias is not None:  # the last, so that -inf in it is no other one's input
        scores.append(Mod("bias", ("bias",)))
    mask = None if mask_mod is None else Mod(mask_mod.key, bound)
    if left is None and right is None and not scores and mask is None and sinks is None:
        return PLAIN, ()
    features = Features(left, right, tuple(scores), mask, sinks is not None)
    return features, tuple(tensors[name] for name in features.names)


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


def for_forward(features: Features, extras: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """What kernels take as ScoreMods and MaskMod in a forward; see kernels/common/mods.py."""
    if not features.mods:
        return None, None
    named = features.named(extras)
    scores = tuple((get(m.key).function, _values(m, named)) for m in features.score_mods)
    mask = features.mask_mod
    return scores or None, mask and (get(mask.key).function, _values(mask, named))


def for_backward(
    features: Features, extras: tuple[Tensor, ...]
) -> tuple[tuple[Any, Any], Callable[[Tensor, Tensor], list[Tensor]]]:
    """The same in a backward, and what gives the gradients of extras once kernels have run.

    That takes lse and delta, as `gradient_of_sinks` does.
    """
    if features is PLAIN:
        return (None, None), lambda lse, delta: []
    named = features.named(extras)
    sums: dict[str, Tensor] = {}
    scores: list[tuple[Any, ...]] = []
    for mod in features.score_mods:
        known = get(mod.key)
        entry: tuple[Any, ...] = (known.function, _values(mod, named), known.derivative)
        if any(a in features.with_grad for a in mod.aux):
            floating = [a for a in mod.aux if isinstance(a, str) and named[a].is_floating_point()]
            for name in floating:
                sums[name] = named[name].new_zeros(named[name].shape, dtype=torch.float32)
            entry = (*entry, known.gradient, _values(replace(mod, aux=tuple(floating)), sums))
        scores.append(entry)

    def dextras(lse: Tensor, delta: Tensor) -> list[Tensor]:
        if "sinks" in features.with_grad:
            sums["sinks"] = gradient_of_sinks(named["sinks"], lse, delta)
        return [
            sums[name].to(named[name].dtype) if name in sums else torch.zeros_like(named[name])
            for name in features.names
            if name in features.with_grad
        ]

    return (tuple(scores) or None, for_forward(features, extras)[1]), dextras


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
            cause = cause.__cause__ or cause.__context__
        raise


def _values(mod: Mod, named: dict[str, Tensor]) -> tuple[Any, ...]:
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
def _built_in(key: str) -> ScoreMod:
    """Lazily, because kernels need triton, which need not be installed for the reference."""
    reference = _BUILT_IN[key]
    if importlib.util.find_spec("triton") is None:
        return ScoreMod(key, None, None, None, reference)
    module = importlib.import_module("triflash.kernels.common.mods")
    function, derivative = getattr(module, key), getattr(module, f"{key}_derivative")
    return ScoreMod(key, function, derivative, getattr(module, f"{key}_gradient", None), reference)


def _new_key(function: Any) -> str:
    """A name that stands in features' text: the function's, told apart from its namesakes."""
    name = "".join(c if c.isalnum() or c in "._" else "_" for c in name_of(function))
    key, n = f"{function.fn.__module__}.{name}", 1
    while key in _mods:
        n += 1
        key = f"{function.fn.__module__}.{name}#{n}"
    return key


def _bind(aux: Any, tensors: dict[str, Tensor]) -> tuple[str | int | float, ...]:
    """aux with a name for each tensor, which goes into `tensors`."""
    if not isinstance(aux, tuple | list):
        raise TypeError(f"aux must be a tuple of tensors and numbers, got {type(aux).__name__}")
    bound: list[str | int | float] = []
    for i, value in enumerate(aux):
        if isinstance(value, torch.Tensor):
            tensors[f"aux{i}"] = value
            bound.append(f"aux{i}")
        elif isinstance(value, bool):
            bound.append(int(value))
        elif isinstance(value, int | float):
            bound.append(value)
        else:
            raise TypeError(f"aux[{i}] must be a tensor or a number, got {type(value).__name__}")
    return tuple(bound)


def _shown(value: Any) -> str:
    inner = getattr(value, "fn", value)
    return str(getattr(inner, "__qualname__", None) or type(value).__name__)
