"""FlashAttention-2 forward (arXiv:2307.08691, Algorithm 1).

What v2 changes against v1: the output stays unnormalised until the last block, exponents are in
base 2, one program owns a block of queries (so nothing is shared between programs), and only lse is
saved for the backward. Blocks that a causal mask hides are never visited, and only the blocks on its
edge pay for masking: `_attend` is written once and called for the full and then the masked blocks.

FLOPs: 4 * seqlen_q * seqlen_k * headdim a head, half of that when causal. Bytes: q, out and lse
once; k and v once for each block of queries, mostly from L2.
"""

import torch
import triton
import triton.language as tl

from triflash import tuning
from triflash.kernels.common.launch import launch, tile_descriptor, tma_can_read
from triflash.kernels.common.mask import key_range, visible
from triflash.kernels.common.softmax import LOG2_E, finish, softmax_step
from triflash.kernels.v2.tiles import load_tile, store_tile
from triflash.spec import AttentionSpec
from triflash.target import target_of


@triton.jit
def _attend(acc, m_i, l_i, q, K, V, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
            stride_vh, scale_log2, batch, head_k, start_m, seqlen_q, seqlen_k, first, last,
            HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
            CAUSAL: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Fold the keys [first, last) into acc [BLOCK_M, BLOCK_DV], m_i and l_i [BLOCK_M]."""
    for start_n in tl.range(first, last, BLOCK_N):
        k = load_tile(K, batch, head_k, start_n, stride_kb, stride_ks, stride_kh, seqlen_k,
                      HEADDIM, BLOCK_N, BLOCK_D, MASKED, USE_TMA)  # fmt: skip
        s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            q_idx = start_m + tl.arange(0, BLOCK_M)
            k_idx = start_n + tl.arange(0, BLOCK_N)
            seen = visible(q_idx[:, None], k_idx[None, :], seqlen_q, seqlen_k, CAUSAL)
            s = tl.where(seen, s * scale_log2, float("-inf"))
        m_i, p, alpha = softmax_step(s, m_i, scale_log2, MASKED)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = load_tile(V, batch, head_k, start_n, stride_vb, stride_vs, stride_vh, seqlen_k,
                      HEADDIM_V, BLOCK_N, BLOCK_DV, MASKED, USE_TMA)  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["nheads", "seqlen_q", "seqlen_k"])
def forward_kernel(Q, K, V, Out, Lse, softmax_scale, stride_qb, stride_qs, stride_qh, stride_kb,
                   stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_ob, stride_os,
                   stride_oh, nheads, group_size, seqlen_q, seqlen_k, HEADDIM: tl.constexpr,
                   HEADDIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr,
                   NEGATIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr,
                   USE_TMA: tl.constexpr):  # fmt: skip
    """One program a block of queries; programs of one head are neighbours, to share k, v in L2."""
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    if CAUSAL:
        tile_m = tiles_m - 1 - tile_m  # the longest first, so that none is left over at the end
    batch = pid // tiles_m // nheads
    head = pid // tiles_m % nheads
    head_k = head // group_size
    start_m = tile_m * BLOCK_M

    q = load_tile(Q, batch, head, start_m, stride_qb, stride_qs, stride_qh, seqlen_q, HEADDIM,
                  BLOCK_M, BLOCK_D, True, USE_TMA)  # fmt: skip
    scale_log2 = softmax_scale * LOG2_E
    if NEGATIVE_SCALE:  # softmax_step scales after taking the maximum, which needs a scale >= 0
        q = -q
        scale_log2 = -scale_log2

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    full, end = key_range(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    for MASKED in tl.static_range(2):
        first = full if MASKED else 0
        last = end if MASKED else full
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, K, V, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
            stride_vh, scale_log2, batch, head_k, start_m, seqlen_q, seqlen_k, first, last,
            HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, PRECISION, USE_TMA,
            MASKED)  # fmt: skip

    lse, normaliser = finish(m_i, l_i)
    store_tile(Out, acc * normaliser[:, None], batch, head, start_m, stride_ob, stride_os,
               stride_oh, seqlen_q, HEADDIM_V, BLOCK_M, BLOCK_DV)  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse_row = Lse + (batch.to(tl.int64) * nheads + head) * seqlen_q
    tl.store(lse_row + offs_m, lse, mask=offs_m < seqlen_q)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out `(batch, seqlen_q, nheads, headdim_v)`, lse float32 `(batch, nheads, seqlen_q)`."""
    out = q.new_empty(spec.batch, spec.seqlen_q, spec.nheads, spec.headdim_v)
    lse = q.new_empty(spec.batch, spec.nheads, spec.seqlen_q, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, []
    config = tuning.v2_forward(spec, target_of(q.device))
    use_tma = config.use_tma and tma_can_read(q, k, v)
    block_d, block_dv = tuning.block_d(spec.headdim), tuning.block_d(spec.headdim_v)
    if use_tma:
        operands = (
            tile_descriptor(q, config.block_m, block_d),
            tile_descriptor(k, config.block_n, block_d),
            tile_descriptor(v, config.block_n, block_dv),
        )
    else:
        operands = (q, k, v)
    tiles = triton.cdiv(spec.seqlen_q, config.block_m) * spec.nheads * spec.batch
    launch(
        forward_kernel,
        (tiles, 1, 1),
        (*operands, out, lse, spec.softmax_scale,
         *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
         spec.nheads, spec.group_size, spec.seqlen_q, spec.seqlen_k),
        (spec.headdim, spec.headdim_v, config.block_m, config.block_n, block_d, block_dv,
         spec.causal, spec.softmax_scale < 0, tuning.dot_precision(spec), use_tma),
        config,
    )  # fmt: skip
    return out, lse, []
