"""Correctness before speed: every result against the reference in float64 on the same rounded input."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from .contender import BACKWARD, BOTH, FORWARD, Contender
from .operators import OPERATORS
from .shapes import Case

_PART = 1 << 22  # elements in float64 at a time: whole shapes would need 15 times their size
_VANISHED = 1e-30  # a true gradient below this is only asked to be finite


class Truth(NamedTuple):
    """y, dx and the gradients of the parameters, in float64."""

    y: Tensor
    dx: Tensor
    parameters: tuple[Tensor, ...]  # as in Case.parameters


class Errors(NamedTuple):
    """Relative errors in the 2-norm; None where the direction does not compute it."""

    y: float | None = None
    dx: float | None = None
    parameters: float | None = None


@torch.no_grad()
def truth(case: Case) -> Truth:
    """The plain form in float64, part by part along the batch axis; the parameters' gradients are sums over parts."""
    operator, x, axis = OPERATORS[case.shape.operator], case.x.detach(), case.shape.norm_axis
    parameters = [parameter.double() for parameter in case.parameters.values()]
    rows = max(1, _PART * x.shape[0] // x.numel()) if axis % x.dim() else x.shape[0]
    y, dx = (torch.empty_like(x, dtype=torch.float64) for _ in range(2))
    sums = [torch.zeros_like(p) for p in parameters]
    sizes = operator.parts(case.shape, rows)
    for part_x, part_grad, part_y, part_dx in zip(*(t.split(sizes) for t in (x, case.grad, y, dx))):
        part_x, part_grad = part_x.double(), part_grad.double()
        true_y, true_dx, *gradients = operator.truth(case.shape, part_x, part_grad, *parameters)
        part_y.copy_(true_y)
        part_dx.copy_(true_dx)
        for total, gradient in zip(sums, gradients):
            total += gradient
    return Truth(y, dx, tuple(sums))


def errors(direction: str, results: Sequence[Tensor], true: Truth) -> Errors:
    """How far what a contender returned for ``direction`` is from the truth."""
    of_y = None if direction == BACKWARD else relative_error(results[0], true.y)
    if direction == FORWARD:
        return Errors(of_y)
    dx, *gradients = results[1:] if direction == BOTH else results
    worst = max(map(relative_error, _joined(gradients, true.parameters), true.parameters))
    return Errors(of_y, relative_error(dx, true.dx), worst)


def _joined(gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """One gradient for each of ``like``, of its shape, from as many tensors as each contender has for it."""
    each = len(gradients) // len(like)
    parts = [list(gradients[start : start + each]) for start in range(0, len(gradients), each)]
    return [torch.stack(part).reshape(true.shape) for part, true in zip(parts, like, strict=True)]


def relative_error(result: Tensor, true: Tensor) -> float:
    """|result - true| / |true| in the 2-norm; infinite where the result is not finite or not of the right shape."""
    if result.shape != true.shape:
        return math.inf
    rows = max(1, _PART * len(true) // true.numel()) if true.dim() and true.numel() else 1
    squares = [
        ((part.double() - true_part).square().sum().item(), true_part.square().sum().item())
        for part, true_part in zip(torch.atleast_1d(result.detach()).split(rows), torch.atleast_1d(true).split(rows))
    ]
    distance, size = (math.sqrt(sum(column)) for column in zip(*squares))
    if not math.isfinite(distance):
        return math.inf
    return distance / size if size > _VANISHED else 0.0


def complaint(contender: Contender, found: Errors) -> str | None:
    """What is wrong with the result, or None where it is within the contender's tolerance."""
    for name, error, allowed in zip(Errors._fields, found, contender.tolerance):
        if error is not None and allowed is not None and not error <= allowed:
            return f"error of {name} is {error:.1e}, allowed {allowed:.1e}"
    return None
