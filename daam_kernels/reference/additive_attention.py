"""Additive attention as its formula says: the truth. Builds the tensor [batch, heads, Tq, Tk, hidden]."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import dropout_keep


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
    seed: Tensor | None = None,
    scale: float = 1.0,
    need_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax_j(scale sum_c weight_c tanh(query_ic + key_jc) + mask_ij) value_j, on any device, differentiable twice.

    A query to which every key is forbidden gives 0 and has no gradient.
    Source: Bahdanau et al., arXiv 1409.0473, appendix A.1.2.

    Args:
        query: [batch, heads, Tq, hidden], projected; so is ``key``: [batch, heads, Tk, hidden].
        value: [batch, heads, Tk, value_dim].
        weight: [heads, hidden].
        attn_mask: broadcastable to [batch, heads, Tq, Tk]; boolean, True where a key is forbidden, or added to the
            scores.
        key_padding_mask: boolean [batch, Tk], True where a key is forbidden.
        is_causal: query i may see keys 0 to i alone.
        dropout_p, seed: the share of the weights that is dropped, and int64, one element, which decides about them.
        need_weights: return (output, weights), the weights after dropout.

    Returns:
        output: [batch, heads, Tq, value_dim], of query's type; weights: [batch, heads, Tq, Tk], of that type.
        Arithmetic is in float32, in float64 for float64.
    """
    dtype = query.dtype
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    query, key, value, weight = (
        t if t.dtype == arithmetic else t.to(arithmetic) for t in (query, key, value, weight)
    )  # fmt: skip
    activations = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3))
    scores = (activations * (scale * weight)[:, None, None]).sum(-1)  # in less time than a product of matrices
    batch, heads, queries, keys = scores.shape
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(arithmetic)
    masked = attn_mask is not None or key_padding_mask is not None
    if masked or is_causal:
        scores = scores.masked_fill(_forbidden(scores, attn_mask, key_padding_mask, is_causal), -torch.inf)
    if masked:
        alive = scores.amax(-1, keepdim=True) != -torch.inf
        weights = torch.softmax(torch.where(alive, scores, 0.0), -1) * alive
    else:
        weights = torch.softmax(scores, -1)
    if dropout_p:
        slices = torch.arange(batch * heads, device=query.device).view(batch, heads, 1)
        rows = torch.arange(queries, device=query.device)
        weights = weights * dropout_keep(seed, slices, rows, range(keys), dropout_p) / (1 - dropout_p)
    output = (weights @ value).to(dtype)
    return (output, weights.to(dtype)) if need_weights else output


def _forbidden(scores: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Which keys a query must not see, boolean, broadcastable to scores."""
    queries, keys = scores.shape[-2:]
    forbidden = torch.zeros(queries, keys, dtype=torch.bool, device=scores.device)
    if is_causal:
        forbidden = torch.ones_like(forbidden).triu(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        forbidden = forbidden | attn_mask
    if key_padding_mask is not None:
        forbidden = forbidden | key_padding_mask[:, None, None, :]
    return forbidden
