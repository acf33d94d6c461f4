"""What the kernels of attention pooling share: whose rows are a program's, a running softmax and sums, its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import FAR


@triton.jit
def bag_chunk(number, cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T: tl.constexpr):
    """(bag, its first row among packed ones, first and end of the rows in it that are of chunk ``number``)."""
    bag = (number // num_chunks).to(tl.int64)
    chunk = number % num_chunks
    first = tl.zeros([], tl.int64)
    rows = length.to(tl.int64)
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + bag).to(tl.int64)
        rows = tl.load(cu_seqlens_ptr + bag + 1).to(tl.int64) - first
    if lengths_ptr is not None:
        rows = tl.minimum(tl.load(lengths_ptr + bag).to(tl.int64), rows)
    share = tl.cdiv(tl.cdiv(rows, num_chunks), BLOCK_T) * BLOCK_T
    begin = chunk * share
    return bag, first, begin, tl.minimum(begin + share, rows)


@triton.jit
def load_rows(
    x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr
):
    """[BLOCK_T, BLOCK_E] of x, 0 where a row is not inside."""
    at = bag * x_stride_b * VEC + row[:, None] * x_stride_t * VEC + e[None, :]
    return tl.load(x_ptr + at, mask=inside[:, None] & (e < E)[None, :], other=0.0).to(ACC)


@triton.jit
def is_valid(valid_ptr, bag, row, inside, valid_stride_b):
    """Which rows are inside and no padding."""
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + bag * valid_stride_b + row, mask=inside, other=0) != 0)
    return inside


@triton.jit
def no_rows(BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr):
    """(largest scores, sums of exponentials, weighted sums) before any row; every row of a tile has its own."""
    top = tl.full([BLOCK_H, BLOCK_T], -FAR, ACC)
    return top, tl.zeros([BLOCK_H, BLOCK_T], ACC), tl.zeros([BLOCK_H, BLOCK_T, BLOCK_E], ACC)


@triton.jit
def add_rows(top, total, sums, score, x, counts, keep_ptr, score_at, KEEP_SCALE: tl.constexpr):
    """The same after a tile's rows x, with scores times log2 e, [BLOCK_H, BLOCK_T], where they count."""
    before = top
    top = tl.where(counts, tl.maximum(top, score), top)
    fade = tl.exp2(before - top)
    share = tl.where(counts, tl.exp2(score - top), 0.0)
    total = total * fade + share
    if keep_ptr is not None:
        kept = tl.load(keep_ptr + score_at, mask=counts, other=0)
        share = tl.where(kept != 0, share * KEEP_SCALE, 0.0)
    return top, total, sums * fade[:, :, None] + share[:, :, None] * x[None, :, :]


@triton.jit
def store_sums(sums_ptr, number, sums, h, hops, e, E: tl.constexpr):
    """Of a chunk, joined over the rows of the tile."""
    at = (number.to(tl.int64) * hops + h)[:, None] * E + e[None, :]
    tl.store(sums_ptr + at, tl.sum(sums, axis=1), mask=(h < hops)[:, None] & (e < E)[None, :])


@triton.jit
def store_softmax(sums_ptr, tops_ptr, totals_ptr, top, total, sums, h, hops, e, E: tl.constexpr):
    """A chunk's running softmax, joined over the rows of the tile."""
    highest = tl.max(top, axis=1)
    fade = tl.exp2(top - highest[:, None])
    of_chunk = tl.program_id(0).to(tl.int64) * hops + h
    tl.store(tops_ptr + of_chunk, highest, mask=h < hops)
    tl.store(totals_ptr + of_chunk, tl.sum(total * fade, axis=1), mask=h < hops)
    store_sums(sums_ptr, tl.program_id(0), sums * fade[:, :, None], h, hops, e, E)


@triton.jit
def shares_and_gradient(
    score, d_share, counts, score_at, keep_ptr, grad_weights_ptr, lse, inner, KEEP_SCALE: tl.constexpr
):
    """(the weights that rows were given, the gradient of their scores) where they count, else 0.

    ``score`` and ``lse`` come times log2 e; ``d_share`` is the rows' product with the gradient of the context.
    """
    if grad_weights_ptr is not None:
        d_share += tl.load(grad_weights_ptr + score_at, mask=counts, other=0.0)
    share = tl.where(counts, tl.exp2(score - lse), 0.0)
    given = share
    if keep_ptr is not None:
        kept = tl.load(keep_ptr + score_at, mask=counts, other=0) != 0
        d_share = tl.where(kept, d_share * KEEP_SCALE, 0.0)
        given = tl.where(kept, share * KEEP_SCALE, 0.0)
    return given, tl.where(counts, share * (d_share - inner), 0.0)
