"""Results on paper: fixed-width tables, CSV and JSON. One row is a dictionary, None where there is no value.

A number that is not finite is written as no value.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Mapping, Sequence

from daam_kernels.explain.files import complete

Row = Mapping[str, object]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first and the last on the left, the others on the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    last = len(header) - 1

    def aligned(line: list[str]) -> str:
        cells = (c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths).rstrip()
    return "\n".join([aligned(lines[0]), rule, *map(aligned, lines[1:])])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row, the columns in the order in which the rows first name them; None becomes an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in _finite(row).items()} for row in rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """What :func:`write_csv` wrote, every value as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_json(path: Path, content: object) -> None:
    """``content`` as indented JSON."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """What :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _finite(content):
    """The same with None for infinity and NaN, of which JSON knows nothing: other readers would refuse the file."""
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_text(path: Path, text: str) -> None:
    """The whole text or, where the program ends before, what was there."""
    with complete(path) as part:
        part.write_text(text, encoding="utf-8", newline="")
