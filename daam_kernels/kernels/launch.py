"""Launch configurations, worked out by plain Python so that a test without a GPU can check them. No kernel here.

A kernel sees x as [outer, R, inner]: slices run along R, cut into heads. A program owns a tile of BLOCK_R elements
along R by BLOCK_S slices of one head. Where ``inner`` is the contiguous axis the slices of a tile are neighbours in
it (``columns``); otherwise they are counted through outer and inner together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd, prod
from typing import Any

# Elements of x that a block of 32 warps holds in registers beside what is computed from them, by bytes of arithmetic.
_FORWARD_TILE = {4: 16384, 8: 4096}
_BACKWARD_TILE = {4: 8192, 8: 2048}
_SPLIT_TILE = {4: 4096, 8: 1024}
_USUAL_TILE = 4096
_THREAD_ELEMENTS = 16
_WIDE_ROW, _NARROW_ROW = 256, 128  # bytes of neighbouring slices that one warp should read, at best and at least
_PROGRAMS = 528  # four for each of an H200's 132 processors
_MERGED = 4096  # partial results that a program merges at once
_MAX_PARTIALS = 4096  # parameter-gradient partials per head
_REDUCTION = 1024  # of which that many are added at a time


@dataclass(frozen=True)
class SliceView:
    """Sizes of [outer, R, inner], and for each tensor its three strides in elements."""

    outer: int
    length: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Tile:
    """How one launch cuts the slices.

    ``vec`` divides every size and stride that is not along the contiguous axis; the kernel gets those divided by it
    and multiplies them back, which is how the compiler learns that 16-byte accesses are aligned.
    A slice is resident (``num_chunks == 0``) or split into ``num_chunks`` runs of ``tiles`` tiles.
    """

    columns: bool
    block_r: int
    block_s: int
    vec: int
    num_warps: int
    num_blocks: int
    tiles: int
    num_chunks: int


@dataclass(frozen=True)
class Launch:
    """Everything about a launch that does not depend on where its tensors lie."""

    tile: Tile
    num_programs: int  # along the first axis of the grid; the second is the chunks of a slice
    num_slices: int
    values: dict[str, Any]  # arguments by their names in the kernels
    _chosen: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def arguments(self, kernel: Any) -> dict[str, Any]:
        """The values that a kernel takes, and its launch options."""
        chosen = self._chosen.get(kernel)
        if chosen is None:
            chosen = {name: self.values[name] for name in kernel.arg_names if name in self.values}
            chosen.update(num_warps=self.tile.num_warps, num_stages=1, enable_fp_fusion=True)
            self._chosen[kernel] = chosen
        return chosen


@lru_cache(maxsize=4096)
def slice_view(shape: tuple[int, ...], axis: int, dense: tuple[int, ...], *others: tuple[int, ...]) -> SliceView | None:
    """[outer, R, inner] of a dense layout, and the strides that the other layouts have in it.

    ``dense`` holds the strides of a dense tensor of ``shape``, whose order of memory decides which axes are outer and
    which inner. None where another layout has no such strides: its tensor must be copied first.
    """
    order = sorted((d for d in range(len(shape)) if shape[d] > 1 or d == axis), key=lambda d: -dense[d])
    place = order.index(axis)
    outer, inner = order[:place], order[place + 1 :]
    strides = []
    for layout in (dense, *others):
        merged = _merge(shape, layout, outer), _merge(shape, layout, inner)
        if None in merged:
            return None
        strides.append((merged[0], layout[axis], merged[1]))
    sizes = prod(shape[d] for d in outer), shape[axis], prod(shape[d] for d in inner)
    return SliceView(*sizes, tuple(strides))


def density_launch(
    view: SliceView,
    names: tuple[str, ...],
    mask_strides: tuple[int, int, int],
    num_heads: int,
    num_gaussians: int,
    itemsize: int,
    backward: bool,
    flags: dict[str, Any],
) -> Launch:
    """The launch of one direction. ``names`` are those of the tensors whose strides ``view`` has, in its order;
    ``itemsize`` is x's, in bytes; ``flags`` are passed on to the kernels as they are.
    """
    tile = density_tile(view, num_heads, itemsize, backward)
    chunk, vec = view.length // num_heads, tile.vec
    blocks = tile.num_blocks if tile.num_chunks else -(-tile.num_blocks // tile.tiles)
    values = {
        "outer": view.outer,
        "chunk": chunk if tile.columns else chunk // vec,
        "length": view.length if tile.columns else view.length // vec,
        "inner": view.inner // vec if tile.columns else view.inner,
        "num_heads": num_heads,
        "num_gaussians": num_gaussians,
        "num_slices": view.outer * num_heads * view.inner,
        "num_chunks": tile.num_chunks,
        "num_partials": blocks,
        "tiles": tile.tiles,
        "COLUMNS": tile.columns,
        "VEC": vec,
        "BLOCK_R": tile.block_r,
        "BLOCK_S": tile.block_s,
        "BLOCK_K": _power_of_two(num_gaussians),
        "BLOCK_C": _power_of_two(tile.num_chunks or 1),
        "BLOCK_P": _REDUCTION,
        **flags,
    }
    for name, (o, r, i) in zip(names, view.strides):
        scaled = (o // vec, r // vec, i) if tile.columns else (o // vec, r, i // vec)
        values.update(zip((f"{name}_stride_o", f"{name}_stride_r", f"{name}_stride_i"), scaled))
    values.update(zip(("mask_stride_o", "mask_stride_r", "mask_stride_i"), mask_strides))
    return Launch(tile, blocks * num_heads, values["num_slices"], values)


def _merge(shape: tuple[int, ...], strides: tuple[int, ...], dims: list[int]) -> int | None:
    """The one stride of ``dims`` taken as a single axis, 0 for none of them; None where they do not merge."""
    for d, following in zip(dims, dims[1:]):
        if strides[d] != strides[following] * shape[following]:
            return None
    return strides[dims[-1]] if dims else 0


def density_tile(view: SliceView, num_heads: int, itemsize: int, backward: bool) -> Tile:
    """The tile of one direction."""
    chunk = view.length // num_heads
    longest = view.length - (num_heads - 1) * chunk
    arithmetic = max(itemsize, 4)
    resident = (_BACKWARD_TILE if backward else _FORWARD_TILE)[arithmetic]

    unit_r = all(s[1] == 1 for s in view.strides)
    unit_i = view.inner > 1 and all(s[2] == 1 for s in view.strides)
    columns = unit_i and not unit_r and (view.inner >= 32 or longest * view.inner >= 1024)
    vec = _vector(view, chunk, columns, unit_r, itemsize)
    slices = view.inner if columns else view.outer * view.inner

    block_r = _power_of_two(longest)
    narrowest = min(_power_of_two(slices), _NARROW_ROW // itemsize) if columns else 1
    split = block_r * narrowest > resident
    if split:
        budget = _SPLIT_TILE[arithmetic]
        block_s = narrowest
        block_r = budget // block_s
    else:
        budget = min(resident, max(_USUAL_TILE, block_r * (_WIDE_ROW // itemsize))) if columns else _USUAL_TILE
        block_s = min(_power_of_two(slices), max(1, budget // block_r))
        if columns:
            block_s = max(narrowest, min(block_s, 1024 // itemsize))
    num_warps = min(32, max(1, block_r * block_s // (32 * _THREAD_ELEMENTS)))

    num_blocks = view.outer * -(-view.inner // block_s) if columns else -(-slices // block_s)
    if split:
        row_tiles = -(-longest // block_r)
        most = min(row_tiles, max(1, _MERGED // block_s))
        num_chunks = min(most, -(-_PROGRAMS // (num_blocks * num_heads)))
        tiles = -(-row_tiles // num_chunks)
        num_chunks = -(-row_tiles // tiles)
    else:
        num_chunks = 0
        tiles = -(-num_blocks // _MAX_PARTIALS) if backward else 1
    return Tile(columns, block_r, block_s, vec, num_warps, num_blocks, tiles, num_chunks)


def _vector(view: SliceView, chunk: int, columns: bool, unit_r: bool, itemsize: int) -> int:
    """Elements, at most 16 bytes of them, that divide every size and stride beside the contiguous axis."""
    if columns:
        numbers = [view.inner, *(n for s in view.strides for n in s[:2])]
    elif unit_r:
        numbers = [chunk, view.length, *(n for s in view.strides for n in (s[0], s[2]))]
    else:
        return 1
    return gcd(16 // itemsize, *numbers)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
