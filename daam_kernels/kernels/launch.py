"""Launch configurations: all that the kernels of one problem are called with beside their tensors. No kernel here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from ..slices import SliceView
from .tiling import PROCESSORS, Choice, Problem, Tile, cut, density_problem, ladder, most_registers, power_of_two

LIMIT_REGISTERS = torch.version.hip is None  # told that all may be used, ptxas does not spill to use fewer
_FEATURES, _ROWS = 64, 16  # whose partial sums a program adds, and how many at a time
_REDUCTION = 4096  # partial sums of the parameter gradients that are added at a time
_CENTRED = 64  # elements of slices that have one near the center of their Gaussians but for rare cases
_WARPS = 16  # of the kernel that adds them, at most


@dataclass(frozen=True)
class Launch:
    """Everything about launches that does not depend on where their tensors lie.

    ``values`` are arguments by their names in the kernels, ``options`` Triton's own, and ``grid`` the programs along up
    to three axes, where they do not depend on the call.
    """

    values: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...] = field(default=(), kw_only=True)
    plans: dict[Any, Any] = field(default_factory=dict, kw_only=True)  # of the kernels launched so far, by function


@dataclass(frozen=True)
class DensityLaunch(Launch):
    """The same of one direction of density attention. ``parameters``: of the kernel that adds up what the others leave
    for the gradients of the parameters, whose warps have nothing to do with the tile's."""

    tile: Tile
    num_slices: int
    parameters: Launch


def launch_options(num_warps: int, registers: int | None = None) -> dict[str, Any]:
    """What Triton is told beside arguments; ``registers`` of a thread, at most, None for all that it may have."""
    options: dict[str, Any] = dict(num_warps=num_warps, num_stages=1, enable_fp_fusion=True)
    if LIMIT_REGISTERS:
        options["maxnreg"] = registers or most_registers(num_warps)
    return options


def density_launch(
    view: SliceView,
    names: tuple[str, ...],
    num_heads: int,
    num_gaussians: int | tuple[int, ...],
    itemsize: int,
    flags: dict[str, Any],
    processors: int = PROCESSORS,
    tuned: Mapping[Problem, Choice] = MappingProxyType({}),
) -> DensityLaunch:
    """The launch of one direction: backward where ``names`` has a g.

    ``num_gaussians``: for a block, one for each of its layers.
    ``names`` are those of the tensors whose strides ``view`` has, in its order; a mask's strides may follow them.
    ``itemsize`` is x's, in bytes; ``flags`` are passed on to the kernels as they are.
    ``processors`` are the device's; ``tuned`` are choices that go before the ladder's, without a :func:`fault`.
    """
    mask_strides = view.strides[len(names)] if len(view.strides) > len(names) else (0, 0, 0)
    view = replace(view, strides=view.strides[: len(names)])
    layers = num_gaussians if isinstance(num_gaussians, tuple) else (num_gaussians,)
    num_mixed = num_gaussians if flags["MIXTURE"] and flags["NORMALISED"] else 0
    problem = density_problem(
        view, num_heads, itemsize, "g" in names, flags["PADDED"], len(layers), num_mixed, _density(flags)
    )
    tile = cut(problem, tuned.get(problem) or ladder(problem, processors), processors)
    chunk, vec = view.length // num_heads, tile.vec
    num_partials = tile.num_blocks
    unrolled = _unrolled(problem, tile)
    if flags["MIXTURE"]:  # a run each, or a tile
        num_partials *= max(1, tile.num_chunks) * (1 if unrolled and problem.backward else tile.tiles)
    if flags["PER_FEATURE"]:  # a tile of each slice
        num_partials = view.outer * max(1, tile.num_chunks) * tile.tiles * view.inner
    values = {
        "outer": view.outer,
        "chunk": chunk if tile.columns else chunk // vec,
        "length": view.length if tile.columns else view.length // vec,
        "inner": view.inner // vec if tile.columns else view.inner,
        "num_heads": num_heads,
        "num_gaussians": num_gaussians,
        "num_slices": view.outer * num_heads * view.inner,
        "num_chunks": tile.num_chunks,
        "num_partials": num_partials,
        "tiles": tile.tiles,
        "LAYERS": len(layers),
        "COLUMNS": tile.columns,
        "WHOLE": tile.whole,
        "VEC": vec,
        "BLOCK_R": tile.block_r,
        "BLOCK_S": tile.block_s,
        "BLOCK_K": power_of_two(max(layers)),
        "BLOCK_C": power_of_two(tile.num_chunks or 1),
        "BLOCK_P": min(_REDUCTION, power_of_two(num_partials)),
        "BLOCK_F": min(_FEATURES, power_of_two(view.inner)),
        "BLOCK_N": _ROWS,
        "HALF": itemsize == 2,
        "CENTRED": chunk >= _CENTRED and vec * itemsize == 16 and not flags["PADDED"],  # others would spill
        "UNROLLED": unrolled,
        **flags,
    }
    for name, (o, r, i) in zip(names, view.strides):
        scaled = (o // vec, r // vec, i) if tile.columns else (o // vec, r, i // vec)
        values.update(zip((f"{name}_stride_o", f"{name}_stride_r", f"{name}_stride_i"), scaled))
    values.update(zip(("mask_stride_o", "mask_stride_r", "mask_stride_i"), mask_strides))
    options = launch_options(tile.num_warps, tile.registers)
    grid = tile.num_blocks * num_heads, max(1, tile.num_chunks)
    parameters = Launch(values, launch_options(max(4, min(_WARPS, values["BLOCK_P"] // 128))))
    return DensityLaunch(values, options, tile, values["num_slices"], parameters, grid=grid)


def _unrolled(problem: Problem, tile: Tile) -> int:
    """The Gaussians of a mixture if a thread has registers for three numbers of each and its slices, else 0.

    Backward the kernels ask that go over several tiles, whose threads add up three numbers of each Gaussian beside.
    """
    if not problem.backward:
        most = 4 if problem.itemsize == 2 else 8
        return 0 if tile.columns or problem.num_mixed * tile.block_s > most else problem.num_mixed
    masked = problem.padded and (tile.columns or not tile.looped)
    return 0 if masked or problem.itemsize == 8 or problem.num_mixed > 4 else problem.num_mixed


def _density(flags: dict[str, Any]) -> str:
    if not flags["MIXTURE"]:
        return "product"
    return "mixture" if flags["NORMALISED"] else "gaussian" if flags["PER_FEATURE"] else "gate"
