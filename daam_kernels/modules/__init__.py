"""torch.nn modules, one file per family."""

from .daam import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM

__all__ = ["FusedDAAM", "FusedDensityBlock", "FusedMultiHeadDAAM"]
