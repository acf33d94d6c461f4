"""All families, and which one a module is of."""

from __future__ import annotations

from torch import nn

from .family import Family
from .feature import FeatureHead, FeatureHeads
from .gate import Gate, GateDensity
from .mixture import MixtureHeads
from .product import Block, Heads
from .recognition import original, role

# In this order: a product's list of heads is recognised by their class name alone, so that a wrong head is named.
_FAMILIES: tuple[Family, ...] = (
    *(MixtureHeads(role, learned) for role in ("head", "heads") for learned in (True, False)),
    *(Heads(role) for role in ("head", "heads")),
    Block(),
    FeatureHead(),
    FeatureHeads(),
    GateDensity(),
    Gate(),
)


def family(module: nn.Module) -> Family | None:
    """The family whose attributes, parameters and submodules a module with a public class's name has, if any."""
    wanted = role(module)
    return next((each for each in _FAMILIES if each.role == wanted and each.fits(module)), None)


def family_of_original(fused: nn.Module) -> Family:
    """The family of what fuse made ``fused`` of."""
    return family(original(fused))
