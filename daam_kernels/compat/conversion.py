"""The two ways between a public module and ours, each for a whole model, so that what is shared or tied stays so."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .families import family, family_of_original
from .recognition import Skip, has_public_base, original, role


class Fusing:
    """Makes fused modules of the public ones; shared modules and tied parameters stay so."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, nn.Module] = {}
        self.parameters: dict[tuple[int, ...], nn.Parameter] = {}

    @staticmethod
    def sources(module: nn.Module) -> list[tuple[nn.Parameter, ...]]:
        """The parameters that the swap would replace, in the groups that become one each."""
        kind = family(module)
        return [] if kind.keeps_parameters else kind.sources(module)

    def convert(self, module: nn.Module) -> nn.Module:
        if module not in self.modules:
            kind = family(module)
            _check_bare(module, kind.buffers if kind else frozenset())
            _check_sure(module)
            new = kind.fuse(module, self)
            new.training = module.training
            bare = _bare_copy(module, kind.scratch)
            kind.check_sample(new, bare)
            new._fused_from = (bare,)
            self.modules[module] = new
        return self.modules[module]

    def stack(self, name: str, group: tuple[nn.Parameter, ...], shape: tuple[int, ...]) -> nn.Parameter:
        """[heads, size] of the heads' parameters, which must all have ``shape``, of that size."""
        key = tuple(map(id, group))
        if key not in self.parameters:
            alike = {(tuple(p.shape), p.dtype, p.device, p.requires_grad) for p in group}
            if len(alike) > 1 or group[0].shape != shape:
                raise Skip(f"its heads' {name} must have one shape, dtype, device and requires_grad, got {alike}")
            stacked = torch.stack([p.detach().flatten() for p in group])
            self.parameters[key] = nn.Parameter(stacked, requires_grad=group[0].requires_grad)
        return self.parameters[key]


class Restoring:
    """Makes the public modules of what Fusing made, with the values of now."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, nn.Module] = {}
        self.rows: dict[int, list[nn.Parameter]] = {}

    @staticmethod
    def sources(module: nn.Module) -> list[tuple[nn.Parameter, ...]]:
        kept = family_of_original(module).keeps_parameters
        return [] if kept else [(parameter,) for parameter in module.parameters()]

    def convert(self, fused: nn.Module) -> nn.Module:
        if fused not in self.modules:
            if original(fused) is None:
                raise Skip("not made by fuse()")
            kind = family_of_original(fused)
            _check_bare(fused, kind.buffers)
            self.modules[fused] = kind.restore(fused, copy.deepcopy(original(fused)), self)
        return self.modules[fused]

    def split(self, stacked: nn.Parameter, shape: tuple[int, ...]) -> list[nn.Parameter]:
        """A parameter of ``shape`` for every head."""
        if id(stacked) not in self.rows:
            rows = stacked.detach()
            self.rows[id(stacked)] = [nn.Parameter(row.clone().view(shape), stacked.requires_grad) for row in rows]
        return self.rows[id(stacked)]


def _check_bare(module: nn.Module, buffers: frozenset[str]) -> None:
    """Nothing hangs on the module that a swap would lose; ``buffers`` are known."""
    for part in module.modules():
        parameters = [p for p in part._parameters.values() if p is not None]
        for why, bad in {
            "is parametrized": is_parametrized(part),
            "has hooks": any(name.endswith("_hooks") and value for name, value in vars(part).items()),
            "has a forward of its own": "forward" in vars(part),
            "is compiled": getattr(part, "_compiled_call_impl", None) is not None,
            "has buffers": bool(part._buffers.keys() - buffers),
            "has parameters of a special type": any(type(p) is not nn.Parameter for p in parameters),
            "has hooks on its parameters": any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters),
        }.items():
            if bad:
                raise Skip(f"{type(part).__name__} {why}")


def _check_sure(module: nn.Module) -> None:
    for part in module.modules():
        name = type(part).__name__
        if has_public_base(part):
            raise Skip(f"{name} is a subclass of a public class")
        if role(part) and not (type(part).__bases__ == (nn.Module,) and family(part)):
            raise Skip(f"{name} has a public class's name, but not its base, attributes and parameters")


def _bare_copy(module: nn.Module, scratch: tuple[str, ...]) -> nn.Module:
    """A copy without the parameters and without what the last call left in the attributes ``scratch``."""
    left = [vars(part)[name] for part in module.modules() for name in scratch if name in vars(part)]
    try:
        bare = copy.deepcopy(module, {id(t): t.detach() for t in left if isinstance(t, torch.Tensor)})
    except Exception as error:  # a tensor with a graph kept as an attribute, say
        raise Skip(f"{type(module).__name__} cannot be copied: {error}") from None
    for part in bare.modules():
        part._parameters.update(dict.fromkeys(part._parameters))
        for name in scratch:
            vars(part).pop(name, None)
    return bare
