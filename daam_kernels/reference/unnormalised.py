"""Densities that are weights as they are, not normalised, with biased statistics and d = x - mean:

    gate      w = sum_k share_k exp(-(d - offset_k)^2 / (2 (sqrt(var) c_k + eps)^2)),    var = max(E[d^2], 1e-6)
    gaussian  w = exp(-(d - offset)^2 / (2 c var)),    var = E[d^2] + 1e-8 + eps,    a Gaussian for each feature

The gate is that of arXiv 2512.07168, the other one Algorithm 1 of arXiv 2401.11143.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import Density, DensityGradient, Group, Slices, Variance, Weights, sum_over_slices


class Gate:
    """The Gaussians [heads, gaussians]; ``log_shares`` has the logarithms of what their sum gives to each."""

    normalised = False

    def __init__(self, mean_offsets: Tensor, c: Tensor, log_shares: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.parameters, self.eps = (mean_offsets, c, log_shares), eps
        self.rounded = tuple(p.to(dtype) for p in self.parameters)
        self.variance = Variance(added=0.0, floor=1e-6, biased=True)

    def of(self, group: Group, s: Slices) -> _GroupDensity:
        gaussians = []
        for numbers in zip(*(p.unbind(1) for p in self.rounded)):
            offset, c, log_share = map(group.heads, numbers)
            width = c + self.eps * s.rstd
            gaussians.append(_Gaussian(s, offset, width.pow(-2), log_share, c / width))
        return _GroupDensity(s, gaussians, sum_over_slices)

    def gradients(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dmean_offsets, dc, dlog_shares) from the sums of all heads."""
        mean_offsets, c, log_shares = self.parameters
        s0, s1, s2 = sums.unflatten(0, (3, -1)).transpose(1, 2).contiguous()
        return s1.to(mean_offsets.dtype), (s2 / c.double()).to(c.dtype), s0.to(log_shares.dtype)


class FeatureGaussian:
    """The Gaussians [heads, features], features being the axes of x behind the one that slices run along."""

    normalised = False

    def __init__(self, mean_offsets: Tensor, c: Tensor, log_shares: None, eps: float, dtype: torch.dtype) -> None:
        self.parameters = mean_offsets, c
        self.rounded = tuple(p.to(dtype) for p in self.parameters)
        self.variance = Variance(added=1e-8 + eps, biased=True)  # the paper's code adds the one, and the user the other

    def of(self, group: Group, s: Slices) -> _GroupDensity:
        offset, c = map(group.features, self.rounded)
        gaussian = _Gaussian(s, offset, 1 / c, torch.zeros_like(s.rstd), torch.ones_like(s.rstd))
        return _GroupDensity(s, [gaussian], self._sum_over_outer)

    def gradients(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(dmean_offsets, dc) from the sums of all heads."""
        mean_offsets, c = self.parameters
        _s0, s1, s2 = sums
        return s1.to(mean_offsets.dtype), (0.5 * s2 / c.double()).to(c.dtype)

    @staticmethod
    def _sum_over_outer(t: Tensor, s: Slices) -> Tensor:
        """Numbers per slice as [heads, features], in float64."""
        t = t.double().flatten(0, s.axis - 2) if s.axis > 1 else t.double().unsqueeze(0)
        return t.sum(0).flatten(1)


class _Gaussian:
    """One Gaussian among a group's slices: e = (d - offset) / sqrt(var), share exp(-inverse e^2 / 2).

    ``proportion``: how much of its width grows with sqrt(var).
    """

    def __init__(self, s: Slices, offset: Tensor, inverse: Tensor, log_share: Tensor, proportion: Tensor) -> None:
        self.s, self.offset, self.inverse = s, offset, inverse
        self.log_share, self.proportion = log_share, proportion

    def e(self) -> Tensor:
        return (self.s.deviation - self.offset) * self.s.rstd

    def density(self, e: Tensor) -> Tensor:
        # Not inverse e^2: where that overflows, the gradients would be 0 times infinity.
        return self.s.in_domain(torch.exp(self.log_share - 0.5 * e * (e * self.inverse)), 0)


class _GroupDensity:
    """The density of one group's slices; of tensors of x's size only a few at a time, whatever K is."""

    def __init__(self, s: Slices, gaussians: list[_Gaussian], total) -> None:
        self.s, self.gaussians, self.total = s, gaussians, total

    def density(self) -> Density:
        values = sum(g.density(g.e()) for g in self.gaussians)
        nearest = values.detach().max(self.s.axis, keepdim=True).indices
        return Density(values, torch.zeros_like(self.s.rstd), nearest)

    def gradient(self, weights: Weights, q: Tensor) -> DensityGradient:
        """``q``: the gradient of the weights."""
        s, element, mean, var, sums = self.s, 0, 0, 0, []
        for g in self.gaussians:
            e = g.e()
            p = g.density(e) * q
            slope = p * (e * g.inverse)
            s0, s1, s2 = s.sum(p), s.sum(slope) * s.rstd, s.sum(slope * e) * g.proportion
            element, mean, var = element - slope * s.rstd, mean + s1, var + s2 * s.rstd
            sums.append([self.total(t, s) for t in (s0, s1, s2)])
        if s.floored is not None:
            var = torch.where(s.floored, 0, var)
        return DensityGradient(element, mean, var, torch.stack([t for moment in zip(*sums) for t in moment]))
