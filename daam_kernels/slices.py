"""Tensors seen as [outer, R, inner]: slices run along R. What the Triton kernels and the native library need alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class SliceView:
    """Sizes of [outer, R, inner], and for each tensor its three strides in elements.

    ``packed``: outer counts sequences that lie one after another along R, and length is the most that one may have.
    """

    outer: int
    length: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]
    packed: bool = False


@lru_cache(maxsize=4096)
def slice_view(
    shape: tuple[int, ...], axis: int, dense: tuple[int, ...], *others: tuple[int, ...], in_order: bool = False
) -> SliceView | None:
    """[outer, R, inner] of a dense layout, and the strides that the other layouts have in it.

    ``dense`` holds the strides of a dense tensor of ``shape``, whose order of memory decides which axes are outer and
    which inner: those before and after ``axis``, or, where another layout has no strides for that, any split of them.
    None where there is no such split: then a tensor must be copied first. With ``in_order`` outer is the axes before
    ``axis`` and inner those behind it, in the order of the shape, and nothing else will do.
    """
    order = [d for d in range(len(shape)) if shape[d] > 1 and d != axis]
    usual = sum(d < axis for d in order)
    if not in_order:
        order.sort(key=lambda d: -dense[d])
        usual = sum(dense[d] > dense[axis] for d in order)
    splits = [usual] if in_order else sorted(range(len(order) + 1), key=lambda split: abs(split - usual))
    for split in splits:
        outer, inner = order[:split], order[split:]
        merged = [(_merge(shape, layout, outer), _merge(shape, layout, inner)) for layout in (dense, *others)]
        if all(None not in pair for pair in merged):
            strides = tuple((o, layout[axis], i) for (o, i), layout in zip(merged, (dense, *others)))
            return SliceView(prod(shape[d] for d in outer), shape[axis], prod(shape[d] for d in inner), strides)
    return None


def packed_view(num_sequences: int, max_seqlen: int, features: int, *layouts: tuple[int, int]) -> SliceView:
    """Sequences packed along the first axis of tensors [total, features] that have these strides."""
    strides = tuple((0, row, feature) for row, feature in layouts)
    return SliceView(num_sequences, max_seqlen, features, strides, packed=True)


def with_views(out: Tensor, axis: int, *tensors: Tensor, in_order: bool = False) -> tuple[Tensor, ...]:
    """``tensors``, of the shape of ``out``, which is dense; each copied only where it has no [outer, R, inner] strides
    beside those before it. ``in_order``: as for ``slice_view``."""
    viewed: list[Tensor] = []
    layouts = [out.stride()]
    for t in tensors:
        if slice_view(out.shape, axis, *layouts, t.stride(), in_order=in_order) is None:
            t = torch.empty_like(out, dtype=t.dtype).copy_(t)
        viewed.append(t)
        layouts.append(t.stride())
    return tuple(viewed)


def _merge(shape: tuple[int, ...], strides: tuple[int, ...], dims: list[int]) -> int | None:
    """The one stride of ``dims`` taken as a single axis, 0 for none of them; None where they do not merge."""
    for d, following in zip(dims, dims[1:]):
        if strides[d] != strides[following] * shape[following]:
            return None
    return strides[dims[-1]] if dims else 0
