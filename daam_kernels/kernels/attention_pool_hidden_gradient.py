"""The backward sweeps of additive and gated attention pooling.

``pool_hidden_gradient`` reads x once from memory, has the hidden layer anew, and writes its gradient;
``pool_hidden_dx`` makes dx of that and does not read x; ``pool_layer_sums`` reads x again, and the hidden layer's
gradient, for the gradients of the layers. The hidden layer's gradient is of a segment of rows at a time: all three are
launched for the first, then for the next. It does not stay on chip: dx takes the products of a whole row of it, which
do not fit a program together with the layer itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_math import operand
from .attention_pool_hidden import add_scores
from .attention_pool_layers import hidden_gate, hidden_tanh
from .attention_pool_rows import bag_chunk, is_valid, load_rows, shares_and_gradient
from .density_math import LN_2, LOG2_E


_SIZES = [
    "first_row", "end_row", "length", "num_chunks", "hops", "score_stride_b", "score_stride_h", "valid_stride_b"
]  # fmt: skip


@triton.jit
def segment_chunk(
    cu_seqlens_ptr, lengths_ptr, length, num_chunks, first_row, end_row, BLOCK_T: tl.constexpr
):  # fmt: skip
    """``bag_chunk``, of the rows first_row to end_row of all; and where in these the bag's first row would be."""
    bag, first, begin, end = bag_chunk(tl.program_id(0), cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    segment_row = bag * length - first_row
    if cu_seqlens_ptr is not None:
        segment_row = first - first_row
    return bag, first, tl.maximum(begin, -segment_row), tl.minimum(end, end_row - first_row - segment_row), segment_row


@triton.jit
def of_hop(values, h, number):
    """[BLOCK_T], one row of [BLOCK_H, BLOCK_T]."""
    return tl.sum(tl.where((h == number)[:, None], values, 0.0), axis=0)


@triton.jit(do_not_specialize=_SIZES)
def pool_hidden_gradient(
    x_ptr, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, valid_ptr, keep_ptr,
    cu_seqlens_ptr, lengths_ptr, grad_ptr, grad_weights_ptr, lse_ptr, inner_ptr, given_ptr, d_hidden_ptr,
    d_query_ptr,
    first_row, end_row, length, num_chunks, hops, x_stride_b, x_stride_t, score_stride_b, score_stride_h,
    valid_stride_b,
    KEEP_SCALE: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Reads x, writes the weights its rows were given, the hidden layer's gradient, and each chunk's of the query.

    Of the rows of a segment, as the hidden layer's gradient is: of its HIDDEN units, then of the gate's. The query
    comes times log2 e, its gradient lacks the scale.
    """
    bag, first, begin, end, segment_row = segment_chunk(
        cu_seqlens_ptr, lengths_ptr, length, num_chunks, first_row, end_row, BLOCK_T
    )
    h = tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    lse = tl.load(lse_ptr + bag * hops + h, mask=h < hops, other=0.0) * LOG2_E
    inner = tl.load(inner_ptr + bag * hops + h, mask=h < hops, other=0.0)
    grad_ptr += bag * hops * E
    d_query = tl.zeros([BLOCK_H, BLOCK_C], ACC)
    for start in range(begin, end, BLOCK_T):
        there = start + t < end
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, there, valid_stride_b)
        at = x_ptr + bag * x_stride_b * VEC + row * x_stride_t * VEC
        tanh = hidden_tanh(
            at, inside, key_weight_ptr, key_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C, BLOCK_K
        )
        phi = tanh
        if gate_weight_ptr is not None:
            gate = hidden_gate(
                at, inside, gate_weight_ptr, gate_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C,
                BLOCK_K,
            )  # fmt: skip
            phi = tanh * gate
        score = add_scores(tl.zeros([BLOCK_H, BLOCK_T], ACC), phi, query_ptr, c, h, hops, HIDDEN, PRECISION, ACC)
        d_share = tl.zeros([BLOCK_H, BLOCK_T], ACC)
        for first_e in range(0, E, BLOCK_E):
            e = first_e + tl.arange(0, BLOCK_E)
            x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
            for number in range(0, hops):
                grad = tl.load(grad_ptr + number * E + e, mask=e < E, other=0.0)
                d_share += tl.where((h == number)[:, None], tl.sum(grad[None, :] * x, axis=1)[None, :], 0.0)
        counts = (h < hops)[:, None] & inside[None, :]
        score_at = bag * score_stride_b + h.to(tl.int64)[:, None] * score_stride_h + row[None, :]
        given, d_score = shares_and_gradient(
            score, d_share, counts, score_at, keep_ptr, grad_weights_ptr, lse[:, None], inner[:, None], KEEP_SCALE
        )
        d_phi = tl.zeros([BLOCK_T, BLOCK_C], ACC)
        for number in range(0, hops):
            of_rows = of_hop(d_score, h, number)
            query = tl.load(query_ptr + number * HIDDEN + c, mask=c < HIDDEN, other=0.0)
            d_phi += of_rows[:, None] * (query * LN_2)[None, :]
            d_query += tl.where((h == number)[:, None], tl.sum(of_rows[:, None] * phi, axis=0)[None, :], 0.0)
        tl.store(given_ptr + score_at, given, mask=(h < hops)[:, None] & there[None, :])
        hidden_at = (segment_row + start + t)[:, None] * UNITS + c[None, :]
        of_units = there[:, None] & (c < HIDDEN)[None, :]
        d_hidden = d_phi * (1 - tanh * tanh)
        if gate_weight_ptr is not None:
            d_hidden *= gate
            d_gate = d_phi * phi * (1 - gate)
            tl.store(d_hidden_ptr + HIDDEN + hidden_at, d_gate, mask=of_units)
        tl.store(d_hidden_ptr + hidden_at, d_hidden, mask=of_units)
    d_query_at = (tl.program_id(0).to(tl.int64) * hops + h)[:, None] * HIDDEN + c[None, :]
    tl.store(d_query_ptr + d_query_at, d_query, mask=(h < hops)[:, None] & (c < HIDDEN)[None, :])


@triton.jit
def add_layer(
    dx, d_layer_ptr, weight_ptr, row, there, e, HIDDEN: tl.constexpr, UNITS: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """dx [BLOCK_T, BLOCK_E] and what a layer hands back, from its gradient of the rows."""
    for first in tl.range(0, HIDDEN, BLOCK_U, num_stages=2):
        c = first + tl.arange(0, BLOCK_U)
        of_rows = there[:, None] & (c < HIDDEN)[None, :]
        d_layer = tl.load(d_layer_ptr + row[:, None] * UNITS + c[None, :], mask=of_rows, other=0.0)
        of_columns = (c < HIDDEN)[:, None] & (e < E)[None, :]
        weight = tl.load(weight_ptr + c[:, None] * E + e[None, :], mask=of_columns, other=0.0).to(ACC)
        dx = tl.dot(operand(d_layer), weight, dx, input_precision=PRECISION, out_dtype=ACC)
    return dx


@triton.jit(do_not_specialize=_SIZES)
def pool_hidden_dx(
    given_ptr, grad_ptr, d_hidden_ptr, key_weight_ptr, gate_weight_ptr, cu_seqlens_ptr, lengths_ptr, dx_ptr,
    first_row, end_row, length, num_chunks, hops, dx_stride_b, dx_stride_t, score_stride_b, score_stride_h,
    HIDDEN: tl.constexpr, UNITS: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, PRECISION_BACK: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes dx of the rows of a segment from what ``pool_hidden_gradient`` wrote."""
    bag, first, begin, end, segment_row = segment_chunk(
        cu_seqlens_ptr, lengths_ptr, length, num_chunks, first_row, end_row, BLOCK_T
    )
    t = tl.arange(0, BLOCK_T)
    for start in range(begin, end, BLOCK_T):
        there = start + t < end
        row = first + start + t
        at = segment_row + start + t
        for first_e in range(0, E, BLOCK_E):
            e = first_e + tl.arange(0, BLOCK_E)
            dx = add_layer(
                tl.zeros([BLOCK_T, BLOCK_E], ACC), d_hidden_ptr, key_weight_ptr, at, there, e, HIDDEN, UNITS, E,
                PRECISION_BACK, ACC, BLOCK_U,
            )  # fmt: skip
            if gate_weight_ptr is not None:
                dx = add_layer(
                    dx, d_hidden_ptr + HIDDEN, gate_weight_ptr, at, there, e, HIDDEN, UNITS, E, PRECISION_BACK, ACC,
                    BLOCK_U,
                )  # fmt: skip
            given_at = given_ptr + bag * score_stride_b + row
            for h in range(0, hops):
                grad = tl.load(grad_ptr + (bag * hops + h) * E + e, mask=e < E, other=0.0)
                dx += tl.load(given_at, mask=there, other=0.0)[:, None] * grad[None, :]
                given_at += score_stride_h
            dx_at = bag * dx_stride_b * VEC + row[:, None] * dx_stride_t * VEC + e[None, :]
            tl.store(dx_ptr + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=there[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["first_row", "end_row", "length", "rows_each"])
def pool_layer_sums(
    x_ptr, valid_ptr, d_hidden_ptr, d_weight_ptr, d_bias_ptr,
    first_row, end_row, length, rows_each, x_stride_b, x_stride_t,
    UNITS: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, PRECISION_BACK: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads x and the hidden layer's gradient of valid rows; writes the sums of their products over ``rows_each`` rows.

    A program has a block of units and one of columns. Those that share rows run together: x comes out of the cache for
    all but one of them.
    """
    c = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    e = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    chunk = tl.program_id(2).to(tl.int64)
    begin = first_row + chunk * rows_each
    end = tl.minimum(begin + rows_each, end_row)
    d_weight = tl.zeros([BLOCK_U, BLOCK_S], ACC)
    d_bias = tl.zeros([BLOCK_U], ACC)
    for start in tl.range(begin, end, BLOCK_R, num_stages=2):
        number = start + tl.arange(0, BLOCK_R)
        inside = number < end
        if valid_ptr is not None:
            inside = inside & (tl.load(valid_ptr + number, mask=inside, other=0) != 0)
        bag, row = number // length, number % length
        x = load_rows(x_ptr, bag[:, None], row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
        hidden_at = (number - first_row)[:, None] * UNITS + c[None, :]
        d_hidden = tl.load(d_hidden_ptr + hidden_at, mask=inside[:, None] & (c < UNITS)[None, :], other=0.0)
        d_weight = tl.dot(
            tl.trans(operand(d_hidden)), operand(x), d_weight, input_precision=PRECISION_BACK, out_dtype=ACC
        )
        d_bias += tl.sum(d_hidden, axis=0)
    at = (chunk * UNITS + c)[:, None] * E + e[None, :]
    tl.store(d_weight_ptr + at, d_weight, mask=(c < UNITS)[:, None] & (e < E)[None, :])
    if d_bias_ptr is not None and tl.program_id(1) == 0:
        tl.store(d_bias_ptr + chunk * UNITS + c, d_bias, mask=c < UNITS)
