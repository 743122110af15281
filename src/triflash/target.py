"""The only reader of environment and device: what a call runs on."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Target:
    """Where kernels run.

    Attributes:
        kind: "cuda", "hip", "cpu", or another torch device type.
        arch: "sm_90", "gfx942", or "" off the GPU.
        num_sms: multiprocessors (compute units on AMD), 0 off the GPU.
        interpreter: Triton's interpreter runs the kernels, on any device.
        has_triton: the triton package is installed.
    """

    kind: str
    arch: str = ""
    num_sms: int = 0
    interpreter: bool = False
    has_triton: bool = True

    @property
    def sm(self) -> int:
        """CUDA compute capability as one number (90 for sm_90), 0 elsewhere."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    @property
    def runs_kernels(self) -> bool:
        return self.has_triton and (self.interpreter or self.kind in ("cuda", "hip"))


# Triton reads the variable when a kernel is defined, so its value at import is the one that counts.
_INTERPRETER = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=256)
def target_of(device: torch.device) -> Target:
    """The target that tensors on `device` run on."""
    if device.type != "cuda":
        return Target(device.type, interpreter=_INTERPRETER, has_triton=_HAS_TRITON)
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = (
        properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    )
    return Target(
        kind="hip" if hip else "cuda",
        arch=arch,
        num_sms=properties.multi_processor_count,
        interpreter=_INTERPRETER,
        has_triton=_HAS_TRITON,
    )


def user_cache_dir() -> Path:
    """Where triflash keeps files between runs: $XDG_CACHE_HOME/triflash, or ~/.cache/triflash."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triflash"
