"""A small pre-norm GPT over bytes, whose attention is a choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triflash.nn import MultiHeadAttention

VOCABULARY = 256  # every byte is a token


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the network; its width is heads * head_dim.

    Attributes:
        layers: transformer blocks.
        heads: attention heads in each.
        head_dim: dimensions of a head.
        seq_len: longest input, in tokens.
    """

    layers: int
    heads: int
    head_dim: int
    seq_len: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class TorchAttention(MultiHeadAttention):
    """The same module with PyTorch's own attention between the same projections."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each on the normalised input and added to it."""

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        width = config.width
        self.norm_attention = nn.LayerNorm(width)
        if attention == "torch":
            self.attention: MultiHeadAttention = TorchAttention(
                width, config.heads, bias=False, causal=True
            )
        else:
            self.attention = MultiHeadAttention(
                width, config.heads, bias=False, causal=True, implementation=attention
            )
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and tied embeddings (GPT-2's shape).

    Args:
        config: sizes.
        attention: "torch" for F.scaled_dot_product_attention, or what `triflash.attention` takes as
            implementation.
    """

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(config.seq_len, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Weights that keep variances, smaller where a block adds to the residual stream."""
        std = self.config.width**-0.5
        residual = std * (2 * self.config.layers) ** -0.5
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, MultiHeadAttention):
            nn.init.normal_(module.in_proj_weight, std=std)
            nn.init.normal_(module.out_proj.weight, std=residual)
        elif isinstance(module, Block):
            nn.init.normal_(module.contract.weight, std=residual)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, seqlen, 256)` for the byte after each of tokens `(batch, seqlen)`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, nats a byte, of predicting tokens[:, 1:] from tokens[:, :-1]."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
