"""One case after the other: check every contender, then time those that are right, and go on where one fails."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator

import torch
from torch import Tensor

from ..environment import available_memory
from ..timing import wall_timer
from .cell import Cell, new_cell
from .check import Truth, complaint, errors, truth
from .clocks import time_all
from .contender import DIRECTIONS, FORWARD, Contender
from .contenders import COPY, UPSTREAM, contenders
from .data import make_case
from .launches import count_launches
from .memory import peak_bytes
from .shapes import Case, Shape

INPUTS = "inputs and reference"  # stands in the contender's place where these do not fit

_PROBE = 1 << 20  # elements on which the time and memory of a full call are estimated
_TEMPORARIES = 8  # tensors of x's size that a call may hold beside what it saves for the backward
_MEMORY_SHARE = 0.7
_TRUTH_BYTES = 24  # an element: y and dx in float64, and one of them again while it is compared

Advance = Callable[[str, float], None]  # what begins, and which share of the case it is


@dataclass(frozen=True)
class Limits:
    """How long is too long, and what is asked for.

    Attributes:
        budget: seconds to time all contenders of one case and direction.
        call: seconds of the longest call worth waiting for on a CPU.
        compile_slowly: whether what takes a minute or more to compile is worth waiting for.
        directions: those that are measured, in their order.
        names: the contenders that are asked for, beside the copy, as :func:`contenders` calls them; None: all.
    """

    budget: float
    call: float
    compile_slowly: bool = True
    directions: tuple[str, ...] = DIRECTIONS
    names: frozenset[str] | None = None


def sweep(
    shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, limits: Limits, advance: Advance
) -> Iterator[list[Cell]]:
    """The cells of one shape, one list per direction; a single failed one where the data itself does not fit."""
    done = 0
    try:
        _require_memory(shape, dtype, device)
        for group in measure(make_case(shape, dtype, device, shape.num_gaussians, seed), limits, advance):
            yield group
            done += 1
    except Exception as error:
        for direction in limits.directions[done:]:
            cell = new_cell(shape, dtype, direction, INPUTS)
            cell.fail(error)
            yield [cell]


def measure(case: Case, limits: Limits, advance: Advance) -> Iterator[list[Cell]]:
    """The cells of one case, one list per direction. ``advance`` hears of every step."""
    makers = _wanted(case, limits)
    share = 1 / (1 + len(limits.directions) * (len(makers) + 1))
    advance("float64 reference", share)
    true = truth(case)
    torch._dynamo.reset()  # or the graphs of earlier shapes count against the recompilation limit
    made: dict[str, Contender | Exception] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:
            made[name] = error.with_traceback(None)  # whose frames would hold on to memory
    for direction in limits.directions:
        cells, ready = {}, {}
        for name, contender in made.items():
            advance(f"checking {name}, {direction}", share)
            shown = contender.name if isinstance(contender, Contender) else name
            cells[name] = new_cell(case.shape, case.x.dtype, direction, shown)
            if isinstance(contender, Exception):
                cells[name].fail(contender)
            elif contender.slow_to_compile and (reason := _not_compiled(cells.get(UPSTREAM), limits)):
                cells[name].status, cells[name].note = "skipped", reason
            elif _admit(case, direction, contender, limits, cells[name], true):
                ready[name] = contender
            release(case)
        advance(f"timing, {direction}", share)
        time_all(case, direction, ready, cells, limits.budget)
        release(case)
        yield list(cells.values())


def release(case: Case) -> None:
    """Give back what no one holds any more."""
    gc.collect()
    if case.x.is_cuda:
        torch.cuda.empty_cache()


def _wanted(case: Case, limits: Limits) -> dict[str, Callable[[], Contender]]:
    makers = contenders(case)
    return {name: make for name, make in makers.items() if limits.names is None or name in limits.names | {COPY}}


def _require_memory(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Raise where a CPU has no room for the data: Linux would grant it and end the program later."""
    needed, there = shape.numel * (2 * dtype.itemsize + _TRUTH_BYTES), available_memory()
    if device.type == "cpu" and there is not None and needed > there:
        raise MemoryError(f"x, its gradient and the truth need about {needed / 1e9:.1f} GB, {there / 1e9:.1f} are free")


def _admit(case: Case, direction: str, contender: Contender, limits: Limits, cell: Cell, true: Truth) -> bool:
    """Whether the contender may be timed: not too large for this machine, and right. What it lacks goes to its cell."""
    try:
        if contender.many_launches and not case.x.is_cuda and case.x.numel() > _PROBE:
            cell.note = _excess(case, direction, contender, limits)
            if cell.note is not None:
                cell.status = "skipped"
                return False
        with contextlib.nullcontext() if contender.compiled else _count_saved(case.x, case.grad) as saved:
            call = contender.prepare(direction, case.x, case.grad)
            results = call()
        if saved is not None and direction != FORWARD and contender.tolerance is not None:
            cell.saved_mb = saved() / 1e6
        if contender.tolerance is not None:
            found = errors(direction, results, true)
            cell.error_y, cell.error_dx, cell.error_parameters = found
            cell.note = complaint(contender, found)
            if cell.note is not None:
                cell.status = "wrong"
                return False
        del results
        cell.peak_mb = peak_bytes(call, case.x.device) / 1e6
        cell.launches = count_launches(call, case.x.device)
    except Exception as error:
        cell.fail(error)
        return False
    return True


def _not_compiled(eager: Cell | None, limits: Limits) -> str | None:
    """Why the compiled form of what ``eager`` measures is not worth its compilation; None where it is."""
    if not limits.compile_slowly:
        return "slow, --compile-upstream"
    return "the eager form is skipped" if eager is not None and eager.status == "skipped" else None


def _excess(case: Case, direction: str, contender: Contender, limits: Limits) -> str | None:
    """Why a full call would take too long or too much memory on this CPU, from a call on a part of x; else None."""
    x, dim = case.x, 0 if case.x.shape[0] > 1 else case.shape.norm_axis
    length = max(1, x.shape[dim] * _PROBE // x.numel())
    part_x, part_grad = (t.detach().narrow(dim, 0, length).clone() for t in (x, case.grad))
    part_x.requires_grad_()
    with _count_saved(part_x, part_grad) as saved:
        contender(direction, part_x, part_grad)
    scale = x.numel() / part_x.numel()
    timer = wall_timer([partial(contender, direction, part_x, part_grad)], x.device)
    seconds = min(timer() for _ in range(2)) * scale
    if seconds > limits.call:
        return f"about {seconds:.0f} s a call, limit {limits.call:g} s"
    needed = saved() * scale + _TEMPORARIES * x.nbytes
    allowed = _MEMORY_SHARE * (available_memory() or math.inf)
    if needed > allowed:
        return f"about {needed / 1e9:.1f} GB of memory, limit {allowed / 1e9:.1f} GB"
    return None


@contextlib.contextmanager
def _count_saved(*inputs: Tensor) -> Iterator[Callable[[], int]]:
    """A function for the bytes that autograd held when the backward began, or else holds now, those of inputs apart.

    Storages are told apart by their addresses, which is right for what is there at one moment alone: an address has
    another storage once the first one is freed, and a backward may save for a graph of its own.
    """
    ours = {t.untyped_storage().data_ptr() for t in inputs}
    saved: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def count() -> int:
        storages = (t.untyped_storage() for t in (each() for each in saved) if t is not None)
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in ours}.values())

    def pack(t: Tensor) -> Tensor:
        alone = t.detach()  # the tensor itself would hold its own graph alive
        saved.append(weakref.ref(alone))
        return alone

    def unpack(t: Tensor) -> Tensor:
        if not held:
            held.append(count())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield lambda: held[0] if held else count()
