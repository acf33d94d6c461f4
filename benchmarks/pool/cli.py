"""``python -m benchmarks pool``: attention pooling beside plain PyTorch: right first, then time and peak memory."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import arguments
from ..environment import describe, usable_device, usable_folder
from ..kernels.memory import peak_bytes
from ..report import format_table, write_csv, write_json
from ..timing import interleave, wall_timer
from .cases import OURS, SHAPES, Case, contenders, make_case, truth

_QUICK = ("tiny", "tiny ragged")
_RESULTS = Path("benchmarks") / "results"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01, "float64": 1e-10}
_DIRECTIONS = ("forward", "forward+backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help=f"comma-separated, of {', '.join(SHAPES)} (default: all, quick: {_QUICK})")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--quick", action="store_true", help="small shapes, short timings, nothing compiled")
    parser.add_argument(
        "--budget", type=arguments.seconds, metavar="SECONDS", help="per direction (default: 5, quick: 0.2)"
    )
    parser.add_argument("--threads", type=arguments.count, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for the results (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit status: 1 where ours was wrong or failed."""
    from tqdm import tqdm  # here: the extras are needed by whoever runs this, not by whoever asks for help

    device = usable_device(options.device)
    names = options.shapes.split(",") if options.shapes else _QUICK if options.quick else list(SHAPES)
    for name in names:
        if name not in SHAPES:
            raise SystemExit(f"unknown shape {name!r}, known are {', '.join(SHAPES)}")
    usable_folder(options.out)
    if options.threads:
        torch.set_num_threads(options.threads)
    budget = (0.2 if options.quick else 5.0) if options.budget is None else options.budget
    environment, rows = describe(device), []
    bar = tqdm(names, unit="shape", dynamic_ncols=True)
    for name in bar:
        bar.set_description_str(name)
        case = make_case(SHAPES[name], _DTYPES[options.dtype], device)
        found = measure(case, options.dtype, budget, compiled=not options.quick)
        rows += found
        bar.write(_table(case, found))
    paths = [options.out / f"pool-{device.type}.{suffix}" for suffix in ("json", "csv")]
    write_json(paths[0], {"environment": environment, "rows": rows})
    write_csv(paths[1], rows)
    print("written:", *(f"  {path}" for path in paths), sep="\n")
    return int(any(row["contender"] == OURS and row["status"] != "ok" for row in rows))


def measure(case: Case, dtype: str, budget: float, compiled: bool) -> list[dict]:
    """One row for each contender: status, error, and for each direction milliseconds and peak MB."""
    shape, expected, calls, rows = case.shape, truth(case), {}, {}
    common = {"shape": shape.name, "bags": len(shape.lengths), "rows": sum(shape.lengths), "score": shape.score}
    common |= {"embed_dim": shape.embed_dim, "hops": shape.hops, "dtype": dtype}
    for name, function in contenders(case).items():
        if "compiled" in name and not compiled:
            continue
        row = rows[name] = {**common, "contender": name, "status": "ok", "error": None}
        by_direction = {
            direction: (lambda function=function, direction=direction: _call(function, case, direction))
            for direction in _DIRECTIONS
        }
        try:
            row["error"] = max(map(_error, by_direction[_DIRECTIONS[1]](), expected))
            if not row["error"] <= _TOLERANCES[dtype]:
                row["status"] = "wrong"
            for direction, call in by_direction.items():
                call()  # what compiles does so now
                row[f"{direction} mb"] = peak_bytes(call, case.x.device) / 1e6
        except Exception as error:  # what fails for one, such as memory, is a result
            row["status"] = f"failed: {type(error).__name__}"
            continue
        calls[name] = by_direction
    for direction in _DIRECTIONS:
        timers = {name: wall_timer([by[direction]], case.x.device) for name, by in calls.items()}
        for name, found in interleave(timers, budget).items():
            if isinstance(found, Exception):
                rows[name]["status"] = f"failed: {type(found).__name__}"
            else:
                rows[name] |= {f"{direction} ms": 1e3 * found.median, f"{direction} ms iqr": 1e3 * found.spread}
    return list(rows.values())


def _call(function, case: Case, direction: str) -> tuple:
    if direction == "forward":
        with torch.no_grad():
            return (function(case.x, case.parameters),)
    context = function(case.x, case.parameters)
    return context.detach(), *torch.autograd.grad(context, (case.x, *case.parameters), case.grad)


def _error(result, exact) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def _table(case: Case, rows: list[dict]) -> str:
    shape = case.shape
    header = ["contender", *(f"{direction} {unit}" for direction in _DIRECTIONS for unit in ("ms", "MB")), "error", ""]
    lines = [
        [
            row["contender"],
            *(_number(row.get(f"{direction} {unit}"), ".1f") for direction in _DIRECTIONS for unit in ("ms", "mb")),
            _number(row["error"], ".0e"),
            row["status"],
        ]
        for row in rows
    ]
    title = f"\n{shape.name}: {len(shape.lengths)} bag(s) of {min(shape.lengths)} to {max(shape.lengths)} rows, "
    title += f"embed_dim {shape.embed_dim}, {shape.score}, {shape.hops} hop(s); x is {_megabytes(case):.0f} MB"
    return f"{title}\n{format_table(header, lines)}"


def _megabytes(case: Case) -> float:
    return case.x.numel() * case.x.element_size() / 1e6


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
