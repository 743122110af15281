"""One training run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from triflash.examples.tiny_gpt.model import GPT, Block

_READ_EVERY = 20  # reading a loss waits for the GPU, so it is not done every step


@dataclass
class Run:
    """What a training run measured.

    Attributes:
        losses: nats a byte, one a step, before that step's update.
        gradients: those of the attention projections at the first step, before clipping, by
            layer and projection, as "2.q".
        held_out: nats a byte on the held-out text after the last step.
        seconds: training alone, without compiling and evaluation.
    """

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    held_out: float = math.nan
    seconds: float = math.nan


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Half precision where it is safe; parameters stay float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def train(
    model: GPT,
    batches: Iterable[Tensor],
    held_out: Iterable[Tensor],
    *,
    steps: int,
    learning_rate: float,
    dtype: torch.dtype,
    on_step: Callable[[int, float], None],
) -> Run:
    """Train model in place with AdamW, linear warm-up and cosine decay.

    Args:
        model: on the device of the batches.
        batches: int64 `(batch, seqlen + 1)`, at least `steps` of them.
        held_out: the batches to judge the result by.
        steps: updates.
        learning_rate: the highest, after the warm-up of a twentieth of the steps.
        dtype: of autocast; float32 is without.
        on_step: called with the number of steps done and the last loss read.
    """
    device = model.tokens.weight.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    run = Run()
    pending: list[Tensor] = []
    read_every = 1 if device.type == "cpu" else _READ_EVERY
    model.train()
    started = time.perf_counter()
    for step, tokens in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        with autocast(device, dtype):
            loss = model.loss(tokens)
        loss.backward()
        if step == 0:
            run.gradients = _attention_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pending.append(loss.detach())
        if len(pending) == read_every or step == steps - 1:
            run.losses += torch.stack(pending).tolist()
            pending.clear()
        on_step(step + 1, run.losses[-1] if run.losses else math.nan)
    run.seconds = time.perf_counter() - started
    run.held_out = evaluate(model, held_out, dtype)
    return run


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Tensor], dtype: torch.dtype) -> float:
    """Mean loss over equal batches, nats a byte."""
    model.eval()
    with autocast(model.tokens.weight.device, dtype):
        return torch.stack([model.loss(tokens) for tokens in batches]).mean().item()


def _attention_gradients(model: GPT) -> dict[str, Tensor]:
    gradients = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention = block.attention
        in_proj, out_proj = attention.in_proj_weight.grad, attention.out_proj.weight.grad
        assert in_proj is not None
        assert out_proj is not None
        for name, gradient in zip("qkvo", (*in_proj.chunk(3), out_proj), strict=True):
            gradients[f"{layer}.{name}"] = gradient.clone()
    return gradients


def _schedule(step: int, steps: int) -> float:
    """Up in a line over a twentieth of the steps, then down a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * progress)
