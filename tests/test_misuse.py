"""Every argument of every public function, replaced by what it cannot be: the error names it.

On a CPU by the reference, since all of it is told before a kernel is looked for.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_block_mask import BEFORE, before
from test_mods import relative, relative_derivative

import triflash
from triflash import bert_padding, mods
from triflash.nn import MultiHeadAttention


def _tensor(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16)


_CU_SEQLENS = torch.tensor([0, 3, 5], dtype=torch.int32)
_SEQUENCES = {
    "cu_seqlens_q": _CU_SEQLENS, "cu_seqlens_k": _CU_SEQLENS, "max_seqlen_q": 3, "max_seqlen_k": 3,
}  # fmt: skip
_QKV = {name: _tensor(2, 5, 4, 16) for name in "qkv"}
_PACKED = {name: _tensor(5, 4, 16) for name in "qkv"}
_FLASH = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
    "implementation": "reference",
}  # fmt: skip
_MODULE = MultiHeadAttention(8, 2, implementation="reference")
_HIDDEN, _MASK = torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
_ROWS, _INDICES = torch.ones(3, 4), torch.tensor([0, 1, 3])

# Each with all of its arguments.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (
        triflash.attention,
        {
            **_QKV, "causal": False, "softmax_scale": None, "window_size": None, "softcap": 0,
            "alibi_slopes": None, "score_mod": None, "mask_mod": None, "aux": (),
            "block_mask": None, "sinks": None, "bias": None, "dropout_p": 0.5,
            "dropout_seed": torch.tensor([1]),
            "return_lse": False, "deterministic": False, "allow_tf32": False,
            "implementation": "reference",
        },
    ),
    "flash_attn_func": (triflash.flash_attn_func, _QKV | _FLASH),
    "flash_attn_qkvpacked_func": (
        triflash.flash_attn_qkvpacked_func, {"qkv": _tensor(2, 5, 3, 4, 16), **_FLASH},
    ),
    "flash_attn_kvpacked_func": (
        triflash.flash_attn_kvpacked_func,
        {"q": _tensor(2, 5, 4, 16), "kv": _tensor(2, 5, 2, 4, 16), **_FLASH},
    ),
    "flash_attn_varlen_func": (
        triflash.flash_attn_varlen_func,
        {
            **_PACKED, **_SEQUENCES, **_FLASH, "block_table": None, "seqused_q": None,
            "seqused_k": None, "sinks": None,
        },
    ),
    "flash_attn_varlen_qkvpacked_func": (
        triflash.flash_attn_varlen_qkvpacked_func,
        {"qkv": _tensor(5, 3, 4, 16), "cu_seqlens": _CU_SEQLENS, "max_seqlen": 3, **_FLASH},
    ),
    "flash_attn_varlen_kvpacked_func": (
        triflash.flash_attn_varlen_kvpacked_func,
        {"q": _tensor(5, 4, 16), "kv": _tensor(5, 2, 4, 16), **_SEQUENCES, **_FLASH},
    ),
    "create_block_mask": (
        triflash.create_block_mask,
        {
            "mask_mod": BEFORE, "batch": None, "nheads": None, "seqlen_q": 5, "seqlen_k": 5,
            "causal": False, "window_size": None, "aux": (), "device": "cpu", "block_size": 64,
        },
    ),
    "unpad_input": (
        triflash.unpad_input,
        {"hidden_states": _HIDDEN, "attention_mask": _MASK, "unused_mask": None},
    ),
    "pad_input": (
        triflash.pad_input, {"hidden_states": _ROWS, "indices": _INDICES, "batch": 2, "seqlen": 3},
    ),
    "index_first_axis": (
        triflash.index_first_axis, {"input": _HIDDEN, "indices": torch.tensor([0, 1])},
    ),
    "index_put_first_axis": (
        bert_padding.index_put_first_axis,
        {"values": _ROWS, "indices": _INDICES, "first_axis_dim": 6},
    ),
    "MultiHeadAttention": (
        MultiHeadAttention,
        {
            "embed_dim": 8, "nheads": 2, "nheads_k": 2, "kdim": 8, "vdim": 8, "bias": True,
            "causal": False,
        },
    ),
    "MultiHeadAttention.forward": (
        _MODULE.forward, {name: torch.ones(2, 5, 8) for name in ("query", "key", "value")},
    ),
    "mods.score_mod": (
        mods.score_mod,
        {
            "function": relative, "derivative": relative_derivative, "gradient": None,
            "bound": None, "fused": None,
        },
    ),
    "mods.mask_mod": (mods.mask_mod, {"function": before}),
}  # fmt: skip
# Told by `attention` when it is called, by torch, or by nobody, as any function may be one.
LEFT_OUT = {
    "MultiHeadAttention": {"softmax_scale", "implementation", "device", "dtype"},
    "mods.score_mod": {"reference"},
    "mods.mask_mod": {"reference"},
}

WRONG = {
    "None": None,
    "a list": [1.0],
    "a number": 3.5,
    "a word": "x",
    "a flag": True,
    "NaN": math.nan,
    "a dict": {},
    "a function": len,
    "a scalar": torch.tensor(1.5),
    "a matrix": torch.ones(7, 7, requires_grad=True),
    "ints": torch.ones(7, dtype=torch.int64),
    "none": torch.ones(0, 0),
    "on another device": torch.ones(2, 5, 4, 16, device="meta"),
    "sparse": torch.ones(2, 5, 4, 16).to_sparse(),
}
# What may be given in place of what stands in CALLS: arguments, or one of a function.
ALLOWED = {
    "None": {
        "softmax_scale", "window_size", "alibi_slopes", "score_mod", "attention.mask_mod",
        "block_mask", "sinks", "attention.bias", "dropout_seed", "block_table", "seqused_q",
        "seqused_k", "unused_mask", "device", "derivative", "gradient", "bound", "fused",
        "value", "create_block_mask.batch", "create_block_mask.nheads", "nheads_k", "kdim", "vdim",
    },
    "a list": {"create_block_mask.aux"},
    "a number": {"softmax_scale", "softcap"},
    "a flag": {
        "causal", "deterministic", "allow_tf32", "return_lse", "return_attn_probs",
        "MultiHeadAttention.bias",
    },
    "a function": {"bound"},
    "a matrix": {"index_first_axis.input"},
    "ints": {"index_first_axis.indices"},
    "sparse": {"index_first_axis.input"},
}  # fmt: skip


def _arguments() -> list[Any]:
    return [
        pytest.param(name, argument, id=f"{name}-{argument}")
        for name, (_, arguments) in CALLS.items()
        for argument in arguments
    ]


def _allowed(call: str, argument: str, what: str) -> bool:
    return not {argument, f"{call}.{argument}"}.isdisjoint(ALLOWED.get(what, ()))


@pytest.mark.parametrize(("name", "argument"), _arguments())
def test_what_is_wrong_is_named(name, argument):
    call, arguments = CALLS[name]
    # Under autocast calls go through the operators, and tensors are cast before.
    for where, context in {
        "": nullcontext(), " under autocast": torch.autocast("cpu", torch.bfloat16)
    }.items():  # fmt: skip
        for what, wrong in WRONG.items():
            said, error = f"{name}({argument}={what}){where}", None
            with context:
                try:
                    call(**arguments | {argument: wrong})
                except Exception as raised:
                    error = raised
            if _allowed(name, argument, what):
                assert error is None, f"{said}: {error!r}"
                continue
            assert error is not None, f"{said} is taken"
            assert isinstance(error, TypeError | ValueError | NotImplementedError), (
                f"{said}: {error!r}"
            )
            # Of a modification it is called what it will be in a call.
            called = argument if argument != "function" else name.removeprefix("mods.")
            assert re.search(rf"\b{called}\b", str(error)), f"{said} is not named: {error!r}"


def test_every_public_function_is_here_with_all_arguments():
    public = {name for name in triflash.__all__ if inspect.isfunction(getattr(triflash, name))}
    assert public - {"implementations"} <= set(CALLS)
    for name, (call, arguments) in CALLS.items():
        assert {*arguments, *LEFT_OUT.get(name, ())} == {*inspect.signature(call).parameters}
        call(**arguments)
