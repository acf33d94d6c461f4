"""What all pictures share: a look for each contender, the line that says what was measured, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from daam_kernels.explain.files import complete  # noqa: E402

from ..bare import BARE  # noqa: E402
from ..contender import DIRECTIONS  # noqa: E402
from ..contenders import (  # noqa: E402
    CLOSED_FORM,
    CLOSED_FORM_COMPILED,
    COPY,
    FUSED,
    LAYER_NORM,
    SOFTMAX,
    UPSTREAM,
    UPSTREAM_COMPILED,
    without_backend,
)

Row = dict[str, str]  # of the CSV


class Look(NamedTuple):
    color: str
    marker: str


# The colours of Okabe and Ito, which colour-blind readers tell apart; the markers differ too.
LOOKS = {
    UPSTREAM: Look("#999999", "s"),
    UPSTREAM_COMPILED: Look("#333333", "P"),
    CLOSED_FORM: Look("#56b4e9", "^"),
    CLOSED_FORM_COMPILED: Look("#0072b2", "v"),
    LAYER_NORM: Look("#009e73", "X"),
    SOFTMAX: Look("#b8a800", "*"),
    f"{FUSED}, layer by layer": Look("#cc79a7", "h"),
    f"{FUSED}, one by one": Look("#cc79a7", "h"),
    f"{FUSED}, cuda": Look("#e69f00", "p"),
    BARE: Look("#e69f00", "D"),  # of a CPU, where the other is not
    FUSED: Look("#d55e00", "o"),
}
COPY_LINE = dict(color="black", linestyle="--", linewidth=1)
GRID = dict(linewidth=0.5, color="#e2e2e2")


def number(row: Row, name: str) -> float | None:
    """The value of a column, where there is one and the result was right."""
    return float(row[name]) if row.get(name) and row["status"] == "ok" else None


def time_us(row: Row) -> float | None:
    """Device time where it was measured, else wall clock."""
    device_time = number(row, "kernel_us")
    return number(row, "wall_us") if device_time is None else device_time


def name_of(row: Row) -> str:
    """The contender, without the backend, which differs between the shapes of one picture."""
    return without_backend(row["contender"])


def shown(rows: Sequence[Row]) -> list[str]:
    """The contenders in ``rows`` that pictures show, ours last, on top of the others."""
    names = {name_of(row) for row in rows}
    return [name for name in LOOKS if name in names]


def directions(rows: Sequence[Row]) -> list[str]:
    """Those in ``rows``, in the usual order."""
    there = {row["direction"] for row in rows}
    return [direction for direction in DIRECTIONS if direction in there]


def finish(
    figure: Figure,
    rows: Sequence[Row],
    what: str,
    names: Sequence[str],
    width: float,
    stem: str,
    with_copy: bool = True,
) -> list[Path]:
    """Add title and legend and write ``stem``.png and .svg; returns their paths."""
    handles = [
        Line2D([], [], color=LOOKS[name].color, marker=LOOKS[name].marker, linestyle="none", label=name)
        for name in names
    ]
    if with_copy:
        handles.append(Line2D([], [], **COPY_LINE, label=COPY))
    columns = min(len(handles), int(width / 1.9))  # one more would leave the picture
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    first = rows[0]
    machine = f"{first['dtype']}, on {first['device']}"
    machine += "" if first["driver"] else f", {first['threads']} threads"
    versions = f"torch {first['torch']}, triton {first['triton'] or 'none'}, "
    versions += f"commit {first['commit']}, {first['date'][:10]}"
    figure.suptitle(f"{what}\n{machine}\n{versions}", fontsize=10)
    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # worked out by now; it would be again for every file
    # Text stays text, and nothing in the file differs between two runs on the same data.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "daam_kernels"}):
        for path, options in zip(paths, ({"dpi": 130}, {"metadata": {"Date": None}})):
            with complete(path) as part:
                figure.savefig(part, format=path.suffix[1:], **options)
    plt.close(figure)
    return paths
