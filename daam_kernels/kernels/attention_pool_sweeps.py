"""The sweeps of attention pooling where scores are products with the query, and a row fits a program.

``attention_pool`` says which of them are launched when.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_pool_rows import (
    add_rows,
    bag_chunk,
    is_valid,
    load_rows,
    no_rows,
    shares_and_gradient,
    store_softmax,
    store_sums,
)
from .density_math import FAR, LN_2, LOG2_E

_SIZES = ["length", "num_chunks", "hops", "score_stride_b", "score_stride_h", "valid_stride_b"]


@triton.jit(do_not_specialize=_SIZES)
def pool_sums(
    x_ptr, query_ptr, scores_ptr, valid_ptr, keep_ptr, cu_seqlens_ptr, lengths_ptr, sums_ptr, tops_ptr, totals_ptr,
    length, num_chunks, hops, x_stride_b, x_stride_t, score_stride_b, score_stride_h, valid_stride_b,
    KEEP_SCALE: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Reads x, writes each chunk's sums of its rows times exp(score - largest score), and the scores if asked to.

    Every row of the tile has a running sum of its own, and they are joined at the end. The query comes times log2 e.
    """
    bag, first, begin, end = bag_chunk(tl.program_id(0), cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_T)
    of_hops = (h < hops)[:, None] & (e < E)[None, :]
    score_base = bag * score_stride_b + h.to(tl.int64) * score_stride_h
    query = tl.load(query_ptr + h[:, None] * E + e[None, :], mask=of_hops, other=0.0)
    top, total, sums = no_rows(BLOCK_H, BLOCK_T, BLOCK_E, ACC)
    for start in tl.range(begin, end, BLOCK_T, num_stages=2):
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, start + t < end, valid_stride_b)
        x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
        score_at = score_base[:, None] + row[None, :]
        counts = (h < hops)[:, None] & inside[None, :]
        score = tl.sum(query[:, None, :] * x[None, :, :], axis=2)
        if scores_ptr is not None:
            tl.store(scores_ptr + score_at, score * LN_2, mask=counts)
        top, total, sums = add_rows(top, total, sums, score, x, counts, keep_ptr, score_at, KEEP_SCALE)
    store_softmax(sums_ptr, tops_ptr, totals_ptr, top, total, sums, h, hops, e, E)


@triton.jit(do_not_specialize=[*_SIZES, "hop_blocks"])
def pool_query_sums(
    x_ptr, d_scores_ptr, valid_ptr, cu_seqlens_ptr, lengths_ptr, sums_ptr,
    length, num_chunks, hops, hop_blocks, x_stride_b, x_stride_t, score_stride_b, score_stride_h, valid_stride_b,
    E: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Reads x and the gradient of its scores, writes each chunk's sums of their products: the query's gradient.

    A program has a block of hops and one of columns. The blocks of hops of a chunk run together: x comes out of the
    cache for all but one of them.
    """
    number = tl.program_id(0) // hop_blocks
    bag, first, begin, end = bag_chunk(number, cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    h = tl.program_id(0) % hop_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_T)
    d_scores_ptr += bag * score_stride_b + h.to(tl.int64)[:, None] * score_stride_h
    sums = tl.zeros([BLOCK_H, BLOCK_T, BLOCK_E], ACC)
    for start in tl.range(begin, end, BLOCK_T, num_stages=2):
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, start + t < end, valid_stride_b)
        x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
        counts = (h < hops)[:, None] & inside[None, :]
        sums += tl.load(d_scores_ptr + row[None, :], mask=counts, other=0.0)[:, :, None] * x[None, :, :]
    store_sums(sums_ptr, number, sums, h, hops, e, E)


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
        of_chunks = tl.load(totals_ptr + at, mask=there, other=0.0)
        totals += fade * of_chunks
        columns = (of_chunks != 0.0)[:, None] & (e < E)[None, :]  # a chunk without rows may have written no sums
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
    x_ptr, query_ptr, valid_ptr, keep_ptr, cu_seqlens_ptr, lengths_ptr, grad_ptr, grad_weights_ptr, lse_ptr, inner_ptr,
    dx_ptr, d_scores_ptr,
    length, num_chunks, hops, x_stride_b, x_stride_t, dx_stride_b, dx_stride_t, score_stride_b, score_stride_h,
    valid_stride_b,
    KEEP_SCALE: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Reads x, writes dx and the gradient of the scores, hop by hop for every tile."""
    bag, first, begin, end = bag_chunk(tl.program_id(0), cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_T)
    for start in tl.range(begin, end, BLOCK_T, num_stages=1):
        there = start + t < end
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, there, valid_stride_b)
        x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
        dx = tl.zeros([BLOCK_T, BLOCK_E], ACC)
        score_at = bag * score_stride_b + row
        for h in range(0, hops):
            of_hop = bag * hops + h
            grad = tl.load(grad_ptr + of_hop * E + e, mask=e < E, other=0.0)
            query = tl.load(query_ptr + h * E + e, mask=e < E, other=0.0)
            given, d_score = shares_and_gradient(
                tl.sum(query[None, :] * x, axis=1), tl.sum(grad[None, :] * x, axis=1), inside, score_at, keep_ptr,
                grad_weights_ptr, tl.load(lse_ptr + of_hop) * LOG2_E, tl.load(inner_ptr + of_hop), KEEP_SCALE,
            )  # fmt: skip
            tl.store(d_scores_ptr + score_at, d_score, mask=there)
            dx += given[:, None] * grad[None, :]
            dx += d_score[:, None] * (query * LN_2)[None, :]  # the query comes times log2 e
            score_at += score_stride_h
        at = bag * dx_stride_b * VEC + row[:, None] * dx_stride_t * VEC + e[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=there[:, None] & (e < E)[None, :])
