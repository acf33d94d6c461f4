"""Attention pooling over ragged bags.

Forward, ``pool_sums`` reads x once: it has the scores, the softmax as it goes, relative to the largest score of its
rows so far, and the weighted sum; ``pool_merge`` joins the chunks of a bag in a fixed order. Backward,
``pool_gradient`` reads x and writes dx and the scores' gradient, and ``pool_sums`` reads x again and sums it up,
weighed with that, for the query's gradient. More than eight hops, or fewer where rows are long, are taken in blocks,
each of which reads x, mostly from the cache. Rows too long for a program take ``pool_products`` first, which has their
scores and their products with the gradient: x is read twice each way then.

Additive and gated pooling of every type reads x once forward and twice backward too. ``pool_hidden_sums`` has the
hidden layer of a tile, its scores, and its sums. ``pool_hidden_gradient`` has the layer again, and writes its
gradient, of a segment of rows at a time; ``pool_hidden_dx`` makes dx of it, and ``pool_layer_sums`` reads x again for
the layers' gradients. That is, forward, where a row's hops, eight at most, fit a program, and it has no more than 256
hidden units; and backward where its units fit, 128 of them, or 32 of float64, but not on AMD's GPUs where rows are read
number by number (the rules are in ``attention_pool_launch``). Else the scores come first: of half types and up to 128
units from ``attention_pool_scores``, else from torch's matrix products, block by block. Both read x once more, and
backward the layers' gradients are torch's products then, which read x and dx again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import attention_pool_blocks as in_blocks
from ..sequences import packing
from . import attention_pool_scores
from .additive_host import dot_precision
from .attention_pool_hidden import pool_hidden_sums
from .attention_pool_hidden_gradient import pool_hidden_dx, pool_hidden_gradient, pool_layer_sums
from .attention_pool_launch import (
    HiddenGradientLaunch,
    HiddenPoolLaunch,
    PoolLaunch,
    hidden_gradient_launch,
    hidden_pool_launch,
    pool_launch,
)
from .attention_pool_sweeps import pool_gradient, pool_merge, pool_products, pool_sums
from .density_math import LOG2_E
from .host import device_of

if TYPE_CHECKING:
    from ..ops.attention_pool import Pooling

_MERGED_CHUNKS, _MERGED_COLUMNS = 16, 128


def pool_forward(pooling: Pooling, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """(context, lse) as of ``attention_pool_blocks.forward``; fills scores, where they are given full of -inf."""
    x, arithmetic, hops = _rows_of(pooling.x), pooling.arithmetic, pooling.query.shape[0]
    hidden = _hidden_launch(pooling, x, hops)
    launch = _launch(pooling, x, hops) if hidden is None else hidden.rows
    if hidden is None:
        scores = _known_scores(pooling, x, launch, scores)
    shape = pooling.num_bags, launch.num_chunks, hops
    sums = x.new_empty((*shape, x.shape[-1]), dtype=arithmetic)
    tops, totals = (x.new_empty(shape, dtype=arithmetic) for _ in range(2))
    context = x.new_empty((pooling.num_bags, hops, x.shape[-1]), dtype=arithmetic)
    lse = x.new_empty((pooling.num_bags, hops), dtype=arithmetic)
    with device_of(x):
        if hidden is None:
            _sum_up(pooling, x, launch, scores, sums, tops, totals, linear=False)
        else:
            run(
                pool_hidden_sums, (pooling.num_bags * launch.num_chunks,),
                **_shared(pooling, x, launch) | _of_hidden(pooling, hidden), scores_ptr=scores, sums_ptr=sums,
                tops_ptr=tops, totals_ptr=totals,
            )  # fmt: skip
        columns = min(_MERGED_COLUMNS, launch.block_e)
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
    x, arithmetic, hops = _rows_of(pooling.x), pooling.arithmetic, pooling.query.shape[0]
    whole = pooling.lengths is None  # else rows beyond them are not visited
    dx = torch.empty_like(pooling.x) if whole else torch.zeros_like(pooling.x)
    into = dx if dx.stride(-1) == 1 or x.shape[-1] == 1 else torch.zeros_like(x)
    hidden = _hidden_gradient_launch(pooling, x, into)
    if hidden is not None:
        gradients = _hidden_backward(pooling, x, hidden, grad, grad_weights, lse, inner, into)
        return _copied(dx, into), gradients
    dot, sums_launch = pooling.key_weight is None, _launch(pooling, x, hops)
    scores = _known_scores(pooling, x, sums_launch, None)
    d_shares = None
    if not sums_launch.whole:
        d_shares = x.new_empty(pooling.shape_of_scores, dtype=arithmetic)
        _write_products(pooling, x, sums_launch, grad, d_shares)
    d_scores = (torch.empty if whole else torch.zeros)(pooling.shape_of_scores, dtype=arithmetic, device=x.device)
    launch = _launch(pooling, x, hops, into)
    with device_of(x):
        run(
            pool_gradient, (pooling.num_bags * launch.num_chunks, launch.column_blocks),
            **_shared(pooling, x, launch), WHOLE=launch.whole,
            query_ptr=_scaled_query(pooling) if dot else None, scores_ptr=scores, d_shares_ptr=d_shares, grad_ptr=grad,
            grad_weights_ptr=grad_weights, lse_ptr=lse, inner_ptr=inner, dx_ptr=into, d_scores_ptr=d_scores,
            dx_stride_b=_bag_stride(pooling, into) // launch.vec, dx_stride_t=into.stride(-2) // launch.vec,
            BLOCK_T=launch.block_t,
        )  # fmt: skip
        if dot:
            sums = x.new_empty((pooling.num_bags, sums_launch.num_chunks, hops, x.shape[-1]), dtype=arithmetic)
            _sum_up(pooling, x, sums_launch, d_scores, sums, None, None, linear=True)
    if dot:
        d_query = pooling.scale * sums.sum((0, 1), dtype=torch.float64)
        return _copied(dx, into), [d_query.to(pooling.query.dtype), None, None, None, None]
    scorer, gradients = pooling.scorer.to(arithmetic), in_blocks.ScorerGradients(pooling.scorer)
    for block in _all_rows(pooling):
        values = block.values_of(pooling.x, arithmetic)
        hidden = in_blocks.scored(values, scorer)[1]
        rows = block.rows_of(into)
        rows.add_(gradients.add(block.hops_of(d_scores), values, hidden, scorer).to(rows.dtype))
    return _copied(dx, into), gradients.result()


def _hidden_backward(
    pooling: Pooling, x: Tensor, launch: HiddenGradientLaunch, grad, grad_weights, lse, inner, into: Tensor
) -> list[Tensor | None]:
    """Writes dx ``into`` and returns the gradients of the scorer's tensors, a segment of rows after the other."""
    (hops, hidden), embed_dim = pooling.query.shape, x.shape[-1]
    units, programs = hidden * launch.layers, pooling.num_bags * launch.num_chunks
    new = functools.partial(x.new_empty, dtype=pooling.arithmetic)
    d_query, d_weight = new((programs, hops, hidden)), new((launch.sum_blocks, units, embed_dim))
    d_bias = new((launch.sum_blocks, units))
    tile, shared = launch.hidden, _shared(pooling, x, launch) | attention_pool_scores.layers_of(pooling)
    shared |= dict(
        query_ptr=_scaled_query(pooling), grad_ptr=grad, grad_weights_ptr=grad_weights, lse_ptr=lse, inner_ptr=inner,
        given_ptr=new(pooling.shape_of_scores), d_hidden_ptr=new((launch.segment_rows, units)), dx_ptr=into,
        d_query_ptr=d_query, d_weight_ptr=d_weight, d_bias_ptr=d_bias, rows_each=launch.rows_each,
        dx_stride_b=_bag_stride(pooling, into) // launch.vec, dx_stride_t=into.stride(-2) // launch.vec,
        PRECISION=attention_pool_scores.precision_of(x.dtype), PRECISION_BACK=dot_precision(pooling.arithmetic),
        UNITS=units, BLOCK_H=launch.block_h, BLOCK_T=tile.block_t, BLOCK_C=tile.block_c, BLOCK_K=tile.block_k,
        BLOCK_U=launch.block_u, BLOCK_S=launch.block_s, BLOCK_R=launch.block_r,
    )  # fmt: skip
    valid = pooling.valid_rows()  # the sums are of rows wherever they lie, which does not say what is within lengths
    of_rows = shared | dict(valid_ptr=None if valid is None else valid.contiguous().view(torch.uint8))
    sums = [t.new_zeros(t.shape[1:], dtype=torch.float64) for t in (d_query, d_weight, d_bias)]
    num_rows = x.numel() // embed_dim
    with device_of(x):
        for first in range(0, num_rows, launch.segment_rows):
            rows = dict(first_row=first, end_row=min(first + launch.segment_rows, num_rows))
            run(pool_hidden_gradient, (programs,), **shared, **rows)
            run(pool_hidden_dx, (programs,), **shared, **rows)
            run(pool_layer_sums, (launch.unit_blocks, launch.column_blocks, launch.sum_blocks), **of_rows, **rows)
            for total, found in zip(sums, (d_query, d_weight, d_bias)):
                total += found.sum(0, dtype=torch.float64)
    d_query, d_weights, d_biases = pooling.scale * sums[0], sums[1].split(hidden), sums[2].split(hidden)
    found = d_query, *(t for layer in zip(d_weights, d_biases) for t in layer), None, None
    # copied: an operator's results share no memory
    return [None if like is None else t.to(like.dtype, copy=True) for t, like in zip(found, pooling.scorer.tensors)]


def _known_scores(pooling: Pooling, x: Tensor, launch: PoolLaunch, scores: Tensor | None) -> Tensor | None:
    """``scores``, or new ones, with what the kernels cannot work out themselves; they write others where asked to."""
    dot = pooling.key_weight is None
    if dot and launch.whole:
        return scores
    if scores is None:
        scores = x.new_empty(pooling.shape_of_scores, dtype=pooling.arithmetic)
    if dot:
        _write_products(pooling, x, launch, pooling.scale * pooling.query.to(pooling.arithmetic), scores)
    elif attention_pool_scores.serves(pooling):
        attention_pool_scores.write_hidden_scores(pooling, x, scores)
    else:
        _write_scores(pooling, scores)
    return scores


def _write_products(pooling: Pooling, x: Tensor, launch: PoolLaunch, vectors: Tensor, products: Tensor) -> None:
    """Of the rows with vectors [hops, embed_dim], or of each bag with its own of [bags, hops, embed_dim]."""
    vectors = vectors.contiguous()
    with device_of(x):
        run(
            pool_products, (pooling.num_bags * launch.num_chunks, launch.hop_blocks), **_shared(pooling, x, launch),
            vectors_ptr=vectors, products_ptr=products, vector_stride_b=0 if vectors.dim() == 2 else vectors.stride(0),
            BLOCK_H=launch.block_h, BLOCK_T=launch.block_t,
        )  # fmt: skip


def _sum_up(pooling, x, launch: PoolLaunch, scores, sums, tops, totals, linear: bool) -> None:
    dot = pooling.key_weight is None and launch.whole and not linear
    shared = _shared(pooling, x, launch) | dict(DOT=dot)
    if linear:
        shared["keep_ptr"] = None
    run(
        pool_sums, (pooling.num_bags * launch.num_chunks, launch.hop_blocks, launch.column_blocks), **shared,
        query_ptr=_scaled_query(pooling) if dot else None, scores_ptr=scores, sums_ptr=sums, tops_ptr=tops,
        totals_ptr=totals, LINEAR=linear, BLOCK_H=launch.block_h, BLOCK_T=launch.block_t,
    )  # fmt: skip


def run(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Launch a kernel on those of the arguments that it takes, or that are options of the launch."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
               if name in arguments}  # fmt: skip
    kernel[grid](**{name: arguments[name] for name in kernel.arg_names if name in arguments}, **options)


def _shared(pooling: Pooling, x: Tensor, launch: PoolLaunch) -> dict:
    """What both sweeps take: x and what says which of its rows are whose."""
    packed, hops = pooling.cu_seqlens is not None, pooling.query.shape[0]
    valid = None if pooling.valid is None else pooling.valid.contiguous().view(torch.uint8)
    return dict(
        x_ptr=x, valid_ptr=valid, keep_ptr=None if pooling.keep is None else pooling.keep.view(torch.uint8),
        cu_seqlens_ptr=pooling.cu_seqlens, lengths_ptr=pooling.lengths,
        length=x.shape[-2], num_chunks=launch.num_chunks, hops=hops,
        x_stride_b=_bag_stride(pooling, x) // launch.vec, x_stride_t=x.stride(-2) // launch.vec,
        score_stride_b=0 if packed else hops * x.shape[-2], score_stride_h=x.shape[-2],
        valid_stride_b=0 if packed else x.shape[-2],
        DOT=pooling.key_weight is None, KEEP_SCALE=1 / (1 - pooling.dropout_p), E=x.shape[-1], VEC=launch.vec,
        ACC=_of_triton(pooling.arithmetic), BLOCK_E=launch.block_e, **launch.options(),
    )  # fmt: skip


def _launch(pooling: Pooling, x: Tensor, hops: int, dx: Tensor | None = None) -> PoolLaunch:
    strides = (*x.stride()[:-1], *(() if dx is None else dx.stride()[:-1]))
    return pool_launch(
        pooling.num_bags, _longest(pooling, x), hops, x.shape[-1], strides, x.dtype.itemsize, dx is not None
    )


def _longest(pooling: Pooling, x: Tensor) -> int:
    if pooling.cu_seqlens is None:
        return x.shape[-2]
    return packing(pooling.cu_seqlens).longest if pooling.max_seqlen is None else pooling.max_seqlen


def _hidden_launch(pooling: Pooling, x: Tensor, hops: int) -> HiddenPoolLaunch | None:
    if pooling.key_weight is None:
        return None
    multiplied = attention_pool_scores.type_of_products(pooling).itemsize
    return hidden_pool_launch(
        pooling.num_bags, _longest(pooling, x), hops, pooling.query.shape[1], x.shape[-1], x.stride()[:-1],
        x.dtype.itemsize, multiplied,
    )  # fmt: skip


def _hidden_gradient_launch(pooling: Pooling, x: Tensor, dx: Tensor) -> HiddenGradientLaunch | None:
    if pooling.key_weight is None:
        return None
    return hidden_gradient_launch(
        pooling.num_bags, _longest(pooling, x), x.numel() // x.shape[-1], *pooling.query.shape,
        1 if pooling.gate_weight is None else 2, x.shape[-1],
        (*x.stride()[:-1], *dx.stride()[:-1]), x.dtype.itemsize,
        attention_pool_scores.type_of_products(pooling).itemsize,
    )  # fmt: skip


def _of_hidden(pooling: Pooling, launch: HiddenPoolLaunch) -> dict:
    """What the sweeps with a hidden layer take beside ``_shared``."""
    tile = launch.hidden
    return attention_pool_scores.layers_of(pooling) | dict(
        query_ptr=_scaled_query(pooling), PRECISION=attention_pool_scores.precision_of(pooling.x.dtype),
        BLOCK_H=launch.rows.block_h, BLOCK_T=tile.block_t, BLOCK_C=tile.block_c, BLOCK_K=tile.block_k,
        BLOCK_R=launch.rows.block_t,
    )  # fmt: skip


def _write_scores(pooling: Pooling, scores: Tensor) -> None:
    """Those of all rows, by torch's matrix products; -inf, or of a row of zeros, where a row does not count."""
    scorer = pooling.scorer.to(pooling.arithmetic)
    for block in _all_rows(pooling):
        found = in_blocks.scored(block.values_of(pooling.x, pooling.arithmetic), scorer)[0]
        if block.member is not None:
            found = found.masked_fill(~block.member, -torch.inf)
        block.hops_of(scores).copy_(found)


def _all_rows(pooling: Pooling):
    """Blocks of rows as they lie, whatever bags they are of; nothing has to be read on the host for them."""
    valid = pooling.valid_rows()
    if pooling.cu_seqlens is None:
        return in_blocks.blocks(pooling.x, valid, None, None)
    return in_blocks.blocks(pooling.x, valid, None, (0, pooling.x.shape[0]))


def _rows_of(x: Tensor) -> Tensor:
    """x, copied where its rows are not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _copied(dx: Tensor, written: Tensor) -> Tensor:
    return dx if written is dx else dx.copy_(written)


def _bag_stride(pooling: Pooling, t: Tensor) -> int:
    return t.stride(0) if pooling.cu_seqlens is None else 0


def _scaled_query(pooling: Pooling) -> Tensor:
    """Times scale log2 e: exponentials are of base 2."""
    return (pooling.query.to(pooling.arithmetic) * (pooling.scale * LOG2_E.value)).contiguous()


def _of_triton(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
