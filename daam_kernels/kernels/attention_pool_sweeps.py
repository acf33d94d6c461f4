"""The sweeps of attention pooling where scores are products with the query, or are there already.

``attention_pool`` says which of them are launched when.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_pool_rows import add_rows, bag_chunk, is_valid, load_rows, no_rows, store_softmax, store_sums
from .density_math import FAR, LN_2, LOG2_E

_SIZES = ["length", "num_chunks", "hops", "vector_stride_b", "score_stride_b", "score_stride_h", "valid_stride_b"]


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
