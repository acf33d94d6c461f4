"""The times of all contenders of one case in one direction: device time by graph replays, and wall clock."""

from __future__ import annotations

import math
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from ..timing import Call, Measurement, interleave, prepared_graph_timer, wall_timer
from .cell import Cell
from .contender import Contender
from .contenders import COPY, UPSTREAM
from .shapes import Case

_MAX_ROTATION = 512  # inputs in one graph: enough to exceed the L2 three times from 0.3 MB up
_MANY_LAUNCHES_ROTATION = 4
_WALL_CALLS = 20


def time_all(case: Case, direction: str, ready: dict[str, Contender], cells: dict[str, Cell], budget: float) -> None:
    """Enter the times of ``ready`` into their cells, and what follows from them."""
    pairs = rotation(case)
    prepared = {name: [partial(c.prepare, direction, *pair) for pair in pairs] for name, c in ready.items()}
    if case.x.is_cuda:
        graphs = {}
        for name, contender in ready.items():
            some = prepared[name][:_MANY_LAUNCHES_ROTATION] if contender.many_launches else prepared[name]
            cells[name].rotated_inputs = len(some)
            try:
                graphs[name] = prepared_graph_timer(some)
            except Exception as error:  # the wall clock below may still be had
                cells[name].note = f"no graph, {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        _enter(cells, "kernel", interleave(graphs, budget))
        graphs.clear()
        torch.cuda.empty_cache()
    walls = {name: _wall_timer(some[:_WALL_CALLS], case.x.device) for name, some in prepared.items()}
    _enter(cells, "wall", interleave(walls, budget))

    for cell in cells.values():
        cell.gb_per_s = cell.bytes / cell.time_us / 1e3 if cell.time_us else None
        cell.of_copy = _ratio(cells[COPY], cell)
        cell.over_upstream = _ratio(cells.get(UPSTREAM), cell)


def _wall_timer(prepared: list[Callable[[], Call]], device: torch.device) -> Callable[[], float]:
    """Prepares anew before every timing, so that no contender's memory is held while others are timed."""
    return lambda: wall_timer([prepare() for prepare in prepared], device)()


def _enter(cells: dict[str, Cell], clock: str, measured: dict[str, Measurement | Exception]) -> None:
    for name, result in measured.items():
        if isinstance(result, Exception):
            cells[name].fail(result)
            continue
        setattr(cells[name], f"{clock}_us", result.median * 1e6)
        setattr(cells[name], f"{clock}_us_iqr", result.spread * 1e6)
        setattr(cells[name], f"{clock}_us_best", result.best * 1e6)
        setattr(cells[name], f"{clock}_repetitions", result.repetitions)


def _ratio(other: Cell | None, cell: Cell) -> float | None:
    """How many times longer ``other``, where there is one, takes, by a clock that both have."""
    if other is None:
        return None
    if other.kernel_us is not None and cell.kernel_us is not None:
        return other.kernel_us / cell.kernel_us
    return other.wall_us / cell.wall_us if other.wall_us is not None and cell.wall_us is not None else None


def rotation(case: Case) -> list[tuple[Tensor, Tensor]]:
    """(x, grad) in as many places as exceed three times the GPU's L2; on a CPU one, so that small ones are warm."""
    if not case.x.is_cuda:
        return [(case.x, case.grad)]
    cache = torch.cuda.get_device_properties(case.x.device).L2_cache_size
    count = min(_MAX_ROTATION, math.ceil(3 * cache / case.x.nbytes))
    return [(case.x.detach().clone().requires_grad_(), case.grad.clone()) for _ in range(max(1, count))]
