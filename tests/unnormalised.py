"""The formulas of the gate and the per-feature Gaussian in extended precision, and what their tests share."""

from __future__ import annotations

import math

import daam_kernels
import numpy as np
import torch
from daam_kernels.functional import density_weights
from support import extended, extended_slices
from torch import Tensor

DENSITIES = ("gate", "gaussian")


def gaussians(
    density: str, num_heads: int, columns: int, rng: torch.Generator, *, offsets=0.0, dtype=torch.float32, device="cpu"
) -> tuple[Tensor, Tensor]:
    """(mean_offsets, c) [num_heads, columns]: offsets ~ ``offsets`` N(0, 1); the gate's c ~ N(log 0.5, 1), the
    gaussian's exp(N(0, 1))."""
    mean_offsets, c = (torch.randn(num_heads, columns, generator=rng, dtype=torch.float64) for _ in range(2))
    c = c + math.log(0.5) if density == "gate" else c.exp()
    return (offsets * mean_offsets).to(device, dtype), c.to(device, dtype)


def columns(density: str, shape: tuple[int, ...], norm_axis: int, num_gaussians: int = 3) -> int:
    """The second size of the parameters for an x of ``shape``."""
    return num_gaussians if density == "gate" else math.prod(shape[norm_axis % len(shape) + 1 :])


def attention(backend: str, x: Tensor, mean_offsets: Tensor, c: Tensor, *, multiply: bool = True, **options):
    """y, or with ``multiply`` False the weights, differentiable."""
    function = daam_kernels.density_attention if multiply else density_weights
    return function(x, mean_offsets, c, backend=backend, **options)


def evaluate(backend: str, x: Tensor, mean_offsets: Tensor, c: Tensor, grad: Tensor, **options):
    """(y, dx, dmean_offsets, dc) of a backend."""
    inputs = [t.detach().requires_grad_() for t in (x, mean_offsets, c)]
    y = attention(backend, *inputs, **options)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


def truth(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    grad: Tensor,
    *,
    density: str,
    multiply: bool = True,
    norm_axis: int = -1,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    eps: float | None = None,
    residual: bool = False,
):
    """(y, dx, dmean_offsets, dc) of the same rounded inputs: the formulas and the chain rule, in numpy's long double.

    An element d from its slice's mean weighs sum_k share_k exp(-z_k^2 / 2), z_k = (d - offset_k) / width_k, where
    width_k^2 is c (var + 1e-8 + eps), of either sign, or (sqrt(max(var, 1e-6)) s_k + eps)^2.
    """
    mask = None if mask is None else mask.cpu()
    x, grad = x.detach().cpu(), grad.detach().cpu()
    values, g, groups = extended_slices(x, grad, len(c), norm_axis, padding_value, mask, padding_stats)
    offsets, widths = extended(mean_offsets), extended(c)
    num_heads, num_gaussians = widths.shape
    if density == "gaussian":  # [heads, 1, features..., 1], which broadcasts over slices
        trailing = x.shape[norm_axis % x.dim() + 1 :]
        offsets, widths = (t.reshape(num_heads, 1, *trailing, 1) for t in (offsets, widths))
        num_gaussians = 1
    eps = np.longdouble((1e-5 if density == "gaussian" else 1e-8) if eps is None else eps)
    y, dx = values.copy(), g.copy()
    d_offsets, d_c = np.zeros_like(offsets), np.zeros_like(widths)
    for head, s in enumerate(groups):
        var = (s.deviation**2).sum(-1, keepdims=True) / s.n
        weight, slope, d_var = np.zeros_like(s.x), np.zeros_like(s.x), np.zeros_like(var)
        q = np.where(s.valid, s.g * s.x, 0) if multiply else np.where(s.counted, s.g, 0)
        for k in range(num_gaussians):
            d = s.x - s.mean - offsets[head, k]
            if density == "gaussian":
                square, share = widths[head, k] * (var + np.longdouble(1e-8) + eps), 1
            else:
                sigma = np.log1p(np.exp(widths[head, k])) + np.longdouble(1e-3)
                std = np.sqrt(np.maximum(var, np.longdouble(1e-6)))
                width = std * sigma + eps
                square, share = width**2, 1 / (num_gaussians * sigma * np.sqrt(2 * np.arccos(np.longdouble(-1))))
            part = np.where(s.counted, share * np.exp(-(d**2) / (2 * square)), 0)
            p = part * q
            weight += part
            slope += p * d / square
            d_square = p * d**2 / (2 * square**2)
            if density == "gaussian":
                d_offsets[head, k] = _over_outer(p * d / square, d_offsets[head, k])
                d_c[head, k] = _over_outer(d_square * (var + np.longdouble(1e-8) + eps), d_c[head, k])
                d_var += (d_square * widths[head, k]).sum(-1, keepdims=True)
            else:
                d_offsets[head, k] = (p * d / square).sum()
                d_width = 2 * width * d_square
                d_c[head, k] = ((d_width * std).sum() - p.sum() / sigma) / (1 + np.exp(-widths[head, k]))
                d_var += np.where(var > 1e-6, (d_width * sigma).sum(-1, keepdims=True) / (2 * std), 0)
        through = (slope.sum(-1, keepdims=True) + 2 * d_var * s.deviation) / s.n
        direct = s.g * weight if multiply else 0
        y[s.cut] = np.where(s.valid, s.x * weight, s.x) + residual * s.x if multiply else weight
        dx[s.cut] = np.where(s.valid, direct + through, s.g * multiply) - slope + residual * s.g
    y, dx = (np.moveaxis(t, -1, norm_axis) for t in (y, dx))
    d_offsets, d_c = (t.reshape(num_heads, -1) for t in (d_offsets, d_c))
    return tuple(torch.from_numpy(np.asarray(t, np.float64)) for t in (y, dx, d_offsets, d_c))


def _over_outer(t: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The sum of t [outer..., features..., n] in the shape of ``like``, [features..., 1]."""
    t = t.sum(-1, keepdims=True)
    return t.sum(tuple(range(t.ndim - like.ndim)))
