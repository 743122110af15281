"""v3's forward with the maximum of a tile's first block, and the kernel that runs behind it."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import test_v3
import torch
from helpers import assert_within_budget, forget_prepared_launches

from triflash import attention, tuning
from triflash.kernels.v3.counters import counter_for
from triflash.target import Target
from triflash.testing import Case, compare, make_inputs, run_case

BF16 = torch.bfloat16
HOPPER = Target("cuda", "sm_90", 132)


@pytest.fixture
def kept(monkeypatch):
    """Calls too small to pay keep it too."""

    def keeps(spec):
        return spec.dtype == BF16 and not spec.features.mods and spec.varlen is None

    monkeypatch.setattr(tuning, "v3_keeps", keeps)
    forget_prepared_launches()
    yield
    forget_prepared_launches()


def memory_of_counter(device: torch.device) -> torch.Tensor:
    return counter_for(device).as_strided((32,), (1,))


def machine_code(call: dict) -> list[dict]:
    with mock.patch.object(tuning, "v3_keeps", return_value=True):
        return test_v3.compile_all(call)


@pytest.mark.parametrize("call", ["bf16-128-causal", "bf16-64-long"])
def test_machine_code(call):
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        kept, behind = pool.submit(machine_code, test_v3.CALLS[call]).result()
    for kernel in (kept, behind):
        assert "C7512" not in kernel["log"], kernel["log"]
        assert kernel["local"] == 0
        assert kernel["hgmma"] == kernel["hgmma_expected"]
    assert kept["maxima"] == 0 < behind["maxima"]


def test_which_calls_keep_a_maximum():
    def keeps(**options) -> bool:
        options = {
            "batch": 16,
            "nheads": 16,
            "nheads_k": 16,
            "headdim": 128,
            "dtype": BF16,
        } | options
        return tuning.v3_forward(Case(**options).spec(), HOPPER).kept

    long = {"seqlen_q": 4096, "seqlen_k": 4096}
    assert keeps(**long)
    assert keeps(**long, causal=True)
    assert not keeps(seqlen_q=256, seqlen_k=256)
    assert not keeps(**long, dtype=torch.float16)
    assert not keeps(**long, window_size=(100, 100))
    assert not keeps(**long, softcap=60.0)
    assert not keeps(**long, sinks=torch.float32)
    assert not keeps(**long, headdim=256)


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(512, 1024), (1000, 1000)], ids=str)
def test_any_growth(lengths, causal, headdim, device, kept):
    """The first keys, which come last, have scores that are larger by any factor."""
    case = Case(2, *lengths, 4, 2, headdim, dtype=BF16, causal=causal)
    for steep in (1.0, 4.0, 40.0, -1e4, 1.0):
        inputs = make_inputs(case, device)
        inputs.k[:, :3] *= steep
        assert_within_budget(case, compare(case, inputs, run_case(case, inputs, "v3", False)))
        assert not memory_of_counter(device).any()


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_what_is_no_number_stays_in_its_rows(value, device, kept):
    case = Case(1, 512, 512, 2, 2, 128, dtype=BF16)
    inputs = make_inputs(case, device)
    expected = attention(inputs.q, inputs.k, inputs.v, implementation="v3")
    inputs.q[0, 100, 1] = value
    out = attention(inputs.q, inputs.k, inputs.v, implementation="v3")
    others = torch.ones_like(out, dtype=torch.bool)
    others[0, 100, 1] = False
    torch.testing.assert_close(out[others], expected[others], atol=2e-2, rtol=2e-2)
    assert not memory_of_counter(device).any()


@pytest.mark.gpu
def test_replays_of_a_graph_see_growth(device, kept):
    """The flag of a replay is not that of the next."""
    case = Case(2, 1024, 1024, 4, 4, 64, dtype=BF16, causal=True)
    inputs = make_inputs(case, device)
    plain = inputs.k.clone()
    attention(inputs.q, inputs.k, inputs.v, causal=True, implementation="v3")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention(
            inputs.q, inputs.k, inputs.v, causal=True, return_lse=True, implementation="v3"
        )
    for steep in (1.0, 50.0, 1.0, 1.0, 50.0):
        inputs.k.copy_(plain)
        inputs.k[:, :3] *= steep
        graph.replay()
        assert_within_budget(case, compare(case, inputs, {"out": out, "lse": lse}))
