"""``python -m benchmarks.verify.touch``: every operator forward and backward once, for a tool that watches memory.

Run by itself it compiles what the watched runs need, and says whether all results are finite.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from daam_kernels import available_backends

from .problems import ON_CUDA_KERNELS, OPERATORS, Problem, problems
from .record import SKIPPED, try_all, write

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Touch the operators that are named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify.touch", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backends", default="triton", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtypes", default=",".join(_DTYPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--operators", default=",".join(OPERATORS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="the sizes of derivatives")
    options = parser.parse_args(arguments)
    cases = []
    for backend in options.backends.split(","):
        if backend == "cuda" and not (status := available_backends()["cuda"]):
            print(f"cuda: {status.reason}", flush=True)
            write("the kernels of the backend cuda", SKIPPED, 0.0, status.reason)
            continue
        for operator in options.operators.split(","):
            if backend == "cuda" and operator not in ON_CUDA_KERNELS:
                continue
            for name in options.dtypes.split(","):
                for problem in problems(operator, options.device, _DTYPES[name], backend, options.small):
                    cases.append((f"{problem.name}, {name}, {backend}", partial(_touch, problem)))
    return try_all(cases)


def _touch(problem: Problem) -> None:
    results = problem.function(*problem.tensors)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.ones_like(result) for result in results]
    gradients = torch.autograd.grad(results, problem.tensors, grads)
    for result in (*results, *gradients):
        if not result.detach().cpu().isfinite().all():  # there, for a sanitizer has less to watch, and it waits
            raise FloatingPointError("a result is not finite")


if __name__ == "__main__":
    sys.exit(main())
