"""``python -m benchmarks kernels``: time the fused operators beside what else computes them, and beside a copy."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from ..environment import describe, usable_device
from ..report import write_csv, write_json
from .bare import BARE
from .contenders import FUSED
from .data import make_case
from .shapes import SHAPES
from .sweep import Cell, Limits, measure, steps
from .table import section

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_RESULTS = Path("benchmarks") / "results"
_QUICK_SHAPES = "tiny,wavlm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shapes",
        help=f"comma-separated, of {', '.join(SHAPES)} (default: all on cuda; on cpu "
        f"all but {', '.join(name for name, shape in SHAPES.items() if not shape.on_cpu)})",
    )
    parser.add_argument(
        "--dtype", help=f"comma-separated, of {', '.join(_DTYPES)} (default: float32, on cuda bfloat16 too)"
    )
    parser.add_argument(
        "--num-gaussians", type=int, default=4, metavar="K",
        help="where the shape does not say (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=f"shapes {_QUICK_SHAPES}, short timings, less compiled")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="timing per shape, type and direction (default: 3, quick: 0.5)"
    )
    parser.add_argument(
        "--call-limit", type=float, default=8.0, metavar="SECONDS",
        help="on a CPU, skip what takes longer than this for one call (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--compile-upstream", action=argparse.BooleanOptionalAction,
        help="torch.compile of the public package too, a minute or two per shape and type (default: not with --quick)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for the results (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Sweep, print and write; returns the exit status: 1 where the fused operator or its kernel was wrong or failed."""
    from tqdm import tqdm  # here and below: the extras are needed by whoever runs this, not by whoever asks for help

    from .plots import plot

    everything = ",".join(name for name, shape in SHAPES.items() if shape.on_cpu or options.device != "cpu")
    default_shapes = _QUICK_SHAPES if options.quick else everything
    default_dtypes = "float32,bfloat16" if options.device == "cuda" else "float32"
    shapes = _chosen(options.shapes or default_shapes, SHAPES, "shape")
    dtypes = _chosen(options.dtype or default_dtypes, _DTYPES, "dtype")
    device = usable_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    compile_slowly = not options.quick if options.compile_upstream is None else options.compile_upstream
    limits = Limits(options.budget or (0.5 if options.quick else 3.0), options.call_limit, compile_slowly)
    environment = describe(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None), flush=True)
    if device.type == "cpu" and (environment["load_at_start"] or 0) > 0.5:
        print("other work keeps this machine busy: threads wait for each other, small cases suffer most", flush=True)

    cells: list[Cell] = []
    plan = [(shape, dtype) for dtype in dtypes for shape in shapes]
    weights = [_weight(shape.numel) for shape, _ in plan]
    line = "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {desc}"
    bar = tqdm(total=sum(weights), bar_format=line, dynamic_ncols=True)
    try:
        for (shape, dtype), weight in zip(plan, weights):
            case = make_case(shape, dtype, device, options.num_gaussians, options.seed)
            step = weight / steps(case)

            def advance(what: str) -> None:
                bar.set_description_str(f"{shape.name} {dtype}: {what}".replace("torch.", ""), refresh=False)
                bar.update(step)

            for group in measure(case, limits, advance):
                cells += group
                bar.write(section(group))
            del case
    except torch.OutOfMemoryError as error:
        bar.write(f"stopped, the inputs themselves do not fit: {error}")
    finally:
        bar.close()
        if cells:
            _write(options.out, f"kernels-{device.type}", environment, cells, plot)
    ours = [cell for cell in cells if cell.contender.startswith((FUSED, BARE))]
    return int(any(cell.status in ("wrong", "failed") for cell in ours))


def _write(out: Path, stem: str, environment: dict, cells: list[Cell], plot) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [asdict(cell) for cell in cells]
    write_json(out / f"{stem}.json", {"environment": environment, "rows": rows})
    write_csv(out / f"{stem}.csv", [{**row, **environment} for row in rows])
    pictures = plot(out / f"{stem}.csv", out)
    print("written:", *(f"  {path}" for path in (out / f"{stem}.json", out / f"{stem}.csv", *pictures)), sep="\n")


def _chosen(text: str, known: dict, what: str) -> list:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown {what} {name!r}, known are {', '.join(known)}")
    return [known[name] for name in names]


def _weight(numel: int) -> float:
    """Roughly how long a case takes, for the remaining time shown: compiling, then passes over the data."""
    return 15 + numel / 1.5e6
