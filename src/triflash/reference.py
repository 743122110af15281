"""Textbook attention in PyTorch: the float64 oracle, and the naive baseline of the benchmarks.

Every score is held in memory, so cost and memory grow with seqlen_q * seqlen_k. The formulas are
those of FlashAttention (arXiv:2205.14135), section 2.2 and appendix B.2, without the tiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from triflash import mods
from triflash.spec import AttentionSpec, Mod

_Tensors = tuple[torch.Tensor, ...]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    extras: _Tensors = (),
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse `(batch, nheads, seqlen_q)`, nothing saved.

    Half precision computes in float32. lse is float32 (float64 for float64 inputs), natural log.
    """
    q, k, v = _head_major(spec, q, k, v)
    scores = mask(modify(q @ k.transpose(-1, -2) * spec.softmax_scale, spec, extras), spec, extras)
    lse = (
        torch.logsumexp(scores, dim=-1)
        if spec.seqlen_k
        else scores.new_full(scores.shape[:-1], float("-inf"))
    )
    out = _probabilities(scores, lse) @ v
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
) -> _Tensors:
    """dq, dk, dv in the shapes and dtype of q, k, v; dlse has lse's shape or is None.

    Behind them the gradients of extras that `spec.features.with_grad` names.
    """
    q, k, v, dout = _head_major(spec, q, k, v, dout)
    raw = q @ k.transpose(-1, -2) * spec.softmax_scale
    with torch.enable_grad():
        leaves = (raw.requires_grad_(), *(t.detach() for t in extras))
        wanted = [raw, *(t.requires_grad_() for t in spec.features.gradients_of(leaves[1:]))]
        modified = modify(raw, spec, leaves[1:])
    p = _probabilities(mask(modified.detach(), spec, extras), lse)
    dv = p.transpose(-1, -2) @ dout
    dp = dout @ v.transpose(-1, -2)
    delta = (p * dp).sum(dim=-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
    ds, *dextras = torch.autograd.grad(modified, wanted, p * (dp - delta), materialize_grads=True)
    ds = ds * spec.softmax_scale
    dq = ds @ k
    dk = ds.transpose(-1, -2) @ q
    if spec.nheads != spec.nheads_k:
        dk, dv = (g.unflatten(1, (spec.nheads_k, spec.group_size)).sum(dim=2) for g in (dk, dv))
    grads = (grad.transpose(1, 2).to(spec.dtype).contiguous() for grad in (dq, dk, dv))
    return *grads, *dextras


def modify(scores: torch.Tensor, spec: AttentionSpec, extras: _Tensors) -> torch.Tensor:
    """Scaled scores `(batch, nheads, seqlen_q, seqlen_k)` behind the score modifications."""
    for mod in spec.features.score_mods:
        function = _reference_of(mod)
        scores = function(scores, *_positions(spec, scores.device), _aux(mod, spec, extras))
    return scores


def mask(scores: torch.Tensor, spec: AttentionSpec, extras: _Tensors) -> torch.Tensor:
    """The scores, -inf where a query does not see a key."""
    seen = visible(spec, scores.device)
    mod = spec.features.mask_mod
    if mod is not None:
        function = _reference_of(mod)
        seen = seen & function(*_positions(spec, scores.device), _aux(mod, spec, extras))
    return scores.masked_fill(~seen, float("-inf"))


def visible(spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """bool `(seqlen_q, seqlen_k)`: which keys causal and window show; bottom-right aligned."""
    q_idx = torch.arange(spec.seqlen_q, device=device).unsqueeze(1)
    k_idx = torch.arange(spec.seqlen_k, device=device).unsqueeze(0)
    seen = torch.ones(spec.seqlen_q, spec.seqlen_k, dtype=torch.bool, device=device)
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


def _positions(spec: AttentionSpec, device: torch.device) -> _Tensors:
    """b, h, q_idx and kv_idx, which broadcast to the scores."""
    sizes = (spec.batch, spec.nheads, spec.seqlen_q, spec.seqlen_k)
    return tuple(
        torch.arange(n, device=device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate(sizes)
    )


def _aux(mod: Mod, spec: AttentionSpec, extras: _Tensors) -> tuple[Any, ...]:
    named = dict(zip(spec.features.names, extras, strict=True))
    values = (named[a] if isinstance(a, str) else a for a in mod.aux)
    return (*values, spec.seqlen_q, spec.seqlen_k)


def _reference_of(mod: Mod) -> Callable[..., torch.Tensor]:
    known = mods.get(mod.key)
    if known.reference is None:
        raise NotImplementedError(
            f"reference cannot run {mod.key}: give its PyTorch form to triflash.mods as reference="
        )
    return known.reference


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # A row without keys has lse -inf; any finite stand-in makes its probabilities exp(-inf) = 0.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
