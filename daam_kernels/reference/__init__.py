"""The operator in plain PyTorch: the truth that every kernel is tested against."""

from .additive_attention import additive_attention
from .attention_pool import Scorer, attention_pool, multihead_attention_pool, ragged_attention_pool
from .density_attention import density_attention, density_attention_backward
from .feature import feature_density_attention
from .gate import density_gate
from .ragged import ragged_density_attention, ragged_density_attention_backward

__all__ = [
    "Scorer",
    "additive_attention",
    "attention_pool",
    "density_attention",
    "density_attention_backward",
    "density_gate",
    "feature_density_attention",
    "multihead_attention_pool",
    "ragged_attention_pool",
    "ragged_density_attention",
    "ragged_density_attention_backward",
]
