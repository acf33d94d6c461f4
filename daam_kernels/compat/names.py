"""The public package's classes under its names: the same positional arguments, checkpoints and outputs, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules.daam import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from ..modules.feature import FusedMultiHeadFeatureDAAM
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


class MultiHeadDAAM(FusedMultiHeadFeatureDAAM):
    """The per-feature attention of the paper's code with its arguments, for one time step, which is all that one takes.

    Source: arXiv 2401.11143, public code. See :class:`daam_kernels.FusedMultiHeadFeatureDAAM`, also for several steps.

    Args:
        num_layers: layers of the encoder, a multiple of ``num_heads``.
        time_steps: not used, as in the public code.
        feature_size, num_heads, c, eps: as in :class:`daam_kernels.FusedMultiHeadFeatureDAAM`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    def __init__(
        self,
        num_layers: int,
        time_steps: int,
        feature_size: int,
        num_heads: int = 8,
        c: float = 2,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_layers, feature_size, num_heads, c, eps, device=device, dtype=dtype)
        if num_layers % num_heads:
            raise ValueError(f"num_layers must be a multiple of num_heads={num_heads}, got {num_layers}")
        self.attention_weights = [
            {name: [] for name in ("var", "mean", "c", "attention_maps")} for _ in range(num_heads)
        ]

    def forward(
        self, x: Tensor, save_attention_weights: bool = False, *, return_attention_details: bool = False
    ) -> Tensor | tuple[Tensor, list[dict[str, list[Tensor]]]] | tuple[Tensor, Tensor]:
        """y; or (y, ``attention_weights``), to which this call's maps were added; or (y, weights), of y's shape.

        Args:
            x: [batch, num_layers, feature_size]; further axes of size 1 are taken off.
            save_attention_weights: as in the public code, add the mean over the batch, [layers of a head,
                feature_size], to the list ``attention_maps`` of every head, which grows with every such call.
            return_attention_details: return the weights of this call, as the other modules do.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        """
        if isinstance(x, Tensor) and x.dim() > 3:
            x = x.reshape(x.shape[0], *(size for size in x.shape[1:] if size != 1))
        if isinstance(x, Tensor) and x.dim() != 3:
            raise ValueError(
                f"x must have shape [batch, num_layers={self.num_layers}, feature_size={self.feature_size}], one time "
                f"step, got {list(x.shape)}: FusedMultiHeadFeatureDAAM takes several"
            )
        if return_attention_details or not save_attention_weights:
            return super().forward(x, return_attention_details)
        y, weights = super().forward(x, True)
        for head, layers in zip(self.attention_weights, weights.mean(0).chunk(self.num_heads)):
            head["attention_maps"].append(layers)
        return y, self.attention_weights
