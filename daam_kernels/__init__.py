"""Density adaptive attention (DAAM), fused: one GPU pass forward, custom backward, a PyTorch reference beside it."""

from . import reference
from .additive import additive_attention
from .backends import available_backends
from .compat import fuse, fusion_report, unfuse
from .functional import density_attention
from .mechanism import AttentionMechanism
from .modules import (
    AdditiveAttention,
    AttentionPool,
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
from .pooling import attention_pool

__version__ = "0.1.0"

__all__ = [
    "AdditiveAttention",
    "AttentionMechanism",
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
    "additive_attention",
    "attention_pool",
    "available_backends",
    "density_attention",
    "fuse",
    "fusion_report",
    "reference",
    "unfuse",
]
