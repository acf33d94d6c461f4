"""One line per case, one dot per contender: the fraction of the copy, and the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, NamedTuple, Sequence

from matplotlib.ticker import FixedLocator, NullLocator

from ..contender import BOTH, STREAMS
from ..contenders import FUSED
from .style import COPY_LINE, GRID, LOOKS, Row, directions, finish, name_of, number, plt, shown

_MEMORY_TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200)


class _Panel(NamedTuple):
    """What the dots of one direction say, and whether ours have their value written beside them."""

    direction: str
    label: str
    value: Callable[[Row], float | None]
    form: str


def fraction_of_copy(rows: Sequence[Row], stem: Path) -> list[Path]:
    """How near every contender comes to a plain copy of the same bytes; nothing where no copy was timed."""
    panels = [
        _Panel(d, f"{d}: time of the copy / time", lambda row: number(row, "of_copy"), ".2f") for d in directions(rows)
    ]
    return _picture(rows, panels, "Fraction of the speed of a copy (more is better)", f"{stem}-of-copy", _scale_of_copy)


def memory(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Peak memory of a call in every direction, and what is held between forward and backward."""
    panels = [_Panel(d, f"{d}: peak / size of x", lambda row: _of_x(row, "peak_mb"), ".1f") for d in directions(rows)]
    if any(row["direction"] == BOTH for row in rows):
        panels.append(_Panel(BOTH, "saved for the backward / size of x", lambda row: _of_x(row, "saved_mb"), ".1f"))
    what = "Memory beyond the inputs, outputs included (less is better)"
    return _picture(rows, panels, what, f"{stem}-memory", _scale_of_memory)


def _picture(
    rows: Sequence[Row], panels: list[_Panel], what: str, stem: str, scale: Callable[[plt.Axes, list[float]], None]
) -> list[Path]:
    names = shown(rows)
    dots = [
        [(row, panel.value(row)) for row in rows if row["direction"] == panel.direction and name_of(row) in names]
        for panel in panels
    ]
    if not any(value is not None for panel in dots for _, value in panel):
        return []
    labels = list(dict.fromkeys(map(_label, rows)))
    width = 2.6 + 3.6 * len(panels)
    height = 2.0 + 0.56 * len(labels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, height), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel, values in zip(axes[0], panels, dots):
        axis.set_xlabel(panel.label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", **GRID)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        across = axis.get_yaxis_transform()
        axis.hlines(range(len(labels)), 0, 1, "#eeeeee", transform=across, linewidth=0.5, zorder=0)
        for name in names:
            _dots(axis, labels, name, panel.form, [pair for pair in values if name_of(pair[0]) == name])
        scale(axis, [value for _, value in values if value is not None])
    return finish(figure, rows, what, names, width, stem, with_copy=scale is _scale_of_copy)


def _dots(axis: plt.Axes, labels: list[str], name: str, form: str, values: list[tuple[Row, float | None]]) -> None:
    """Those of one contender; beside the fused operator's their value, or why there is none."""
    look = LOOKS[name]
    points = [(value, labels.index(_label(row))) for row, value in values if value is not None]
    if points:
        axis.plot(*zip(*points), look.marker, color=look.color, markersize=7, markeredgewidth=0, zorder=3)
    if name != FUSED:
        return
    for value, y in points:
        text = format(value, form)
        text = format(value, ".1g") if value and not float(text) else text  # on these scales it is not zero
        _write(axis, text, (value, y), axis.transData, "center")
    for row, value in values:
        if row["status"] in ("wrong", "failed"):
            _write(axis, row["status"], (0.01, labels.index(_label(row))), axis.get_yaxis_transform(), "left")


def _write(axis: plt.Axes, text: str, where: tuple[float, float], coordinates, alignment: str) -> None:
    axis.annotate(
        text, where, (0, 6), xycoords=coordinates, textcoords="offset points", color=LOOKS[FUSED].color,
        fontsize=7.5, ha=alignment, va="bottom", in_layout=False, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.3},
    )  # fmt: skip


def _scale_of_copy(axis: plt.Axes, values: list[float]) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.axvline(1, **COPY_LINE)


def _scale_of_memory(axis: plt.Axes, values: list[float]) -> None:
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(-0.15, 1.3 * max([1, *values]))
    axis.xaxis.set_major_locator(FixedLocator(_MEMORY_TICKS))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


def _of_x(row: Row, column: str) -> float | None:
    value = number(row, column)
    size = float(row["bytes"]) / STREAMS[row["direction"]] / 1e6
    return None if value is None else value / size


def _label(row: Row) -> str:
    """What is computed of which shape, in two lines."""
    layers = f", {row['layers']} layers" if int(row["layers"]) > 1 else ""
    kind = "" if row["operator"] == "product" else f"{row['operator']}, "
    sizes = f"{kind}axis {row['norm_axis']}, H = {row['num_heads']}, K = {row['num_gaussians']}{layers}"
    return f"{row['shape'].replace('_', ' ')}  {row['dims'].replace('x', '×')}\n{sizes}"
