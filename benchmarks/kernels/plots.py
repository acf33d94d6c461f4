"""Pictures of a sweep, made from its CSV: for every shape, how many plain copies each contender costs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
from matplotlib.patches import Patch  # noqa: E402

from ..report import read_csv  # noqa: E402
from .bare import BARE  # noqa: E402
from .contender import DIRECTIONS  # noqa: E402
from .contenders import (  # noqa: E402
    CLOSED_FORM,
    CLOSED_FORM_COMPILED,
    COPY,
    FUSED,
    UPSTREAM,
    UPSTREAM_COMPILED,
)

_COLORS = {
    UPSTREAM: "#c4c4c4",
    UPSTREAM_COMPILED: "#8a8a8a",
    CLOSED_FORM: "#a9bcd6",
    CLOSED_FORM_COMPILED: "#4a6fa5",
    FUSED: "#c0392b",
    f"{FUSED}, layer by layer": "#7d3c98",
    f"{FUSED}, one by one": "#7d3c98",
    BARE: "#e8a29a",
}


def plot(csv_path: Path, out: Path) -> list[Path]:
    """One PNG per type of data in the CSV, ``out / (the CSV's stem)-(type).png``; returns their paths."""
    rows = read_csv(csv_path)
    paths = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        path = out / f"{csv_path.stem}-{dtype}.png"
        _figure([row for row in rows if row["dtype"] == dtype], dtype, path)
        paths.append(path)
    return paths


def _figure(rows: list[dict[str, str]], dtype: str, path: Path) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    width = max(7.0, 2.2 + 1.7 * len(shapes))
    figure, panels = plt.subplots(len(DIRECTIONS), 1, figsize=(width, 8), sharex=True, layout="constrained")
    for panel, direction in zip(panels, DIRECTIONS):
        _panel(panel, [row for row in rows if row["direction"] == direction], shapes)
        panel.set_ylabel(f"{direction}\ntime / time of a copy")
    dims = {row["shape"]: row["dims"].replace("x", "×") for row in rows}
    axes = {row["shape"]: _what(row) for row in rows}
    panels[-1].set_xticks(
        range(len(shapes)), [f"{s.replace('_', ' ')}\n{dims[s]}\n{axes[s]}" for s in shapes], fontsize=8
    )
    names = [name for name in dict.fromkeys(_without_backend(row["contender"]) for row in rows) if _color(name)]
    handles = [Patch(color=_color(name), label=name) for name in names]
    columns = min(len(handles), int(width / 2.2))  # one more would leave the picture
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    first = rows[0]
    figure.suptitle(
        f"Density attention, {dtype}, on {first['device']}"
        + (f", {first['threads']} threads" if not first["driver"] else "")
        + f"\ntorch {first['torch']}, triton {first['triton'] or 'none'}, "
        + f"commit {first['commit']}, {first['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _what(row: dict[str, str]) -> str:
    """What is computed of a shape, in two lines."""
    layers = f", {row['layers']} layers" if int(row["layers"]) > 1 else ""
    sizes = f"axis {row['norm_axis']}, H = {row['num_heads']}, K = {row['num_gaussians']}"
    return f"{sizes}\n{row['operator']}{layers}"


def _panel(panel, rows: list[dict[str, str]], shapes: list[str]) -> None:
    """Bars grouped by shape, in copies of the same bytes, with the time itself written on each."""
    names = [n for n in dict.fromkeys(_without_backend(row["contender"]) for row in rows) if _color(n)]
    times = {(row["shape"], _without_backend(row["contender"])): _time(row) for row in rows}
    status = {(row["shape"], _without_backend(row["contender"])): row["status"] for row in rows}
    bar = 0.84 / len(names)
    panel.set_yscale("log")
    for i, name in enumerate(names):
        where, heights = [], []
        for position, shape in enumerate(shapes):
            at = position + (i - (len(names) - 1) / 2) * bar
            time, copy = times.get((shape, name)), times.get((shape, COPY))
            if time and copy:
                where.append(at)
                heights.append(time / copy)
                panel.annotate(
                    _readable(time), (at, time / copy), (0, 2), textcoords="offset points",
                    ha="center", va="bottom", rotation=90, fontsize=6.5,
                )  # fmt: skip
            elif (shape, name) in status:
                panel.annotate(
                    status[shape, name], (at, 1), (0, 2), textcoords="offset points",
                    ha="center", va="bottom", rotation=90, fontsize=6.5, color="#888888",
                )  # fmt: skip
        panel.bar(where, [h - 1 for h in heights], bar * 0.94, bottom=1, color=_color(name))
    panel.axhline(1, color="black", linewidth=1)
    panel.text(1.004, 1, "copy", transform=panel.get_yaxis_transform(), va="center", fontsize=8)
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 0.8), high * 3)  # room for the times on the bars
    panel.margins(x=0.02)
    panel.grid(axis="y", which="major", linewidth=0.4, color="#dddddd")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _time(row: dict[str, str]) -> float | None:
    text = row["kernel_us"] or row["wall_us"]
    return float(text) if text and row["status"] == "ok" else None


def _color(contender: str) -> str | None:
    return _COLORS.get(_without_backend(contender))


def _without_backend(contender: str) -> str:
    """The fused operator has its backend behind its name, which differs between the shapes of one picture."""
    return contender.split(" (")[0]


def _readable(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"
