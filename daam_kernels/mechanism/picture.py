"""The picture of the weights of one input. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..explain.pictures import count_from_one, readable_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(
    new_figure: Callable[[float, float], Figure], weights: Tensor, row_names: Sequence[str] | None, title: str
) -> Figure:
    """Of weights [units, rows], on the CPU."""
    units, rows = weights.shape
    figure = new_figure(min(12.0, max(5.0, 1.5 + 0.3 * rows)), min(9.0, 1.6 + 0.4 * units))
    axes = figure.subplots()
    image = axes.imshow(
        weights.numpy(), cmap="viridis", vmin=0, aspect="auto", interpolation="nearest",
        extent=(0.5, rows + 0.5, units + 0.5, 0.5),
    )  # fmt: skip
    if row_names is None:
        count_from_one(axes.xaxis, rows)
    else:
        positions, shown = readable_ticks(list(map(str, row_names)))
        axes.set_xticks(positions, shown, rotation=90 if max(map(len, shown)) > 3 else 0, parse_math=False)
    axes.set_yticks(range(1, units + 1))
    axes.set(xlabel="row", ylabel="unit", title=title)
    figure.colorbar(image, ax=axes, pad=0.015, label="weight")
    return figure
