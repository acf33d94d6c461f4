"""Time against one size that grows, the others being the same: a cliff shows as a step."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

from matplotlib.ticker import FixedLocator, NullLocator

from ..contender import STREAMS
from ..contenders import COPY
from .style import COPY_LINE, GRID, LOOKS, Row, directions, finish, name_of, plt, shown, time_us

_MOST_TICKS = 8
_MOST_SETS = 6  # more is not a picture any more; all of it is in the tables


class _Growth(NamedTuple):
    """A picture: its name, the title, what grows, and what is the same along one line."""

    name: str
    title: str
    label: str
    size: Callable[[Row], float]
    same: Callable[[Row], str | None]  # None: not in this picture


def _draw(growth: _Growth, rows: Sequence[Row], stem: Path) -> list[Path]:
    """A row of panels for every set of cases that differ in this size alone, a column for every direction."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        if (same := growth.same(row)) is not None and time_us(row) is not None:
            sets.setdefault(same, []).append(row)
    sets = {same: found for same, found in sets.items() if len({growth.size(row) for row in found}) >= 2}
    if not sets:
        return []
    title = growth.title + (f" ({_MOST_SETS} of {len(sets)} sets of cases)" if len(sets) > _MOST_SETS else "")
    sets = dict(list(sets.items())[:_MOST_SETS])
    drawn = [row for found in sets.values() for row in found]
    columns = directions(drawn)
    width, height = 1.2 + 4.0 * len(columns), 1.6 + 3.1 * len(sets)
    figure, axes = plt.subplots(len(sets), len(columns), figsize=(width, height), squeeze=False, layout="constrained")
    for panels, (same, found) in zip(axes, sets.items()):
        for axis, direction in zip(panels, columns):
            _panel(axis, growth, [row for row in found if row["direction"] == direction])
            axis.set_title(f"{direction}, {same}", fontsize=9)
        panels[0].set_ylabel("time, µs", fontsize=9)
    return finish(figure, drawn, title, shown(drawn), width, f"{stem}-{growth.name}")


def _panel(axis: plt.Axes, growth: _Growth, rows: Sequence[Row]) -> None:
    if not rows:  # of a direction that failed in all of these cases
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no times", transform=axis.transAxes, ha="center", fontsize=9)
        return
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for name in (COPY, *shown(rows)):
        points = sorted((growth.size(row), time_us(row)) for row in rows if name_of(row) == name)
        if name == COPY:
            axis.plot(*zip(*points), **COPY_LINE) if points else None
        else:
            look = LOOKS[name]
            axis.plot(*zip(*points), color=look.color, marker=look.marker, markersize=5, linewidth=1.4)
    sizes = sorted({growth.size(row) for row in rows})
    step = -(-len(sizes) // _MOST_TICKS)
    axis.xaxis.set_major_locator(FixedLocator(sizes[::step]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: _readable(x))
    axis.set_xlabel(growth.label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(**GRID)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _dims(row: Row) -> list[int]:
    return [int(size) for size in row["dims"].split("x")]


def _length(row: Row) -> float:
    return _dims(row)[int(row["norm_axis"])] // int(row["num_heads"])


def _inner(row: Row) -> float:
    dims = _dims(row)
    return prod(dims[int(row["norm_axis"]) % len(dims) + 1 :])


def _bytes(row: Row) -> float:
    return float(row["bytes"]) / STREAMS[row["direction"]]


def _of_group(group: str, row: Row) -> str | None:
    """Cases of the group of that name, of the same heads and Gaussians."""
    if not row["shape"].startswith(f"{group}_"):
        return None
    return f"H = {row['num_heads']}, K = {row['num_gaussians']}"


def _apart_from(column: str, row: Row) -> str:
    """Cases of the same tensor and operator that differ in ``column`` alone."""
    others = {"num_heads": "H", "num_gaussians": "K"}
    others.pop(column)
    ((name, letter),) = others.items()
    layers = f", {row['layers']} layers" if int(row["layers"]) > 1 else ""
    kind = "" if row["operator"] == "product" else f"{row['operator']} "
    layout = ", channels last" if "channels_last" in row["shape"] else ""
    dims = row["dims"].replace("x", "×")
    return f"{kind}{dims}{layout}, axis {row['norm_axis']}, {letter} = {row[name]}{layers}"


def _readable(size: float) -> str:
    """With 1024 as the step, since most sizes are powers of two."""
    for unit, one in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if size >= one:
            return f"{size / one:.3g}{unit}"
    return f"{size:g}"


def _count(column: str) -> Callable[[Row], float]:
    return lambda row: float(row[column])


_GROWTHS = (
    _Growth(
        "slice", "Time against the length of a slice, x of the same size", "elements of a slice", _length,
        partial(_of_group, "slice"),
    ),
    _Growth(
        "inner", "Time against inner, the stride of a slice, x of the same size", "inner, elements", _inner,
        partial(_of_group, "inner"),
    ),
    _Growth("size", "Time against the size of x", "size of x, bytes", _bytes, partial(_of_group, "size")),
    _Growth(
        "gaussians", "Time against the number of Gaussians", "Gaussians, K", _count("num_gaussians"),
        partial(_apart_from, "num_gaussians"),
    ),
    _Growth(
        "heads", "Time against the number of heads", "heads, H", _count("num_heads"), partial(_apart_from, "num_heads")
    ),
)  # fmt: skip
PICTURES: tuple[Callable[[Sequence[Row], Path], list[Path]], ...] = tuple(partial(_draw, g) for g in _GROWTHS)
NAMES = tuple(growth.name for growth in _GROWTHS)
