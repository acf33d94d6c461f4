"""``python -m benchmarks kernels``: time the fused operators beside what else computes them, and beside a copy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Callable

import torch

from .. import arguments
from ..environment import INTERRUPTED, describe, usable_device, usable_folder
from . import compare, selection
from .bare import BARE
from .contenders import FUSED
from .page import write_page
from .scaling import GROUPS
from .shapes import SHAPES, Shape
from .store import Results, load
from .sweep import Limits, sweep
from .table import section

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_RESULTS = Path("benchmarks") / "results"
_QUICK_SHAPES = "tiny,wavlm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shapes",
        help=f"comma-separated, of {', '.join(SHAPES)} (default: all of these on cuda; on cpu "
        f"all but {', '.join(name for name, shape in SHAPES.items() if not shape.on_cpu)}), and of the groups "
        f"{', '.join(GROUPS)}, in which one size grows",
    )
    parser.add_argument(
        "--dtype", help=f"comma-separated, of {', '.join(_DTYPES)} (default: float32, on cuda bfloat16 too)"
    )
    parser.add_argument(
        "--direction", default="fwd,bwd,both", metavar="fwd,bwd,both",
        help="bwd: the backward alone, after a forward that is not timed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--contenders", help="comma-separated, by name or its first letters (default: all)")
    parser.add_argument(
        "--num-gaussians", type=arguments.counts, metavar="K,...",
        help=f"each shape with each (default: what the shape says, else {selection.DEFAULT_GAUSSIANS})",
    )  # fmt: skip
    parser.add_argument(
        "--num-heads", type=arguments.counts, metavar="H,...", help="each shape with each (default: what it says)"
    )
    parser.add_argument("--quick", action="store_true", help=f"shapes {_QUICK_SHAPES}, short timings, less compiled")
    parser.add_argument(
        "--budget",
        type=arguments.seconds,
        metavar="SECONDS",
        help="timing per shape, type and direction (default: 3, quick: 0.5)",
    )
    parser.add_argument(
        "--call-limit", type=arguments.seconds, default=8.0, metavar="SECONDS",
        help="on a CPU, skip what takes longer than this for one call (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--compile-upstream", action=argparse.BooleanOptionalAction,
        help="torch.compile of the public package too, a minute or two per shape and type (default: not with --quick)",
    )  # fmt: skip
    parser.add_argument("--threads", type=arguments.count, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--seed", type=arguments.seed, default=0)
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for the results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same kind ended")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="earlier results to set these beside, as compare does"
    )


def run(options: argparse.Namespace) -> int:
    """Sweep, print and write; returns the exit status.

    It is 1 where the fused operator or its kernel was wrong, failed, or is slower than in the results to compare with,
    and where there is no right result at all.
    """
    from .plots import plot  # now and not at the end: a sweep of hours is not to be lost for want of matplotlib

    device = usable_device(options.device)
    cases = _cases(options, device)
    if not cases:
        raise SystemExit("nothing is left to measure: --shapes, --num-heads")
    old = load(options.compare) if options.compare else None  # now, because it may be the file that is written
    limits = _limits(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    environment = describe(device)
    asked = {
        "directions": list(limits.directions), "contenders": sorted(limits.names) if limits.names else None,
        "budget": limits.budget, "call_limit": limits.call, "compile_upstream": limits.compile_slowly,
        "seed": options.seed,
    }  # fmt: skip
    results = Results(usable_folder(options.out) / f"kernels-{device.type}", environment, asked)
    if options.resume:
        results.take_up()
        there = [case for case in cases if results.has(*case)]
        cases = [case for case in cases if case not in there]
        print(f"{len(there)} cases are there: {', '.join(f'{s.name} {_name(d)}' for s, d in there) or 'none'}")
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None), flush=True)
    if device.type == "cpu" and (environment["load_at_start"] or 0) > 0.5:
        print("other work keeps this machine busy: threads wait for each other, small cases suffer most", flush=True)

    try:
        _sweep_all(cases, device, options.seed, limits, results)
    except KeyboardInterrupt:
        print(f"interrupted; with --resume the same command goes on after the cases in {results.json}")
        return INTERRUPTED
    _finish(results, plot)
    ours = [row for row in results.rows if row["contender"].startswith((FUSED, BARE))]
    regressed = compare.report(old, {"environment": environment, "rows": results.rows}) if old else 0
    bad = any(row["status"] in ("wrong", "failed") for row in ours)
    return int(regressed or bad or not any(row["status"] == "ok" for row in results.rows))


def _cases(options: argparse.Namespace, device: torch.device) -> list[tuple[Shape, torch.dtype]]:
    on_gpu = device.type == "cuda"
    everything = ",".join(name for name, shape in SHAPES.items() if shape.on_cpu or on_gpu)
    usual = _QUICK_SHAPES if options.quick else everything
    shapes = selection.choose_shapes(usual if options.shapes is None else options.shapes, on_gpu)
    usual = "float32,bfloat16" if on_gpu else "float32"
    dtypes = selection.choose(usual if options.dtype is None else options.dtype, _DTYPES, "dtype")
    shapes, notes = selection.multiply(shapes, options.num_gaussians, options.num_heads)
    print(*notes, sep="\n", end="\n" if notes else "")
    return [(shape, dtype) for dtype in dtypes for shape in shapes]


def _limits(options: argparse.Namespace) -> Limits:
    compile_slowly = not options.quick if options.compile_upstream is None else options.compile_upstream
    directions = tuple(selection.choose(options.direction, selection.DIRECTIONS_BY_OPTION, "direction"))
    names = None if options.contenders is None else selection.choose_contenders(options.contenders)
    budget = (0.5 if options.quick else 3.0) if options.budget is None else options.budget
    return Limits(budget, options.call_limit, compile_slowly, directions, names)


def _sweep_all(
    cases: list[tuple[Shape, torch.dtype]], device: torch.device, seed: int, limits: Limits, results: Results
) -> None:
    from tqdm import tqdm  # here and above: the extras are needed by whoever runs this, not by whoever asks for help

    line = "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {desc}"
    weights = [_weight(shape.numel) for shape, _ in cases]
    with tqdm(total=sum(weights) + 1e-6, bar_format=line, dynamic_ncols=True) as bar:
        for i, (shape, dtype) in enumerate(cases):

            def advance(what: str, share: float) -> None:
                bar.set_description_str(f"{shape.name} {_name(dtype)}: {what}", refresh=False)
                bar.update(share * weights[i])

            cells = []
            for group in sweep(shape, dtype, device, seed, limits, advance):
                cells += group
                bar.write(section(group))
            results.add(cells)
            bar.update(sum(weights[: i + 1]) - bar.n)  # a case that failed did not take its steps


def _finish(results: Results, plot: Callable[[Path, Path], list[Path]]) -> None:
    """The pictures, the page, and where everything is."""
    if results.rows:
        pictures = plot(results.csv, results.csv.parent)
        page = write_page(results.csv.parent)
        print("written:", *(f"  {path}" for path in (results.json, results.csv, *pictures, page)), sep="\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weight(numel: int) -> float:
    """Roughly how long a case takes, for the remaining time shown: compiling, then passes over the data."""
    return 15 + numel / 1.5e6
