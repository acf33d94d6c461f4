"""The scores of additive and gated attention pooling of half types: a hidden layer that is never written.

Reads x once, and the layer's weights anew for every tile, mostly from the cache; writes the scores alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .additive_host import INTERPRETED, dot_precision
from .attention_pool_launch import hidden_launch
from .host import device_of
from .tanh import portable_tanh

if TYPE_CHECKING:
    from ..ops.attention_pool import Pooling


@triton.jit
def project(
    row, inside, weight_ptr, bias_ptr, c, HIDDEN: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    IN_FLOAT32: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """x weight^T + bias of the rows at ``row``, [BLOCK_T, BLOCK_C]."""
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in tl.range(0, E, BLOCK_E, num_stages=2):
        e = first + tl.arange(0, BLOCK_E)
        x = tl.load(row[:, None] + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0)
        at = c[:, None] * E + e[None, :]
        weight = tl.load(weight_ptr + at, mask=(c < HIDDEN)[:, None] & (e < E)[None, :], other=0.0)
        if IN_FLOAT32:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=c < HIDDEN, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["rows", "length", "hops", "score_stride_b", "score_stride_h"])
def pool_hidden_scores(
    x_ptr, query_ptr, key_weight_ptr, key_bias_ptr, gate_weight_ptr, gate_bias_ptr, valid_ptr, scores_ptr,
    rows, length, hops, x_stride_b, x_stride_t, score_stride_b, score_stride_h,
    HIDDEN: tl.constexpr, E: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    IN_FLOAT32: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes the scores of BLOCK_T valid rows, whatever bags of ``length`` rows they are of."""
    number = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    bag, t = number // length, number % length
    inside = number < rows
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + number, mask=inside, other=0) != 0)
    row = x_ptr + bag * x_stride_b * VEC + t * x_stride_t * VEC
    c = tl.arange(0, BLOCK_C)
    phi = portable_tanh(
        project(
            row, inside, key_weight_ptr, key_bias_ptr, c, HIDDEN, E, PRECISION, IN_FLOAT32, BLOCK_T, BLOCK_C, BLOCK_E
        )
    )
    if gate_weight_ptr is not None:  # x comes from the cache; both at once do not fit sm_100's tensor memory
        gate = project(
            row, inside, gate_weight_ptr, gate_bias_ptr, c, HIDDEN, E, PRECISION, IN_FLOAT32, BLOCK_T, BLOCK_C, BLOCK_E
        )
        phi *= 1 / (1 + tl.exp(-gate))
    score_at = scores_ptr + bag * score_stride_b + t
    for h in range(0, hops):
        query = tl.load(query_ptr + h * HIDDEN + c, mask=c < HIDDEN, other=0.0)
        tl.store(score_at, tl.sum(phi * query[None, :], axis=1), mask=inside)
        score_at += score_stride_h


def serves(pooling: Pooling) -> bool:
    """Whether a hidden layer is multiplied here: of half types, with no more than 128 units, which fit a program.

    Of float32 tensor cores sum up with fewer digits than torch's products, and an error in a score is one in a weight.
    """
    return pooling.x.dtype in (torch.float16, torch.bfloat16) and pooling.query.shape[1] <= 128


def write_hidden_scores(pooling: Pooling, x: Tensor, scores: Tensor) -> None:
    """Into ``scores``, contiguous, those of valid rows. ``x``: the pooling's, with contiguous rows."""
    valid = pooling.valid_rows()
    layers = [None if t is None else t.contiguous() for t in pooling.scorer.tensors[1:]]
    (hops, hidden), (length, embed_dim) = pooling.query.shape, x.shape[-2:]
    in_float32 = any(t is not None and t.dtype != x.dtype for t in layers[::2])
    in_float32 |= INTERPRETED and x.dtype == torch.bfloat16  # which the interpreter cannot multiply
    launch = hidden_launch(hidden, embed_dim, x.stride()[:-1], in_float32)
    packed, rows = pooling.cu_seqlens is not None, x.numel() // embed_dim
    with device_of(x):
        pool_hidden_scores[(triton.cdiv(rows, launch.block_t),)](
            x, (pooling.scale * pooling.query.float()).contiguous(), *layers,
            None if valid is None else valid.contiguous().view(torch.uint8), scores, rows, length, hops,
            0 if packed else x.stride(0) // launch.vec, x.stride(-2) // launch.vec,
            0 if packed else hops * length, length,
            HIDDEN=hidden, E=embed_dim, VEC=launch.vec, PRECISION=dot_precision(torch.float32),
            IN_FLOAT32=in_float32,
            BLOCK_T=launch.block_t, BLOCK_C=launch.block_c, BLOCK_E=launch.block_e, **launch.options(),
        )  # fmt: skip
