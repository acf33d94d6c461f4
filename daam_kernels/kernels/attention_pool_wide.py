"""The forward sweep of attention pooling where the sums of a chunk do not fit a program: many hops, or long rows.

Scores of any kind. They and the sums are in memory, where they stay in the cache, as the rows do until they are summed
up: x is read from memory once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_math import operand
from .attention_pool_hidden import hidden_scores
from .attention_pool_rows import bag_chunk, is_valid, load_rows
from .density_math import FAR, LN_2, LOG2_E


@triton.jit
def row_products(
    x_ptr, vectors_ptr, bag, row, inside, h, hops, x_stride_b, x_stride_t, E: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_H, BLOCK_T]: rows times a vector for each hop, a block of columns after the other."""
    products = tl.zeros([BLOCK_H, BLOCK_T], ACC)
    for first in range(0, E, BLOCK_K):
        e = first + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
        of_hops = (h < hops)[:, None] & (e < E)[None, :]
        vectors = tl.load(vectors_ptr + h[:, None] * E + e[None, :], mask=of_hops, other=0.0)
        if BLOCK_H < 16 or BLOCK_T < 16:  # which tl.dot does not take
            products += tl.sum(vectors[:, None, :] * x[None, :, :], axis=2)
        else:
            products = tl.dot(
                operand(vectors), tl.trans(operand(x)), products, input_precision=PRECISION, out_dtype=ACC
            )
    return products


@triton.jit
def add_weighed(sums, share, x, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """sums [BLOCK_H, BLOCK_E] and rows x [BLOCK_T, BLOCK_E] times their shares [BLOCK_H, BLOCK_T]."""
    if share.shape[0] < 16 or share.shape[1] < 16:
        sums += tl.sum(share[:, :, None] * x[None, :, :], axis=1)
    else:
        sums = tl.dot(operand(share), operand(x), sums, input_precision=PRECISION, out_dtype=ACC)
    return sums


@triton.jit(
    do_not_specialize=[
        *("length", "num_chunks", "hops", "hop_blocks", "score_stride_b", "score_stride_h", "valid_stride_b")
    ]
)
def pool_wide_sums(
    x_ptr, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, scores_ptr, valid_ptr, keep_ptr,
    cu_seqlens_ptr, lengths_ptr, sums_ptr, tops_ptr, totals_ptr,
    length, num_chunks, hops, hop_blocks, x_stride_b, x_stride_t, score_stride_b, score_stride_h, valid_stride_b,
    KEEP_SCALE: tl.constexpr, HIDDEN: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    PRECISION_BACK: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Reads x, writes the scores, and each chunk's sums as ``pool_sums`` does; the query comes times log2 e.

    BLOCK_S rows have their scores, BLOCK_T at a time; then they are added to the sums, a block of columns after the
    other. A program has a block of hops. Those of a chunk run together: x comes out of the cache for all but one of
    them. What does not change in a loop is worked out in it all the same: kept in registers, it would spill.
    """
    number = tl.program_id(0) // hop_blocks
    bag, first, begin, end = bag_chunk(number, cu_seqlens_ptr, lengths_ptr, length, num_chunks, BLOCK_S)
    h = tl.program_id(0) % hop_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, BLOCK_T)
    of_chunk = number.to(tl.int64) * hops + h
    score_base = bag * score_stride_b + h.to(tl.int64) * score_stride_h
    top = tl.full([BLOCK_H], -FAR, ACC)
    total = tl.zeros([BLOCK_H], ACC)
    for start in tl.range(begin, end, BLOCK_S, disable_licm=True):
        before = top
        for part in tl.range(start, tl.minimum(start + BLOCK_S, end), BLOCK_T, disable_licm=True):
            row = first + part + t
            inside = is_valid(valid_ptr, bag, row, part + t < end, valid_stride_b)
            if key_weight_ptr is None:
                score = row_products(
                    x_ptr, query_ptr, bag, row, inside, h, hops, x_stride_b, x_stride_t, E, VEC, PRECISION, ACC,
                    BLOCK_H, BLOCK_T, BLOCK_K,
                )  # fmt: skip
            else:
                score = hidden_scores(
                    x_ptr + bag * x_stride_b * VEC + row * x_stride_t * VEC, inside, h, query_ptr, key_weight_ptr,
                    key_bias_ptr, gate_weight_ptr, gate_bias_ptr, hops, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_H,
                    BLOCK_T, BLOCK_C, BLOCK_K,
                )  # fmt: skip
            counts = (h < hops)[:, None] & inside[None, :]
            tl.store(scores_ptr + score_base[:, None] + row[None, :], score * LN_2, mask=counts)
            higher = tl.maximum(top, tl.max(tl.where(counts, score, -FAR), axis=1))
            shares = tl.where(counts, tl.exp2(score - higher[:, None]), 0.0)
            total = total * tl.exp2(top - higher) + tl.sum(shares, axis=1)
            top = higher
        tl.debug_barrier()  # what this program wrote, other threads of it read
        for first_e in tl.range(0, E, BLOCK_E, disable_licm=True):
            e = first_e + tl.arange(0, BLOCK_E)
            of_hops = (h < hops)[:, None] & (e < E)[None, :]
            sums_at = sums_ptr + of_chunk[:, None] * E + e[None, :]
            sums = tl.load(sums_at, mask=of_hops & (start > begin), other=0.0) * tl.exp2(before - top)[:, None]
            for part in tl.range(start, tl.minimum(start + BLOCK_S, end), BLOCK_T, disable_licm=True):
                row = first + part + t
                inside = is_valid(valid_ptr, bag, row, part + t < end, valid_stride_b)
                score_at = score_base[:, None] + row[None, :]
                counts = (h < hops)[:, None] & inside[None, :]
                score = tl.load(scores_ptr + score_at, mask=counts, other=0.0) * LOG2_E
                share = tl.where(counts, tl.exp2(score - top[:, None]), 0.0)
                if keep_ptr is not None:
                    kept = tl.load(keep_ptr + score_at, mask=counts, other=0) != 0
                    share = tl.where(kept, share * KEEP_SCALE, 0.0)
                x = load_rows(x_ptr, bag, row, inside, e, x_stride_b, x_stride_t, E, VEC, ACC)
                sums = add_weighed(sums, share, x, PRECISION_BACK, ACC)
            tl.debug_barrier()  # a number may be in several threads: all have read it before one writes it
            tl.store(sums_at, sums, mask=of_hops)
        tl.debug_barrier()
    tl.store(tops_ptr + of_chunk, top, mask=h < hops)
    tl.store(totals_ptr + of_chunk, total, mask=h < hops)
