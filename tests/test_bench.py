"""The benchmark harness: what it refuses to time, what it keeps, and what it makes of records."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import GPU, ROWS

from triflash import cli
from triflash.bench import (
    cases,
    claims,
    contestants,
    machine,
    measure,
    record,
    runner,
    tables,
    variants,
)
from triflash.bench.cases import Cell, Plan
from triflash.bench.contestants import Bound, Contestant
from triflash.bench.oracle import Oracle
from triflash.testing import Case, make_inputs

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if GPU else "cpu")
CASE = Case(batch=2, seqlen_q=16, seqlen_k=16, nheads=2, nheads_k=2, headdim=8, dtype=torch.float32)
ONE = ["--batch-size", "1", "--num-heads", "1", "--seq-len", "16", "--head-dim", "8"]
ONE += ["--dtype", "float32"]
EASY = ["--contestants", "naive,reference"]


def bench(*arguments: str) -> int:
    return cli.main(["bench", *arguments])


def naive(case: Case, inputs, change=lambda out: out) -> Bound:
    """The naive contestant with something done to its output."""
    bound = contestants.get("naive").bind(case, inputs)
    return replace(bound, call=lambda: change(bound.call()))


@pytest.fixture
def add(monkeypatch):
    """Put a contestant into the list: add(name, bind, **attributes)."""

    def put(name, bind, **more):
        new = Contestant(name, name, name, bind, **more)
        monkeypatch.setattr(contestants, "CONTESTANTS", (*contestants.CONTESTANTS, new))
        return name

    return put


@pytest.fixture
def preset(monkeypatch):
    """A preset of three cells, called `three`."""
    found = cases.Preset(
        "three",
        "three cells",
        frozenset({"time"}),
        lambda: [Cell(replace(CASE, seqlen_q=n, seqlen_k=n), ("fwd", "bwd")) for n in (8, 16, 24)],
        lambda: ["naive", "reference"],
    )
    monkeypatch.setitem(cases.PRESETS, "three", found)
    monkeypatch.setattr(cases, "tiny", lambda cells: list(cells))
    return found


def run(names, directions=("fwd", "bwd", "fwd+bwd"), measures=("time",), case=CASE):
    chosen = replace(cases.custom(case), measures=frozenset(measures))
    return runner.run(
        chosen, contestants=names, device=DEVICE, cells=[Cell(case, tuple(directions))]
    )


# What the documents and papers ask for


def test_the_presets_are_the_documents_tables():
    def sizes(name, *fields):
        return {
            tuple(getattr(cell.case, field) for field in fields)
            for cell in cases.PRESETS[name].cells()
        }

    assert sizes("backward-step", "seqlen_q", "headdim") == {
        (1024, 32), (1024, 64), (2048, 32), (2048, 64),
    }  # fmt: skip
    lengths = (512, 1024, 2048, 4096, 8192)
    assert sizes("tflops", "batch", "seqlen_q", "nheads", "headdim") == {
        (tokens // n, n, 32, 64) for tokens in (16384, 8192) for n in lengths
    }
    assert {n for (n,) in sizes("latency", "seqlen_q")} == {2**i for i in range(8, 15)}
    assert len(sizes("latency", "batch")) > 4
    grid = {
        (d, 512 // d, *size)
        for d in (64, 128)
        for size in ((32, 512), (16, 1024), (8, 2048), (4, 4096))
    }
    assert sizes("runtime", "headdim", "nheads", "batch", "seqlen_q") == grid
    assert grid < sizes("memory", "headdim", "nheads", "batch", "seqlen_q")
    assert {record.dtype_name(c.case) for c in cases.PRESETS["error"].cells()} == {
        "float16", "bfloat16", "float32", "tf32",
    }  # fmt: skip
    paper = cases.PRESETS["paper"]
    assert len(paper.cells()) == 36
    for cell in paper.cells():
        assert cell.case.batch * cell.case.seqlen_q == 16384
        assert cell.case.nheads * cell.case.headdim == 2048
        assert cell.directions == ("fwd", "bwd")
    assert paper.plan.mode == "sustained"
    assert paper.plan.round_ms >= 100
    assert {"sdpa_cudnn", "flex", "fa2", "fa3", "fa3_fwd", "fa4", "xformers"} <= set(
        paper.contestants()
    )
    for found in cases.PRESETS.values():
        assert set(found.contestants()) <= set(contestants.names())


def test_every_row_of_the_registry_competes():
    assert set(ROWS) <= set(contestants.names())
    assert set(ROWS) - {"reference"} <= set(cases.PRESETS["latency"].contestants())


def test_flops_are_counted_as_in_the_papers():
    case = replace(CASE, batch=3, seqlen_q=16, seqlen_k=32, nheads=4, nheads_k=2, headdim=8)
    one = record.new("custom", "v2", "fwd", case)
    assert record.flops(one) == 4 * 3 * 4 * 16 * 32 * 8
    assert record.flops({**one, "causal": True}) == record.flops(one) / 2
    assert record.flops({**one, "direction": "bwd"}) == 2.5 * record.flops(one)
    assert record.flops({**one, "direction": "fwd+bwd"}) == 3.5 * record.flops(one)


def test_the_presets_fit_into_twenty_minutes(monkeypatch):
    """By the estimate that is printed, with every contestant there is."""
    monkeypatch.setattr(contestants, "refusal", lambda contestant, case, device: None)
    monkeypatch.setattr(runner, "on_gpu", lambda device: True)
    session = runner.Session(torch.device("cpu"))
    work = runner.jobs(cases.PRESETS.values(), None, session.device)
    assert runner.estimate_s(work, session) < 20 * 60  # of them not all install anywhere


def test_fields_are_documented():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in record.FIELDS:
        assert f"`{name}`" in text, f"{name} is not in docs/benchmarks.md"
    for name in cases.PRESETS:
        assert f"| `{name}` |" in text
    for name in set(contestants.names()) - set(ROWS):
        assert f"`{name}`" in text


# What may be timed


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_what_is_wrong_is_not_timed(add, direction):
    name = add("off", lambda case, inputs: naive(case, inputs, lambda out: out * 1.01))
    good, bad = run(["naive", name], [direction])
    assert good["reason"] is None
    assert good["ms_median"] > 0
    assert good["error_ratio"] <= 1
    assert bad["ms_median"] is None
    assert "wrong: out" in bad["reason"] or "wrong: d" in bad["reason"]


def test_wrong_gradients_are_found(add):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    name = add("off", lambda case, inputs: naive(case, inputs, Doubled.apply))
    forward, backward, both = run([name])
    assert "wrong: d" in backward["reason"]
    assert "wrong: d" in both["reason"]
    assert forward["reason"] is None
    assert forward["ms_median"] > 0


def test_a_backward_that_does_not_fit_leaves_the_forward(add):
    class Large(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB. ")

    name = add("large", lambda case, inputs: naive(case, inputs, Large.apply))
    forward, backward = run([name], ["fwd", "bwd"])
    assert forward["ms_median"] > 0
    assert backward["reason"] == "out of memory (asked for 9 GiB)."


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_the_oracle_looks_at_first_and_last(place):
    case = replace(CASE, batch=3, nheads=4, nheads_k=2, causal=True)
    inputs = make_inputs(case, DEVICE)

    def off(out):
        out = out.clone()
        out[place[0], place[1], 5] = 3.0  # (batch, head, row)
        return out

    oracle = Oracle(case, inputs)
    assert oracle.judge(naive(case, inputs), backward=True).wrong is None
    assert "out" in oracle.judge(naive(case, inputs, off), backward=False).wrong


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0"),
         "out of memory (asked for 3.00 GiB)."),
        (RuntimeError("no kernel\nfor that"), "RuntimeError: no kernel"),
        (NotImplementedError("not for you"), "NotImplementedError: not for you"),
    ],
)  # fmt: skip
def test_failures_are_shown_and_stop_nobody(add, error, reason):
    def fail(out):
        raise error

    name = add("fails", lambda case, inputs: naive(case, inputs, fail))
    records = run([name, "naive"], ["fwd", "bwd"])
    assert [r["reason"] for r in records] == [reason, None, reason, None]


def test_running_out_of_memory_while_being_timed(add):
    calls = []

    def fourth(out):
        calls.append(0)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("Tried to allocate 1 GiB. ")
        return out

    name = add("grows", lambda case, inputs: naive(case, inputs, fourth))
    grown, kept = run([name, "naive"], ["fwd"])
    assert grown["reason"] == "out of memory (asked for 1 GiB)."
    assert kept["ms_median"] > 0


def test_who_cannot_says_why():
    wide = replace(CASE, headdim=520, dtype=torch.float16)
    records = {r["contestant"]: r for r in run(["v2", "naive", "fa4"], ["fwd"], case=wide)}
    assert "512" in records["v2"]["reason"]
    assert records["naive"]["reason"] is None
    if not GPU:
        assert "flash-attn-4 is not installed" in records["fa4"]["reason"]


def test_a_missing_backward_is_a_reason(add):
    name = add("forward", naive, backward=False)
    forward, backward = run([name], ["fwd", "bwd"])
    assert forward["reason"] is None
    assert "no backward" in backward["reason"]
    (error,) = run([name], ["fwd+bwd"], ["error"])
    assert error["err_out"] is not None
    assert error["err_dq"] is None


@pytest.mark.parametrize("name", ["sdpa_math", *ROWS])
def test_contestants_are_right(name):
    case = replace(CASE, causal=True, nheads=4)
    reason = contestants.refusal(contestants.get(name), case, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    (found,) = run([name], ["fwd+bwd"], ["error"], case)
    assert found["reason"] is None
    assert found["error_ratio"] <= 1
    assert all(found[field] > 0 for field in ("err_out", "err_dq", "err_dk", "err_dv"))


def test_causal_lengths_that_differ():
    case = replace(CASE, seqlen_k=24, causal=True)
    records = {r["contestant"]: r for r in run(["naive", "sdpa_math"], ["fwd"], case=case)}
    assert records["naive"]["reason"] is None
    assert "top left" in records["sdpa_math"]["reason"]


# The clock


def test_rounds_interleave_and_nobody_always_follows_the_same(monkeypatch):
    order = []

    def turn(timed, pace, device):
        order.append(timed.call())
        return 1.0

    monkeypatch.setattr(measure, "_cpu_turn", turn)
    timed = {name: measure.Timed(lambda name=name: name) for name in "abc"}
    plan = Plan("quick", rounds=12, round_ms=0, settle_ms=0)
    heard = []
    rounds = measure.interleaved(timed, plan, torch.device("cpu"), heard.append)
    turns = ["".join(order[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    for name in "abc":  # within a round it follows each of the others at some time, or begins
        others = {turn[turn.index(name) - 1] for turn in turns if turn[0] != name}
        assert others == {*"abc"} - {name}
    assert rounds == {name: [1.0] * 12 for name in "abc"}
    assert sum(heard) == pytest.approx(1.0)
    order.clear()
    measure.interleaved(timed, plan, torch.device("cpu"))
    assert "".join(turns) == "".join(order)


def test_the_backward_is_timed_alone(add):
    calls = []
    bind = lambda case, inputs: naive(case, inputs, lambda out: calls.append(0) or out)  # noqa: E731
    bound = bind(CASE, make_inputs(CASE, DEVICE))
    timed = measure.directed(bound, "bwd")
    assert len(calls) == 1  # the graph
    first, second = timed.call(), timed.call()
    assert len(calls) == 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    measure.directed(bound, "fwd+bwd").call()
    assert len(calls) == 2


def test_the_forward_is_timed_without_gradients():
    bound = contestants.get("naive").bind(CASE, make_inputs(CASE, DEVICE))
    assert not measure.directed(bound, "fwd").call().requires_grad


def test_spread():
    spread = measure.Spread.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (spread.median, spread.iqr, spread.rounds) == (3.0, 2.0, 5)
    assert measure.Spread.of([2.0]).iqr == 0.0


def test_host_time_counts_calls():
    calls = []
    rounds = measure.host_time({"a": measure.Timed(lambda: calls.append(0))}, 3, DEVICE)
    assert len(rounds["a"]) == 3
    assert len(calls) == 4 * (100 if GPU else 1)


def test_clock_and_power_are_read_while_measuring(tmp_path, monkeypatch):
    """With a stand-in for nvidia-smi that answers as it does."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in\n*--id=GPU-12-ab*power.limit*) echo 700.00;;\n'
        '*--id=GPU-12-ab*-lms*) while true; do echo "$(date "+%Y/%m/%d %H:%M:%S.000"), 1755, '
        '690.12"; sleep 0.05; done;;\nesac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    properties = SimpleNamespace(uuid="12-ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = SimpleNamespace(type="cuda")
    assert machine._query(device, "power.limit") == "700.00"
    start = time.time()
    with machine.Sampler(device) as sampler:
        while sampler.since(start - 1)[0] is None and time.time() < start + 20:
            time.sleep(0.05)
        assert sampler.since(start - 1) == (1755.0, 690.1)
        assert sampler.since(start + 60) == (None, None)
    assert sampler._process.poll() is not None


def test_without_nvidia_smi_there_is_no_power():
    with machine.Sampler(torch.device("cpu")) as sampler:
        assert sampler.since(0.0) == (None, None)


@pytest.mark.gpu
def test_times_on_a_gpu():
    case = Case(batch=2, seqlen_q=1024, seqlen_k=1024, nheads=8, nheads_k=8, causal=True)
    names = ["v2", "naive", "sdpa_flash", "sdpa_efficient", "sdpa_math"]
    records = run(names, measures=("time", "memory", "host"), case=case)
    assert len(records) == 3 * len(names)
    by_key = {(r["contestant"], r["direction"]): r for r in records}
    for r in records:
        assert r["reason"] is None, r
        assert 0 < r["ms_median"] < 100
        assert r["tflops"] > 0
        assert r["matmul_tflops"] > 0
        assert r["host_us_median"] > 0
        assert r["mode"] == "quick"
        assert r["driver"] is not None
    for name in names:
        parts = [by_key[name, d]["ms_median"] for d in ("fwd", "bwd", "fwd+bwd")]
        assert parts[2] > 0.5 * max(parts[:2])  # other tests share the GPU
    assert by_key["v2", "fwd"]["workspace_mib"] == pytest.approx(0, abs=0.01)
    scores = 2 * 8 * 1024 * 1024 * 2 / 2**20
    assert by_key["naive", "fwd"]["workspace_mib"] > scores


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_is_said_before(capsys):
    with pytest.raises(SystemExit):
        bench("--batch-size", "4096", "--seq-len", "1000000")
    assert "does not fit" in capsys.readouterr().err


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed"], ["PRESET", "speed", *cases.PRESETS]),
        (["--contestants", "v2,v9"], ["--contestants", "v9", *contestants.names()]),
        (["--contestants", ","], ["--contestants", *contestants.names()]),
        (["--sequence", "4"], ["--sequence", "--seq-len", "--head-dim", "--output"]),
        (["--seq-len", "0"], ["--seq-len", "at least 1", "0"]),
        (["--dtype", "int8"], ["--dtype", *record.DTYPES]),
        (["--format", "xml"], ["--format", "markdown", "json", "csv"]),
        (["--markdown", "--format", "csv"], ["--markdown", "csv"]),
        (["--num-heads", "3", "--num-heads-k", "2"], ["multiple", "3", "2"]),
        (["paper", "--head-dim", "80"], ["paper", "64, 128, 256"]),
        (["--batch-size", "99999", "--seq-len", "9999999"], ["does not fit", "GiB"]),
        (["--device", "nowhere"], ["--device", "nowhere"]),
        (["report"], ["FILE"]),
        (["report", "nowhere.json"], ["no such file", "nowhere.json"]),
        (["report", "x.json", "--svg"], ["--svg", "--output-dir"]),
    ],
    ids=" ".join,
)
def test_bad_input(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        bench(*arguments)
    assert end.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in message


def test_the_documented_defaults(monkeypatch):
    """SEEDS 4.7: --batch-size 4 --num-heads 8 --seq-len 512 --head-dim 64, causal off."""
    seen = []
    monkeypatch.setattr(runner, "on_gpu", lambda device: True)
    monkeypatch.setattr(runner, "measure_job", lambda job, session: seen.append(job))
    assert bench("--contestants", "naive") == 0
    assert bench("--causal", "--num-heads-k", "2", "--dtype", "tf32", "--contestants", "naive") == 0
    usual, other = (job.cell.case for job in seen)
    assert usual == Case(4, 512, 512, 8, 8, 64, dtype=torch.float16)
    assert other == replace(usual, causal=True, nheads_k=2, dtype=torch.float32, allow_tf32=True)


def test_help_lists_everything(capsys):
    with pytest.raises(SystemExit) as end:
        bench("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for word in (*cases.PRESETS, *contestants.names(), "--batch-size", "--time-limit", "all"):
        assert word in shown


@pytest.mark.parametrize("flags", [["--markdown"], ["--format", "json"], ["--format", "csv"], []])
def test_formats(flags, capsys):
    assert bench(*ONE, *EASY, *flags) == 0
    shown = capsys.readouterr()
    if not GPU:
        assert "Times mean nothing here" in shown.err
    if "json" in flags:
        found = json.loads(shown.out)
        assert [tuple(r) for r in found] == [record.FIELDS] * 6
        assert {r["contestant"] for r in found} == {"naive", "reference"}
        assert all(r["ms_median"] > 0 for r in found)
    elif "csv" in flags:
        assert len(list(csv.DictReader(io.StringIO(shown.out)))) == 6
    elif flags:
        assert "| --- | ---: |" in shown.out
        assert "| PyTorch, naive |" in shown.out
    else:
        assert "PyTorch, naive" in shown.out


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_goes_to_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "triflash", "bench", *ONE, "--contestants", "v2,naive",
         "--format", "json"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert "Times mean nothing here" in " ".join(result.stderr.split())
    assert [r["reason"] for r in found] == [None] * 6
    assert {r["mode"] for r in found} == {"interpreted"}
    assert {r["tflops"] for r in found} == {None}


@pytest.mark.parametrize("name", cases.PRESETS)
def test_every_preset_runs(name, capsys, tmp_path):
    if GPU:
        pytest.skip("at full size that is what `triflash bench` is for")
    file = tmp_path / "out.json"
    assert bench(name, *EASY, "--output", str(file)) == 0
    found = record.load([file])
    assert {r["preset"] for r in found} == {name}
    assert {r["contestant"] for r in found} == {"naive", "reference"}
    reasons = {r["reason"] for r in found}
    expected = {runner.NEEDS_MEMORY_STATISTICS} if name == "memory" else {None}
    assert reasons == expected
    assert capsys.readouterr().out.strip()


def test_flags_choose_cells_of_a_preset(preset, capsys):
    assert bench("three", "--seq-len", "16", "--format", "json") == 0
    assert {r["seqlen_q"] for r in json.loads(capsys.readouterr().out)} == {16}


# Nothing is lost


def test_an_interrupted_run_keeps_and_goes_on(add, preset, tmp_path, capsys):
    file = tmp_path / "out.json"
    seen, broken = [], [True]

    def bind(case, inputs):
        seen.append(case.seqlen_q)
        if broken[0] and case.seqlen_q == 16:
            raise KeyboardInterrupt
        return naive(case, inputs)

    arguments = ["three", "--contestants", f"naive,{add('mine', bind)}", "--output", str(file)]
    assert bench(*arguments) == 130
    assert {r["seqlen_q"] for r in record.load([file])} == {8}
    first = json.loads(file.read_text())
    broken[0] = False
    assert bench(*arguments) == 0
    assert seen == [8, 16, 16, 24]
    found = json.loads(file.read_text())
    assert found[: len(first)] == first
    assert {r["seqlen_q"] for r in found} == {8, 16, 24}
    assert bench(*arguments) == 0
    assert seen == [8, 16, 16, 24]
    assert "3 of 3 cells are in" in " ".join(capsys.readouterr().err.split())


def test_a_new_contestant_is_compared_anew(add, preset, tmp_path):
    file = str(tmp_path / "out.json")
    assert bench("three", "--contestants", "naive", "--output", file) == 0
    add("mine", naive)
    session = runner.Session(DEVICE, records=record.load([Path(file)]))
    work = runner.jobs([preset], ["naive", "mine"], DEVICE)
    assert [job.names for job in runner.remaining(work, session)] == [("naive", "mine")] * 3
    assert runner.remaining(runner.jobs([preset], ["naive"], DEVICE), session) == []


def test_the_time_limit(preset, tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "out.json")
    importlib.import_module("rich.console")  # keeps the clock that it is imported with
    start, clock = time.monotonic(), count(0, 60)
    monkeypatch.setattr(time, "monotonic", lambda: start + next(clock))
    assert bench("three", "--contestants", "naive", "--output", file, "--time-limit", "1") == 0
    monkeypatch.undo()
    assert "the same command goes on" in " ".join(capsys.readouterr().err.split())
    assert len(record.load([Path(file)])) < 6


def test_another_commit_is_not_mixed_in(preset, tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["three", "--contestants", "naive", "--output", str(file)]
    assert bench(*arguments, "--commit", "aaa") == 0
    with pytest.raises(SystemExit):
        bench(*arguments, "--commit", "bbb")
    assert "commit aaa" in " ".join(capsys.readouterr().err.split())
    assert bench(*arguments, "--commit", "bbb", "--overwrite") == 0
    assert {r["commit"] for r in record.load([file])} == {"bbb"}


def test_who_takes_the_gpu_down_is_not_tried_again(add, preset, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    down = [True]

    def bind(case, inputs):
        if case.seqlen_q == 16:
            raise RuntimeError("illegal memory access")
        return naive(case, inputs)

    arguments = ["three", "--contestants", f"{add('bad', bind)},naive", "--output", str(file)]
    alive = runner._alive
    monkeypatch.setattr(runner, "_alive", lambda device: not down[0] and alive(device))
    assert bench(*arguments) == 1
    assert "cannot be used any more" in " ".join(capsys.readouterr().err.split())
    (lost,) = {r["reason"] for r in record.load([file]) if r["seqlen_q"] == 16}
    assert lost.startswith(runner.LOST)
    assert "illegal memory access" in lost
    down[0] = False
    assert bench(*arguments) == 0
    found = record.load([file])
    assert len(found) == 12
    assert {r["reason"] for r in found if r["contestant"] == "naive"} == {None}
    assert {r["reason"] for r in found if (r["contestant"], r["seqlen_q"]) == ("bad", 16)} == {lost}


def test_broken_files_are_refused(tmp_path, capsys):
    file = tmp_path / "out.json"
    for text, words in (("{", "not JSON"), ("{}", "list"), ('[{"preset": "x"}]', "contestant")):
        file.write_text(text)
        with pytest.raises(SystemExit):
            bench(*ONE, *EASY, "--output", str(file))
        assert words in " ".join(capsys.readouterr().err.split())
        assert file.read_text() == text


def test_what_probably_does_not_fit_is_said_and_tried(monkeypatch, capsys):
    monkeypatch.setattr(machine, "total_memory", lambda device: 30_000)
    assert bench(*ONE[:4], "--seq-len", "64", *ONE[6:], *EASY, "--format", "json") == 0
    shown = capsys.readouterr()
    assert "naive, reference will probably not fit" in " ".join(shown.err.split())
    assert {r["reason"] for r in json.loads(shown.out)} == {None}


# What is made of records


def made(contestant, direction="fwd", preset="paper", case=None, **known):
    case = case or Case(4, 4096, 4096, 16, 16, 128, dtype=torch.bfloat16)
    origin = {"gpu": "Test GPU", "commit": "abc", "date": "2026-01-01"}
    return record.new(preset, contestant, direction, case, **{**origin, **known})


def test_the_paper_table_compares_with_the_best_peer():
    short = Case(16, 1024, 1024, 16, 16, 128, dtype=torch.bfloat16)
    records = [
        made("v2", ms_median=2.0, ms_iqr=0.1, rounds=5, tflops=300.0),
        made("sdpa_flash", ms_median=4.0, ms_iqr=0.1, rounds=5, tflops=150.0),
        made("fa4", ms_median=1.0, ms_iqr=0.1, rounds=5, tflops=600.0),
        made("flex", reason="out of memory (asked for 1 TiB)."),
        made("xformers", reason="xformers is not installed here."),
        made("v2", case=short, ms_median=1.0, ms_iqr=0.1, rounds=5, tflops=300.0),
        made("sdpa_flash", case=short, ms_median=2.0, ms_iqr=0.1, rounds=5, tflops=150.0),
        made("fa4", case=short, reason="RuntimeError: no."),
        made("flex", case=short, ms_median=4.0, ms_iqr=0.1, rounds=5, tflops=75.0),
        made("xformers", case=short, reason="xformers is not installed here."),
    ]
    (table,) = tables.tables(records)
    assert table.rows == [
        ["128", "full", "1024", "**300**", "150", "75", "no (1)", "2.00x (SDPA flash)"],
        ["128", "full", "4096", "300", "150", "OOM", "**600**", "0.50x (FlashAttention-4)"],
    ]
    notes = " ".join(table.notes)
    assert "1.00 times" in notes  # the geometric mean of 2 and 0.5
    assert "(1) FlashAttention-4: RuntimeError: no." in notes
    assert "xformers is not installed here." in notes
    assert "| 128 | full | 1024 | **300** |" in table.markdown()


def test_the_backward_step_tables():
    case = Case(4, 1024, 1024, 8, 8, 32, dtype=torch.bfloat16)
    records = [
        made(name, direction, "backward-step", case, ms_median=ms, ms_iqr=0.0, rounds=3)
        for direction in ("fwd", "bwd")
        for name, ms in (("v2_torch", 8.0), ("v2", 1.0), ("sdpa_flash", 2.0), ("sdpa_cudnn", 4.0))
    ]
    backward, winner, forward = tables.tables(records)
    assert backward.rows[0][-2:] == ["0.250x", "2.00x"]
    assert winner.rows == [["1024", "32", "8.00", "1.00", "**v2**", "8.00x"]]
    assert forward.title.startswith("Forward")


def test_variants_are_what_they_say():
    """Every contestant that can run one here gives what float64 gives of the same mask."""
    case = Case(2, 48, 48, 2, 2, 16, dtype=torch.float16)
    for variant in variants.variants(case):
        oracle = Oracle(variant, make_inputs(variant, DEVICE))
        for name in ("v2", "reference", "naive"):
            contestant = contestants.get(name)
            assert contestants.refusal(contestant, variant, DEVICE) is None
            bound = contestant.bind(variant, make_inputs(variant, DEVICE))
            assert oracle.judge(bound, backward=True).wrong is None, (name, variant.variant)


def test_flex_gets_the_same_variants():
    """By flex_attention without a compiler, which takes the same functions."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = Case(2, 128, 128, 2, 2, 16, dtype=torch.float32)
    for variant in variants.variants(case):
        inputs = make_inputs(variant, torch.device("cpu"))
        score_mod, mask_mod = variants.flex_functions(variant, torch.device("cpu"))
        mask = create_block_mask(mask_mod, None, None, 128, 128, device="cpu")
        q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
        out = flex_attention(q, k, v, score_mod=score_mod, block_mask=mask)
        wanted = contestants.get("reference").bind(variant, inputs)
        expected = wanted.standard(wanted.call())
        torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
        dense = mask_mod(0, 0, *torch.meshgrid(*[torch.arange(128)] * 2, indexing="ij"))
        assert variants.visible(variant) == pytest.approx(float(dense.float().mean()))


def test_who_has_not_a_variant_says_so():
    case = Case(1, 32, 32, 1, 1, 16, dtype=torch.float16)
    by_name = {v.variant: v for v in variants.variants(case)}
    assert tuple(by_name) == variants.NAMES

    def refusal(contestant: str, variant: str) -> str | None:
        return contestants.refusal(contestants.get(contestant), by_name[variant], DEVICE)

    assert refusal("sdpa_cudnn", "softcap 30") == variants.LACKS
    assert refusal("sdpa_flash", "causal") is None
    assert "v1 does not have packed sequences" in refusal("v1", "documents, packed")
    for name, without in (("fa2", "documents, mask_mod"), ("fa3", "ALiBi")):
        has = contestants.get(name).has
        assert variants.lacks(by_name[without], has) == variants.LACKS
        assert variants.lacks(by_name["documents, packed"], has) is None


def test_the_table_of_variants():
    by_name = {v.variant: v for v in variants.variants(Case(2, 64, 64, 2, 2, 16))}
    plain, window = by_name["causal"], by_name["window of an eighth"]
    records = [
        made(name, "fwd", "variants", case, ms_median=ms, ms_iqr=0.0, rounds=5, tflops=tflops)
        for name, case, ms, tflops in (
            ("v2", plain, 2.0, 400.0), ("v2", window, 1.0, 200.0),
            ("flex", plain, 4.0, 200.0), ("flex", window, 1.5, 130.0),
        )
    ]  # fmt: skip
    records.append(made("sdpa_cudnn", "fwd", "variants", plain, ms_median=1.0, tflops=800.0))
    records.append(made("sdpa_cudnn", "fwd", "variants", window, reason="SDPA has no windows."))
    records = [{**r, "ms_iqr": 0.0, "rounds": 5} for r in records]
    (table,) = tables.tables(records)
    assert table.rows == [
        ["causal", "400", "**800**", "200", "2.00x (v2)"],
        ["window of an eighth", "**200** (0.50)", "no (1)", "130 (0.65)", "1.50x (v2)"],
    ]
    assert any("(1) SDPA cuDNN: SDPA has no windows." in note for note in table.notes)


def test_files_of_two_gpus_do_not_mix(tmp_path, capsys):
    for name in ("one", "two"):
        record.save(tmp_path / f"{name}.json", [made("v2", ms_median=1.0, tflops=1.0, gpu=name)])
    with pytest.raises(SystemExit):
        bench("report", str(tmp_path / "one.json"), str(tmp_path / "two.json"))
    assert "several GPUs" in capsys.readouterr().err


def everything() -> list[record.Record]:
    """Records as every preset makes them, with made-up numbers."""
    found = []
    for name, preset_ in cases.PRESETS.items():
        for cell in preset_.cells():
            for direction in cell.directions:
                for index, contestant in enumerate(preset_.contestants(), 1):
                    one = made(contestant, direction, name, cell.case)
                    if contestant == "xformers":
                        one["reason"] = "xformers is not installed here."
                    elif contestant == "naive" and cell.case.seqlen_q > 8192:
                        one["reason"] = "out of memory (asked for 64 GiB)."
                    else:
                        ms = record.flops(one) / 1e11 / index + 0.01
                        one.update(
                            ms_median=ms, ms_iqr=ms / 50, rounds=5, tflops=100.0 * index,
                            host_us_median=30.0 * index, peak_mib=100.0, inputs_mib=60.0,
                            outputs_mib=30.0, workspace_mib=10.0, err_out=1e-3, err_dq=1e-3,
                            err_dk=2e-3, err_dv=1e-3, error_ratio=0.5, matmul_tflops=700.0,
                            copy_gbs=4000.0,
                        )  # fmt: skip
                    found.append(one)
    return found


def test_the_report(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from triflash.bench import pictures

    record.save(tmp_path / "all.json", everything())
    document = tmp_path / "README.md"
    document.write_text(
        "before\n<!-- bench:runtime:begin -->\nold\n<!-- bench:runtime:end -->\nbetween\n"
        "<!-- bench:claims:begin -->\n<!-- bench:claims:end -->\n"
        "<!-- bench:picture-error:begin -->\n<!-- bench:picture-error:end -->\n"
        "<!-- bench:custom:begin -->\nkept\n<!-- bench:custom:end -->\nafter\n"
    )
    arguments = [
        "report", str(tmp_path / "all.json"), "--output-dir", str(tmp_path / "out"),
        "--documents", str(document),
    ]  # fmt: skip
    assert bench(*arguments) == 0
    for name in pictures.PICTURES:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text()
    text = document.read_text()
    assert text.startswith("before\n<!-- bench:runtime:begin -->\n**Forward")
    assert text.endswith("-->\nkept\n<!-- bench:custom:end -->\nafter\n")
    assert "old" not in text
    assert "![error](out/error.png)" in text
    page = (tmp_path / "out" / "index.html").read_text()
    for name in cases.PRESETS:
        assert f'id="{name}"' in page
    assert "xformers is not installed here." in page
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    before = (tmp_path / "out" / "forward.svg").read_bytes()
    again = {name: pictures.PICTURES[name] for name in ("forward", "error")}
    monkeypatch.setattr(pictures, "PICTURES", again)
    assert bench(*arguments) == 0
    assert document.read_text() == text
    assert (tmp_path / "out" / "forward.svg").read_bytes() == before


def test_claims_say_what_is_not_measured():
    rows = claims.table([]).rows
    assert {row[4] for row in rows} == {claims.MISSING}
    ids = {row[0] for row in rows}
    assert {"0.7", "0.8", "0.9", "1.6", "2.4", "2.7", "2.10", "2.13", "3.4", "3.5"} <= ids
    if {"v1", "v2_torch", "v2_atomic", "cuda_v1"} <= set(ROWS):  # whom the claims are about
        assert all(row[4] != claims.MISSING for row in claims.table(everything()).rows)


def test_documents_hold_what_the_committed_results_say():
    from triflash.bench import report

    records = record.load(sorted((ROOT / "benchmarks" / "results").glob("*.json")))
    report.one_gpu(records)
    found = set()
    pages = ("benchmarks.md", "variants.md")
    for path in (ROOT / "README.md", *(ROOT / "docs" / page for page in pages)):
        for match in report.MARKERS.finditer(path.read_text()):
            name = match["name"]
            if name.startswith("picture"):
                continue
            found.add(name)
            text = report.section(name, records)
            wanted = match[1] + (f"{text}\n" if text is not None else "") + match[3]
            assert match[0] == wanted, f"{path.name}: `triflash bench report` makes another {name}"
    assert found == {*cases.PRESETS, "claims"}


def test_committed_results_are_records():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for r in json.loads(path.read_text()):
            # Files from before there were variants.
            older = tuple(f for f in record.FIELDS if f not in ("variant", "visible"))
            assert tuple(r) in (record.FIELDS, older), path
            assert r["direction"] in record.DIRECTIONS
            assert "none" not in r["gpu"]


def test_the_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    preprocessors = pytest.importorskip("nbconvert.preprocessors")
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(ROOT / "examples" / "benchmark.ipynb", as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "committed without outputs"
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nsmall = True"
    sections = [c.source.splitlines()[0] for c in notebook.cells if c.source.startswith("## ")]
    words = ("Memory", "Speed", "Accuracy", "Scaling", "Batch")
    assert len(sections) == len(words)
    assert all(word in title for word, title in zip(words, sections, strict=True))
    preprocessors.ExecutePreprocessor(timeout=500).preprocess(notebook, {"metadata": {}})
    tables_ = [
        out for c in notebook.cells for out in c.get("outputs", []) if out.output_type != "stream"
    ]
    assert len(tables_) >= 8


# Who needs what


def test_measuring_needs_no_extra(tmp_path):
    """Without matplotlib, pandas and the like everything but reports works, and they say so."""
    code = (
        "import sys\n"
        "class Without:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] not in ('matplotlib', 'pandas', 'nbformat'):\n"
        "            return self.finder.find_spec(name, *rest)\n"
        "sys.meta_path[:] = map(Without, sys.meta_path)\n"
        "import triflash\n"
        "assert not {'rich', 'torch', 'triflash.bench'} & sys.modules.keys()\n"
        "from triflash import cli\n"
        f"assert cli.main(['bench', *{[*ONE, *EASY]}, '--output', sys.argv[1]]) == 0\n"
        "try: cli.main(['bench', 'report', sys.argv[1]])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "else: raise SystemExit('a report without matplotlib')\n"
    )
    file = tmp_path / "out.json"
    result = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pip install triflash[bench]" in result.stderr


@pytest.mark.parametrize("target", ["bench", "bench-runtime", "bench-memory"])
def test_make_targets(target):
    result = subprocess.run(
        ["make", "-n", target, "VENV=", f"PYTHON={sys.executable}", "ARGS=--markdown"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    preset_ = {"bench": "all"}.get(target, target.removeprefix("bench-"))
    assert f"-m triflash bench {preset_} " in result.stdout
    assert "--markdown" in result.stdout
