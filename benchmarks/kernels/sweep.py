"""One case after the other: check every contender, then time those that are right, and go on where one fails."""

from __future__ import annotations

import contextlib
import gc
import math
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator

import torch
from torch import Tensor

from ..environment import available_memory
from ..timing import Measurement, graph_timer, interleave, wall_timer
from .check import Truth, complaint, errors, truth
from .contender import BOTH, DIRECTIONS, Contender
from .contenders import COPY, UPSTREAM, contenders
from .memory import peak_bytes
from .shapes import Case

_PROBE = 1 << 20  # elements on which the time and memory of a full call are estimated
_TEMPORARIES = 8  # tensors of x's size that a call may hold beside what it saves for the backward
_MEMORY_SHARE = 0.7
_MAX_ROTATION = 512  # inputs in one graph: enough to exceed the L2 three times from 0.3 MB up
_MANY_LAUNCHES_ROTATION = 4
_WALL_CALLS = 20

Advance = Callable[[str], None]


@dataclass
class Cell:
    """One contender on one case in one direction: a row of the results. Times are in microseconds."""

    shape: str
    dims: str
    operator: str
    norm_axis: int
    num_heads: int
    layers: int
    num_gaussians: int
    dtype: str
    direction: str
    contender: str
    status: str = "ok"  # or skipped, wrong, failed
    note: str | None = None
    error_y: float | None = None
    error_dx: float | None = None
    error_parameters: float | None = None
    bytes: int = 0  # what the limit moves
    rotated_inputs: int = 1
    kernel_us: float | None = None
    kernel_us_iqr: float | None = None
    kernel_us_best: float | None = None
    kernel_repetitions: int | None = None
    wall_us: float | None = None
    wall_us_iqr: float | None = None
    wall_us_best: float | None = None
    wall_repetitions: int | None = None
    of_copy: float | None = None  # time of the copy / this time
    over_upstream: float | None = None  # time of the public package / this time
    saved_mb: float | None = None  # held for the backward beside the inputs
    peak_mb: float | None = None  # most that is held at a time during a call, outputs included

    @property
    def time_us(self) -> float | None:
        """Device time where it was measured, else wall clock."""
        return self.wall_us if self.kernel_us is None else self.kernel_us


@dataclass(frozen=True)
class Limits:
    """How long is too long.

    Attributes:
        budget: seconds to time all contenders of one case and direction.
        call: seconds of the longest call worth waiting for on a CPU.
        compile_slowly: whether what takes a minute or more to compile is worth waiting for.
    """

    budget: float
    call: float
    compile_slowly: bool = True


def measure(case: Case, limits: Limits, advance: Advance) -> Iterator[list[Cell]]:
    """The cells of one case, one list per direction. ``advance`` hears of each of :func:`steps` steps."""
    advance("float64 reference")
    true = truth(case)
    torch._dynamo.reset()  # or the graphs of earlier shapes count against the recompilation limit
    made: dict[str, Contender | Exception] = {}
    for name, make in contenders(case).items():
        try:
            made[name] = make()
        except Exception as error:
            made[name] = error
    for direction in DIRECTIONS:
        cells, ready = {}, {}
        for name, contender in made.items():
            advance(f"checking {name}, {direction}")
            cells[name] = _cell(case, direction, contender.name if isinstance(contender, Contender) else name)
            if isinstance(contender, Exception):
                _fail(cells[name], contender)
            elif contender.slow_to_compile and (reason := _not_compiled(cells[UPSTREAM], limits)):
                cells[name].status, cells[name].note = "skipped", reason
            elif _admit(case, direction, contender, limits, cells[name], true):
                ready[name] = contender
            _release(case)
        advance(f"timing, {direction}")
        _time(case, direction, ready, cells, limits)
        _release(case)
        yield list(cells.values())


def steps(case: Case) -> int:
    """How often :func:`measure` calls ``advance`` for this case."""
    return 1 + len(DIRECTIONS) * (len(contenders(case)) + 1)


def _cell(case: Case, direction: str, name: str) -> Cell:
    shape, x = case.shape, case.x
    streams = 5 if direction == BOTH else 2
    dtype = str(x.dtype).removeprefix("torch.")
    dims = "x".join(map(str, shape.dims))
    kind = shape.operator, shape.norm_axis, shape.num_heads, shape.layers, case.num_gaussians
    cell = Cell(shape.name, dims, *kind, dtype, direction, name)
    cell.bytes = streams * x.numel() * x.element_size()
    return cell


def _admit(case: Case, direction: str, contender: Contender, limits: Limits, cell: Cell, true: Truth) -> bool:
    """Whether the contender may be timed: not too large for this machine, and right. What it lacks goes to its cell."""
    try:
        if contender.many_launches and not case.x.is_cuda and case.x.numel() > _PROBE:
            cell.note = _excess(case, direction, contender, limits)
            if cell.note is not None:
                cell.status = "skipped"
                return False
        with contextlib.nullcontext() if contender.compiled else _count_saved(case.x, case.grad) as saved:
            results = contender(direction, case.x, case.grad)
        if saved is not None and direction == BOTH and contender.tolerance is not None:
            cell.saved_mb = sum(saved.values()) / 1e6
        if contender.tolerance is not None:
            found = errors(direction, results, true)
            cell.error_y, cell.error_dx, cell.error_parameters = found
            cell.note = complaint(contender, found)
            if cell.note is not None:
                cell.status = "wrong"
                return False
        del results
        cell.peak_mb = peak_bytes(partial(contender, direction, case.x, case.grad), case.x.device) / 1e6
    except Exception as error:
        _fail(cell, error)
        return False
    return True


def _fail(cell: Cell, error: Exception) -> None:
    if isinstance(error, ModuleNotFoundError):
        cell.status, cell.note = "skipped", f"{error.name} is not installed"
        return
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    cell.status, cell.note = "failed", f"{type(error).__name__}: {lines[0].strip()[:160]}"


def _not_compiled(eager: Cell, limits: Limits) -> str | None:
    """Why the compiled form of what ``eager`` measures is not worth its compilation; None where it is."""
    if not limits.compile_slowly:
        return "slow, --compile-upstream"
    return "the eager form is skipped" if eager.status == "skipped" else None


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
    needed = sum(saved.values()) * scale + _TEMPORARIES * x.nbytes
    allowed = _MEMORY_SHARE * (available_memory() or math.inf)
    if needed > allowed:
        return f"about {needed / 1e9:.1f} GB of memory, limit {allowed / 1e9:.1f} GB"
    return None


@contextlib.contextmanager
def _count_saved(*inputs: Tensor) -> Iterator[dict[int, int]]:
    """Fills a dictionary with the storages that autograd saves inside, address to bytes, without those of inputs."""
    ours = {t.untyped_storage().data_ptr() for t in inputs}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # the tensor itself would hold its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield storages


def _time(case: Case, direction: str, ready: dict[str, Contender], cells: dict[str, Cell], limits: Limits) -> None:
    pairs = _rotation(case)
    calls = {name: [partial(c, direction, *pair) for pair in pairs] for name, c in ready.items()}
    if case.x.is_cuda:
        graphs = {}
        for name, contender in ready.items():
            some = calls[name][:_MANY_LAUNCHES_ROTATION] if contender.many_launches else calls[name]
            cells[name].rotated_inputs = len(some)
            try:
                graphs[name] = graph_timer(some)
            except Exception as error:  # the wall clock below may still be had
                cells[name].note = f"no graph, {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        _enter(cells, "kernel", interleave(graphs, limits.budget))
        graphs.clear()
        _release(case)
    walls = {name: wall_timer(some[:_WALL_CALLS], case.x.device) for name, some in calls.items()}
    _enter(cells, "wall", interleave(walls, limits.budget))

    for cell in cells.values():
        cell.of_copy = _ratio(cells[COPY], cell)
        cell.over_upstream = _ratio(cells.get(UPSTREAM), cell)


def _enter(cells: dict[str, Cell], clock: str, measured: dict[str, Measurement | Exception]) -> None:
    for name, result in measured.items():
        if isinstance(result, Exception):
            _fail(cells[name], result)
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


def _rotation(case: Case) -> list[tuple[Tensor, Tensor]]:
    """(x, grad) in as many places as exceed three times the GPU's L2; on a CPU one, so that small ones are warm."""
    if not case.x.is_cuda:
        return [(case.x, case.grad)]
    cache = torch.cuda.get_device_properties(case.x.device).L2_cache_size
    count = min(_MAX_ROTATION, math.ceil(3 * cache / case.x.nbytes))
    return [(case.x.detach().clone().requires_grad_(), case.grad.clone()) for _ in range(max(1, count))]


def _release(case: Case) -> None:
    gc.collect()
    if case.x.is_cuda:
        torch.cuda.empty_cache()
