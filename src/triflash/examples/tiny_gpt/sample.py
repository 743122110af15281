"""Text from a trained model."""

from __future__ import annotations

import torch

from triflash.examples.tiny_gpt.loop import autocast
from triflash.examples.tiny_gpt.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: bytes,
    length: int,
    *,
    seed: int,
    dtype: torch.dtype,
    temperature: float = 0.8,
) -> bytes:
    """`prompt` continued by `length` bytes, each drawn from softmax(logits / temperature).

    The model sees the last seq_len bytes of what is there. Nothing is cached: every byte runs the
    whole window through the model's attention again.

    Raises:
        ValueError: prompt is empty.
    """
    if not prompt:
        raise ValueError("prompt must have at least one byte, got b''")
    device = model.tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    model.eval()
    for _ in range(length):
        window = torch.tensor([tokens[-model.config.seq_len :]], device=device)
        with autocast(device, dtype):
            logits = model(window)[0, -1]
        probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(tokens)
