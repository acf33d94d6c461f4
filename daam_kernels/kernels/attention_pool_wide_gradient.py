"""The backward sweeps of attention pooling where rows, hidden units or hops do not fit a program.

A program has the scores of a tile of its rows and their gradient first, writes them, and goes through the tile again,
which comes out of the cache: x is read from memory once. Hops, hidden units and columns are taken block by block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_math import operand
from .attention_pool_hidden import hidden_scores
from .attention_pool_hidden_gradient import segment_chunk
from .attention_pool_layers import hidden_gate, hidden_tanh
from .attention_pool_rows import bag_chunk, is_valid, shares_and_gradient
from .attention_pool_wide import row_products
from .density_math import LN_2, LOG2_E

_SIZES = ["length", "num_chunks", "hops", "score_stride_b", "score_stride_h", "valid_stride_b"]


@triton.jit(do_not_specialize=_SIZES)
def pool_wide_gradient(
    x_ptr, query_ptr, valid_ptr, keep_ptr, cu_seqlens_ptr, lengths_ptr, grad_ptr, grad_weights_ptr, lse_ptr, inner_ptr,
    given_ptr, dx_ptr, d_scores_ptr,
    length, num_chunks, hops, x_stride_b, x_stride_t, dx_stride_b, dx_stride_t, score_stride_b, score_stride_h,
    valid_stride_b,
    KEEP_SCALE: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Reads x, writes dx, the gradient of the scores, and the weights its rows were given, for long rows.

    The scores are products with the query, which comes times log2 e.
    """
    bag, first, begin, end = bag_chunk(tl.program_id(0), cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_T)
    t = tl.arange(0, BLOCK_T)
    grad_ptr += bag * hops * E
    for start in range(begin, end, BLOCK_T):
        there = start + t < end
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, there, valid_stride_b)
        for first_h in range(0, hops, BLOCK_H):
            h = first_h + tl.arange(0, BLOCK_H)
            lse = tl.load(lse_ptr + bag * hops + h, mask=h < hops, other=0.0) * LOG2_E
            inner = tl.load(inner_ptr + bag * hops + h, mask=h < hops, other=0.0)
            score = row_products(
                x_ptr, query_ptr, bag, row, inside, h, hops, x_stride_b, x_stride_t, E, VEC, PRECISION, ACC, BLOCK_H,
                BLOCK_T, BLOCK_E,
            )  # fmt: skip
            d_share = row_products(
                x_ptr, grad_ptr, bag, row, inside, h, hops, x_stride_b, x_stride_t, E, VEC, PRECISION, ACC, BLOCK_H,
                BLOCK_T, BLOCK_E,
            )  # fmt: skip
            of_hops = (h < hops)[:, None]
            score_at = bag * score_stride_b + h.to(tl.int64)[:, None] * score_stride_h + row[None, :]
            given, d_score = shares_and_gradient(
                score, d_share, of_hops & inside[None, :], score_at, keep_ptr, grad_weights_ptr, lse[:, None],
                inner[:, None], KEEP_SCALE,
            )  # fmt: skip
            tl.store(given_ptr + score_at, given, mask=of_hops & there[None, :])
            tl.store(d_scores_ptr + score_at, d_score, mask=of_hops & there[None, :])
        tl.debug_barrier()  # what this program wrote, other threads of it read
        for first_e in range(0, E, BLOCK_E):
            e = first_e + tl.arange(0, BLOCK_E)
            dx = tl.zeros([BLOCK_T, BLOCK_E], ACC)
            score_at = bag * score_stride_b + row
            for number in range(0, hops):
                grad = tl.load(grad_ptr + number * E + e, mask=e < E, other=0.0)
                query = tl.load(query_ptr + number * E + e, mask=e < E, other=0.0)
                dx += tl.load(given_ptr + score_at, mask=there, other=0.0)[:, None] * grad[None, :]
                d_score = tl.load(d_scores_ptr + score_at, mask=there, other=0.0)
                dx += d_score[:, None] * (query * LN_2)[None, :]
                score_at += score_stride_h
            at = bag * dx_stride_b * VEC + row[:, None] * dx_stride_t * VEC + e[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=there[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["first_row", "end_row", *_SIZES])
def pool_wide_hidden_gradient(
    x_ptr, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, valid_ptr, keep_ptr,
    cu_seqlens_ptr, lengths_ptr, grad_ptr, grad_weights_ptr, lse_ptr, inner_ptr, given_ptr, d_scores_ptr, phi_ptr,
    d_hidden_ptr,
    first_row, end_row, length, num_chunks, hops, x_stride_b, x_stride_t, score_stride_b, score_stride_h,
    valid_stride_b,
    KEEP_SCALE: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, PRECISION_BACK: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x, writes what ``pool_hidden_gradient`` does, but of the query's gradient only what it is made of.

    That is the gradient of the scores, [rows, hops], and the hidden layer, [rows, HIDDEN], of the rows of the segment,
    whose products ``pool_layer_sums`` sums up. Loops are as in ``pool_wide_sums``.
    """
    bag, first, begin, end, segment_row = segment_chunk(
        cu_seqlens_ptr, lengths_ptr, length, num_chunks, first_row, end_row, BLOCK_T
    )
    t = tl.arange(0, BLOCK_T)
    for start in tl.range(begin, end, BLOCK_T, disable_licm=True):
        there = start + t < end
        row = first + start + t
        inside = is_valid(valid_ptr, bag, row, there, valid_stride_b)
        at = x_ptr + bag * x_stride_b * VEC + row * x_stride_t * VEC
        kept_row = segment_row + start + t
        for first_h in tl.range(0, hops, BLOCK_H, disable_licm=True):
            h = first_h + tl.arange(0, BLOCK_H)
            lse = tl.load(lse_ptr + bag * hops + h, mask=h < hops, other=0.0) * LOG2_E
            inner = tl.load(inner_ptr + bag * hops + h, mask=h < hops, other=0.0)
            score = hidden_scores(
                at, inside, h, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, hops, HIDDEN, E,
                PRECISION, TYPE, ACC, BLOCK_H, BLOCK_T, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            d_share = row_products(
                x_ptr, grad_ptr + bag * hops * E, bag, row, inside, h, hops, x_stride_b, x_stride_t, E, VEC, PRECISION,
                ACC, BLOCK_H, BLOCK_T, BLOCK_K,
            )  # fmt: skip
            of_hops = (h < hops)[:, None] & there[None, :]
            score_at = bag * score_stride_b + h.to(tl.int64)[:, None] * score_stride_h + row[None, :]
            given, d_score = shares_and_gradient(
                score, d_share, of_hops & inside[None, :], score_at, keep_ptr, grad_weights_ptr, lse[:, None],
                inner[:, None], KEEP_SCALE,
            )  # fmt: skip
            tl.store(given_ptr + score_at, given, mask=of_hops)
            tl.store(d_scores_ptr + kept_row[None, :] * hops + h[:, None], d_score, mask=of_hops)
        tl.debug_barrier()  # what this program wrote, other threads of it read
        for first_c in tl.range(0, HIDDEN, BLOCK_C, disable_licm=True):
            c = first_c + tl.arange(0, BLOCK_C)
            tanh = hidden_tanh(
                at, inside, key_weight_ptr, key_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C, BLOCK_K
            )
            d_phi = tl.zeros([BLOCK_T, BLOCK_C], ACC)
            for first_h in tl.range(0, hops, BLOCK_H, disable_licm=True):
                h = first_h + tl.arange(0, BLOCK_H)
                of_rows = there[:, None] & (h < hops)[None, :]
                d_score = tl.load(d_scores_ptr + kept_row[:, None] * hops + h[None, :], mask=of_rows, other=0.0)
                of_hops = (h < hops)[:, None] & (c < HIDDEN)[None, :]
                query = tl.load(query_ptr + h[:, None] * HIDDEN + c[None, :], mask=of_hops, other=0.0) * LN_2
                d_phi = tl.dot(operand(d_score), operand(query), d_phi, input_precision=PRECISION_BACK, out_dtype=ACC)
            of_units = there[:, None] & (c < HIDDEN)[None, :]
            hidden_at = d_hidden_ptr + kept_row[:, None] * UNITS + c[None, :]
            phi = tanh
            d_hidden = d_phi * (1 - tanh * tanh)
            if gate_weight_ptr is not None:
                gate = hidden_gate(
                    at, inside, gate_weight_ptr, gate_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C,
                    BLOCK_K,
                )  # fmt: skip
                phi = tanh * gate
                d_hidden *= gate
                tl.store(hidden_at + HIDDEN, d_phi * phi * (1 - gate), mask=of_units)
            tl.store(hidden_at, d_hidden, mask=of_units)
            tl.store(phi_ptr + kept_row[:, None] * HIDDEN + c[None, :], phi, mask=of_units)
