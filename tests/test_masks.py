"""Blocks of masks, and `triflash mask`, which draws them."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from triflash import attention, cli, masks
from triflash.masks import EMPTY, FULL, PARTIAL, Blocks

USER = """
import triton
from triflash import mods

@triton.jit
def function(b, h, q_idx, kv_idx, aux):
    return kv_idx < aux[0]

first = mods.mask_mod(function, reference=lambda b, h, q_idx, kv_idx, aux: kv_idx < aux[0])
silent = mods.mask_mod(function)
failing = mods.mask_mod(function, reference=lambda b, h, q_idx, kv_idx, aux: aux[7])
number = mods.mask_mod(function, reference=lambda b, h, q_idx, kv_idx, aux: kv_idx % 2)
wide = mods.mask_mod(function, reference=lambda b, h, q, k, aux: (k < 3).expand(2, 1, 1, -1))
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with a user's file, from which commands run."""
    (tmp_path / "user_masks.py").write_text(USER)
    (tmp_path / "broken_masks.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    return tmp_path


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["mask", *arguments])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_states_written_out():
    seen = torch.tensor(
        [
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1],  # a row by itself: 3 is no multiple of 2
        ],
        dtype=torch.bool,
    )
    blocks = Blocks.of(seen, 2, 2)
    assert blocks.states.tolist() == [[FULL, PARTIAL, EMPTY], [FULL, FULL, FULL]]
    assert [blocks.count(state) for state in (EMPTY, PARTIAL, FULL)] == [1, 1, 4]
    assert blocks.visible == 10
    assert blocks.share == "66.7% of pairs visible"
    assert masks.text(blocks) == "██▒▒··\n██████"


@pytest.mark.parametrize("block", [(1, 1), (3, 5), (64, 16), (1000, 1000)], ids=str)
def test_states_are_those_of_each_block(block):
    seen = torch.rand(37, 41, generator=torch.Generator().manual_seed(0)) < 0.9
    seen[:, 20:30] = True
    seen[5:20] = False
    blocks = Blocks.of(seen, *block)
    for i, row in enumerate(blocks.states.tolist()):
        for j, state in enumerate(row):
            part = seen[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert part.numel()
            assert state == (FULL if part.all() else PARTIAL if part.any() else EMPTY)


def test_bad_blocks():
    with pytest.raises(TypeError, match=r"bool.*float32"):
        Blocks.of(torch.ones(3, 3), 2, 2)
    with pytest.raises(ValueError, match="block_m and block_n must be at least 1, got 0, 2"):
        Blocks.of(torch.ones(3, 3, dtype=torch.bool), 0, 2)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 12), (12, 5)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (3, -1), (2, 1)])
def test_seen_is_what_attention_sees(lengths, causal, window):
    """v one-hot, scores 0: out is not 0 where a key is seen."""
    seqlen_q, seqlen_k = lengths
    q, k = torch.zeros(1, seqlen_q, 1, 8), torch.zeros(1, seqlen_k, 1, 8)
    v = torch.eye(seqlen_k).view(1, seqlen_k, 1, seqlen_k)
    out = attention(q, k, v, causal=causal, window_size=window, implementation="reference")
    assert torch.equal(
        masks.seen(seqlen_q, seqlen_k, causal=causal, window_size=window), out[0, :, 0] > 0
    )


def test_command(user, capsys):
    flags = "--document 4,2 --causal --block-m 2 --block-n 2".split()
    assert cli.main(["mask", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "▒▒····",
        "██▒▒··",
        "····▒▒",
        "3 x 3 blocks of 2 queries and 2 keys: 5 empty (·), 3 partial (▒), 1 full (█).",
        "13 of 36 pairs are visible: 36.1%.",
    ]
    shape = "--seq-len 2 --seq-len-k 6 --block-m 1 --block-n 2".split()
    for where in ("user_masks.py:first", "user_masks:first"):
        assert cli.main(["mask", "--mask", where, "--aux", "3", *shape]) == 0
        assert capsys.readouterr().out.splitlines()[:2] == ["██▒▒··"] * 2
    assert cli.main(["mask", "--window", "0", "1", *shape]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["····██", "····▒▒"]


def test_too_wide_for_the_terminal():
    blocks = Blocks.of(torch.ones(2, 90, dtype=torch.bool), 1, 1)
    assert masks.text(blocks, 180) == "\n".join(["█" * 180] * 2)
    assert masks.text(blocks, 90) == "\n".join(["█" * 90] * 2)
    assert re.search("90 blocks .* 89 columns.*--block-n.*--output", masks.text(blocks, 89))


def test_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    assert cli.main(["mask", "--causal", "--output", str(tmp_path / "a.png")]) == 0
    picture = image.imread(tmp_path / "a.png")
    blue = (picture[..., 2] - picture[..., 0]) > 0.3  # full and partial blocks
    height, width = (n // 2 for n in blue.shape)
    assert blue[:height, width:].mean() < 0.1 < 0.3 < blue[height:, :width].mean()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mask x", "package.module:name or file.py:name, got 'x'"),
        ("--mask no.py:x", "cannot import no.py: FileNotFoundError"),
        ("--mask nowhere_at_all:x", "cannot import nowhere_at_all: ModuleNotFoundError"),
        ("--mask broken_masks.py:x", "cannot import broken_masks.py: ZeroDivisionError"),
        ("--mask user_masks.py:x", "user_masks.py has no x"),
        ("--mask user_masks.py:function", "must be a mask modification"),
        ("--mask user_masks.py:silent", "give its PyTorch form to triflash.mods as reference="),
        ("--mask user_masks.py:failing", "failed: IndexError"),
        ("--mask user_masks.py:number", "must return bool .*got torch.int64"),
        ("--mask user_masks.py:wide --seq-len 5", r"broadcasts to \(1, 1, 5, 5\).*\(2, 1, 1, 5\)"),
        ("--mask user_masks.py:first --document 3", "documents and mask_mod"),
        ("--aux 3", "--aux: is for --mask"),
        ("--mask user_masks.py:first --aux x", "--aux: must be a number, got 'x'"),
        ("--document 3,0", "--document: must be a whole number of at least 1, got '0'"),
        ("--document 30,40 --seq-len 80", "30,40 are 70 .* seqlen_q = 80"),
        ("--window -2 0", r"window_size must be at least 0, .* got \(-2, 0\)"),
        ("--seq-len 0", "--seq-len: must be a whole number of at least 1"),
        ("--block-m 0", "--block-m: must be a whole number of at least 1"),
        ("--seq-len 100000", "100000 x 100000 is too large"),
        ("--output x.gif", "--output: .*must end in .png, got 'x.gif'"),
        ("--output nowhere/x.png", "--output: .*No such file"),
    ],
)
def test_refusals(flags, words, user, capsys):
    message = refused(flags.split(), capsys)
    assert re.search(words, message), message
