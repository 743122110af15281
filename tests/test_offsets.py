"""Offsets beyond 2^31 elements, and grids beyond 65535.

Without a GPU the tensors are views of a sparse file, so that they span gigabytes and hold a few
pages. A kernel that computes an offset in 32 bits then reads or writes far outside, which may end
the process; so each case runs in one of its own.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import (
    GPU,
    assert_within_budget,
    every_kernel_row,
    every_triton_row,
    in_a_new_process,
    skip_unsupported,
)

from triflash import attention, testing
from triflash.testing import Case, Inputs, make_inputs, run_case

# (batch, seqlen, nheads, headdim) and strides below 2^31 that pass it when multiplied by an index.
FAR = {
    "batch": ((3, 5, 1, 16), (2**30, 2**10, 2**10, 1)),
    "seqlen": ((1, 40, 1, 16), (2**10, 2**26, 2**10, 1)),
    "seqlen within a tile": ((1, 20, 1, 16), (2**10, 2**27, 2**10, 1)),
    "nheads": ((1, 5, 3, 16), (2**10, 2**10, 2**30, 1)),
    "together": ((2, 34, 2, 16), (2**30 + 2**11, 2**25, 2**29 + 2**10, 1)),
}


def far_views(inputs: Inputs, strides: tuple[int, ...], path: Path, device: str) -> Inputs:
    """q, k, v and dout with these strides, side by side in one buffer."""
    last = sum((n - 1) * s for n, s in zip(inputs.q.shape, strides, strict=True))
    size = last + 5 * 64
    if device == "cpu":
        with path.open("wb") as file:
            file.truncate(size * inputs.q.element_size())
        buffer = torch.from_file(str(path), shared=True, size=size, dtype=inputs.q.dtype)
    else:
        buffer = torch.empty(size, dtype=inputs.q.dtype, device=device)
    views = []
    for i, tensor in enumerate((inputs.q, inputs.k, inputs.v, inputs.dout)):
        views.append(buffer.as_strided(tensor.shape, strides, 64 * i).copy_(tensor))
    return Inputs(*views, inputs.dlse)


def far_case(name: str, implementation: str, causal: bool, path: Path) -> None:
    """Run in a process of its own; raises if anything is wrong."""
    shape, strides = FAR[name]
    batch, seqlen, nheads, headdim = shape
    device = "cuda" if GPU else "cpu"
    case = Case(
        batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, nheads=nheads, nheads_k=nheads,
        headdim=headdim, dtype=torch.float16, causal=causal, with_dlse=True,
    )  # fmt: skip
    inputs = make_inputs(case, device)
    far = far_views(inputs, strides, path, device)
    got = run_case(case, far, implementation)
    assert_within_budget(case, testing.compare(case, inputs, got))


@every_kernel_row
@pytest.mark.parametrize("name", FAR)
def test_far_strides(implementation, name, device, tmp_path):
    skip_unsupported(Case(), implementation, device)
    if GPU and torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    path = tmp_path / "sparse"
    if not GPU:
        if sys.platform != "linux":
            pytest.skip("needs sparse files")
        free = os.statvfs(tmp_path)
        if free.f_bavail * free.f_frsize < 2**28:
            pytest.skip("needs 256 MiB of free disk")
    try:
        in_a_new_process(far_case, name, implementation, True, path)
    finally:
        path.unlink(missing_ok=True)


@every_triton_row
def test_grids_stay_within_cudas_limits(implementation):
    """y and z of a grid end at 65535; batch * nheads does not."""
    import aot

    for batch, nheads in ((70_000, 1), (1, 70_000), (300, 300)):
        launches = aot.record_call(
            aot.TARGETS["sm_90"][1], implementation=implementation, batch=batch, nheads=nheads,
            nheads_k=nheads, seqlen=64,
        )  # fmt: skip
        assert launches
        for launch in launches:
            x, y, z = launch.grid
            assert 0 < x < 2**31
            assert 0 < y < 2**16
            assert 0 < z < 2**16


@pytest.mark.gpu
@every_kernel_row
def test_more_than_65535_heads(implementation, device):
    for batch, nheads in ((70_000, 1), (1, 70_000)):
        case = Case(
            batch=batch, seqlen_q=17, seqlen_k=19, nheads=nheads, nheads_k=nheads, headdim=16,
            causal=True, with_dlse=True,
        )  # fmt: skip
        skip_unsupported(case, implementation, device)
        assert_within_budget(case, testing.check_case(case, implementation, device))


@pytest.fixture
def one_at_a_time():
    """Tests in other processes that fill the GPU's memory wait."""
    with (Path(tempfile.gettempdir()) / "triflash-large-test.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.gpu
@every_kernel_row
def test_more_than_2_31_elements_in_a_batch(implementation, device, one_at_a_time):
    """All tensors, gradients included; the last sequence is held against the oracle."""
    whole = Case(
        batch=2**13 + 1, seqlen_q=128, seqlen_k=128, nheads=16, nheads_k=16, headdim=128,
        dtype=torch.bfloat16, causal=True,
    )  # fmt: skip
    # v2_torch holds tiles of all heads at once, more than an H200 has.
    _needs(160 if implementation == "v2_torch" else 48, device)
    skip_unsupported(whole, implementation, device)
    one = Case(**{**vars(whole), "batch": 1})
    inputs = make_inputs(one, device)
    shape = (whole.batch, *inputs.q.shape[1:])
    assert inputs.q[0].numel() * whole.batch > 2**31
    tensors = []
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout):
        large = torch.zeros(shape, dtype=tensor.dtype, device=device)
        large[-1] = tensor[0]
        tensors.append(large)
    q, k, v = (t.requires_grad_() for t in tensors[:3])
    out, lse = attention(q, k, v, causal=True, return_lse=True, implementation=implementation)
    grads = torch.autograd.grad(out, (q, k, v), tensors[3])
    got = {
        "out": out[-1:],
        "lse": lse[-1:],
        "dq": grads[0][-1:],
        "dk": grads[1][-1:],
        "dv": grads[2][-1:],
    }
    assert_within_budget(one, testing.compare(one, inputs, got))
    assert (out[:-1] == 0).all()


@pytest.mark.gpu
@every_kernel_row
def test_more_than_2_31_elements_in_a_sequence(implementation, device, one_at_a_time):
    """One sequence of 131072 with 129 heads of 128, of which the ends are held against the oracle:
    with a causal mask the last rows of dk and dv come from the last queries alone."""
    seqlen, nheads, headdim, rows = 2**17, 129, 128, 64
    _needs(64, device)
    case = Case(
        batch=1, seqlen_q=rows, seqlen_k=seqlen, nheads=1, nheads_k=1, headdim=headdim,
        dtype=torch.bfloat16, causal=True,
    )  # fmt: skip
    skip_unsupported(case, implementation, device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        x = torch.empty(1, seqlen, heads, headdim, dtype=torch.bfloat16, device=device)
        return x.normal_(generator=generator)

    q, dout, k, v = normal(nheads), normal(nheads), normal(1), normal(1)
    dout[:, :, :-1] = 0  # so that dk and dv, shared by all heads, are those of the last
    assert q.numel() > 2**31
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, causal=True, return_lse=True, implementation=implementation)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    last = slice(-rows, None)
    inputs = Inputs(q[:, last, -1:], k, v, dout[:, last, -1:], None)
    got = {"out": out[:, last, -1:], "lse": lse[:, -1:, last], "dq": dq[:, last, -1:]}
    assert_within_budget(case, testing.compare(case, inputs, got))
    expected = testing.oracle(case, inputs)
    allowed = testing.budget(case, inputs, expected)
    for name, grad in (("dk", dk), ("dv", dv)):
        error = (grad[:, last].double() - expected[name][:, last]).abs().max()
        assert error <= allowed[name], (name, float(error))
    assert (dq[:, :, 0] == 0).all()


def _needs(gibibytes: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, there are {free:.0f}")
