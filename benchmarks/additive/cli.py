"""``python -m benchmarks additive``: additive attention beside other forms of it: time and peak memory by length."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from .. import arguments
from ..environment import available_memory, describe, usable_device, usable_folder
from ..report import format_table, write_csv, write_json
from .contenders import BUILDS_ACTIVATIONS, INFERENCE_ONLY, NAMES, OURS

# batch, heads, Tq, Tk, hidden, value_dim. The first two are of public sequence-to-sequence models.
SHAPES = {
    "decode": (1280, 1, 1, 66, 1024, 1024),
    "decoder": (128, 1, 10, 128, 1024, 1024),
    **{f"T{length}": (1, 1, length, length, 64, 64) for length in (128, 256, 512, 1024, 2048, 4096)},
    **{f"batch T{length}": (2, 8, length, length, 64, 64) for length in (512, 1024, 2048, 4096, 8192)},
}
_ON_CPU = ("decode", "decoder", "T512", "T1024", "T2048", "T4096", "batch T4096")
_ON_CUDA = ("decode", "decoder", *(name for name in SHAPES if name.startswith("batch")))
_QUICK = ("T128", "T256", "T512")
_RESULTS = Path("benchmarks") / "results"
_MEMORY_SHARE = 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--contenders", default=",".join(NAMES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on cuda bfloat16")
    parser.add_argument("--quick", action="store_true", help=f"shapes {','.join(_QUICK)}, short timings")
    parser.add_argument(
        "--budget", type=arguments.seconds, metavar="SECONDS", help="per timing (default: 5, quick: 0.5)"
    )
    parser.add_argument(
        "--limit",
        type=arguments.seconds,
        default=600,
        metavar="SECONDS",
        help="for a contender on a shape (default: %(default)s)",
    )
    parser.add_argument("--threads", type=arguments.count, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for the results (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit status: 1 where ours was wrong or failed."""
    from tqdm import tqdm  # here and below: the extras are needed by whoever runs this, not by whoever asks for help

    from .plots import plot

    device = usable_device(options.device)
    usual = _QUICK if options.quick else _ON_CPU if device.type == "cpu" else _ON_CUDA
    shapes = options.shapes.split(",") if options.shapes else usual
    contenders = options.contenders.split(",")
    for names, known, what in ((shapes, SHAPES, "shape"), (contenders, NAMES, "contender")):
        for name in names:
            if name not in known:
                raise SystemExit(f"unknown {what} {name!r}, known are {', '.join(known)}")
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    budget = (0.5 if options.quick else 5.0) if options.budget is None else options.budget
    usable_folder(options.out)
    environment = describe(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None), flush=True)
    rows: list[dict] = []
    plan = [(shape, contender) for shape in shapes for contender in contenders]
    with tqdm(plan, unit="case", dynamic_ncols=True) as cases:
        for shape, contender in cases:
            cases.set_description_str(f"{shape}: {contender}")
            task = dict(contender=contender, shape=SHAPES[shape], dtype=dtype, device=device.type)
            task |= dict(threads=options.threads, budget=budget)
            cell = dict(shape=shape, dims="x".join(map(str, SHAPES[shape])), dtype=dtype, contender=contender)
            rows.append(cell | (_excess(contender, shape, dtype, device) or _child(task, options.limit)))
            if contender == contenders[-1]:
                cases.write(_section(shape, [row for row in rows if row["shape"] == shape]))
    stem = options.out / f"additive-{device.type}"
    write_json(stem.with_suffix(".json"), {"environment": environment, "rows": rows})
    write_csv(stem.with_suffix(".csv"), [row | environment for row in rows])
    plot(rows, stem.with_suffix(".png"))
    print("written:", *(f"  {stem.with_suffix(suffix)}" for suffix in (".json", ".csv", ".png")), sep="\n")
    return int(any(row["contender"] == OURS and row["status"] in ("wrong", "failed") for row in rows))


def _excess(contender: str, shape: str, dtype: str, device: torch.device) -> dict | None:
    """Why a contender that builds all activations would not fit into memory; None where it does, or another."""
    batch, heads, queries, keys, hidden, _ = SHAPES[shape]
    itemsize = getattr(torch, dtype).itemsize
    needed = BUILDS_ACTIVATIONS.get(contender, 0) * batch * heads * queries * keys * hidden * itemsize
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory() or math.inf
    if needed <= _MEMORY_SHARE * free:
        return None
    return {"status": "skipped", "note": f"about {needed / 1e9:.0f} GB, free are {free / 1e9:.0f} GB"}


def _child(task: dict, limit: float) -> dict:
    """What the measuring process says, or how it ended."""
    command = [sys.executable, "-m", "benchmarks.additive.measure", json.dumps(task)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "note": f"longer than {limit:g} s"}
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    lines = result.stderr.splitlines()
    errors = [line.strip() for line in lines if "Error: " in line] or lines or [f"ended with {result.returncode}"]
    return {"status": "failed", "note": errors[-1][:100]}


def _section(shape: str, rows: list[dict]) -> str:
    header = [f"{shape} [{', '.join(map(str, SHAPES[shape]))}]"]
    header += ["inference", "peak", "training", "peak", "note"]
    table = []
    for row in rows:
        cells = []
        for kind in ("inference", "training"):
            for unit in ("ms", "mb"):
                value = row.get(f"{kind}_{unit}")
                cells.append("-" if value is None else f"{value:.4g} {unit.replace('mb', 'MB')}")
        note = row.get("note") or ("inference only" if row["contender"] in INFERENCE_ONLY else "")
        table.append([row["contender"], *cells, note if row["status"] == "ok" else f"{row['status']}: {note}"])
    return format_table(header, table) + "\n"
