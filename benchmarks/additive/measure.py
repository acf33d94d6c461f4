"""One contender on one shape, in a process of its own: right first, then peak memory, then time.

``python -m benchmarks.additive.measure '{"contender": ..., ...}'`` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import torch
from torch import Tensor

from daam_kernels import reference

from ..kernels.memory import peak_bytes
from ..timing import summarize
from .contenders import COMPILED, INFERENCE_ONLY, make

_CHECKED = 4  # queries whose output and gradient are compared with the formula in float64
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
_MOST_REPETITIONS = 20


def measure(
    contender: str, shape: list[int], dtype: str, device: str, threads: int | None, budget: float
) -> dict[str, object]:
    """Milliseconds and peak MB of inference and training; ``shape`` is batch, heads, Tq, Tk, hidden, value_dim."""
    if threads:
        torch.set_num_threads(threads)
    function = make(contender)
    batch, heads, queries, keys, hidden, value_dim = shape
    rng = torch.Generator().manual_seed(0)
    sizes = (queries, hidden), (keys, hidden), (keys, value_dim), (queries, value_dim)
    query, key, value, grad = (
        torch.randn((batch, heads, *size), generator=rng).to(device, getattr(torch, dtype)) for size in sizes
    )
    weight = (torch.randn((heads, hidden), generator=rng) / hidden**0.5).to(device, query.dtype)
    tensors = query, key, value, weight
    cell: dict[str, object] = {}
    for kind in ("inference", "training"):
        if kind == "training" and contender in INFERENCE_ONLY:
            continue
        call = partial(_inference if kind == "inference" else _training, function, *tensors, grad)
        if contender in COMPILED or device != "cpu":  # the first call compiles
            call()
        results: list[tuple[Tensor, Tensor | None]] = []
        start = time.perf_counter()
        cell[f"{kind}_mb"] = peak_bytes(lambda: results.append(call()), query.device) / 1e6
        seconds = [time.perf_counter() - start]
        cell[f"{kind}_error"] = error = _error(*results.pop(), *tensors, grad)
        if not error <= _TOLERANCE[query.dtype]:
            return cell | {"status": "wrong", "note": f"{kind}: relative error {error:.2g}"}
        if seconds[0] < budget:  # else one call has to do, though memory was watched in it
            seconds, start = [], time.perf_counter()
            while len(seconds) < _MOST_REPETITIONS and (not seconds or time.perf_counter() - start < budget):
                seconds.append(_timed(call, device))
        found = summarize(seconds)
        cell[f"{kind}_ms"], cell[f"{kind}_ms_iqr"] = 1e3 * found.median, 1e3 * found.spread
        cell[f"{kind}_repetitions"] = found.repetitions
    return cell | {"status": "ok"}


def _inference(function, query, key, value, weight, grad) -> tuple[Tensor, None]:
    with torch.no_grad():
        return function(query, key, value, weight), None


def _training(function, query, key, value, weight, grad) -> tuple[Tensor, Tensor]:
    tensors = [t.detach().requires_grad_() for t in (query, key, value, weight)]
    output = function(*tensors)
    return output.detach(), torch.autograd.grad(output, tensors, grad)[0]


def _error(output, d_query, query, key, value, weight, grad) -> float:
    """Relative error of the first queries of the last head: their output and, if any, their gradient."""
    rows = slice(-1, None), slice(-1, None), slice(0, _CHECKED)
    q, g = query[rows].double().requires_grad_(), grad[rows].double()
    true = reference.additive_attention(q, key[-1:, -1:].double(), value[-1:, -1:].double(), weight[-1:].double())
    pairs = [(output[rows], true.detach())]
    if d_query is not None:
        pairs.append((d_query[rows], torch.autograd.grad(true, q, g)[0]))
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def _timed(call, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
