"""``python -m benchmarks compare``: how many times longer everything takes than in older results.

The rule, which the output repeats: a time is beyond the noise where its ratio, new to old, is further from 1 than the
interquartile ranges of both runs, each as a part of its median, and the drift of the copy beside them, taken together,
and than 5 %. The copy moves the same bytes in both runs, so its own ratio says what the machine did.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..report import Row, format_table
from .bare import BARE
from .contenders import COPY, FUSED, without_backend
from .store import case_of, differences, load
from .sweep import INPUTS

RULE = (
    "beyond the noise: a ratio new/old further from 1 than both interquartile ranges over their medians, plus the "
    "drift of the copy of that case, and than 0.05"
)
_LEAST = 0.05
_SLOWER, _FASTER, _LOST = "SLOWER", "faster", "LOST"


@dataclass(frozen=True)
class Change:
    """One contender on one case in one direction, then and now.

    Attributes:
        title: the case and direction.
        ratio: time now over time then; None where one of them has none.
        noise: how far from 1 a ratio may be and mean nothing.
    """

    title: str
    contender: str
    then_us: float | None
    now_us: float | None
    ratio: float | None
    noise: float | None
    status: str = "ok"  # now
    note: str = ""

    @property
    def verdict(self) -> str:
        """Empty within the noise; otherwise SLOWER, faster, or LOST where there is no right result any more."""
        if self.ratio is None:
            return _LOST if self.then_us is not None and self.status in ("wrong", "failed") else ""
        if self.contender == COPY or abs(self.ratio - 1) <= self.noise:
            return ""
        return _SLOWER if self.ratio > 1 else _FASTER

    @property
    def regressed(self) -> bool:
        """Whether this is one of ours, and worse."""
        return self.verdict in (_SLOWER, _LOST) and self.contender.startswith((FUSED, BARE))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument("old", type=Path, help="a .json file of python -m benchmarks kernels")
    parser.add_argument("new", type=Path, help="another one")


def run(options: argparse.Namespace) -> int:
    """Compare two files; returns the exit status, 1 where one of ours became slower or was lost."""
    return report(load(options.old), load(options.new))


def report(old: dict, new: dict) -> int:
    """Print what changed between two runs; returns 1 where one of ours became slower or was lost, else 0."""
    changes = compare(old["rows"], new["rows"])
    if not changes:
        raise SystemExit("the two have no case in common")
    for line in differences(old["environment"], new["environment"]):
        print(line)
    for title in dict.fromkeys(change.title for change in changes):
        print(f"\n{title}\n{_table([change for change in changes if change.title == title])}")
    apart = _keys(old["rows"]) ^ _keys(new["rows"])
    print(f"\n{RULE}")
    if apart:
        print(f"{len(apart)} cases and directions are in one of the two only")
    worse = [change for change in changes if change.regressed]
    for change in worse:
        print(f"{change.verdict}: {change.contender}, {change.title}")
    print(f"{len(worse)} of ours regressed" if worse else "none of ours regressed")
    return int(bool(worse))


def compare(old: list[Row], new: list[Row]) -> list[Change]:
    """What both have, in the order of ``new``; a fused operator is the same whichever backend served it."""
    then = _by_name(old)
    now = _with_lost(then, _by_name(new))
    return [_change(key, then, now) for key in now if key in then]


def _change(key: tuple, then: dict[tuple, Row], now: dict[tuple, Row]) -> Change:
    (*case, direction, contender), a, b = key, then[key], now[key]
    clock = _clock(a, b)
    before, after = _time(a, clock), _time(b, clock)
    notes = [] if b["status"] == "ok" else [f"{b['status']}: {b['note']}"]
    if a["contender"] != b["contender"]:
        notes.append(f"then {a['contender']}")
    shape, dims, operator, axis, heads, _, gaussians, dtype = case
    title = f"{shape} [{dims}] {dtype}, {operator}, axis {axis}, {heads} heads, K = {gaussians}, {direction}"
    if before is None or after is None:
        return Change(title, contender, before, after, None, None, b["status"], "; ".join(notes))
    copy = (*case, direction, COPY)
    drift = abs(_time(now[copy], clock) / _time(then[copy], clock) - 1) if _both(copy, clock, then, now) else 0.0
    spread = sum((row[f"{clock}_us_iqr"] or 0) / row[f"{clock}_us"] for row in (a, b))
    noise = max(_LEAST, spread + drift)
    return Change(title, contender, before, after, after / before, noise, b["status"], "; ".join(notes))


def _clock(a: Row, b: Row) -> str:
    return "kernel" if a["kernel_us"] and b["kernel_us"] else "wall"


def _time(row: Row, clock: str) -> float | None:
    return row[f"{clock}_us"] if row["status"] == "ok" else None


def _both(key: tuple, clock: str, *runs: dict[tuple, Row]) -> bool:
    return all(key in run and _time(run[key], clock) for run in runs)


def _by_name(rows: list[Row]) -> dict[tuple, Row]:
    return {(*case_of(row), row["direction"], without_backend(row["contender"])): row for row in rows}


def _with_lost(then: dict[tuple, Row], now: dict[tuple, Row]) -> dict[tuple, Row]:
    """``now``, and a failed row for everything that ``then`` has of a case whose data or reference failed now."""
    failed = {key[:-1]: row for key, row in now.items() if key[-1] == INPUTS}
    lost = {key: {**failed[key[:-1]], "contender": row["contender"]} for key, row in then.items() if key[:-1] in failed}
    return {**lost, **now}


def _keys(rows: list[Row]) -> set[tuple]:
    return {(*case_of(row), row["direction"]) for row in rows}


def _table(changes: list[Change]) -> str:
    lines = [
        [
            c.contender, *("-" if us is None else f"{us:.1f}" for us in (c.then_us, c.now_us)),
            "-" if c.ratio is None else f"{c.ratio:.3f}", "-" if c.noise is None else f"{c.noise:.3f}",
            "  ".join(filter(None, (c.verdict, c.note))),
        ]
        for c in changes
    ]  # fmt: skip
    return format_table(["contender", "old us", "new us", "new/old", "noise", ""], lines)
