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
from .attention_pool_rows import add_rows, bag_chunk, is_valid, load_rows, no_rows, store_softmax, store_sums
from .density_math import FAR, LN_2, LOG2_E
from .host import device_of

if TYPE_CHECKING:
    from ..ops.attention_pool import Pooling

_SIZES = ["length", "num_chunks", "hops", "vector_stride_b", "score_stride_b", "score_stride_h", "valid_stride_b"]
_MERGED_CHUNKS, _MERGED_COLUMNS = 16, 128


@triton.jit(do_not_specialize=_SIZES)
def pool_products(
    x_ptr, vectors_ptr, products_ptr, valid_ptr, cu_seqlens_ptr, lengths_ptr,
    length, num_chunks, hops, vector_stride_b, x_stride_b, x_stride_t, score_stride_b, score_stride_h, valid_stride_b,
    E: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Reads x, writes the products of its rows with a vector for each hop, of all bags or of each bag its own."""
    bag, first, begin, end = bag_chunk(cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, BLOCK_T)
    vectors_ptr += bag * vector_stride_b
    score_base = bag * score_stride_b + h.to(tl.int64) * score_stride_h
    for start in range(begin, end, BLOCK_T):
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, start + t < end, valid_stride_b)
        products = tl.zeros([BLOCK_H, BLOCK_T], ACC)
        for first_e in range(0, E, BLOCK_E):
            e = first_e + tl.arange(0, BLOCK_E)
            x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
            of_hops = (h < hops)[:, None] & (e < E)[None, :]
            vectors = tl.load(vectors_ptr + h[:, None] * E + e[None, :], mask=of_hops, other=0.0)
            products += tl.sum(vectors[:, None, :] * x[None, :, :], axis=2)
        tl.store(
            products_ptr + score_base[:, None] + row[None, :], products, mask=(h < hops)[:, None] & inside[None, :]
        )


@triton.jit(do_not_specialize=_SIZES)
def pool_sums(
    x_ptr, query_ptr, scores_ptr, valid_ptr, keep_ptr, cu_seqlens_ptr, lengths_ptr, sums_ptr, tops_ptr, totals_ptr,
    length, num_chunks, hops, x_stride_b, x_stride_t, score_stride_b, score_stride_h, valid_stride_b,
    DOT: tl.constexpr, LINEAR: tl.constexpr, KEEP_SCALE: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Reads x, and with DOT has its scores and writes them if asked to, else reads them; writes each chunk's sums.

    The sums are of the rows times exp(score - largest score), or with LINEAR times what is read itself. Every row of
    the tile has a running sum of its own, and they are joined at the end.
    """
    bag, first, begin, end = bag_chunk(cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_T)
    of_hops = (h < hops)[:, None] & (e < E)[None, :]
    score_base = bag * score_stride_b + h.to(tl.int64) * score_stride_h
    if DOT:
        query = tl.load(query_ptr + h[:, None] * E + e[None, :], mask=of_hops, other=0.0)
    top, total, sums = no_rows(BLOCK_H, BLOCK_T, BLOCK_E, ACC)
    for start in tl.range(begin, end, BLOCK_T, num_stages=2):
        there = start + t < end
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, there, valid_stride_b)
        x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
        score_at = score_base[:, None] + row[None, :]
        counts = (h < hops)[:, None] & inside[None, :]
        if DOT:
            score = tl.sum(query[:, None, :] * x[None, :, :], axis=2)
            if scores_ptr is not None:
                tl.store(scores_ptr + score_at, score * LN_2, mask=counts)
        else:
            score = tl.load(scores_ptr + score_at, mask=counts, other=0.0)
        if LINEAR:
            sums += score[:, :, None] * x[None, :, :]
        else:
            if not DOT:
                score = score * LOG2_E
            top, total, sums = add_rows(top, total, sums, score, x, counts, keep_ptr, score_at, KEEP_SCALE)
    if LINEAR:
        store_sums(sums_ptr, sums, h, hops, e, E)
    else:
        store_softmax(sums_ptr, tops_ptr, totals_ptr, top, total, sums, h, hops, e, tl.program_id(2) == 0, E)


@triton.jit(do_not_specialize=["num_chunks", "hops"])
def pool_merge(
    sums_ptr, tops_ptr, totals_ptr, context_ptr, lse_ptr, num_chunks, hops,
    E: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Reads every chunk's sums, writes the context and the log of the sum of the scores' exponentials of each bag."""
    number = tl.program_id(0).to(tl.int64)
    bag = number // hops
    h = number % hops
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.arange(0, BLOCK_C)
    tops = tl.full([BLOCK_C], -FAR, ACC)
    for start in range(0, num_chunks, BLOCK_C):
        at = (bag * num_chunks + start + c) * hops + h
        tops = tl.maximum(tops, tl.load(tops_ptr + at, mask=start + c < num_chunks, other=-FAR))
    top = tl.max(tops, axis=0)
    totals = tl.zeros([BLOCK_C], ACC)
    sums = tl.zeros([BLOCK_C, BLOCK_E], ACC)
    for start in range(0, num_chunks, BLOCK_C):
        there = start + c < num_chunks
        at = (bag * num_chunks + start + c) * hops + h
        fade = tl.exp2(tl.load(tops_ptr + at, mask=there, other=-FAR) - top)
        totals += fade * tl.load(totals_ptr + at, mask=there, other=0.0)
        columns = there[:, None] & (e < E)[None, :]
        sums += fade[:, None] * tl.load(sums_ptr + at[:, None] * E + e[None, :], mask=columns, other=0.0)
    total = tl.sum(totals, axis=0)
    found = total != 0.0
    context = tl.sum(sums, axis=0) / tl.where(found, total, 1.0)
    tl.store(context_ptr + number * E + e, context, mask=e < E)
    if tl.program_id(1) == 0:
        lse = tl.where(found, (top + tl.log2(tl.where(found, total, 1.0))) * LN_2, float("-inf"))
        tl.store(lse_ptr + number, lse)


@triton.jit(do_not_specialize=_SIZES)
def pool_gradient(
    x_ptr, query_ptr, scores_ptr, d_shares_ptr, valid_ptr, keep_ptr, cu_seqlens_ptr, lengths_ptr, grad_ptr,
    grad_weights_ptr, lse_ptr, inner_ptr, dx_ptr, d_scores_ptr,
    length, num_chunks, hops, x_stride_b, x_stride_t, dx_stride_b, dx_stride_t, score_stride_b, score_stride_h,
    valid_stride_b,
    DOT: tl.constexpr, WHOLE: tl.constexpr, KEEP_SCALE: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Reads x, writes dx and the gradient of the scores, hop by hop for every tile. Without DOT it reads the scores.

    Not WHOLE, it has a block of columns, and reads the scores and the products with the gradient instead of x.
    """
    bag, first, begin, end = bag_chunk(cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_T)
    for start in tl.range(begin, end, BLOCK_T, num_stages=1):
        there = start + t < end
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, there, valid_stride_b)
        if WHOLE:
            x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
        dx = tl.zeros([BLOCK_T, BLOCK_E], ACC)
        score_at = bag * score_stride_b + row
        for h in range(0, hops):
            of_hop = bag * hops + h
            grad = tl.load(grad_ptr + of_hop * E + e, mask=e < E, other=0.0)
            if DOT:
                query = tl.load(query_ptr + h * E + e, mask=e < E, other=0.0)
            if DOT and WHOLE:
                score = tl.sum(query[None, :] * x, axis=1)
            else:
                score = tl.load(scores_ptr + score_at, mask=inside, other=0.0) * LOG2_E
            share = tl.where(inside, tl.exp2(score - tl.load(lse_ptr + of_hop) * LOG2_E), 0.0)
            if WHOLE:
                d_share = tl.sum(grad[None, :] * x, axis=1)
            else:
                d_share = tl.load(d_shares_ptr + score_at, mask=inside, other=0.0)
            if grad_weights_ptr is not None:
                d_share += tl.load(grad_weights_ptr + score_at, mask=inside, other=0.0)
            given = share
            if keep_ptr is not None:
                kept = tl.load(keep_ptr + score_at, mask=inside, other=0) != 0
                d_share = tl.where(kept, d_share * KEEP_SCALE, 0.0)
                given = tl.where(kept, share * KEEP_SCALE, 0.0)
            d_score = tl.where(inside, share * (d_share - tl.load(inner_ptr + of_hop)), 0.0)
            if WHOLE or tl.program_id(1) == 0:
                tl.store(d_scores_ptr + score_at, d_score, mask=there)
            dx += given[:, None] * grad[None, :]
            if DOT:  # the query comes times log2 e
                dx += d_score[:, None] * (query * LN_2)[None, :]
            score_at += score_stride_h
        at = bag * dx_stride_b * VEC + row[:, None] * dx_stride_t * VEC + e[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=there[:, None] & (e < E)[None, :])


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
