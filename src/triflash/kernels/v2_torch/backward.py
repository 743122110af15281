"""FlashAttention-2 backward (arXiv:2307.08691, Algorithm 2) in plain PyTorch, a tile at a time.

What it changes against v2: the forward is v2's kernel itself; the backward is the same mathematics
in words that need no GPU programming: two loops, and five matrix products over tiles of all heads
at once. No score outlives its tile, so memory grows with seqlen, as in the kernels; but each tile
passes through memory between one operation and the next, which is what a fused kernel saves.

FLOPs: 10 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: about a dozen
reads or writes of every tile, 4 * seqlen_q * seqlen_k each a head, where v2 has none.
Workspace: two tiles, float32 `(batch, nheads_k, group_size * BLOCK_M, BLOCK_N)`, the copies of the
blocks they are made from, and dk and dv in float32.
Measured (H200, fp16, docs/perf-log.md): 14 to 33 times the time of v2's backward, 1.0 to 2.0 times
that of the reference's, which has all of its scores in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from triflash import tuning
from triflash.spec import AttentionSpec
from triflash.target import target_of

# Large enough for a GPU to be busy with one tile of one head, and independent of the batch.
BLOCK_M, BLOCK_N = 128, 1024


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, contiguous, in the shapes and dtype of q, k, v; dlse has lse's shape or is None.

    Computed in float32 whatever the inputs are; for half precision NVIDIA GPUs use tf32 products.
    """
    dq = q.new_empty(q.shape)
    dk, dv = (t.new_zeros(t.shape, dtype=torch.float32) for t in (k, v))
    with _float32_products(_precision(spec, q)):
        for start_m in range(0, spec.seqlen_q, BLOCK_M):
            rows = slice(start_m, min(start_m + BLOCK_M, spec.seqlen_q))
            q_i, out_i, dout_i = (_queries(t[:, rows], spec) for t in (q, out, dout))
            # A row without keys has lse -inf; with +inf its p is exp(-inf) = 0.
            lse_i = _statistics(lse[..., rows], spec)
            lse_i = lse_i.masked_fill(lse_i == float("-inf"), float("inf"))
            delta_i = (out_i * dout_i).sum(dim=-1, keepdim=True)
            if dlse is not None:
                delta_i = delta_i - _statistics(dlse[..., rows], spec)
            dq_i = torch.zeros_like(q_i)
            # The last query of the block sees the most keys.
            shift = spec.seqlen_k - spec.seqlen_q
            end = min(rows.stop + shift, spec.seqlen_k) if spec.causal else spec.seqlen_k
            for start_n in range(0, end, BLOCK_N):
                keys = slice(start_n, min(start_n + BLOCK_N, end))
                k_j, v_j = (t[:, keys].transpose(1, 2).float() for t in (k, v))
                p = (q_i @ k_j.mT).mul_(spec.softmax_scale)
                if spec.causal and keys.stop > rows.start + shift + 1:
                    p.masked_fill_(_hidden(rows, keys, shift, spec, q.device), float("-inf"))
                p.sub_(lse_i).exp_()
                dv[:, keys] += (p.mT @ dout_i).transpose(1, 2)
                ds = (dout_i @ v_j.mT).sub_(delta_i).mul_(p)
                dq_i += ds @ k_j
                dk[:, keys] += (ds.mT @ q_i).transpose(1, 2)
            # Back to (batch, rows, nheads, headdim).
            dq_i = dq_i.reshape(spec.batch, spec.nheads, rows.stop - rows.start, spec.headdim)
            dq[:, rows] = dq_i.mul_(spec.softmax_scale).transpose(1, 2)
    return dq, dk.mul_(spec.softmax_scale).to(spec.dtype), dv.to(spec.dtype)


def _queries(x: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """`(batch, rows, nheads, d)` as float32 `(batch, nheads_k, group_size * rows, d)`.

    The query heads that share a key head are stacked, so k and v need no copies for GQA, and the
    products that give dk and dv sum over the group.
    """
    rows = spec.group_size * x.shape[1]
    return x.transpose(1, 2).float().reshape(spec.batch, spec.nheads_k, rows, x.shape[-1])


def _statistics(x: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """`(batch, nheads, rows)` as `(batch, nheads_k, group_size * rows, 1)`."""
    return x.reshape(spec.batch, spec.nheads_k, spec.group_size * x.shape[-1], 1)


def _hidden(
    rows: slice, keys: slice, shift: int, spec: AttentionSpec, device: torch.device
) -> torch.Tensor:
    """bool `(group_size * rows, keys)`: keys past the causal diagonal, aligned bottom right."""
    q_idx = torch.arange(rows.start, rows.stop, device=device).repeat(spec.group_size)
    k_idx = torch.arange(keys.start, keys.stop, device=device)
    return k_idx > q_idx[:, None] + shift


def _precision(spec: AttentionSpec, q: torch.Tensor) -> str:
    """How float32 products may compute. tf32 holds every float16 and bfloat16 value exactly."""
    target = target_of(q.device)
    if spec.dtype != torch.float32 and target.kind == "cuda":
        return "tf32"
    return tuning.dot_precision(spec, target)


_SETTING = threading.Lock()


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """PyTorch's float32 matrix products in "ieee" or "tf32".

    That is a setting of the process, and autograd runs a thread a device: without the lock one
    could put back what another had set.
    """
    with _SETTING:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # PyTorch 2.9 and later
            settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
            before = [setting.fp32_precision for setting in settings]
            for setting in settings:
                setting.fp32_precision = precision
            try:
                yield
            finally:
                for setting, old in zip(settings, before, strict=True):
                    setting.fp32_precision = old
        else:
            old = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(old)
