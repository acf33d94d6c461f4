"""Where in a model modules hang that may be swapped, and which swaps would untie parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from .families import family
from .recognition import has_public_base, is_ours

# These hold on to parameters or compiled code, as an optimiser does. By name: importing them is slow.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"}


class Place(NamedTuple):
    path: str
    parent: nn.Module | None  # None: the model itself
    name: str
    module: nn.Module
    wrapper: str  # one of _WRAPPERS around it, or ""


def places(model: nn.Module, wanted: Callable[[nn.Module], object]) -> Iterator[Place]:
    """Everywhere in ``model`` that a wanted module hangs; not inside of one, unless it shares no more than the name."""
    seen = set()

    def walk(place: Place) -> Iterator[Place]:
        module = place.module
        if wanted(module):
            yield place
            if is_ours(module) or family(module) or has_public_base(module):
                return
        if module in seen:
            return
        seen.add(module)
        wrapper = type(module).__name__ if type(module).__name__ in _WRAPPERS else place.wrapper
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(Place(f"{place.path}.{name}".lstrip("."), module, name, child, wrapper))

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return walk(Place("", None, "", model, ""))


def torn(
    model: nn.Module,
    plan: dict[nn.Module, nn.Module],
    sources: Callable[[nn.Module], list[tuple[nn.Parameter, ...]]],
) -> list[nn.Module]:
    """Modules whose swap would untie a parameter: used outside of the plan, or in another order or company within."""
    inside = {part for module in plan if sources(module) for part in module.modules()}
    uses = defaultdict(set)
    for parameter in (p for part in model.modules() if part not in inside for p in part._parameters.values()):
        uses[id(parameter)].add("outside")
    for group in (group for module in plan for group in sources(module)):
        for index, parameter in enumerate(group):
            uses[id(parameter)].add((*map(id, group), index))
    return [m for m in plan if any(len(uses[id(p)]) > 1 for group in sources(m) for p in group)]
