"""FlashAttention forward in the paper's order (arXiv:2205.14135, Algorithm 1): keys outside.

What it changes against `forward`: nothing in the mathematics. A block of keys stays on chip while
all queries pass by, so o, m and l cannot stay there: they live in memory, and every step reads,
updates and writes them. Two programs with different keys would update the same rows at
the same time, which is a race; so one program owns a (batch, head), and the GPU is full only if
batch * nheads fills it. docs/algorithm.md tells the story; this kernel is there to be measured.

Saves: m and l, as `forward`. Workspace: o, float32 and of out's size, since rounding it to half
precision once a block would add up (the authors' code has such a buffer too).
FLOPs: as `forward`. Bytes: k and v once; for each block of keys q, and o, m and l twice, which is
seqlen_k / BLOCK_N * seqlen_q * (q's bytes a row + 8 * headdim_v + 16) a head, half when causal.
Measured (H200, fp16, docs/perf-log.md): 3 to 4 times v1's time with 256 or 128 programs, 10 with 32
(d64), 27 with 16 (d128).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from triflash import tuning
from triflash.kernels.common.launch import Launch, aligned
from triflash.kernels.common.mask import query_range, visible
from triflash.kernels.common.tiles import load_tile
from triflash.kernels.v1.softmax import update
from triflash.spec import AttentionSpec
from triflash.target import Target, target_of


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "seqlen_k"])
def paper_forward_kernel(Q, K, V, Acc, M, L, softmax_scale, stride_qb, stride_qs, stride_qh,
                         stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, nheads,
                         group_size, seqlen_q, seqlen_k,
                         HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                         CAUSAL: tl.constexpr, CHECK_KEYS: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    """One program a (batch, head). Acc (o), M and L come in as 0, -inf and 0 (line 2).

    Acc is `(batch, nheads, seqlen_q, headdim_v)`: rows a constant apart leave most of their
    pointers' arithmetic, and registers, to the compiler.
    """
    pid = tl.program_id(0)
    batch = pid // nheads
    head = pid % nheads
    head_k = head // group_size
    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_o = offs_m[:, None] * HEADDIM_V + offs_dv[None, :]
    head_row = pid.to(tl.int64) * seqlen_q
    for start_n in tl.range(0, seqlen_k, BLOCK_N):  # line 5
        k = load_tile(K, batch, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k,
                      HEADDIM, BLOCK_N, BLOCK_D)  # fmt: skip
        v = load_tile(V, batch, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k,
                      HEADDIM_V, BLOCK_N, BLOCK_DV)  # fmt: skip
        start, _ = query_range(start_n, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
        for start_m in tl.range(start, seqlen_q, BLOCK_M):  # line 7
            q = load_tile(Q, batch, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q,
                          HEADDIM, BLOCK_M, BLOCK_D)  # fmt: skip
            s = tl.dot(q, k.T, input_precision=PRECISION) * softmax_scale  # [BLOCK_M, BLOCK_N]
            if CAUSAL or CHECK_KEYS:
                q_idx = start_m + tl.arange(0, BLOCK_M)[:, None]
                k_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
                s = tl.where(visible(q_idx, k_idx, seqlen_q, seqlen_k, CAUSAL), s, float("-inf"))
            row = head_row + start_m
            exist = offs_m < seqlen_q - start_m
            m_i = tl.load(M + row + offs_m, mask=exist, other=float("-inf"))
            l_i = tl.load(L + row + offs_m, mask=exist, other=0.0)
            m_i, l_i, p, keep, take = update(s, m_i, l_i)
            pv = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]
            o_ptrs = Acc + row * HEADDIM_V + offs_o
            o_exist = exist[:, None] & (offs_dv < HEADDIM_V)[None, :]
            o = tl.load(o_ptrs, mask=o_exist, other=0.0)
            tl.store(o_ptrs, o * keep[:, None] + pv * take[:, None], mask=o_exist)
            tl.store(M + row + offs_m, m_i, mask=exist)
            tl.store(L + row + offs_m, l_i, mask=exist)
        # The next block of keys reads these rows, in other threads than those that wrote them.
        tl.debug_barrier()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse `(batch, nheads, seqlen_q)`, and [m, l].

    lse, m and l are float32, the first two in natural units.
    """
    rows = (spec.batch, spec.nheads, spec.seqlen_q)
    o = q.new_zeros((*rows, spec.headdim_v), dtype=torch.float32)
    l_i = q.new_zeros(rows, dtype=torch.float32)
    m = torch.full_like(l_i, float("-inf"))
    if l_i.numel():
        launch = _prepare(
            spec, target_of(q.device), q.device, q.stride(), k.stride(), v.stride(),
            aligned(q, k, v),
        )  # fmt: skip
        launch(q, k, v, o, m, l_i)
    out = q.new_empty((spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v))
    return out.copy_(o.transpose(1, 2)), m + l_i.log(), [m, l_i]


@lru_cache(maxsize=4096)
def _prepare(
    spec: AttentionSpec,
    target: Target,
    device: torch.device,
    stride_q: tuple[int, ...],
    stride_k: tuple[int, ...],
    stride_v: tuple[int, ...],
    aligned_qkv: tuple[bool, ...],
) -> Launch:
    config = tuning.v1_paper(spec, target)
    return Launch(
        paper_forward_kernel,
        spec.nheads * spec.batch,
        (spec.softmax_scale, *stride_q[:3], *stride_k[:3], *stride_v[:3],
         spec.nheads, spec.group_size, spec.seqlen_q, spec.seqlen_k),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n,
         tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v), spec.causal,
         spec.seqlen_k % config.block_n != 0, tuning.dot_precision(spec, target)),
        config,
    )  # fmt: skip
