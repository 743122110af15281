"""The main job: the tiny GPT trained through triflash and through PyTorch's attention."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import triton
from helpers import every_differentiable_row, skip_unsupported

import triflash
import triflash.nn
from triflash import registry
from triflash.examples.tiny_gpt import data, loop, plot, sample, train
from triflash.examples.tiny_gpt.model import GPT, GPTConfig
from triflash.testing import Case

CONFIG = GPTConfig(layers=2, heads=2, head_dim=8, seq_len=16)
TINY = [
    *("--steps=2", "--batch-size=1", "--seq-len=40", "--sample-len=3"),
    *("--layers=1", "--heads=1", "--head-dim=16"),
]


def arguments(*flags) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(flags)


def job(tmp_path, *flags) -> int:
    return train.run(arguments(*TINY, f"--out={tmp_path / 'curves.png'}", *flags))


def words(captured: str) -> str:
    """Without the line breaks that the width of the terminal brings."""
    return " ".join(captured.split())


def text_of(content: bytes, tmp_path) -> data.Text:
    path = tmp_path / "text"
    path.write_bytes(content)
    return data.load(path, 16)


@every_differentiable_row
def test_the_job_end_to_end(implementation, device, tmp_path, capsys):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    assert job(tmp_path, f"--implementation={implementation}", "--dtype=float32") == 0
    report = words(capsys.readouterr().out)
    assert f"triflash {implementation} against PyTorch's F.scaled_dot_product_attention" in report
    assert "Python's standard library" in report
    apart = re.search(r"Largest difference of the curves: (\S+) nats, at step", report)
    assert float(apart[1]) < 1e-5
    gradients = re.search(r"projections by at most (\S+) of their size", report)
    assert float(gradients[1]) < 1e-4
    assert "def " in report.split("Text from the model")[1]
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert image.shape[:2] == (720, 960)
    assert image.std() > 0.05


def test_auto_is_a_kernel_and_the_report_names_it(tmp_path, capsys):
    assert job(tmp_path, "--steps=1", "--sample-len=0") == 0
    named = re.search(r"Attention: triflash (\S+) against", words(capsys.readouterr().out))[1]
    assert registry.get(named).needs_kernels


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason=f"the interpreter of Triton 3.6 needs numpy < 2.4, this is {np.__version__}",
)
def test_without_a_gpu_the_interpreter_runs_the_kernels(tmp_path):
    """As a user types it: no variable set, kernels all the same."""
    source = Path(triflash.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "triflash.examples.tiny_gpt.train", "--device=cpu", *TINY]
    done = subprocess.run(
        [*command, "--steps=1", "--prompt=\n    x", f"--out={tmp_path / 'curves.png'}"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Triton's interpreter runs the kernels" in words(done.stdout)
    assert "Attention: triflash v2 against" in words(done.stdout)
    assert "\n    x" in done.stdout
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("wrong", ["q", "k", "v"])
def test_a_gradient_one_percent_off_fails_the_job(wrong, tmp_path, capsys, monkeypatch):
    true_attention = triflash.nn.attention

    def attention(q, k, v, **options):
        tensors = {"q": q, "k": k, "v": v}
        if tensors[wrong].requires_grad:
            tensors[wrong].register_hook(lambda gradient: gradient * 1.01)
        return true_attention(*tensors.values(), **options)

    monkeypatch.setattr(triflash.nn, "attention", attention)
    assert job(tmp_path, "--implementation=reference", "--dtype=float32") == 1
    assert "The runs disagree at the first step" in words(capsys.readouterr().out)


def test_an_output_one_percent_off_fails_the_job(tmp_path, capsys, monkeypatch):
    true_attention = triflash.nn.attention
    monkeypatch.setattr(
        triflash.nn,
        "attention",
        lambda *tensors, **options: true_attention(*tensors, **options) * 1.01,
    )
    assert job(tmp_path, "--implementation=reference", "--dtype=float32") == 1
    assert "The runs disagree at the first step" in words(capsys.readouterr().out)


def test_a_loss_that_is_not_finite_fails_the_job(tmp_path, capsys):
    assert job(tmp_path, "--implementation=reference", "--steps=4", "--lr=1e30") == 1
    assert "A loss is not finite; try a lower --lr." in words(capsys.readouterr().out)


def test_an_interrupt_ends_without_a_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    assert job(tmp_path) == 130
    assert capsys.readouterr().err.endswith("triflash train: interrupted\n")


def test_the_job_repeats_itself(tmp_path, capsys):
    def report(seed):
        assert job(tmp_path, "--implementation=reference", f"--seed={seed}", "--device=cpu") == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.rsplit("│", 2)[0] for line in lines if line.startswith("│ triflash")]

    first = report(3)
    assert len(first) == 1
    assert report(3) == first
    assert report(4) != first


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "--steps: must be an integer of at least 1, got '0'"),
        ("--steps=two", "--steps: must be an integer of at least 1, got 'two'"),
        ("--batch-size=-1", "--batch-size: must be an integer of at least 1, got '-1'"),
        ("--seq-len=1", "--seq-len: must be an integer of at least 2, got '1'"),
        ("--layers=0", "--layers: must be"),
        ("--heads=1.5", "--heads: must be"),
        ("--head-dim=0", "--head-dim: must be"),
        ("--sample-len=-1", "--sample-len: must be an integer of at least 0"),
        ("--seed=-1", "--seed: must be"),
        ("--lr=0", "--lr: must be a number above 0, got '0'"),
        ("--lr=nan", "--lr: must be a number above 0, got 'nan'"),
        ("--lr=inf", "--lr: must be a number above 0, got 'inf'"),
        ("--dtype=float64", "--dtype: must be one of float32, bfloat16, got 'float64'"),
    ],
)
def test_flags_that_do_not_parse(flag, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        arguments(flag)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--device=gpu", "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("--device=meta", "--device must be cpu, cuda or cuda:N, got 'meta'"),
        ("--device=cuda:99", "--device cuda:99: PyTorch sees"),
        ("--implementation=v9", "--implementation: implementation must be"),
        ("--implementation=torch", "--implementation: implementation must be"),
        ("--head-dim=520", "v2 takes head dimensions up to 512, not 520."),
        ("--data={tmp}/missing", "--data: there is no file or folder"),
        ("--data={tmp}/empty", "--data: there is no text in"),
        ("--data={tmp}/folder", "--data: there is no text in"),
        ("--data={tmp}/short", "has 409 bytes; sequences of 40 need at least 410"),
        ("--out={tmp}/curves.svg", "--out must end in .png"),
        ("--out={tmp}/folder.png", "--out must be a file"),
        ("--out={tmp}/empty/curves.png", "--out: "),
        ("--prompt=", "--prompt must have at least one character"),
    ],
)
def test_flags_that_cannot_be_used(flag, message, tmp_path, capsys):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 409)
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "folder" / "binary").write_bytes(b"x\0" * 5000)
    assert job(tmp_path, flag.format(tmp=tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("triflash train: error: ")
    assert message in captured.err
    assert "nats" not in captured.out


def test_bfloat16_is_refused_where_kernels_cannot_have_it(tmp_path, capsys, device):
    if device.type == "cuda":
        pytest.skip("a GPU has bfloat16")
    assert job(tmp_path, "--dtype=bfloat16") == 2
    assert "v2 refuses bfloat16 in Triton's interpreter" in capsys.readouterr().err


def test_missing_matplotlib_is_said_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert job(tmp_path) == 2
    assert "pip install 'triflash[demo]'" in capsys.readouterr().err


def test_the_command_line_is_built_without_torch():
    code = (
        "import sys, argparse; from triflash.examples.tiny_gpt import train;"
        "train.add_arguments(argparse.ArgumentParser()); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(triflash.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_standard_library_is_the_same_every_time():
    text, again = data.load(None, 64), data.load(None, 64)
    assert torch.equal(text.train, again.train)
    assert torch.equal(text.held_out, again.held_out)
    content = bytes(torch.cat((text.train, text.held_out)).tolist())
    assert len(content) > 1e6
    assert len(text.held_out) == len(content) // 10
    assert b"\ndef " in content
    # argparse is in, its tests and the tables of character sets are not.
    assert b"class ArgumentParser(" in content
    assert b"class TestOptionalsSingleDash(" not in content
    assert b"decoding_table = (" not in content


def test_a_folder_gives_all_its_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    names = [f"{n}.txt" for n in range(30)] + ["sub/deep"]
    for name in names:
        (tmp_path / name).write_bytes(f"<{name}>".encode() * 4)
    (tmp_path / "binary").write_bytes(b"\0<no>")
    (tmp_path / "none").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"<no>")
    (tmp_path / ".git" / "config").write_bytes(b"<no>")
    text = data.load(tmp_path, 2)
    content = bytes(torch.cat((text.train, text.held_out)).tolist())
    order = [part[1:].split(">")[0] for part in content.decode().split("\n")]
    assert sorted(order) == sorted(names)
    assert order != sorted(order)
    assert bytes(data.load(tmp_path, 2).train.tolist()) == content[: len(text.train)]


def test_a_file_is_split_without_overlap(tmp_path):
    content = bytes(range(256)) * 10
    text = text_of(content, tmp_path)
    assert bytes(text.train.tolist()) + bytes(text.held_out.tolist()) == content
    assert len(text.held_out) == 256


def test_the_shortest_text_has_a_batch_in_both_parts(tmp_path):
    text = text_of(bytes(range(170)), tmp_path)  # 10 * (seq_len + 1)
    assert next(iter(data.training_batches(text, 3, 16, 0))).shape == (3, 17)
    (batch,) = data.held_out_batches(text, 2, 16, 1)
    assert batch.tolist() == [list(range(153, 170))] * 2


def test_batches_are_windows_and_follow_the_seed(tmp_path):
    text = text_of(bytes(range(256)) * 2, tmp_path)
    first, again, other = (
        list(islice(data.training_batches(text, 4, 16, seed), 5)) for seed in (1, 1, 2)
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    for batch in first:
        assert batch.dtype == torch.int64
        assert ((batch[:, 1:] - batch[:, :-1]) % 256 == 1).all()


def test_every_window_of_the_training_text_can_come_up(tmp_path):
    text = text_of(bytes(range(200)), tmp_path)  # 180 train: starts 0 to 163
    (batch,) = islice(data.training_batches(text, 5000, 16, 0), 1)
    assert set(batch[:, 0].tolist()) == set(range(164))


def trained(attention, device, steps=3, dtype=torch.float32) -> tuple[GPT, loop.Run]:
    torch.manual_seed(0)
    model = GPT(CONFIG, attention).to(device)
    text = data.load(Path(__file__), CONFIG.seq_len).to(device)
    run = loop.train(
        model,
        data.training_batches(text, 2, CONFIG.seq_len, 0),
        data.held_out_batches(text, 2, CONFIG.seq_len, 1),
        steps=steps,
        learning_rate=1e-2,
        dtype=dtype,
        on_step=lambda done, loss: None,
    )
    return model, run


@every_differentiable_row
def test_training_agrees_with_pytorch(implementation, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    model, run = trained(implementation, device)
    torch_model, torch_run = trained("torch", device)
    assert len(run.losses) == 3
    assert run.losses == pytest.approx(torch_run.losses, abs=1e-4)
    assert run.held_out == pytest.approx(torch_run.held_out, abs=1e-4)
    for name, gradient in torch_run.gradients.items():
        assert (run.gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    for ours, theirs in zip(model.parameters(), torch_model.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 3e-2  # Adam makes noise in tiny gradients a full step
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_the_losses_are_read_in_order(device):
    """Every loss is kept, whatever is read at once and however many steps are left at the end."""
    steps = 2 * loop._READ_EVERY + 3
    _, run = trained("torch", device, steps=steps)
    assert len(run.losses) == steps
    assert run.losses[0] == pytest.approx(trained("torch", device, steps=1)[1].losses[0], rel=1e-6)
    assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])


def test_half_precision_keeps_float32_parameters(device):
    model, run = trained("torch", device, dtype=torch.bfloat16)
    _, exact = trained("torch", device)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run.losses != exact.losses
    assert run.losses == pytest.approx(exact.losses, rel=2e-2)


def test_the_learning_rate_rises_and_falls():
    rates = [loop._schedule(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert loop._schedule(0, 1) == 1.0


@every_differentiable_row
def test_the_model_does_not_look_ahead(implementation, device):
    skip_unsupported(Case(dtype=torch.float32), implementation, device)
    torch.manual_seed(0)
    model = GPT(CONFIG, implementation).to(device)
    tokens = torch.randint(256, (1, 16), device=device)
    changed = tokens.clone()
    changed[0, 9] ^= 1
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert ((before - after)[:, 9:].abs().amax(-1) > 1e-4).all()


def test_the_attention_does_not_change_the_initial_weights():
    states = []
    for attention in ("torch", "reference"):
        torch.manual_seed(0)
        states.append(GPT(CONFIG, attention).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert tensor.isfinite().all(), name


def test_the_first_loss_is_near_that_of_an_even_guess():
    torch.manual_seed(0)
    loss = GPT(CONFIG, "torch").loss(torch.randint(256, (8, 17)))
    assert abs(float(loss.detach()) - math.log(256)) < 0.8


def test_a_sample_continues_the_prompt_and_repeats(device):
    torch.manual_seed(0)
    model = GPT(CONFIG, "reference").to(device)

    def draw(seed, **options):
        return sample.generate(model, b"def f", 30, seed=seed, dtype=torch.float32, **options)

    text = draw(0)
    assert text.startswith(b"def f")
    assert len(text) == 35  # longer than seq_len, so that the window moves
    assert draw(0) == text
    assert draw(1) != text
    # Nearly without temperature it is the likeliest byte of the moved window.
    cold = draw(0, temperature=1e-4)
    window = torch.tensor([list(cold[-17:-1])], device=device)
    with torch.no_grad():
        assert int(model(window)[0, -1].argmax()) == cold[-1]
    assert sample.generate(model, b"x", 0, seed=0, dtype=torch.float32) == b"x"
    with pytest.raises(ValueError, match="prompt must have at least one byte"):
        sample.generate(model, b"", 1, seed=0, dtype=torch.float32)


def test_samples_are_safe_to_print():
    assert train._printable(b"a\tb\n\x1b[2J\xff\xc3\xa9") == "a\tb\n�[2J�é"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([3.0], [3.0]),
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ([3.0, 2.0, 1.0], [3.0, 2.0000001, 1.1]),
        ([3.0, 2.0, 1.0], [3.0, math.nan, math.inf]),
        ([3.0] * 500, [3.1] * 500),
    ],
)
def test_curves_of_every_kind_are_drawn(first, second, tmp_path):
    path = tmp_path / "curves.png"
    plot.save(path, {"one": first, "two": second}, "title")
    assert matplotlib.image.imread(path).std() > 0.02
