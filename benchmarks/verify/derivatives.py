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
            cases += [(f"{kind} {problem.name}", partial(_check, kind, problem)) for kind in _SPREAD]
    return try_all(cases)


# How far two runs may differ. The kernels' gradients are the same bits in every run, but those of gradients are
# torch's own operations, which may add in another order.
_SPREAD = {"gradcheck": 0.0, "gradgradcheck": 1e-12}


def _check(kind: str, problem: Problem) -> None:
    getattr(torch.autograd, kind)(problem.function, problem.tensors, nondet_tol=_SPREAD[kind])


if __name__ == "__main__":
    sys.exit(main())
