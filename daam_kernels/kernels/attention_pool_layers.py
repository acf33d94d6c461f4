"""The hidden layer of additive and gated attention pooling, a tile at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import Pooling
from .additive_host import INTERPRETED, dot_precision
from .additive_math import operand
from .density_math import LOG2_E
from .tanh import portable_tanh

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


def scorer_of(pooling: Pooling) -> dict[str, Tensor | None]:
    """What scores are made of, as the kernels take it; layers that are not there are None.

    The query comes times scale log2 e, since exponentials are of base 2, the layers' weights in the type that x is
    multiplied in.
    """
    dtype = type_of_products(pooling)
    key, key_bias, gate, gate_bias = (None if t is None else t.contiguous() for t in pooling.scorer_tensors[1:])
    query = pooling.query.to(pooling.arithmetic) * (pooling.scale * LOG2_E.value)
    return dict(
        query_ptr=query.contiguous(), key_weight_ptr=None if key is None else key.to(dtype), key_bias_ptr=key_bias,
        gate_weight_ptr=None if gate is None else gate.to(dtype), gate_bias_ptr=gate_bias,
    )  # fmt: skip
