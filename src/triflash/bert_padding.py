"""`triflash.padding` where flash-attn has it, for `from flash_attn.bert_padding import ...`."""

from triflash.padding import index_first_axis, index_put_first_axis, pad_input, unpad_input

__all__ = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]
