"""Every tile configuration that ships, for every GPU, run alone where we are.

In the interpreter this shows that the loops, masks and stores of a configuration are right; what
the compiler makes of it is test_compile.py's matter, and on a GPU it is compiled here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import aot
import pytest
import torch
from helpers import GPU, KERNEL_DTYPES, check, every_kernel_row, tuning_functions

from triflash import tuning
from triflash.testing import Case

V2 = ("v2_forward", "v2_delta", "v2_dkdv", "v2_dq")


def _configurations() -> dict[tuple[object, ...], tuple[str, bool, Case]]:
    """Distinct sets of configurations, each with one way to get it."""
    found: dict[tuple[object, ...], tuple[str, bool, Case]] = {}
    for name, (_, target, _) in aot.TARGETS.items():
        for dtype in KERNEL_DTYPES:
            for headdim in (64, 128, 256, 512):
                for use_tma in (False, True) if target.sm in (90, 100, 120) else (False,):
                    case = Case(headdim=headdim, dtype=dtype, causal=True)
                    configs = [
                        function(*(case.spec(), target, use_tma)[: _arity(function)])
                        for function in _functions_for(headdim)
                    ]
                    # The interpreter sees neither warps nor stages.
                    key = (headdim, use_tma, dtype if GPU else None)
                    key += tuple(c if GPU else (c.block_m, c.block_n) for c in configs)
                    found.setdefault(key, (name, use_tma, case))
    return found


def _functions_for(headdim: int) -> list[Callable[..., tuning.TileConfig]]:
    """Above 256 there are only v2's tiles."""
    named = tuning_functions().items()
    return [f for name, f in named if headdim <= 256 or name in V2]


def _arity(function) -> int:
    return len(inspect.signature(function).parameters)


@every_kernel_row
@pytest.mark.parametrize(
    ("target", "use_tma", "case"),
    _configurations().values(),
    ids=lambda x: str(x).replace(" ", "-"),
)
def test_configuration(implementation, target, use_tma, case, device, tuned):
    tuned.of_target(aot.TARGETS[target][1])
    tuned.use_tma(use_tma)
    n = 1000 if GPU else 130
    sizes = {"batch": 1, "seqlen_q": n, "seqlen_k": n + 47, "nheads_k": 1}
    case = replace(case, **sizes, nheads=2 if GPU else 1)
    try:
        check(case, implementation, device)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            pytest.skip(f"not for this GPU: {error}")
        raise


def test_tuning_is_defined_for_all(device):
    """Every function, target and case gives a configuration that tl.dot can take."""
    for _, target, _ in aot.TARGETS.values():
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for headdim in (*range(1, 257), *range(257, 513, 15)):
                spec = Case(headdim=headdim, dtype=dtype).spec()
                for function in _functions_for(headdim):
                    for use_tma in (False, True):
                        config = function(*(spec, target, use_tma)[: _arity(function)])
                        for block in (config.block_m, config.block_n):
                            assert block & (block - 1) == 0
                        assert config.num_warps in (1, 2, 4, 8, 16)
                        assert config.num_stages >= 1
