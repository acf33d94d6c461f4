"""Density adaptive attention (DAAM), fused: one GPU pass forward, custom backward, a PyTorch reference beside it."""

from . import reference
from .backends import available_backends
from .functional import density_attention

__version__ = "0.1.0"

__all__ = ["available_backends", "density_attention", "reference"]
