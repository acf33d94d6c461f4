"""The density gate (arXiv 2512.07168): a one-channel projection a of x, its density along time, d = a - mean:

    gate = (1/K) sum_k exp(-z_k^2 / 2) / (s_k sqrt(2 pi)),    z_k = (d - offset_k) / (sqrt(var) s_k + 1e-8)
    s = softplus(log_sigma) + 1e-3,    var = max(E[(a - mean)^2], 1e-6),    y = x (1 + alpha gate)

A slice is one sequence; the gate is not normalised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .feature import deviations


def density_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_offsets: Tensor,
    log_sigma: Tensor,
    alpha: Tensor,
    *,
    mask: Tensor | None = None,
    padding_stats: str = "exclude",
) -> tuple[Tensor, Tensor]:
    """Scale every frame of x by 1 + alpha times its density among the frames of its sequence.

    Arithmetic is in float32, or in float64 for float64 input; differentiable as often as one likes.

    Args:
        x: [batch, channels, time].
        weight, bias: [1, channels, 1] and [1], the projection to one channel.
        mean_offsets: [num_gaussians], offsets from the sequence's mean, in units of the projection.
        log_sigma: [num_gaussians], what softplus makes the widths of, in units of the sequence's deviation.
        alpha: a scalar.
        mask: boolean, broadcastable to [batch, 1, time], True where a frame is valid.
        padding_stats: ``"zero"`` counts padded frames as zeros in mean and variance of the projection, ``"exclude"``
            leaves them out.

    Returns:
        y of x's shape, x where padded, and the gate [batch, 1, time], 0 where padded under ``"exclude"``; both of
        x's type.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    values = x.to(work)
    weight, bias, mean_offsets, log_sigma, alpha = (p.to(work) for p in (weight, bias, mean_offsets, log_sigma, alpha))
    valid = None if mask is None else mask.expand(x.shape[0], 1, x.shape[2])
    deviation, var = deviations(*_projected(values, weight, bias, valid, padding_stats), 2)
    std = var.clamp(min=1e-6).sqrt()
    widths = F.softplus(log_sigma) + 1e-3
    z = (deviation.unsqueeze(3) - mean_offsets) / (std.unsqueeze(3) * widths + 1e-8)
    gate = (torch.exp(-0.5 * z.square()) / widths).mean(3) / math.sqrt(2 * math.pi)
    if valid is None:
        y = values * (1 + alpha * gate)
    else:
        if padding_stats == "exclude":
            gate = torch.where(valid, gate, 0)
        # Excluded padding has no way into the gradients, not even a NaN there.
        y = torch.where(valid, torch.where(valid, values, 0) * (1 + alpha * gate), values)
    return y.to(x.dtype), gate.to(x.dtype)


def _projected(
    x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None, padding_stats: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(seen, counted, counts) of the projection for :func:`deviations`, less the projection of each channel's mean.

    x less a mean is projected, not x: so an offset of x costs no digits. Products and a sum rather than a matrix
    product, which autocast and the settings of matrix products would take out of the arithmetic type.
    """
    if valid is None:
        shift = x.detach().mean(2, keepdim=True)
    else:
        kept = torch.where(valid, x, 0)
        count = valid.sum(2, keepdim=True).clamp(min=1) if padding_stats == "exclude" else x.shape[2]
        shift = kept.detach().sum(2, keepdim=True) / count
        x = kept if padding_stats == "exclude" else x
    # The gate does not change with the bias unless padding counts as zeros: a gradient of 0 then, not of none.
    seen = (weight * (x - shift)).sum(1, keepdim=True) + 0 * bias
    if valid is None:
        return seen, seen, None
    if padding_stats == "exclude":
        seen = torch.where(valid, seen, 0)
        return seen, seen, valid
    zero = -(weight * shift).sum(1, keepdim=True) - bias
    return seen, torch.where(valid, seen, zero), None
