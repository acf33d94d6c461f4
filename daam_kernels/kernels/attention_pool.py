"""Attention pooling over ragged bags.

Forward, x is read from memory once. ``pool_sums`` has the scores, the softmax as it goes, relative to the largest score
of its rows so far, and the weighted sum; ``pool_hidden_sums`` has the hidden layer of a tile too. Where the sums do not
fit a program, for rows too long or hops too many, ``pool_wide_sums`` has them in memory, of either kind of scores.
``pool_merge`` joins the chunks of a bag in a fixed order.

Backward, x is read from memory twice. Of scores that are products with the query, ``pool_gradient``, or
``pool_wide_gradient`` of long rows, writes dx and the scores' gradient, and ``pool_query_sums`` sums the rows up,
weighed with that, for the query's gradient. Of a hidden layer, ``pool_hidden_gradient`` has the layer again, and writes
its gradient, of a segment of rows at a time, or ``pool_wide_hidden_gradient`` where its units or hops do not fit a
program; ``pool_hidden_dx`` makes dx of it, and ``pool_layer_sums`` reads x again for the layers' gradients.

A program that reads its rows again does so right away, and as few of them as stay in the cache; so it is with programs
that share rows, which run together. With a hidden layer 16 rows are the least that a program takes: if they are longer
than some 20 KB, those of all programs at once are more than an H200's cache holds.
"""

from __future__ import annotations

import functools
from math import gcd
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import packing
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
from .attention_pool_layers import scorer_of, type_of_products
from .attention_pool_sweeps import pool_gradient, pool_merge, pool_query_sums, pool_sums
from .attention_pool_wide import pool_wide_sums
from .attention_pool_wide_gradient import pool_wide_gradient, pool_wide_hidden_gradient
from .host import device_of

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

    from ..ops.attention_pool import Pooling

_MERGED_CHUNKS, _MERGED_COLUMNS = 16, 128


def pool_forward(pooling: Pooling, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """(context, lse) as of ``attention_pool_blocks.forward``; fills scores, where they are given full of -inf."""
    x, arithmetic, hops = _rows_of(pooling.x), pooling.arithmetic, pooling.query.shape[0]
    kernel, launch, blocks = _forward_launch(pooling, x)
    if kernel is pool_wide_sums and scores is None:
        scores = x.new_empty(pooling.shape_of_scores, dtype=arithmetic)
    shape = pooling.num_bags, launch.num_chunks, hops
    sums = x.new_empty((*shape, x.shape[-1]), dtype=arithmetic)
    tops, totals = (x.new_empty(shape, dtype=arithmetic) for _ in range(2))
    context = x.new_empty((pooling.num_bags, hops, x.shape[-1]), dtype=arithmetic)
    lse = x.new_empty((pooling.num_bags, hops), dtype=arithmetic)
    columns = min(_MERGED_COLUMNS, triton.next_power_of_2(x.shape[-1]))
    with device_of(x):
        run(
            kernel, (pooling.num_bags * launch.num_chunks * launch.hop_blocks,),
            **_shared(pooling, x, launch) | scorer_of(pooling) | blocks, hop_blocks=launch.hop_blocks,
            scores_ptr=scores, sums_ptr=sums, tops_ptr=tops, totals_ptr=totals,
        )  # fmt: skip
        run(
            pool_merge, (pooling.num_bags * hops, triton.cdiv(x.shape[-1], columns)),
            sums_ptr=sums, tops_ptr=tops, totals_ptr=totals, context_ptr=context, lse_ptr=lse,
            num_chunks=launch.num_chunks, hops=hops, E=x.shape[-1], ACC=_of_triton(arithmetic),
            BLOCK_C=min(_MERGED_CHUNKS, triton.next_power_of_2(launch.num_chunks)), BLOCK_E=columns, num_warps=4,
        )  # fmt: skip
    return context, lse


def pool_backward(
    pooling: Pooling, grad: Tensor, grad_weights: Tensor | None, lse: Tensor, inner: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """(dx, the gradients of the scorer's tensors) as of ``attention_pool_blocks.backward``."""
    x = _rows_of(pooling.x)
    whole = pooling.lengths is None  # else rows beyond them are not visited
    dx = torch.empty_like(pooling.x) if whole else torch.zeros_like(pooling.x)
    into = dx if dx.stride(-1) == 1 or x.shape[-1] == 1 else torch.zeros_like(x)
    given = dict(grad_ptr=grad, grad_weights_ptr=grad_weights, lse_ptr=lse, inner_ptr=inner, dx_ptr=into)
    backward = _dot_backward if pooling.key_weight is None else _hidden_backward
    gradients = backward(pooling, x, given, into)
    return dx if into is dx else dx.copy_(into), gradients


def _dot_backward(pooling: Pooling, x: Tensor, given: dict, dx: Tensor) -> list[Tensor | None]:
    """Writes dx, and returns the gradients of the scorer's tensors."""
    (hops, embed_dim), arithmetic = pooling.query.shape, pooling.arithmetic
    d_scores = (torch.empty if pooling.lengths is None else torch.zeros)(
        pooling.shape_of_scores, dtype=arithmetic, device=x.device
    )
    kernel, launch = _dot_gradient_launch(pooling, x, dx)
    if kernel is pool_wide_gradient:
        given["given_ptr"] = x.new_empty(pooling.shape_of_scores, dtype=arithmetic)
    tile = _launch(pooling, x)
    sums = x.new_empty((pooling.num_bags, tile.num_chunks, hops, embed_dim), dtype=arithmetic)
    with device_of(x):
        run(
            kernel, (pooling.num_bags * launch.num_chunks,),
            **_shared(pooling, x, launch) | scorer_of(pooling) | given | _strides(pooling, dx, launch.vec),
            d_scores_ptr=d_scores, BLOCK_H=launch.block_h, BLOCK_T=launch.block_t,
        )  # fmt: skip
        run(
            pool_query_sums, (pooling.num_bags * tile.num_chunks * tile.hop_blocks, tile.column_blocks),
            **_shared(pooling, x, tile), hop_blocks=tile.hop_blocks, d_scores_ptr=d_scores,
            sums_ptr=sums, BLOCK_H=tile.block_h, BLOCK_T=tile.block_t,
        )  # fmt: skip
    d_query = pooling.scale * sums.sum((0, 1), dtype=torch.float64)
    return [d_query.to(pooling.query.dtype), None, None, None, None]


def _hidden_backward(pooling: Pooling, x: Tensor, given: dict, dx: Tensor) -> list[Tensor | None]:
    """The same with a hidden layer, a segment of rows after the other."""
    launch = _hidden_gradient_launch(pooling, x, dx)
    (hops, hidden), embed_dim, kept = pooling.query.shape, x.shape[-1], launch.segment_rows
    units, programs = hidden * launch.layers, pooling.num_bags * launch.num_chunks
    new = functools.partial(x.new_empty, dtype=pooling.arithmetic)
    d_query = new((programs if launch.whole else launch.sum_blocks, hops, hidden))
    d_weight, d_bias = new((launch.sum_blocks, units, embed_dim)), new((launch.sum_blocks, units))
    shared = _shared(pooling, x, launch) | scorer_of(pooling) | given | _strides(pooling, dx, launch.vec)
    shared |= dict(
        given_ptr=new(pooling.shape_of_scores), d_hidden_ptr=new((kept, units)), d_query_ptr=d_query,
        d_weight_ptr=d_weight, d_bias_ptr=d_bias, rows_each=launch.rows_each,
        UNITS=units, BLOCK_H=launch.block_h, **_blocks(launch.hidden), BLOCK_U=launch.block_u,
        BLOCK_S=launch.block_s, BLOCK_R=launch.block_r,
    )  # fmt: skip
    valid = pooling.valid_rows()  # the sums are of rows wherever they lie, which does not say what is within lengths
    valid = None if valid is None else valid.contiguous().view(torch.uint8).flatten()
    if not launch.whole:
        phi, d_scores = new((kept, hidden)), new((kept, hops))
        phi_vec = gcd(16 // phi.itemsize, hidden)
        shared |= dict(phi_ptr=phi, d_scores_ptr=d_scores)
    sums = [t.new_zeros(t.shape[1:], dtype=torch.float64) for t in (d_query, d_weight, d_bias)]
    num_rows = x.numel() // embed_dim
    with device_of(x):
        for first in range(0, num_rows, kept):
            end = min(first + kept, num_rows)
            rows = dict(first_row=first, end_row=end)
            run(pool_hidden_gradient if launch.whole else pool_wide_hidden_gradient, (programs,), **shared, **rows)
            run(pool_hidden_dx, (programs,), **shared, **rows)
            run(
                pool_layer_sums, (launch.unit_blocks, launch.column_blocks, launch.sum_blocks),
                **shared | rows | dict(valid_ptr=valid),
            )  # fmt: skip
            if not launch.whole:
                run(
                    pool_layer_sums,
                    (triton.cdiv(hops, launch.block_u), triton.cdiv(hidden, launch.block_s), launch.sum_blocks),
                    **shared | dict(
                        x_ptr=phi, valid_ptr=None if valid is None else valid[first:end], d_hidden_ptr=d_scores,
                        d_weight_ptr=d_query, d_bias_ptr=None, first_row=0, end_row=end - first, length=kept,
                        x_stride_b=0, x_stride_t=hidden // phi_vec, UNITS=hops, E=hidden, VEC=phi_vec,
                    ),
                )  # fmt: skip
            for total, found in zip(sums, (d_query, d_weight, d_bias)):
                total += found.sum(0, dtype=torch.float64)
    d_query, d_weights, d_biases = pooling.scale * sums[0], sums[1].split(hidden), sums[2].split(hidden)
    found = d_query, *(t for layer in zip(d_weights, d_biases) for t in layer), None, None
    # copied: an operator's results share no memory
    return [None if like is None else t.to(like.dtype, copy=True) for t, like in zip(found, pooling.scorer.tensors)]


def run(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Launch a kernel on those of the arguments that it takes, or that are options of the launch."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
               if name in arguments}  # fmt: skip
    kernel[grid](**{name: arguments[name] for name in kernel.arg_names if name in arguments}, **options)


def _shared(pooling: Pooling, x: Tensor, launch) -> dict:
    """What all sweeps take: x, and what says which of its rows are whose."""
    packed, hops = pooling.cu_seqlens is not None, pooling.query.shape[0]
    valid = None if pooling.valid is None else pooling.valid.contiguous().view(torch.uint8)
    return dict(
        x_ptr=x, valid_ptr=valid, keep_ptr=None if pooling.keep is None else pooling.keep.view(torch.uint8),
        cu_seqlens_ptr=pooling.cu_seqlens, lengths_ptr=pooling.lengths,
        length=x.shape[-2], num_chunks=launch.num_chunks, hops=hops,
        x_stride_b=_bag_stride(pooling, x) // launch.vec, x_stride_t=x.stride(-2) // launch.vec,
        score_stride_b=0 if packed else hops * x.shape[-2], score_stride_h=x.shape[-2],
        valid_stride_b=0 if packed else x.shape[-2],
        KEEP_SCALE=1 / (1 - pooling.dropout_p), E=x.shape[-1], VEC=launch.vec, ACC=_of_triton(pooling.arithmetic),
        BLOCK_E=launch.block_e, **launch.options(),
    )  # fmt: skip


def _forward_launch(pooling: Pooling, x: Tensor) -> tuple[JITFunction, PoolLaunch | WidePoolLaunch, dict]:
    """(the kernel that sums up, its launch, its blocks)."""
    if pooling.key_weight is None:
        launch = _launch(pooling, x)
        if launch.whole:
            return pool_sums, launch, dict(BLOCK_H=launch.block_h, BLOCK_T=launch.block_t)
    else:
        both = hidden_pool_launch(*_sizes(pooling, x), x.stride()[:-1], *_bytes(pooling))
        if both is not None:
            rows = both.rows
            return pool_hidden_sums, rows, _blocks(both.hidden) | dict(BLOCK_H=rows.block_h, BLOCK_R=rows.block_t)
    launch = wide_pool_launch(*_sizes(pooling, x), x.stride()[:-1], *_bytes(pooling))
    blocks = dict(BLOCK_C=None) if launch.hidden is None else _blocks(launch.hidden)
    blocks |= dict(BLOCK_H=launch.block_h, BLOCK_S=launch.block_s, BLOCK_T=launch.block_t, BLOCK_K=launch.block_k)
    return pool_wide_sums, launch, blocks


def _dot_gradient_launch(pooling: Pooling, x: Tensor, dx: Tensor) -> tuple[JITFunction, PoolLaunch | WidePoolLaunch]:
    """(the kernel that writes dx of products with the query, its launch)."""
    launch = _launch(pooling, x, dx)
    if launch.whole:
        return pool_gradient, launch
    strides = *x.stride()[:-1], *dx.stride()[:-1]
    return pool_wide_gradient, wide_pool_launch(*_sizes(pooling, x), strides, *_bytes(pooling), gradient=True)


def _launch(pooling: Pooling, x: Tensor, dx: Tensor | None = None) -> PoolLaunch:
    bags, longest, hops, _, embed_dim = _sizes(pooling, x)
    strides = (*x.stride()[:-1], *(() if dx is None else dx.stride()[:-1]))
    return pool_launch(bags, longest, hops, embed_dim, strides, x.dtype.itemsize, dx is not None)


def _hidden_gradient_launch(pooling: Pooling, x: Tensor, dx: Tensor) -> HiddenGradientLaunch:
    bags, longest, hops, hidden, embed_dim = _sizes(pooling, x)
    return hidden_gradient_launch(
        bags, longest, x.numel() // embed_dim, hops, hidden, 1 if pooling.gate_weight is None else 2, embed_dim,
        (*x.stride()[:-1], *dx.stride()[:-1]), *_bytes(pooling),
    )  # fmt: skip


def _sizes(pooling: Pooling, x: Tensor) -> tuple[int, int, int, int | None, int]:
    """Bags, rows of the longest, hops, hidden units, columns."""
    longest = x.shape[-2]
    if pooling.cu_seqlens is not None:
        longest = packing(pooling.cu_seqlens).longest if pooling.max_seqlen is None else pooling.max_seqlen
    hops, hidden = pooling.query.shape
    return pooling.num_bags, longest, hops, None if pooling.key_weight is None else hidden, x.shape[-1]


def _bytes(pooling: Pooling) -> tuple[int, int]:
    """Of a number of x, and of one that a hidden layer is multiplied in."""
    return pooling.x.dtype.itemsize, type_of_products(pooling).itemsize


def _blocks(tile: HiddenLaunch) -> dict:
    return dict(BLOCK_T=tile.block_t, BLOCK_C=tile.block_c, BLOCK_K=tile.block_k)


def _strides(pooling: Pooling, dx: Tensor, vec: int) -> dict:
    return dict(dx_stride_b=_bag_stride(pooling, dx) // vec, dx_stride_t=dx.stride(-2) // vec)


def _rows_of(x: Tensor) -> Tensor:
    """x, copied where its rows are not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _bag_stride(pooling: Pooling, t: Tensor) -> int:
    return t.stride(0) if pooling.cu_seqlens is None else 0


def _of_triton(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
