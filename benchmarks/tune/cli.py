"""``python -m benchmarks tune``: search for tiles faster than the ladder's, and keep them for this device.

They are kept in the file that ``python -m daam_kernels.env`` names, and used from the next process on.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .. import arguments
from ..environment import usable_device, usable_folder
from ..kernels.check import truth
from ..kernels.contenders import FUSED, contenders
from ..kernels.data import make_case
from ..kernels.selection import DEFAULT_GAUSSIANS, choose, choose_shapes
from ..kernels.shapes import SHAPES, Case, Shape
from ..report import format_table

if TYPE_CHECKING:
    from tqdm import tqdm

    from .search import Found, Limits

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_DIRECTIONS = {"fwd": False, "bwd": True}  # whether it is the backward
_OPERATORS = ("product", "mixture", "gate")  # that a shape on the command line may have
_HEADER = ("shape", "type", "direction", "tried", "rejected", "ladder us", "best us", "gain", "tile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this family."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu: a dry run in Triton's interpreter, kept for the interpreter alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", help=f"comma-separated, of {', '.join(SHAPES)}, or SIZES:AXIS:HEADS[:OPERATOR] such as "
        "64x2048x512:1:8:mixture (default: all on cuda, tiny on cpu)",
    )  # fmt: skip
    parser.add_argument("--dtype", help="comma-separated (default: float32, on cuda bfloat16 too)")
    parser.add_argument("--direction", default="fwd,bwd", metavar="fwd,bwd", help="default: %(default)s")
    parser.add_argument(
        "--num-gaussians",
        type=arguments.count,
        default=DEFAULT_GAUSSIANS,
        metavar="K",
        help="where the shape does not say",
    )
    parser.add_argument(
        "--rounds", type=arguments.count, default=4, help="steps away from the ladder (default: %(default)s)"
    )
    parser.add_argument("--budget", type=arguments.seconds, default=1.0, metavar="SECONDS", help="of timing a round")
    parser.add_argument("--seed", type=arguments.seed, default=0)


def run(options: argparse.Namespace) -> int:
    """Search, print and store; returns the exit status: 1 where the ladder's own tile failed or was wrong."""
    from tqdm import tqdm  # here: the extras are needed by whoever runs this, not by whoever asks for help

    device = usable_device(options.device)
    _prepare_triton(device)
    from daam_kernels.kernels import tuning  # only now, when Triton knows how to run

    from .search import Limits

    if not tuning.switched_on():
        print(f"{tuning.SWITCH} is 0: what is found is stored but not used", file=sys.stderr)
    on_gpu = device.type == "cuda"
    names = (options.shapes or (",".join(SHAPES) if on_gpu else "tiny")).split(",")
    shapes = [shape for name in names for shape in ([_shape(name)] if ":" in name else choose_shapes(name, on_gpu))]
    dtypes = choose(options.dtype or ("float32,bfloat16" if on_gpu else "float32"), _DTYPES, "type")
    directions = choose(options.direction, _DIRECTIONS, "direction")
    model = tuning.model_of(torch.empty(0, device=device).device)
    usable_folder(tuning.folder(), tuning.FOLDER)
    bar = tqdm(total=len(dtypes) * len(shapes) * len(directions), unit="tile", dynamic_ncols=True)
    failures, rows = 0, []
    for dtype, shape in itertools.product(dtypes, shapes):
        started = bar.n
        try:
            case = make_case(shape, dtype, device, options.num_gaussians, options.seed)
            for found in _tune(case, directions, Limits(options.budget, options.rounds), bar):
                tuning.store(model, {found.problem: found.tuned})
                rows.append(_row(shape, dtype, found))
                bar.write("  ".join(rows[-1]))
        except Exception as error:  # one shape that does not fit must not cost the others
            failures += 1
            bar.write(f"{shape.name} {_name(dtype)}: {type(error).__name__}: {error}")
        bar.update(started + len(directions) - bar.n)
    bar.close()
    if rows:
        print(format_table(_HEADER, rows))
        print(f"kept in {tuning.path_of(model)}")
    return int(failures > 0)


def _tune(case: Case, directions: Sequence[bool], limits: Limits, bar: tqdm) -> Iterator[Found]:
    """Every problem of the case, one after the other, the earlier ones solved as they were found."""
    from daam_kernels.kernels.host import processors

    from .search import problems, search

    contender, true, known = contenders(case)[FUSED](), truth(case), {}
    for backward in directions:
        todo = problems(case, contender, backward)
        for problem in todo:
            bar.set_description_str(f"{case.shape.name} {_name(case.x.dtype)} {_direction(backward)}")
            for found in search(case, contender, true, problem, known, processors(case.x.device), limits):
                bar.update(1 / (limits.rounds + 1) / len(todo))
            known[problem] = found.choice
            yield found


def _row(shape: Shape, dtype: torch.dtype, found: Found) -> list[str]:
    tile = "the ladder's" if found.tuned is None else " ".join(f"{k}={v}" for k, v in vars(found.tuned).items())
    gain = f"{found.ladder_us / found.best_us:.3f}"
    counts = str(found.tried), str(len(found.rejected))
    times = f"{found.ladder_us:.2f}", f"{found.best_us:.2f}"
    return [shape.name, _name(dtype), _direction(found.problem.backward), *counts, *times, gain, tile]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _direction(backward: bool) -> str:
    return "backward" if backward else "forward"


def _prepare_triton(device: torch.device) -> None:
    """Every call is to go to Triton, on a CPU to its interpreter."""
    os.environ["DAAM_KERNELS_BACKEND"] = "triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise SystemExit(
                "--device cpu runs in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
            )
        os.environ["TRITON_INTERPRET"] = "1"


def _shape(text: str) -> Shape:
    """The shape of SIZES:AXIS:HEADS[:OPERATOR]."""
    try:
        sizes, axis, heads, operator = [*text.split(":"), "product"][:4]
        shape = Shape(text, tuple(map(int, sizes.split("x"))), int(axis), int(heads), operator=operator)
    except ValueError:
        raise SystemExit(f"unknown shape {text!r}, it is no SIZES:AXIS:HEADS[:OPERATOR]") from None
    if operator not in _OPERATORS:
        raise SystemExit(f"unknown operator {operator!r} of shape {text!r}, known are {', '.join(_OPERATORS)}")
    axes = range(-len(shape.dims), len(shape.dims))
    if (
        min(shape.dims) < 1
        or shape.norm_axis not in axes
        or not 1 <= 2 * shape.num_heads <= shape.dims[shape.norm_axis]
    ):
        raise SystemExit(f"unknown shape {text!r}: AXIS is that of a size which has two elements for each of HEADS")
    return shape
