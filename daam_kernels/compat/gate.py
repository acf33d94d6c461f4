"""The density gate of the JEPA training code."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..modules.gate import FusedDensityGate
from .family import Family, waves
from .recognition import Skip, role


class GateDensity(Family):
    """The gate's own ``GaussianAdaptiveAttention``, which has ``log_sigma``. Fused only as a part of the gate."""

    role = "head"
    buffers = frozenset({"_log_sqrt_2pi"})  # a constant, not in its checkpoints

    def fits(self, module):
        return (
            set(module._parameters) == {"mean_offsets", "log_sigma"}
            and not module._modules
            and {"norm_axis", "num_gaussians"} <= vars(module).keys()
        )

    def fuse(self, module, context):
        raise Skip("the density of a GAttnGateG, which is fused only as a part of one")


class Gate(Family):
    """``GAttnGateG``. Ours has the same parameters, under the same names."""

    role = "gate"
    keeps_parameters = True
    buffers = GateDensity.buffers
    tolerance = 1e-4  # the public gate computes in float32, whatever it is given

    def fits(self, module):
        return (
            set(module._parameters) == {"alpha"}
            and set(module._modules) == {"to_attn", "gaa"}
            and type(module.to_attn) is nn.Conv1d
            and role(module.gaa) == "head"
            and GateDensity().fits(module.gaa)
        )

    def fuse(self, module, context):
        convolution, density = module.to_attn, module.gaa
        pointwise = nn.Conv1d(convolution.in_channels, 1, 1, device="meta")
        if repr(convolution) != repr(pointwise):
            raise Skip(f"to_attn must be {pointwise!r}, got {convolution!r}")
        if density.norm_axis not in (2, -1) or getattr(density, "padding_value", None) is not None:
            raise Skip(
                f"its density must be along time and without padding, got norm_axis={density.norm_axis!r} and "
                f"padding_value={getattr(density, 'padding_value', None)!r}"
            )
        try:
            new = FusedDensityGate(convolution.in_channels, density.num_gaussians, device="meta")
        except (TypeError, ValueError) as error:
            raise Skip(str(error)) from None
        own = dict(new.named_parameters())
        for name, parameter in module.named_parameters():
            if parameter.shape != own[name].shape:
                raise Skip(f"{name} must have shape {list(own[name].shape)}, got {list(parameter.shape)}")
        _give(new, module)
        return new

    def restore(self, fused, module, context):
        if fused.padding_stats != "exclude":
            raise Skip("the original class knows no padding")
        _give(module, fused)
        module.train(fused.training)
        _fill_constant(module.gaa, fused.alpha.device)
        return module

    def sample(self, trial, twin):
        twin.backend = "reference"
        _fill_constant(trial.gaa.float(), "cpu")
        trial.alpha = nn.Parameter(torch.tensor(0.75))
        # Falling off, for the sum of many channels would lose digits in float32.
        falling = torch.arange(1, 1 + twin.channels, dtype=torch.float64, device="cpu").square().reciprocal()
        trial.to_attn.weight = nn.Parameter(falling.float().view(1, -1, 1))
        trial.to_attn.bias = nn.Parameter(torch.tensor([0.5]))
        trial.gaa.mean_offsets = nn.Parameter(0.1 * waves(twin.num_gaussians).float())
        trial.gaa.log_sigma = nn.Parameter(3 * waves(twin.num_gaussians, start=3).float())
        twin.load_state_dict(trial.state_dict())
        x = waves(2, twin.channels, 9)
        for scale in (1, 1e-6):  # the second is below the floor of the deviation
            trial.to_attn.bias.mul_(float(scale == 1))  # float32 would not see so little beside it
            trial.gaa.mean_offsets.mul_(scale)
            twin.gaa["mean_offsets"].mul_(scale)
            theirs, ours = trial((scale * x).float()), twin(scale * x)
            yield theirs, tuple(t.float() for t in ours)


def _fill_constant(density: nn.Module, device: torch.device | str) -> None:
    for name, buffer in density._buffers.items():
        density._buffers[name] = torch.full_like(buffer, 0.5 * math.log(2 * math.pi), device=device)


def _give(to: nn.Module, of: nn.Module) -> None:
    """The parameters of one gate to the other, as they are."""
    to.alpha = of.alpha
    to.to_attn.weight, to.to_attn.bias = of.to_attn.weight, of.to_attn.bias
    for name in ("mean_offsets", "log_sigma"):
        setattr(to.gaa, name, getattr(of.gaa, name))
