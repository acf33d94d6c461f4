"""Time and peak memory of training against the length."""

from __future__ import annotations

from pathlib import Path

from daam_kernels.explain.files import complete

from .contenders import NAMES


def plot(rows: list[dict], path: Path) -> None:
    """One line per contender and number of heads, over the shapes with as many queries as keys; the others are in the
    tables. Dashed where there is more than one head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, unit, label in zip(panels, ("ms", "mb"), ("milliseconds", "peak MB beyond the inputs")):
        for (name, heads), points in _lines(rows, f"training_{unit}").items():
            panel.plot(
                *zip(*sorted(points)),
                marker="o",
                color=f"C{NAMES.index(name)}",
                linestyle="-" if heads == 1 else "--",
                label=name if heads == 1 else f"{name}, {heads} heads in all",
            )
        panel.set(xscale="log", yscale="log", xlabel="length", ylabel=label, title="training")
        panel.set_xscale("log", base=2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(linewidth=0.4, color="#dddddd")
    if panels[0].lines:
        panels[0].legend(frameon=False)
    with complete(path) as part:
        figure.savefig(part, format="png", dpi=120)


def _lines(rows: list[dict], column: str) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """(length, value) by contender and batch * heads."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        if "T" in row["shape"] and row.get(column) is not None:
            batch, heads, length = map(int, row["dims"].split("x")[:3])
            found.setdefault((row["contender"], batch * heads), []).append((length, max(row[column], 1e-3)))
    return found
