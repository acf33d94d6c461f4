"""What is learned from, and how: targets, scales of columns, the epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .extras import numpy_for

TASKS = ("classification", "regression")


class Targets(NamedTuple):
    """Of a task: what the outputs are compared with, how many numbers they have, and what classes they stand for."""

    wanted: Tensor
    outputs: int
    classes: Any  # sorted: an array; None: a regression


def targets_of(targets: Any, count: int, task: str, like: Tensor) -> Targets:
    numpy = numpy_for("fit")
    if isinstance(targets, Tensor):
        targets = targets.detach().cpu()
        targets = targets.float() if targets.dtype == torch.bfloat16 else targets  # which NumPy does not know
    try:
        array = numpy.asarray(targets)
    except ValueError as error:
        raise ValueError("targets must be a rectangle of numbers, got rows of different lengths") from error
    if array.ndim == 0 or len(array) != count or array.ndim > (1 if task == "classification" else 2):
        taken = "[inputs]" if task == "classification" else "[inputs] or [inputs, outputs]"
        raise ValueError(f"targets must have shape {taken} for {count} inputs, got {list(array.shape)}")
    if task == "classification":
        if array.dtype == object:
            raise TypeError("targets must be numbers or strings, all of one kind, got objects")
        classes, numbers = numpy.unique(array, return_inverse=True)
        return Targets(torch.from_numpy(numbers.reshape(-1)).to(like.device), len(classes), classes)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"targets must be real numbers for task='regression', got {array.dtype}")
    wanted = torch.from_numpy(array.reshape(count, -1).astype("float32")).to(like)
    return Targets(wanted, wanted.shape[1], None)


def standard(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation, 1 where it is 0) of every column."""
    deviation, mean = torch.std_mean(rows, 0, correction=0)
    return mean, torch.where(deviation > 0, deviation, 1)


def train(
    parameters: Iterable[Tensor],
    loss: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    rounds: Iterable,
    *,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> Iterator[float]:
    """The mean loss of every epoch, as they come. ``loss`` is that of some of the ``count`` inputs, by number."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-count // batch_size))
    for _ in rounds:
        total = 0.0
        for chosen in torch.randperm(count, generator=order).split(batch_size):
            mean = loss(chosen)
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            schedule.step()
            total += mean.item() * len(chosen)
        yield total / count
