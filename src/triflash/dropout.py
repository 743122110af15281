"""Dropout of attention weights: the seed of a call, and its random bits in PyTorch.

Whether a weight is dropped follows from a seed and its place (batch entry, head, query, key) alone,
by Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so
forward, backward and any tiling agree and nothing is kept but the seed. A call of Philox gives 128
bits, for 2 queries and 4 keys that are 8 apart 16 bits each: it is those of the places whose
queries agree in all bits but bit 3, and keys in all but bits 3 and 4. kernels/common/dropout.py has
the same for kernels.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

_STEPS = 65536  # of dropout_p, since 16 random bits decide
_ROUNDS = 7
_MASK = 0xFFFFFFFF


def checked(dropout_p: object) -> float:
    """dropout_p as it is used, the nearest multiple of 2^-16 that is less than 1.

    Raises:
        TypeError: dropout_p is no number.
        ValueError: it is not in [0, 1).
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    return min(round(dropout_p * _STEPS), _STEPS - 1) / _STEPS


def seed_for(q: object, dropout_p: float) -> Tensor | None:
    """A seed, int64 `(1,)`, from PyTorch's generator of q's device; None without dropout.

    Drawn on the device: nothing waits, and each replay of a CUDA graph has another.

    Raises:
        TypeError, ValueError: as `checked`; q is no tensor.
    """
    if checked(dropout_p) == 0.0:
        return None
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
    return torch.randint(2**63 - 1, (1,), device=q.device, dtype=torch.int64)


def kept(
    seed: Tensor, dropout_p: float, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
) -> Tensor:
    """bool: which weights stay. Of the int64 indices that broadcast; dropout_p as `checked`."""
    row = ((q_idx >> 4) << 3) | (q_idx & 7)
    column = ((kv_idx >> 5) << 3) | (kv_idx & 7)
    w0, w1, w2, w3 = _philox((column, row, h, b), (seed & _MASK, (seed >> 32) & _MASK))
    even = (kv_idx & 8) == 0
    word = torch.where(
        (kv_idx & 16) == 0, torch.where(even, w0, w1), torch.where(even, w2, w3)
    )  # fmt: skip
    half = torch.where((q_idx & 8) == 0, word & 0xFFFF, word >> 16)
    return half >= round(dropout_p * _STEPS)


def _philox(counters: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Words of 32 bits, in int64, whose products wrap around at 2^64 as they should."""
    (c0, c1, c2, c3), (k0, k1) = counters, key
    for _ in range(_ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
