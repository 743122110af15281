"""v3 under load: random shapes, changing shapes and streams, and a watchdog for what hangs.

A warp that waits for a barrier in vain hangs the GPU and the process with it, so what could hang
runs in a process of its own, which is ended when its time is over.
"""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import check, multiprocessors

from triflash import registry
from triflash.target import target_of
from triflash.testing import Case

pytestmark = pytest.mark.gpu

LAUNCHES = """
import random
from dataclasses import replace
import torch
import triflash.kernels.v3.forward as forward
from triflash import attention
from triflash.testing import Case, check_case, make_inputs

draw = random.Random(SEED)
whole = forward.target_of(torch.device("cuda"))
few = replace(whole, num_sms=16)  # whose programs draw several tiles
pool = []
for headdim in (64, 128, 256, 96):
    for causal in (False, True):
        for seqlen_q, seqlen_k in ((1, 700), (777, 333), (1024, 1024)):
            case = Case(
                batch=draw.choice((1, 3)), nheads=4, nheads_k=draw.choice((1, 2, 4)),
                seqlen_q=seqlen_q, seqlen_k=seqlen_k, headdim=headdim, causal=causal,
                dtype=torch.bfloat16,
            )
            assert all(record.ok for record in check_case(case, "v3", "cuda")), case
            inputs = make_inputs(case, "cuda")
            call = lambda x=inputs, c=causal: attention(x.q, x.k, x.v, causal=c,
                                                        implementation="v3")
            pool.append((call, call()))
            forward.target_of = lambda device: few
            assert torch.equal(call(), pool[-1][1]), case
            forward.target_of = lambda device: whole
torch.cuda.synchronize()
streams = [torch.cuda.Stream() for _ in range(4)]
wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
torch.cuda.synchronize()
for _ in range(10_000):
    call, expected = draw.choice(pool)
    i = draw.randrange(len(streams))
    forward.target_of = lambda device, target=draw.choice((whole, few)): target
    with torch.cuda.stream(streams[i]):
        wrong[i] += (call() != expected).any()
torch.cuda.synchronize()
assert sum(int(n) for n in wrong) == 0, wrong
"""

HANG = """
import torch, triton, triton.language as tl

@triton.jit
def wait_in_vain(Flag):
    while tl.atomic_add(Flag, 0) == 0:
        pass

wait_in_vain[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
print("launched", flush=True)
torch.cuda.synchronize()
"""


def run_or_kill(code: str, folder: Path, seconds: float) -> None:
    """Fails with what it said last if it hangs or fails."""
    script = folder / "script.py"  # Triton reads the source of a kernel
    script.write_text(code)
    try:
        result = subprocess.run(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode()
        pytest.fail(f"killed after {seconds} s; it hangs. Its last words: {said[-2000:]}")
    assert result.returncode == 0, result.stdout[-3000:]


def skip_without_v3(device: torch.device) -> None:
    reason = registry.get("v3").supports(Case(dtype=torch.bfloat16).spec(), target_of(device))
    if reason is not None:
        pytest.skip(reason)


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    headdim, headdim_v = draw.choice(
        [(64, None), (128, None), (256, None), (96, None), (192, 128), (40, 72)]
    )
    nheads_k = draw.choice((1, 2, 3))
    lengths = [draw.choice((draw.randint(1, 70), draw.randint(1, 700))) for _ in range(2)]
    return Case(
        batch=draw.randint(1, 3), seqlen_q=lengths[0], seqlen_k=lengths[1],
        nheads=nheads_k * draw.choice((1, 2, 4)), nheads_k=nheads_k, headdim=headdim,
        headdim_v=headdim_v, causal=draw.random() < 0.5, with_dlse=draw.random() < 0.3,
        dtype=draw.choice((torch.float16, torch.bfloat16)), seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_random_shapes(first, device):
    skip_without_v3(device)
    for seed in range(first, first + 100):
        with multiprocessors(8) if seed % 2 else nullcontext():
            check(random_case(seed), "v3", device)


def test_ten_thousand_launches(device, tmp_path):
    """Shapes and streams change all the time; every result is bitwise what it was alone."""
    skip_without_v3(device)
    run_or_kill(LAUNCHES.replace("SEED", str(random.randrange(2**32))), tmp_path, seconds=300)


def test_a_hang_fails(device, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)it hangs.*launched"):
        run_or_kill(HANG, tmp_path, seconds=40)
