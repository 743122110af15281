"""Every kernel, for every target that Triton has, to machine code, without a GPU.

What a user with that GPU would meet at the first call is met here: a compiler error, a tile that
does not fit its shared memory, and on sm_90 registers that spill.
"""

from __future__ import annotations

from functools import partial

import aot
import pytest
import torch
from helpers import every_triton_row

from triflash import registry
from triflash.testing import Case
from triflash.tuning import TileConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CALLS = {
    "bf16-64": {"dtype": BF16, "headdim": 64},
    "fp16-64-causal-gqa-dlse": {
        "dtype": FP16,
        "headdim": 64,
        "causal": True,
        "nheads_k": 2,
        "dlse": True,
        "seqlen": 1000,
    },
    "bf16-128": {"dtype": BF16, "headdim": 128, "seqlen_k": 1000},
    "bf16-128-causal": {"dtype": BF16, "headdim": 128, "causal": True},
    # Long enough for TMA where that is used for long problems only.
    "bf16-64-causal-long": {"dtype": BF16, "headdim": 64, "causal": True, "seqlen": 16384},
    "bf16-128-long": {"dtype": BF16, "headdim": 128, "seqlen": 16384},
    "bf16-256-causal-long": {"dtype": BF16, "headdim": 256, "causal": True, "seqlen": 16384},
    "bf16-192/128-causal": {"dtype": BF16, "headdim": 192, "headdim_v": 128, "causal": True},
    "fp16-33-negative-scale": {"dtype": FP16, "headdim": 33, "softmax_scale": -0.5},
    "fp32-64-causal": {"dtype": FP32, "headdim": 64, "causal": True},
    "fp32-128-tf32": {"dtype": FP32, "headdim": 128, "allow_tf32": True},
    "fp32-256": {"dtype": FP32, "headdim": 256},
    "bf16-512-causal": {"dtype": BF16, "headdim": 512, "causal": True},
    "bf16-512/64-causal-long": {
        "dtype": BF16,
        "headdim": 512,
        "headdim_v": 64,
        "causal": True,
        "seqlen": 16384,
    },
    "fp16-320-packed-used": {
        "dtype": FP16,
        "headdim": 320,
        "packed": True,
        "seqused": True,
        "seqlen": 16384,
    },
    "fp32-512": {"dtype": FP32, "headdim": 512},
    "fp32-512-causal-tf32": {"dtype": FP32, "headdim": 512, "causal": True, "allow_tf32": True},
    "bf16-64-packed": {"dtype": BF16, "headdim": 64, "packed": True, "seqlen": 16384},
    "bf16-128-causal-packed-used": {
        "dtype": BF16,
        "headdim": 128,
        "causal": True,
        "packed": True,
        "seqused": True,
        "nheads_k": 2,
        "seqlen": 16384,
    },
    "fp16-256-packed-used": {"dtype": FP16, "headdim": 256, "packed": True, "seqused": True},
    "fp32-64-causal-packed-dlse": {
        "dtype": FP32,
        "headdim": 64,
        "causal": True,
        "packed": True,
        "dlse": True,
    },
}


ONE_OF_A_KIND = ("sm_80", "sm_90", "gfx942")
# LLVM takes 45 s for float32 without matrix cores at head dimension 512.
SLOW = {("gfx1100", "fp32-512"), ("gfx1100", "fp32-512-causal-tf32")}
# Compiled by the same ways as sm_80 and gfx942, with other tiles.
LIKE_OTHERS = ("sm_86", "sm_89", "sm_120", "gfx90a")
LARGEST = ("bf16-256-causal-long", "fp32-128-tf32")


# Bytes a thread that measurably fastest tiles spill (docs/perf-log.md).
SPILLS = {
    ("v1", "dkdv_kernel", TileConfig(64, 64, 4, 2)): 480,
    ("v1_paper", "dkdv_kernel", TileConfig(64, 64, 4, 2)): 480,
    ("v1_paper", "paper_forward_kernel", TileConfig(64, 128, 8, 1)): 160,
    ("v2_atomic", "backward_kernel", TileConfig(128, 64, 4, 2)): 32,
    ("v2_atomic", "backward_kernel", TileConfig(64, 128, 8, 2)): 104,
    ("v2", "dkdv_kernel", TileConfig(64, 32, 8, 1)): 16,
    # Float32 without tensor cores at head dimension 512, whatever the tile.
    ("v2", "dkdv_kernel", TileConfig(16, 16, 8, 1)): 2400,
    ("v2", "dq_kernel", TileConfig(16, 16, 8, 1)): 2400,
}


@pytest.fixture(scope="module")
def compile_for(compiling):
    return partial(compiling, aot.compile_call)


def _unsupported(implementation: str, target: str, call: dict) -> str | None:
    if call.get("packed") and "varlen" not in registry.get(implementation).features:
        return f"{implementation} has no packed sequences"
    keys = ("dtype", "headdim", "headdim_v", "causal", "allow_tf32")
    case = Case(**{key: call[key] for key in keys if key in call})
    return registry.get(implementation).supports(case.spec(), aot.TARGETS[target][1])


def _of_like_targets() -> list:
    """(target, call): all on sm_90, whose spills are looked at; on others the largest calls, and
    some of the rest, others on each."""
    pairs = []
    for target in aot.TARGETS:
        for call in CALLS:
            marks = []
            if (target, call) in SLOW:
                marks.append(pytest.mark.slow)
            elif target != "sm_90" and call not in LARGEST:
                marks.append(pytest.mark.sampled(5 if target in LIKE_OTHERS else 3))
            pairs.append(pytest.param(target, call, marks=marks))
    return pairs


@every_triton_row
@pytest.mark.parametrize(("target", "call"), _of_like_targets())
def test_compiles(implementation, call, target, compile_for):
    reason = _unsupported(implementation, target, CALLS[call])
    if reason is not None:
        pytest.skip(reason)
    if not registry.get(implementation).auto and target != "sm_90" and call not in LARGEST:
        # Its kernels differ from v2's in the algorithm, not by target.
        pytest.skip("v2 is compiled for this target, and this row where it needs most memory")
    kernels = compile_for(target, implementation=implementation, **CALLS[call])
    assert kernels
    limit = aot.TARGETS[target][2]
    for kernel in kernels:
        assert kernel.shared <= limit, (
            f"{kernel.name} with {kernel.config} needs {kernel.shared} bytes of shared memory, "
            f"{target} has {limit}"
        )
        assert not kernel.overwritten, (kernel.name, kernel.config, kernel.overwritten)
        if target == "sm_90":
            assert kernel.spills <= SPILLS.get((implementation, kernel.name, kernel.config), 0), (
                f"{kernel.name} with {kernel.config} spills {kernel.spills} bytes a thread "
                f"({kernel.registers} registers)"
            )


FEATURED_CALLS = {
    "bf16-128-causal-long": {"dtype": BF16, "headdim": 128, "causal": True, "seqlen": 16384},
    "bf16-128-long": {"dtype": BF16, "headdim": 128, "seqlen": 16384},
    "bf16-512-causal": {"dtype": BF16, "headdim": 512, "causal": True},
    "bf16-64-causal-long": {"dtype": BF16, "headdim": 64, "causal": True, "seqlen": 16384},
    "fp32-64": {"dtype": FP32, "headdim": 64},
}
COMPILED_FEATURES = (
    "both", "softcap", "alibi", "documents", "blocks", "learned bias", "sinks", "bias",
    "bias of keys", "dropout",
)  # fmt: skip
# These are faster with tiles that spill (docs/perf-log.md), or little at 512 wide; bytes a thread.
FEATURED_SPILLS = {
    ("alibi", "dkdv_kernel", TileConfig(64, 64, 4, 2)): 56,
    ("alibi", "dkdv_kernel", TileConfig(32, 32, 8, 2)): 8,
    ("both", "dkdv_kernel", TileConfig(32, 32, 8, 2)): 8,
    ("softcap", "dkdv_kernel", TileConfig(32, 32, 8, 2)): 8,
    ("bias", "dkdv_kernel", TileConfig(32, 32, 8, 2)): 8,
    ("bias of keys", "dkdv_kernel", TileConfig(32, 32, 8, 2)): 8,
    ("dropout", "dkdv_kernel", TileConfig(32, 32, 8, 2)): 16,
    ("learned bias", "dkdv_kernel", TileConfig(32, 32, 8, 2)): 16,
    ("documents", "dkdv_kernel", TileConfig(64, 64, 4, 2)): 40,
    ("blocks", "dkdv_kernel", TileConfig(64, 64, 4, 2)): 24,
    ("learned bias", "dkdv_kernel", TileConfig(64, 64, 4, 2)): 8,
    ("bias", "dkdv_kernel", TileConfig(64, 64, 4, 2)): 32,
}


@pytest.mark.sampled(len(FEATURED_CALLS))
@pytest.mark.parametrize("call", FEATURED_CALLS)
@pytest.mark.parametrize("feature", COMPILED_FEATURES)
@pytest.mark.parametrize("target", ONE_OF_A_KIND)
def test_features_compile(feature, call, target, compile_for):
    limit = aot.TARGETS[target][2]
    for kernel in compile_for(target, feature=feature, **FEATURED_CALLS[call]):
        assert kernel.shared <= limit, (kernel.name, kernel.config)
        assert not kernel.overwritten, (kernel.name, kernel.config, kernel.overwritten)
        if target == "sm_90":
            allowed = FEATURED_SPILLS.get((feature, kernel.name, kernel.config), 0)
            assert kernel.spills <= allowed, (kernel.name, kernel.config, kernel.spills)


@pytest.mark.parametrize(
    ("buffers", "pending", "hazard"), [(1, 1, True), (1, 0, False), (2, 1, False)]
)
def test_overwritten_tiles_are_seen(buffers, pending, hazard):
    """The trap itself: a product of a step may run on only if the next tile has its own buffer."""
    ttgir = f"""
    %ring = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x32x128xbf16, #shared1, #smem, mutable>
    %to = ttg.memdesc_index %ring[%c0] : !ttg.memdesc<{buffers}x32x128xbf16> -> memdesc
    %acc:2 = scf.for %i = %c0 to %n step %c1 iter_args(%arg = %zero) -> (tensor<64x128xf32>) {{
      %tile = ttg.memdesc_index %ring[%slot] : !ttg.memdesc<{buffers}x32x128xbf16> -> memdesc
      %half = ttg.memdesc_subslice %tile[0, 0] : memdesc
      %dot = ttng.warp_group_dot %p, %half, %arg {{isAsync = true}} : tensor * memdesc
      %done:2 = ttng.warp_group_dot_wait %dot, %half {{pendings = {pending} : i32}} : tensor
      %copy = ttg.async_copy_global_to_local %ptrs, %to mask %m : tensor -> memdesc
      scf.yield %done#0 : tensor
    }}
"""
    assert bool(aot.overwritten_too_early(ttgir, num_stages=2)) == hazard


@every_triton_row
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_is_computed_in_float32(implementation, target, compile_for):
    """tf32 is in the instructions if and only if it was asked for (SEEDS 1.9)."""
    for allow_tf32 in (False, True):
        call = {"dtype": FP32, "headdim": 64, "allow_tf32": allow_tf32}
        if _unsupported(implementation, target, call) is not None:
            continue
        kernels = compile_for(target, implementation=implementation, with_ptx=True, **call)
        used = any("tf32" in kernel.asm["ptx"] for kernel in kernels)
        assert used == allow_tf32


@every_triton_row
def test_half_precision_uses_tensor_cores(implementation, compile_for):
    """Of Hopper wgmma, not the mma of Ampere at half the rate; and TMA for long sequences."""
    call = {"dtype": BF16, "headdim": 128, "causal": True, "seqlen": 16384}
    if _unsupported(implementation, "sm_90", call) is not None:
        pytest.skip("no Hopper")
    kernels = compile_for("sm_90", implementation=implementation, with_ptx=True, **call)
    products = [k for k in kernels if "mma" in k.asm["ptx"]]
    assert len(products) >= 1
    for kernel in products:
        assert "wgmma.mma_async" in kernel.asm["ptx"], kernel.name
