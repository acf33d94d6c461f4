"""``python -m benchmarks verify``: all that only a GPU can show, in one command: tests, derivatives, memory, speed.

Every step is a process with a limit of its own; what fails is listed at the end. Results go to --out: ``summary.md``,
``verify.json``, the benchmarks' results and pictures, and in ``logs`` what every step printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from .. import arguments
from ..environment import usable_device, usable_folder
from ..report import write_json, write_text
from .schedule import run as run_steps
from .steps import GROUPS, TIMINGS, results_of, steps
from .summary import failures, judge, page

_REPOSITORY = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the summary, the results and the logs")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda",
        help="cpu: a dry run of every step, on small problems (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", default=",".join(GROUPS), help="comma-separated, run in the order of their worth (default: all: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=arguments.seconds, default=480, metavar="SECONDS", help="for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--cores",
        type=arguments.count,
        default=os.cpu_count() or 1,
        help="processor cores to keep busy (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the steps and write; returns the exit status: 1 where anything failed or was not finished in time."""
    groups = tuple(name.strip() for name in options.steps.split(","))
    for name in groups:
        if name not in GROUPS:
            raise SystemExit(f"unknown step {name!r}, known are {', '.join(GROUPS)}")
    if not (_REPOSITORY / "tests").is_dir():
        raise SystemExit(f"{_REPOSITORY} has no tests: run this in a checkout of the repository")
    usable_device(options.device)
    out = options.out.resolve()
    logs = usable_folder(out) / "logs"
    logs.mkdir(exist_ok=True)
    # What an earlier run left would be taken for this one's wherever a step does not come to write its own.
    left = [out / "environment.json", *logs.glob("*.jsonl"), *logs.glob("*.log")]
    left += [results_of(name, options.device, out) for name in TIMINGS if name in groups]
    for path in left:
        path.unlink(missing_ok=True)
    begin = time.monotonic()

    def advance(what: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {what}", file=sys.stderr, flush=True)

    chosen = steps(options.device, groups, out, options.cores, _REPOSITORY)
    slots = options.cores + options.cores // 4  # who waits for the GPU leaves a core to others
    outcomes = run_steps(chosen, logs, options.limit, slots, _REPOSITORY, advance)
    rows = [judge(outcome, out, options.device) for outcome in outcomes]
    seconds = time.monotonic() - begin
    environment = _environment(out)
    content = {"environment": environment, "device": options.device, "limit": options.limit, "seconds": seconds}
    text = page(rows, environment, seconds)
    print(text, flush=True)  # first: a full disk must not cost it
    write_json(out / "verify.json", content | {"failures": failures(rows), "steps": rows})
    write_text(out / "summary.md", text)
    return int(bool(failures(rows)))


def _environment(out: Path) -> dict:
    """What the step of that name wrote, if it came so far."""
    try:
        return json.loads((out / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
