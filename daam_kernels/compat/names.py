"""The public package's classes under its names: the same positional arguments, checkpoints and outputs, fused."""

from __future__ import annotations

from ..modules.daam import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from ..modules.gaam import FusedMultiHeadGAAM

_FIRST_GENERATION = {"initial_c", "initial_variance", "learnable_weights"}


class GaussianAdaptiveAttention(FusedDAAM):
    """The public package's single head, fused: see :class:`daam_kernels.FusedDAAM`."""


class MultiHeadGaussianAdaptiveAttention(FusedMultiHeadDAAM):
    """The multi-head of the public package, or of the public code's first generation, fused.

    ``(norm_axis, num_heads, num_gaussians, padding_value, eps)`` makes the package's, a product of Gaussians: see
    :class:`daam_kernels.FusedMultiHeadDAAM`. ``(norm_axis, num_heads, num_gaussians, initial_c, learnable_weights,
    padding_value, eps)`` makes the first generation's, a mixture: a :class:`daam_kernels.FusedMultiHeadGAAM`. It is so
    if more than five arguments are positional, or ``initial_c``, ``initial_variance`` (another name for it) or
    ``learnable_weights`` is named.
    """

    def __new__(cls, *arguments, **keywords):
        first_generation = len(arguments) > 5 or not _FIRST_GENERATION.isdisjoint(keywords)
        if cls is not MultiHeadGaussianAdaptiveAttention or not first_generation:
            return super().__new__(cls)
        if "initial_variance" in keywords:
            if "initial_c" in keywords or len(arguments) > 3:
                raise TypeError(f"{cls.__name__} takes initial_c or initial_variance, got both")
            keywords["initial_c"] = keywords.pop("initial_variance")
        return FusedMultiHeadGAAM(*arguments, **keywords)


class GaussianBlock(FusedDensityBlock):
    """The public package's block, fused: see :class:`daam_kernels.FusedDensityBlock`."""


class _NumDensities:
    """``num_densities`` as another name for ``num_gaussians``, which is the third argument everywhere."""

    def __init__(self, *arguments, num_densities=None, **keywords):
        given = (len(arguments) > 2 or "num_gaussians" in keywords) + (num_densities is not None)
        if given != 1:
            got = "both" if given else "neither"
            raise TypeError(f"{type(self).__name__} takes num_gaussians or num_densities, got {got}")
        if num_densities is not None:
            keywords["num_gaussians"] = num_densities
        super().__init__(*arguments, **keywords)


class DensityAdaptiveAttention(_NumDensities, FusedDAAM):
    """:class:`daam_kernels.FusedDAAM`; ``num_densities`` is another name for ``num_gaussians``."""


class MultiHeadDensityAdaptiveAttention(_NumDensities, FusedMultiHeadDAAM):
    """:class:`daam_kernels.FusedMultiHeadDAAM`; ``num_densities`` is another name for ``num_gaussians``."""


class DensityBlock(_NumDensities, FusedDensityBlock):
    """:class:`daam_kernels.FusedDensityBlock`; ``num_densities`` is another name for ``num_gaussians``."""
