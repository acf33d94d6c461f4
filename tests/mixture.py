"""The mixture's formulas written out in extended precision, and what its tests share."""

from __future__ import annotations

import daam_kernels
import numpy as np
import torch
from daam_kernels.backends import DENSITIES
from support import (
    BACKENDS,
    NEGLIGIBLE,
    TOLERANCES,
    assert_close,
    extended,
    extended_slices,
    gaussians,
    generator,
)
from torch import Tensor

NAMES = ("y", "dx", "dmean_offsets", "dc", "dweights")
MIXTURE_BACKENDS = tuple(name for name in BACKENDS if "mixture" in DENSITIES.get(name, ("mixture",)))


def mixture(num_heads: int, num_gaussians: int, rng: torch.Generator, *, dtype=torch.float32, device="cpu", **options):
    """(mean_offsets, c, weights): those of ``gaussians``, and logits ~ N(0, 1)."""
    mean_offsets, c = gaussians(num_heads, num_gaussians, rng, dtype=dtype, device=device, **options)
    weights = torch.randn(num_heads, num_gaussians, generator=rng, dtype=torch.float64)
    return mean_offsets, c, weights.to(device, dtype)


def evaluate(backend: str, x: Tensor, mean_offsets: Tensor, c: Tensor, weights: Tensor, grad: Tensor, **options):
    """(y, dx, dmean_offsets, dc, dweights) of a backend through the public function."""
    inputs = [t.detach().requires_grad_() for t in (x, mean_offsets, c, weights)]
    x, mean_offsets, c, weights = inputs
    y = daam_kernels.density_attention(
        x, mean_offsets, c, density="mixture", weights=weights, backend=backend, **options
    )
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


def assert_contract(got, expected, dtype: torch.dtype, what: str = "") -> None:
    """(y, dx, dmean_offsets, dc, dweights) within the numeric contract of ``dtype``."""
    y_tolerance, dx_tolerance, parameters_tolerance = TOLERANCES[dtype]
    for name, g, e in zip(NAMES, got, expected, strict=True):
        assert torch.isfinite(g).all(), f"{what} {name} is not finite"
        if name == "y" or e.norm() > NEGLIGIBLE:
            tolerance = {"y": y_tolerance, "dx": dx_tolerance}.get(name, parameters_tolerance)
            assert_close(g, e, tolerance, f"{what} {name}")


def truth(x: Tensor, mean_offsets: Tensor, c: Tensor, weights: Tensor, grad: Tensor, **options):
    """(y, dx, dmean_offsets, dc, dweights) of the same rounded inputs, in numpy's long double, on the CPU."""
    return extended_truth(x, mean_offsets, c, weights, grad, **options)[:5]


def extended_truth(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    weights: Tensor,
    grad: Tensor,
    *,
    weights_softmax: bool = True,
    norm_axis: int = -1,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    normalize: str = "clamp",
    eps: float = 1e-8,
    residual: bool = False,
):
    """The truth, and after it the sizes of what is added up to the gradients of the parameters.

    m(d) = sum_k share_k exp(-(d - offset_k)^2 / (2 var c_k^2)), w = m / max(sum m, eps), y = x w, and its derivatives
    by the chain rule, Gaussian by Gaussian. Only the largest exponent of a slice is taken out.
    """
    values, g, groups = extended_slices(x, grad, len(c), norm_axis, padding_value, mask, padding_stats)
    offsets, widths, logits = (extended(t)[..., None] for t in (mean_offsets, c, weights))
    shares = logits
    if weights_softmax:
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares = shares / shares.sum(1, keepdims=True)
    y, dx = values.copy(), g.copy()
    d_offsets, d_widths, d_shares = (np.zeros_like(t[..., 0]) for t in (offsets, widths, shares))
    sizes = tuple(np.zeros_like(t) for t in (d_offsets, d_widths, d_shares))
    for head, s in enumerate(groups):
        v_x, v_g, counts, counted, n, mean, deviation = s.x, s.g, s.valid, s.counted, s.n, s.mean, s.deviation
        skipped = n < 2
        n = np.maximum(n, 2)
        var = (deviation**2).sum(-1, keepdims=True) / (n - 1) + np.longdouble(eps)
        distances = [v_x - mean - offset for offset in offsets[head]]
        exponents = [
            np.where(counted & (share > 0), -(d**2) / (2 * var * width**2), -np.inf)
            for d, width, share in zip(distances, widths[head], shares[head])
        ]
        top = np.max([e.max(-1, keepdims=True) for e in exponents], axis=0)
        top = np.where(np.isfinite(top), top, 0)
        each = [np.exp(e - top) for e in exponents]
        total = sum(share * m for share, m in zip(shares[head], each)).sum(-1, keepdims=True)
        with np.errstate(over="ignore"):  # an infinite floor gives weights of 0, as it should
            floor = np.longdouble(eps) * np.exp(-top) if normalize == "clamp" else 0
        clamped = total < floor
        norm = np.where(skipped, 1, np.maximum(total, floor))
        w = sum(share * m for share, m in zip(shares[head], each)) / norm
        q = np.where(counts, v_g * v_x, 0)
        for _ in range(2):  # once more: the weights' sum is 1 but for rounding, which q's offset would enlarge
            q = q - np.where(clamped, 0, (w * q).sum(-1, keepdims=True))
        q = np.where(skipped, 0, q)
        d_mean, d_var, through_x = 0, 0, 0
        for k, (d, width, share, m) in enumerate(zip(distances, widths[head], shares[head], each)):
            p = share * m / norm * q
            slope = p * d / (var * width**2)
            d_mean = d_mean + slope.sum(-1, keepdims=True)
            d_var = d_var + (slope * d).sum(-1, keepdims=True) / (2 * var)
            through_x = through_x - slope
            d_offsets[head, k] = slope.sum()
            d_widths[head, k] = (slope * d / width).sum()
            d_shares[head, k] = (m / norm * q).sum()
            for size, added in zip(sizes, (slope, slope * d / width, m / norm * q)):
                size[head, k] = abs(added).sum()
        y[s.cut] = np.where(counts & ~skipped, v_x * w, v_x) + residual * v_x
        through = d_mean / n + 2 * d_var * deviation / (n - 1)
        dx[s.cut] = np.where(counts & ~skipped, v_g * w + through, v_g) + through_x + residual * v_g
    d_weights = d_shares
    if weights_softmax:
        d_weights = shares[..., 0] * (d_shares - (shares[..., 0] * d_shares).sum(1, keepdims=True))
        sizes = *sizes[:2], shares[..., 0] * (sizes[2] + (shares[..., 0] * sizes[2]).sum(1, keepdims=True))
    y, dx = (np.moveaxis(t, -1, norm_axis) for t in (y, dx))
    return tuple(torch.from_numpy(t.astype(np.float64)) for t in (y, dx, d_offsets, d_widths, d_weights, *sizes))


def assert_contract_of_any(got, x: Tensor, *parameters: Tensor, grad: Tensor, **options) -> None:
    """The contract for a problem that nobody chose, whose gradients of the parameters may cancel.

    Then they are as exact as what is added up.
    """
    *expected, offsets_size, c_size, weights_size = extended_truth(x, *parameters, grad, **options)
    rounding = 1e-15 if x.dtype == torch.float64 else 2e-7
    near = [*got[:2]]
    for g, e, size in zip(got[2:], expected[2:], (offsets_size, c_size, weights_size), strict=True):
        near.append(e if (g.double() - e).norm() <= rounding * size.norm() else g)
    assert_contract(near, expected, x.dtype)


__all__ = [
    "MIXTURE_BACKENDS",
    "NAMES",
    "assert_contract",
    "assert_contract_of_any",
    "evaluate",
    "generator",
    "mixture",
    "truth",
]
