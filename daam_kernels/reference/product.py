"""The product of K Gaussians, whose logarithm is one quadratic in d = x - mean:

    log m(d) = -(A (d - o)^2 + E) / (2 var) - P
    A = sum 1/c_k^2    o = sum (offset_k / c_k^2) / A    E = sum (offset_k - o)^2 / c_k^2    P = sum log(2 pi c_k^2) / 2

so it costs one exponential per element, whatever K is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .statistics import Density, DensityGradient, Group, Slices, Variance, Weights, sum_over_slices


class Product:
    """The Gaussians [heads, gaussians] as one quadratic per head, worked out in float64 and rounded to ``dtype``, but
    for P: of many wide Gaussians it is so large that its rounding would show in all weights."""

    normalised = True

    def __init__(self, mean_offsets: Tensor, c: Tensor, log_shares: None, eps: float, dtype: torch.dtype) -> None:
        self.variance = Variance(added=eps)
        self.parameters = mean_offsets, c
        offsets, widths = mean_offsets.double(), c.double()
        inverse = widths.pow(-2)
        a = inverse.sum(1, keepdim=True)
        center = (offsets * inverse).sum(1, keepdim=True) / a
        e = ((offsets - center).square() * inverse).sum(1)
        log_scale = (2 * math.pi * widths.square()).log().sum(1) / 2
        self.quadratic = *(q.to(dtype) for q in (a.squeeze(1), center.squeeze(1), e)), log_scale

    def of(self, group: Group, s: Slices) -> _GroupProduct:
        return _GroupProduct(s, *(group.heads(q) for q in self.quadratic))

    def gradients(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(dmean_offsets, dc) from the sums of all heads."""
        t0, t0_v, u1_v, u2_v = sums.unsqueeze(-1)
        mean_offsets, c = self.parameters
        offsets, widths = mean_offsets.double(), c.double()
        a = widths.pow(-2).sum(1, keepdim=True)
        center = (offsets * widths.pow(-2)).sum(1, keepdim=True) / a
        da = -0.5 * (u2_v + 2 * center * u1_v + center.square() * t0_v)
        db = u1_v + center * t0_v
        dc = -0.5 * t0_v
        grad_offsets = (db + 2 * offsets * dc) / widths.square()
        grad_c = -2 * (da + offsets * db + offsets.square() * dc) / widths.pow(3) - t0 / widths
        return grad_offsets.to(mean_offsets.dtype), grad_c.to(c.dtype)


class _GroupProduct:
    """The density of one group's slices."""

    def __init__(self, s: Slices, a: Tensor, center: Tensor, e: Tensor, log_scale: Tensor) -> None:
        self.s, self.a, self.e, self.log_scale = s, a, e, log_scale
        self.z = s.standard - center * s.rstd  # standard, from the centre of the quadratic
        self.nearest = s.nearest(self.z)
        self.peak = s.at(self.nearest, self.z)
        self.gap = s.apart(self.nearest) * s.rstd

    def density(self) -> Density:
        # Relative to the slice's largest density nothing underflows, and nothing overflows. The difference of the
        # squares is taken as gap (gap + 2 peak): so what all elements have in common, a far mean among it, costs no
        # digits. Where rounding hid which element is nearest, the difference may be negative, and its minimum sees
        # to it.
        rise = self.gap * (self.gap + 2 * self.peak)
        lowest = self.s.lowest(rise)
        values = self.s.in_domain(torch.exp(-0.5 * self.a * (rise - lowest)), 0)
        below = 0.5 * (self.a * (self.peak.square() + lowest) + self.e * self.s.rstd.square())
        log_peak = -(below.double() + self.log_scale)
        return Density(values, log_peak, self.nearest)

    def gradient(self, weights: Weights, q: Tensor) -> DensityGradient:
        """``q``: the gradient of the weights less its mean under them."""
        s, rstd = self.s, self.s.rstd
        p = weights.values * q
        t0 = torch.zeros_like(rstd) if weights.clamped is None else torch.where(weights.clamped, s.sum(p), 0)
        p_gap = p * self.gap
        u1 = s.sum(p_gap) + self.peak * t0
        u2 = s.sum(p_gap * (self.gap + 2 * self.peak)) + self.peak * (self.peak * t0)  # not inf times a t0 of 0
        per_slice = (t0, t0 * rstd.square(), u1 * rstd, u2)
        return DensityGradient(
            element=-self.a * rstd * p * self.z,
            mean=self.a * rstd * u1,
            var=(self.a * u2 + self.e * rstd.square() * t0) * rstd,
            sums=torch.stack([sum_over_slices(t, s) for t in per_slice]),
        )
