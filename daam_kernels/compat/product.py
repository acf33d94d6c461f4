"""The public package 0.1.5: a single head, many heads and blocks, each head a product of Gaussians."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..modules.daam import PARAMETERS, FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from .family import Family, Results, waves
from .recognition import Skip, holds, role


def heads_of(module: nn.Module) -> list[nn.Module]:
    return [module] if role(module) == "head" else list(module.attention_heads)


class Heads(Family):
    """``GaussianAdaptiveAttention`` and ``MultiHeadGaussianAdaptiveAttention``: heads become rows of parameters."""

    parameters: tuple[str, ...] = PARAMETERS
    attributes = {"norm_axis", "num_heads", "num_gaussians", "padding_value", "eps"}  # of a head

    def __init__(self, role: str) -> None:
        self.role = role

    def fits(self, module):
        if self.role == "head":
            return self.fits_head(module)
        return {"norm_axis", "num_heads"} <= vars(module).keys() and holds(module, "attention_heads", "head")

    def fits_head(self, head: nn.Module) -> bool:
        names = set(self.parameters)
        return set(head._parameters) == names and not head._modules and self.attributes <= vars(head).keys()

    def sources(self, module):
        return [tuple(getattr(head, name) for head in heads_of(module)) for name in self.parameters]

    def fuse(self, module, context):
        heads, axis = heads_of(module), module.norm_axis
        if not heads or (self.role == "heads" and module.num_heads != len(heads)):
            raise Skip(f"num_heads is {module.num_heads}, and there are {len(heads)} heads")
        if not all(map(self.fits_head, heads)):
            raise Skip("its heads are of different generations")
        for name in ("norm_axis", "num_gaussians", "padding_value"):
            values = [getattr(head, name) for head in heads]
            first = axis if name == "norm_axis" else values[0]
            if any(value is not first and value != first for value in values):
                raise Skip(f"its heads have different values of {name}: {values}")
        try:  # on meta: nothing is allocated, and the random generator stays where it is
            new = self.make(module, heads)
        except (TypeError, ValueError) as error:
            raise Skip(str(error)) from None
        for name, group in zip(self.parameters, self.sources(module)):
            setattr(new, name, context.stack(name, group, (heads[0].num_gaussians,)))
        return new

    def make(self, module: nn.Module, heads: list[nn.Module]) -> nn.Module:
        """Ours on the meta device, without values."""
        sizes = module.norm_axis, module.num_heads, heads[0].num_gaussians
        if self.role == "head":
            return FusedDAAM(*sizes, module.padding_value, eps=module.eps, device="meta")
        return FusedMultiHeadDAAM(*sizes, heads[0].padding_value, [head.eps for head in heads], device="meta")

    def restore(self, fused, module, context):
        if fused.padding_stats != "zero" or fused.normalize != "clamp":
            raise Skip("the original class has only padding_stats='zero' and normalize='clamp'")
        module.train(fused.training)
        module.norm_axis = fused.norm_axis
        for index, head in enumerate(heads_of(module)):
            head.norm_axis, head.padding_value = fused.norm_axis, fused.padding_value
            head.eps = fused.eps[index] if isinstance(fused.eps, tuple) else fused.eps
            for name in self.parameters:
                setattr(head, name, context.split(getattr(fused, name), (fused.num_gaussians,))[index])
        return module

    def sample(self, trial, twin):
        yield from sampled(trial, twin, heads_of(trial), [twin], details=True, remainder=1)


class Block(Family):
    """``GaussianBlock``: a list of layers, each of many heads."""

    role = "block"

    def fits(self, module):
        return holds(module, "layers", "heads")

    def sources(self, module):
        return [group for layer in module.layers for group in Heads("heads").sources(layer)]

    def fuse(self, module, context):
        new = FusedDensityBlock([], [], [], 0)
        new.layers.extend(context.convert(layer) for layer in module.layers)
        if not all(isinstance(layer, FusedMultiHeadDAAM) for layer in new.layers):
            raise Skip("its layers are of another generation")
        new.layers.training = module.layers.training
        return new

    def restore(self, fused, module, context):
        if len(fused.layers) != len(module.layers):
            raise Skip(f"it had {len(module.layers)} layers, and now has {len(fused.layers)}")
        module.training, module.layers.training = fused.training, fused.layers.training
        for index, layer in enumerate(fused.layers):
            module.layers[index] = context.convert(layer)
        return module

    def sample(self, trial, twin):
        heads = [head for layer in trial.layers for head in heads_of(layer)]
        yield from sampled(trial, twin, heads, list(twin.layers), details=True, remainder=1)


def sampled(
    trial: nn.Module, twin: nn.Module, heads: list, layers: list, *, details: bool, remainder: int
) -> Iterator[Results]:
    """Outputs, and details if asked for, of data with padding, with the clamp of the sum inactive and active."""
    for index, head in enumerate(heads):
        for number, name in enumerate(head._parameters):
            values = waves(head.num_gaussians, start=1 + index + 7 * number)
            setattr(head, name, nn.Parameter(1.5 + 0.5 * values if name == "c" else 0.1 * values))
    sizes = [2] + [1] * max(1, *(max(layer.norm_axis, -layer.norm_axis - 1) for layer in layers), 0)
    for layer in layers:
        layer.backend = "reference"
        axis = layer.norm_axis
        sizes[axis] = max(sizes[axis], 3 * len(layer.c) + remainder)
    x = waves(*sizes).flatten()
    for index, value in enumerate({layer.padding_value for layer in layers} - {None}):
        x[index::5] = value
    x = x.view(sizes)
    twin.load_state_dict(trial.state_dict())
    for eps in (None, 10.0):  # the second is above any sum of densities: it shows the clamp
        for part in heads + layers if eps else ():
            part.eps = eps
        yield trial(x), twin(x)
        if details:
            yield trial(x, True), twin(x, True)
