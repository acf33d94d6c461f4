"""Which kernels of attention pooling are launched for its sizes, and how.

What decides about code is worked out once and held. The numbers of rows are others in every batch, and numbers of the
call: for them only the cut and the grid are worked out, and remembered of the latest.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from ..options import Pooling
from ..sequences import packing
from .additive_host import dot_precision
from .attention_pool_hidden import pool_hidden_sums
from .attention_pool_hidden_gradient import pool_hidden_dx, pool_hidden_gradient, pool_layer_sums
from .attention_pool_launch import (
    HiddenGradientLaunch,
    HiddenLaunch,
    PoolLaunch,
    WidePoolLaunch,
    hidden_gradient_launch,
    hidden_pool_launch,
    pool_launch,
    wide_pool_launch,
)
from .attention_pool_layers import TYPES, precision_of, type_of_products
from .attention_pool_sweeps import pool_gradient, pool_merge, pool_query_sums, pool_sums
from .attention_pool_wide import pool_wide_sums
from .attention_pool_wide_gradient import pool_wide_gradient, pool_wide_hidden_gradient
from .tiling import power_of_two
from .launch import Launch, launch_options
from .remembered import remembered

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

_HELD = 1024  # of the latest sizes, and of the latest kinds
_MERGED_CHUNKS, _MERGED_COLUMNS = 16, 128
_Blocks = tuple[tuple[str, "int | None"], ...]  # by their names in the kernels


class PoolKind(NamedTuple):
    """What code depends on beside the blocks of a cut, whatever the number of rows.

    ``multiplied``: the type that a hidden layer is multiplied in; ``units``: of that layer, or columns of the query,
    with ``layers`` between it and x; ``stride_t`` and ``dx_stride_t``: from row to row.
    """

    device: torch.device
    dtype: torch.dtype
    multiplied: torch.dtype
    hops: int
    units: int
    layers: int
    embed_dim: int
    dropout_p: float
    stride_t: int
    dx_stride_t: int

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


class PoolSizes(NamedTuple):
    """``length``: of x along its rows, of which the ``longest`` bag has at most as many; ``stride_b`` and
    ``dx_stride_b``: from bag to bag; ``divisor``: 16 or what of it divides all strides of x and dx, but along
    embed_dim. ``packed`` bags have no such stride."""

    kind: PoolKind
    packed: bool
    num_bags: int
    length: int
    longest: int
    stride_b: int
    dx_stride_b: int
    divisor: int

    @property
    def num_rows(self) -> int:
        return self.length if self.packed else self.num_bags * self.length

    @property
    def of_cut(self) -> tuple[int, int, int, int | None, int, tuple[int, ...], int, int]:
        """What functions of ``attention_pool_launch`` take."""
        kind = self.kind
        return (
            self.num_bags, self.longest, kind.hops, kind.units if kind.layers else None, kind.embed_dim,
            (self.divisor,), kind.dtype.itemsize, kind.multiplied.itemsize,
        )  # fmt: skip

    def numbers(self, cut: PoolLaunch | WidePoolLaunch | HiddenGradientLaunch) -> dict[str, int]:
        """Of a call, by their names in the kernels."""
        length, hops = self.length, self.kind.hops
        numbers = dict(length=length, score_stride_h=length, num_chunks=cut.num_chunks)
        if self.packed:
            return dict(numbers, x_stride_b=0, dx_stride_b=0, score_stride_b=0, valid_stride_b=0)
        strides = dict(x_stride_b=self.stride_b // cut.vec, dx_stride_b=self.dx_stride_b // cut.vec)
        return dict(numbers, **strides, score_stride_b=hops * length, valid_stride_b=length)


class Sweep(NamedTuple):
    """One launch of a kernel, beside its tensors."""

    kernel: JITFunction
    launch: Launch
    numbers: dict[str, int]
    grid: tuple[int, ...]


def sizes_of(pooling: Pooling, x: Tensor, dx: Tensor | None = None) -> PoolSizes:
    """Of rows x, whose columns are contiguous, as those of dx are."""
    longest, packed = x.shape[-2], pooling.cu_seqlens is not None
    if packed:
        longest = packing(pooling.cu_seqlens).longest if pooling.max_seqlen is None else pooling.max_seqlen
    layers = 0 if pooling.key_weight is None else 1 if pooling.gate_weight is None else 2
    strides, dx_strides = x.stride()[:-1], (0,) if dx is None else dx.stride()[:-1]
    kind = PoolKind(
        x.device, x.dtype, type_of_products(pooling), *pooling.query.shape, layers, x.shape[-1], pooling.dropout_p,
        strides[-1], dx_strides[-1],
    )  # fmt: skip
    divisor = gcd(16, *strides, *dx_strides)
    return PoolSizes(kind, packed, pooling.num_bags, x.shape[-2], longest, strides[0], dx_strides[0], divisor)


@remembered(_HELD)
def forward_sweeps(sizes: PoolSizes) -> tuple[Sweep, Sweep]:
    """(the kernel that sums up, the one that merges its chunks)."""
    kind = sizes.kind
    kernel, cut, blocks = _summing(*sizes.of_cut)
    programs = sizes.num_bags * cut.num_chunks * cut.hop_blocks
    sums = Sweep(kernel, _launch(kind, cut.vec, cut.num_warps, blocks), sizes.numbers(cut), (programs,))
    columns = min(_MERGED_COLUMNS, power_of_two(kind.embed_dim))
    chunks = min(_MERGED_CHUNKS, power_of_two(cut.num_chunks))
    grid = sizes.num_bags * kind.hops, triton.cdiv(kind.embed_dim, columns)
    return sums, Sweep(pool_merge, _merge_launch(kind, chunks, columns), dict(num_chunks=cut.num_chunks), grid)


@remembered(_HELD)
def dot_backward_sweeps(sizes: PoolSizes) -> tuple[Sweep, Sweep]:
    """(the kernel that writes dx of scores that are products with the query, the one that sums up for the query)."""
    (kernel, cut, blocks), (tile, of_query) = _dot_gradient(*sizes.of_cut)
    gradient = Sweep(
        kernel, _launch(sizes.kind, cut.vec, cut.num_warps, blocks), sizes.numbers(cut),
        (sizes.num_bags * cut.num_chunks,),
    )  # fmt: skip
    launch = _launch(sizes.kind, tile.vec, tile.num_warps, of_query)
    grid = sizes.num_bags * tile.num_chunks * tile.hop_blocks, tile.column_blocks
    return gradient, Sweep(pool_query_sums, launch, sizes.numbers(tile), grid)


class HiddenSweeps(NamedTuple):
    """``gradient`` writes the hidden layer's gradient; ``products`` are of the query's, where it is not summed up with
    the rest."""

    cut: HiddenGradientLaunch
    gradient: Sweep
    dx: Sweep
    layer_sums: Sweep
    products: Sweep | None


@remembered(_HELD)
def hidden_backward_sweeps(sizes: PoolSizes) -> HiddenSweeps:
    """Of the rows of a segment, whose first and end are further numbers of the call."""
    kind, (cut, blocks, of_products) = sizes.kind, _hidden_gradient(sizes.num_rows, sizes.kind.layers, *sizes.of_cut)
    launch = _launch(kind, cut.vec, cut.num_warps, blocks)
    numbers, programs = sizes.numbers(cut), (sizes.num_bags * cut.num_chunks,)
    summed = dict(length=sizes.length, x_stride_b=numbers["x_stride_b"], rows_each=cut.rows_each)
    layer_sums = Sweep(pool_layer_sums, launch, summed, (cut.unit_blocks, cut.column_blocks, cut.sum_blocks))
    dx = Sweep(pool_hidden_dx, launch, numbers, programs)
    if cut.whole:
        return HiddenSweeps(cut, Sweep(pool_hidden_gradient, launch, numbers, programs), dx, layer_sums, None)
    products = Sweep(
        pool_layer_sums, _launch(kind, cut.vec, cut.num_warps, of_products),
        dict(length=cut.segment_rows, x_stride_b=0, rows_each=cut.rows_each),
        (triton.cdiv(kind.hops, cut.block_u), triton.cdiv(kind.units, cut.block_s), cut.sum_blocks),
    )  # fmt: skip
    return HiddenSweeps(cut, Sweep(pool_wide_hidden_gradient, launch, numbers, programs), dx, layer_sums, products)


@remembered(_HELD)
def _launch(kind: PoolKind, vec: int, num_warps: int, blocks: _Blocks) -> Launch:
    """Of any kernel that sweeps rows, which may be of something else than x where the blocks say so."""
    values = dict(
        hops=kind.hops, x_stride_t=kind.stride_t // vec, dx_stride_t=kind.dx_stride_t // vec,
        KEEP_SCALE=1 / (1 - kind.dropout_p), HIDDEN=kind.units, E=kind.embed_dim, VEC=vec,
        PRECISION=precision_of(kind.dtype), PRECISION_BACK=dot_precision(kind.arithmetic),
        TYPE=TYPES[kind.multiplied], ACC=TYPES[kind.arithmetic],
    )  # fmt: skip
    return Launch(values | dict(blocks), launch_options(num_warps))


@remembered(_HELD)
def _merge_launch(kind: PoolKind, chunks: int, columns: int) -> Launch:
    values = dict(hops=kind.hops, E=kind.embed_dim, ACC=TYPES[kind.arithmetic], BLOCK_C=chunks, BLOCK_E=columns)
    return Launch(values, dict(num_warps=4))


def _summing(
    num_bags: int, longest: int, hops: int, hidden: int | None, embed_dim: int, strides: tuple[int, ...], itemsize: int,
    multiplied: int,
) -> tuple[JITFunction, PoolLaunch | WidePoolLaunch, _Blocks]:  # fmt: skip
    """(the kernel that sums up, its cut, its blocks)."""
    sizes = num_bags, longest, hops
    if hidden is None:
        cut = pool_launch(*sizes, embed_dim, strides, itemsize)
        if cut.whole:
            return pool_sums, cut, _named(BLOCK_H=cut.block_h, BLOCK_T=cut.block_t, BLOCK_E=cut.block_e)
    elif (both := hidden_pool_launch(*sizes, hidden, embed_dim, strides, itemsize, multiplied)) is not None:
        cut = both.rows
        blocks = _named(BLOCK_H=cut.block_h, BLOCK_R=cut.block_t, BLOCK_E=cut.block_e, **_of_layer(both.hidden))
        return pool_hidden_sums, cut, blocks
    cut = wide_pool_launch(*sizes, hidden, embed_dim, strides, itemsize, multiplied)
    of_layer = dict(BLOCK_C=None) if cut.hidden is None else _of_layer(cut.hidden)
    of_rows = dict(BLOCK_H=cut.block_h, BLOCK_S=cut.block_s, BLOCK_T=cut.block_t, BLOCK_K=cut.block_k)
    return pool_wide_sums, cut, _named(hop_blocks=cut.hop_blocks, BLOCK_E=cut.block_e, **of_layer | of_rows)


def _dot_gradient(
    num_bags: int, longest: int, hops: int, hidden: None, embed_dim: int, strides: tuple[int, ...], itemsize: int,
    multiplied: int,
) -> tuple[tuple[JITFunction, PoolLaunch | WidePoolLaunch, _Blocks], tuple[PoolLaunch, _Blocks]]:  # fmt: skip
    """(the kernel that writes dx, its cut, its blocks), (the cut and blocks of the query's sums)."""
    sizes = num_bags, longest, hops
    tile = pool_launch(*sizes, embed_dim, strides, itemsize)
    of_query = _named(hop_blocks=tile.hop_blocks, BLOCK_H=tile.block_h, BLOCK_T=tile.block_t, BLOCK_E=tile.block_e)
    kernel, cut = pool_gradient, pool_launch(*sizes, embed_dim, strides, itemsize, gradient=True)
    if not cut.whole:
        kernel = pool_wide_gradient
        cut = wide_pool_launch(*sizes, hidden, embed_dim, strides, itemsize, multiplied, gradient=True)
    blocks = _named(BLOCK_H=cut.block_h, BLOCK_T=cut.block_t, BLOCK_E=cut.block_e)
    return (kernel, cut, blocks), (tile, of_query)


def _hidden_gradient(
    num_rows: int, layers: int, num_bags: int, longest: int, hops: int, hidden: int, embed_dim: int,
    strides: tuple[int, ...], itemsize: int, multiplied: int,
) -> tuple[HiddenGradientLaunch, _Blocks, _Blocks]:  # fmt: skip
    """(the cut, its blocks, those of ``HiddenSweeps.products``)."""
    cut = hidden_gradient_launch(
        num_bags, longest, num_rows, hops, hidden, layers, embed_dim, strides, itemsize, multiplied
    )
    blocks = dict(
        UNITS=hidden * cut.layers, BLOCK_H=cut.block_h, **_of_layer(cut.hidden), BLOCK_U=cut.block_u,
        BLOCK_S=cut.block_s, BLOCK_R=cut.block_r, BLOCK_E=cut.block_e,
    )  # fmt: skip
    # The scores' gradient and the hidden layer of the rows of a segment, in the place of the layer's gradient and x.
    vec = gcd(16 // max(4, itemsize), hidden)
    of_phi = dict(x_stride_t=hidden // vec, UNITS=hops, E=hidden, VEC=vec)
    return cut, _named(**blocks), _named(**blocks | of_phi)


def _of_layer(tile: HiddenLaunch) -> dict[str, int]:
    return dict(BLOCK_T=tile.block_t, BLOCK_C=tile.block_c, BLOCK_K=tile.block_k)


def _named(**blocks: int | None) -> _Blocks:
    return tuple(blocks.items())
