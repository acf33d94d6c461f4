"""Density attention, forward and backward, a block of slices at a time.

Some twenty tensors of the block's size pass through a processor's cache, where such tensors of x's size would pass
through its memory, and each of them through fresh pages of it. The blocks do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .density_attention import density_attention, density_attention_backward

_BLOCK = 1 << 19  # elements of x

Cut = Callable[[Tensor], Tensor]  # the block's part of a tensor of x's shape


def forward(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, mask: Tensor | None, return_weights: bool, **options
) -> tuple[Tensor, Tensor | None]:
    """(y, weights or None) in the layouts of ``torch.empty_like(x)``; arguments as of ``density_attention``."""
    y, weights = torch.empty_like(x), torch.empty_like(x) if return_weights else None
    for cut in _cuts(x, options["norm_axis"], options["density"]):
        found = density_attention(
            cut(x), mean_offsets, c, mask=_cut_mask(cut, mask, x), return_weights=return_weights, **options
        )
        if return_weights:
            found, details = found
            cut(weights).copy_(details)
        cut(y).copy_(found)
    return y, weights


def backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    mask: Tensor | None,
    log_shares: Tensor | None,
    **options,
) -> tuple[Tensor, ...]:
    """As ``density_attention_backward``, dx in the layout of ``torch.empty_like(x)``; blocks add up in float64."""
    parameters = [t for t in (mean_offsets, c, log_shares) if t is not None]
    offsets, widths, *shares = (t.double() for t in parameters)
    dx, sums = torch.empty_like(x), None
    for cut in _cuts(x, options["norm_axis"], options["density"]):
        part, *found = density_attention_backward(
            cut(grad), cut(x), offsets, widths, mask=_cut_mask(cut, mask, x), log_shares=shares[0] if shares else None,
            **options,
        )  # fmt: skip
        cut(dx).copy_(part)
        sums = found if sums is None else [total + one for total, one in zip(sums, found)]
    return dx, *(total.to(t.dtype) for total, t in zip(sums, parameters))


def _cuts(x: Tensor, norm_axis: int, density: str) -> list[Cut]:
    """The blocks, along an axis whose slices know nothing of each other; of tensors off the CPU there is one."""
    wanted = -(-x.numel() // _BLOCK) if x.is_cpu else 1
    last = norm_axis if density == "gaussian" else x.dim()  # whose parameters lie along the axes behind it
    axes = [axis for axis in range(last) if axis != norm_axis]
    if wanted <= 1 or not axes:
        return [lambda t: t]
    axis = next((axis for axis in axes if x.shape[axis] >= wanted), max(axes, key=lambda axis: x.shape[axis]))
    size = x.shape[axis]
    step = -(-size // min(wanted, size))
    return [lambda t, at=at: t.narrow(axis, at, min(step, size - at)) for at in range(0, size, step)]


def _cut_mask(cut: Cut, mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else cut(mask.expand_as(x))
