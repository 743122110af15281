"""Every implementation against float64: shapes, dtypes, head dimensions, heads, scales."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    GPU,
    LOW_PRECISION,
    both_causal,
    check,
    every_dtype,
    every_row,
    results,
    skip_unsupported,
)

from triflash.testing import Case

AWKWARD = [(1, 1), (64, 64), (33, 1)]
if GPU:
    AWKWARD += [(113, 203), (203, 113), (128, 217), (799, 3), (3, 799), (1, 4097)]
    AWKWARD += [(1023, 1024), (1024, 1023), (2048, 2048), (4095, 777), (777, 4095)]
else:  # whose tiles are of 32 x 32
    AWKWARD += [(49, 107), (107, 49), (64, 105), (203, 3), (3, 203)]

# How many heads where they do not matter, which test_grouped_heads is for.
HEADS = 2 if GPU else 1
HEADDIMS = [1, 2, 8, 16, 33, 40, 64, 80, 96, 128, 160, 192, 256, 320, 512]


@every_row
@both_causal
@every_dtype
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), AWKWARD, ids=str)
def test_lengths(implementation, causal, dtype, seqlen_q, seqlen_k, device):
    case = Case(
        batch=4 if GPU else 1,
        nheads=4 if GPU else 1,
        nheads_k=4 if GPU else 1,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        dtype=dtype,
        causal=causal,
    )
    check(case, implementation, device)


@every_row
@pytest.mark.parametrize(
    "shift",
    [b + e for b in ((-128, -64, 0, 64, 128) if GPU else (-32, 0, 32)) for e in (-2, -1, 0, 1, 2)],
)
def test_where_the_causal_edge_meets_the_tiles(implementation, shift, device):
    """seqlen_k - seqlen_q around multiples of the tiles decides which of them need a mask."""
    n = 259 if GPU else 67
    case = Case(
        batch=1, seqlen_q=n, seqlen_k=n + shift, nheads=1, nheads_k=1, headdim=16,
        dtype=torch.float32, causal=True,
    )  # fmt: skip
    check(case, implementation, device)


@every_row
@every_dtype
@pytest.mark.parametrize("headdim", HEADDIMS)
def test_head_dimensions(implementation, dtype, headdim, device):
    n = 512 if GPU else 40
    case = Case(
        batch=1, seqlen_q=n + 9, seqlen_k=n + 31, nheads=HEADS, nheads_k=1, headdim=headdim,
        dtype=dtype,
        causal=headdim % 3 == 0,
    )  # fmt: skip
    check(case, implementation, device)


@pytest.mark.gpu
@every_row
@every_dtype
@both_causal
@pytest.mark.parametrize("headdim", [32, 64, 96, 128, 192, 256])
def test_every_tuned_configuration(implementation, dtype, causal, headdim, device):
    """Long enough for every kernel to reach its steady state, and ragged at both ends."""
    case = Case(
        seqlen_q=2 * 1024 - 3, seqlen_k=2 * 1024 + 5, nheads=4, nheads_k=2, headdim=headdim,
        dtype=dtype, causal=causal,
    )  # fmt: skip
    check(case, implementation, device)


@every_row
@both_causal
@pytest.mark.parametrize(
    ("headdim", "headdim_v"),
    [(192, 128), (128, 192), (64, 1), (1, 64), (24, 40), (256, 16), (512, 64)],
)
def test_headdim_of_v_may_differ(implementation, causal, headdim, headdim_v, device):
    n = 300 if GPU else 37
    case = Case(
        batch=1, seqlen_q=n, seqlen_k=n + 13, nheads=HEADS, nheads_k=HEADS, headdim=headdim,
        headdim_v=headdim_v, dtype=LOW_PRECISION, causal=causal,
    )  # fmt: skip
    check(case, implementation, device)


@every_row
@both_causal
@pytest.mark.parametrize(("nheads", "nheads_k"), [(4, 2), (3, 1), (6, 2), (3, 3)])
def test_grouped_heads(implementation, causal, nheads, nheads_k, device):
    n = 500 if GPU else 40
    case = Case(
        batch=2, seqlen_q=n, seqlen_k=n + 7, nheads=nheads, nheads_k=nheads_k, headdim=16,
        dtype=torch.float32, causal=causal, with_dlse=True,
    )  # fmt: skip
    check(case, implementation, device)


@every_row
@both_causal
@every_dtype
@pytest.mark.parametrize("softmax_scale", [-1.0, -0.1, 0.0, 0.3, 2.0, 1e-30, 1e-46])
def test_scales(implementation, causal, dtype, softmax_scale, device):
    n = 300 if GPU else 40
    case = Case(
        batch=1, seqlen_q=n, seqlen_k=n + 3, nheads=HEADS, nheads_k=HEADS, headdim=32, dtype=dtype,
        causal=causal, softmax_scale=softmax_scale, with_dlse=True,
    )  # fmt: skip
    check(case, implementation, device)


@every_row
@both_causal
@every_dtype
def test_gradient_through_lse(implementation, causal, dtype, device):
    n = 600 if GPU else 70
    case = Case(batch=1, seqlen_q=n, seqlen_k=n - 10, dtype=dtype, causal=causal, with_dlse=True)
    check(case, implementation, device)


@every_row
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0), (1, 0), (40, 0)])
@both_causal
def test_nothing_to_attend(implementation, batch, seqlen_q, seqlen_k, causal, device):
    case = Case(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, headdim=16, headdim_v=8, causal=causal,
        with_dlse=True,
    )  # fmt: skip
    check(case, implementation, device)
    got = results(case, implementation, device)
    if seqlen_k == 0:
        assert (got["out"] == 0).all()
        assert (got["lse"] == float("-inf")).all()
    for name in ("dq", "dk", "dv"):
        if name in got:
            assert (got[name] == 0).all()


@every_row
@every_dtype
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(100, 37), (70, 1), (65, 64)])
def test_rows_without_keys(implementation, dtype, seqlen_q, seqlen_k, device):
    """Causal with more queries than keys: the first ones see nothing."""
    case = Case(
        batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads=HEADS, nheads_k=HEADS, headdim=32,
        dtype=dtype, causal=True, with_dlse=True,
    )  # fmt: skip
    check(case, implementation, device)
    got = results(case, implementation, device)
    blind = seqlen_q - seqlen_k
    assert (got["out"][:, :blind] == 0).all()
    assert (got["lse"][..., :blind] == float("-inf")).all()
    assert got["lse"][..., blind:].isfinite().all()
    if "dq" in got:
        assert (got["dq"][:, :blind] == 0).all()


@every_row
def test_batch_zero_and_head_zero(implementation, device):
    check(Case(batch=0, seqlen_q=7, seqlen_k=9), implementation, device)
    check(Case(seqlen_q=7, seqlen_k=9, nheads=0, nheads_k=0), implementation, device)
    check(Case(seqlen_q=7, seqlen_k=9, nheads=0, nheads_k=2), implementation, device)


@every_row
@both_causal
def test_large_scores_do_not_overflow(implementation, causal, device):
    """Scores of some thousands: exp of them is infinite, softmax of them is not."""
    n = 256 if GPU else 48
    case = Case(
        batch=1, seqlen_q=n, seqlen_k=n, headdim=64, dtype=torch.float32, causal=causal,
        softmax_scale=100.0,
    )  # fmt: skip
    got = results(case, implementation, device)
    for name, tensor in got.items():
        assert tensor.isfinite().all(), name
    # As good as one-hot, so each row of out is a row of v.
    assert (got["out"].abs() < 10).all()


@every_row
def test_course_assignment(implementation, device):
    """SEEDS 0.5: batch 4, 128 queries, 128 keys, D 64, float32, to 1e-2."""
    from triflash import attention
    from triflash.testing import make_inputs

    case = Case(
        batch=4, seqlen_q=128, seqlen_k=128, nheads=1, nheads_k=1, headdim=64, dtype=torch.float32
    )
    skip_unsupported(case, implementation, device)
    inputs = make_inputs(case, device)
    for causal in (False, True):
        q, k, v = (t.clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
        out, lse = attention(q, k, v, causal=causal, return_lse=True, implementation=implementation)
        q2, k2, v2 = (t.clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
        s = torch.einsum("bqhd,bkhd->bhqk", q2, k2) / 8
        if causal:
            s = s.masked_fill(torch.ones(128, 128, device=device).triu(1).bool(), float("-inf"))
        expected = torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v2)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse, s.logsumexp(-1), rtol=1e-2, atol=1e-2)
        out.backward(inputs.dout)
        expected.backward(inputs.dout)
        for a, b in ((q, q2), (k, k2), (v, v2)):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2)
