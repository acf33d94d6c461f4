"""From how the steps ended to what a reader wants to know: one page, and the same as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from . import record, sanitizer
from .schedule import BAD, FAILED, NOT_RUN, OK, Outcome, Step
from .steps import CONTRACT, HUGE, SANITIZERS, TESTS, record_of, results_of

_MOST = 40  # failures of a step that the page names
_SLOWEST = 8
_TAIL = 3  # lines of a log that stand for a step which says nothing else
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*|^ERROR: .*", re.MULTILINE)


def judge(outcome: Outcome, out: Path, device: str) -> dict:
    """One step as a row: its status after a look at what it wrote, its counts, its failures and notes."""
    step, status, reason = outcome.step, outcome.status, outcome.reason
    entries = record.read(record_of(step, out))
    counts = Counter(entry["outcome"] for entry in entries)
    failures = [_said(entry) for entry in entries if entry["outcome"] == record.FAILED]
    notes = sorted({entry["message"] for entry in entries if entry["outcome"] == record.SKIPPED})
    log = outcome.log.read_text(encoding="utf-8", errors="replace") if outcome.log else ""
    if step.name in SANITIZERS and outcome.log:
        status, reason, complaints, more = _sanitized(status, reason, log)
        failures, notes = failures + complaints, notes + more
    elif step.name in (TESTS, HUGE, CONTRACT) and status == OK and device == "cuda" and not counts[record.PASSED]:
        status, reason, failures = FAILED, "no test ran", ["no test ran"]
    elif step.alone and outcome.log:
        wrong = _wrong_rows(results_of(step.name, device, out))
        failures, notes = (wrong, notes) if status in BAD else ([], wrong)
    if failures and status == OK:
        status = FAILED
    if status == FAILED and not failures:
        failures = [_end_of(log) or reason]
    slowest = sorted(entries, key=lambda entry: -entry["seconds"])[:_SLOWEST]
    return {
        "name": step.name, "status": status, "reason": reason, "started": outcome.started,
        "seconds": round(outcome.seconds, 1), "counts": dict(counts), "failures": failures, "notes": notes,
        "slowest": {entry["name"]: entry["seconds"] for entry in slowest}, "command": _command(step, out),
        "log": outcome.log and str(outcome.log.relative_to(out)),
    }  # fmt: skip


def failures(rows: list[dict]) -> list[str]:
    """Everything that went wrong, "step: what"."""
    found = []
    for row in rows:
        if row["status"] in BAD:
            named = row["failures"][:_MOST]
            found += [f"{row['name']}: {failure}" for failure in named or [f"{row['status']}, {row['reason']}"]]
            if len(row["failures"]) > _MOST:
                found.append(f"{row['name']}: and {len(row['failures']) - _MOST} more")
            if named and row["status"] != FAILED:
                found.append(f"{row['name']}: {row['status']}, {row['reason']}")
    return found


def page(rows: list[dict], environment: dict, seconds: float) -> str:
    """The summary in Markdown."""
    wrong = failures(rows)
    verdict = f"{len(wrong)} failed" if wrong else "nothing failed"
    lines = [f"# Verification: {verdict}", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items() if value is not None]
    lines += [f"- seconds: {seconds:.0f}", "", "| step | result | seconds | |", "|---|---|---|---|"]
    for row in rows:
        counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(row["counts"].items()))
        what = "; ".join(part for part in (counted, row["reason"]) if part)
        lines.append(f"| {row['name']} | {row['status']} | {row['seconds']:.0f} | {_cell(what)} |")
    noted = [(row["name"], note) for row in rows for note in row["notes"]]
    if noted:
        lines += ["", "## Notes", "", *(f"- {name}: {note}" for name, note in noted[:_MOST])]
    lines += ["", "## Failures", "", *([f"- {failure}" for failure in wrong] or ["None."])]
    return "\n".join(lines) + "\n"


def _command(step: Step, out: Path) -> str:
    """As it can be published: without the machine's folders."""
    return " ".join(step.command).replace(str(out), "OUT").replace(sys.executable, "python")


def _said(entry: dict) -> str:
    return f"{entry['name']}: {entry['message']}" if entry["message"] else entry["name"]


def _end_of(log: str) -> str:
    """The last error that it has, else its last lines."""
    errors = _ERROR.findall(log)
    lines = errors[-1:] or [line.strip() for line in log.splitlines() if line.strip()][-_TAIL:]
    return " | ".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sanitized(status: str, reason: str, log: str) -> tuple[str, str, list[str], list[str]]:
    """(status, reason, failures, notes): a warning, or an error of a kernel that is not ours, is a note."""
    report = sanitizer.parse(log)
    if report.unsupported and not report.ours:
        return NOT_RUN, "compute-sanitizer does not support this device", [], []
    ours, others = ([f"{count} x {what}" for what, count in c.most_common()] for c in (report.ours, report.others))
    if status == FAILED and report.finished and others and not ours:
        status, reason = OK, "nothing but warnings and errors of other packages' kernels"
    return status, reason, ours, others


def _wrong_rows(path: Path) -> list[str]:
    """Rows of a benchmark's results that are wrong or failed, in words."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, LookupError):
        return []
    found = []
    for row in rows:
        if str(row.get("status", "")).startswith(("wrong", "failed")):
            names = (row.get(name) for name in ("shape", "case", "dtype", "direction", "contender", "layer"))
            note = f": {row['note']}" if row.get("note") else ""
            found.append(f"{' '.join(str(name) for name in names if name)}: {row['status']}{note}")
    return found
