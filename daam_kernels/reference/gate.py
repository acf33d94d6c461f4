"""The density gate (arXiv 2512.07168): a one-channel projection a of x, its density along time, d = a - mean:

    gate = (1/K) sum_k exp(-z_k^2 / 2) / (s_k sqrt(2 pi)),    z_k = (d - offset_k) / (sqrt(var) s_k + 1e-8)
    s = softplus(log_sigma) + 1e-3,    var = max(E[(a - mean)^2], 1e-6),    y = x (1 + alpha gate)

A slice is one sequence; the gate is not normalised. It is the density of ``density_attention(density="gate")``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .density_attention import density_attention


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
    valid = None if mask is None else mask.expand(x.shape[0], 1, x.shape[2])
    projected = project(x, weight, bias, valid, padding_stats)
    gaussians = mean_offsets.unsqueeze(0), *gate_widths(log_sigma.unsqueeze(0).to(work))
    gate = density_attention(
        projected,
        *gaussians[:2],
        log_shares=gaussians[2],
        mask=valid,
        padding_stats=padding_stats,
        density="gate",
        multiply=False,
    )
    return scale_frames(x, gate, alpha, valid)


def gate_widths(log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(widths, logarithms of the shares) of the Gaussians [num_heads, num_gaussians] of a gate."""
    widths = F.softplus(log_sigma) + 1e-3
    return widths, -(widths * (log_sigma.shape[1] * math.sqrt(2 * math.pi))).log()


def project(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None, padding_stats: str) -> Tensor:
    """The projection [batch, 1, time], less the projection of each channel's mean, in the arithmetic type.

    x less a mean is projected, not x: so an offset of x costs no digits. Where padding counts as zeros the projection
    of the mean is put back in float64. Products and a sum rather than a matrix product, which autocast and the settings
    of matrix products would take out of the arithmetic type.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias = (t.to(work) for t in (x, weight, bias))
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
        return seen
    if padding_stats == "exclude":
        return torch.where(valid, seen, 0)
    return seen.double() + (weight * shift).sum(1, keepdim=True).double() + bias.double()


def scale_frames(x: Tensor, gate: Tensor, alpha: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, gate) of x's type, from the gate in any."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    gate = gate.to(values.dtype)
    scale = 1 + alpha.to(values.dtype) * gate
    if valid is None:
        y = values * scale
    else:
        # Excluded padding has no way into the gradients, not even a NaN there.
        y = torch.where(valid, torch.where(valid, values, 0) * scale, values)
    return y.to(x.dtype), gate.to(x.dtype)
