"""What a model with density attention attends to, in numbers and pictures: import it as ``daam_kernels.explain``.

    attention = explain.collect(model, loader)                   # averaged over a data set
    explain.plot_importance(attention, "importance.png")         # features by layers
    explain.plot_layer_contribution(attention, "layers.svg")
    explain.plot_density(model.attention, "density.png")         # the learned curves

Source: Ioannides et al., arXiv 2401.11143. "Evaluation Metrics" there defines the importance factor,
IF_ij = (DA_ij - min(DA)) / (max(DA) - min(DA)), DA being the density attention maps averaged over the validation set;
its heat maps (Figure 2) have the output feature on the x axis and the encoder's layer on the y axis. Figure 3 is the
"percentage contribution of each layer to attention weights". Three choices are ours. The paper's code averages batches,
we average samples, which differs only where batches differ in size. Padding is left out of the average. And as neither
paper nor code gives a formula for Figure 3, a layer's contribution is its mean weight, over the sum of these means.

Pictures need matplotlib, the extra ``explain``; the numbers do not. Layers and features are numbered from 1.
"""

from __future__ import annotations

import contextlib
import csv
import inspect
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .modules.daam import _DensityAttention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "collect",
    "importance_factor",
    "layer_contribution",
    "plot_density",
    "plot_importance",
    "plot_layer_contribution",
    "write_importance",
]

_DETAILS = "return_attention_details"
_INSTALL = "pip install 'daam_kernels[explain]'"
_ACCENT, _BLUE, _GREY, _NO_DATA = "#c0392b", "#4a6fa5", "#8a8a8a", "#e3e3e3"
_MOST_LABELS = 32  # names on the axis of layers that can still be read
_MOST_DISTINCT = 300  # features or layers that have pixels enough of their own


# Numbers


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
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be None or an int of at least 1, got {limit!r}")
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


def importance_factor(
    weights: Tensor | Mapping[str, Tensor], *, layer_axis: int | None = None, feature_axis: int = -1
) -> Tensor:
    """The importance factor of every feature of every layer: the averaged attention, scaled to [0, 1] as a whole.

    IF = (DA - min(DA)) / (max(DA) - min(DA)); source: arXiv 2401.11143, "Evaluation Metrics". All zero where DA is
    constant. As IF is its own importance factor, whatever takes weights here also takes what this returns.

    Args:
        weights: attention weights. A tensor of at least 2 dimensions, with an axis of layers and one of features; all
            others are averaged over. Or what :func:`collect` returns, whose entries are then the layers. NaN is
            where there are no data.
        layer_axis: of a tensor. None: the last but one.
        feature_axis: of the tensor, or of every entry.

    Returns:
        [layers, features], float64, on the CPU, NaN where there are no data.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
    """
    attention = _layers_by_features(weights, layer_axis, feature_axis)
    known = attention[~attention.isnan()]
    if not known.numel():
        return attention
    low, high = known.min(), known.max()
    return (attention - low) / (high - low) if high > low else attention - low


def layer_contribution(
    weights: Tensor | Mapping[str, Tensor], *, layer_axis: int | None = None, feature_axis: int = -1
) -> Tensor:
    """The share of every layer in the attention weights, in percent: mean weight over the sum of these means.

    Source: arXiv 2401.11143, Figure 3, which gives no formula. It takes the weights themselves; of importance factors
    the smallest was taken off. Where weights are normalised within every layer, which they are if ``norm_axis`` is
    features or time, all contributions are the same, and so are those of whole heads of equal size if it is layers;
    what differs there is how often eps was the divisor.

    Args:
        weights, layer_axis, feature_axis: as in :func:`importance_factor`.

    Returns:
        [layers], float64, on the CPU, with the sum 100; zeros where all weights are zero.

    Raises:
        TypeError, ValueError: an argument does not fit, or weights are negative.
    """
    attention = _layers_by_features(weights, layer_axis, feature_axis)
    if (attention < 0).any():
        raise ValueError(f"weights must not be negative, got {attention.nan_to_num().min().item():g} as a mean")
    means = attention.nanmean(1)
    total = means.nansum()
    return 100 * means / total if total > 0 else means


def write_importance(
    weights: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    layer_axis: int | None = None,
    feature_axis: int = -1,
    layer_names: Sequence[str] | None = None,
) -> None:
    """Write the importance factors as CSV with the columns layer, feature (from 1) and importance.

    Args:
        path: the file to write; it appears when it is complete.
        weights, layer_axis, feature_axis: as in :func:`importance_factor`.
        layer_names: one for each layer. None: the entries' names, less what all start with; or numbers from 1.
    """
    importance = importance_factor(weights, layer_axis=layer_axis, feature_axis=feature_axis)
    names = _layer_names(weights, layer_names, len(importance))
    with _complete(Path(path)) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "feature", "importance"))
        for name, row in zip(names, importance.tolist()):
            writer.writerows((name, feature, value) for feature, value in enumerate(row, 1))


# Pictures


def plot_importance(
    weights: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    layer_axis: int | None = None,
    feature_axis: int = -1,
    layer_names: Sequence[str] | None = None,
    title: str = "Importance factor of the density attention",
) -> Figure:
    """Heat map of the importance factors: features from left to right, layers from bottom to top, grey for no data.

    Source: arXiv 2401.11143, Figure 2.

    Args:
        weights, layer_axis, feature_axis: as in :func:`importance_factor`, which this calls.
        path: a PNG or SVG file to write, by its suffix; it appears when it is complete. None: none.
        layer_names: one for each layer. None: the entries' names, less what all start with; or numbers from 1.
        title: above the picture.

    Returns:
        the figure, which pyplot does not know of.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
    """
    new_figure, path = _new_figure("plot_importance"), _check_path(path)
    importance = importance_factor(weights, layer_axis=layer_axis, feature_axis=feature_axis)
    names = _layer_names(weights, layer_names, len(importance))
    layers, features = importance.shape
    figure = new_figure(9, min(9.0, 1.7 + 0.2 * max(layers, 5)))
    axes = figure.subplots()
    axes.set_facecolor(_NO_DATA)  # what is NaN is left transparent
    # Features that are finer than pixels have to be blended, or some of them would not be seen; layers must not be, and
    # many copies of each leave the filter nothing to blend there.
    fine = max(layers, features) > _MOST_DISTINCT
    image = axes.imshow(
        importance.repeat_interleave(16 if fine else 1, 0).numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto",
        origin="lower", extent=(0.5, features + 0.5, 0.5, layers + 0.5), interpolation="hanning" if fine else "nearest",
        interpolation_stage="data",  # values are averaged, not colours
    )  # fmt: skip
    axes.set_yticks(*_readable_ticks(names))
    _count_from_one(axes.xaxis, features)
    axes.set(xlabel="feature", ylabel="layer", title=title)
    figure.colorbar(image, ax=axes, pad=0.015, label="importance factor")
    return _saved(figure, path)


def plot_layer_contribution(
    weights: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    layer_axis: int | None = None,
    feature_axis: int = -1,
    layer_names: Sequence[str] | None = None,
    title: str = "Contribution of every layer to the attention weights",
) -> Figure:
    """Bars of :func:`layer_contribution` in percent, and a line where all layers would contribute the same.

    Source: arXiv 2401.11143, Figure 3. Arguments, result and errors are those of :func:`plot_importance`.
    """
    new_figure, path = _new_figure("plot_layer_contribution"), _check_path(path)
    percent = layer_contribution(weights, layer_axis=layer_axis, feature_axis=feature_axis)
    layers = len(percent)
    names = _layer_names(weights, layer_names, layers)
    figure = new_figure(min(12.0, max(6.0, 2 + 0.3 * layers)), 3.8)
    axes = figure.subplots()
    axes.bar(range(1, layers + 1), percent.tolist(), 0.82, color=_BLUE)
    axes.axhline(100 / layers, color=_ACCENT, linewidth=1.4, linestyle="--", label=f"equal: {100 / layers:.3g} %")
    positions, shown = _readable_ticks(names)
    upright = sum(len(name) + 1 for name in shown) > 9 * figure.get_figwidth()
    axes.set_xticks(positions, shown, rotation=90 if upright else 0)
    axes.set(xlabel="layer", ylabel="contribution / %", title=title, xlim=(0.3, layers + 0.7))
    axes.set_ylim(0, 1.18 * max(percent.nan_to_num().max().item(), 100 / layers))  # room for the legend
    axes.legend(frameon=False, loc="upper right")
    _plain(axes)
    return _saved(figure, path)


def plot_density(
    module: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    rstd: float = 1.0,
    title: str | None = None,
) -> Figure:
    """The learned density of every head, its peak scaled to 1, and behind it the Gaussians it is made of.

    The density is the product of the Gaussians, or, for a mixture such as ``FusedMultiHeadGAAM``, their weighted sum;
    source: arXiv 2401.11143, Algorithm 2, and the first generation of its code. Weights are normalised over a slice, so
    the height of a density has no meaning of its own. The band marks one standard deviation to either side of the mean.

    Args:
        module: one of the package's with a product or a mixture; or one with parameters ``mean_offsets`` and ``c``
            [num_heads, num_gaussians] and, for a mixture, ``weights`` of that shape (softmax gives the shares, unless
            its ``weights_softmax`` is False); or one that contains such modules, as a block does.
        path: a PNG or SVG file to write, by its suffix; it appears when it is complete. None: none.
        rstd: one over the standard deviation of the slices. Offsets are in units of x, the picture's axis is in
            standard deviations; 1 is right where x is standardised.
        title: above the picture. None: the class and what its density is.

    Returns:
        the figure, which pyplot does not know of.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
    """
    new_figure, path = _new_figure("plot_density"), _check_path(path)
    if isinstance(rstd, bool) or not isinstance(rstd, (int, float)) or not 0 < rstd < math.inf:
        raise ValueError(f"rstd must be a positive, finite number, got {rstd!r}")
    parts = _parts_with_gaussians(module)
    heads = [head for name, part in parts for head in _heads(name if len(parts) > 1 else "", part, rstd)]
    spans = [head.span() for head in heads]
    low, high = min(start for start, _ in spans), max(end for _, end in spans)

    columns = min(4, len(heads))
    rows = -(-len(heads) // columns)
    figure = new_figure(max(5.5, 1 + 2.9 * columns), 1.3 + 2.3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(heads) :]:
        panel.remove()
    for panel, head in zip(panels.flat, heads):
        positions = head.positions(low, high)
        density, single = head.curves(positions)
        band = panel.axvspan(-1, 1, color=_NO_DATA, alpha=0.7, linewidth=0)
        faint = [panel.plot(positions, curve, color=_BLUE, linewidth=1, alpha=0.45)[0] for curve in single]
        (line,) = panel.plot(positions, density, color=_ACCENT, linewidth=2)
        panel.set_title(head.name, fontsize=10)
        panel.set(xlim=(low, high), ylim=(0, 1.06))
        _plain(panel)
    for index, panel in enumerate(panels.flat[: len(heads)]):
        if index + columns >= len(heads):  # nothing below it, so it carries the axis
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("(x − mean) / deviation")
    for panel in panels[:, 0]:
        panel.set_ylabel("density / peak")
    kinds = " and ".join(dict.fromkeys(head.kind for head in heads))
    figure.suptitle(f"Learned density of {type(module).__name__}" if title is None else title)
    handles, labels = [line, faint[0], band], [kinds, "the Gaussians", "mean ± one deviation"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return _saved(figure, path)


# How attention is collected


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


# How weights become [layers, features]


def _layers_by_features(weights: Tensor | Mapping[str, Tensor], layer_axis: int | None, feature_axis: int) -> Tensor:
    """[layers, features] in float64 on the CPU."""
    if isinstance(weights, Mapping):
        if layer_axis is not None:
            raise ValueError(
                f"layer_axis must be None for several weights, whose entries are the layers, got {layer_axis}; "
                f"for the axis of one entry give that entry"
            )
        if not weights:
            raise ValueError("weights must have at least one entry, got none")
        rows = {name: _mean_but(entry, (feature_axis,), f"weights[{name!r}]") for name, entry in weights.items()}
        if len({len(row) for row in rows.values()}) > 1:
            sizes = ", ".join(f"{len(row)} at {name!r}" for name, row in rows.items())
            raise ValueError(f"weights must have the same number of features in every entry, got {sizes}")
        return torch.stack(list(rows.values()))
    return _mean_but(weights, (-2 if layer_axis is None else layer_axis, feature_axis), "weights")


def _mean_but(weights: Tensor, kept: tuple[int, ...], name: str) -> Tensor:
    """The mean over all axes but those ``kept``, which come out in their order."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weights).__name__}")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"{name} must be of a floating-point type, got {weights.dtype}")
    dims = weights.dim()
    if dims < len(kept):
        raise ValueError(f"{name} must have at least {len(kept)} dimension(s), got shape {list(weights.shape)}")
    for argument, axis in zip(("layer_axis", "feature_axis")[-len(kept) :], kept):
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"{argument} must be an int, got {axis!r}")
        if not -dims <= axis < dims:
            raise ValueError(
                f"{argument} must be in [{-dims}, {dims - 1}] for {name} of shape {list(weights.shape)}, got {axis}"
            )
    kept = tuple(axis % dims for axis in kept)
    if len(set(kept)) < len(kept):
        raise ValueError(f"layer_axis and feature_axis must be two axes, got {kept[0]} for both")
    weights = weights.detach().cpu().double()
    if not weights.numel():
        raise ValueError(f"{name} must not be empty, got shape {list(weights.shape)}")
    if weights.isinf().any():
        raise ValueError(f"{name} must be finite, or NaN where there are no data, got Inf")
    return weights.movedim(kept, tuple(range(len(kept)))).unsqueeze(-1).flatten(len(kept)).nanmean(-1)


def _layer_names(weights: Tensor | Mapping[str, Tensor], names: Sequence[str] | None, layers: int) -> list[str]:
    if names is None:
        if not isinstance(weights, Mapping):
            return [str(number) for number in range(1, layers + 1)]
        shared = os.path.commonprefix(list(weights)).rfind(".") + 1
        return [name[shared:] for name in weights]
    if isinstance(names, str) or len(names) != layers:
        raise ValueError(f"layer_names must be one name for each of {layers} layers, got {names!r}")
    return [str(name) for name in names]


# How densities and pictures are drawn


class _Head(NamedTuple):
    """The Gaussians of one head in standard deviations from the mean; tensors [num_gaussians], float64."""

    name: str
    centers: Tensor
    widths: Tensor
    shares: Tensor | None  # of a mixture; None: a product

    @property
    def kind(self) -> str:
        return "product" if self.shares is None else "mixture"

    def span(self) -> tuple[float, float]:
        """What to show: where data are, and the middle of every Gaussian."""
        margin = (3 * self.widths).clamp(max=4)
        return min(-4.0, (self.centers - margin).min().item()), max(4.0, (self.centers + margin).max().item())

    def positions(self, low: float, high: float) -> Tensor:
        """Where to draw: evenly, and closer around what is narrow."""
        centers, widths = self.centers, self.widths
        if self.shares is None:
            center, width = self.product()
            centers, widths = torch.cat([centers, center[None]]), torch.cat([widths, width[None]])
        near = centers[:, None] + widths[:, None] * torch.linspace(-4, 4, 81, dtype=torch.float64)
        everywhere = torch.linspace(low, high, 401, dtype=torch.float64)
        return torch.cat([everywhere, near.flatten().clamp(low, high)]).unique()

    def product(self) -> tuple[Tensor, Tensor]:
        """Centre and width of the product, which is a Gaussian as well."""
        inverse = self.widths.pow(-2)
        return (self.centers * inverse).sum() / inverse.sum(), inverse.sum().rsqrt()

    def curves(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The density [positions], its peak 1, and the Gaussians [num_gaussians, positions] on the scale of a share."""
        logs = -0.5 * ((positions - self.centers[:, None]) / self.widths[:, None]).square()
        if self.shares is None:
            total = logs.sum(0)  # of many Gaussians far apart the product itself underflows
            return (total - total.max()).exp(), logs.exp()
        parts = self.shares[:, None] * logs.exp()
        total = parts.sum(0)
        return total / total.max(), parts / total.max()


def _parts_with_gaussians(module: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    parts = [
        (name, part)
        for name, part in module.named_modules()
        if all(isinstance(getattr(part, parameter, None), Tensor) for parameter in ("mean_offsets", "c"))
    ]
    if not parts:
        raise ValueError(
            f"module must have mean_offsets and c, or contain modules that do, got {type(module).__name__}"
        )
    return parts


def _gaussians(part: nn.Module) -> dict[str, Any]:
    """The Gaussians as density_attention takes them; of other classes by attribute, where weights make a mixture."""
    if isinstance(part, _DensityAttention):
        return part._gaussians()
    names = ("mean_offsets", "c", "density", "weights", "weights_softmax")
    found = {name: getattr(part, name) for name in names if hasattr(part, name)}
    return {"density": "mixture" if "weights" in found else "product"} | found


def _heads(name: str, part: nn.Module, rstd: float) -> list[_Head]:
    """The heads of one module; those of the public package, [num_gaussians], are one head each."""
    gaussians = _gaussians(part)
    density, weights = gaussians.get("density", "product"), gaussians.get("weights")
    if density not in ("product", "mixture"):
        raise ValueError(f"density of {name or 'module'!r} must be 'product' or 'mixture' to be drawn, got {density!r}")
    offsets, c = (torch.atleast_2d(gaussians[each].detach().cpu().double()) for each in ("mean_offsets", "c"))
    if offsets.shape != c.shape or c.dim() != 2 or c.shape[1] != getattr(part, "num_gaussians", c.shape[1]):
        raise ValueError(
            f"mean_offsets and c of {name or 'module'!r} must have shape [num_heads, num_gaussians], "
            f"got {list(part.mean_offsets.shape)} and {list(part.c.shape)}"
        )
    shares = [None] * len(c)
    if density == "mixture":
        if not isinstance(weights, Tensor):
            raise ValueError(f"weights of {name or 'module'!r}, a mixture, must be a tensor, got {weights!r}")
        weights = weights.detach().cpu().double().expand_as(c)
        shares = weights.softmax(1) if gaussians.get("weights_softmax", True) else weights
    heads = []
    for index, values in enumerate(zip(offsets * rstd, c.abs(), shares), 1):
        title = f"{name}, head {index}" if name else f"head {index}"
        head = _Head(title, *values)
        if head.shares is None:
            center, width = (value.item() for value in head.product())
            centered = f"{round(center, 2) + 0.0:.2f}".replace("-", "−")
            head = head._replace(name=f"{title}\ncentre {centered}, width {width:.2g}")
        heads.append(head)
    return heads


def _new_figure(caller: str) -> Callable[[float, float], Figure]:
    """figure(width, height) in inches. It is not one of pyplot's, so nothing has to be closed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller} needs matplotlib, which could not be imported ({error}): {_INSTALL}") from error
    return lambda width, height: Figure(figsize=(width, height), layout="constrained")


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)


def _readable_ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions from 1 and names, thinned where they would touch."""
    step = -(-len(names) // _MOST_LABELS)
    return list(range(1, len(names) + 1, step)), list(names[::step])


def _count_from_one(axis, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    between = [int(tick) for tick in MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]).tick_values(1, count)]
    step = between[1] - between[0]
    axis.set_ticks([1, *(tick for tick in between if 1 + step / 2 < tick <= count)])


def _check_path(path: str | os.PathLike[str] | None) -> Path | None:
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path must end in .png or .svg, got {os.fspath(path)!r}")
    return path


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        with _complete(path) as part:
            figure.savefig(part, format=path.suffix[1:].lower(), dpi=160)
    return figure


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place at the end, or goes away if something raises."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
