"""Random calls (hypothesis); a failure prints how to repeat it, and the smallest call it found."""

from __future__ import annotations

import torch
from helpers import GPU, KERNEL_DTYPES, check, every_row
from hypothesis import example, given
from hypothesis import strategies as st

from triflash.testing import LAYOUTS, Case

_LENGTHS = st.one_of(st.integers(0, 5), st.integers(0, 2500 if GPU else 70))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nheads_k = draw(st.integers(1, 3 if GPU else 2))
    headdims = st.one_of(st.sampled_from([16, 32, 64, 128]), st.integers(1, 256))
    headdim = draw(headdims)
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    return Case(
        batch=draw(st.integers(0, 5 if GPU else 2)),
        seqlen_q=draw(_LENGTHS),
        seqlen_k=draw(_LENGTHS),
        nheads=nheads_k * draw(st.integers(1, 4 if GPU else 2)),
        nheads_k=nheads_k,
        headdim=headdim,
        headdim_v=draw(st.one_of(st.none(), headdims)),
        dtype=dtype,
        causal=draw(st.booleans()),
        softmax_scale=draw(st.one_of(st.none(), st.floats(-2, 2, width=32))),
        allow_tf32=GPU and dtype == torch.float32 and draw(st.booleans()),
        with_dlse=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
    )


@every_row
@given(case=cases())
@example(case=Case(batch=1, seqlen_q=33, seqlen_k=2, headdim=3, causal=True, with_dlse=True))
@example(case=Case(batch=1, seqlen_q=2, seqlen_k=65, headdim=17, headdim_v=1, causal=True))
def test_any_call(implementation, case, device):
    check(case, implementation, device)
