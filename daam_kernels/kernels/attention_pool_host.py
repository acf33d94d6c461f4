"""Which kernels of attention pooling are launched for its sizes, and how: worked out once, and held."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..sequences import packing
from .additive_host import dot_precision
from .attention_pool_hidden import pool_hidden_sums
from .attention_pool_hidden_gradient import pool_hidden_gradient
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
from .attention_pool_sweeps import pool_gradient, pool_sums
from .attention_pool_wide import pool_wide_sums
from .attention_pool_wide_gradient import pool_wide_gradient, pool_wide_hidden_gradient
from .launch import Launch
from .remembered import remembered

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

    from ..ops.attention_pool import Pooling

_HELD = 1024  # launches of every kind: packed bags may have another number of rows in every batch
_MERGED_CHUNKS, _MERGED_COLUMNS = 16, 128


class PoolSizes(NamedTuple):
    """All that launches depend on.

    ``length``: of x along its rows, of which the ``longest`` bag has at most as many; ``units``: of the hidden layer,
    or columns of the query, with ``layers`` between it and x; ``multiplied``: the type that these are multiplied in;
    ``strides`` and ``dx_strides``: of x and dx, but along embed_dim.
    """

    device: torch.device
    dtype: torch.dtype
    multiplied: torch.dtype
    packed: bool
    num_bags: int
    length: int
    longest: int
    hops: int
    units: int
    layers: int
    embed_dim: int
    dropout_p: float
    strides: tuple[int, ...]
    dx_strides: tuple[int, ...] = ()

    @property
    def hidden(self) -> int | None:
        return self.units if self.layers else None

    @property
    def num_rows(self) -> int:
        return self.length if self.packed else self.num_bags * self.length

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def itemsizes(self) -> tuple[int, int]:
        """Of a number of x, and of one that a hidden layer is multiplied in."""
        return self.dtype.itemsize, self.multiplied.itemsize


class PoolForward(NamedTuple):
    kernel: JITFunction  # that sums up
    sums: Launch
    merge: Launch
    num_chunks: int


class DotBackward(NamedTuple):
    kernel: JITFunction  # that writes dx
    gradient: Launch
    query_sums: Launch
    num_chunks: int


class HiddenBackward(NamedTuple):
    """``gradient`` is also of ``pool_hidden_dx``; ``products`` are of the query's gradient, where it is not summed up
    with the rest."""

    kernel: JITFunction  # that writes the hidden layer's gradient
    cut: HiddenGradientLaunch
    gradient: Launch
    layer_sums: Launch
    products: Launch | None


def sizes_of(pooling: Pooling, x: Tensor, dx: Tensor | None = None) -> PoolSizes:
    """Of rows x, whose columns are contiguous, as those of dx are."""
    longest = x.shape[-2]
    if pooling.cu_seqlens is not None:
        longest = packing(pooling.cu_seqlens).longest if pooling.max_seqlen is None else pooling.max_seqlen
    layers = 0 if pooling.key_weight is None else 1 if pooling.gate_weight is None else 2
    return PoolSizes(
        x.device, x.dtype, type_of_products(pooling), pooling.cu_seqlens is not None, pooling.num_bags, x.shape[-2],
        longest, *pooling.query.shape, layers, x.shape[-1], pooling.dropout_p, x.stride()[:-1],
        () if dx is None else dx.stride()[:-1],
    )  # fmt: skip


@remembered(_HELD)
def forward_launches(sizes: PoolSizes) -> PoolForward:
    kernel, cut, blocks = _summing(sizes)
    programs = sizes.num_bags * cut.num_chunks * cut.hop_blocks
    columns = min(_MERGED_COLUMNS, triton.next_power_of_2(sizes.embed_dim))
    chunks = min(_MERGED_CHUNKS, triton.next_power_of_2(cut.num_chunks))
    merge = Launch(
        dict(
            num_chunks=cut.num_chunks, hops=sizes.hops, E=sizes.embed_dim, ACC=TYPES[sizes.arithmetic],
            BLOCK_C=chunks, BLOCK_E=columns,
        ),
        dict(num_warps=4), (sizes.num_bags * sizes.hops, triton.cdiv(sizes.embed_dim, columns)),
    )  # fmt: skip
    return PoolForward(
        kernel, _launch(sizes, cut, programs, hop_blocks=cut.hop_blocks, **blocks), merge, cut.num_chunks
    )


@remembered(_HELD)
def dot_backward_launches(sizes: PoolSizes) -> DotBackward:
    """Of scores that are products with the query."""
    strides = sizes.strides + sizes.dx_strides
    kernel, cut = pool_gradient, _pool_launch(sizes, strides, gradient=True)
    if not cut.whole:
        kernel = pool_wide_gradient
        cut = wide_pool_launch(*_counts(sizes), sizes.embed_dim, strides, *sizes.itemsizes, gradient=True)
    gradient = _launch(sizes, cut, sizes.num_bags * cut.num_chunks, BLOCK_H=cut.block_h, BLOCK_T=cut.block_t)
    tile = _pool_launch(sizes, sizes.strides)
    query_sums = _launch(
        sizes, tile, sizes.num_bags * tile.num_chunks * tile.hop_blocks, tile.column_blocks,
        hop_blocks=tile.hop_blocks, BLOCK_H=tile.block_h, BLOCK_T=tile.block_t,
    )  # fmt: skip
    return DotBackward(kernel, gradient, query_sums, tile.num_chunks)


@remembered(_HELD)
def hidden_backward_launches(sizes: PoolSizes) -> HiddenBackward:
    """With a hidden layer."""
    bags, longest, hops, hidden = _counts(sizes)
    cut = hidden_gradient_launch(
        bags, longest, sizes.num_rows, hops, hidden, sizes.layers, sizes.embed_dim, sizes.strides + sizes.dx_strides,
        *sizes.itemsizes,
    )  # fmt: skip
    blocks = dict(
        rows_each=cut.rows_each, UNITS=hidden * cut.layers, BLOCK_H=cut.block_h, **_blocks(cut.hidden),
        BLOCK_U=cut.block_u, BLOCK_S=cut.block_s, BLOCK_R=cut.block_r,
    )  # fmt: skip
    gradient = _launch(sizes, cut, bags * cut.num_chunks, **blocks)
    layer_sums = _launch(sizes, cut, cut.unit_blocks, cut.column_blocks, cut.sum_blocks, **blocks)
    if cut.whole:
        return HiddenBackward(pool_hidden_gradient, cut, gradient, layer_sums, None)
    # The scores' gradient and the hidden layer of the rows of a segment, in the place of the layer's gradient and x.
    vec = gcd(16 // sizes.arithmetic.itemsize, hidden)
    of_phi = dict(length=cut.segment_rows, x_stride_b=0, x_stride_t=hidden // vec, UNITS=hops, E=hidden, VEC=vec)
    grid = triton.cdiv(hops, cut.block_u), triton.cdiv(hidden, cut.block_s), cut.sum_blocks
    products = _launch(sizes, cut, *grid, **blocks | of_phi)
    return HiddenBackward(pool_wide_hidden_gradient, cut, gradient, layer_sums, products)


def _launch(
    sizes: PoolSizes, cut: PoolLaunch | WidePoolLaunch | HiddenGradientLaunch, *grid: int, **others: Any
) -> Launch:  # fmt: skip
    """Of any kernel that sweeps rows, cut like this, over the programs of the grid."""
    vec, dense = cut.vec, not sizes.packed
    values = dict(
        length=sizes.length, num_chunks=cut.num_chunks, hops=sizes.hops,
        x_stride_b=sizes.strides[0] // vec if dense else 0, x_stride_t=sizes.strides[-1] // vec,
        score_stride_b=sizes.hops * sizes.length if dense else 0, score_stride_h=sizes.length,
        valid_stride_b=sizes.length if dense else 0,
        KEEP_SCALE=1 / (1 - sizes.dropout_p), HIDDEN=sizes.units, E=sizes.embed_dim, VEC=vec,
        PRECISION=precision_of(sizes.dtype), PRECISION_BACK=dot_precision(sizes.arithmetic),
        TYPE=TYPES[sizes.multiplied], ACC=TYPES[sizes.arithmetic], BLOCK_E=cut.block_e,
    )  # fmt: skip
    if sizes.dx_strides:
        values.update(dx_stride_b=sizes.dx_strides[0] // vec if dense else 0, dx_stride_t=sizes.dx_strides[-1] // vec)
    return Launch(values | others, cut.options(), grid)


def _summing(sizes: PoolSizes) -> tuple[JITFunction, PoolLaunch | WidePoolLaunch, dict]:
    """(the kernel that sums up, its cut, its blocks)."""
    arguments = *_counts(sizes), sizes.embed_dim, sizes.strides, *sizes.itemsizes
    if sizes.hidden is None:
        rows = _pool_launch(sizes, sizes.strides)
        if rows.whole:
            return pool_sums, rows, dict(BLOCK_H=rows.block_h, BLOCK_T=rows.block_t)
    elif (both := hidden_pool_launch(*arguments)) is not None:
        rows = both.rows
        return pool_hidden_sums, rows, _blocks(both.hidden) | dict(BLOCK_H=rows.block_h, BLOCK_R=rows.block_t)
    cut = wide_pool_launch(*arguments)
    blocks = dict(BLOCK_C=None) if cut.hidden is None else _blocks(cut.hidden)
    blocks |= dict(BLOCK_H=cut.block_h, BLOCK_S=cut.block_s, BLOCK_T=cut.block_t, BLOCK_K=cut.block_k)
    return pool_wide_sums, cut, blocks


def _pool_launch(sizes: PoolSizes, strides: tuple[int, ...], gradient: bool = False) -> PoolLaunch:
    bags, longest, hops, _ = _counts(sizes)
    return pool_launch(bags, longest, hops, sizes.embed_dim, strides, sizes.dtype.itemsize, gradient)


def _counts(sizes: PoolSizes) -> tuple[int, int, int, int | None]:
    return sizes.num_bags, sizes.longest, sizes.hops, sizes.hidden


def _blocks(tile: HiddenLaunch) -> dict:
    return dict(BLOCK_T=tile.block_t, BLOCK_C=tile.block_c, BLOCK_K=tile.block_k)
