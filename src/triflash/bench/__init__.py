"""Benchmarks: one harness for every implementation and its peers, and reports made from its JSON.

    from triflash import bench

    records = bench.run("latency", contestants=["v2", "sdpa_flash"])

`triflash bench` is the same from a shell. docs/benchmarks.md says how things are measured and what
a record's fields mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triflash.bench.cases import PRESETS
    from triflash.bench.contestants import CONTESTANTS
    from triflash.bench.runner import run

__all__ = ["CONTESTANTS", "PRESETS", "run"]

_MODULES = {"CONTESTANTS": "contestants", "PRESETS": "cases", "run": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'triflash.bench' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"triflash.bench.{_MODULES[name]}"), name)
