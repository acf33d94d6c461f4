"""Density adaptive attention (DAAM), fused: one GPU pass forward, custom backward, a PyTorch reference beside it."""

from . import reference
from .backends import available_backends
from .compat import fuse, fusion_report, unfuse
from .functional import density_attention
from .modules import (
    DensityAdaptiveTransformer,
    FusedDAAM,
    FusedDensityBlock,
    FusedDensityGate,
    FusedMultiHeadDAAM,
    FusedMultiHeadFeatureDAAM,
    FusedMultiHeadGAAM,
    GroupedQueryAttention,
    GroupedQueryDAAM,
)

__version__ = "0.1.0"

__all__ = [
    "DensityAdaptiveTransformer",
    "FusedDAAM",
    "FusedDensityBlock",
    "FusedDensityGate",
    "FusedMultiHeadDAAM",
    "FusedMultiHeadFeatureDAAM",
    "FusedMultiHeadGAAM",
    "GroupedQueryAttention",
    "GroupedQueryDAAM",
    "available_backends",
    "density_attention",
    "fuse",
    "fusion_report",
    "reference",
    "unfuse",
]
