"""The mixture of K Gaussians (the first generation of the Gaussian attention), d = x - mean:

    m(d) = sum_k share_k exp(-(d - offset_k)^2 / (2 var c_k^2))

Each Gaussian is taken relative to its own value at the element that is nearest to its centre, and these values relative
to the largest of them, so that the sum is 1 to K somewhere in every slice, however narrow or far the Gaussians are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import Density, DensityGradient, Group, Slices, Variance, Weights, sum_over_slices

_ABSENT = -1e300  # the log-share of a Gaussian that is not there: finite, so that a head of none has no NaN


class Mixture:
    """The Gaussians [heads, gaussians], worked out in float64 and rounded to ``dtype``."""

    normalised = True

    def __init__(self, mean_offsets: Tensor, c: Tensor, log_shares: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.variance = Variance(added=eps)
        self.parameters = mean_offsets, c, log_shares
        self.offsets = mean_offsets.double().to(dtype)
        self.inverse = c.double().pow(-2).to(dtype)
        self.log_shares = log_shares.double().clamp(min=_ABSENT)

    def of(self, group: Group, s: Slices) -> _GroupMixture:
        each = (tuple(group.heads(t) for t in p.unbind(1)) for p in (self.offsets, self.inverse, self.log_shares))
        return _GroupMixture(s, [_Gaussian(s, *numbers) for numbers in zip(*each)])

    def gradients(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dmean_offsets, dc, dlog_shares) from the sums of all heads."""
        mean_offsets, c, log_shares = self.parameters
        s0, s1, s2 = sums.unflatten(0, (3, -1)).transpose(1, 2).contiguous()
        widths = c.double()
        return (
            (s1 / widths.square()).to(mean_offsets.dtype),
            (s2 / widths.pow(3)).to(c.dtype),
            s0.to(log_shares.dtype),
        )


class _Gaussian:
    """One Gaussian among a group's slices: its e = (d - offset) / sqrt(var), from the element nearest to its centre."""

    def __init__(self, s: Slices, offset: Tensor, inverse: Tensor, log_share: Tensor) -> None:
        self.s, self.inverse = s, inverse
        self.index = s.nearest(s.standard - offset * s.rstd)
        self.near = s.at(self.index, s.standard) - offset * s.rstd
        self.lowest = s.lowest(self._rise(self.gap()))
        # A difference of such heights decides about the shares, and each may be huge: float64 for them.
        squares = self.near.double().square() + self.lowest.double()
        self.height = log_share - 0.5 * inverse.double() * squares

    def gap(self) -> Tensor:
        """e less the nearest one."""
        return self.s.apart(self.index) * self.s.rstd

    def density(self, highest: Tensor) -> Tensor:
        """Relative to exp(``highest``)."""
        level = (self.height - highest).to(self.inverse.dtype)
        rise = self._rise(self.gap()) - self.lowest
        return self.s.in_domain(torch.exp(level - 0.5 * self.inverse * rise), 0)

    def _rise(self, gap: Tensor) -> Tensor:
        return gap * (gap + 2 * self.near)  # e^2 - near^2, without cancellation


class _GroupMixture:
    """The density of one group's slices; of tensors of x's size only a few at a time, whatever K is."""

    def __init__(self, s: Slices, gaussians: list[_Gaussian]) -> None:
        self.s, self.gaussians = s, gaussians
        heights = [g.height.detach() for g in gaussians]
        self.highest = torch.stack(heights).amax(0)

    def density(self) -> Density:
        values = sum(g.density(self.highest) for g in self.gaussians)
        nearest = values.detach().max(self.s.axis, keepdim=True).indices
        return Density(values, self.highest, nearest)

    def gradient(self, weights: Weights, q: Tensor) -> DensityGradient:
        """``q``: the gradient of the weights less its mean under them."""
        s, rstd = self.s, self.s.rstd
        element, moments, shares = 0, [], []
        for g in self.gaussians:
            gap, w = g.gap(), g.density(self.highest) * weights.scale
            p = w * q
            p_gap = p * gap
            moments.append((s.sum(p), s.sum(p_gap), s.sum(p_gap * (gap + 2 * g.near))))
            shares.append(s.sum(w))
            element = element - g.inverse * rstd * (p_gap + p * g.near)

        # Over all Gaussians the first moments sum to t0, which is exactly 0 where the clamp is not active: what
        # rounding left is taken back from each by its share, before a far Gaussian enlarges it.
        t0 = sum(s0 for s0, _, _ in moments)
        excess = t0 if weights.clamped is None else torch.where(weights.clamped, 0, t0)
        mean, var, sums = 0, 0, []
        for g, share, (s0, p_gap, p_rise) in zip(self.gaussians, shares, moments):
            s0 = s0 - share * excess
            s1 = p_gap + g.near * s0
            s2 = p_rise + g.near * s0 * g.near
            mean, var = mean + g.inverse * rstd * s1, var + g.inverse * rstd * s2
            sums.append([sum_over_slices(t, s) for t in (s0, s1 * rstd, s2)])
        return DensityGradient(element, mean, var, torch.stack([t for moment in zip(*sums) for t in moment]))
