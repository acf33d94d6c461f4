"""``python -m benchmarks host``: what a small call costs on the host, layer by layer of Python."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from daam_kernels.backends import BACKENDS, resolve

from .. import arguments
from ..environment import describe, usable_device, usable_folder
from ..kernels.check import complaint, errors, truth
from ..kernels.contender import BOTH, CONTRACT, FORWARD, Contender
from ..kernels.data import make_case
from ..kernels.shapes import SHAPES, Case
from ..report import format_table, write_csv, write_json
from ..timing import graph_timer, interleave, wall_timer
from .layers import LAUNCH, LAYER_NORM, Layer, layers

_CASES = ("tiny", "wavlm")
_DIRECTIONS = (FORWARD, BOTH)
_NUM_GAUSSIANS = 4
_CALLS, _SECONDS = 20, 0.01  # in a row, so that they share a look at the clock and a wait for the device; no longer
_DEVICE = "kernels on the device"
_RESULTS = Path("benchmarks") / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="of daam_kernels (default: %(default)s)"
    )
    parser.add_argument(
        "--cases", default=",".join(_CASES), help=f"comma-separated, of {', '.join(SHAPES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=arguments.seconds,
        default=2.0,
        metavar="SECONDS",
        help="per case and direction (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=arguments.count, default=1, help="of the CPU's kernels, of which the host's cost knows "
        "nothing (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for the results (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit status: 1 where a layer was wrong or failed."""
    device = usable_device(options.device)
    names = [name.strip() for name in options.cases.split(",")]
    for name in names:
        if name not in SHAPES or SHAPES[name].operator != "product":
            known = ", ".join(name for name, shape in SHAPES.items() if shape.operator == "product")
            raise SystemExit(f"unknown case {name!r}, known are {known}")
    try:
        resolve(options.backend, torch.empty(0, device=device))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"--backend {options.backend}: {error}") from None
    usable_folder(options.out)
    torch.set_num_threads(options.threads)
    environment, rows = describe(device), []
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None), flush=True)
    for name in names:
        case = make_case(SHAPES[name], torch.float32, device, _NUM_GAUSSIANS)
        found = measure(case, options.backend, options.budget)
        rows += found
        for direction in _DIRECTIONS:
            print(_table([row for row in found if row["direction"] == direction]), flush=True)
    paths = [options.out / f"host-{device.type}.{suffix}" for suffix in ("json", "csv")]
    write_json(paths[0], {"environment": environment, "rows": rows})
    write_csv(paths[1], [{**row, **environment} for row in rows])
    print("written:", *(f"  {path}" for path in paths), sep="\n")
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def measure(case: Case, backend: str, budget: float) -> list[dict]:
    """One row for each direction and layer; microseconds of wall clock per call, and their ratio to layer_norm's."""
    true, made, rows = truth(case), {}, []
    for name, make in layers(case, backend).items():
        with _noted() as problem:
            made[name] = make()
        if problem:
            made[name] = problem[0]
    for direction in _DIRECTIONS:
        group = {name: _row(case, backend, direction, name) for name in made}
        timers: dict[str, Callable[[], float]] = {}
        for name, layer in made.items():
            if isinstance(layer, Exception):
                _fail(group[name], layer)
                continue
            with _noted() as problem:
                _check(group[name], layer, direction, case, true)
                if group[name]["status"] == "ok":
                    timers[name] = partial(_time, direction, _timer(layer.calls[direction], direction, case.x.device))
            if problem:
                _fail(group[name], problem[0])
        if case.x.is_cuda and LAUNCH in timers:
            group[_DEVICE] = _row(case, backend, direction, _DEVICE)
            with _noted() as problem, _mode(direction):
                timers[_DEVICE] = graph_timer([made[LAUNCH].calls[direction]] * _CALLS)
            if problem:
                _fail(group[_DEVICE], problem[0])
        for name, result in interleave(timers, budget).items():
            if isinstance(result, Exception):
                _fail(group[name], result)
                continue
            group[name] |= {
                "us": 1e6 * result.median, "us_iqr": 1e6 * result.spread, "us_best": 1e6 * result.best,
                "repetitions": result.repetitions,
            }  # fmt: skip
        usual = group[LAYER_NORM].get("us")
        for row in group.values():
            row["over_layer_norm"] = row["us"] / usual if usual and row.get("us") else None
        rows += group.values()
    return rows


def _row(case: Case, backend: str, direction: str, layer: str) -> dict:
    shape = case.shape
    return {
        "device": case.x.device.type, "case": shape.name, "dims": "x".join(map(str, shape.dims)),
        "dtype": str(case.x.dtype).removeprefix("torch."), "num_heads": shape.num_heads,
        "num_gaussians": case.num_gaussians, "backend": backend, "direction": direction, "layer": layer,
        "status": "ok", "note": None, "us": None, "us_iqr": None, "us_best": None, "repetitions": None,
        "over_layer_norm": None,
    }  # fmt: skip


def _check(row: dict, layer: Layer, direction: str, case: Case, true) -> None:
    """Right before it is timed: within the numeric contract."""
    with _mode(direction):
        results = layer.calls[direction]()
    if layer.judged:
        judge = Contender(layer.name)
        judge.tolerance = CONTRACT[case.x.dtype]
        row["note"] = complaint(judge, errors(direction, [t.detach() for t in results], true))
        row["status"] = "wrong" if row["note"] else "ok"


def _timer(call: Callable[[], object], direction: str, device: torch.device) -> Callable[[], float]:
    """Of as many calls in a row as are short together."""
    once = _time(direction, wall_timer([call], device))
    return wall_timer([call] * max(1, min(_CALLS, int(_SECONDS / once))), device)


def _time(direction: str, timer: Callable[[], float]) -> float:
    with _mode(direction):
        return timer()


def _mode(direction: str) -> contextlib.AbstractContextManager:
    """A forward pass by itself is one of inference; entered outside of what is timed."""
    return torch.no_grad() if direction == FORWARD else torch.enable_grad()


@contextlib.contextmanager
def _noted():
    """A list that gets the exception of what fails inside."""
    problem: list[Exception] = []
    try:
        yield problem
    except Exception as error:
        problem.append(error)


def _fail(row: dict, error: Exception) -> None:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    row["status"], row["note"] = "failed", f"{type(error).__name__}: {first[:160]}"


def _table(rows: list[dict]) -> str:
    first = rows[0]
    header = ["layer", "us", "IQR", "best", "x layer_norm", ""]
    lines = [
        [
            row["layer"], *(_number(row[name], ".1f") for name in ("us", "us_iqr", "us_best")),
            _number(row["over_layer_norm"], ".2f"), "" if row["status"] == "ok" else f"{row['status']}: {row['note']}",
        ]
        for row in rows
    ]  # fmt: skip
    title = f"\n{first['case']} [{first['dims']}] {first['dtype']}, {first['num_heads']} heads, "
    title += f"K = {first['num_gaussians']}, {first['direction']}"
    return f"{title}\n{format_table(header, lines)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
