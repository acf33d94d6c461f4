"""fuse, unfuse and fusion_report: a plan for the whole model first, then the swap."""

from __future__ import annotations

import gc
import warnings
from typing import NamedTuple

import torch
from torch import nn

from .conversion import Fusing, Restoring
from .families import family
from .places import Place, places, torn
from .recognition import Skip, is_ours, original, role
from .report import FusionReport, classes


def fuse(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, verbose: bool = True) -> nn.Module:
    """Swap every module of the public package inside ``model`` for the fused one: ``model = fuse(model)``.

    GaussianAdaptiveAttention, MultiHeadGaussianAdaptiveAttention and GaussianBlock (and the Density names of the same
    code), the first generation's classes of the first two names, the paper's MultiHeadDAAM and the JEPA code's
    GAttnGateG are recognised by class name, attributes and the result of a small sample, without importing any of it.
    Outputs stay the same; so do parameter values, each head's eps, training mode, device, dtype, requires_grad and
    ties. The model is changed in place, and returned; only where it is such a module itself is a new one returned.

    Each swapped module (but the gate, which keeps its own) has new parameters, [num_heads, num_gaussians], under new
    state_dict keys (checkpoints of the public code still load), so **call it before the optimiser is made**, before
    DistributedDataParallel and before torch.compile. What cannot be swapped without losing something (hooks,
    parametrizations, subclasses, heads of different num_gaussians or padding values, parameters used elsewhere too) is
    left alone, with all in it. So is the paper's DAAM on its own, which mixes time and features beyond one time step,
    and which nothing says will be given one; its MultiHeadDAAM takes one. The first generation leaves out the remainder
    of an axis that its heads do not divide, and moves its input to its own device; the fused module does neither.

    Args:
        model: any module.
        optimizer: an optimiser to check before anything is changed. Others that are alive are found, and warned of.
        verbose: print what was swapped and what was skipped; :func:`fusion_report` returns it.

    Raises:
        ValueError: ``optimizer`` holds parameters that the model would no longer use. Nothing was changed.
    """
    return _swap(model, "fuse", _plan(model, role, Fusing()), optimizer, verbose)


def unfuse(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, verbose: bool = True) -> nn.Module:
    """Undo :func:`fuse`: the original classes come back, with the present parameter values: ``model = unfuse(model)``.

    Fused modules that fuse did not make, or that the original class cannot express (``padding_stats="exclude"``, say),
    are left alone. Arguments, errors and warnings are those of :func:`fuse`. What it needs travels with a fused module,
    deepcopy and pickle included (so unpickling needs the public package, as before fusing), but not in its state_dict.
    """
    return _swap(model, "unfuse", _plan(model, is_ours, Restoring()), optimizer, verbose)


def fusion_report(model: nn.Module) -> FusionReport:
    """What in ``model`` is fused by :func:`fuse`, and what public modules are not, with the reason."""
    plan = _plan(model, role, Fusing())
    skipped = plan.skipped | {place.path: "not fused yet: call fuse(model)" for place in plan.places}
    fused = {place.path: place.module for place in places(model, is_ours) if original(place.module) is not None}
    swapped = {path: classes(original(module), module) for path, module in fused.items()}
    return FusionReport(swapped, skipped, _notes({path: original(module) for path, module in fused.items()}))


class _Plan(NamedTuple):
    places: list[Place]  # where to swap
    new: dict[nn.Module, nn.Module]  # the replacement of each module there
    skipped: dict[str, str]  # why the others are not swapped, by path


def _plan(model, wanted, way) -> _Plan:
    """What is to be done; changes nothing."""
    found = list(places(model, wanted))
    new, reasons = {}, {}
    for place in found:
        try:
            if place.wrapper:
                raise Skip(f"inside {place.wrapper}, which must be applied after the swap")
            new[place.module] = way.convert(place.module)
        except Skip as skip:
            reasons[place.module] = str(skip)
    new = {module: replacement for module, replacement in new.items() if module not in reasons}
    while apart := torn(model, new, way.sources):
        for module in apart:
            del new[module]
            reasons[module] = "its parameters are also used elsewhere in the model"
    skipped = {place.path: reasons[place.module] for place in found if place.module not in new}
    return _Plan([place for place in found if place.module in new], new, skipped)


def _swap(model, verb, plan, optimizer, verbose) -> nn.Module:
    _check_optimizers(verb, plan.new, optimizer)
    for place in plan.places:
        if place.parent is None:
            model = plan.new[place.module]
        else:
            place.parent._modules[place.name] = plan.new[place.module]
    if verbose:
        swapped = {place.path: classes(place.module, plan.new[place.module]) for place in plan.places}
        notes = _notes({place.path: place.module for place in plan.places}) if verb == "fuse" else {}
        print(f"daam_kernels.{verb}: {FusionReport(swapped, plan.skipped, notes)}")
    return model


def _notes(originals: dict[str, nn.Module]) -> dict[str, str]:
    notes = {path: family(module).note(module) for path, module in originals.items()}
    return {path: note for path, note in notes.items() if note}


def _check_optimizers(verb, new, optimizer) -> None:
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    kept = {id(parameter) for module in new.values() for parameter in module.parameters()}
    dead = {id(parameter) for module in new for parameter in module.parameters()} - kept
    if not dead:
        return

    def complaint(candidate) -> str | None:
        held = sum(id(p) in dead for group in getattr(candidate, "param_groups", ()) for p in group["params"])
        return held and (
            f"{verb}(model) replaces {held} of the parameters that {type(candidate).__name__} optimises: it would go "
            f"on with tensors that the model no longer uses. Call {verb} before the optimiser is made, or make it anew"
        )

    if complaint(optimizer):
        raise ValueError(complaint(optimizer))
    for candidate in gc.get_objects():
        # type(), not isinstance: proxies among all these objects answer isinstance by running code of their own
        if issubclass(type(candidate), torch.optim.Optimizer) and complaint(candidate):
            warnings.warn(complaint(candidate), UserWarning, stacklevel=4)
