"""The backward pass of additive attention: one kernel, launched once for the queries and once for the keys.

A program owns a block of either side and loops over the blocks of the other: it works the scores out anew, and adds to
its own rows of the gradients, which nobody else writes, so that every run adds in the same order. The gradients of
``weight`` are summed over the blocks of keys at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..options import AdditiveProblem
from .additive_host import HELD, SIZES, AdditiveSizes, prepare
from .additive_launch import backward_tile
from .additive_math import activations, dropped, finite, masked, product, split_program, unmasked_scores
from .host import device_of, run
from .launch import Launch
from .remembered import remembered


@triton.jit
def add_to(ptr, at, inside, amount):
    """Add to rows that this program alone owns. Barriers, as another thread may have stored what this one loads."""
    total = tl.load(ptr + at, mask=inside, other=0.0) + amount
    tl.debug_barrier()
    tl.store(ptr + at, total, mask=inside)
    tl.debug_barrier()


@triton.jit
def load_values(ptr, index, stride, inside, v, value_dim, ACC: tl.constexpr):
    """[rows, BLOCK_V] of values or of the output's gradient, 0 outside."""
    at = index.to(tl.int64)[:, None] * stride + v[None, :]
    return tl.load(ptr + at, mask=inside[:, None] & (v < value_dim)[None, :], other=0.0).to(ACC)


@triton.jit(do_not_specialize=SIZES)
def additive_gradients(
    query_ptr, key_ptr, value_ptr, weight_ptr, mask_ptr, key_mask_ptr, seed_ptr, grad_ptr, grad_weights_ptr,
    delta_ptr, lse_ptr, d_owned_ptr, d_value_ptr, d_weight_ptr, d_mask_ptr,
    heads, queries, keys, hidden, value_dim, threshold, num_blocks,
    query_stride_b, query_stride_h, query_stride_t, key_stride_b, key_stride_h, key_stride_t,
    value_stride_b, value_stride_h, value_stride_t, grad_stride_b, grad_stride_h, grad_stride_t,
    grad_weights_stride_b, grad_weights_stride_h, grad_weights_stride_t,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, key_mask_stride_b, key_mask_stride_k,
    OWNS_KEYS: tl.constexpr,
    ADDED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds to dquery, and writes the scores' gradient if asked; or adds to dkey, dvalue and a part of dweight.

    What it adds to is 0 before, contiguous and of the arithmetic type.
    """
    block, slice_number, b, h = split_program(tl.program_id(0), num_blocks, heads)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    grad_ptr += b * grad_stride_b + h * grad_stride_h
    weight_ptr += h * hidden
    lse_ptr += slice_number * queries
    delta_ptr += slice_number * queries
    if mask_ptr is not None:
        mask_ptr += b * mask_stride_b + h * mask_stride_h
    if key_mask_ptr is not None:
        key_mask_ptr += b * key_mask_stride_b
    if grad_weights_ptr is not None:
        grad_weights_ptr += b * grad_weights_stride_b + h * grad_weights_stride_h

    BLOCK_O: tl.constexpr = BLOCK_K if OWNS_KEYS else BLOCK_Q
    BLOCK_L: tl.constexpr = BLOCK_Q if OWNS_KEYS else BLOCK_K
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    start, end = 0, queries if OWNS_KEYS else keys
    owned_size = keys if OWNS_KEYS else queries
    if CAUSAL:
        if OWNS_KEYS:
            start = block * BLOCK_O // BLOCK_L * BLOCK_L
        else:
            end = tl.minimum(end, (block + 1) * BLOCK_O)
    o_inside = o < owned_size
    owned_row = (slice_number * owned_size + o).to(tl.int64)

    for first in range(start, end, BLOCK_L):
        n = first + tl.arange(0, BLOCK_L)
        l_inside = n < end
        inside = l_inside[:, None] & o_inside[None, :]
        if OWNS_KEYS:
            scores = unmasked_scores(
                key_ptr, query_ptr, weight_ptr, o, n, key_stride_t, query_stride_t, o_inside, l_inside, hidden,
                SCALE, FAST, ACC, BLOCK_C, BLOCK_L, BLOCK_O,
            )  # fmt: skip
            rows, columns = n[:, None], o[None, :]
            lse = tl.load(lse_ptr + n, mask=l_inside, other=0.0)[:, None]
            delta = tl.load(delta_ptr + n, mask=l_inside, other=0.0)[:, None]
        else:
            scores = unmasked_scores(
                query_ptr, key_ptr, weight_ptr, o, n, query_stride_t, key_stride_t, o_inside, l_inside, hidden,
                SCALE, FAST, ACC, BLOCK_C, BLOCK_L, BLOCK_O,
            )  # fmt: skip
            rows, columns = o[None, :], n[:, None]
            lse = tl.load(lse_ptr + o, mask=o_inside, other=0.0)[None, :]
            delta = tl.load(delta_ptr + o, mask=o_inside, other=0.0)[None, :]
        scores = masked(
            scores, rows, columns, inside, mask_ptr, key_mask_ptr, mask_stride_q, mask_stride_k, key_mask_stride_k,
            ADDED, CAUSAL, ACC,
        )  # fmt: skip
        shares = tl.exp(scores - finite(lse))

        d_shares = tl.zeros((BLOCK_L, BLOCK_O), ACC)
        for first_v in range(0, value_dim, BLOCK_V):
            v = first_v + tl.arange(0, BLOCK_V)
            if OWNS_KEYS:
                looped = load_values(grad_ptr, n, grad_stride_t, l_inside, v, value_dim, ACC)
                owned = load_values(value_ptr, o, value_stride_t, o_inside, v, value_dim, ACC)
            else:
                looped = load_values(value_ptr, n, value_stride_t, l_inside, v, value_dim, ACC)
                owned = load_values(grad_ptr, o, grad_stride_t, o_inside, v, value_dim, ACC)
            d_shares += product(looped, tl.trans(owned), PRECISION)
        if grad_weights_ptr is not None:
            place = rows.to(tl.int64) * grad_weights_stride_t + columns
            d_shares += tl.load(grad_weights_ptr + place, mask=inside, other=0.0).to(ACC)
        d_shares = dropped(d_shares, seed_ptr, slice_number, rows, columns, threshold, DROPOUT)
        d_scores = shares * (d_shares - delta)
        if d_mask_ptr is not None:
            place = (slice_number * queries + rows) * keys + columns
            tl.store(d_mask_ptr + place, d_scores, mask=inside)
        d_scores *= SCALE

        if OWNS_KEYS:
            kept = tl.trans(dropped(shares, seed_ptr, slice_number, rows, columns, threshold, DROPOUT))
            for first_v in range(0, value_dim, BLOCK_V):
                v = first_v + tl.arange(0, BLOCK_V)
                grad = load_values(grad_ptr, n, grad_stride_t, l_inside, v, value_dim, ACC)
                place_v = owned_row[:, None] * value_dim + v[None, :]
                add_to(
                    d_value_ptr, place_v, o_inside[:, None] & (v < value_dim)[None, :], product(kept, grad, PRECISION)
                )
        for first_c in range(0, hidden, BLOCK_C):
            c = first_c + tl.arange(0, BLOCK_C)
            unit = c < hidden
            if OWNS_KEYS:
                t = activations(
                    key_ptr, query_ptr, o, n, key_stride_t, query_stride_t, o_inside, l_inside, c, hidden, FAST, ACC
                )
                part = tl.sum(tl.sum(t * d_scores[None, :, :], axis=1), axis=1)
                add_to(d_weight_ptr, (slice_number * num_blocks + block) * hidden + c, unit, part)
            else:
                t = activations(
                    query_ptr, key_ptr, o, n, query_stride_t, key_stride_t, o_inside, l_inside, c, hidden, FAST, ACC
                )
            weight = tl.load(weight_ptr + c, mask=unit, other=0.0).to(ACC)
            slope = tl.sum((1.0 - t * t) * d_scores[None, :, :], axis=1) * weight[:, None]
            place_c = owned_row[None, :] * hidden + c[:, None]
            add_to(d_owned_ptr, place_c, unit[:, None] & o_inside[None, :], slope)


def additive_backward(
    problem: AdditiveProblem,
    grad: Tensor,
    grad_weights: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dquery, dkey, dvalue, dweight, dattn_mask or None) as of ``additive_attention_blocks``.

    The gradient of a mask needs memory for one number per query and key.
    """
    query, key, value, weight, attn_mask = problem[:5]
    sizes, pointers = prepare(problem, grad=grad, grad_weights=grad_weights)
    of_queries, of_keys = _launches(sizes)
    d_query, d_key, d_value = (lse.new_zeros(t.shape) for t in (query, key, value))
    d_weight = lse.new_zeros((*sizes.scores[:2], of_keys.values["num_blocks"], sizes.hidden))
    d_mask = lse.new_zeros(sizes.scores) if mask_gradient else None
    if lse.numel() > 0:
        pointers.update(delta_ptr=delta.contiguous(), lse_ptr=lse)
        owned = dict(d_owned_ptr=d_query, d_value_ptr=None, d_weight_ptr=None, d_mask_ptr=d_mask)
        with device_of(lse):
            run(additive_gradients, of_queries, pointers | owned)
            owned = dict(d_owned_ptr=d_key, d_value_ptr=d_value, d_weight_ptr=d_weight, d_mask_ptr=None)
            run(additive_gradients, of_keys, pointers | owned)
    gradients = (total.to(query.dtype) for total in (d_query, d_key, d_value))
    if d_mask is not None:
        d_mask = d_mask.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return *gradients, d_weight.sum((0, 2)).to(weight.dtype), d_mask


@remembered(HELD)
def _launches(sizes: AdditiveSizes) -> tuple[Launch, Launch]:
    """(for the queries, for the keys)."""
    _, _, queries, keys = sizes.scores
    tile = backward_tile(queries, sizes.itemsize)
    blocks = -(-queries // tile.block_q), -(-keys // tile.block_k)
    of_queries, of_keys = (
        sizes.launch(tile, (sizes.slices * number,), OWNS_KEYS=owns_keys, num_blocks=number)
        for owns_keys, number in zip((False, True), blocks)
    )
    return of_queries, of_keys
