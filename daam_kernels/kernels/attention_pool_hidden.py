"""The forward sweep of additive and gated attention pooling: scores, softmax and sums of a tile of rows at once.

Reads x once from memory. A tile is read for the hidden layer first, again for the gate and for every further block of
hidden units, and at last for the sums: all but the first time it comes out of the cache, as the layer's weights do. The
hidden layer is never written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_math import operand
from .attention_pool_layers import hidden_gate, hidden_tanh
from .attention_pool_rows import add_rows, bag_chunk, is_valid, load_rows, no_rows, store_softmax
from .density_math import LN_2


@triton.jit
def add_scores(
    scores, phi, query_ptr, c, h, hops, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """[BLOCK_H, BLOCK_T], and what the hidden units c have to add, phi [BLOCK_T, BLOCK_C]."""
    if scores.shape[0] >= 16:  # which tl.dot takes
        of_units = (h < hops)[:, None] & (c < HIDDEN)[None, :]
        queries = tl.load(query_ptr + h[:, None] * HIDDEN + c[None, :], mask=of_units, other=0.0)
        return tl.dot(operand(queries), tl.trans(operand(phi)), scores, input_precision=PRECISION, out_dtype=ACC)
    for number in range(0, hops):
        query = tl.load(query_ptr + number * HIDDEN + c, mask=c < HIDDEN, other=0.0)
        of_hop = tl.sum(phi * query[None, :], axis=1)
        scores += tl.where((h == number)[:, None], of_hop[None, :], 0.0)
    return scores


@triton.jit
def hidden_scores(
    row, inside, h, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, hops,
    HIDDEN: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_H, BLOCK_T], of the rows at ``row``."""
    scores = tl.zeros([BLOCK_H, BLOCK_T], ACC)
    for first in range(0, HIDDEN, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        phi = hidden_tanh(
            row, inside, key_weight_ptr, key_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C, BLOCK_K
        )
        if gate_weight_ptr is not None:
            phi *= hidden_gate(
                row, inside, gate_weight_ptr, gate_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C,
                BLOCK_K,
            )  # fmt: skip
        scores = add_scores(scores, phi, query_ptr, c, h, hops, HIDDEN, PRECISION, ACC)
    return scores


@triton.jit
def part_of(values, first, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_H, BLOCK_R] from column ``first`` of [BLOCK_H, BLOCK_T]."""
    here = (first + tl.arange(0, BLOCK_R))[:, None] == tl.arange(0, BLOCK_T)[None, :]
    return tl.sum(tl.where(here[None, :, :], values[:, None, :], 0.0), axis=2)


@triton.jit(do_not_specialize=["length", "num_chunks", "hops", "score_stride_b", "score_stride_h", "valid_stride_b"])
def pool_hidden_sums(
    x_ptr, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, scores_ptr, valid_ptr, keep_ptr,
    cu_seqlens_ptr, lengths_ptr, sums_ptr, tops_ptr, totals_ptr,
    length, num_chunks, hops, x_stride_b, x_stride_t, score_stride_b, score_stride_h, valid_stride_b,
    KEEP_SCALE: tl.constexpr, HIDDEN: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Reads x, writes each chunk's sums as ``pool_sums`` does, and the scores if asked to.

    A tile of BLOCK_T rows has its scores, and is then summed up BLOCK_R rows at a time. The query comes times log2 e.
    """
    bag, first, begin, end = bag_chunk(tl.program_id(0), cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    t = tl.arange(0, BLOCK_T)
    score_base = bag * score_stride_b + h.to(tl.int64) * score_stride_h
    top, total, sums = no_rows(BLOCK_H, BLOCK_R, BLOCK_E, ACC)
    for start in range(begin, end, BLOCK_T):
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, start + t < end, valid_stride_b)
        scores = hidden_scores(
            x_ptr + bag * x_stride_b * VEC + row * x_stride_t * VEC, inside, h, query_ptr, key_weight_ptr, key_bias_ptr,
            gate_weight_ptr, gate_bias_ptr, hops, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_H, BLOCK_T, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        if scores_ptr is not None:
            counts = (h < hops)[:, None] & inside[None, :]
            tl.store(scores_ptr + score_base[:, None] + row[None, :], scores * LN_2, mask=counts)
        for part in tl.range(0, BLOCK_T, BLOCK_R, num_stages=2):
            number = start + part + tl.arange(0, BLOCK_R)
            some = first + number
            there = is_valid(valid_ptr, bag, some, number < end, valid_stride_b)
            x = load_rows(x_ptr, bag, some, there, e, x_stride_b, x_stride_t, E, VEC, ACC)
            top, total, sums = add_rows(
                top, total, sums, part_of(scores, part, BLOCK_T, BLOCK_R), x, (h < hops)[:, None] & there[None, :],
                keep_ptr, score_base[:, None] + some[None, :], KEEP_SCALE,
            )  # fmt: skip
    store_softmax(sums_ptr, tops_ptr, totals_ptr, top, total, sums, h, hops, e, E)
