"""v3: machine code for sm_90a without a GPU, and what it refuses.

Its results are checked with those of all rows, on a GPU.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import aot
import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    assert_within_budget,
    captured,
    check,
    forget_prepared_launches,
    multiprocessors,
    skip_unsupported,
    unexplained_races,
)
from triton import knobs

from triflash import attention, flash_attn_varlen_func, mods, registry, tuning_v3
from triflash.bench.variant_mods import SOFT_SIGN
from triflash.spec import (
    FEATURES,
    PLAIN,
    Blocks,
    Features,
    Sequences,
    make_spec,
    make_varlen_spec,
)
from triflash.target import Target, target_of
from triflash.testing import Case, check_case, compare, make_inputs, run_case

BF16, FP16 = torch.bfloat16, torch.float16
HOPPER = Target("cuda", "sm_90", 132)
OPTIONS = (False, False, False, "auto")  # causal, deterministic, allow_tf32, implementation

CALLS = {
    "bf16-64": {"headdim": 64},
    "bf16-64-long": {"headdim": 64, "seqlen": 4096},
    "bf16-64-causal-long": {"headdim": 64, "seqlen": 4096, "causal": True},
    "bf16-96": {"headdim": 96},
    "bf16-96-causal-tail": {"headdim": 96, "causal": True, "seqlen_k": 1000},
    "bf16-256-causal-long": {"headdim": 256, "causal": True, "seqlen": 4096},
    "bf16-192-causal": {"headdim": 192, "causal": True},
    "bf16-64/192": {"headdim": 64, "headdim_v": 192},
    "fp16-64-causal-gqa-tail": {
        "dtype": FP16,
        "headdim": 64,
        "causal": True,
        "nheads_k": 2,
        "seqlen": 1000,
    },
    "bf16-128-tail": {"headdim": 128, "seqlen_k": 1000},
    "bf16-128-causal": {"headdim": 128, "causal": True},
    "bf16-64-causal-few": {"headdim": 64, "causal": True, "batch": 2},
    "bf16-128-few": {"headdim": 128, "batch": 2},
    "bf16-256-causal-few": {"headdim": 256, "causal": True, "batch": 2},
    "bf16-256": {"headdim": 256},
    "bf16-256-causal": {"headdim": 256, "causal": True},
    "bf16-192/128-causal": {"headdim": 192, "headdim_v": 128, "causal": True},
    "fp16-40-negative-scale": {"dtype": FP16, "headdim": 40, "softmax_scale": -0.5},
    "bf16-64-packed": {"headdim": 64, "packed": True},
    "bf16-64-causal-packed": {"headdim": 64, "packed": True, "causal": True},
    "bf16-64-causal-long-packed": {
        "headdim": 64,
        "packed": True,
        "causal": True,
        "seqlen": 8192,
    },
    "bf16-96-packed-used": {"headdim": 96, "packed": True, "seqused": True},
    "bf16-128-packed": {"headdim": 128, "packed": True},
    "bf16-128-causal-packed": {"headdim": 128, "packed": True, "causal": True},
    "fp16-128-causal-packed-used": {
        "dtype": FP16,
        "headdim": 128,
        "packed": True,
        "causal": True,
        "seqused": True,
        "nheads_k": 2,
    },
    "bf16-192/128-causal-packed": {
        "headdim": 192,
        "headdim_v": 128,
        "packed": True,
        "causal": True,
    },
    "bf16-256-packed": {"headdim": 256, "packed": True},
    "bf16-256-causal-packed": {
        "headdim": 256,
        "packed": True,
        "causal": True,
        "seqlen": 4096,
        "seqused": True,
    },
    "bf16-64-causal-left": {"headdim": 64, "causal": True, "feature": "left"},
    "bf16-64-causal-softcap": {"headdim": 64, "causal": True, "feature": "softcap"},
    "bf16-64-documents": {"headdim": 64, "feature": "documents"},
    "bf16-128-causal-left": {"headdim": 128, "causal": True, "feature": "left"},
    "bf16-128-both-tail": {"headdim": 128, "seqlen_k": 1000, "feature": "both"},
    "bf16-128-causal-softcap": {"headdim": 128, "causal": True, "feature": "softcap"},
    "fp16-128-causal-softcap": {
        "dtype": FP16,
        "headdim": 128,
        "causal": True,
        "feature": "softcap",
    },
    "bf16-128-causal-soft sign": {"headdim": 128, "causal": True, "feature": "soft sign"},
    "fp16-64-causal-soft sign": {"dtype": FP16, "causal": True, "feature": "soft sign"},
    "fp16-128-causal-alibi": {"dtype": FP16, "headdim": 128, "causal": True, "feature": "alibi"},
    "bf16-128-softcap, alibi, window": {"headdim": 128, "feature": "softcap, alibi, window"},
    "bf16-128-causal-learned bias": {"headdim": 128, "causal": True, "feature": "learned bias"},
    "bf16-128-causal-documents": {"headdim": 128, "causal": True, "feature": "documents"},
    "bf16-64-causal-left-packed": {
        "headdim": 64,
        "packed": True,
        "causal": True,
        "feature": "left",
    },
    "bf16-128-softcap, alibi, window-packed": {
        "headdim": 128,
        "packed": True,
        "feature": "softcap, alibi, window",
        "seqused": True,
    },
    "bf16-128-causal-sinks": {"headdim": 128, "causal": True, "feature": "sinks"},
    "bf16-64-causal-blocks": {"headdim": 64, "causal": True, "feature": "large blocks"},
    "bf16-128-blocks-tail": {"headdim": 128, "seqlen_k": 1000, "feature": "large blocks"},
    "bf16-128-blocks of 256": {
        "headdim": 128,
        "causal": True,
        "seqlen_k": 900,
        "feature": "larger blocks, alibi",
    },
    "bf16-256-causal-softcap": {"headdim": 256, "causal": True, "feature": "softcap"},
    "bf16-256-causal-documents": {"headdim": 256, "causal": True, "feature": "documents"},
}


BACKWARD_CALLS = {
    "bf16-64": {"headdim": 64},
    "bf16-64-persistent": {"batch": 64},
    "bf16-64-causal-persistent": {"batch": 64, "causal": True},
    "fp16-64-causal-gqa-tail-persistent": {
        "batch": 128,
        "dtype": FP16,
        "causal": True,
        "nheads_k": 2,
        "seqlen": 1000,
    },
    "bf16-64-whole-heads": {"batch": 64, "seqlen": 512},
    "bf16-64-causal-whole-heads": {"batch": 64, "seqlen": 512, "causal": True},
    "bf16-128-causal-whole-heads": {
        "batch": 64,
        "seqlen": 512,
        "headdim": 128,
        "causal": True,
    },
    "bf16-64-causal": {"headdim": 64, "causal": True},
    "bf16-64-causal-split groups": {"headdim": 64, "causal": True, "nheads_k": 1, "batch": 16},
    "fp16-64-causal-gqa-tail": {
        "dtype": FP16,
        "headdim": 64,
        "causal": True,
        "nheads_k": 2,
        "seqlen": 1000,
    },
    "bf16-128": {"headdim": 128},
    "bf16-128-tail": {"headdim": 128, "seqlen_k": 1000},
    "bf16-128-causal": {"headdim": 128, "causal": True},
    "fp16-128-causal-gqa-dlse": {
        "batch": 32,
        "dtype": FP16,
        "headdim": 128,
        "causal": True,
        "nheads_k": 1,
        "dlse": True,
    },
    "bf16-128-causal-deterministic": {"headdim": 128, "causal": True, "deterministic": True},
    "bf16-40/72": {"headdim": 40, "headdim_v": 72},
    "bf16-256": {"headdim": 256},
    "bf16-256-tail": {"headdim": 256, "seqlen_k": 1000},
    "bf16-256-causal": {"headdim": 256, "causal": True},
    "fp16-256-causal-gqa-dlse": {
        "dtype": FP16,
        "headdim": 256,
        "causal": True,
        "nheads_k": 1,
        "dlse": True,
    },
    "bf16-256-causal-deterministic": {"headdim": 256, "causal": True, "deterministic": True},
    "bf16-96": {"headdim": 96},
    "fp16-96-causal-gqa-tail-dlse": {
        "dtype": FP16,
        "headdim": 96,
        "causal": True,
        "nheads_k": 2,
        "seqlen": 1000,
        "dlse": True,
    },
    "bf16-96-causal-whole-heads": {
        "batch": 64,
        "seqlen": 512,
        "headdim": 96,
        "causal": True,
        "deterministic": True,
    },
    "bf16-96-persistent": {"headdim": 96, "batch": 64},
    "bf16-96-causal-persistent": {"headdim": 96, "batch": 64, "causal": True},
    "bf16-96-long": {"headdim": 96, "seqlen": 8192},
    "bf16-96-causal-long": {"headdim": 96, "seqlen": 8192, "causal": True},
    "bf16-192": {"headdim": 192},
    "bf16-192-causal-deterministic": {"headdim": 192, "causal": True, "deterministic": True},
    "bf16-192/128": {"headdim": 192, "headdim_v": 128},
    "bf16-192/128-causal": {"headdim": 192, "headdim_v": 128, "causal": True},
    "bf16-64/256": {"headdim": 64, "headdim_v": 256},
    "bf16-64-packed": {"headdim": 64, "packed": True},
    "bf16-64-causal-packed": {"headdim": 64, "packed": True, "causal": True},
    "bf16-64-causal-deterministic-packed": {
        "headdim": 64,
        "packed": True,
        "causal": True,
        "deterministic": True,
    },
    "bf16-128-packed": {"headdim": 128, "packed": True},
    "fp16-128-causal-gqa-dlse-packed-used": {
        "dtype": FP16,
        "headdim": 128,
        "packed": True,
        "causal": True,
        "nheads_k": 1,
        "dlse": True,
        "seqused": True,
    },
    "bf16-256-packed": {"headdim": 256, "packed": True},
    "bf16-256-causal-packed": {"headdim": 256, "packed": True, "causal": True},
    "bf16-128-causal-left-packed": {
        "headdim": 128,
        "packed": True,
        "causal": True,
        "feature": "left",
        "seqused": True,
    },
    "bf16-64-causal-left": {"headdim": 64, "causal": True, "feature": "left"},
    "bf16-64-causal-softcap": {"headdim": 64, "causal": True, "feature": "softcap"},
    "bf16-64-causal-learned bias": {"headdim": 64, "causal": True, "feature": "learned bias"},
    "bf16-64-documents": {"headdim": 64, "feature": "documents"},
    "bf16-128-causal-left": {"headdim": 128, "causal": True, "feature": "left"},
    "fp16-128-causal-left-gqa-tail-dlse": {
        "batch": 64,
        "dtype": FP16,
        "headdim": 128,
        "causal": True,
        "nheads_k": 2,
        "seqlen": 1000,
        "dlse": True,
        "feature": "left",
    },
    "bf16-128-both-tail": {"headdim": 128, "seqlen_k": 1000, "feature": "both"},
    "bf16-128-both-deterministic": {"headdim": 128, "feature": "both", "deterministic": True},
    "bf16-128-causal-softcap": {"headdim": 128, "causal": True, "feature": "softcap"},
    "fp16-128-causal-alibi": {"dtype": FP16, "headdim": 128, "causal": True, "feature": "alibi"},
    "bf16-128-softcap, alibi, window": {"headdim": 128, "feature": "softcap, alibi, window"},
    "bf16-128-causal-learned bias": {"headdim": 128, "causal": True, "feature": "learned bias"},
    "bf16-128-documents": {"headdim": 128, "feature": "documents"},
    "bf16-128-large blocks": {"headdim": 128, "feature": "large blocks"},
    "bf16-128-larger blocks, gqa": {
        "headdim": 128,
        "nheads_k": 2,
        "feature": "larger blocks, alibi",
        "deterministic": True,
    },
    "bf16-96-causal-packed": {"headdim": 96, "packed": True, "causal": True},
    "bf16-96-causal-learned bias": {"headdim": 96, "causal": True, "feature": "learned bias"},
    "bf16-192-large blocks": {"headdim": 192, "feature": "large blocks"},
    "bf16-192-both": {"headdim": 192, "feature": "both"},
    "bf16-256-left": {"headdim": 256, "feature": "left"},
    "bf16-256-causal-softcap": {"headdim": 256, "causal": True, "feature": "softcap"},
    "bf16-256-documents": {"headdim": 256, "feature": "documents"},
}


# How often loops touch spilled registers under modifications, whose tiles come on top.
SPILLS_OF_MODIFICATIONS = {
    "bf16-64-causal-learned bias": 8,
    "bf16-128-causal-left": 10,
    "fp16-128-causal-left-gqa-tail-dlse": 10,
    "bf16-128-softcap, alibi, window": 5,
    "bf16-256-causal-softcap": 12,
}


def launches_of(
    target: Target,
    backward: bool,
    dtype: torch.dtype = BF16,
    headdim: int = 64,
    headdim_v: int | None = None,
    causal: bool = False,
    nheads_k: int = 4,
    seqlen: int = 1024,
    seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    dlse: bool = False,
    deterministic: bool = False,
    packed: bool = False,
    seqused: bool = False,
    feature: str | None = None,
    batch: int | None = None,
) -> list:
    """The launches of v3's forward, or of its backward; packed, of two sequences.

    `feature` is one of test_mods.FEATURED.
    """
    if batch is None:  # so that programs of the forward have several tiles
        batch = 2 if backward else max(2, 16384 // seqlen)

    def empty(seqlen: int, *shape: int) -> torch.Tensor:
        rows = (2 * seqlen,) if packed else (batch, seqlen)
        return torch.empty(*rows, *shape, dtype=dtype, device="meta")

    q = empty(seqlen, 4, headdim)
    k = empty(seqlen_k or seqlen, nheads_k, headdim)
    v = empty(seqlen_k or seqlen, nheads_k, headdim_v or headdim)
    features, extras = PLAIN, ()
    if feature is not None:
        of = Case(batch, seqlen, seqlen_k or seqlen, 4, nheads_k, headdim, causal=causal)
        features, extras = aot.features_for(of, feature)
    options = (softmax_scale, causal, deterministic, False, True, features, extras)
    keywords = {}
    if packed:
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
        used = cu_seqlens[:2] if seqused else None
        sequences = Sequences(cu_seqlens, cu_seqlens, used, used)
        spec = make_varlen_spec(q, k, v, sequences, seqlen, seqlen_k or seqlen, *options)
        keywords = {"sequences": sequences}
    else:
        spec = make_spec(q, k, v, *options)
    row = registry.get("v3")
    with aot.recorded(target, row) as launches:
        out, lse, saved = row.load_forward()(q, k, v, spec, extras, **keywords)
        if backward:
            launches.clear()
            gradient = torch.empty_like(lse) if dlse else None
            dout = torch.empty_like(out)
            row.load_backward()(dout, gradient, q, k, v, out, lse, saved, spec, extras, **keywords)
    return launches


def compile_v3(call: dict, backward: bool = False) -> dict:
    """What the tests ask of the compiled kernel of `call`; runs in its own process.

    Not of one that runs behind it, which test_v3_kept asks.
    """
    kernel, *_behind = compile_all(call, backward)
    return kernel


def compile_all(call: dict, backward: bool = False) -> list[dict]:
    """The same of each of v3's kernels."""
    gpu, target, _ = aot.TARGETS["sm_90"]
    launches = launches_of(target, backward, **call)
    ours = [x for x in launches if x.kernel.is_gluon()]
    around = [aot.compile_launch(x, gpu).spills for x in launches if not x.kernel.is_gluon()]
    return [{**code_of(x, backward), "around": around} for x in ours]


def code_of(launch, backward: bool) -> dict:
    """What is asked of one kernel's machine code."""
    gpu, _, _ = aot.TARGETS["sm_90"]
    with redirect_stdout(io.StringIO()) as said, knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        compiled = aot.compile_launch(launch, gpu)
    code = aot.sass(compiled.asm["cubin"])
    q, k, v = (tensor.block_shape for tensor in launch.args[:3])
    return {
        "shared": compiled.shared,
        # Triton says nothing of a kernel that it finds in its cache.
        "log": said.getvalue() or log_of_ptxas(compiled.asm["ptx"]),
        "stack": aot.resources(compiled.asm["cubin"])[1],
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "hgmma_expected": instructions(launch.config, q, k, v, backward),
        "registers_move": "setmaxnreg.inc" in compiled.asm["ptx"],
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "local_in_loops": [len(re.findall(r"\b(?:LDL|STL)\b", x)) for x in loops(code)],
        "maxima": len(re.findall(r"\bFMNMX\b", loops(code)[0])),
    }


def log_of_ptxas(ptx: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [
            aot._tool("ptxas"), "-v", "--gpu-name=sm_90a", str(file), "-o", f"{file}.cubin",
        ]  # fmt: skip
        assembler = subprocess.run(command, capture_output=True, text=True)
        assert assembler.returncode == 0, f"{assembler.stdout}{assembler.stderr}"
        return assembler.stderr


def instructions(config, q: list[int], k: list[int], v: list[int], backward: bool) -> int:
    """How many wgmma instructions a kernel for these tiles of q, k and v has."""
    if not backward:
        # q k^T once before the loop and once in it, p v once in it and once behind it.
        products = sum(config.widths) // 16 + len(config.widths_v) * k[-2] // 16
        return config.consumers * 2 * products
    parts, parts_v = (len(tuning_v3.widths_of(x)) for x in (config.width, config.width_v))
    if config.wide:
        # q k^T, once more where it is ahead, and dout v^T; dv and dk in parts of 128 columns at
        # most; dq in parts of 64, or the last in halves.
        d, d_v = config.width, config.width_v
        most = sum(max(n, -(-x // 128)) for n, x in ((parts, d), (parts_v, d_v)))
        scores = (1 + config.ahead) * d // 16 + d_v // 16
        return scores + 4 * most + 4 * (d // 64 + config.halves)
    # Two warpgroups, each with five products of 64 keys: 8 of them are dq's, which lag brings once
    # more behind the loop.
    of_scores = (config.width + config.width_v) // 16
    of_keys = (parts + parts_v) * config.block_m // 16
    return 2 * (of_scores + of_keys + 8 * (1 + config.lag))


def loops(code: str) -> list[str]:
    """The innermost loops with matrix products."""
    lines = code.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    found: dict[int, str] = {}  # by their first product
    for i, line in enumerate(lines):
        # A jump without a condition closes no loop: it comes back from waiting for a barrier.
        branch = re.search(r"@!?U?P\d+ BRA `\((\.L_x_\d+)\)", line)
        start = labels[branch[1]] if branch else i
        products = [j for j in range(start, i) if "HGMMA" in lines[j]]
        if products and (products[0] not in found or i - start < found[products[0]].count("\n")):
            found[products[0]] = "\n".join(lines[start : i + 1])
    return list(found.values())


@triton.jit
def first_half(b, h, q_idx, kv_idx, aux):
    return kv_idx < tl.full([1, 1], 512, tl.int32)


def error_of_a_tile() -> str:
    """What a mask modification that makes a tile is told."""
    import test_mods

    test_mods.FEATURED["a tile"] = {"mask_mod": mods.mask_mod(first_half)}
    features, _ = aot.features_for(Case(), "a tile")
    with pytest.raises(TypeError) as caught, mods.explained(features):
        compile_v3({"feature": "a tile"})
    return str(caught.value)


def asks_for_delta(feature: str) -> bool:
    """Whether the backward takes delta apart from the statistics for gradients of extras."""
    from triflash.kernels.v3 import backward

    with mock.patch.object(backward, "_rows_of", wraps=backward._rows_of) as rows:
        launches_of(HOPPER, backward=True, headdim=128, causal=True, feature=feature)
    return rows.called


@pytest.fixture
def compiler(compiling):
    return lambda call, backward=False: compiling(compile_v3, call, backward)


def test_functions_that_make_tiles_are_refused(compiling):
    message = compiling(error_of_a_tile)
    assert all(word in message for word in ("first_half", "tl.full", 'implementation="v2"'))


def calls_of(table: dict[str, dict]) -> list:
    """The calls by their names; those with features or of packed tensors are sampled."""
    return [
        pytest.param(name, marks=pytest.mark.sampled(3))
        if {"feature", "packed"} & call.keys()
        else name
        for name, call in table.items()
    ]


@pytest.mark.parametrize("call", calls_of(CALLS))
def test_machine_code(call, compiler):
    kernel = compiler(CALLS[call])
    assert kernel["shared"] <= 227 * 1024
    # "wgmma serialized": correct, and much slower.
    assert "C7512" not in kernel["log"], kernel["log"]
    assert "serialized" not in kernel["log"], kernel["log"]
    # Above 128, modifications are short of a few registers.
    few = 4 if CALLS[call].get("headdim", 64) > 128 and "feature" in CALLS[call] else 0
    assert max(kernel["local_in_loops"]) <= few, kernel["local_in_loops"]
    assert kernel["stack"] <= 4 * few
    assert kernel["local"] <= 4 * few
    assert kernel["hgmma"] == kernel["hgmma_expected"]
    assert kernel["registers_move"]


@pytest.mark.parametrize("call", calls_of(BACKWARD_CALLS))
def test_machine_code_of_the_backward(call, compiler):
    kernel = compiler(BACKWARD_CALLS[call], backward=True)
    assert kernel["shared"] <= 227 * 1024
    assert "C7512" not in kernel["log"], kernel["log"]
    assert "serialized" not in kernel["log"], kernel["log"]
    assert kernel["hgmma"] == kernel["hgmma_expected"]
    # What is spilled comes from before the loop and is wanted behind it; but where the warp beside
    # them waits for its turn, ptxas keeps addresses in fewer uniform registers.
    # At 64 the registers are short by up to three; what saved them, p rounded, cost 11-19%. Above
    # 128 the branch for masked tiles is short by a few.
    # Programs that walk several tiles spill what they keep from tile to tile, and where they finish
    # dq some of it.
    headdim = BACKWARD_CALLS[call].get("headdim", 64)
    few, stack = {64: 3, 128: 1, 192: 4, 256: 8}.get(headdim, 0), 64
    if "persistent" in call or "whole" in call:
        few, stack = 30 if "whole" in call else 12, 152
    if "feature" in BACKWARD_CALLS[call]:
        few, stack = SPILLS_OF_MODIFICATIONS.get(call, max(few, 2)), 128
    if "deterministic" not in BACKWARD_CALLS[call]:
        assert max(kernel["local_in_loops"]) <= few, kernel["local_in_loops"]
    assert kernel["stack"] <= stack
    assert kernel["registers_move"]
    assert not any(kernel["around"])


def test_delta_is_taken_apart_for_sinks_alone(compiling):
    features = ("softcap", "learned bias", "sinks", "sinks, learned bias")
    asked = {feature: compiling(asks_for_delta, feature) for feature in features}
    assert asked == {feature: "sinks" in feature for feature in features}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": Target("cuda", "sm_80", 108)}, ["sm_90", "sm_80"]),
        ({"target": Target("cuda", "sm_100", 148)}, ["sm_90", "sm_100"]),
        ({"target": Target("cuda", "sm_90", 132, interpreter=True)}, ["sm_90", "interpreter"]),
        ({"target": Target("hip", "gfx942", 304)}, ["NVIDIA", "hip"]),
        ({"dtype": torch.float32}, ["float16", "float32"]),
        ({"headdim": 36}, ["multiples of 8", "36"]),
        ({"headdim": 264}, ["256", "264"]),
    ],
)
def test_refusals_say_why(change, words):
    target = change.get("target", Target("cuda", "sm_90", 132))
    q = torch.empty(
        1, 8, 2, change.get("headdim", 64), dtype=change.get("dtype", BF16), device="meta"
    )
    reason = registry.get("v3").supports(make_spec(q, q, q, None, False, False, False), target)
    assert reason is not None
    assert reason.startswith("v3 ")
    assert all(word in reason for word in words)
    supported = torch.empty(1, 8, 2, 64, dtype=BF16, device="meta")
    spec = make_spec(supported, supported, supported, None, False, False, False)
    assert registry.get("v3").supports(spec, Target("cuda", "sm_90", 132)) is None


def test_small_blocks_of_a_block_mask_are_refused():
    row = replace(registry.get("v3"), features=frozenset(FEATURES))
    for size_q, size_k, refused in ((64, 128, True), (128, 192, True), (256, 128, False)):
        blocks = Blocks(size_q, size_k, 1, 1, 128, 128)
        spec = replace(Case(dtype=BF16).spec(), features=Features(blocks=blocks))
        reason = row.supports(spec, HOPPER)
        assert (reason is not None) == refused
        assert reason is None or f"multiples of 128, not {size_q} x {size_k}" in reason


def test_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_triton_version", lambda: (3, 5))
    q = torch.empty(1, 8, 2, 64, dtype=BF16, device="meta")
    spec = make_spec(q, q, q, None, False, False, False)
    assert registry.get("v3").supports(spec, HOPPER) == (
        "v3 needs Triton 3.6 or later, and 3.5 is installed."
    )
    registry.resolve.cache_clear()
    assert registry.resolve("auto", spec, HOPPER).name == "v2"
    registry.resolve.cache_clear()


def _laid_out(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k long enough for v3 to pay."""
    k = torch.empty(2, 4096, 8, 64, dtype=BF16, device="meta")
    if layout == "contiguous":
        return k, k
    if layout == "rows of 16 bytes more":
        return torch.empty(2, 4096, 8, 72, dtype=BF16, device="meta")[..., 8:], k
    if layout == "rows of 2 bytes more":
        return torch.empty(2, 4096, 8, 65, dtype=BF16, device="meta")[..., 1:], k
    if layout == "expanded":
        return torch.empty(1, 4096, 8, 64, dtype=BF16, device="meta").expand(2, -1, -1, -1), k
    assert layout == "junk stride of a single entry"
    q = torch.empty(1, 4096, 16, 64, dtype=BF16, device="meta")
    return q.as_strided(q.shape, (7, *q.stride()[1:])), q


@pytest.mark.parametrize(
    ("layout", "readable"),
    [
        ("contiguous", True),
        ("rows of 16 bytes more", True),
        ("junk stride of a single entry", True),
        ("rows of 2 bytes more", False),
        ("expanded", False),
    ],
)
def test_layouts_that_tma_cannot_read_go_to_v2(layout, readable):
    for tensors in (_laid_out(layout), _laid_out(layout)[::-1]):
        q, k = tensors
        spec = make_spec(q, k, k, None, False, False, False)
        assert spec.tma == readable
        reason = registry.get("v3").supports(spec, HOPPER)
        assert (reason is None) if readable else ("16 bytes" in reason)
        assert registry.resolve("auto", spec, HOPPER).name == ("v3" if readable else "v2")


def test_bases_that_tma_cannot_read_go_to_v2(monkeypatch):
    """Only the operators see where memory starts, and forward and backward see the same."""
    resolved = []

    def resolve(name, spec, target):
        resolved.append(spec.tma)
        return registry.get("reference")

    monkeypatch.setattr(registry, "resolve", resolve)
    memory = torch.randn(2 * 8 * 2 * 8 + 8)
    for offset, readable in ((0, True), (1, False), (4, True)):
        q = memory[offset : offset + 256].view(2, 8, 2, 8).requires_grad_()
        assert (q.data_ptr() % 16 == 0) == readable
        k = torch.randn(2, 8, 2, 8)
        resolved.clear()
        out, lse, saved = torch.ops.triflash.attention_forward(q, k, k, 1.0, *OPTIONS)
        torch.ops.triflash.attention_backward(out, None, q, k, k, out, lse, saved, 1.0, *OPTIONS)
        assert resolved == [readable, readable]


def test_auto_takes_it_where_it_was_measured_to_pay():
    def auto(target: Target = HOPPER, **case) -> str:
        case = {"batch": 16, "nheads": 16, "nheads_k": 16, "dtype": BF16, "headdim": 128, **case}
        return registry.resolve("auto", Case(**case).spec(), target).name

    assert auto(seqlen_q=1024, seqlen_k=1024) == "v3"
    assert auto(batch=32, seqlen_q=512, seqlen_k=512, causal=True) == "v3"
    assert auto(batch=64, seqlen_q=500, seqlen_k=500) == "v2"
    assert auto(batch=64, seqlen_q=512, seqlen_k=512, headdim=32) == "v2"
    assert auto(batch=64, seqlen_q=4096, seqlen_k=4096, headdim=32) == "v3"
    assert auto(seqlen_q=4096, seqlen_k=4096, headdim=256, causal=True) == "v3"
    assert auto(seqlen_q=1, seqlen_k=4096) == "v2"
    assert auto(seqlen_q=1024, seqlen_k=1024, batch=1) == "v2"
    assert auto(seqlen_q=4096, seqlen_k=4096, dtype=torch.float32) == "v2"
    for other in (Target("cuda", "sm_80", 108), Target("cuda", "sm_100", 148)):
        assert auto(other, seqlen_q=4096, seqlen_k=4096) == "v2"


@pytest.mark.parametrize(
    ("lengths", "headdim", "chosen"),
    [
        ((1024,) * 16, 128, "v3"),
        ((4096, 100), 128, "v3"),
        ((300,) * 64, 128, "v3"),
        ((300,) * 64, 64, "v2"),
        ((600,) * 32, 64, "v3"),
        ((128,) * 128, 128, "v2"),
        ((1024,), 128, "v2"),
    ],
)
def test_auto_takes_it_for_packed_sequences_long_enough_on_average(lengths, headdim, chosen):
    q = torch.empty(sum(lengths), 2048 // headdim, headdim, dtype=BF16, device="meta")
    cu_seqlens = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    where = Sequences(cu_seqlens, cu_seqlens)
    spec = make_varlen_spec(q, q, q, where, *(max(lengths),) * 2, None, False, False, False)
    assert registry.resolve("auto", spec, HOPPER).name == chosen


def test_which_scores_need_no_maximum():
    def bounded(dtype: torch.dtype = BF16, **options) -> bool:
        return tuning_v3.forward(Case(dtype=dtype, **options).spec(), HOPPER).bounded

    assert bounded(softcap=50.0)
    assert bounded(score_mod=SOFT_SIGN, make_aux=lambda *_: (20.0,))
    assert not bounded(softcap=50.1)
    assert not bounded(softcap=50.0, dtype=FP16)
    assert not bounded(softcap=50.0, alibi="heads")
    assert not bounded()


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 50.0, "softmax_scale": 8.0, "causal": True},
        {"softcap": 30.0, "window_size": (100, 50), "sinks": torch.float32},
        {"score_mod": SOFT_SIGN, "make_aux": lambda *_: (3.0,), "causal": True},
        {"score_mod": SOFT_SIGN, "make_aux": lambda *_: (40.0,), "softmax_scale": -4.0},
    ],
)
def test_scores_with_a_bound(options, headdim, device):
    """In bfloat16, where exponentials are relative to 0; whole blocks and others."""
    for seqlen_q, seqlen_k in ((512, 1024), (700, 300)):
        case = Case(2, seqlen_q, seqlen_k, 2, 1, headdim, dtype=BF16, **options)
        check(case, "v3", device)


def test_which_reports_of_racecheck_are_explained():
    def line(text: str, file: str = "forward.py") -> int:
        source = Path(registry.__file__).parent / "kernels" / "v3" / file
        lines = source.read_text().splitlines()
        return next(i for i, found in enumerate(lines, 1) if text in found)

    def report(*places: str, first: str = "Read") -> str:
        kinds = [first] + ["Read"] * (len(places) - 1)
        accesses = [
            f"{kind} access at k_kernel+0x1e0 in {x}" for kind, x in zip(kinds, places, strict=True)
        ]
        return "========= Error: Race reported between " + "\n=========     and ".join(accesses)

    dispatch, state = line("def forward_kernel("), line("if CONSUMERS == 2:")
    index = line("tile_smem.index(len(fields) * slot + i).store(")
    load, other = line("gl.max(tile_smem"), line("tile(o_smem[part], ")
    backward = line("gl.warp_specialize(", "backward.py")
    explained = report(f"forward.py:{dispatch}", f"forward.py:{dispatch}", f"forward.py:{state}")
    explained += "\n" + report(f"forward.py:{index}", "mask.py:45", first="Write")
    explained += "\n" + report(f"backward.py:{backward}", f"backward.py:{backward}")
    assert unexplained_races(explained) == []
    for wrong in (
        report(f"forward.py:{other}", f"forward.py:{load}", first="Write"),
        report(f"forward.py:{dispatch}", f"forward.py:{other}"),
        report("mask.py:45", "mask.py:45", first="Write"),
    ):
        assert unexplained_races(explained + "\n" + wrong) == [wrong.split("Error: ")[1]]
    assert unexplained_races("========= Error: something else")


def test_no_keys():
    forward = registry.get("v3").load_forward()
    q = torch.ones(2, 8, 2, 64, dtype=BF16)
    k = torch.ones(2, 0, 2, 64, dtype=BF16)
    out, lse, saved = forward(q, k, k, make_spec(q, k, k, None, False, False, False))
    assert out.shape == q.shape
    assert not out.any()
    assert lse.shape == (2, 2, 8)
    assert (lse == float("-inf")).all()
    assert saved == []
    sinks = torch.tensor([1.0, -2.0])
    features, extras = mods.features_of(sinks=sinks)
    spec = make_spec(q, k, k, None, False, False, False, True, features, extras)
    out, lse, _ = forward(q, k, k, spec, extras)
    assert not out.any()
    assert torch.equal(lse, sinks[:, None].expand(2, 2, 8))


def test_no_keys_gives_zero_gradients():
    q = torch.ones(2, 8, 2, 64, dtype=BF16)
    k = torch.ones(2, 0, 2, 64, dtype=BF16)
    lse = torch.full((2, 2, 8), float("-inf"))
    spec = make_spec(q, k, k, None, False, False, False)
    dq, dk, dv = registry.get("v3").load_backward()(q, None, q, k, k, q, lse, [], spec)
    assert dq.shape == q.shape
    assert not dq.any()
    assert dk.shape == dv.shape == k.shape


def test_importing_triflash_does_not_import_gluon():
    command = "import sys, triflash; sys.exit('triton.experimental.gluon' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_every_stream_has_a_counter_of_its_own(monkeypatch):
    from triflash.kernels.v3 import counters

    device = torch.device("cpu")
    free = [torch.zeros(1), torch.zeros(1)]
    monkeypatch.setattr(counters, "counters_of", lambda _: free)
    counters.counter_of_stream.cache_clear()
    first, second, third = (counters.counter_of_stream(device, stream) for stream in (1, 2, 3))
    assert first is not second
    assert counters.counter_of_stream(device, 1) is first
    assert third is None  # a new one for every call
    counters.counter_of_stream.cache_clear()


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_launches_are_called(hook, monkeypatch):
    """Whoever sets one, such as a profiler, gets Triton's own launch, which calls it."""
    from triton import knobs

    from triflash.kernels.common.launch import Launch

    launch = Launch(None, 1, (), (), None)
    ran = []
    launch._run = {launch.grid: lambda *arguments: ran.append(arguments)}
    launch._launcher = object()  # any use of it fails
    monkeypatch.setattr(getattr(knobs.runtime, hook), "calls", [print])
    tensor = torch.zeros(1)
    launch(tensor)
    assert ran == [(tensor,)]


def test_what_addresses_cannot_stand_for_is_launched_by_triton(monkeypatch):
    """v2 passes modifications and descriptors, which hold tensors; v3's kernels around its backward
    get tensors, numbers and None, and take the fast way."""
    from types import SimpleNamespace

    from triflash.kernels.common import launch as module

    made = []
    monkeypatch.setattr(module, "_launcher_of", lambda compiled: made.append(compiled))
    config = SimpleNamespace(num_warps=4, num_stages=1)
    tensor = torch.zeros(1)
    for tensors, fast in (
        ((tensor, None, 3), True),
        ((tensor, (tensor,)), False),
        ((tensor, SimpleNamespace(base=tensor)), False),
    ):
        kernel = {(1, 1, 1): lambda *_, num_warps, num_stages: "compiled"}
        module.Launch(kernel, 1, (), (), config)(*tensors)
        assert (made == ["compiled"]) is fast
        made.clear()


@pytest.mark.parametrize("capturing", [False, True])
def test_a_thread_gets_a_context_before_its_first_launch(capturing, monkeypatch):
    """TMA descriptors cannot be encoded without one; nothing is asked that a capture forbids."""
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    from triflash.kernels.common import launch as module

    did = []
    cuda = SimpleNamespace(
        is_current_stream_capturing=lambda: capturing, mem_get_info=lambda: did.append("context")
    )
    active = SimpleNamespace(
        get_current_stream=lambda _: 5,
        get_current_device=lambda: 0,
        get_current_target=lambda: SimpleNamespace(backend="cuda"),
        get_device_interface=lambda: cuda,
    )
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    launch = module.Launch(None, 1, (), (), None, (lambda x: x,))
    launch._launcher = module._Launcher(
        lambda *_: did.append("run"), (), lambda *_: [did.append("encode")], [None]
    )
    tensor = torch.zeros(1)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            pool.submit(launch, tensor).result()
    assert did == [*([] if capturing else ["context"]), "encode", "run", "run"]


def test_a_repeated_launch_passes_addresses_where_modifications_want_tensors(monkeypatch):
    from types import SimpleNamespace

    from triflash.kernels.common import launch as module

    q, lse, slopes = torch.zeros(1), torch.zeros(1), torch.zeros(2)
    launch = module.Launch(
        None, 1, (2.0,), (7,), None, (lambda x: ("described", x), None),
        lambda lse, slopes: (lse, (("function", (slopes, 0)),), None),
    )  # fmt: skip
    ran = []
    launch._launcher = module._Launcher(
        lambda *arguments: ran.append(arguments), (), lambda view, _: [view], [None]
    )
    stream = SimpleNamespace(get_current_stream=lambda _: 5, get_current_device=lambda: 0)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=stream))
    monkeypatch.setattr(module._thread, "has_context", True)
    for tensors in ((q, lse, slopes), (q, lse, slopes), (q, lse, slopes.clone())):
        launch(q, *tensors)
        at = tensors[-1].data_ptr()
        behind = (lse.data_ptr(), (("function", (at, 0)),), None, 2.0, 7)
        assert ran[-1] == (1, 1, 1, 5, ("described", q), None, *behind)
    assert len(launch._bound) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [  # whole heads, also with fewer heads in the last program; then tiles in turn
        {"batch": 33, "seqlen_q": 512, "seqlen_k": 512, "nheads": 4, "nheads_k": 4},
        {"batch": 64, "seqlen_q": 300, "seqlen_k": 411, "nheads": 8, "nheads_k": 4},
        {"batch": 33, "seqlen_q": 500, "seqlen_k": 640, "nheads": 4, "nheads_k": 4, "headdim": 96},
        {"batch": 33, "seqlen_q": 512, "seqlen_k": 512, "nheads": 4, "nheads_k": 4, "headdim": 128},
        {"batch": 17, "seqlen_q": 1024, "seqlen_k": 1024, "nheads": 8, "nheads_k": 8},
        {"batch": 40, "seqlen_q": 1000, "seqlen_k": 700, "nheads": 8, "nheads_k": 4},
        {"batch": 64, "seqlen_q": 100, "seqlen_k": 64, "nheads": 8, "nheads_k": 4, "headdim": 256},
        # dq of a step in the next
        {"batch": 1, "seqlen_q": 4300, "seqlen_k": 4200, "nheads": 2, "nheads_k": 1, "headdim": 96},
    ],
)
def test_programs_that_walk_several_tiles(shape, causal, device):
    case = Case(**{"headdim": 64, **shape}, causal=causal, dtype=BF16)
    skip_unsupported(case, "v3", device)
    assert_within_budget(case, check_case(case, "v3", device))
    inputs = make_inputs(case, device)
    leaves = tuple(t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = attention(*leaves, causal=causal, deterministic=True, implementation="v3")
    twice = [torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *twice))


def test_programs_share_out_heads_where_tiles_are_few():
    def splits(
        batch: int, nheads_k: int, causal: bool, seqlen: int = 4096, nheads: int = 16
    ) -> int:
        case = Case(batch, seqlen, seqlen, nheads, nheads_k, 128, dtype=BF16, causal=causal)
        return tuning_v3.backward(case.spec(), HOPPER).splits

    assert splits(4, 1, False) == 1  # 128 programs of one length for 132 multiprocessors
    assert splits(4, 1, True) == 4  # the longest is twice the mean
    assert splits(4, 4, True) == splits(1, 16, True) == 1
    assert splits(1, 1, False) == 4
    assert splits(1, 3, True, 128, 12) == 4  # never more than heads of a group
    assert splits(1, 2, True, 128, 12) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("splits", [1, 2, 6])
def test_heads_of_a_group_in_one_program_and_shared_out(
    headdim, splits, device, tuned, monkeypatch
):
    case = Case(
        batch=2, seqlen_q=300, seqlen_k=411, nheads=12, nheads_k=2, headdim=headdim, dtype=BF16,
        causal=True,
    )  # fmt: skip
    skip_unsupported(case, "v3", device)
    # Remembered launches are forgotten by `tuned`, before and behind.
    monkeypatch.setattr(tuning_v3, "_splits", lambda *_: splits)
    tuned.of_target(target_of(device))
    assert_within_budget(case, check_case(case, "v3", device))


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize(
    "feature", ["softcap", "alibi", "soft sign", "softcap, alibi, window", "learned bias"]
)
def test_modifications_where_tiles_are_full(feature, headdim, device):
    """Each head dimension modifies scores in a schedule of its own."""
    import test_mods

    sizes = {"batch": 2, "seqlen_q": 1000, "seqlen_k": 1100, "nheads": 4, "nheads_k": 2}
    case = Case(headdim=headdim, dtype=BF16, **sizes, **test_mods.FEATURED[feature])
    skip_unsupported(case, "v3", device)
    assert_within_budget(case, check_case(case, "v3", device))


def _sectioned(kind: str, headdim: int) -> Case:
    """5 rows of batch and key head, so that sections of 2 leave one over."""
    case = Case(
        batch=1, seqlen_q=700, seqlen_k=700, nheads=5, nheads_k=5, headdim=headdim, dtype=BF16,
        causal=True,
    )  # fmt: skip
    if kind == "gqa":
        return replace(case, batch=5, nheads=4, nheads_k=1, seqlen_k=800)
    if kind == "blocks":
        import test_mods

        blocks = test_mods.FEATURED["large blocks"]
        return replace(case, **blocks, batch=5, nheads=2, nheads_k=1, causal=True)
    return case


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["heads", "gqa", "blocks"])
def test_tiles_of_heads_in_sections(kind, headdim, device, tuned, monkeypatch):
    case = _sectioned(kind, headdim)
    skip_unsupported(case, "v3", device)
    # Remembered launches are forgotten by `tuned`, before and behind.
    monkeypatch.setattr(tuning_v3, "backward_section", lambda *_: 2)
    tuned.of_target(target_of(device))
    assert_within_budget(case, check_case(case, "v3", device))


@pytest.mark.gpu
def test_tiles_of_packed_heads_in_sections(device, monkeypatch):
    lengths = [700, 0, 130, 900, 64]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    tensors = [
        torch.randn(sum(lengths), 3, 128, device=device, dtype=BF16).requires_grad_()
        for _ in range(3)
    ]
    q = tensors[0]
    reason = registry.get("v3").supports(Case(dtype=BF16).spec(), target_of(device))
    if reason is not None:
        pytest.skip(reason)

    def gradients() -> tuple[torch.Tensor, ...]:
        forget_prepared_launches()
        out = flash_attn_varlen_func(
            *tensors, cu_seqlens, cu_seqlens, 900, 900, causal=True, implementation="v3"
        )
        return torch.autograd.grad(out, tensors, torch.ones_like(q))

    monkeypatch.setattr(tuning_v3, "backward_section", lambda *_: None)
    expected = gradients()
    monkeypatch.setattr(tuning_v3, "backward_section", lambda *_: 2)
    dq, dk, dv = gradients()
    monkeypatch.undo()
    forget_prepared_launches()
    # A program does the same work wherever it is in the order; dq is added to in any order.
    assert torch.equal(dk, expected[1])
    assert torch.equal(dv, expected[2])
    torch.testing.assert_close(dq, expected[0], rtol=2e-2, atol=2e-2)


def test_sections_give_every_multiprocessor_a_tile():
    def section(seqlen: int, **options) -> int | None:
        case = Case(1, seqlen, seqlen, 16, 16, 128, dtype=BF16, **{"causal": True, **options})
        spec = case.spec()
        return tuning_v3.backward_section(spec, HOPPER, tuning_v3.backward(spec, HOPPER))

    assert [section(n) for n in (1024, 4096, 8192, 16384, 65536)] == [16, 4, 2, 1, 1]
    assert section(8192, causal=False) is None
    assert section(8192, window_size=(100, None)) is None


@pytest.mark.parametrize(
    ("change", "drawn"),
    [
        ({}, True),
        ({"causal": True}, True),
        ({"seqlen_q": 1024, "seqlen_k": 1024, "batch": 2}, False),  # 64 tiles for 132 programs
        ({"seqlen_q": 1024, "seqlen_k": 1024, "batch": 2, "causal": True}, False),
        ({"seqlen_q": 1024, "seqlen_k": 1024, "batch": 5}, True),
        ({"window_size": (512, 512)}, False),
        ({"window_size": (512, 0), "causal": True}, True),
        ({"alibi": "heads"}, True),
        ({"headdim": 64, "headdim_v": 128}, False),
        ({"headdim": 256}, True),
        ({"headdim": 256, "seqlen_q": 1024}, False),
        ({"headdim": 256, "seqlen_q": 1024, "causal": True}, True),
    ],
)
def test_where_programs_draw_their_tiles(change, drawn):
    options = {"batch": 16, "headdim": 128, "seqlen_q": 4096, "seqlen_k": 4096, **change}
    spec = Case(dtype=BF16, nheads=4, nheads_k=4, **options).spec()
    assert tuning_v3.forward(spec, HOPPER).dynamic == drawn


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, (3, 64)),
        ({"causal": False, "window_size": (None, 64)}, (3, 64)),
        ({"headdim": 96}, (2, 128)),
        ({"window_size": (None, None)}, (2, 128)),
        ({"softcap": 3.0}, (2, 128)),
    ],
)
def test_windows_take_three_warpgroups(change, chosen):
    options = {"headdim": 128, "causal": True, "window_size": (1024, 0), **change}
    spec = Case(2, 8192, 8192, 16, 16, dtype=BF16, **options).spec()
    config = tuning_v3.forward(spec, HOPPER)
    assert (config.consumers, config.block_n) == chosen


@pytest.mark.parametrize(
    ("change", "ordered"),
    [
        ({}, True),
        ({"window_size": (2048, 0), "nheads_k": 4}, True),
        ({"sinks": torch.float32}, True),
        ({"nheads_k": 1}, False),  # whose heads are shared out
        ({"headdim": 96}, False),
        ({"window_size": (None, 0)}, False),
        ({"window_size": (4096, 0)}, False),
        ({"causal": False, "window_size": (1024, 64)}, False),
        ({"seqlen_k": 8000}, False),
        ({"seqlen_k": 9000}, False),
        ({"softcap": 3.0}, False),
    ],
)
def test_where_programs_finish_dq_of_windows(change, ordered):
    options = {"headdim": 128, "causal": True, "window_size": (1024, 0), **change}
    lengths = {"seqlen_q": 8192, "seqlen_k": 8192, "nheads": 16, "nheads_k": 16}
    spec = Case(2, dtype=BF16, **{**lengths, **options}).spec()
    assert tuning_v3.backward(spec, HOPPER).ordered == ordered


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 63, 64, 100, 300, 700])
@pytest.mark.parametrize(("seqlen", "nheads_k"), [(900, 2), (1024, 4)])
def test_windows_whose_programs_finish_dq(window, seqlen, nheads_k, device):
    """Three and a half times as many programs as multiprocessors, or more, whichever is ahead.

    Two entries, over and over: what float64 needs of memory is theirs, not the batch's.
    """
    case = Case(
        2, seqlen, seqlen, nheads=4, nheads_k=nheads_k, headdim=128, causal=True,
        window_size=(window, 0), with_dlse=True, dtype=BF16 if nheads_k == 2 else FP16,
    )  # fmt: skip
    many = replace(case, batch=30)
    skip_unsupported(many, "v3", device)
    assert tuning_v3.backward(many.spec(), target_of(device)).ordered
    inputs = make_inputs(case, device)
    copies = {name: torch.cat([t] * 15) for name, t in inputs.tensors.items()}
    copies = replace(inputs, **copies)
    first = {name: t[:2] for name, t in run_case(many, copies, "v3").items()}
    assert_within_budget(case, compare(case, inputs, first))
    for _ in range(10):
        for name, t in run_case(many, copies, "v3").items():
            assert torch.equal(t, torch.cat([first[name]] * 15)), name


@pytest.mark.gpu
def test_a_first_call_inside_a_cuda_graph_of_torch_compile(device):
    """Nothing that outlives the call may be allocated in the graph's pool."""
    reason = registry.get("v3").supports(Case(dtype=BF16, causal=True).spec(), target_of(device))
    if reason is not None:
        pytest.skip(reason)
    code = (
        "import torch, triflash\n"
        "q = torch.randn(20, 300, 8, 64, device='cuda', dtype=torch.bfloat16)\n"
        "def call(q):\n"
        "    return triflash.attention(q * 1, q, q, causal=True, implementation='v3')\n"
        "compiled = torch.compile(call, mode='reduce-overhead', fullgraph=True)\n"
        "for _ in range(4):\n"
        "    torch.compiler.cudagraph_mark_step_begin()\n"
        "    got = compiled(q).clone()\n"
        "assert torch.equal(got, call(q))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_replays_of_a_graph_draw_their_tiles(causal, device):
    """From a counter of the graph's own; that of the stream is 0 behind every launch."""
    from triflash.kernels.v3 import counters, forward

    case = Case(3, 700, 700, 4, 2, 128, dtype=BF16, causal=causal)
    skip_unsupported(case, "v3", device)
    inputs = make_inputs(case, device)

    def call() -> torch.Tensor:
        return attention(inputs.q, inputs.k, inputs.v, causal=causal, implementation="v3")

    expected = call()
    with multiprocessors(8):
        assert tuning_v3.forward(case.spec(), forward.target_of(device)).dynamic
        assert torch.equal(call(), expected)
        assert counters.counter_for(device).item() == 0
        graph, out = captured(call)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_deterministic_gradients_are_bitwise_the_same(headdim, causal, device):
    case = Case(
        batch=2, seqlen_q=1000, seqlen_k=1100, nheads=8, nheads_k=4, headdim=headdim, dtype=BF16,
        causal=causal,
    )  # fmt: skip
    reason = registry.get("v3").supports(case.spec(), target_of(device))
    if reason is not None:
        pytest.skip(reason)
    inputs = make_inputs(case, device)
    leaves = tuple(t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v))

    def gradients() -> tuple[torch.Tensor, ...]:
        out = attention(*leaves, causal=causal, deterministic=True, implementation="v3")
        return torch.autograd.grad(out, leaves, inputs.dout)

    first = gradients()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
