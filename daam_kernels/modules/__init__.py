"""torch.nn modules, one file per family."""

from .daam import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from .gaam import FusedMultiHeadGAAM

__all__ = ["FusedDAAM", "FusedDensityBlock", "FusedMultiHeadDAAM", "FusedMultiHeadGAAM"]
