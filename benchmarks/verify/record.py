"""What was tried and how it ended, a line of JSON each, written at once: it is there when the process is killed.

As a plugin, ``pytest -p benchmarks.verify.record``, it writes the tests' outcomes to the file that the environment
variable of :data:`PATH` names. It also ends a process whose CUDA context an error has broken, where every later test
would fail: pytest-xdist starts another.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Callable, Iterable

PATH = "DAAM_KERNELS_VERIFY_RECORD"

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_LONGEST = 300  # characters of a message


def write(name: str, outcome: str, seconds: float, message: str = "") -> None:
    """Append a line to the file, where the environment variable names one."""
    path = os.environ.get(PATH)
    if path:
        line = {"name": name, "outcome": outcome, "seconds": round(seconds, 2), "message": message[:_LONGEST]}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict]:
    """The lines by name, a failure before what else was said of the same; none where there is no file."""
    found: dict[str, dict] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # of a process that was killed while it wrote
            continue
        known = found.get(entry["name"])
        if known is None or known["outcome"] != FAILED:
            found[entry["name"]] = entry
    return list(found.values())


def try_all(cases: Iterable[tuple[str, Callable[[], None]]]) -> int:
    """Run the cases one after the other, past failures; returns the exit status."""
    cases, status = list(cases), 0
    for number, (name, case) in enumerate(cases):
        start = time.perf_counter()
        try:
            case()
            outcome, message = PASSED, ""
        except Exception as error:
            outcome, message, status = FAILED, first_line(error), 1
        seconds = time.perf_counter() - start
        print(f"{name}: {outcome}, {seconds:.1f} s{message and ': '}{message}", flush=True)
        write(name, outcome, seconds, message)
        if outcome == FAILED and context_is_broken():
            for left, _ in cases[number + 1 :]:
                write(left, FAILED, 0.0, f"not tried: {name} broke the CUDA context")
            break
    return status


def first_line(error: Exception) -> str:
    """The type and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"


def context_is_broken() -> bool:
    """Whether CUDA refuses everything from now on, as it does after an illegal access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Outcomes:
    """In the process that hears of all tests."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != PASSED:
            write(report.nodeid, report.outcome, getattr(report, "duration", 0.0), _message(report))

    def pytest_collectreport(self, report) -> None:
        if report.outcome == FAILED:
            write(report.nodeid, FAILED, 0.0, _message(report))


class _Context:
    """In the processes that run them."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self.leave, self.failed = leave, False

    def pytest_runtest_logreport(self, report) -> None:
        self.failed = self.failed or report.outcome == FAILED

    def pytest_runtest_logfinish(self) -> None:
        if self.failed and context_is_broken():
            self.leave()
        self.failed = False


def pytest_configure(config) -> None:
    import pytest

    if hasattr(config, "workerinput"):  # of pytest-xdist, which reports a worker that has gone, and starts another
        config.pluginmanager.register(_Context(lambda: os._exit(1)))
        return
    config.pluginmanager.register(_Outcomes())
    if not config.getoption("numprocesses", None):
        config.pluginmanager.register(_Context(lambda: pytest.exit("the CUDA context is broken", 1)))


def _message(report) -> str:
    """The error's own line, or why it was skipped."""
    text = report.longrepr
    if isinstance(text, tuple):
        return str(text[-1])
    crash = getattr(text, "reprcrash", None)
    lines = str(crash.message if crash else text or "").splitlines() or [""]
    return lines[0] if crash else lines[-1]
