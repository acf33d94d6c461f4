"""One Gaussian per feature over an encoder's layers (arXiv 2401.11143, Algorithm 1), d = a - mean:

    w = exp(-(d - offset)^2 / (2 c (var + eps))),    var = E[(a - mean)^2] + 1e-8

a is x, or its mean over time; a slice is one feature over the layers of one head. The weights are not normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import valid_elements

_VAR_FLOOR = 1e-8  # the paper's code adds it to the variance, beside eps


def feature_density_attention(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    eps: float = 1e-5,
    residual: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weigh every feature of every layer by its density among the layers of its head.

    Arithmetic is in float32, or in float64 for float64 input; differentiable as often as one likes.

    Args:
        x: [batch, layers, features], or [batch, layers, time, features], where the density of the mean over time
            weighs every time step. The layers are cut into num_heads chunks, the last head takes the remainder too.
        mean_offsets: [num_heads, features], offsets from the slice's mean, in units of x.
        c: [num_heads, features], scales of the slice's variance. They are linear: a negative one grows with distance.
        padding_value, mask: elements equal to the one, or False in the other (broadcast to x), are padding.
        padding_stats: ``"zero"`` counts padding as zeros in all means, ``"exclude"`` leaves it out.
        eps: added to the variance.
        residual: add x to the result.
        return_weights: return (y, weights), the weights detached.

    Returns:
        y of x's shape and type, x * weights where valid, x where padded; weights of x's shape and type.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    valid = valid_elements(x, padding_value, mask)
    values = x.to(work)
    heads, layers = c.shape[0], x.shape[1]
    chunks = [layers // heads] * (heads - 1) + [layers - layers // heads * (heads - 1)]

    def cut(t: Tensor) -> tuple[Tensor, ...]:
        return (t if t.dim() == 4 else t.unsqueeze(2)).split(chunks, 1)

    parts_valid = [None] * heads if valid is None else cut(valid)
    densities = []
    for part, part_valid, offset, width in zip(cut(values), parts_valid, mean_offsets.to(work), c.to(work)):
        deviation, var = deviations(*_mean_over_time(part, part_valid, padding_stats), 1)
        z = (deviation - offset) * (var + _VAR_FLOOR + eps).rsqrt()
        # Not z^2 / c: where that overflows, the gradients would be 0 times infinity.
        densities.append(torch.exp(-0.5 * z * (z / width)))
    weights = torch.cat(densities, 1)
    weights = weights if x.dim() == 4 else weights.squeeze(2)

    if valid is None:
        y = values * weights
    else:
        # Excluded padding has no way into the gradients, not even a NaN there.
        y = torch.where(valid, torch.where(valid, values, 0) * weights, values)
    y = (y + values if residual else y).to(x.dtype)
    if not return_weights:
        return y
    weights = weights.detach()
    if valid is not None and padding_stats == "exclude":
        weights = torch.where(valid, weights, 0)
    return y, torch.empty_like(x).copy_(weights)


def deviations(seen: Tensor, counted: Tensor, counts: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
    """(seen - mean, biased variance) along ``axis``, the statistics being those of ``counted``.

    Both are less the same constant of the slice; ``counted`` is 0 where ``counts`` is False. None: all count.
    """
    total = counted.shape[axis] if counts is None else counts.sum(axis, keepdim=True).clamp(min=1)
    mean = counted.sum(axis, keepdim=True) / total
    apart = counted - mean
    if counts is not None:
        apart = torch.where(counts, apart, 0)
    return seen - mean, (apart.square() / total).sum(axis, keepdim=True)


def _mean_over_time(x: Tensor, valid: Tensor | None, padding_stats: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(seen, counted, counts) of x [batch, layers, time, features] for :func:`deviations`, time being 1.

    All is less the slice's mean as it comes out of one sum: so large a part of x is gone before digits are lost by it.
    """
    if valid is None:
        seen = (x - x.detach().mean((1, 2), keepdim=True)).mean(2, keepdim=True)
        return seen, seen, None
    kept = torch.where(valid, x, 0)
    if padding_stats == "exclude":
        shift = kept.detach().sum((1, 2), keepdim=True) / valid.sum((1, 2), keepdim=True).clamp(min=1)
        shifted = torch.where(valid, kept - shift, 0)
        seen = shifted.sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
        return seen, seen, valid.any(2, keepdim=True)
    shift = kept.detach().mean((1, 2), keepdim=True)
    counted = (kept - shift).mean(2, keepdim=True)
    # A layer of padding alone counts as 0, and the density handed out there is that of what it holds.
    return torch.where(valid.any(2, keepdim=True), counted, (x - shift).mean(2, keepdim=True)), counted, None
