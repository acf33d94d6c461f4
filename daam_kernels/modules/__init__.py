"""torch.nn modules, one file per family."""

from .additive import AdditiveAttention
from .daam import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from .feature import FusedMultiHeadFeatureDAAM
from .gaam import FusedMultiHeadGAAM
from .gate import FusedDensityGate
from .grouped_query import GroupedQueryAttention
from .paper import DensityAdaptiveTransformer, GroupedQueryDAAM
from .pooling import AttentionPool

__all__ = [
    "AdditiveAttention",
    "AttentionPool",
    "DensityAdaptiveTransformer",
    "FusedDAAM",
    "FusedDensityBlock",
    "FusedDensityGate",
    "FusedMultiHeadDAAM",
    "FusedMultiHeadFeatureDAAM",
    "FusedMultiHeadGAAM",
    "GroupedQueryAttention",
    "GroupedQueryDAAM",
]
