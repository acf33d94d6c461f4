"""The forward pass of additive attention.

``additive_output`` reads the queries once and keys and values once for every block of queries; it keeps the softmax's
running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867). Where queries are few, as in decoding, the keys are
split over programs, whose partial results ``merge_splits`` adds in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..options import AdditiveProblem
from .additive_host import HELD, SIZES, AdditiveSizes, prepare
from .additive_launch import forward_tile
from .additive_math import dropped, finite, masked, product, split_program, unmasked_scores
from .additive_weights import write_weights
from .host import device_of, run
from .launch import Launch
from .tiling import power_of_two
from .remembered import remembered


@triton.jit(do_not_specialize=SIZES)
def additive_output(
    query_ptr, key_ptr, value_ptr, weight_ptr, mask_ptr, key_mask_ptr, seed_ptr, output_ptr, lse_ptr,
    heads, queries, keys, hidden, value_dim, slices, threshold, num_blocks, keys_per_split,
    query_stride_b, query_stride_h, query_stride_t, key_stride_b, key_stride_h, key_stride_t,
    value_stride_b, value_stride_h, value_stride_t,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, key_mask_stride_b, key_mask_stride_k,
    ADDED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes the output and lse of one split, at [split, slice, query]."""
    block, slice_number, b, h = split_program(tl.program_id(0), num_blocks, heads)
    split = tl.program_id(1)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_inside = rows < queries
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    if mask_ptr is not None:
        mask_ptr += b * mask_stride_b + h * mask_stride_h
    if key_mask_ptr is not None:
        key_mask_ptr += b * key_mask_stride_b

    start = split * keys_per_split
    end = tl.minimum(keys, start + keys_per_split)
    if CAUSAL:
        end = tl.minimum(end, (block + 1) * BLOCK_Q)
    top = tl.full((BLOCK_Q,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_Q,), ACC)
    output = tl.zeros((BLOCK_Q, BLOCK_V), ACC)
    for first in range(start, end, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        inside = columns < end
        scores = unmasked_scores(
            query_ptr, key_ptr, weight_ptr + h * hidden, rows, columns, query_stride_t, key_stride_t, row_inside,
            inside, hidden, SCALE, FAST, ACC, BLOCK_C, BLOCK_K, BLOCK_Q,
        )  # fmt: skip
        scores = masked(
            scores, rows[None, :], columns[:, None], inside[:, None] & row_inside[None, :], mask_ptr, key_mask_ptr,
            mask_stride_q, mask_stride_k, key_mask_stride_k, ADDED, CAUSAL, ACC,
        )  # fmt: skip
        now = tl.maximum(top, tl.max(scores, axis=0))
        above = finite(now)
        rescaled = tl.exp(top - above)
        shares = tl.exp(scores - above[None, :])
        total = total * rescaled + tl.sum(shares, axis=0)
        shares = dropped(shares, seed_ptr, slice_number, rows[None, :], columns[:, None], threshold, DROPOUT)
        at = columns.to(tl.int64)[:, None] * value_stride_t + v[None, :]
        value = tl.load(value_ptr + at, mask=inside[:, None] & (v < value_dim)[None, :], other=0.0).to(ACC)
        output = output * rescaled[:, None] + product(tl.trans(shares), value, PRECISION)
        top = now

    place = (split * slices + slice_number) * queries + rows
    empty = total == 0.0
    output = tl.where(empty[:, None], 0.0, output / tl.where(empty, 1.0, total)[:, None])
    at = place.to(tl.int64)[:, None] * value_dim + v[None, :]
    tl.store(output_ptr + at, output, mask=row_inside[:, None] & (v < value_dim)[None, :])
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + place, tl.where(empty, float("-inf"), top + tl.log(total)), mask=row_inside)


@triton.jit(do_not_specialize=SIZES)
def merge_splits(
    partial_ptr, partial_lse_ptr, output_ptr, lse_ptr, rows, value_dim, num_splits,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Output and lse of one query from those of its splits [splits, rows]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    lse = tl.load(partial_lse_ptr + n * rows + row, mask=n < num_splits, other=float("-inf"))
    top = finite(tl.max(lse, axis=0))
    share = tl.exp(lse - top)
    total = tl.sum(share, axis=0)
    at = (n * rows + row)[:, None] * value_dim + v[None, :]
    partial = tl.load(partial_ptr + at, mask=(n < num_splits)[:, None] & (v < value_dim)[None, :], other=0.0)
    output = tl.sum(partial * share[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output_ptr + row * value_dim + v, output, mask=v < value_dim)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), top + tl.log(total)))


def additive_forward(problem: AdditiveProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, lse [batch, heads, Tq], weights or None) as of ``additive_attention_blocks``."""
    output, lse, weights = problem.new_results()
    if lse.numel() == 0:
        return output, lse, weights
    sizes, pointers = prepare(problem)
    launch, merge, num_splits = _launches(sizes)
    split, split_lse = output, lse
    if num_splits > 1:
        split, split_lse = (t.new_empty((num_splits, *t.shape)) for t in (output, lse))
    with device_of(lse):
        run(additive_output, launch, pointers | dict(output_ptr=split, lse_ptr=split_lse))
        if merge is not None:
            run(merge_splits, merge, dict(partial_ptr=split, partial_lse_ptr=split_lse, output_ptr=output, lse_ptr=lse))
        if weights is not None:
            write_weights(sizes, pointers, lse, weights)
    return output, lse, weights


@remembered(HELD)
def _launches(sizes: AdditiveSizes) -> tuple[Launch, Launch | None, int]:
    """(of a split's output, of merging them where there are several, how many)."""
    _, _, queries, keys = sizes.scores
    tile = forward_tile(sizes.slices, queries, keys, sizes.value_dim, sizes.itemsize)
    blocks, value_blocks = -(-queries // tile.block_q), -(-sizes.value_dim // tile.block_v)
    grid = sizes.slices * blocks, tile.num_splits, value_blocks
    output, merge = sizes.launch(tile, grid, num_blocks=blocks, keys_per_split=tile.keys_per_split), None
    if tile.num_splits > 1:
        rows = sizes.slices * queries
        values = dict(
            rows=rows, value_dim=sizes.value_dim, num_splits=tile.num_splits, ACC=sizes.triton_arithmetic,
            BLOCK_N=power_of_two(tile.num_splits), BLOCK_V=tile.block_v,
        )  # fmt: skip
        merge = Launch(values, output.options, grid=(rows, value_blocks))
    return output, merge, tile.num_splits
