"""Density attention, forward and backward, in plain PyTorch.

Along ``norm_axis``, cut into heads, every slice is standardised and multiplied with a density of its own values:
``"product"`` of K Gaussians (Ioannides et al., arXiv 2401.11143, Algorithm 2), or their ``"mixture"``, both normalised;
the ``"gate"`` or the per-feature ``"gaussian"``, neither of them normalised. Arithmetic is in float32, or in float64
for float64 input.

``density_attention`` is differentiable as often as one likes. ``density_attention_backward`` is the gradient in
closed form, which keeps in float32 the digits that differentiating the forward pass loses where q - D cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mixture import Mixture
from .product import Product
from .statistics import (
    Density,
    Group,
    Slices,
    Variance,
    Weights,
    as_they_are,
    groups,
    normalise,
    standardise,
    valid_elements,
)
from .unnormalised import FeatureGaussian, Gate

_DENSITIES = {"product": Product, "mixture": Mixture, "gate": Gate, "gaussian": FeatureGaussian}


def density_attention(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    norm_axis: int = -1,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    normalize: str = "clamp",
    eps: float = 1e-8,
    residual: bool = False,
    density: str = "product",
    multiply: bool = True,
    log_shares: Tensor | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weigh x by the density of its own values along ``norm_axis``.

    Args:
        x: any shape; the axis ``norm_axis`` of size R is cut into num_heads chunks of R // num_heads, the last
            head takes the remainder too.
        mean_offsets: [num_heads, num_gaussians], offsets from the slice's mean, in units of x. Of the ``"gaussian"``
            [num_heads, features], features being the product of the sizes behind ``norm_axis``.
        c: of the same shape, widths in units of the slice's standard deviation; of the ``"gaussian"`` scales of the
            slice's variance.
        padding_value, mask: elements equal to the one, or False in the other (broadcast to x), are padding.
        padding_stats: ``"zero"`` counts padding as zeros in the statistics, ``"exclude"`` leaves it out.
        normalize: ``"clamp"`` divides by max(sum, eps), ``"softmax"`` by the sum.
        residual: add x to the result.
        density: ``"product"``, ``"mixture"``, ``"gate"`` or ``"gaussian"``.
        multiply: False gives the weights in the place of y, differentiable, for a density that is not normalised.
        log_shares: [num_heads, num_gaussians], logarithms of the shares of the Gaussians of the mixture and the gate;
            -inf is a Gaussian not there.
        return_weights: return (y, weights), the weights detached.

    Returns:
        y of x's shape and type, x * weights where valid, x where padded.
    """
    axis = norm_axis % x.dim()
    form = _form(x, mean_offsets, c, density, log_shares, eps)
    valid = valid_elements(x, padding_value, mask)
    outputs, details = [], []
    for group in groups(x, c.shape[0], axis):
        s = _slices(x, valid, group, axis, padding_stats, form.variance)
        weights = _weights(form, s, form.of(group, s).density(), normalize, eps).values
        y = s.x * weights if multiply else weights
        if s.valid is not None and multiply:
            y = torch.where(s.valid, y, s.x)
        outputs.append((y + s.x if residual else y).flatten(axis, axis + 1))
        if return_weights:
            details.append(weights.detach().flatten(axis, axis + 1))
    y = _join(outputs, axis).to(x.dtype)
    return (y, _join(details, axis).to(x.dtype)) if return_weights else y


def density_attention_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    norm_axis: int = -1,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    normalize: str = "clamp",
    eps: float = 1e-8,
    residual: bool = False,
    density: str = "product",
    multiply: bool = True,
    log_shares: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`density_attention` for the incoming ``grad`` of y.

    (dx, dmean_offsets, dc), and dlog_shares after them of the mixture. Shapes, arguments and types are the forward's;
    each gradient has its own tensor's shape and type.
    """
    axis = norm_axis % x.dim()
    form = _form(x, mean_offsets, c, density, log_shares, eps)
    valid = valid_elements(x, padding_value, mask)
    grads_x, sums = [], []
    for group in groups(x, c.shape[0], axis):
        s = _slices(x, valid, group, axis, padding_stats, form.variance)
        at_work = form.of(group, s)
        density_of_x = at_work.density()
        weights = _weights(form, s, density_of_x, normalize, eps)
        g = group.cut(grad).to(s.x.dtype)
        if form.normalised:
            g_valid = g if s.valid is None else torch.where(s.valid, g, 0)
            q = _centred(s, density_of_x, weights, g_valid)
        elif multiply:
            q = g * s.x if s.valid is None else torch.where(s.valid, g * s.x, 0)
        else:
            q, g = s.in_domain(g, 0), torch.zeros_like(g)  # y is not made of x itself
        through = at_work.gradient(weights, q)

        element, mean = through.element, through.mean
        if weights.clamped is not None:
            # What x gets through its own place in m and through the mean cancels in a slice that is constant or nearly
            # so, and large both are where the sum of p is not 0: they are taken relative to one element's.
            relative = element - s.at(density_of_x.nearest, element)
            mean = torch.where(weights.clamped, -s.sum(s.in_domain(relative, 0)), mean)
            element = torch.where(weights.clamped, relative, element)
        dx = g * weights.values + mean / s.count + through.var / s.freedom * s.standard + element
        if s.skipped is not None:
            dx = torch.where(s.skipped, g, dx)
        if s.valid is not None:
            dx = torch.where(s.valid, dx, g + through.element)
        grads_x.append((dx + g if residual else dx).flatten(axis, axis + 1))
        sums.append(through.sums)
    return _join(grads_x, axis).to(x.dtype), *form.gradients(_join(sums, 1))


def _form(x: Tensor, mean_offsets: Tensor, c: Tensor, density: str, log_shares: Tensor | None, eps: float):
    return _DENSITIES[density](mean_offsets, c, log_shares, eps, torch.promote_types(x.dtype, torch.float32))


def _slices(x: Tensor, valid: Tensor | None, group: Group, axis: int, padding_stats: str, variance: Variance) -> Slices:
    cut_x = group.cut(x).to(torch.promote_types(x.dtype, torch.float32))
    return standardise(cut_x, None if valid is None else group.cut(valid), axis + 1, padding_stats, variance)


def _weights(form, s: Slices, density: Density, normalize: str, eps: float) -> Weights:
    return normalise(s, density, normalize, eps) if form.normalised else as_they_are(density)


def _centred(s: Slices, density: Density, weights: Weights, g: Tensor) -> Tensor:
    """q - D without its cancellation: q = g x is the gradient of the weights, D = sum w q, 0 where clamped.

    The weights sum to one, so q may be taken relative to q where the density is largest:
    g x - g_1 x_1 = (g - g_1) x_1 + g (x - x_1).
    """
    g_peak, x_peak = s.at(density.nearest, g), s.at(density.nearest, s.x)
    q = (g - g_peak) * x_peak + g * s.apart(density.nearest)
    q = q - s.sum(weights.values * q)
    if weights.clamped is not None:
        q = torch.where(weights.clamped, g * s.x, q)
    return q if s.skipped is None else torch.where(s.skipped, 0, q)


def _join(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
