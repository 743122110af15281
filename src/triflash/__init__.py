"""triflash: FlashAttention in pure Python. See `attention` and `flash_attn_func`."""

from triflash.interface import attention, flash_attn_func
from triflash.registry import implementations

__version__ = "0.1.0"
__all__ = ["attention", "flash_attn_func", "implementations"]
