"""Textbook attention in PyTorch: the float64 oracle, and the naive baseline of the benchmarks.

Every score is held in memory, so cost and memory grow with seqlen_q * seqlen_k. The formulas are
those of FlashAttention (arXiv:2205.14135), section 2.2 and appendix B.2, without the tiling.
"""

from __future__ import annotations

import torch

from triflash.spec import AttentionSpec

_Tensors = tuple[torch.Tensor, ...]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse `(batch, nheads, seqlen_q)`, nothing saved.

    Half precision computes in float32. lse is float32 (float64 for float64 inputs), natural log.
    """
    q, k, v = _head_major(spec, q, k, v)
    scores = _scores(q, k, spec)
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
) -> _Tensors:
    """dq, dk, dv in the shapes and dtype of q, k, v; dlse has lse's shape or is None."""
    q, k, v, dout = _head_major(spec, q, k, v, dout)
    p = _probabilities(_scores(q, k, spec), lse)
    dv = p.transpose(-1, -2) @ dout
    dp = dout @ v.transpose(-1, -2)
    delta = (p * dp).sum(dim=-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
    ds = p * (dp - delta) * spec.softmax_scale
    dq = ds @ k
    dk = ds.transpose(-1, -2) @ q
    if spec.nheads != spec.nheads_k:
        dk, dv = (g.unflatten(1, (spec.nheads_k, spec.group_size)).sum(dim=2) for g in (dk, dv))
    return tuple(grad.transpose(1, 2).to(spec.dtype).contiguous() for grad in (dq, dk, dv))


def visible(spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """bool `(seqlen_q, seqlen_k)`: which keys each query sees; causal is bottom-right aligned."""
    q_idx = torch.arange(spec.seqlen_q, device=device).unsqueeze(1)
    k_idx = torch.arange(spec.seqlen_k, device=device).unsqueeze(0)
    mask = torch.ones(spec.seqlen_q, spec.seqlen_k, dtype=torch.bool, device=device)
    if spec.causal:
        mask &= k_idx <= q_idx + (spec.seqlen_k - spec.seqlen_q)
    return mask


def _head_major(spec: AttentionSpec, *tensors: torch.Tensor) -> _Tensors:
    """`(batch, nheads, seqlen, headdim)` in the computing precision, k and v repeated for GQA."""
    compute = torch.float64 if spec.dtype == torch.float64 else torch.float32
    heads = (t.to(compute).transpose(1, 2) for t in tensors)
    return tuple(
        t.repeat_interleave(spec.group_size, dim=1) if t.shape[1] != spec.nheads else t
        for t in heads
    )


def _scores(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)) * spec.softmax_scale
    return scores.masked_fill(~visible(spec, q.device), float("-inf"))


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # A row without keys has lse -inf; any finite stand-in makes its probabilities exp(-inf) = 0.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
