"""Which modules may be public ones, by class name alone: the families look at the rest. Nothing public is imported."""

from __future__ import annotations

from torch import nn

from ..modules.daam import FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from ..modules.feature import FusedMultiHeadFeatureDAAM
from ..modules.gaam import FusedMultiHeadGAAM
from ..modules.gate import FusedDensityGate

ROLES = {
    "GaussianAdaptiveAttention": "head", "MultiHeadGaussianAdaptiveAttention": "heads", "GaussianBlock": "block",
    "DensityAdaptiveAttention": "head", "MultiHeadDensityAdaptiveAttention": "heads", "DensityBlock": "block",
    "DAAM": "feature head", "MultiHeadDAAM": "feature heads", "GAttnGateG": "gate",
}  # fmt: skip
_OURS = (
    FusedDAAM, FusedMultiHeadDAAM, FusedDensityBlock, FusedMultiHeadGAAM, FusedMultiHeadFeatureDAAM, FusedDensityGate,
)  # fmt: skip


class Skip(Exception):
    """Why a module is left as it is."""


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, _OURS)


def role(module: nn.Module) -> str | None:
    """What a public class of this module's name, or of a base's, is; None for any other name and for our modules."""
    if is_ours(module):
        return None
    return next((ROLES[c.__name__] for c in type(module).__mro__ if c.__name__ in ROLES), None)


def has_public_base(module: nn.Module) -> bool:
    return any(base.__name__ in ROLES for base in type(module).__mro__[1:])


def holds(module: nn.Module, name: str, wanted: str) -> bool:
    """Whether all that ``module`` registers is a list ``name`` of modules with the role ``wanted``."""
    if module._parameters or set(module._modules) != {name} or type(module._modules[name]) is not nn.ModuleList:
        return False
    return all(role(child) == wanted for child in module._modules[name])


def original(fused: nn.Module) -> nn.Module | None:
    """What fuse made ``fused`` of, without its parameters. In a tuple, so that it is no submodule."""
    return fused.__dict__.get("_fused_from", (None,))[0]
