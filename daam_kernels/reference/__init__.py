"""The operator in plain PyTorch: the truth that every kernel is tested against."""

from .density_attention import density_attention, density_attention_backward

__all__ = ["density_attention", "density_attention_backward"]
