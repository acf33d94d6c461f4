"""torch.nn modules, one file per family."""

from .daam import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from .gaam import FusedMultiHeadGAAM
from .paper import DensityAdaptiveTransformer, GroupedQueryAttention, GroupedQueryDAAM

__all__ = [
    "DensityAdaptiveTransformer",
    "FusedDAAM",
    "FusedDensityBlock",
    "FusedMultiHeadDAAM",
    "FusedMultiHeadGAAM",
    "GroupedQueryAttention",
    "GroupedQueryDAAM",
]
