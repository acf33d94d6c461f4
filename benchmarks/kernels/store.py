"""The results on disk: whole after every case, and taken up again by a run that goes on where another ended."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Sequence, get_type_hints

import torch

from ..report import Row, read_json, write_csv, write_json
from .cell import Cell, new_cell
from .contender import DIRECTIONS
from .shapes import Shape

_COLUMNS = get_type_hints(Cell)
_WRITTEN_ALWAYS = [field.name for field in fields(Cell) if field.default is MISSING] + ["status"]
_OF_THE_MOMENT = ("date", "load_at_start")  # differ between runs that may be continued or compared


class Results:
    """The rows of a run, in ``stem``.json and ``stem``.csv; both are whole at any time, whenever the run ends."""

    def __init__(self, stem: Path, environment: dict, options: dict, rows: Sequence[Row] = ()) -> None:
        self.json, self.csv = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.csv")
        self.environment, self.options, self.rows = environment, options, list(rows)

    def add(self, cells: Sequence[Cell]) -> None:
        """Take in the cells of one case, all directions of it, and write."""
        self.rows += map(asdict, cells)
        content = {"environment": self.environment, "options": self.options, "rows": self.rows}
        write_json(self.json, content)
        to_csv(self.json, content)

    def take_up(self) -> None:
        """Go on with the rows of an earlier run; ends the program where that was not made as this one would be."""
        if not self.json.exists():
            return
        earlier = load(self.json)
        wrong = differences(earlier["environment"], self.environment)
        wrong += differences(earlier.get("options", {}), self.options)
        if wrong:
            lines = "".join(f"\n  {line}" for line in wrong)
            raise SystemExit(f"--resume: {self.json} was made otherwise; without --resume it is made anew:{lines}")
        self.environment, self.rows = earlier["environment"], earlier["rows"]
        to_csv(self.json, earlier)  # which lacks the last case where the run ended between the two files

    def has(self, shape: Shape, dtype: torch.dtype) -> bool:
        """Whether the rows of this case are there."""
        case = case_of(asdict(new_cell(shape, dtype, "forward", "")))
        return any(case_of(row) == case for row in self.rows)


def load(path: Path) -> dict:
    """What :class:`Results` wrote; ends the program with a message where ``path`` is nothing of the kind."""
    try:
        content = read_json(path)
        rows = [_whole(row, number) for number, row in enumerate(content["rows"], 1)]
        rows[0], dict(content["environment"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{path} has no results of the kernel benchmark as it writes them now: {error}") from None
    return {**content, "rows": rows}


def _whole(row: Row, number: int) -> Row:
    """The row with every column: None, or what else stands for no value, where an older version did not write it."""
    if missing := [name for name in _WRITTEN_ALWAYS if name not in row]:
        raise ValueError(f"row {number} lacks {', '.join(missing)}")
    whole = asdict(Cell(**{name: row[name] for name in _COLUMNS if name in row}))
    for name, kind in _COLUMNS.items():
        value = whole[name]
        if not isinstance(value, kind) and not (type(value) is int and isinstance(0.0, kind)):
            raise ValueError(f"{name} of row {number} is {value!r}")
    if whole["direction"] not in DIRECTIONS:
        raise ValueError(f"direction of row {number} is {whole['direction']!r}")
    return whole


def to_csv(path: Path, content: dict) -> Path:
    """Write the rows of the results ``path``, each with the environment, to the .csv beside it; returns its path."""
    csv = path.with_suffix(".csv")
    write_csv(csv, [{**row, **content["environment"]} for row in content["rows"]])
    return csv


def case_of(row: Row) -> tuple:
    """What makes a case: everything in a row before the direction."""
    names = "shape", "dims", "operator", "norm_axis", "num_heads", "layers", "num_gaussians", "dtype"
    return tuple(row[name] for name in names)


def differences(old: dict, new: dict) -> list[str]:
    """A line for everything that two environments or sets of options differ in, but for the moment of the run."""
    names = [name for name in dict.fromkeys((*old, *new)) if name not in _OF_THE_MOMENT]
    return [f"{n}: {old.get(n)} then, {new.get(n)} now" for n in names if old.get(n) != new.get(n)]
