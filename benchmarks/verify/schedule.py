"""Steps as processes: side by side where they compile, alone where they measure, each with a limit of its own.

Nothing that a step does ends the others: it may fail, hang, or break its CUDA context.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from daam_kernels.explain.files import named_in_errors

OK, FAILED, TIMED_OUT, OUT_OF_TIME, NOT_RUN = "ok", "failed", "timed out", "out of time", "not run"
INTERRUPTED = "interrupted"
BAD = (FAILED, TIMED_OUT, OUT_OF_TIME, INTERRUPTED)

_POLL, _GRACE = 0.1, 3.0
_LEAST = 3.0  # seconds that a step must have left to be started


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        limit: seconds after which it is killed.
        slots: processor cores that it keeps busy.
        alone: it measures time, so nothing else may run, and it comes when all others are done.
        usual: seconds that are kept for it, where it is ``alone``, of the overall limit.
        after: the names of the steps that have to have ended before.
        problem: why it cannot be run here.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    slots: int = 1
    alone: bool = False
    usual: float = 0.0
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class Outcome:
    """How a step ended. ``status`` is one of this module's; ``code`` the exit status of a process that ended itself."""

    step: Step
    status: str
    reason: str = ""
    code: int | None = None
    started: float | None = None
    seconds: float = 0.0
    log: Path | None = None


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    started: float
    until: float
    log: Path


def run(
    steps: list[Step], logs: Path, limit: float, slots: int, folder: Path, advance: Callable[[str], None]
) -> list[Outcome]:
    """Run all steps from ``folder``, those first in the list first; their outcomes in that order.

    ``advance`` hears of every start and end. A step's output goes to a file of its name in ``logs``.
    """
    logs.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    outcomes = {s.name: Outcome(s, NOT_RUN, s.problem) for s in steps if s.problem}
    pending = [s for s in steps if not s.problem]
    kept = min(sum(s.usual for s in pending if s.alone), limit / 2)
    running: list[_Running] = []

    def note(outcome: Outcome) -> None:
        outcomes[outcome.step.name] = outcome
        advance(f"{outcome.step.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.reason}".rstrip())

    for outcome in list(outcomes.values()):
        note(outcome)
    try:
        while pending or running:
            now = time.monotonic() - begin
            for one in list(running):
                code = one.process.poll()
                if code is None and now < one.until:
                    continue
                running.remove(one)
                if code is None:
                    _end(one.process)
                taken = dict(started=one.started, seconds=now - one.started, log=one.log)
                if code is None:
                    note(Outcome(one.step, TIMED_OUT, f"killed after {now - one.started:.0f} s", **taken))
                else:
                    note(Outcome(one.step, OK if code == 0 else FAILED, _ended(code), code, **taken))
            for step in list(pending):
                until = limit if step.alone else limit - kept
                if now + _LEAST > until:
                    pending.remove(step)
                    note(Outcome(step, OUT_OF_TIME, f"the limit is {limit:.0f} s"))
                elif _may_start(step, running, pending, outcomes, slots):
                    pending.remove(step)
                    running.append(_start(step, now, until, logs, folder))
                    advance(f"{step.name}: started")
            time.sleep(_POLL)
    except KeyboardInterrupt:  # what has ended by now is still worth its summary
        now, started = time.monotonic() - begin, {one.step.name: one for one in running}
        for step in (step for step in steps if step.name not in outcomes):
            if one := started.get(step.name):
                taken = dict(started=one.started, seconds=now - one.started, log=one.log)
                note(Outcome(step, INTERRUPTED, f"after {now - one.started:.0f} s", **taken))
            else:
                note(Outcome(step, INTERRUPTED, "before it started"))
    finally:
        for one in running:
            _end(one.process)
    return [outcomes[step.name] for step in steps]


def _may_start(step: Step, running: list[_Running], pending: list[Step], outcomes: dict, slots: int) -> bool:
    if any(name not in outcomes for name in step.after):
        return False
    if step.alone:
        return not running and all(other.alone for other in pending)
    return not running or sum(one.step.slots for one in running) + step.slots <= slots


def _start(step: Step, now: float, until: float, logs: Path, folder: Path) -> _Running:
    log = logs / f"{step.name.replace(' ', '-')}.log"
    with open(log, "w", encoding="utf-8") as file:
        with named_in_errors(log):
            file.write(f"# at {now:.0f} s: {' '.join(step.command)}\n")
            file.flush()
        process = subprocess.Popen(
            step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, **step.environment}, start_new_session=True,
        )  # fmt: skip
    return _Running(step, process, now, min(until, now + step.limit), log)


def _end(process: subprocess.Popen) -> None:
    """The process and those that it started; one that the driver holds is left behind."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        try:
            os.killpg(process.pid, number) if hasattr(os, "killpg") else process.kill()
            process.wait(_GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit status {code}" if code else ""
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
