"""The online softmax's step, run in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from triflash.kernels.common.softmax import LOG2_E, finish, softmax_step


@triton.jit
def softmax_of(S, P, Alpha, Lse, BLOCKS: tl.constexpr, SLACK: tl.constexpr):
    """Sixteen rows of scores in blocks of sixteen columns: lse, and every block's p and factor."""
    rows, columns = tl.arange(0, 16), tl.arange(0, 16)
    m_i = tl.full([16], float("-inf"), tl.float32)
    l_i = tl.zeros([16], tl.float32)
    for block in tl.static_range(BLOCKS):
        offsets = (rows[:, None] * BLOCKS + block) * 16 + columns[None, :]
        m_i, p, alpha = softmax_step(tl.load(S + offsets), m_i, LOG2_E, True, SLACK)
        l_i = l_i * alpha + tl.sum(p, 1)
        tl.store(P + offsets, p)
        tl.store(Alpha + rows * BLOCKS + block, alpha)
    lse, _ = finish(m_i, l_i)
    tl.store(Lse + rows, lse)


@pytest.mark.parametrize("slack", [0.0, 8.0])
def test_slack_moves_the_maximum_seldom_and_changes_no_result(slack, device):
    blocks = 8
    torch.manual_seed(0)
    s = torch.randn(16, blocks * 16)
    s[0, 40:] += 50.0  # rises by more than the slack once
    s[1, :64] = float("-inf")  # sees its first key late
    s[2] = float("-inf")
    p, alpha, lse = torch.empty_like(s), torch.empty(16, blocks), torch.empty(16)
    tensors = [x.to(device) for x in (s, p, alpha, lse)]
    softmax_of[(1,)](*tensors, blocks, slack)
    _, p, alpha, lse = (x.cpu() for x in tensors)
    torch.testing.assert_close(lse, torch.logsumexp(s.double(), 1).float(), rtol=1e-6, atol=1e-6)
    assert p.max() <= 2.0**slack * (1 + 1e-6)
    later = (alpha[3:, 1:] != 1.0).sum()  # rows of ordinary scores, behind their first block
    assert later == 0 if slack else later > 0
    assert alpha[0, 2] < 2.0**-60 or alpha[0, 3] < 2.0**-60
