"""How the kernels of additive attention cut their queries, keys and values: plain numbers, no kernel."""

from __future__ import annotations

from dataclasses import dataclass

from .tiling import power_of_two

_PROGRAMS = 528  # four for each of an H200's 132 processors
_MOST_SPLITS = 128
_MOST_VALUES = {4: 512, 8: 128}  # that a program sums up at a time, by the size of the arithmetic type
_DECODED = 2048  # elements of a tile of one query


@dataclass(frozen=True)
class AdditiveTile:
    """Queries, keys, hidden units and values of a tile, and over how many programs the keys of a query are split."""

    block_q: int
    block_k: int
    block_c: int
    block_v: int
    num_warps: int
    num_splits: int = 1
    keys_per_split: int = 0


def forward_tile(slices: int, queries: int, keys: int, value_dim: int, itemsize: int) -> AdditiveTile:
    """Of the forward; ``itemsize`` is that of the arithmetic type, ``slices`` batch times heads."""
    block_v = max(16, min(power_of_two(value_dim), _MOST_VALUES[itemsize]))
    if queries == 1:
        block_k = max(16, min(64, 8192 * 4 // itemsize // block_v))
        block_q, block_c, warps = 1, max(8, _DECODED // block_k), 8 if block_v > 128 else 4
    else:
        block_q = 16 if queries <= 16 or itemsize == 8 or block_v > 64 else 32
        block_k = 16 if itemsize == 8 or block_v > 128 else 32
        block_c, warps = (4, 4) if itemsize == 8 else (8, 8 if block_v > 128 else 4)
    programs = slices * -(-queries // block_q) * -(-value_dim // block_v)
    blocks = -(-keys // block_k)
    splits = max(1, min(blocks, _MOST_SPLITS, _PROGRAMS // max(1, programs)))
    per_split = -(-blocks // splits) * block_k
    return AdditiveTile(block_q, block_k, block_c, block_v, warps, -(-keys // per_split), per_split)


def backward_tile(queries: int, itemsize: int) -> AdditiveTile:
    """Of the backward, for both sides, and of the weights."""
    block = 16 if itemsize == 8 else 32
    if queries == 1:
        return AdditiveTile(1, 64, 32 if itemsize == 4 else 16, 16, 4)
    return AdditiveTile(16 if queries <= 16 else block, block, 4 if itemsize == 8 else 8, 16, 4)
