"""Compile what `triflash bench variants` will run, in several processes, so that its time is not
compile time: Triton and Inductor find it in their caches then.

    python benchmarks/warm_variants.py [PROCESSES] [SECONDS] [SEQLEN]
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings

import torch

from triflash import testing
from triflash.bench import cases, contestants
from triflash.testing import Case


def jobs(seqlen: int | None) -> list[tuple[Case, str]]:
    """A case and a contestant; FlexAttention first, which takes longest."""
    preset = cases.PRESETS["variants"]
    cells = cases.matching(preset.cells(), seqlen_q=seqlen)
    found = [(cell.case, name) for cell in cells for name in preset.contestants()]
    return sorted(found, key=lambda job: job[1] != "flex")


def compile_one(case: Case, name: str) -> str | None:
    """Run the case forward and backward once; what went wrong, or None."""
    device = torch.device("cuda")
    contestant = contestants.get(name)
    if contestants.refusal(contestant, case, device) is not None:
        return None
    try:
        bound = contestant.bind(case, testing.make_inputs(case, device))
        with bound.context(), torch.no_grad():
            bound.call()
        if contestant.backward:
            with bound.context():
                bound.gradients(bound.call())
        torch.cuda.synchronize()
    except Exception as error:
        return f"{name}, {case}: {type(error).__name__}: {str(error)[:150]}"
    return None


def work(first: int, step: int, ends: float, seqlen: int | None) -> None:
    warnings.simplefilter("ignore")
    for case, name in jobs(seqlen)[first::step]:
        if time.time() > ends:
            print(f"process {first}: no time left for {name}, {case}", flush=True)
            return
        if wrong := compile_one(case, name):
            print(wrong, flush=True)


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    ends = time.time() + (float(sys.argv[2]) if len(sys.argv) > 2 else 600.0)
    seqlen = int(sys.argv[3]) if len(sys.argv) > 3 else None
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(i, processes, ends, seqlen)) for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
