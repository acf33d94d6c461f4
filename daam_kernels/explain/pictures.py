"""The pictures: importance factors, contributions of layers, learned densities. They need matplotlib."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..checks import check_finite
from .densities import heads_of, parts_with_gaussians
from .files import complete
from .importance import importance_factor, layer_contribution, layer_names_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INSTALL = "pip install 'daam_kernels[explain]'"
_ACCENT, _BLUE, _NO_DATA = "#c0392b", "#4a6fa5", "#e3e3e3"
_MOST_LABELS = 32  # names on the axis of layers that can still be read
_MOST_DISTINCT = 300  # features or layers that have pixels enough of their own


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
    new_figure, path = figure_maker("plot_importance"), check_path(path)
    importance = importance_factor(weights, layer_axis=layer_axis, feature_axis=feature_axis)
    names = layer_names_of(weights, layer_names, len(importance))
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
    axes.set_yticks(*readable_ticks(names), parse_math=False)
    count_from_one(axes.xaxis, features)
    axes.set(xlabel="feature", ylabel="layer", title=title)
    figure.colorbar(image, ax=axes, pad=0.015, label="importance factor")
    return saved(figure, path)


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
    new_figure, path = figure_maker("plot_layer_contribution"), check_path(path)
    percent = layer_contribution(weights, layer_axis=layer_axis, feature_axis=feature_axis)
    layers = len(percent)
    names = layer_names_of(weights, layer_names, layers)
    figure = new_figure(min(12.0, max(6.0, 2 + 0.3 * layers)), 3.8)
    axes = figure.subplots()
    axes.bar(range(1, layers + 1), percent.tolist(), 0.82, color=_BLUE)
    axes.axhline(100 / layers, color=_ACCENT, linewidth=1.4, linestyle="--", label=f"equal: {100 / layers:.3g} %")
    positions, shown = readable_ticks(names)
    upright = sum(len(name) + 1 for name in shown) > 9 * figure.get_figwidth()
    axes.set_xticks(positions, shown, rotation=90 if upright else 0, parse_math=False)
    axes.set(xlabel="layer", ylabel="contribution / %", title=title, xlim=(0.3, layers + 0.7))
    axes.set_ylim(0, 1.18 * max(percent.nan_to_num().max().item(), 100 / layers))  # room for the legend
    axes.legend(frameon=False, loc="upper right")
    _plain(axes)
    return saved(figure, path)


def plot_density(
    module: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    rstd: float = 1.0,
    title: str | None = None,
) -> Figure:
    """The learned density of every head, its peak scaled to 1, and behind it the Gaussians it is made of.

    The density is the product of the Gaussians, or, for a mixture such as ``FusedMultiHeadGAAM``, their weighted sum;
    source: arXiv 2401.11143, Algorithm 2, and the first generation of its code. Of a gate, arXiv 2512.07168, it is the
    mean of their normal densities. The first two are normalised over a slice, so their height has no meaning of its
    own. The band marks one standard deviation to either side of the mean.

    Args:
        module: one of the package's with a product, a mixture or a gate; or one with parameters ``mean_offsets`` and
            ``c`` [num_heads, num_gaussians] and, for a mixture, ``weights`` of that shape (softmax gives the shares,
            unless its ``weights_softmax`` is False), or with ``mean_offsets`` and ``log_sigma`` [num_gaussians], a
            gate's; or one that contains such modules, as a block does.
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
    new_figure, path = figure_maker("plot_density"), check_path(path)
    if check_finite("rstd", rstd) <= 0:
        raise ValueError(f"rstd must be positive, got {rstd!r}")
    parts = parts_with_gaussians(module)
    heads = [head for name, part in parts for head in heads_of(name if len(parts) > 1 else "", part, rstd)]
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
    return saved(figure, path)


def figure_maker(caller: str) -> Callable[[float, float], Figure]:
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


def readable_ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions from 1 and names, thinned where they would touch."""
    step = -(-len(names) // _MOST_LABELS)
    return list(range(1, len(names) + 1, step)), list(names[::step])


def count_from_one(axis, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    between = [int(tick) for tick in MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]).tick_values(1, count)]
    step = between[1] - between[0]
    axis.set_ticks([1, *(tick for tick in between if 1 + step / 2 < tick <= count)])


def check_path(path: str | os.PathLike[str] | None) -> Path | None:
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path must end in .png or .svg, got {os.fspath(path)!r}")
    return path


def saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        with complete(path) as part:
            figure.savefig(part, format=path.suffix[1:].lower(), dpi=160)
    return figure
