"""Time and peak memory of training against the length."""

from __future__ import annotations

from pathlib import Path

from .contenders import NAMES


def plot(rows: list[dict], path: Path) -> None:
    """One line per contender over the shapes with as many queries as keys; the others are in the tables."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, unit, label in zip(panels, ("ms", "mb"), ("milliseconds", "peak MB beyond the inputs")):
        for name in NAMES:
            points = sorted(
                (int(row["dims"].split("x")[2]), max(row[f"training_{unit}"], 1e-3))
                for row in rows
                if row["contender"] == name and row.get(f"training_{unit}") is not None and "T" in row["shape"]
            )
            if points:
                panel.plot(*zip(*points), marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="length", ylabel=label, title="training")
        panel.set_xscale("log", base=2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(linewidth=0.4, color="#dddddd")
    if panels[0].lines:
        panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
