"""Attention weights averaged over a data set, by asking the modules of a model that runs over it."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_dense

_DETAILS = "return_attention_details"


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    modules: Sequence[str] | None = None,
    average_over: int | Sequence[int] = 0,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The attention weights of every density module in ``model``, averaged over a data set.

    The model runs once per batch, in evaluation mode and without gradients; its modes and hooks are afterwards as they
    were, also if something raises. Only running sums are kept, in float64. Every sample counts the same, whatever the
    sizes of the batches. Padding (a module's ``padding_value``, and the ``mask`` it is called with) does not count.

    Args:
        model: density modules are those whose forward takes ``return_attention_details`` and returns (y, weights) or
            (y, {key: weights}); of nested ones the outermost is asked. Those of the public package are taken too.
        loader: gives tensors, for ``model(batch)``; tuples or lists such as (inputs, targets), for ``model(inputs)``;
            or dicts, for ``model(**batch)``.
        modules: names, as in ``model.named_modules()``, of the modules to ask in the place of all of them.
        average_over: the axes of the weights to average over. Those left need the same size in every batch: where
            time is axis 1 and changes, take (0, 1), for which every valid frame counts the same.
        forward: ``forward(model, batch)`` runs the model, in the place of what is said at ``loader``.
        device: where batches are moved to. None: where the model's parameters are.
        limit: batches to take at most. None: all.
        progress: show a bar with tqdm, or, where that is not installed, count batches on the standard error.

    Returns:
        By module name, with ``.layer_0``, ... for a block (where the model itself is the module: its class name, or
        ``layer_0``, ...): the weights' mean, float64, on the CPU, of the shape of the weights without
        ``average_over``; NaN where all samples are padding.

    Raises:
        TypeError, ValueError: an argument does not fit, a module was not called, weights are not finite, or the shape
            left changes from batch to batch; the message says where.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if limit is not None:
        check_count("limit", limit, 1)
    axes = _check_axes(average_over)
    listeners = [_Listener(name, module, axes) for name, module in _density_modules(model, modules)]
    if device is None:
        device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), None)
    run = forward or _forward
    batches = 0
    with torch.no_grad(), _evaluating(model), contextlib.ExitStack() as hooks:
        for listener in listeners:
            hooks.enter_context(listener.listening())
        for batch in _progress(loader, limit, progress):
            run(model, batch if device is None else _to(batch, device))
            batches += 1
    if not batches:
        raise ValueError("loader must give at least one batch, got none")
    silent = [listener.shown for listener in listeners if not listener.averages]
    if silent:
        raise ValueError(f"modules must name density modules that the model calls, but it never called {silent}")
    return {name: average.mean(name) for each in listeners for name, average in each.averages.items()}


class _Average:
    """The running mean of one kind of weights."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes
        self.total: Tensor | None = None
        self.count: Tensor | int = 0

    def add(self, name: str, weights: Tensor, valid: Tensor | None) -> None:
        if weights.is_mps:
            weights, valid = weights.cpu(), None if valid is None else valid.cpu()  # which has no float64
        dims = weights.dim()
        if any(not -dims <= axis < dims for axis in self.axes):
            raise ValueError(
                f"average_over must name axes of the weights, which at {name!r} have {dims}, got {self.axes}"
            )
        axes = sorted({axis % dims for axis in self.axes})
        if valid is None:
            total = weights.sum(axes, dtype=torch.float64)
            count = math.prod(weights.shape[axis] for axis in axes)
        else:
            total = torch.where(valid, weights, 0).sum(axes, dtype=torch.float64)
            count = valid.sum(axes)
        if self.total is None:
            self.total = torch.zeros_like(total)
        if total.shape != self.total.shape:
            raise ValueError(
                f"the weights of {name!r}, averaged over {self.axes}, must have one shape in all batches, got "
                f"{list(total.shape)} after {list(self.total.shape)}: give the axis that changes in average_over too, "
                f"or pad all batches to one length"
            )
        self.total += total.to(self.total.device)
        self.count = self.count + (count.to(self.total.device) if isinstance(count, Tensor) else count)

    def mean(self, name: str) -> Tensor:
        if not self.total.isfinite().all():
            raise ValueError(f"the weights of {name!r} must be finite, got NaN or Inf: look at the model's input")
        return (self.total / self.count).cpu()


class _Listener:
    """Asks one module for its weights at every call, and hides from the caller that it did."""

    def __init__(self, name: str, module: nn.Module, axes: tuple[int, ...]) -> None:
        self.name, self.module, self.axes = name, module, axes
        self.shown = name or type(module).__name__
        self.signature = inspect.signature(module.forward)
        self.averages: dict[str, _Average] = {}
        # A block keeps the value in its layers, and the first of these is who sees the block's input.
        self.padding_value = next((m.padding_value for m in module.modules() if hasattr(m, "padding_value")), None)
        self.call: inspect.BoundArguments | None = None
        self.details_wanted = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        # Last before the module and first after it: other hooks see the arguments and results they always saw.
        handles = [
            self.module.register_forward_pre_hook(self._ask, with_kwargs=True),
            self.module.register_forward_hook(self._listen, prepend=True),
        ]
        try:
            yield
        finally:
            self.call = None
            for handle in handles:
                handle.remove()

    def _ask(self, module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        self.call = self.signature.bind(*arguments, **keywords)
        self.details_wanted = bool(self.call.arguments.get(_DETAILS, False))
        self.call.arguments[_DETAILS] = True
        return self.call.args, self.call.kwargs

    def _listen(self, module: nn.Module, arguments: tuple, output: Any) -> Any:
        if not (isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], (Tensor, Mapping))):
            raise TypeError(
                f"{self.shown!r} must return (y, weights) or (y, {{key: weights}}) for {_DETAILS}=True, "
                f"got {type(output).__name__}: name other modules in modules"
            )
        y, details = output
        details = details if isinstance(details, Mapping) else {"": details}
        for key, weights in details.items():
            name = ".".join(filter(None, (self.name, key))) or self.shown
            check_dense(f"the weights of {name!r}", weights)
            average = self.averages.setdefault(name, _Average(self.axes))
            average.add(name, weights, self._valid(name, weights))
        self.call = None
        return output if self.details_wanted else y

    def _valid(self, name: str, weights: Tensor) -> Tensor | None:
        arguments = self.call.arguments
        x, mask = next(iter(arguments.values())), arguments.get("mask")
        valid = None if self.padding_value is None else x != self.padding_value
        if mask is not None:
            valid = mask if valid is None else valid & mask
        if valid is not None:
            try:
                valid = valid.expand_as(weights)
            except RuntimeError:
                raise ValueError(
                    f"padding at {name!r} must broadcast to its weights {list(weights.shape)}, got {list(valid.shape)}"
                ) from None
        return valid


def _density_modules(model: nn.Module, names: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    able = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module  # as it was before torch.compile
        for name, module in model.named_modules()
        if _DETAILS in inspect.signature(module.forward).parameters
    }
    if names is not None:
        if isinstance(names, str) or not names:
            raise ValueError(f"modules must be a list of names of modules, got {names!r}")
        unknown = [name for name in names if name not in able]
        if unknown:
            raise ValueError(
                f"modules must be names of modules whose forward takes {_DETAILS}, {list(able)}, got {unknown}"
            )
        return [(name, able[name]) for name in names]
    if not able:
        raise ValueError(f"model must contain a module whose forward takes {_DETAILS}, got {type(model).__name__}")
    inside = {id(part) for module in able.values() for part in module.modules() if part is not module}
    return [(name, module) for name, module in able.items() if id(module) not in inside]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # What torch.compile made does not look at hooks that come later. Without dynamo nothing is compiled.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        model.eval()
        with eager:
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return _forward(model, batch[0])
    return model(batch)


def _to(value: Any, device: torch.device | str) -> Any:
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(each, device) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to(each, device) for each in value]
    return value


def _progress(loader: Iterable[Any], limit: int | None, shown: bool) -> Iterator[Any]:
    batches = itertools.islice(loader, limit)
    if not shown:
        return batches
    counts = [count for count in (len(loader) if hasattr(loader, "__len__") else None, limit) if count is not None]
    total = min(counts, default=None)
    try:
        from tqdm import tqdm
    except ImportError:
        return _counted(batches, total)
    return iter(tqdm(batches, total=total, desc="attention", unit="batch"))


def _counted(batches: Iterator[Any], total: int | None) -> Iterator[Any]:
    of = "" if total is None else f" of {total}"
    for number, batch in enumerate(batches, 1):
        print(f"\rattention: batch {number}{of}", end="", file=sys.stderr, flush=True)
        yield batch
    print(file=sys.stderr)


def _check_axes(average_over: int | Sequence[int]) -> tuple[int, ...]:
    axes = (average_over,) if isinstance(average_over, int) else average_over
    if isinstance(axes, str) or not isinstance(axes, Sequence) or not axes:
        raise TypeError(f"average_over must be an axis or several, got {average_over!r}")
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in axes):
        raise TypeError(f"average_over must be an axis or several, got {average_over!r}")
    return tuple(axes)
