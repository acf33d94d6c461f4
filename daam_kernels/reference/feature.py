"""One Gaussian per feature over an encoder's layers (arXiv 2401.11143, Algorithm 1), d = a - mean:

    w = exp(-(d - offset)^2 / (2 c (var + eps))),    var = E[(a - mean)^2] + 1e-8

a is x, or its mean over time; a slice is one feature over the layers of one head. The weights are not normalised. The
density itself is that of ``density_attention(density="gaussian")``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .density_attention import density_attention
from .statistics import valid_elements


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
    options = dict(norm_axis=1, padding_stats=padding_stats, eps=eps, density="gaussian")
    if x.dim() == 3:
        options.update(padding_value=padding_value, mask=mask, residual=residual, return_weights=return_weights)
        results = density_attention(x, mean_offsets, c, **options)
        return tuple(_as_layout(t, x) for t in results) if return_weights else _as_layout(results, x)
    valid = valid_elements(x, padding_value, mask)
    mean, layers = mean_over_time(x, valid, padding_stats)
    weights = density_attention(mean, mean_offsets, c, mask=layers, multiply=False, **options)
    return weigh_time_steps(x, weights, valid, padding_stats, residual=residual, return_weights=return_weights)


def mean_over_time(x: Tensor, valid: Tensor | None, padding_stats: str) -> tuple[Tensor, Tensor | None]:
    """(mean of x [batch, layers, time, features] over time, in the arithmetic type; which of its elements are valid).

    It is less the slice's mean as it comes out of one sum: so large a part of x is gone before digits are lost by it.
    Where padding counts as zeros it cannot be; then it is put back in float64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if valid is None:
        return (x - x.detach().mean((1, 2), keepdim=True)).mean(2), None
    kept, layers = torch.where(valid, x, 0), valid.any(2)
    if padding_stats == "exclude":
        shift = kept.detach().sum((1, 2), keepdim=True) / valid.sum((1, 2), keepdim=True).clamp(min=1)
        shifted = torch.where(valid, kept - shift, 0)
        return shifted.sum(2) / valid.sum(2).clamp(min=1), layers
    shift = kept.detach().mean((1, 2), keepdim=True)
    # The density handed out for a layer of padding alone is that of what it holds.
    mean = torch.where(layers, (kept - shift).mean(2), (x - shift).mean(2))
    return mean.double() + shift.double().squeeze(2), layers


def weigh_time_steps(
    x: Tensor, weights: Tensor, valid: Tensor | None, padding_stats: str, *, residual: bool, return_weights: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """y of x [batch, layers, time, features], from the weights [batch, layers, features] of all its time steps."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    weights = weights.unsqueeze(2).to(values.dtype)
    if valid is None:
        y = values * weights
    else:
        # Excluded padding has no way into the gradients, not even a NaN there.
        y = torch.where(valid, torch.where(valid, values, 0) * weights, values)
    y = (y + values if residual else y).to(x.dtype)
    if not return_weights:
        return y
    weights = weights.detach().expand_as(x)
    if valid is not None and padding_stats == "exclude":
        weights = torch.where(valid, weights, 0)
    return y, torch.empty_like(x).copy_(weights)


def _as_layout(t: Tensor, x: Tensor) -> Tensor:
    """t in the memory layout of torch.empty_like(x)."""
    out = torch.empty_like(x)
    return t if t.stride() == out.stride() else out.copy_(t)
