"""What the kernels of additive attention share: scores, masks and dropout of a tile [looped, owned].

A program owns a block of queries or keys and loops over blocks of the other side. Of the hidden units it takes BLOCK_C
at a time, as the first axis of a tile [BLOCK_C, BLOCK_L, BLOCK_O]: sums over them stay within a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tanh import tanh


@triton.jit
def split_program(number, num_blocks, heads):
    """(block, batch and head in one number, batch, head) of a program."""
    slice_number = (number // num_blocks).to(tl.int64)
    return number % num_blocks, slice_number, slice_number // heads, slice_number % heads


@triton.jit
def load_units(ptr, index, stride, inside, c, size, ACC: tl.constexpr):
    """[BLOCK_C, rows], the units c of the rows ``index``, 0 outside."""
    at = index.to(tl.int64)[None, :] * stride + c[:, None]
    return tl.load(ptr + at, mask=(c < size)[:, None] & inside[None, :], other=0.0).to(ACC)


@triton.jit
def activations(
    owned_ptr, looped_ptr, o, n, owned_stride, looped_stride, o_inside, l_inside, c, hidden,
    FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """tanh(query_ic + key_jc) as [BLOCK_C, BLOCK_L, BLOCK_O]."""
    owned = load_units(owned_ptr, o, owned_stride, o_inside, c, hidden, ACC)
    looped = load_units(looped_ptr, n, looped_stride, l_inside, c, hidden, ACC)
    return tanh(looped[:, :, None] + owned[:, None, :], FAST)


@triton.jit
def unmasked_scores(
    owned_ptr, looped_ptr, weight_ptr, o, n, owned_stride, looped_stride, o_inside, l_inside, hidden,
    SCALE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """scale sum_c weight_c tanh(query_ic + key_jc) as [BLOCK_L, BLOCK_O]."""
    scores = tl.zeros((BLOCK_L, BLOCK_O), ACC)
    for first in range(0, hidden, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        weight = tl.load(weight_ptr + c, mask=c < hidden, other=0.0).to(ACC)
        t = activations(
            owned_ptr, looped_ptr, o, n, owned_stride, looped_stride, o_inside, l_inside, c, hidden, FAST, ACC
        )
        scores += tl.sum(t * weight[:, None, None], axis=0)
    return scores * SCALE


@triton.jit
def masked(
    scores, rows, columns, inside, mask_ptr, key_mask_ptr, mask_stride_q, mask_stride_k, key_mask_stride,
    ADDED: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The scores, -inf where the query must not see the key.

    ``rows`` and ``columns`` are the numbers of queries and keys as a column and a row, or a row and a column.
    """
    allowed = inside
    if CAUSAL:
        allowed = allowed & (columns <= rows)
    if key_mask_ptr is not None:
        at = columns.to(tl.int64) * key_mask_stride
        forbidden = tl.load(key_mask_ptr + at + rows * 0, mask=inside, other=1)
        allowed = allowed & (forbidden == 0)
    if mask_ptr is not None:
        at = rows.to(tl.int64) * mask_stride_q + columns.to(tl.int64) * mask_stride_k
        if ADDED:
            scores += tl.load(mask_ptr + at, mask=inside, other=0.0).to(ACC)
        else:
            allowed = allowed & (tl.load(mask_ptr + at, mask=inside, other=1) == 0)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def finite(lse):
    """0 where no key may be seen, so that exp(-inf - lse) is 0."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def dropped(values, seed_ptr, slice_number, rows, columns, threshold, DROPOUT: tl.constexpr):
    """The values that dropout keeps, divided by 1 - DROPOUT, and 0; see ``reference.dropout``."""
    if DROPOUT > 0.0:
        group = (columns // 4 + rows * 0).to(tl.int32)
        row = (rows + columns * 0).to(tl.int32)
        number = (row * 0 + slice_number).to(tl.int32)
        first, second, third, fourth = tl.philox(tl.load(seed_ptr), group, row, number, row * 0)
        word = (columns + rows * 0) % 4
        chosen = tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))
        keep = (chosen >> 8).to(tl.int32) >= threshold
        values = tl.where(keep, values * (1 / (1 - DROPOUT)), 0.0)
    return values


@triton.jit
def operand(a):
    """``a`` as a factor of tl.dot.

    Triton lays it out for the narrowest type that it comes from elementwise, be it a mask's byte, and has no such
    layout for products of float64: a sum is not elementwise.
    """
    if a.dtype == tl.float64:
        a = tl.sum(a[:, :, None], axis=2)
    return a


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b for a [BLOCK_M, BLOCK_K], b [BLOCK_K, BLOCK_N]; tl.dot where all three are 16 or more."""
    if a.shape[0] >= 16 and a.shape[1] >= 16 and b.shape[1] >= 16:
        result = tl.dot(operand(a), b, input_precision=PRECISION, out_dtype=a.dtype)
    elif a.shape[1] == 1:
        result = a * b
    elif a.shape[0] == 1:
        result = tl.sum(tl.trans(a) * b, axis=0)[None, :]
    else:
        result = tl.sum(a * tl.trans(b), axis=1)[:, None]
    return result
