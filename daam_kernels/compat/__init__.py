"""The public package's names, so that one changed import line is enough; and ``fuse(model)``, for no change at all.

``from daam_kernels.compat import GaussianBlock`` in the place of ``from gaussian_adaptive_attention import ...`` takes
the same positional arguments and checkpoints and gives the same outputs (:mod:`daam_kernels.modules.daam` says what
differs). Or keep the model as it is: ``fuse(model)`` swaps the public package's modules inside it, ``unfuse(model)``
brings them back.
"""

from .fusion import fuse, fusion_report, unfuse
from .names import (
    DensityAdaptiveAttention,
    DensityBlock,
    GaussianAdaptiveAttention,
    GaussianBlock,
    MultiHeadDAAM,
    MultiHeadDensityAdaptiveAttention,
    MultiHeadGaussianAdaptiveAttention,
)
from .report import FusionReport

__all__ = [
    "DensityAdaptiveAttention",
    "DensityBlock",
    "FusionReport",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "MultiHeadDAAM",
    "MultiHeadDensityAdaptiveAttention",
    "MultiHeadGaussianAdaptiveAttention",
    "fuse",
    "fusion_report",
    "unfuse",
]
