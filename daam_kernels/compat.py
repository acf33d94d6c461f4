"""The public package's names, so that one changed import line is enough; and ``fuse(model)``, for no change at all.

``from daam_kernels.compat import GaussianBlock`` in the place of ``from gaussian_adaptive_attention import ...`` takes
the same positional arguments and checkpoints and gives the same outputs (:mod:`daam_kernels.modules.daam` says what
differs). Or keep the model as it is: ``fuse(model)`` swaps the public package's modules inside it, ``unfuse(model)``
brings them back.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .modules.daam import _PARAMETERS, FusedDAAM, FusedDensityBlock, FusedMultiHeadDAAM
from .modules.gaam import FusedMultiHeadGAAM


_FIRST_GENERATION = {"initial_c", "initial_variance", "learnable_weights"}


class GaussianAdaptiveAttention(FusedDAAM):
    """The public package's single head, fused: see :class:`daam_kernels.FusedDAAM`."""


class MultiHeadGaussianAdaptiveAttention(FusedMultiHeadDAAM):
    """The multi-head of the public package, or of the public code's first generation, fused.

    ``(norm_axis, num_heads, num_gaussians, padding_value, eps)`` makes the package's, a product of Gaussians: see
    :class:`daam_kernels.FusedMultiHeadDAAM`. ``(norm_axis, num_heads, num_gaussians, initial_c, learnable_weights,
    padding_value, eps)`` makes the first generation's, a mixture: a :class:`daam_kernels.FusedMultiHeadGAAM`. It is so
    if more than five arguments are positional, or ``initial_c``, ``initial_variance`` (another name for it) or
    ``learnable_weights`` is named.
    """

    def __new__(cls, *arguments, **keywords):
        first_generation = len(arguments) > 5 or not _FIRST_GENERATION.isdisjoint(keywords)
        if cls is not MultiHeadGaussianAdaptiveAttention or not first_generation:
            return super().__new__(cls)
        if "initial_variance" in keywords:
            if "initial_c" in keywords or len(arguments) > 3:
                raise TypeError(f"{cls.__name__} takes initial_c or initial_variance, got both")
            keywords["initial_c"] = keywords.pop("initial_variance")
        return FusedMultiHeadGAAM(*arguments, **keywords)


class GaussianBlock(FusedDensityBlock):
    """The public package's block, fused: see :class:`daam_kernels.FusedDensityBlock`."""


class _NumDensities:
    """``num_densities`` as another name for ``num_gaussians``, which is the third argument everywhere."""

    def __init__(self, *arguments, num_densities=None, **keywords):
        given = (len(arguments) > 2 or "num_gaussians" in keywords) + (num_densities is not None)
        if given != 1:
            got = "both" if given else "neither"
            raise TypeError(f"{type(self).__name__} takes num_gaussians or num_densities, got {got}")
        if num_densities is not None:
            keywords["num_gaussians"] = num_densities
        super().__init__(*arguments, **keywords)


class DensityAdaptiveAttention(_NumDensities, FusedDAAM):
    """:class:`daam_kernels.FusedDAAM`; ``num_densities`` is another name for ``num_gaussians``."""


class MultiHeadDensityAdaptiveAttention(_NumDensities, FusedMultiHeadDAAM):
    """:class:`daam_kernels.FusedMultiHeadDAAM`; ``num_densities`` is another name for ``num_gaussians``."""


class DensityBlock(_NumDensities, FusedDensityBlock):
    """:class:`daam_kernels.FusedDensityBlock`; ``num_densities`` is another name for ``num_gaussians``."""


@dataclass(frozen=True)
class FusionReport:
    """What fuse or unfuse did, by the path of the module in the model, ``""`` being the model itself.

    swapped: the classes, as in "GaussianBlock -> FusedDensityBlock". skipped: why a module was left as it is.
    """

    swapped: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} module(s) swapped, {len(self.skipped)} skipped"]
        lines += [f"  {path or '(the model)'}: {classes}" for path, classes in self.swapped.items()]
        lines += [f"  {path or '(the model)'}: skipped, {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, verbose: bool = True) -> nn.Module:
    """Swap every module of the public package inside ``model`` for the fused one: ``model = fuse(model)``.

    GaussianAdaptiveAttention, MultiHeadGaussianAdaptiveAttention and GaussianBlock (and the Density names of the same
    code) are recognised by class name, attributes and the result of a small sample, without importing the package.
    Outputs stay the same; so do parameter values, each head's eps, training mode, device, dtype, requires_grad and
    ties. The model is changed in place, and returned; only where it is such a module itself is a new one returned.

    Each swapped module has new parameters, [num_heads, num_gaussians], under new state_dict keys (checkpoints of the
    public package still load), so **call it before the optimiser is made**, before DistributedDataParallel and before
    torch.compile. What cannot be swapped without losing something (hooks, parametrizations, subclasses, heads of
    different num_gaussians or padding values, parameters used elsewhere too) is left alone, with all in it.

    Args:
        model: any module.
        optimizer: an optimiser to check before anything is changed. Others that are alive are found, and warned of.
        verbose: print what was swapped and what was skipped; :func:`fusion_report` returns it.

    Raises:
        ValueError: ``optimizer`` holds parameters that the model would no longer use. Nothing was changed.
    """
    return _swap(model, "fuse", _plan(model, _kind, _Fusing()), optimizer, verbose)


def unfuse(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, verbose: bool = True) -> nn.Module:
    """Undo :func:`fuse`: the original classes come back, with the present parameter values: ``model = unfuse(model)``.

    Fused modules that fuse did not make, or that the original class cannot express (``padding_stats="exclude"``, say),
    are left alone. Arguments, errors and warnings are those of :func:`fuse`. What it needs travels with a fused module,
    deepcopy and pickle included (so unpickling needs the public package, as before fusing), but not in its state_dict.
    """
    return _swap(model, "unfuse", _plan(model, _is_ours, _Restoring()), optimizer, verbose)


def fusion_report(model: nn.Module) -> FusionReport:
    """What in ``model`` is fused by :func:`fuse`, and what of the public package is not, with the reason."""
    places, _, skipped = _plan(model, _kind, _Fusing())
    skipped |= {place.path: "not fused yet: call fuse(model)" for place in places}
    fused = [(p.path, p.module) for p in _places(model, _is_ours) if _original(p.module) is not None]
    return FusionReport({path: _classes(_original(module), module) for path, module in fused}, skipped)


_KINDS = {
    "GaussianAdaptiveAttention": "head", "MultiHeadGaussianAdaptiveAttention": "heads", "GaussianBlock": "block",
    "DensityAdaptiveAttention": "head", "MultiHeadDensityAdaptiveAttention": "heads", "DensityBlock": "block",
}  # fmt: skip
_CHILDREN = {"heads": ("attention_heads", "head"), "block": ("layers", "heads")}
_ATTRIBUTES = {"norm_axis", "num_heads", "num_gaussians", "padding_value", "eps"}
# These hold on to parameters or compiled code, as an optimiser does. By name: importing them is slow.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"}


class _Skip(Exception):
    """Why a module is left as it is."""


class _Place(NamedTuple):
    path: str
    parent: nn.Module | None  # None: the model itself
    name: str
    module: nn.Module
    wrapper: str  # one of _WRAPPERS around it, or ""


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (FusedDAAM, FusedMultiHeadDAAM, FusedDensityBlock))


def _classes(before: nn.Module, after: nn.Module) -> str:
    return f"{type(before).__name__} -> {type(after).__name__}"


def _kind(module: nn.Module) -> str | None:
    """head, heads or block for what has a public class's name, or a base of that name; _Fusing checks the rest."""
    if _is_ours(module):
        return None
    return next((_KINDS[c.__name__] for c in type(module).__mro__ if c.__name__ in _KINDS), None)


def _has_public_base(module: nn.Module) -> bool:
    return any(base.__name__ in _KINDS for base in type(module).__mro__[1:])


def _has_public_shape(module: nn.Module) -> bool:
    kind, attributes = _kind(module), vars(module).keys()
    if kind == "head":
        return set(module._parameters) == set(_PARAMETERS) and not module._modules and _ATTRIBUTES <= attributes
    if kind == "heads" and not {"norm_axis", "num_heads"} <= attributes:
        return False
    name, child_kind = _CHILDREN[kind]
    if module._parameters or set(module._modules) != {name} or type(module._modules[name]) is not nn.ModuleList:
        return False
    return all(_kind(child) == child_kind for child in module._modules[name])


def _places(model: nn.Module, wanted: Callable[[nn.Module], object]) -> Iterator[_Place]:
    """Everywhere in ``model`` that a wanted module hangs; not inside of one, unless it shares no more than the name."""
    seen = set()

    def walk(place: _Place) -> Iterator[_Place]:
        module = place.module
        if wanted(module):
            yield place
            if _is_ours(module) or _has_public_shape(module) or _has_public_base(module):
                return
        if module in seen:
            return
        seen.add(module)
        wrapper = type(module).__name__ if type(module).__name__ in _WRAPPERS else place.wrapper
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(_Place(f"{place.path}.{name}".lstrip("."), module, name, child, wrapper))

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return walk(_Place("", None, "", model, ""))


def _plan(model, wanted, way) -> tuple[list[_Place], dict[nn.Module, nn.Module], dict[str, str]]:
    """The places to swap, the replacement of each module there, and why the others are skipped; changes nothing."""
    places = list(_places(model, wanted))
    plan, reasons = {}, {}
    for place in places:
        try:
            if place.wrapper:
                raise _Skip(f"inside {place.wrapper}, which must be applied after the swap")
            plan[place.module] = way.convert(place.module)
        except _Skip as skip:
            reasons[place.module] = str(skip)
    plan = {module: new for module, new in plan.items() if module not in reasons}
    while torn := _torn(model, plan, way.sources):
        for module in torn:
            del plan[module]
            reasons[module] = "its parameters are also used elsewhere in the model"
    skipped = {place.path: reasons[place.module] for place in places if place.module not in plan}
    return [place for place in places if place.module in plan], plan, skipped


def _torn(model, plan, sources) -> list[nn.Module]:
    """Modules whose swap would untie a parameter: used outside of the plan, or in another order or company within."""
    inside = {part for module in plan for part in module.modules()}
    uses = defaultdict(set)
    for parameter in (p for part in model.modules() if part not in inside for p in part._parameters.values()):
        uses[id(parameter)].add("outside")
    for group in (group for module in plan for group in sources(module)):
        for index, parameter in enumerate(group):
            uses[id(parameter)].add((*map(id, group), index))
    return [m for m in plan if any(len(uses[id(p)]) > 1 for group in sources(m) for p in group)]


def _swap(model, verb, planned, optimizer, verbose) -> nn.Module:
    places, plan, skipped = planned
    _check_optimizers(verb, plan, optimizer)
    for place in places:
        if place.parent is None:
            model = plan[place.module]
        else:
            place.parent._modules[place.name] = plan[place.module]
    if verbose:
        swapped = {place.path: _classes(place.module, plan[place.module]) for place in places}
        print(f"daam_kernels.{verb}: {FusionReport(swapped, skipped)}")
    return model


def _check_optimizers(verb, plan, optimizer) -> None:
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    dead = {id(parameter) for module in plan for parameter in module.parameters()}
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


def _check_bare(module: nn.Module) -> None:
    for part in module.modules():
        parameters = [p for p in part._parameters.values() if p is not None]
        for why, bad in {
            "is parametrized": is_parametrized(part),
            "has hooks": any(name.endswith("_hooks") and value for name, value in vars(part).items()),
            "has a forward of its own": "forward" in vars(part),
            "is compiled": getattr(part, "_compiled_call_impl", None) is not None,
            "has buffers": bool(part._buffers),
            "has parameters of a special type": any(type(p) is not nn.Parameter for p in parameters),
            "has hooks on its parameters": any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters),
        }.items():
            if bad:
                raise _Skip(f"{type(part).__name__} {why}")


def _original(fused: nn.Module) -> nn.Module | None:
    """What fuse made ``fused`` of, without its parameters. In a tuple, so that it is no submodule."""
    return fused.__dict__.get("_fused_from", (None,))[0]


def _heads(module: nn.Module) -> list[nn.Module]:
    return [module] if _kind(module) == "head" else list(module.attention_heads)


class _Fusing:
    """Makes fused modules of the public package's; shared modules and tied parameters stay so."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, nn.Module] = {}
        self.parameters: dict[tuple[int, ...], nn.Parameter] = {}

    @staticmethod
    def sources(module: nn.Module) -> list[tuple[nn.Parameter, ...]]:
        """The parameters of the heads that become one, group by group."""
        layers = module.layers if _kind(module) == "block" else [module]
        return [tuple(getattr(h, name) for h in _heads(layer)) for layer in layers for name in _PARAMETERS]

    def convert(self, module: nn.Module) -> nn.Module:
        if module not in self.modules:
            _check_bare(module)
            self._check_sure(module)
            new = self._block(module) if _kind(module) == "block" else self._layer(module)
            new.training = module.training
            new._fused_from = (_bare_copy(module),)
            _check_sample(new, _original(new))
            self.modules[module] = new
        return self.modules[module]

    @staticmethod
    def _check_sure(module: nn.Module) -> None:
        for part in module.modules():
            name = type(part).__name__
            if _has_public_base(part):
                raise _Skip(f"{name} is a subclass of a public class")
            if _kind(part) and not (type(part).__bases__ == (nn.Module,) and _has_public_shape(part)):
                raise _Skip(f"{name} has a public class's name, but not its base, attributes and parameters")

    def _block(self, block: nn.Module) -> FusedDensityBlock:
        new = FusedDensityBlock([], [], [], 0)
        new.layers.extend(self.convert(layer) for layer in block.layers)
        new.layers.training = block.layers.training
        return new

    def _layer(self, module: nn.Module) -> FusedDAAM | FusedMultiHeadDAAM:
        single = _kind(module) == "head"
        heads, axis, num_heads = _heads(module), module.norm_axis, module.num_heads
        if not heads or (not single and num_heads != len(heads)):
            raise _Skip(f"num_heads is {num_heads}, and there are {len(heads)} heads")
        for name in ("norm_axis", "num_gaussians", "padding_value"):
            values = [getattr(head, name) for head in heads]
            first = axis if name == "norm_axis" else values[0]
            if any(value is not first and value != first for value in values):
                raise _Skip(f"its heads have different values of {name}: {values}")
        gaussians, padding, eps = heads[0].num_gaussians, heads[0].padding_value, [head.eps for head in heads]
        try:  # on meta: nothing is allocated, and the random generator stays where it is
            if single:
                new = FusedDAAM(axis, num_heads, gaussians, padding, eps=eps[0], device="meta")
            else:
                new = FusedMultiHeadDAAM(axis, num_heads, gaussians, padding, eps, device="meta")
        except (TypeError, ValueError) as error:
            raise _Skip(str(error)) from None
        for name, group in zip(_PARAMETERS, self.sources(module)):
            setattr(new, name, self._stack(name, group, gaussians))
        return new

    def _stack(self, name: str, group: tuple[nn.Parameter, ...], gaussians: int) -> nn.Parameter:
        key = tuple(map(id, group))
        if key not in self.parameters:
            alike = {(tuple(p.shape), p.dtype, p.device, p.requires_grad) for p in group}
            if len(alike) > 1 or group[0].shape != (gaussians,):
                raise _Skip(f"its heads' {name} must have one shape, dtype, device and requires_grad, got {alike}")
            stacked = torch.stack([p.detach() for p in group])
            self.parameters[key] = nn.Parameter(stacked, requires_grad=group[0].requires_grad)
        return self.parameters[key]


class _Restoring:
    """Makes the public package's modules of what _Fusing made, with the values of now."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, nn.Module] = {}
        self.rows: dict[int, list[nn.Parameter]] = {}

    @staticmethod
    def sources(module: nn.Module) -> list[tuple[nn.Parameter, ...]]:
        return [(parameter,) for parameter in module.parameters()]

    def convert(self, fused: nn.Module) -> nn.Module:
        if fused not in self.modules:
            if _original(fused) is None:
                raise _Skip("not made by fuse()")
            _check_bare(fused)
            self.modules[fused] = (self._block if isinstance(fused, FusedDensityBlock) else self._layer)(fused)
        return self.modules[fused]

    def _block(self, fused: FusedDensityBlock) -> nn.Module:
        block = copy.deepcopy(_original(fused))
        if len(fused.layers) != len(block.layers):
            raise _Skip(f"it had {len(block.layers)} layers, and now has {len(fused.layers)}")
        block.training, block.layers.training = fused.training, fused.layers.training
        for index, layer in enumerate(fused.layers):
            block.layers[index] = self.convert(layer)
        return block

    def _layer(self, fused: FusedDAAM | FusedMultiHeadDAAM) -> nn.Module:
        if fused.padding_stats != "zero" or fused.normalize != "clamp":
            raise _Skip("the original class has only padding_stats='zero' and normalize='clamp'")
        module = copy.deepcopy(_original(fused)).train(fused.training)
        module.norm_axis = fused.norm_axis
        for index, head in enumerate(_heads(module)):
            head.norm_axis, head.padding_value = fused.norm_axis, fused.padding_value
            head.eps = fused.eps[index] if isinstance(fused.eps, tuple) else fused.eps
            for name in _PARAMETERS:
                setattr(head, name, self._split(getattr(fused, name))[index])
        return module

    def _split(self, stacked: nn.Parameter) -> list[nn.Parameter]:
        if id(stacked) not in self.rows:
            self.rows[id(stacked)] = [nn.Parameter(row.clone(), stacked.requires_grad) for row in stacked.detach()]
        return self.rows[id(stacked)]


def _bare_copy(module: nn.Module) -> nn.Module:
    try:
        bare = copy.deepcopy(module)
    except Exception as error:  # a tensor with a graph kept as an attribute, say
        raise _Skip(f"{type(module).__name__} cannot be copied: {error}") from None
    for part in bare.modules():
        part._parameters.update(dict.fromkeys(part._parameters))
    return bare


def _check_sample(fused: nn.Module, original: nn.Module) -> None:
    """Run both on a small sample: code under a public name may still compute something else."""
    trial, twin = copy.deepcopy(original), copy.deepcopy(fused).to_empty(device="cpu").double()
    heads = [part for part in trial.modules() if _kind(part) == "head"]
    layers = [part for part in twin.modules() if isinstance(part, (FusedDAAM, FusedMultiHeadDAAM))]
    for index, head in enumerate(heads):
        steps = torch.arange(1 + index, 1 + index + head.num_gaussians, dtype=torch.float64, device="cpu")
        head.mean_offsets, head.c = nn.Parameter(0.1 * steps.sin()), nn.Parameter(1.5 + 0.5 * steps.cos())
    sizes = [2] + [1] * max(1, *(max(layer.norm_axis, -layer.norm_axis - 1) for layer in layers), 0)
    for layer in layers:
        layer.backend = "reference"
        sizes[layer.norm_axis] = max(sizes[layer.norm_axis], 2 * len(layer.c) + 1)
    try:
        x = torch.arange(1, 1 + torch.Size(sizes).numel(), dtype=torch.float64, device="cpu").sin()
        for index, value in enumerate({layer.padding_value for layer in layers} - {None}):
            x[index::5] = value
        x = x.view(sizes)
        twin.load_state_dict(trial.state_dict())
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            for eps in (None, 10.0):  # the second is above any sum of densities: it shows the clamp
                for part in heads + layers if eps else ():
                    part.eps = eps
                for results in (trial(x), twin(x)), (trial(x, True), twin(x, True)):
                    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12, equal_nan=True)
    except Exception as error:
        what = str(error).strip().partition("\n")[0]
        raise _Skip(f"{type(original).__name__} computes something else than the public class: {what}") from None
