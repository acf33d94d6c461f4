"""Density attention with a product of Gaussians, forward and backward, in plain PyTorch.

Along ``norm_axis``, cut into heads, every slice is standardised, weighed by the product of K Gaussians,
normalised and multiplied with x (Ioannides et al., arXiv 2401.11143, Algorithm 2). The logarithm of that
product is one quadratic in d = x - mean:

    log m(d) = -(A (d - o)^2 + E) / (2 var) - P
    A = sum 1/c_k^2    o = sum (offset_k / c_k^2) / A    E = sum (offset_k - o)^2 / c_k^2    P = sum log(2 pi c_k^2) / 2

so the code below evaluates one exponential per element, whatever K is. Arithmetic is in float32, or in float64
for float64 input. Statistics are taken of x - x0, x0 being the slice's first valid element: a mean is never held
in one float, which is what loses digits on data with an offset.

``density_attention`` is differentiable as often as one likes. ``density_attention_backward`` is the gradient in
closed form, which keeps in float32 the digits that differentiating the forward pass loses where q - D cancels.
"""

from __future__ import annotations

import math
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor


class _Quadratic(NamedTuple):
    """The K Gaussians of each head as one quadratic; tensors [heads, 1, ...] that broadcast over slices."""

    a: Tensor
    center: Tensor
    e: Tensor
    log_scale: Tensor


class _Slices(NamedTuple):
    """What both directions need of a group of heads; tensors [..., heads, n, ...], n is 1 for numbers per slice."""

    x: Tensor
    valid: Tensor | None  # None: all of them
    count: Tensor | int  # elements that the statistics count
    skipped: Tensor | None  # slices left as they are, for want of two valid elements
    clamped: Tensor | None  # slices whose sum is below eps
    quad: _Quadratic
    rstd: Tensor
    standard: Tensor  # (x - mean) / sqrt(var)
    z: Tensor  # standard, from the centre of the quadratic
    nearest: Tensor  # where in the slice z is smallest, the density largest
    peak: Tensor  # z there
    apart: Tensor  # x - x there
    gap: Tensor  # z - peak
    weights: Tensor


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
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weigh x by the density of its own values along ``norm_axis``.

    Args:
        x: any shape; the axis ``norm_axis`` of size R is cut into num_heads chunks of R // num_heads, the last
            head takes the remainder too.
        mean_offsets: [num_heads, num_gaussians], offsets from the slice's mean, in units of x.
        c: [num_heads, num_gaussians], widths in units of the slice's standard deviation.
        padding_value, mask: elements equal to the one, or False in the other (broadcast to x), are padding.
        padding_stats: ``"zero"`` counts padding as zeros in the statistics, ``"exclude"`` leaves it out.
        normalize: ``"clamp"`` divides by max(sum, eps), ``"softmax"`` by the sum.
        residual: add x to the result.
        return_weights: return (y, weights), the weights detached.

    Returns:
        y of x's shape and type, x * weights where valid, x where padded.
    """
    axis = norm_axis % x.dim()
    outputs, details = [], []
    for _, s in _slices(x, mean_offsets, c, axis, padding_value, mask, padding_stats, normalize, eps):
        y = s.x * s.weights
        if s.valid is not None:
            y = torch.where(s.valid, y, s.x)
        outputs.append((y + s.x if residual else y).flatten(axis, axis + 1))
        if return_weights:
            details.append(s.weights.detach().flatten(axis, axis + 1))
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`density_attention` for the incoming ``grad`` of y: (dx, dmean_offsets, dc).

    Shapes, arguments and types are the forward's; each gradient has its own tensor's shape and type.
    """
    axis = norm_axis % x.dim()
    grads_x, sums = [], []
    for cut, s in _slices(x, mean_offsets, c, axis, padding_value, mask, padding_stats, normalize, eps):
        along = axis + 1
        g = cut(grad).to(s.x.dtype)
        g_valid = g if s.valid is None else torch.where(s.valid, g, 0)

        # q - D, q = g x and D = sum w q, without its cancellation. The weights sum to one, so q may be taken relative
        # to q where the density is largest: g x - g_1 x_1 = (g - g_1) x_1 + g (x - x_1).
        g_peak, x_peak = (t.gather(along, s.nearest) for t in (g_valid, s.x))
        q = (g_valid - g_peak) * x_peak + g_valid * s.apart
        q = q - (s.weights * q).sum(along, keepdim=True)
        if s.clamped is not None:
            q = torch.where(s.clamped, g_valid * s.x, q)
        p = s.weights * q
        if s.skipped is not None:
            p = torch.where(s.skipped, 0, p)
        t0 = torch.zeros_like(s.peak) if s.clamped is None else torch.where(s.clamped, p.sum(along, keepdim=True), 0)
        p_gap = p * s.gap
        u1 = p_gap.sum(along, keepdim=True) + s.peak * t0
        u2 = (p_gap * (s.gap + 2 * s.peak)).sum(along, keepdim=True) + s.peak.square() * t0

        through_mean = s.quad.a * s.rstd * u1 / s.count
        through_var = (s.quad.a * u2 + s.quad.e * s.rstd.square() * t0) * s.rstd / (s.count - 1)
        dx = g * s.weights + through_mean + through_var * s.standard
        if s.skipped is not None:
            dx = torch.where(s.skipped, g, dx)
        if s.valid is not None:
            dx = torch.where(s.valid, dx, g)
        dx = dx - s.quad.a * s.rstd * p * s.z
        grads_x.append((dx + g if residual else dx).flatten(axis, axis + 1))

        rest = [d for d in range(x.dim() + 1) if d != axis]
        per_slice = (t0, t0 * s.rstd.square(), u1 * s.rstd, u2)
        sums.append(torch.stack([v.sum(rest, dtype=torch.float64) for v in per_slice]))

    t0, t0_v, u1_v, u2_v = torch.cat(sums, 1).unsqueeze(-1)
    offsets, widths = mean_offsets.double(), c.double()
    a = widths.pow(-2).sum(1, keepdim=True)
    center = (offsets * widths.pow(-2)).sum(1, keepdim=True) / a
    da = -0.5 * (u2_v + 2 * center * u1_v + center.square() * t0_v)
    db = u1_v + center * t0_v
    dc = -0.5 * t0_v
    grad_offsets = (db + 2 * offsets * dc) / widths.square()
    grad_c = -2 * (da + offsets * db + offsets.square() * dc) / widths.pow(3) - t0 / widths
    return _join(grads_x, axis).to(x.dtype), grad_offsets.to(mean_offsets.dtype), grad_c.to(c.dtype)


def _slices(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    axis: int,
    padding_value: float | None,
    mask: Tensor | None,
    padding_stats: str,
    normalize: str,
    eps: float,
) -> Iterator[tuple[Callable[[Tensor], Tensor], _Slices]]:
    """The heads of x in at most two groups of equal chunks, the last one apart if it takes a remainder.

    Yields the function that cuts a tensor of x's shape to the group, [..., heads, n, ...], and the group's slices.
    """
    valid = None if padding_value is None else x != padding_value
    if mask is not None:
        mask = mask.expand_as(x)
        valid = mask if valid is None else valid & mask
    quad = _quadratic(mean_offsets, c, _arithmetic_type(x))
    num_heads, length = mean_offsets.shape[0], x.shape[axis]
    chunk, remainder = divmod(length, num_heads)
    groups = [(0, num_heads, chunk)]
    if remainder:
        groups = [(0, num_heads - 1, chunk), (num_heads - 1, 1, chunk + remainder)]
    for first, heads, n in groups:
        if heads == 0:
            continue

        def cut(t: Tensor, start=first * chunk, heads=heads, n=n) -> Tensor:
            return t.narrow(axis, start, heads * n).unflatten(axis, (heads, n))

        shape = (heads,) + (1,) * (x.dim() - axis)
        group_quad = _Quadratic(*(q[first : first + heads].view(shape) for q in quad))
        group_valid = None if valid is None else cut(valid)
        yield cut, _weigh(cut(x), group_valid, group_quad, axis + 1, padding_stats, normalize, eps)


def _weigh(
    x: Tensor, valid: Tensor | None, quad: _Quadratic, axis: int, padding_stats: str, normalize: str, eps: float
) -> _Slices:
    """Statistics, density and normalised weights of the slices [..., heads, n, ...] along ``axis``."""
    x = x.to(quad.a.dtype)
    n = x.shape[axis]
    exclude = valid is not None and padding_stats == "exclude"
    if valid is None:
        x0 = x.narrow(axis, 0, 1).detach()
        shifted = counted = x - x0
        count, skipped = n, None
    else:
        first = valid.to(torch.uint8).argmax(axis, keepdim=True)
        x0 = torch.where(valid, x, 0).gather(axis, first).detach()
        if exclude:
            shifted = counted = torch.where(valid, x - x0, 0)
            total = valid.sum(axis, keepdim=True)
            count, skipped = total.clamp(min=2).to(x.dtype), total < 2
        else:
            shifted, counted = x - x0, torch.where(valid, x, 0) - x0
            count, skipped = n, None

    mean = counted.sum(axis, keepdim=True) / count
    deviation = counted - mean
    if exclude:
        deviation = torch.where(valid, deviation, 0)
    var = deviation.square().sum(axis, keepdim=True) / (count - 1) + eps
    rstd = var.sqrt().reciprocal()
    standard = (shifted - mean) * rstd
    z = standard - quad.center * rstd

    # Relative to the slice's largest density nothing underflows, and nothing overflows. The difference of the squares
    # is taken as gap (gap + 2 peak): so what all elements have in common, a far mean among it, costs no digits. Where
    # rounding hid which element is nearest, the difference may be negative, and its minimum sees to it.
    domain = valid | skipped if exclude else None
    distance = z.detach().square()
    nearest = (distance if domain is None else torch.where(domain, distance, math.inf)).argmin(axis, keepdim=True)
    peak = z.gather(axis, nearest)
    apart = shifted - shifted.gather(axis, nearest)
    gap = apart * rstd
    rise = gap * (gap + 2 * peak)
    lowest = (rise if domain is None else torch.where(domain, rise, math.inf)).detach().amin(axis, keepdim=True)
    density = torch.exp(-0.5 * quad.a * (rise - lowest))
    if domain is not None:
        density = torch.where(domain, density, 0)
    log_norm = density.sum(axis, keepdim=True).log()
    clamped = None
    if normalize == "clamp":
        log_peak = -0.5 * (quad.a * (peak.square() + lowest) + quad.e * rstd.square()) - (
            quad.log_scale + math.log(eps)
        )
        clamped = log_norm + log_peak < 0
        log_norm = torch.maximum(log_norm, -log_peak)
    weights = density * torch.exp(-log_norm)
    if exclude:
        weights = torch.where(skipped, valid.to(x.dtype), weights)
    return _Slices(x, valid, count, skipped, clamped, quad, rstd, standard, z, nearest, peak, apart, gap, weights)


def _quadratic(mean_offsets: Tensor, c: Tensor, dtype: torch.dtype) -> _Quadratic:
    """The Gaussians [heads, gaussians] as one quadratic per head, worked out in float64 and rounded to ``dtype``."""
    offsets, widths = mean_offsets.double(), c.double()
    inverse = widths.pow(-2)
    a = inverse.sum(1, keepdim=True)
    center = (offsets * inverse).sum(1, keepdim=True) / a
    e = ((offsets - center).square() * inverse).sum(1)
    log_scale = (2 * math.pi * widths.square()).log().sum(1) / 2
    return _Quadratic(*(q.to(dtype) for q in (a.squeeze(1), center.squeeze(1), e, log_scale)))


def _arithmetic_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _join(groups: list[Tensor], axis: int) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups, axis)
