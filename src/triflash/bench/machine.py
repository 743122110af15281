"""What the numbers were measured on: GPU, driver, versions, commit, clocks and power."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import triflash

# Dense tensor-core peaks of the data sheets in TFLOP/s (float32: outside tensor cores, but for
# AMD), and memory bandwidth in GB/s. NVIDIA's sheets print the tensor-core numbers with sparsity,
# twice as much. A GPU that is not here has no "% of peak", only that of the measured matmul.
_HOPPER_SXM = {"float16": 989.4, "bfloat16": 989.4, "tf32": 494.7, "float32": 67.0}
_AMPERE = {"float16": 312.0, "bfloat16": 312.0, "tf32": 156.0, "float32": 19.5}
PEAKS: dict[str, tuple[dict[str, float], float, str]] = {
    "NVIDIA H200": (_HOPPER_SXM, 4800.0, "NVIDIA H200 data sheet (SXM): 1,979 with sparsity"),
    "NVIDIA H100 80GB HBM3": (_HOPPER_SXM, 3350.0, "NVIDIA H100 data sheet (SXM)"),
    "NVIDIA A100-SXM4-80GB": (_AMPERE, 2039.0, "NVIDIA A100 data sheet (SXM, 80 GB)"),
    "NVIDIA A100-SXM4-40GB": (_AMPERE, 1555.0, "NVIDIA A100 data sheet (SXM, 40 GB)"),
    "NVIDIA A100-PCIE-40GB": (_AMPERE, 1555.0, "NVIDIA A100 data sheet (PCIe, 40 GB)"),
}


def peak_tflops(gpu: str, dtype: str) -> float | None:
    """The data sheet's dense peak for one of record.DTYPES, None if it is not known."""
    return PEAKS[gpu][0].get(dtype) if gpu in PEAKS else None


def peak_gbs(gpu: str) -> float | None:
    """The data sheet's memory bandwidth, GB/s."""
    return PEAKS[gpu][1] if gpu in PEAKS else None


def peak_source(gpu: str) -> str | None:
    return PEAKS[gpu][2] if gpu in PEAKS else None


def driver() -> str:
    """The GPU driver's version as its own tool tells it."""
    for command in (
        ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        ("rocm-smi", "--showdriverversion", "--csv"),
    ):
        if shutil.which(command[0]) is not None:
            result = subprocess.run(command, capture_output=True, text=True, timeout=30)
            if result.returncode == 0 and result.stdout.strip():
                return result.stdout.strip().splitlines()[-1].split(",")[-1].strip()
    return "unknown (no nvidia-smi or rocm-smi)"


def commit() -> str:
    """The commit of the sources that run, "+" behind it if they differ; "unknown" if installed."""
    folder = Path(triflash.__file__).parent
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str | None:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
        )
        return result.stdout.strip() if result.returncode == 0 else None

    # Installed into an environment inside some other project's repository is not our commit.
    if not git("ls-files", "__init__.py"):
        return "unknown"
    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return name + ("+" if git("status", "--porcelain", "--", ".") else "")


def facts(device: torch.device, commit_name: str | None) -> dict[str, Any]:
    """The fields of a record that are the same for a whole run."""
    known: dict[str, Any] = {
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "triton": _triton(),
        "triflash": triflash.__version__,
        "commit": commit_name or commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(device)
        known["driver"] = driver()
        known["power_limit_w"] = _number(_query(device, "power.limit"))
    else:
        known["gpu"] = f"none ({platform.machine()} CPU, Triton's interpreter)"
    return known


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def total_memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _smi(device: torch.device, fields: str) -> list[str] | None:
    """nvidia-smi's command line for this very device, whatever CUDA_VISIBLE_DEVICES says."""
    if shutil.which("nvidia-smi") is None or device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return None
    return [
        "nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits",
    ]  # fmt: skip


def _query(device: torch.device, fields: str) -> str:
    command = _smi(device, fields)
    if command is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return result.stdout.strip() if result.returncode == 0 else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Sampler:
    """Reads the SM clock and the power draw ten times a second while it is open.

    nvidia-smi does so in a process of its own, which leaves this one's Python alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._command = _smi(device, "timestamp,clocks.sm,power.draw")
        self._process: subprocess.Popen[str] | None = None
        self._samples: list[tuple[float, float | None, float | None]] = []

    def __enter__(self) -> Sampler:
        if self._command is not None:
            self._process = subprocess.Popen(
                [*self._command, "-lms", "100"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
            )  # fmt: skip
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            moment, _, values = line.partition(",")
            clock, _, power = values.partition(",")
            try:  # the pipe may lag behind
                when = datetime.strptime(moment.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp()
            except ValueError:
                when = time.time()
            self._samples.append((when, _number(clock), _number(power)))

    def since(self, start: float) -> tuple[float | None, float | None]:
        """Median SM clock in MHz and power in W since time.time() was `start`."""
        recent = [sample for sample in self._samples if sample[0] >= start]
        clocks = [clock for _, clock, _ in recent if clock is not None]
        powers = [power for _, _, power in recent if power is not None]
        return (
            statistics.median(clocks) if clocks else None,
            round(statistics.median(powers), 1) if powers else None,
        )
