"""Counters on the device, from which the programs of a launch draw their tiles."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from triton.runtime import driver


def counter_for(device: torch.device) -> torch.Tensor:
    """The counter that programs draw their tiles from: 0 before and after every launch.

    Launches that may run at the same time need one each, so there is one a stream, and a new one in
    every CUDA graph, which may be replayed beside anything.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        counter = counter_of_stream(device, stream)
        if counter is not None:
            return counter
    return torch.zeros(32, dtype=torch.int32, device=device)[:1]


@cache
def counter_of_stream(device: torch.device, stream: int) -> torch.Tensor | None:
    """One that no other stream has, as long as there are any."""
    counters = counters_of(device)
    return counters.pop() if counters else None


@cache
def counters_of(device: torch.device) -> list[torch.Tensor]:
    """Counters in cache lines of their own.

    torch.compile warms its CUDA graphs up with all that the thread allocates in their pool, where
    nothing may stay behind. So this is allocated by another thread, on its own stream.
    """

    def allocate() -> list[torch.Tensor]:
        with torch.cuda.device(device):
            counters = torch.zeros(256, 32, dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()
        return [row[:1] for row in counters]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(allocate).result()
