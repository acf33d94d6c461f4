"""``python -m benchmarks.verify.derivatives``: gradcheck and gradgradcheck of the operators, in float64 on a device."""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from .problems import OPERATORS, Problem, problems
from .record import try_all


def main(arguments: list[str] | None = None) -> int:
    """Check the operators that are named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify.derivatives", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", default="triton", help="default: %(default)s")
    parser.add_argument("--operators", default=",".join(OPERATORS), help="comma-separated (default: %(default)s)")
    options = parser.parse_args(arguments)
    cases = []
    for operator in options.operators.split(","):
        for problem in problems(operator, options.device, torch.float64, options.backend, small=True):
            cases += [(f"{kind.__name__} {problem.name}", partial(_check, kind, problem)) for kind in _KINDS]
    return try_all(cases)


_KINDS = torch.autograd.gradcheck, torch.autograd.gradgradcheck


def _check(kind, problem: Problem) -> None:
    kind(problem.function, problem.tensors)


if __name__ == "__main__":
    sys.exit(main())
