"""What every density needs of x before and after it: slices, padding, mean and variance, normalised weights.

Statistics are taken of x - x0, x0 being the slice's first valid element: a mean is never held in one float, which is
what loses digits on data with an offset.
"""

from __future__ import annotations

import math
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Heads of equal chunks: ``cut`` takes them out of a tensor of x's shape, ``heads`` out of one per head."""

    cut: Callable[[Tensor], Tensor]  # to [..., heads, n, ...]
    heads: Callable[[Tensor], Tensor]  # [num_heads] to [heads, 1, ...], which broadcasts over slices
    features: Callable[[Tensor], Tensor]  # [num_heads, features behind the axis], likewise


class Slices(NamedTuple):
    """A group's slices, standardised; tensors [..., heads, n, ...], where n is 1 for numbers per slice."""

    x: Tensor
    axis: int  # of n
    valid: Tensor | None  # None: all of them
    domain: Tensor | None  # elements whose density is in the sum; None: all of them
    count: Tensor | int  # elements that the statistics count
    freedom: Tensor | int  # what the variance divides by
    skipped: Tensor | None  # slices left as they are, for want of two valid elements
    shifted: Tensor  # x - x0
    rstd: Tensor
    floored: Tensor | None  # slices whose variance is the smallest allowed; None: there is no such
    deviation: Tensor  # x - mean
    standard: Tensor  # (x - mean) / sqrt(var)

    def nearest(self, z: Tensor) -> Tensor:
        """Where in each slice z is smallest in size."""
        return self.in_domain(z.detach().square(), math.inf).min(self.axis, keepdim=True).indices

    def lowest(self, t: Tensor) -> Tensor:
        """The smallest t of each slice, without a gradient."""
        return self.in_domain(t, math.inf).detach().amin(self.axis, keepdim=True)

    def at(self, index: Tensor, t: Tensor) -> Tensor:
        """The element of t at an index of each slice."""
        return t.gather(self.axis, index)

    def apart(self, index: Tensor) -> Tensor:
        """x less the element of x at an index of each slice."""
        return self.shifted - self.at(index, self.shifted)

    def sum(self, t: Tensor) -> Tensor:
        return t.sum(self.axis, keepdim=True)

    def in_domain(self, t: Tensor, otherwise: float) -> Tensor:
        return t if self.domain is None else torch.where(self.domain, t, otherwise)


class Density(NamedTuple):
    """m of every element, relative to exp(``log_peak``), which is about the largest of its slice."""

    values: Tensor
    log_peak: Tensor  # where it is large, in float64
    nearest: Tensor  # where in the slice it is largest


class DensityGradient(NamedTuple):
    """Where the gradient of log m goes: [..., heads, n, ...], n is 1 for mean and var."""

    element: Tensor  # to x_j as it stands in m
    mean: Tensor  # to the mean
    var: Tensor  # to the variance, times 2 sqrt(var)
    sums: Tensor  # [numbers, heads], over slices: what the gradients of the parameters are made of


class Weights(NamedTuple):
    """Normalised densities [..., heads, n, ...]; numbers per slice below."""

    values: Tensor
    scale: Tensor  # what turns relative densities into them
    clamped: Tensor | None  # slices whose sum is below eps; None: it is not asked


def valid_elements(x: Tensor, padding_value: float | None, mask: Tensor | None) -> Tensor | None:
    """Where x counts, of x's shape; None: everywhere."""
    valid = None if padding_value is None else x != padding_value
    if mask is None:
        return valid
    mask = mask.expand_as(x)
    return mask if valid is None else valid & mask


def groups(x: Tensor, num_heads: int, axis: int) -> Iterator[Group]:
    """The heads along ``axis`` of x in at most two groups of equal chunks, the last one apart if it has a remainder."""
    chunk, remainder = x.shape[axis] // num_heads, x.shape[axis] % num_heads  # torch.compile refuses divmod
    parts = [(0, num_heads, chunk)]
    if remainder:
        parts = [(0, num_heads - 1, chunk), (num_heads - 1, 1, chunk + remainder)]
    for first, heads, n in parts:
        if heads == 0:
            continue

        def cut(t: Tensor, start=first * chunk, heads=heads, n=n) -> Tensor:
            return t.narrow(axis, start, heads * n).unflatten(axis, (heads, n))

        def of_heads(t: Tensor, first=first, heads=heads) -> Tensor:
            return t[first : first + heads].view((heads,) + (1,) * (x.dim() - axis))

        def of_features(t: Tensor, first=first, heads=heads) -> Tensor:
            return t[first : first + heads].reshape(heads, 1, *x.shape[axis + 1 :])

        yield Group(cut, of_heads, of_features)


class Variance(NamedTuple):
    """What the variance is: E[(x - mean)^2], unbiased or not, then ``added`` to, and at least ``floor``."""

    added: float
    floor: float = 0.0
    biased: bool = False


def standardise(x: Tensor, valid: Tensor | None, axis: int, padding_stats: str, variance: Variance) -> Slices:
    """The statistics of the slices [..., heads, n, ...] along ``axis``, x being of the arithmetic type."""
    n = x.shape[axis]
    fewest = 1 if variance.biased else 2
    exclude = valid is not None and padding_stats == "exclude"
    if valid is None:
        x0 = x.narrow(axis, 0, 1).detach()
        shifted = counted = x - x0
        count, skipped = n, None
    else:
        first = valid.to(torch.uint8).max(axis, keepdim=True).indices
        x0 = torch.where(valid, x, 0).gather(axis, first).detach()
        if exclude:
            shifted = counted = torch.where(valid, x - x0, 0)
            total = valid.sum(axis, keepdim=True)
            count, skipped = total.clamp(min=fewest).to(x.dtype), None if variance.biased else total < 2
        else:
            shifted, counted = x - x0, torch.where(valid, x, 0) - x0
            count, skipped = n, None

    mean = counted.sum(axis, keepdim=True) / count
    apart = counted - mean
    if exclude:
        apart = torch.where(valid, apart, 0)
    freedom = count if variance.biased else count - 1
    if variance.biased:  # |x| of 1e18 squared may not be added up in float32
        var = (apart.square() / freedom).sum(axis, keepdim=True)
    else:
        var = apart.square().sum(axis, keepdim=True) / freedom
    var, floored = var + variance.added, None
    if variance.floor:
        var, floored = var.clamp(min=variance.floor), var < variance.floor
    rstd = var.sqrt().reciprocal()
    domain = (valid if skipped is None else valid | skipped) if exclude else None
    deviation = shifted - mean
    return Slices(x, axis, valid, domain, count, freedom, skipped, shifted, rstd, floored, deviation, deviation * rstd)


def normalise(s: Slices, density: Density, normalize: str, eps: float) -> Weights:
    """The weights of all elements, from their densities."""
    log_norm, log_peak = s.sum(density.values).double().log(), density.log_peak
    clamped = None
    if normalize == "clamp":
        log_peak = log_peak - math.log(eps)
        clamped = log_norm + log_peak < 0
        log_norm = torch.maximum(log_norm, -log_peak)
    scale = torch.exp(-log_norm).to(density.values.dtype)
    values = density.values * scale
    if s.skipped is not None:
        values = torch.where(s.skipped, s.valid.to(values.dtype), values)
    return Weights(values, scale, clamped)


def as_they_are(density: Density) -> Weights:
    """Weights of a density that is not normalised, as if a clamp at 1 were active everywhere."""
    return Weights(density.values, torch.ones_like(density.log_peak), density.values.new_ones((), dtype=torch.bool))


def sum_over_slices(t: Tensor, s: Slices) -> Tensor:
    """Numbers per slice as [heads], in float64."""
    return t.sum([d for d in range(t.dim()) if d != s.axis - 1], dtype=torch.float64)
