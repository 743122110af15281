"""The public functions of padded tensors. Each call is validated here, becomes one operator, or its
body where nobody would see the operator, and lands in a kernel: interface -> ops -> the registry's
row. `packed` has those of packed tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from triflash import mods, ops, registry
from triflash.dropout import seed_for
from triflash.reference import signed_probabilities
from triflash.spec import PLAIN, AttentionSpec, Features, check_flag, make_spec
from triflash.target import target_of

Tensor = torch.Tensor
_Tensors = tuple[Tensor, ...]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float = 0,  # an int, of which Dynamo makes no symbol
    alibi_slopes: Tensor | None = None,
    score_mod: mods.ScoreMod | None = None,
    mask_mod: mods.MaskMod | None = None,
    aux: tuple[Tensor | float, ...] = (),
    block_mask: mods.BlockMask | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    allow_tf32: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(q k^T * softmax_scale) v, without holding the scores in memory.

    FlashAttention (arXiv:2205.14135) and FlashAttention-2 (arXiv:2307.08691, Algorithms 1 and 2).

    Args:
        q: `(batch, seqlen_q, nheads, headdim)`, float16, bfloat16 or float32 (float64 with the
            reference). Any strides whose last is 1; nothing is copied.
        k: `(batch, seqlen_k, nheads_k, headdim)`; nheads must be a multiple of nheads_k (GQA), and
            query head h reads key head h // (nheads // nheads_k).
        v: `(batch, seqlen_k, nheads_k, headdim_v)`; headdim_v may differ from headdim.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (aligned to the bottom right). A row
            that sees no key gives 0, lse -inf (or the sink) and zero gradients.
        softmax_scale: factor on the scores, headdim ** -0.5 by default.
        window_size: `(left, right)`: query i sees keys from p - left to p + right, both included,
            where p = i + seqlen_k - seqlen_q; None or -1 for no bound. causal bounds the right
            side whatever is given here.
        softcap: cap > 0 makes scores cap * tanh(score / cap); 0 leaves them.
        alibi_slopes: float32 `(nheads,)` or `(batch, nheads)`; adds -slope * |p - j| to the score
            of query i and key j, behind softcap. It has no gradient: detach a parameter.
        score_mod: from `triflash.mods.score_mod`; changes scores behind softcap and alibi_slopes.
        mask_mod: from `triflash.mods.mask_mod`; hides keys beside causal and window_size.
        aux: what score_mod and mask_mod get: tensors, contiguous and on q's device, and numbers.
        block_mask: from `triflash.create_block_mask`; the whole mask, of which empty blocks are
            skipped and full ones not masked. causal, window_size and mask_mod go there then.
        sinks: `(nheads,)`, float32 or q's dtype: a score more in the softmax of each row, of a key
            whose value is 0 (gpt-oss; flash-attn's learnable_sink). It has a gradient.
        bias: `(batch, nheads, seqlen_q, seqlen_k)` or 1 for any of them, float32 or q's dtype, any
            strides: added to the scores behind all modifications. -inf hides a key. It has a
            gradient, summed where it is 1.
        dropout_p: each weight is dropped with this probability, and what stays grows by
            1 / (1 - dropout_p); lse is that without. Rounded to a multiple of 2^-16.
        dropout_seed: int64 `(1,)` on q's device, from which follows what is dropped; None draws one
            from PyTorch's generator.
        return_lse: also return the log of the softmax denominators; its gradient flows.
        deterministic: refuse implementations whose gradients differ from run to run.
        allow_tf32: let float32 inputs use tf32 tensor cores (10 mantissa bits); float32 by default.
        implementation: "auto", or a name of `implementations()`, which is never replaced silently.

    Returns:
        out `(batch, seqlen_q, nheads, headdim_v)` in q's dtype; with return_lse also lse
        `(batch, nheads, seqlen_q)`, float32, natural log.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: no implementation, or not the named one, supports the call.
    """
    features, extras = mods.features_of(
        window_size, softcap, alibi_slopes, score_mod, mask_mod, aux, block_mask, sinks, bias,
        dropout_p, seed_for(q, dropout_p) if dropout_seed is None else dropout_seed,
    )  # fmt: skip
    causal = mods.causal_of(causal, block_mask)
    check_flag("return_lse", return_lse)
    out, lse = _attention(
        q, k, v, softmax_scale, causal, deterministic, allow_tf32, implementation, features, extras
    )  # fmt: skip
    return (out, lse) if return_lse else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """`attention` under flash-attn 2's name, parameters and defaults.

    Args:
        q, k, v, softmax_scale, causal, deterministic, implementation: as in `attention`.
        window_size, softcap, alibi_slopes: as in `attention`.
        dropout_p: as in `attention`.
        return_attn_probs: return `(out, softmax_lse, S_dmask)`. S_dmask is for tests: with dropout
            the weights before it, `(batch, nheads, seqlen_q, seqlen_k)`, in out's dtype, negative
            where they were dropped, made by PyTorch in quadratic memory; None without.

    Raises:
        As in `attention`.
    """
    check_flag("return_attn_probs", return_attn_probs)
    seed = seed_for(q, dropout_p)
    features, extras = mods.features_of(
        window_size, softcap, alibi_slopes, dropout_p=dropout_p, dropout_seed=seed
    )  # fmt: skip
    out, lse = _attention(
        q, k, v, softmax_scale, causal, deterministic, False, implementation, features, extras
    )  # fmt: skip
    if not return_attn_probs:
        return out
    probabilities = None
    if features.dropout_p:
        options = (softmax_scale, causal, deterministic, False, True, features, extras)
        spec = make_spec(q, k, v, *options)
        probabilities = signed_probabilities(q, k, spec, extras).to(out.dtype)
    return out, lse, probabilities


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    allow_tf32: bool,
    implementation: str,
    features: Features = PLAIN,
    extras: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    eager = ops.is_eager(q, k, v, *extras)
    if isinstance(q, torch.Tensor) and ops.autocast_enabled(q.device.type):
        q, k, v = ops.cast_for_autocast(q, k, v)
        eager = False  # the operator's own rule turns autocast off inside
    bases = ops.aligned_bases(q, k, v) if eager else True
    spec = make_spec(
        q, k, v, softmax_scale, causal, deterministic, allow_tf32, bases, features, extras
    )  # fmt: skip
    needs_grad, features, spec, row = resolved(
        implementation, spec, features, (q, k, v), extras, eager
    )  # fmt: skip
    if row is None and needs_grad:
        q, k, v = apart((q, k, v))
    if eager and not needs_grad and not transformed():
        assert row is not None  # for the type checker: nothing eager is being compiled
        out, lse, _ = ops.run_forward(q, k, v, spec, row, extras)
        return out, lse
    options = (
        spec.softmax_scale, causal, deterministic, allow_tf32, implementation, features.text
    )  # fmt: skip
    if transformed() or needs_grad:
        return _Attention.apply(q, k, v, (spec, row) if eager else None, *options, *extras)
    out, lse, _ = torch.ops.triflash.attention_forward.default(q, k, v, *options, extras)
    return out, lse


def resolved(
    implementation: str,
    spec: AttentionSpec,
    features: Features,
    tensors: _Tensors,
    extras: _Tensors,
    eager: bool,
) -> tuple[bool, Features, AttentionSpec, registry.Implementation | None]:
    """Whether gradients are wanted, features and spec that say of which extras, and the row.

    There is no row while tracing: the operator will look for it.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *extras))
    if needs_grad and features is not PLAIN:
        features = replace(features, with_grad=mods.differentiable(features, extras))
        spec = replace(spec, features=replace(spec.features, with_grad=features.with_grad))
    row = None
    if not isinstance(implementation, str):  # what has no hash cannot be looked up
        registry.get(implementation)
    if eager or not tracing(spec):
        row = registry.resolve(implementation, spec, target_of(tensors[0].device))
        if needs_grad:
            registry.check_backward(row)
    return needs_grad, features, spec, row


def tracing(spec: AttentionSpec) -> bool:
    """Whether sizes may be symbols: in torch.compile, and in make_fx if they are."""
    sizes = (spec.batch, spec.seqlen_q, spec.seqlen_k, spec.nheads, spec.nheads_k, spec.headdim)
    return torch.compiler.is_compiling() or any(isinstance(n, torch.SymInt) for n in sizes)


def apart(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Views of those that came before: Dynamo traces no autograd.Function of one tensor twice."""
    return tuple(
        t.view_as(t) if t is not None and any(t is other for other in tensors[:i]) else t
        for i, t in enumerate(tensors)
    )


def transformed() -> bool:
    """Inside forward-mode AD, where _Attention raises and an operator would not.

    Also while compiling, where graphs have had _Attention in any case.

    Raises:
        NotImplementedError: inside a transform of torch.func, or inside compiled forward-mode AD,
            whose graphs ask nobody for a rule and would give zeros.
    """
    # No `is not None`, which Dynamo takes for true.
    transforms = not isinstance(torch._C._functorch.peek_interpreter_stack(), type(None))
    forward_mode, compiling = forward_ad._current_level >= 0, torch.compiler.is_compiling()
    if transforms or (forward_mode and compiling):
        raise NotImplementedError(
            "triflash has no rules for the transforms of torch.func (vmap, grad, jvp, ...) and for "
            "forward-mode AD: put what vmap would map over into the batch, and call "
            "torch.autograd.grad"
        )
    return forward_mode or compiling


class _Attention(torch.autograd.Function):
    """Autograd over the two operators: saves q, k, v, out, lse and what the row asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eager: tuple[Any, Any] | None,
        *options_and_extras: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = options_and_extras[:_OPTIONS]
        extras = options_and_extras[_OPTIONS:]
        if eager is not None:
            out, lse, saved = ops.run_forward(q, k, v, *eager, extras)
        else:
            out, lse, saved = torch.ops.triflash.attention_forward.default(
                q, k, v, *ctx.options, extras
            )
        ctx.extras = len(extras)
        ctx.save_for_backward(q, k, v, out, lse, *extras, *saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        extras, saved = rest[: ctx.extras], rest[ctx.extras :]
        if dout is None:
            dout = torch.zeros_like(out)
        gradients = no_second_derivative(_gradients)
        dq, dk, dv, *dextras = gradients(dout, dlse, q, k, v, out, lse, saved, ctx.options, extras)
        wanted = iter(dextras)
        wants = ctx.needs_input_grad[4 + _OPTIONS :]
        return dq, dk, dv, None, *[None] * _OPTIONS, *(next(wanted) if w else None for w in wants)


_OPTIONS = 6  # of an operator, before extras


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    saved: list[Tensor],
    options: tuple[Any, ...],
    extras: list[Tensor],
) -> tuple[Tensor, ...]:
    eager = ops.is_eager(dout, q, k, v, out, lse, *extras, optional=[dlse])
    operator = torch.ops.triflash.attention_backward.default
    backward: Callable[..., Any] = ops.backward if eager else operator
    dq, dk, dv, dextras = backward(dout, dlse, q, k, v, out, lse, saved, *options, extras)
    return dq, dk, dv, *dextras


def no_second_derivative(gradients: Callable[..., _Tensors]) -> Callable[..., _Tensors]:
    """`gradients`, recorded if autograd records (create_graph=True): theirs are an error."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return partial(_NoSecondDerivative.apply, gradients)
    return gradients


class _NoSecondDerivative(torch.autograd.Function):
    """Makes a gradient of the gradients an error; unrecorded, they would count as constants."""

    @staticmethod
    def forward(ctx: Any, gradients: Callable[..., _Tensors], *arguments: Any) -> _Tensors:
        return gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "triflash has no second derivative: attention's gradients cannot be differentiated"
        )
