"""v3's forward with the maximum of a tile's first block, and the kernel that runs behind it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import test_v3
import torch
from helpers import assert_within_budget, forget_prepared_launches, multiprocessors

from triflash import attention, flash_attn_varlen_func, tuning_v3
from triflash.kernels.v3.counters import counter_for
from triflash.target import Target
from triflash.testing import Case, compare, make_inputs, run_case

BF16 = torch.bfloat16
HOPPER = Target("cuda", "sm_90", 132)


@pytest.fixture
def kept(monkeypatch):
    """Calls too small to pay keep it too, and have several tiles a program, which are drawn."""
    monkeypatch.setattr(tuning_v3, "keeps", lambda spec: spec.dtype == BF16)
    forget_prepared_launches()
    with multiprocessors(8):
        yield
    forget_prepared_launches()


def memory_of_counter(device: torch.device) -> torch.Tensor:
    return counter_for(device).as_strided((32,), (1,))


def machine_code(call: dict) -> list[dict]:
    with mock.patch.object(tuning_v3, "keeps", return_value=True):
        return test_v3.compile_all(call)


@pytest.mark.parametrize("call", ["bf16-128-causal", "bf16-64-long"])
def test_machine_code(call, compiling):
    kept, behind = compiling(machine_code, test_v3.CALLS[call])
    for kernel in (kept, behind):
        assert "C7512" not in kernel["log"], kernel["log"]
        assert kernel["local"] == 0
        assert kernel["hgmma"] == kernel["hgmma_expected"]
    assert kept["maxima"] == 0 < behind["maxima"]


def test_which_calls_keep_a_maximum():
    def keeps(**options) -> bool:
        large = {"batch": 16, "nheads": 16, "nheads_k": 16, "headdim": 128, "dtype": BF16}
        long = {"seqlen_q": 4096, "seqlen_k": 4096}
        options = large | long | options
        return tuning_v3.forward(Case(**options).spec(), HOPPER).kept

    assert keeps()
    assert keeps(causal=True)
    assert keeps(causal=True, alibi="heads", sinks=torch.float32)
    assert keeps(causal=True, window_size=(1000, -1))
    assert not keeps(causal=True, window_size=(1000, -1), batch=1)
    assert not keeps(alibi="heads")
    assert not keeps(causal=True, softcap=30.0)
    assert not keeps(seqlen_q=256, seqlen_k=256)
    assert not keeps(dtype=torch.float16)
    assert not keeps(headdim=256)


def test_which_rows_see_a_key_of_their_first_block():
    def seen(call: dict) -> bool:
        with mock.patch.object(tuning_v3, "keeps", return_value=True):
            launches = test_v3.launches_of(HOPPER, False, **call)
        return any(getattr(c, "behind", False) for x in launches for c in x.constexprs)

    causal = {"headdim": 128, "causal": True}
    assert seen({"headdim": 128, "seqlen_k": 1000})
    assert seen({"headdim": 128, "packed": True})
    assert seen({**causal, "feature": "left, causal"})
    assert seen({**causal, "feature": "sinks"})
    assert seen({**causal, "packed": True})
    assert not seen({"headdim": 128, "feature": "both"})
    assert not seen({**causal, "seqlen_k": 1000})
    assert not seen({**causal, "feature": "documents"})
    assert not seen({**causal, "feature": "large blocks"})
    assert not seen({**causal, "packed": True, "seqused": True})


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
@pytest.mark.parametrize(
    "options",
    [
        {"alibi": "heads", "sinks": torch.float32},
        {"window_size": (300, -1)},
        {"softcap": 60.0, "window_size": (200, -1)},
    ],
)
def test_any_growth_under_features(options, device, kept):
    for lengths in ((1024, 1024), (512, 1024)):
        case = Case(2, *lengths, 4, 2, 128, dtype=BF16, causal=True, **options)
        for steep in (1.0, 40.0, -1e3):
            inputs = make_inputs(case, device)
            inputs.k[:, ::150] *= steep
            assert_within_budget(case, compare(case, inputs, run_case(case, inputs, "v3", False)))
            assert not memory_of_counter(device).any()


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_any_growth_of_packed_sequences(causal, device, kept, monkeypatch):
    lengths = torch.tensor([0, 700, 1, 300, 0, 1000, 128], device=device)
    cu_seqlens = lengths.cumsum(0).int()
    generator = torch.Generator(device).manual_seed(0)
    shape = (int(lengths.sum()), 4, 64)
    q, k, v = (torch.randn(shape, device=device, generator=generator).to(BF16) for _ in range(3))

    def packed() -> torch.Tensor:
        forget_prepared_launches()
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 1000, 1000, causal=causal)

    for steep in (1.0, 40.0):
        k[5:9] *= steep
        k[1010:1012] *= steep
        out = packed()
        with monkeypatch.context() as exactly:
            exactly.setattr(tuning_v3, "keeps", lambda spec: False)
            torch.testing.assert_close(out, packed(), atol=2e-2, rtol=2e-2)
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


@pytest.mark.gpu
def test_threads_that_share_a_stream(device, kept):
    """Another thread's kernel does not take the flag down before it was looked at."""
    case = Case(1, 512, 512, 2, 2, 64, dtype=BF16, causal=True)
    inputs = make_inputs(case, device)
    steep = inputs.k.clone()
    steep[:, :3] *= 50.0

    def many(k: torch.Tensor) -> set[bytes]:
        options = {"causal": True, "implementation": "v3"}
        outs = [attention(inputs.q, k, inputs.v, **options) for _ in range(200)]
        return {out.float().cpu().numpy().tobytes() for out in outs}

    alone = [many(k) for k in (inputs.k, steep)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(many, (inputs.k, steep, steep, inputs.k)))
    assert [len(bits) for bits in alone] == [1, 1]
    assert together == [alone[0], alone[1], alone[1], alone[0]]
