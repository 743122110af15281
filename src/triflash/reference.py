"""Textbook attention in PyTorch: the float64 oracle, and the naive baseline of the benchmarks.

Every score is held in memory, so cost and memory grow with seqlen_q * seqlen_k. The formulas are
those of FlashAttention (arXiv:2205.14135), section 2.2 and appendix B.2, without the tiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from triflash import dropout, mods
from triflash.spec import NOT_PACKED, AttentionSpec, Mod, Sequences

_Tensors = tuple[torch.Tensor, ...]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    extras: _Tensors = (),
    sequences: Sequences = NOT_PACKED,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse `(batch, nheads, seqlen_q)`, nothing saved.

    Packed: out `(total_q, nheads, headdim_v)`, lse `(nheads, total_q)`. Half precision computes in
    float32. lse is float32 (float64 for float64 inputs), natural log. Modifications are told that
    the first batch entry is `first`.
    """
    if spec.varlen is not None:
        return _packed_forward(q, k, v, spec, extras, sequences)
    q, k, v = _head_major(spec, q, k, v)
    raw = q @ k.transpose(-1, -2) * spec.softmax_scale
    scores = mask(modify(raw, spec, extras, first), spec, extras, first)
    with_sink = with_sinks(scores, spec, extras)
    lse = (
        torch.logsumexp(with_sink, dim=-1)
        if with_sink.shape[-1]
        else scores.new_full(scores.shape[:-1], float("-inf"))
    )
    p = _probabilities(scores, lse) * dropout_factor(spec, extras, q.device, first)
    out = p @ v
    return out.transpose(1, 2).to(spec.dtype).contiguous(), lse, []


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    saved: list[torch.Tensor],
    spec: AttentionSpec,
    extras: _Tensors = (),
    sequences: Sequences = NOT_PACKED,
    first: int = 0,
) -> _Tensors:
    """dq, dk, dv in the shapes and dtype of q, k, v; dlse has lse's shape or is None.

    Behind them the gradients of extras that `spec.features.with_grad` names.
    """
    if spec.varlen is not None:
        return _packed_backward(dout, dlse, q, k, v, out, lse, spec, extras, sequences)
    q, k, v, dout = _head_major(spec, q, k, v, dout)
    raw = q @ k.transpose(-1, -2) * spec.softmax_scale
    with _recording():
        leaves = (raw.requires_grad_(), *(t.detach() for t in extras))
        wanted = [raw, *(t.requires_grad_() for t in spec.features.gradients_of(leaves[1:]))]
        modified = modify(raw, spec, leaves[1:], first)
    p = _probabilities(mask(modified.detach(), spec, extras, first), lse)
    factor = dropout_factor(spec, extras, q.device, first)
    dv = (p * factor).transpose(-1, -2) @ dout
    dp = dout @ v.transpose(-1, -2) * factor
    delta = (p * dp).sum(dim=-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
    ds, *dextras = torch.autograd.grad(modified, wanted, p * (dp - delta), materialize_grads=True)
    if "sinks" in spec.features.with_grad:
        dsinks = mods.gradient_of_sinks(extras[-1], lse, delta.squeeze(-1))
        dextras[-1] = dsinks.to(extras[-1].dtype)
    ds = ds * spec.softmax_scale
    dq = ds @ k
    dk = ds.transpose(-1, -2) @ q
    if spec.nheads != spec.nheads_k:
        dk, dv = (g.unflatten(1, (spec.nheads_k, spec.group_size)).sum(dim=2) for g in (dk, dv))
    grads = (grad.transpose(1, 2).to(spec.dtype).contiguous() for grad in (dq, dk, dv))
    return *grads, *dextras


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd on, also in an operator that a `TorchDispatchMode` called, where it is left out."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def modify(
    scores: torch.Tensor, spec: AttentionSpec, extras: _Tensors, first: int = 0
) -> torch.Tensor:
    """Scaled scores `(batch, nheads, seqlen_q, seqlen_k)` behind the score modifications."""
    for mod in spec.features.score_mods:
        function = _reference_of(mod)
        given = function(scores, *_positions(spec, scores.device, first), _aux(mod, spec, extras))
        # A float32 table makes scores of half precision float32, too.
        dtypes = (torch.promote_types(scores.dtype, torch.float32), scores.dtype)
        scores = _checked(mod, given, dtypes, scores.shape).expand(scores.shape)
    return scores


def dropout_factor(
    spec: AttentionSpec, extras: _Tensors, device: torch.device, first: int = 0
) -> torch.Tensor | float:
    """What weights are multiplied by: 0 where dropped, else 1 / (1 - dropout_p)."""
    p = spec.features.dropout_p
    if p == 0.0:
        return 1.0
    seed = spec.features.named(extras)["dropout_seed"]
    return dropout.kept(seed, p, *_positions(spec, device, first)) / (1.0 - p)


@torch.no_grad()
def signed_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    spec: AttentionSpec,
    extras: _Tensors = (),
    sequences: Sequences = NOT_PACKED,
) -> torch.Tensor:
    """`(batch, nheads, seqlen_q, seqlen_k)` in q's dtype: the weights, negative where dropped.

    They are those before dropout, unscaled. Quadratic memory. Of packed sequences seqlen_q and
    seqlen_k are max_seqlen, and 0 follows what exists.
    """
    signed = q.new_zeros(spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)
    if spec.varlen is None:
        calls = [(0, spec, q, k)]
    else:
        calls = [
            (b, one, q[None, queries], k[None, keys])
            for b, (one, queries, keys) in enumerate(_one_by_one(spec, sequences))
        ]
    for b, one, q_b, k_b in calls:
        q_b, k_b = _head_major(one, q_b, k_b)
        scores = modify(q_b @ k_b.transpose(-1, -2) * one.softmax_scale, one, extras, b)
        scores = with_sinks(mask(scores, one, extras, b), one, extras)
        p = scores.softmax(dim=-1).nan_to_num(0.0)[..., : one.seqlen_k]
        factor = dropout_factor(one, extras, q.device, b)
        p = torch.where(torch.as_tensor(factor, device=q.device) == 0.0, -p, p)
        signed[b : b + one.batch, :, : one.seqlen_q, : one.seqlen_k] = p
    return signed


def with_sinks(scores: torch.Tensor, spec: AttentionSpec, extras: _Tensors) -> torch.Tensor:
    """Masked scores with each head's sink, if there are sinks, as one key more at the end."""
    if not spec.features.sinks:
        return scores
    sinks = extras[-1].to(scores.dtype).view(1, -1, 1, 1)
    return torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)


def mask(
    scores: torch.Tensor, spec: AttentionSpec, extras: _Tensors, first: int = 0
) -> torch.Tensor:
    """The scores, -inf where a query does not see a key."""
    return scores.masked_fill(~seen(spec, scores.device, extras, first), float("-inf"))


def seen(
    spec: AttentionSpec,
    device: torch.device,
    extras: _Tensors = (),
    first: int = 0,
    queries: slice = slice(None),
) -> torch.Tensor:
    """bool that broadcasts to the scores: which keys causal, window and mask modification show.

    Of the rows `queries` alone, if given.
    """
    shown = visible(spec, device, queries)
    mod = spec.features.mask_mod
    if mod is not None:
        function = _reference_of(mod)
        b, h, q_idx, kv_idx = _positions(spec, device, first)
        given = function(b, h, q_idx[..., queries, :], kv_idx, _aux(mod, spec, extras))
        shown = shown & _checked(
            mod, given, (torch.bool,), (spec.batch, spec.nheads, *shown.shape)
        )  # fmt: skip
    return shown


def _packed_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    extras: _Tensors,
    sequences: Sequences,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    out = q.new_zeros(*q.shape[:-1], spec.headdim_v)
    wide = torch.promote_types(spec.dtype, torch.float32)
    lse = q.new_full(spec.lse_shape(q), float("-inf"), dtype=wide)
    for b, (one, queries, keys) in enumerate(_one_by_one(spec, sequences)):
        parts = q[None, queries], k[None, keys], v[None, keys]
        out_b, lse_b, _ = forward(*parts, one, extras, first=b)
        out[queries], lse[:, queries] = out_b[0], lse_b[0]
    return out, lse, []


def _packed_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: AttentionSpec,
    extras: _Tensors,
    sequences: Sequences,
) -> _Tensors:
    grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
    dextras = tuple(torch.zeros_like(x) for x in spec.features.gradients_of(extras))
    for b, (one, queries, keys) in enumerate(_one_by_one(spec, sequences)):
        dlse_b = None if dlse is None else dlse[None, :, queries]
        q_b, k_b, v_b = q[None, queries], k[None, keys], v[None, keys]
        dout_b, out_b, lse_b = dout[None, queries], out[None, queries], lse[None, :, queries]
        dq_b, dk_b, dv_b, *dextras_b = backward(
            dout_b, dlse_b, q_b, k_b, v_b, out_b, lse_b, [], one, extras, first=b
        )
        for grad, grad_b, rows in zip(
            grads, (dq_b, dk_b, dv_b), (queries, keys, keys), strict=True
        ):
            grad[rows] = grad_b[0]
        for dextra, dextra_b in zip(dextras, dextras_b, strict=True):
            dextra += dextra_b
    return *grads, *dextras


def _one_by_one(
    spec: AttentionSpec, sequences: Sequences
) -> Iterator[tuple[AttentionSpec, slice, slice]]:
    """For each packed sequence its spec by itself, and the rows of q and of k that take part."""
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = sequences
    all_queries, all_keys = _rows(cu_seqlens_q, seqused_q), _rows(cu_seqlens_k, seqused_k)
    for queries, keys in zip(all_queries, all_keys, strict=True):
        seqlen_q, seqlen_k = queries.stop - queries.start, keys.stop - keys.start
        one = replace(spec, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, varlen=None)
        yield one, queries, keys


def _rows(cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None) -> list[slice]:
    assert cu_seqlens is not None  # for the type checker: the call is packed
    bounds = cu_seqlens.tolist()
    used = cu_seqlens.diff() if seqused is None else seqused
    return [slice(start, start + n) for start, n in zip(bounds[:-1], used.tolist(), strict=True)]


def visible(
    spec: AttentionSpec, device: torch.device, queries: slice = slice(None)
) -> torch.Tensor:
    """bool `(seqlen_q, seqlen_k)`: which keys causal and window show; bottom-right aligned."""
    q_idx = torch.arange(spec.seqlen_q, device=device)[queries].unsqueeze(1)
    k_idx = torch.arange(spec.seqlen_k, device=device).unsqueeze(0)
    seen = torch.ones(len(q_idx), spec.seqlen_k, dtype=torch.bool, device=device)
    position = q_idx + (spec.seqlen_k - spec.seqlen_q)
    left, right = spec.features.window_left, spec.features.window_right
    if spec.causal:
        seen &= k_idx <= position
    if left is not None:
        seen &= k_idx >= position - left
    if right is not None:
        seen &= k_idx <= position + right
    return seen


def _head_major(spec: AttentionSpec, *tensors: torch.Tensor) -> _Tensors:
    """`(batch, nheads, seqlen, headdim)` in the computing precision, k and v repeated for GQA."""
    compute = torch.float64 if spec.dtype == torch.float64 else torch.float32
    heads = (t.to(compute).transpose(1, 2) for t in tensors)
    return tuple(
        t.repeat_interleave(spec.group_size, dim=1) if t.shape[1] != spec.nheads else t
        for t in heads
    )


def _positions(spec: AttentionSpec, device: torch.device, first: int) -> _Tensors:
    """b, from first on, h, q_idx and kv_idx, which broadcast to the scores."""
    sizes = (spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)
    b, *others = (
        torch.arange(n, device=device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate(sizes)
    )
    return b + first, *others


def _aux(mod: Mod, spec: AttentionSpec, extras: _Tensors) -> tuple[Any, ...]:
    named = spec.features.named(extras)
    values = (named[a] if isinstance(a, str) else a for a in mod.aux)
    return (*values, spec.seqlen_q, spec.seqlen_k)


def _reference_of(mod: Mod) -> Callable[..., torch.Tensor]:
    known = mods.get(mod.key)
    if known.reference is None:
        raise NotImplementedError(
            f"reference cannot run {mod.key}: give its PyTorch form to triflash.mods as reference="
        )
    return known.reference


class WrongResult(TypeError):
    """The reference of a modification gave what it must not."""


def _checked(
    mod: Mod, given: object, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """What a reference gave, which torch would broadcast to anything."""
    if not isinstance(given, torch.Tensor):
        got = type(given).__name__
    elif given.dtype not in dtypes or not _broadcasts(given.shape, shape):
        got = f"{given.dtype} of shape {tuple(given.shape)}"
    else:
        return given
    name = str(dtypes[0]).removeprefix("torch.")
    raise WrongResult(
        f"the reference of {mod.key} must return {name} that broadcasts to {tuple(shape)}, got "
        f"{got}"
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in ends)


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # A row without keys has lse -inf; any finite stand-in makes its probabilities exp(-inf) = 0.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
