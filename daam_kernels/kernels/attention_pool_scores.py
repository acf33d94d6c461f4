"""The hidden layer of additive and gated attention pooling, a tile at a time; and scores of it alone, of half types.

``pool_hidden_scores`` reads x once, and the layer's weights anew for every tile, mostly from the cache; it serves where
a program has no room for the scores and the sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_host import INTERPRETED, dot_precision
from .additive_math import operand
from .attention_pool_launch import hidden_launch
from .host import device_of
from .tanh import portable_tanh

if TYPE_CHECKING:
    from ..ops.attention_pool import Pooling

TYPES = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16
}  # fmt: skip


@triton.jit
def project(
    row, inside, weight_ptr, bias_ptr, c, HIDDEN: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x weight^T + bias of the rows at ``row``, [BLOCK_T, BLOCK_C], multiplied in TYPE, which the weight has."""
    total = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for first in tl.range(0, E, BLOCK_K, num_stages=2):
        e = first + tl.arange(0, BLOCK_K)
        x = tl.load(row[:, None] + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0)
        at = c[:, None] * E + e[None, :]
        weight = tl.load(weight_ptr + at, mask=(c < HIDDEN)[:, None] & (e < E)[None, :], other=0.0)
        total = tl.dot(operand(x.to(TYPE)), tl.trans(weight), total, input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=c < HIDDEN, other=0.0).to(ACC)[None, :]
    return total


@triton.jit
def hidden_tanh(
    row, inside, weight_ptr, bias_ptr, c, HIDDEN: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    return portable_tanh(
        project(row, inside, weight_ptr, bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C, BLOCK_K)
    )


@triton.jit
def hidden_gate(
    row, inside, weight_ptr, bias_ptr, c, HIDDEN: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    z = project(row, inside, weight_ptr, bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C, BLOCK_K)
    return 1 / (1 + tl.exp(-z))


@triton.jit(do_not_specialize=["rows", "length", "hops", "score_stride_b", "score_stride_h"])
def pool_hidden_scores(
    x_ptr, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, valid_ptr, scores_ptr,
    rows, length, hops, x_stride_b, x_stride_t, score_stride_b, score_stride_h,
    HIDDEN: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes the scores of BLOCK_T valid rows, whatever bags of ``length`` rows they are of."""
    number = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    bag, t = number // length, number % length
    inside = number < rows
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + number, mask=inside, other=0) != 0)
    row = x_ptr + bag * x_stride_b * VEC + t * x_stride_t * VEC
    c = tl.arange(0, BLOCK_C)
    phi = hidden_tanh(
        row, inside, key_weight_ptr, key_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C, BLOCK_K
    )
    if gate_weight_ptr is not None:  # x comes from the cache; both at once do not fit sm_100's tensor memory
        phi *= hidden_gate(
            row, inside, gate_weight_ptr, gate_bias_ptr, c, HIDDEN, E, PRECISION, TYPE, ACC, BLOCK_T, BLOCK_C, BLOCK_K
        )
    score_at = scores_ptr + bag * score_stride_b + t
    for h in range(0, hops):
        query = tl.load(query_ptr + h * HIDDEN + c, mask=c < HIDDEN, other=0.0)
        tl.store(score_at, tl.sum(phi * query[None, :], axis=1), mask=inside)
        score_at += score_stride_h


def serves(pooling: Pooling) -> bool:
    """Whether a hidden layer is multiplied here: of half types, with no more than 128 units, which fit a program."""
    return pooling.x.dtype in (torch.float16, torch.bfloat16) and pooling.query.shape[1] <= 128


def type_of_products(pooling: Pooling) -> torch.dtype:
    """What the layers are multiplied in: x's type where they have it too, else the arithmetic's."""
    x = pooling.x
    if INTERPRETED and x.dtype == torch.bfloat16:  # which the interpreter cannot multiply
        return pooling.arithmetic
    alike = all(t is None or t.dtype == x.dtype for t in (pooling.key_weight, pooling.gate_weight))
    return x.dtype if alike else pooling.arithmetic


def precision_of(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32 for x of this type.

    Of float32 itself tensor cores sum up with fewer digits than x has, and an error in a score is one in a weight.
    """
    return dot_precision(torch.float32) if dtype.itemsize == 2 else "ieee"


def layers_of(pooling: Pooling) -> dict:
    """The layers' tensors, their weights in the type that x is multiplied in."""
    dtype = type_of_products(pooling)
    key, key_bias, gate, gate_bias = (None if t is None else t.contiguous() for t in pooling.scorer.tensors[1:])
    return dict(
        key_weight_ptr=key.to(dtype), key_bias_ptr=key_bias,
        gate_weight_ptr=None if gate is None else gate.to(dtype), gate_bias_ptr=gate_bias,
        HIDDEN=key.shape[0], TYPE=TYPES[dtype], ACC=TYPES[pooling.arithmetic],
    )  # fmt: skip


def write_hidden_scores(pooling: Pooling, x: Tensor, scores: Tensor) -> None:
    """Into ``scores``, contiguous, those of valid rows. ``x``: the pooling's, with contiguous rows."""
    valid, layers = pooling.valid_rows(), layers_of(pooling)
    (hops, hidden), (length, embed_dim) = pooling.query.shape, x.shape[-2:]
    launch = hidden_launch(hidden, embed_dim, x.stride()[:-1], type_of_products(pooling).itemsize)
    packed, rows = pooling.cu_seqlens is not None, x.numel() // embed_dim
    with device_of(x):
        pool_hidden_scores[(triton.cdiv(rows, launch.block_t),)](
            x, (pooling.scale * pooling.query.float()).contiguous(),
            valid_ptr=None if valid is None else valid.contiguous().view(torch.uint8), scores_ptr=scores, rows=rows,
            length=length, hops=hops, x_stride_b=0 if packed else x.stride(0) // launch.vec,
            x_stride_t=x.stride(-2) // launch.vec, score_stride_b=0 if packed else hops * length,
            score_stride_h=length, E=embed_dim, VEC=launch.vec, PRECISION=precision_of(x.dtype), **layers,
            BLOCK_T=launch.block_t, BLOCK_C=launch.block_c, BLOCK_K=launch.block_k, **launch.options(),
        )  # fmt: skip
