"""Pictures of a sweep, made from its CSV: each as PNG and SVG, where the data for it are there."""

from __future__ import annotations

import itertools
from pathlib import Path

from ...report import read_csv
from ..contender import CONTRACT
from ..scaling import GROUPS
from . import dots, growth


PICTURES = ("of-copy", "memory", *growth.NAMES)


def plot(csv_path: Path, out: Path) -> list[Path]:
    """All pictures of each type of data, ``out / (the CSV's stem)-(type)-(picture).png`` and .svg; their paths."""
    rows, paths = read_csv(csv_path), []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_type = [row for row in rows if row["dtype"] == dtype]
        stem = out / f"{csv_path.stem}-{dtype}"
        apart = [row for row in of_type if row["shape"].split("_")[0] not in GROUPS]  # those have pictures of their own
        for draw in (dots.fraction_of_copy, dots.memory):
            paths += draw(apart, stem)
        for draw in growth.PICTURES:
            paths += draw(of_type, stem)
    for dtype, picture, form in itertools.product(CONTRACT, PICTURES, ("png", "svg")):
        path = out / f"{csv_path.stem}-{str(dtype).removeprefix('torch.')}-{picture}.{form}"
        if path not in paths:  # of an earlier run that had the data for it
            path.unlink(missing_ok=True)
    return paths
