"""One row of the results."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .contender import STREAMS
from .shapes import Shape


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
    gb_per_s: float | None = None  # those bytes / this time
    of_copy: float | None = None  # time of the copy / this time
    over_upstream: float | None = None  # time of the public package / this time
    launches: int | None = None  # kernels, copies and fillings that one call puts on the GPU
    saved_mb: float | None = None  # held for the backward beside the inputs
    peak_mb: float | None = None  # most that is held at a time during a call, outputs included

    @property
    def time_us(self) -> float | None:
        """Device time where it was measured, else wall clock."""
        return self.wall_us if self.kernel_us is None else self.kernel_us

    def fail(self, error: Exception) -> None:
        """Note why there is no number: what is not installed was skipped, the rest has failed."""
        if isinstance(error, ModuleNotFoundError):
            self.status, self.note = "skipped", f"{error.name} is not installed"
            return
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        self.status, self.note = "failed", f"{type(error).__name__}: {lines[0].strip()[:160]}"


def new_cell(shape: Shape, dtype: torch.dtype, direction: str, contender: str) -> Cell:
    """A cell that was not measured yet, of a shape that says how many Gaussians it has."""
    dims = "x".join(map(str, shape.dims))
    kind = shape.operator, shape.norm_axis, shape.num_heads, shape.layers, shape.num_gaussians
    cell = Cell(shape.name, dims, *kind, str(dtype).removeprefix("torch."), direction, contender)
    cell.bytes = STREAMS[direction] * shape.numel * dtype.itemsize
    return cell
