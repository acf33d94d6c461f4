"""The public function of additive attention: checks the arguments, then calls the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATING_TYPES, check_choice, check_dense, check_dropout, check_mask, check_scale, shape_of
from .backends import BACKENDS
from .ops import additive_attention as operator
from .options import AdditiveProblem

_TRUE = "where a key must not be seen"  # of a boolean mask


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    need_weights: bool = False,
    average_weights: bool = False,
    fast_tanh: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Additive (Bahdanau) attention on projected queries and keys, fused: no tensor [batch, heads, Tq, Tk, hidden].

        output_i = sum_j p_ij value_j,  p_i = softmax_j(scale sum_c weight_c tanh(query_ic + key_jc) + mask_ij)

    Forward and backward take memory for a few numbers per query and key beside inputs and results, and give the same
    bits in every run. Arithmetic is in float32, in float64 for float64. One tanh per query, key and hidden unit bounds
    the speed: it does not reach that of dot-product attention. A query to which every key is forbidden gives 0 and has
    no gradient. Source: Bahdanau et al., arXiv 1409.0473, appendix A.1.2.

    Args:
        query: [batch, heads, Tq, hidden], projected. float64, float32, bfloat16 or float16, any strides.
        key: [batch, heads, Tk, hidden], projected; Tk is at least 1. Of query's type, as is ``value``.
        value: [batch, heads, Tk, value_dim].
        weight: [heads, hidden], of any floating-point type.
        attn_mask: broadcastable to [batch, heads, Tq, Tk]. Boolean: True where a query must not see a key, as in
            ``torch.nn.MultiheadAttention`` (and not as in ``scaled_dot_product_attention``). Of a floating-point type:
            added to the scores, and differentiable.
        key_padding_mask: [batch, Tk], boolean, True for keys that no query sees; or added to the scores.
        is_causal: query i sees keys 0 to i alone, whatever Tk is.
        dropout_p: in [0, 1): so many of the weights are dropped and the others divided by 1 - dropout_p. Which ones is
            decided by torch's random generator of query's device; every backend drops the same for the same seed.
        scale: multiplies the scores; None: 1.
        need_weights: return (output, weights). The weights, after dropout, are differentiable. They take memory of
            their own size and no more; see :meth:`daam_kernels.AdditiveAttention.weights_by_rows` for long sequences.
        average_weights: of the heads' weights return the mean alone.
        fast_tanh: on NVIDIA GPUs, tanh in one instruction, with a relative error of up to 2^-11; elsewhere, and in
            float64, it makes no difference.
        backend: ``"auto"``, ``"triton"``, ``"native"``, which serves no float64, or ``"reference"``, which is PyTorch,
            block by block.

    Returns:
        output: [batch, heads, Tq, value_dim], of query's type.
        weights: with ``need_weights``, [batch, heads, Tq, Tk], of that type; averaged [batch, Tq, Tk].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        RuntimeError: the backend was asked for by name and cannot serve query.
    """
    _check_tensors(query, key, value, weight)
    batch, heads, queries, _ = query.shape
    size = batch, heads, queries, key.shape[2]
    if attn_mask is not None:
        attn_mask = check_attn_mask(attn_mask, query, size)
    if key_padding_mask is not None:
        _check_key_padding_mask(key_padding_mask, query, size)
        if key_padding_mask.dtype != torch.bool:
            attn_mask, key_padding_mask = _added(attn_mask, key_padding_mask[:, None, None, :]), None
    dropout_p = check_dropout("dropout_p", dropout_p)
    check_choice("backend", backend, ("auto", *BACKENDS))
    seed = torch.randint(1 << 62, (1,), device=query.device) if dropout_p else None
    problem = AdditiveProblem(
        query, key, value, weight, attn_mask, key_padding_mask, seed, bool(is_causal), dropout_p,
        check_scale(scale, 1.0), bool(fast_tanh), bool(need_weights), bool(average_weights) and heads > 1,
    )  # fmt: skip
    output, weights = operator.apply(problem, backend)
    output = output.to(query.dtype)
    if not need_weights:
        return output
    return output, weights.squeeze(1) if average_weights else weights


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> None:
    for name, t in (("query", query), ("key", key), ("value", value), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.is_nested:
            raise TypeError(f"{name} must be one dense tensor, got a nested one: pad it, with a key_padding_mask")
        check_dense(name, t)
    if query.dtype not in FLOATING_TYPES:
        raise TypeError(f"query must be float64, float32, bfloat16 or float16, got {query.dtype}")
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            raise TypeError(f"{name} must be of query's type, {query.dtype}, got {t.dtype}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight must be of a floating-point type, got {weight.dtype}")
    for name, t in (("key", key), ("value", value), ("weight", weight)):
        if t.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}, got {t.device}")
    if query.dim() != 4 or query.shape[1] == 0 or query.shape[3] == 0:
        raise ValueError(
            f"query must have shape [batch, heads, Tq, hidden], heads and hidden at least 1, got {shape_of(query)}"
        )
    batch, heads, _, hidden = query.shape
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (batch, heads, hidden):
        raise ValueError(
            f"key must have shape [batch={batch}, heads={heads}, Tk, hidden={hidden}], as query's of shape "
            f"{shape_of(query)}, got {shape_of(key)}"
        )
    keys = key.shape[2]
    if keys == 0:
        raise ValueError(f"key must have at least 1 key, got an empty set of keys, shape {shape_of(key)}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or value.shape[3] == 0:
        raise ValueError(
            f"value must have shape [batch={batch}, heads={heads}, Tk={keys}, value_dim], value_dim at least 1, "
            f"got {shape_of(value)}"
        )
    if weight.shape != (heads, hidden):
        raise ValueError(f"weight must have shape [heads={heads}, hidden={hidden}], got {shape_of(weight)}")


def check_attn_mask(mask: Tensor, query: Tensor, size: tuple[int, ...]) -> Tensor:
    """The mask with 4 dimensions."""
    check_mask("attn_mask", mask, _TRUE, "query", query, added=True)
    fits = mask.dim() <= 4 and all(m == 1 or m == n for m, n in zip(mask.shape[::-1], size[::-1]))
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to [batch={size[0]}, heads={size[1]}, Tq={size[2]}, Tk={size[3]}], "
            f"got {shape_of(mask)}"
        )
    return mask[(None,) * (4 - mask.dim())]


def _check_key_padding_mask(mask: Tensor, query: Tensor, size: tuple[int, ...]) -> None:
    check_mask("key_padding_mask", mask, _TRUE, "query", query, added=True)
    if mask.shape != (size[0], size[3]):
        raise ValueError(f"key_padding_mask must have shape [batch={size[0]}, Tk={size[3]}], got {shape_of(mask)}")


def _added(attn_mask: Tensor | None, key_mask: Tensor) -> Tensor:
    """Both masks in one that is added to the scores."""
    if attn_mask is None:
        return key_mask
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=key_mask.dtype).masked_fill(attn_mask, -torch.inf)
    return attn_mask + key_mask
