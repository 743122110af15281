"""The command line, as a user types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import GPU, ROWS

import triflash
from triflash import cli, registry

SMALL = ["--batch-size", "1", "--num-heads", "1", "--seq-len", "9", "--head-dim", "8"]
if not GPU:
    SMALL += ["--device", "cpu"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "120", **environment}
    if "TRITON_INTERPRET" not in environment:
        env.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-m", "triflash", *arguments],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from triflash.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "slow = {'torch', 'triton', 'numpy', 'rich'} & sys.modules.keys()\n"
        "assert not slow, slow\n"
    )
    took = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        took.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
    for command in ("info", "check", "mask", "train"):
        assert command in result.stdout
    assert min(took) < 1.0


def test_version():
    assert run("--version").stdout.strip() == f"triflash {triflash.__version__}"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check", "--no-such-flag"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: triflash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seq-len", "0"], ["--seq-len", "at least 1", "0"]),
        (["--seq-len", "-3"], ["--seq-len", "at least 1", "-3"]),
        (["--head-dim", "x"], ["--head-dim", "x"]),
        (["--dtype", "int8"], ["--dtype", "float16", "int8"]),
        (["--implementation", "v0"], ["--implementation", *ROWS, "v0"]),
        (["--num-heads", "3", "--num-heads-k", "2"], ["nheads", "multiple", "3", "2"]),
        (["--device", "nowhere"], ["--device", "nowhere"]),
        (["--device", "cuda:63"], ["--device", "cuda:63", "GPUs"]),
    ],
    ids=lambda x: " ".join(x) if x and x[0].startswith("--") else "",
)
def test_check_refuses(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["check", *flags])
    assert end.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_the_documented_defaults():
    """SEEDS 4.5-4.7: --batch-size 4 --num-heads 8 --seq-len 512 --head-dim 64."""
    parser, _ = cli._parser()
    assert cli._case(parser.parse_args(["check"])) is None
    case = cli._case(parser.parse_args(["check", "--causal"]))
    assert (case.batch, case.nheads, case.nheads_k, case.seqlen_q, case.seqlen_k) == (
        4,
        8,
        8,
        512,
        512,
    )
    assert (case.headdim, case.causal, case.dtype) == (64, True, torch.float16)
    case = cli._case(
        parser.parse_args(
            [
                "check",
                "--batch-size",
                "2",
                "--num-heads",
                "6",
                "--num-heads-k",
                "3",
                "--seq-len",
                "70",
                "--seq-len-k",
                "90",
                "--head-dim",
                "32",
                "--dtype",
                "float32",
            ]
        )
    )
    assert (case.batch, case.nheads, case.nheads_k, case.seqlen_q, case.seqlen_k) == (
        2,
        6,
        3,
        70,
        90,
    )
    assert (case.headdim, case.causal, case.dtype) == (32, False, torch.float32)


def test_flags_survive_the_way_into_the_interpreter():
    parser, _ = cli._parser()
    arguments = ["check", *SMALL, "--causal", "--dtype", "float32", "--implementation", "v2"]
    args = parser.parse_args(arguments)
    assert parser.parse_args(["check", *cli._given(args)]) == args


@pytest.mark.parametrize("small", [False, True])
def test_the_builtin_cases_cover_the_contract(small):
    cases = cli._cases(small)
    for case in cases:
        case.spec()
    assert {c.dtype for c in cases} == {torch.float16, torch.bfloat16, torch.float32}
    assert {c.causal for c in cases} == {False, True}
    assert any(c.with_dlse for c in cases)
    assert any(c.nheads != c.nheads_k for c in cases)
    assert any(c.headdim_v not in (None, c.headdim) for c in cases)
    assert any(c.causal and c.seqlen_q > c.seqlen_k for c in cases)
    assert max(c.headdim for c in cases) == 256


def test_check_passes_and_shows_every_implementation(capsys):
    assert cli.main(["check", *SMALL, "--causal"]) == 0
    shown = capsys.readouterr().out
    for name in ROWS:
        assert name in shown
    assert "pass" in shown
    assert "FAIL" not in shown


def test_check_shows_what_is_unsupported_and_why(capsys):
    assert cli.main(["check", *SMALL[:-2], *SMALL[-2:], "--head-dim", "520"]) == 0
    shown = capsys.readouterr().out
    assert "unsupported" in shown
    assert "256" in shown


def test_check_of_nothing_fails(capsys):
    assert cli.main(["check", *SMALL, "--head-dim", "520", "--implementation", "v2"]) == 1
    assert "0 of 0 checks passed" in capsys.readouterr().out


@pytest.mark.parametrize("mistake", ["wrong", "nan", "raises"])
def test_check_fails_when_an_implementation_is_wrong(mistake, capsys, monkeypatch):
    def forward(q, k, v, spec):
        from triflash import reference

        out, lse, saved = reference.forward(q, k, v, spec)
        if mistake == "raises":
            raise RuntimeError("out of shared memory [or so]")
        out[0, 0, 0, 0] = float("nan") if mistake == "nan" else 2.0
        return out, lse, saved

    row = registry.get("reference")
    broken = replace(row, name="broken", dtypes=(torch.float16,), forward="tests:broken")
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (*registry.IMPLEMENTATIONS, broken))
    load = registry._load
    monkeypatch.setattr(registry, "_load", lambda p: forward if p == "tests:broken" else load(p))
    registry.resolve.cache_clear()
    try:
        assert cli.main(["check", *SMALL]) == 1
    finally:
        registry.resolve.cache_clear()
    shown = capsys.readouterr().out
    assert "FAIL" in shown
    passed, checked = map(int, re.search(r"(\d+) of (\d+) checks passed", shown).groups())
    assert passed == checked - 1
    if mistake == "raises":
        assert "out of shared memory [or so]" in shown


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_check_without_a_gpu_goes_to_the_interpreter_and_says_so():
    result = run("check", *SMALL[:-2])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no GPU" in result.stdout
    assert "TRITON_INTERPRET=1" in result.stdout
    assert re.search(r"v2\s", result.stdout)
    assert "unsupported: v2" not in result.stdout


def test_check_of_the_reference_needs_no_interpreter():
    result = run("check", *SMALL, "--implementation", "reference")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "TRITON_INTERPRET" not in result.stdout


def test_the_readme_has_the_table_of_features(capsys):
    """`triflash info --features` prints it from the registry."""
    assert cli.main(["info", "--features"]) == 0
    shown = capsys.readouterr().out
    readme = Path(__file__).parents[1] / "README.md"
    _, table, _ = re.split("<!-- features:(?:begin|end) -->\n", readme.read_text())
    assert table == shown
    assert "cu_seqlens_q" in table


def test_info():
    result = run("info")
    assert result.returncode == 0, result.stderr
    for word in (*ROWS, triflash.__version__, torch.__version__, "triton", "python", "auto"):
        assert word in result.stdout
    if not GPU:
        assert "none that PyTorch can use" in result.stdout
        assert "TRITON_INTERPRET=1" in " ".join(result.stdout.split())


def test_train_shows_its_flags():
    result = run("train", "--help")
    assert result.returncode == 0, result.stderr
    for flag in ("--data", "--steps", "--device", "--implementation"):
        assert flag in result.stdout
