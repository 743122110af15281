"""Public functions for packed tensors: sequences one behind the other, and q, k, v in one tensor.

Their gradients come packed as they did, written in place: nothing is stacked.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from triflash import mods, ops
from triflash.dropout import seed_for
from triflash.interface import (
    apart,
    no_second_derivative,
    resolved,
    transformed,
)
from triflash.reference import signed_probabilities
from triflash.spec import (
    NOT_PACKED,
    Features,
    Sequences,
    check_flag,
    check_tensors,
    make_spec,
    make_varlen_spec,
)

Tensor = torch.Tensor
_Results = Tensor | tuple[Tensor, Tensor, Tensor | None]
# Of padded tensors: no cu_seqlens, no seqused, no max_seqlen.
_PADDED = (None, None, None, None, 0, 0)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    implementation: str = "auto",
) -> _Results:
    """`flash_attn_func` of q, k and v in one tensor, whose gradient is one tensor too.

    Args:
        qkv: `(batch, seqlen, 3, nheads, headdim)`.

    Returns:
        out `(batch, seqlen, nheads, headdim)`, or with return_attn_probs
        `(out, softmax_lse, S_dmask)`.

    Raises:
        As `flash_attn_func`; ValueError: qkv has another shape.
    """
    _check_shape("qkv", qkv, ("batch", "seqlen", "3", "nheads", "headdim"))
    features = _features(qkv, window_size, softcap, alibi_slopes, dropout_p)
    options = (softmax_scale, causal, deterministic, False, implementation)
    return _results((qkv,), None, options, *features, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    implementation: str = "auto",
) -> _Results:
    """`flash_attn_func` of k and v in one tensor, whose gradient is one tensor too.

    Args:
        q: `(batch, seqlen_q, nheads, headdim)`.
        kv: `(batch, seqlen_k, 2, nheads_k, headdim)`.

    Returns:
        out `(batch, seqlen_q, nheads, headdim)`, or with return_attn_probs
        `(out, softmax_lse, S_dmask)`.

    Raises:
        As `flash_attn_func`; ValueError: kv has another shape.
    """
    _check_shape("kv", kv, ("batch", "seqlen_k", "2", "nheads_k", "headdim"))
    features = _features(q, window_size, softcap, alibi_slopes, dropout_p)
    options = (softmax_scale, causal, deterministic, False, implementation)
    return _results((q, kv), None, options, *features, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    sinks: Tensor | None = None,
    implementation: str = "auto",
) -> _Results:
    """`flash_attn_func` of sequences of any lengths, packed one behind the other without padding.

    Sequence b is rows `[cu_seqlens_q[b], cu_seqlens_q[b + 1])` of q, and sees those of k and v that
    cu_seqlens_k gives it. Lengths may be 0. `causal` is aligned to the bottom right of each. The
    call does not wait for the GPU; docs/semantics.md says how wrong values are found.

    Args:
        q: `(total_q, nheads, headdim)`.
        k: `(total_k, nheads_k, headdim)`.
        v: `(total_k, nheads_k, headdim_v)`.
        cu_seqlens_q: `(batch + 1,)`, int32, from 0 to total_q: where each sequence starts.
        cu_seqlens_k: `(batch + 1,)`, int32, from 0 to total_k.
        max_seqlen_q: a number that no sequence's queries exceed. Programs are started for it.
        max_seqlen_k: the same of keys.
        block_table: only None; keys in pages are not built.
        seqused_q: `(batch,)`, int32: only so many rows of each sequence take part. The others give
            0, lse -inf and zero gradients, and may hold anything.
        seqused_k: the same of keys, which nothing sees from there on.
        sinks: as in `attention`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs, implementation: as in `flash_attn_func`.

    Returns:
        out `(total_q, nheads, headdim_v)`, or with return_attn_probs `(out, softmax_lse, S_dmask)`,
        softmax_lse `(nheads, total_q)`, S_dmask `(batch, nheads, max_seqlen_q, max_seqlen_k)` and 0
        behind the ends of sequences, whose lengths it waits for.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: no implementation, or not the named one, supports the call.
    """
    if block_table is not None:
        raise NotImplementedError(
            "triflash does not support keys in pages (block_table): gather them into packed k and v"
        )
    sequences = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    features = _features(q, window_size, softcap, alibi_slopes, dropout_p, sinks)
    options = (softmax_scale, causal, deterministic, False, implementation)
    return _results((q, k, v), sequences, options, *features, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    implementation: str = "auto",
) -> _Results:
    """`flash_attn_varlen_func` of q, k and v in one tensor, whose gradient is one tensor too.

    Args:
        qkv: `(total, 3, nheads, headdim)`.
        cu_seqlens, max_seqlen: of q and of k.

    Returns:
        out `(total, nheads, headdim)`, or with return_attn_probs `(out, softmax_lse, S_dmask)`.

    Raises:
        As `flash_attn_varlen_func`; ValueError: qkv has another shape.
    """
    _check_shape("qkv", qkv, ("total", "3", "nheads", "headdim"))
    sequences = (cu_seqlens, cu_seqlens, None, None, max_seqlen, max_seqlen)
    features = _features(qkv, window_size, softcap, alibi_slopes, dropout_p)
    options = (softmax_scale, causal, deterministic, False, implementation)
    call = ((qkv,), sequences, options, *features, return_attn_probs)
    if torch.compiler.is_compiling():
        return _results(*call)
    try:
        return _results(*call)
    except (TypeError, ValueError) as error:  # by the names that the caller knows
        message = re.sub(r"\b(cu_seqlens|max_seqlen)_[qk]\b", r"\1", str(error))
        raise type(error)(message).with_traceback(error.__traceback__) from None


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    implementation: str = "auto",
) -> _Results:
    """`flash_attn_varlen_func` of k and v in one tensor, whose gradient is one tensor too.

    Args:
        q: `(total_q, nheads, headdim)`.
        kv: `(total_k, 2, nheads_k, headdim)`.

    Returns:
        out `(total_q, nheads, headdim)`, or with return_attn_probs `(out, softmax_lse, S_dmask)`.

    Raises:
        As `flash_attn_varlen_func`; ValueError: kv has another shape.
    """
    _check_shape("kv", kv, ("total_k", "2", "nheads_k", "headdim"))
    sequences = (cu_seqlens_q, cu_seqlens_k, None, None, max_seqlen_q, max_seqlen_k)
    features = _features(q, window_size, softcap, alibi_slopes, dropout_p)
    options = (softmax_scale, causal, deterministic, False, implementation)
    return _results((q, kv), sequences, options, *features, return_attn_probs)


def _check_shape(name: str, tensor: Tensor, sizes: tuple[str, ...]) -> None:
    """What can be wrong with a tensor of several alone, by its own name; the rest is make_spec's.

    `sizes` names the dimensions, but for the one of q, k and v, which is a number.
    """
    check_tensors(**{name: tensor})
    if tensor.dim() != len(sizes) or tensor.shape[-3] != int(sizes[-3]):
        raise ValueError(f"{name} must have shape ({', '.join(sizes)}), got {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension (stride 1), got stride "
            f"{tensor.stride(-1)}; call {name}.contiguous() first"
        )


def _features(
    q: Tensor,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    sinks: Tensor | None = None,
) -> tuple[Features, tuple[Tensor, ...]]:
    seed = seed_for(q, dropout_p)
    return mods.features_of(
        window_size, softcap, alibi_slopes, sinks=sinks, dropout_p=dropout_p, dropout_seed=seed
    )


def _results(
    tensors: tuple[Tensor, ...],
    given: tuple[Any, ...] | None,
    options: tuple[Any, ...],
    features: Features,
    extras: tuple[Tensor, ...],
    return_attn_probs: bool,
) -> _Results:
    check_flag("return_attn_probs", return_attn_probs)
    sequences = _PADDED if given is None else given
    eager = ops.is_eager(*tensors, *extras, optional=sequences[:4])
    if isinstance(tensors[0], torch.Tensor) and ops.autocast_enabled(tensors[0].device.type):
        tensors = ops.cast_for_autocast(*tensors)
        eager = False  # the operator's own rule turns autocast off inside
    *numbers, implementation = options
    q, k, v = ops.split(tensors)
    rest = (*numbers, ops.aligned_bases(q, k, v) if eager else True, features, extras)
    where = NOT_PACKED
    if given is None:
        spec = make_spec(q, k, v, *rest)
    else:
        *indices, max_seqlen_q, max_seqlen_k = sequences
        where = Sequences(*indices)
        rest = (max_seqlen_q, max_seqlen_k, *rest)
        spec = make_varlen_spec(q, k, v, where, *rest)
    needs_grad, features, spec, row = resolved(
        implementation, spec, features, tensors, extras, eager
    )  # fmt: skip
    if row is None and needs_grad:
        tensors = apart(tensors)
        sequences = (*apart(sequences[:4]), *sequences[4:])
    options = (spec.softmax_scale, *options[1:], features.text)
    if transformed() or needs_grad:
        body = (spec, row, where) if eager else None
        arguments = (*tensors, *sequences, *options, *extras)
        out, lse = _PackedAttention.apply(body, len(tensors), *arguments)
    elif eager:
        assert row is not None  # for the type checker: nothing eager is being compiled
        out, lse, _ = ops.run_forward(q, k, v, spec, row, extras, where)
    else:
        operator = torch.ops.triflash.packed_attention_forward.default
        out, lse, _ = operator(tensors, *sequences, *options, extras)
    if not return_attn_probs:
        return out
    probabilities = None
    if features.dropout_p:
        probabilities = signed_probabilities(q, k, spec, extras, where).to(out.dtype)
    return out, lse, probabilities


class _PackedAttention(torch.autograd.Function):
    """Autograd over the two operators, with gradients of the tensors as they are packed."""

    @staticmethod
    def forward(
        ctx: Any, body: tuple[Any, Any, Any] | None, n: int, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        packed, rest = arguments[: n + 4], arguments[n + 4 :]  # tensors, and where sequences are
        ctx.n, ctx.options, extras = n, rest[:_OPTIONS], rest[_OPTIONS:]
        if body is not None:
            spec, row, where = body
            q, k, v = ops.split(packed[:n])
            out, lse, saved = ops.run_forward(q, k, v, spec, row, extras, where)
        else:
            operator = torch.ops.triflash.packed_attention_forward.default
            out, lse, saved = operator(packed[:n], *packed[n:], *ctx.options, extras)
        ctx.extras = len(extras)
        ctx.save_for_backward(*packed, out, lse, *extras, *saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, n = ctx.saved_tensors, ctx.n
        packed, (out, lse), rest = tensors[: n + 4], tensors[n + 4 : n + 6], tensors[n + 6 :]
        extras, saved = rest[: ctx.extras], rest[ctx.extras :]
        if dout is None:
            dout = torch.zeros_like(out)
        gradients = no_second_derivative(_gradients)
        arguments = (*packed, out, lse, saved, ctx.options, extras)
        grads = gradients(n, dout, dlse, *arguments)
        wanted = iter(grads[n:])
        wants = ctx.needs_input_grad[2 + n + 4 + _OPTIONS :]
        dextras = (next(wanted) if want else None for want in wants)
        return None, None, *grads[:n], *[None] * (4 + _OPTIONS), *dextras


_OPTIONS = 8  # of an operator, between where sequences are and extras


def _gradients(n: int, dout: Tensor, dlse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *packed, out, lse, saved, options, extras = arguments
    eager = ops.is_eager(dout, out, lse, *extras, optional=[dlse, *packed])
    operator = torch.ops.triflash.packed_attention_backward.default
    backward = ops.packed_backward if eager else operator
    grads, dextras = backward(
        dout, dlse, packed[:n], out, lse, saved, *packed[n:], *options, extras
    )
    return *grads, *dextras
