"""``python -m benchmarks report``: the pictures, the CSV and one page, report.html, of the results in a folder.

The page needs nothing beside itself: pictures stand in it as SVG, and it runs no script.
"""

from __future__ import annotations

import argparse
import sys
from html import escape
from pathlib import Path
from typing import Iterator, Sequence

from ..report import Row, read_json, write_text
from .goals import judge
from .store import case_of, load, to_csv

_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 0 auto;
  padding: 0 .8rem 3rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem }
.wide { overflow-x: auto; margin: .5rem 0 1rem }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .55rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { position: sticky; top: 0; background: #f4f4f4 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
td.text { text-align: left; white-space: normal; min-width: 12rem }
.missed { color: #a33a00; font-weight: 600 } .met { color: #00563f; font-weight: 600 }
.wide > svg { display: block; min-width: 42rem; width: 100%; height: auto }
summary { cursor: pointer; padding: .3rem 0 }
"""
_COLUMNS = (  # of the tables: header, column, format
    ("kernel µs", "kernel_us", ".1f"), ("IQR", "kernel_us_iqr", ".1f"), ("wall µs", "wall_us", ".1f"),
    ("IQR", "wall_us_iqr", ".1f"), ("GB/s", "gb_per_s", ".1f"), ("of copy", "of_copy", ".3f"),
    ("× upstream", "over_upstream", ".1f"), ("error y", "error_y", ".0e"), ("dx", "error_dx", ".0e"),
    ("parameters", "error_parameters", ".0e"), ("launches", "launches", "d"), ("saved MB", "saved_mb", ".3f"),
    ("peak MB", "peak_mb", ".3f"),
)  # fmt: skip
_TITLE = "daam_kernels: kernel benchmark"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("benchmarks") / "results", help="(default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Draw and write; returns the exit status, 1 where a file with results cannot be read."""
    from .plots import plot

    found = sorted(options.folder.glob("kernels-*.json"))
    if not found and not any(options.folder.glob("host-*.json")):
        raise SystemExit(f"{options.folder} has no results: python -m benchmarks kernels --out {options.folder}")
    pictures, broken = [], []
    for path in found:
        try:
            pictures += plot(to_csv(path, load(path)), options.folder)
        except SystemExit:  # of which the page tells
            broken.append(path)
    print("written:", *(f"  {path}" for path in (*pictures, write_page(options.folder))), sep="\n")
    return int(bool(broken))


def write_page(folder: Path) -> Path:
    """``folder / "report.html"``, of the results and pictures that are there; returns its path."""
    parts: list[str] = []
    for kind, section in (("kernels", _of_device), ("host", _of_host)):
        for path in sorted(folder.glob(f"{kind}-*.json")):
            try:
                parts += section(path)
            except SystemExit as error:  # one broken file must not cost the others their page
                print(error, file=sys.stderr)
                parts.append(f'<h2>{escape(path.name)}</h2><p class="missed">{escape(str(error))}</p>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{_TITLE}'
    body = f"<h1>{_TITLE}</h1>\n" + "\n".join(parts)
    head = f"<head>{head}</title><style>{_STYLE}</style></head>"
    write_text(folder / "report.html", f'<!doctype html>\n<html lang="en">{head}\n<body>{body}</body></html>\n')
    return folder / "report.html"


def _of_device(path: Path) -> Iterator[str]:
    results = load(path)
    environment, rows = results["environment"], results["rows"]
    yield f"<h2>{_where(environment)}</h2>"
    told = {**environment, **results.get("options", {})}
    yield _table(["", ""], [[name, _cell(value)] for name, value in told.items() if value is not None], "What ran")
    yield "<h3>Goals</h3>" + _goals(rows, environment)
    yield "<h3>Without a number</h3>" + _without_number(rows)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):  # not of files whose names begin with this one's
        for picture in sorted(path.parent.glob(f"{path.stem}-{dtype}-*.svg")):
            svg = picture.read_text(encoding="utf-8")
            yield f'<div class="wide">{svg[svg.index("<svg") :]}</div>'
    yield "<h3>All cases</h3>"
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), []).append(row)
    for group in cases.values():
        yield _case(group)


def _goals(rows: Sequence[Row], environment: dict) -> str:
    lines = []
    for goal in judge(list(rows), environment):
        misses = "".join(f"<li>{escape(miss)}</li>" for miss in goal.missed)
        listed = f"<details><summary>{len(goal.missed)} of {goal.judged}</summary><ul>{misses}</ul></details>"
        verdict = f'<span class="{goal.verdict}">{goal.verdict}</span>'
        lines.append([escape(goal.text), verdict, str(goal.judged), listed if goal.missed else ""])
    return _raw_table(["goal", "", "cells", "missed by"], lines, "", text=(3,))


def _without_number(rows: Sequence[Row]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok" or row["note"]:
            where = f"{row['shape']} {row['dtype']} {row['direction']}: {row['contender']}"
            reasons.setdefault((row["status"], row["note"] or ""), []).append(where)
    if not reasons:
        return "<p>Nothing failed, and nothing was skipped.</p>"
    order = {"wrong": 0, "failed": 1}
    lines = [
        [status, note, str(len(where)), "; ".join(where)]
        for (status, note), where in sorted(reasons.items(), key=lambda item: order.get(item[0][0], 2))
    ]
    return _table(["", "why", "cells", "which"], lines, "", text=(1, 3))


def _case(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = f"{first['shape']} [{first['dims']}] {first['dtype']}, {first['operator']}, axis {first['norm_axis']}, "
    title += f"H = {first['num_heads']}, K = {first['num_gaussians']}"
    tables = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        group = [row for row in rows if row["direction"] == direction]
        columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in group)]
        lines = [
            [row["contender"], *(_number(row.get(name), form) for _, name, form in columns), _status(row)]
            for row in group
        ]
        tables.append(_table(["", *(header for header, *_ in columns), ""], lines, direction, text=(len(columns) + 1,)))
    return f"<details><summary>{escape(title)}</summary>{''.join(tables)}</details>"


def _of_host(path: Path) -> Iterator[str]:
    """The costs of calls on the host, whatever columns they have."""
    try:
        results = read_json(path)
        rows, environment = [dict(row) for row in results["rows"]], dict(results["environment"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{path} has no results of the host benchmark: {error}") from None
    yield f"<h2>Calls on the host: {_where(environment)}</h2>"
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    first = [name for name in ("layer", "case", "direction") if name in names]
    names = [*first, *(name for name in names if name not in first)]
    yield _table(names, [[_cell(row.get(name)) for name in names] for row in rows], "")


def _where(environment: dict) -> str:
    date = str(environment.get("date"))[:10]
    return escape(f"{environment.get('device')}, {date}, commit {environment.get('commit')}")


def _status(row: Row) -> str:
    return "" if row["status"] == "ok" and not row["note"] else f"{row['status']}: {row['note']}"


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))  # names of contenders have commas
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], caption: str, text: Sequence[int] = ()) -> str:
    return _raw_table(header, [[escape(cell) for cell in line] for line in lines], caption, text)


def _raw_table(header: Sequence[str], lines: Sequence[Sequence[str]], caption: str, text: Sequence[int]) -> str:
    """Of cells that are HTML already; the columns ``text`` may be broken into lines."""
    opening = ['<td class="text">' if i in text else "<td>" for i in range(len(header))]
    body = "".join("<tr>" + "".join(f"{o}{c}</td>" for o, c in zip(opening, line)) + "</tr>\n" for line in lines)
    head = "".join(f"<th>{escape(name)}</th>" for name in header) if any(header) else ""
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{named}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
