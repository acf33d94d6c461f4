"""All families, and which one a module is of."""

from __future__ import annotations

from torch import nn

from .family import Family
from .product import Block, ProductHeads
from .recognition import original, role

_FAMILIES: tuple[Family, ...] = (ProductHeads("head"), ProductHeads("heads"), Block())


def family(module: nn.Module) -> Family | None:
    """The family whose attributes, parameters and submodules a module with a public class's name has, if any."""
    wanted = role(module)
    return next((each for each in _FAMILIES if each.role == wanted and each.fits(module)), None)


def family_of_original(fused: nn.Module) -> Family:
    """The family of what fuse made ``fused`` of."""
    return family(original(fused))
