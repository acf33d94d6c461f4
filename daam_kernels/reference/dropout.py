"""Dropout that can be worked out anew: random numbers from a counter, the same on every backend.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox-4x32 with ten rounds, the
generator of CUDA and Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEYS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
RANDOM_BITS = 24  # of a random number that decide


def dropout_threshold(dropout_p: float) -> int:
    """An element is kept where the upper 24 bits of its random number are not below this."""
    return round(dropout_p * (1 << RANDOM_BITS))


def dropout_keep(seed: Tensor, slices: Tensor, rows: Tensor, columns: range, dropout_p: float) -> Tensor:
    """Which elements dropout keeps, boolean, of the shape of slices and rows, broadcast, with the columns behind.

    Depends on the seed and the element's place alone: its random number is word column % 4 of Philox with the counter
    (column // 4, row, slice, 0).

    Args:
        seed: int64, one element.
        slices, rows: int64, of shapes that broadcast.
        columns: consecutive.
        dropout_p: in [0, 1), the share that is not kept.
    """
    first, last = columns.start // 4, -(-columns.stop // 4)
    groups = torch.arange(first, last, device=seed.device)
    words = torch.stack(_philox(seed, groups, rows.unsqueeze(-1), slices.unsqueeze(-1)), -1).flatten(-2)
    words = words[..., columns.start - 4 * first : columns.stop - 4 * first]
    return words >> (32 - RANDOM_BITS) >= dropout_threshold(dropout_p)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 bits, each in an int64, whose product of two such words wraps around to the right bits."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = second >> 32 & _LOW ^ c1 ^ k0, first >> 32 & _LOW ^ c3 ^ k1
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = k0 + _KEYS[0] & _LOW, k1 + _KEYS[1] & _LOW
    return c0, c1, c2, c3
