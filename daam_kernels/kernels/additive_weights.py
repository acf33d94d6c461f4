"""The weights of additive attention, where they are asked for, and what their gradient needs of them.

``additive_weights`` works the scores out anew and writes exp(score - lse), or the mean of that over the heads.
``sum_weights`` works them out once more in the backward pass, so that nobody has to keep them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import AdditiveProblem
from .additive_host import HELD, SIZES, AdditiveSizes, prepare
from .additive_launch import backward_tile
from .additive_math import dropped, finite, masked, split_program, unmasked_scores
from .host import device_of, run
from .launch import Launch
from .remembered import remembered


@triton.jit(do_not_specialize=SIZES)
def additive_weights(
    query_ptr, key_ptr, weight_ptr, mask_ptr, key_mask_ptr, seed_ptr, lse_ptr, weights_ptr,
    heads, queries, keys, hidden, threshold, num_blocks,
    query_stride_b, query_stride_h, query_stride_t, key_stride_b, key_stride_h, key_stride_t,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, key_mask_stride_b, key_mask_stride_k,
    ADDED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, FAST: tl.constexpr,
    AVERAGE: tl.constexpr, ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the weights of a block of keys, which it owns, and one of queries, of one head or averaged over all."""
    block, written_slice, b, first_head = split_program(tl.program_id(0), num_blocks, 1 if AVERAGE else heads)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column_inside, row_inside = columns < keys, rows < queries
    inside = row_inside[:, None] & column_inside[None, :]
    if key_mask_ptr is not None:
        key_mask_ptr += b * key_mask_stride_b
    total = tl.zeros((BLOCK_Q, BLOCK_K), ACC)
    for h in range(first_head, first_head + (heads if AVERAGE else 1)):
        scores = unmasked_scores(
            key_ptr + b * key_stride_b + h * key_stride_h, query_ptr + b * query_stride_b + h * query_stride_h,
            weight_ptr + h * hidden, columns, rows, key_stride_t, query_stride_t, column_inside, row_inside, hidden,
            SCALE, FAST, ACC, BLOCK_C, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        mask_of_head_ptr = mask_ptr
        if mask_ptr is not None:
            mask_of_head_ptr = mask_ptr + b * mask_stride_b + h * mask_stride_h
        scores = masked(
            scores, rows[:, None], columns[None, :], inside, mask_of_head_ptr, key_mask_ptr, mask_stride_q,
            mask_stride_k, key_mask_stride_k, ADDED, CAUSAL, ACC,
        )  # fmt: skip
        slice_number = b * heads + h
        lse = tl.load(lse_ptr + slice_number * queries + rows, mask=row_inside, other=0.0)
        shares = tl.exp(scores - finite(lse)[:, None])
        total += dropped(shares, seed_ptr, slice_number, rows[:, None], columns[None, :], threshold, DROPOUT)
    if AVERAGE:
        total = total / heads.to(ACC)
    at = (written_slice * queries + rows)[:, None] * keys + columns[None, :]
    tl.store(weights_ptr + at, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sum_weights(
    query_ptr, key_ptr, weight_ptr, mask_ptr, key_mask_ptr, seed_ptr, grad_weights_ptr, lse_ptr, delta_ptr,
    heads, queries, keys, hidden, threshold, num_blocks,
    query_stride_b, query_stride_h, query_stride_t, key_stride_b, key_stride_h, key_stride_t,
    grad_weights_stride_b, grad_weights_stride_h, grad_weights_stride_t,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, key_mask_stride_b, key_mask_stride_k,
    ADDED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, FAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the sum over the keys of weights times their gradient for a block of queries."""
    block, slice_number, b, h = split_program(tl.program_id(0), num_blocks, heads)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_inside = rows < queries
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    grad_weights_ptr += b * grad_weights_stride_b + h * grad_weights_stride_h
    if mask_ptr is not None:
        mask_ptr += b * mask_stride_b + h * mask_stride_h
    if key_mask_ptr is not None:
        key_mask_ptr += b * key_mask_stride_b
    end = keys
    if CAUSAL:
        end = tl.minimum(end, (block + 1) * BLOCK_Q)
    lse = finite(tl.load(lse_ptr + slice_number * queries + rows, mask=row_inside, other=0.0))
    total = tl.zeros((BLOCK_Q,), ACC)
    for first in range(0, end, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        column_inside = columns < end
        inside = column_inside[:, None] & row_inside[None, :]
        scores = unmasked_scores(
            query_ptr, key_ptr, weight_ptr + h * hidden, rows, columns, query_stride_t, key_stride_t, row_inside,
            column_inside, hidden, SCALE, FAST, ACC, BLOCK_C, BLOCK_K, BLOCK_Q,
        )  # fmt: skip
        scores = masked(
            scores, rows[None, :], columns[:, None], inside, mask_ptr, key_mask_ptr, mask_stride_q, mask_stride_k,
            key_mask_stride_k, ADDED, CAUSAL, ACC,
        )  # fmt: skip
        shares = tl.exp(scores - lse[None, :])
        shares = dropped(shares, seed_ptr, slice_number, rows[None, :], columns[:, None], threshold, DROPOUT)
        place = rows.to(tl.int64)[None, :] * grad_weights_stride_t + columns[:, None]
        total += tl.sum(shares * tl.load(grad_weights_ptr + place, mask=inside, other=0.0).to(ACC), axis=0)
    tl.store(delta_ptr + slice_number * queries + rows, total, mask=row_inside)


def write_weights(sizes: AdditiveSizes, pointers: dict, lse: Tensor, weights: Tensor) -> None:
    """Into ``weights``, contiguous, as of ``new_results``; the others are of ``prepare`` for the problem."""
    run(additive_weights, _weights_launch(sizes), pointers | dict(lse_ptr=lse, weights_ptr=weights))


def additive_weights_delta(problem: AdditiveProblem, lse: Tensor, grad_weights: Tensor) -> Tensor:
    """Each query's sum of its weights times their gradients, [batch, heads, Tq]; of [batch, heads, Tq, Tk]."""
    delta = torch.empty_like(lse)
    if delta.numel() > 0:
        sizes, pointers = prepare(problem, grad_weights=grad_weights)
        with device_of(lse):
            run(sum_weights, _delta_launch(sizes), pointers | dict(lse_ptr=lse, delta_ptr=delta))
    return delta


@remembered(HELD)
def _weights_launch(sizes: AdditiveSizes) -> Launch:
    batch, heads, queries, keys = sizes.scores
    tile = backward_tile(queries, sizes.itemsize)
    blocks = -(-keys // tile.block_k)
    written = batch if sizes.average_weights else sizes.slices
    grid = written * blocks, -(-queries // tile.block_q)
    return sizes.launch(tile, grid, num_blocks=blocks, AVERAGE=sizes.average_weights)


@remembered(HELD)
def _delta_launch(sizes: AdditiveSizes) -> Launch:
    queries = sizes.scores[2]
    tile = backward_tile(queries, sizes.itemsize)
    blocks = -(-queries // tile.block_q)
    return sizes.launch(tile, (sizes.slices * blocks,), num_blocks=blocks)
