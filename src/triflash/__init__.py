"""triflash: FlashAttention in pure Python. See `attention` and `flash_attn_func`.

Names are imported on first use, so that `triflash --help` need not wait for torch. To load an
exported program without using them, `import triflash.ops`, which registers the operators.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triflash import mods, nn
    from triflash.block_mask import create_block_mask
    from triflash.interface import attention, flash_attn_func
    from triflash.mods import BlockMask
    from triflash.packed import (
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from triflash.padding import index_first_axis, pad_input, unpad_input
    from triflash.registry import implementations

__version__ = "0.1.0"
__all__ = [
    "BlockMask",
    "attention",
    "create_block_mask",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "implementations",
    "index_first_axis",
    "mods",
    "nn",
    "pad_input",
    "unpad_input",
]

_MODULES = {
    "BlockMask": "triflash.mods",
    "attention": "triflash.interface",
    "create_block_mask": "triflash.block_mask",
    "flash_attn_func": "triflash.interface",
    "flash_attn_kvpacked_func": "triflash.packed",
    "flash_attn_qkvpacked_func": "triflash.packed",
    "flash_attn_varlen_func": "triflash.packed",
    "flash_attn_varlen_kvpacked_func": "triflash.packed",
    "flash_attn_varlen_qkvpacked_func": "triflash.packed",
    "implementations": "triflash.registry",
    "index_first_axis": "triflash.padding",
    "pad_input": "triflash.padding",
    "unpad_input": "triflash.padding",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name in ("mods", "nn"):
        value = importlib.import_module(f"triflash.{name}")
    else:
        raise AttributeError(f"module 'triflash' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
