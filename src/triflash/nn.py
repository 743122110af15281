"""Modules on top of `triflash.attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triflash import ops
from triflash.interface import attention
from triflash.spec import check_flag, check_int, check_tensors


class MultiHeadAttention(nn.Module):
    """Multi-head attention (arXiv:1706.03762, section 3.2.2) through `triflash.attention`.

    Self- or cross-attention, with grouped key/value heads (GQA, arXiv:2305.13245) when nheads_k <
    nheads. Parameters have the names and the packing of `torch.nn.MultiheadAttention`
    (in_proj_weight, or q/k/v_proj_weight when kdim or vdim differ from embed_dim, in_proj_bias,
    out_proj), so its state dict loads as it is; `from_torch` copies a whole module.

    Unlike torch's: batch first only, no dropout, no masks but causal, and the output alone is
    returned, since attention weights never exist in memory.

    Args:
        embed_dim: size of the query and of the output; nheads must divide it.
        nheads: query heads, each of embed_dim // nheads dimensions.
        nheads_k: key/value heads, which must divide nheads; nheads by default.
        kdim: size of the key, embed_dim by default.
        vdim: size of the value, embed_dim by default.
        bias: biases on all four projections.
        causal: as in `attention`: aligned to the bottom right when the lengths differ.
        softmax_scale: as in `attention`: headdim ** -0.5 by default.
        implementation: as in `attention`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: sizes that are no ints, flags that are no bools.
        ValueError: sizes that are not positive or do not divide each other.
    """

    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        nheads: int,
        nheads_k: int | None = None,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        softmax_scale: float | None = None,
        implementation: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        nheads_k = nheads if nheads_k is None else nheads_k
        kdim = embed_dim if kdim is None else kdim
        vdim = embed_dim if vdim is None else vdim
        sizes = {
            "embed_dim": embed_dim,
            "nheads": nheads,
            "nheads_k": nheads_k,
            "kdim": kdim,
            "vdim": vdim,
        }
        for name, size in sizes.items():
            check_int(name, size, 1)
        if embed_dim % nheads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of nheads ({nheads})")
        if nheads % nheads_k:
            raise ValueError(f"nheads ({nheads}) must be a multiple of nheads_k ({nheads_k})")
        check_flag("bias", bias)
        check_flag("causal", causal)
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        self.nheads, self.nheads_k, self.headdim = nheads, nheads_k, embed_dim // nheads
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.implementation = implementation

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        rows_q, rows_k, rows_v = self._rows
        self.packed = kdim == vdim == embed_dim
        if self.packed:
            self.in_proj_weight = empty(rows_q + rows_k + rows_v, embed_dim)
        else:
            self.q_proj_weight = empty(rows_q, embed_dim)
            self.k_proj_weight = empty(rows_k, kdim)
            self.v_proj_weight = empty(rows_v, vdim)
        in_proj_bias = empty(rows_q + rows_k + rows_v) if bias else None
        self.register_parameter("in_proj_bias", in_proj_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def _rows(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections, in their packed order."""
        rows_k = self.nheads_k * self.headdim
        return self.embed_dim, rows_k, rows_k

    def reset_parameters(self) -> None:
        """Draw the parameters as torch.nn.MultiheadAttention does."""
        for name, parameter in self.named_parameters(recurse=False):
            if name != "in_proj_bias":
                nn.init.xavier_uniform_(parameter)
        self.out_proj.reset_parameters()
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Attend from query to key and value.

        Args:
            query: `(batch, seqlen_q, embed_dim)`, floating point, in the parameters' dtype unless
                autocast is on.
            key: `(batch, seqlen_k, kdim)`; the query itself by default (self-attention).
            value: `(batch, seqlen_k, vdim)`; the key by default.

        Returns:
            `(batch, seqlen_q, embed_dim)`.

        Raises:
            ValueError: a rank or a size that does not fit, or another device than the parameters';
                the message names the argument.
            TypeError: not a tensor, or not of the parameters' dtype without autocast.
            NotImplementedError: as in `attention`.
        """
        if key is None and value is not None:
            raise ValueError("value needs key: give both, key alone, or neither")
        key = query if key is None else key
        value = key if value is None else value
        weight = self.in_proj_weight if self.packed else self.q_proj_weight
        for name, tensor, size, meaning in (
            ("query", query, self.embed_dim, "embed_dim"),
            ("key", key, self.kdim, "kdim"),
            ("value", value, self.vdim, "vdim"),
        ):
            check_tensors(**{name: tensor})
            if tensor.dim() != 3 or tensor.shape[-1] != size:
                raise ValueError(
                    f"{name} must have shape (batch, seqlen, {meaning}={size}), "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.device != weight.device:
                raise ValueError(
                    f"{name} must be on the parameters' device {weight.device}, got {tensor.device}"
                )
            if tensor.dtype != weight.dtype and not ops.autocast_enabled(weight.device.type):
                raise TypeError(
                    f"{name} must have the parameters' dtype {weight.dtype}, got {tensor.dtype}"
                )
        q, k, v = (
            projection.unflatten(-1, (-1, self.headdim))
            for projection in self._project(query, key, value)
        )
        return self.out_proj(self.attend(q, k, v).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention between the projections; override it to put another in its place.

        Args:
            q: `(batch, seqlen_q, nheads, headdim)`.
            k, v: `(batch, seqlen_k, nheads_k, headdim)`.

        Returns:
            `(batch, seqlen_q, nheads, headdim)`.
        """
        out = attention(
            q,
            k,
            v,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            implementation=self.implementation,
        )
        assert isinstance(out, Tensor)  # for the type checker: a pair comes only with return_lse
        return out

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The three projections, in as few matrix products as the arguments allow."""
        rows = self._rows
        if self.packed and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).split(rows, dim=-1)
        if self.packed:
            weights = self.in_proj_weight.split(rows)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(rows)
        inputs = (query, key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    @classmethod
    def from_torch(
        cls,
        mha: nn.MultiheadAttention,
        *,
        causal: bool = False,
        implementation: str = "auto",
    ) -> MultiHeadAttention:
        """A module with copies of mha's parameters, on its device, in its dtype and mode.

        Args:
            mha: built with batch_first=True and without dropout, add_bias_kv and add_zero_attn.
            causal: stands for the attn_mask with is_causal that mha is called with.
            implementation: as in `attention`.

        Raises:
            TypeError: mha is not a torch.nn.MultiheadAttention.
            ValueError: mha does what this module cannot.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        if mha.bias_k is not None or mha.bias_v is not None:
            raise ValueError("mha has add_bias_kv=True; MultiHeadAttention appends no key or value")
        if mha.add_zero_attn:
            raise ValueError(
                "mha has add_zero_attn=True; MultiHeadAttention appends no key or value"
            )
        if mha.dropout:
            raise ValueError(
                f"mha has dropout={mha.dropout}; MultiHeadAttention has no dropout. Set "
                "mha.dropout = 0.0 first if it is only used in eval mode"
            )
        if not mha.batch_first:
            raise ValueError(
                "mha has batch_first=False; MultiHeadAttention takes (batch, seqlen, embed_dim). "
                "The weights do not depend on it: once the inputs are transposed, load "
                "mha.state_dict() into a MultiHeadAttention"
            )
        weight = mha.out_proj.weight
        module = cls(
            mha.embed_dim,
            mha.num_heads,
            kdim=mha.kdim,
            vdim=mha.vdim,
            bias=mha.in_proj_bias is not None,
            causal=causal,
            implementation=implementation,
            device=weight.device,
            dtype=weight.dtype,
        )
        module.load_state_dict(mha.state_dict())
        sources = dict(mha.named_parameters())
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(sources[name].requires_grad)
        return module.train(mha.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # As unexpected keys they would be dropped under strict=False, and the result be wrong.
        error_msgs: list[str] = kwargs.get("error_msgs", args[-1] if args else [])
        error_msgs.extend(
            f"{prefix}{name}: MultiHeadAttention appends no key or value (add_bias_kv=True)"
            for name in ("bias_k", "bias_v")
            if f"{prefix}{name}" in state_dict
        )

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, nheads={self.nheads}, nheads_k={self.nheads_k}, "
            f"kdim={self.kdim}, vdim={self.vdim}, bias={self.in_proj_bias is not None}, "
            f"causal={self.causal}, implementation={self.implementation!r}"
        )
