"""Attention pooling in plain PyTorch: scores of the rows of a bag, their softmax, and the rows weighed with it.

With phi(x) = x (dot), tanh(W x + b) (additive) or tanh(W x + b) * sigmoid(U x + c) (gated), row t and hop h have

    s[h, t] = scale query[h] . phi(x[t]),   weights[h] = softmax of s[h] over valid rows,   context[h] = weights[h] x

Sources: Lin et al., *A Structured Self-attentive Sentence Embedding*, arXiv 1703.03130 (additive, several hops); Ilse
et al., *Attention-based Deep Multiple Instance Learning*, arXiv 1802.04712 (additive and gated); Lee et al., *Set
Transformer*, arXiv 1810.00825 (multihead: the multi-head attention in PMA).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scorer(NamedTuple):
    """What scores a row. ``query``: [hops, features]; features are x's own, or, with ``key_weight`` W, hidden ones.

    ``key_weight`` and ``gate_weight``: [hidden, embed_dim]; ``key_bias`` and ``gate_bias``: [hidden]. All may be None.
    """

    query: Tensor
    key_weight: Tensor | None = None
    key_bias: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:-1]

    def to(self, dtype: torch.dtype) -> Scorer:
        return Scorer(*(None if t is None else t.to(dtype) for t in self.tensors), self.scale)


def attention_pool(
    x: Tensor,
    scorer: Scorer,
    *,
    valid: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(context [bags, hops, embed_dim], weights [bags, hops, rows]) of x [bags, rows, embed_dim], in x's type at least
    float32.

    ``valid``: boolean, [bags, rows]; what is not valid is not looked at, and a bag without a valid row has context 0
    and weights 0. ``keep``: boolean, [bags, hops, rows], the weights that dropout leaves, which are divided by
    1 - ``dropout_p``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, scorer = x.to(dtype), scorer.to(dtype)
    if valid is not None:
        x = x.masked_fill(~valid.unsqueeze(-1), 0)
    weights = _softmax(scores(x, scorer), None if valid is None else valid.unsqueeze(1))
    if keep is not None:
        weights = weights * keep / (1 - dropout_p)
    return weights @ x, weights


def ragged_attention_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    scorer: Scorer,
    *,
    valid: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(context [bags, hops, embed_dim], weights [hops, total]) of x [total, embed_dim], bag by bag.

    Bag i is the rows cu_seqlens[i] to cu_seqlens[i + 1]. ``valid``: [total]; ``keep``: [hops, total].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bounds, hops = cu_seqlens.tolist(), scorer.query.shape[0]
    contexts = [x.new_zeros((0, hops, x.shape[1]), dtype=dtype)]
    weights = [x.new_zeros((hops, 0), dtype=dtype)]
    for begin, end in zip(bounds, bounds[1:]):
        context, bag_weights = attention_pool(
            x[None, begin:end],
            scorer,
            valid=None if valid is None else valid[None, begin:end],
            keep=None if keep is None else keep[None, :, begin:end],
            dropout_p=dropout_p,
        )
        contexts.append(context)
        weights.append(bag_weights[0])
    return torch.cat(contexts), torch.cat(weights, 1)


def multihead_attention_pool(
    x: Tensor,
    seeds: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(context [bags, hops, embed_dim], weights [bags, hops, rows], averaged over heads): the seeds attend to the rows.

    The parameters are those of ``torch.nn.MultiheadAttention`` and mean the same; ``seeds`` are [hops, embed_dim].
    Source: Lee et al., arXiv 1810.00825, the Multihead in PMA.
    """
    bags, rows, embed_dim = x.shape
    if valid is not None:
        x = x.masked_fill(~valid.unsqueeze(-1), 0)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    query, key, value = (
        torch.nn.functional.linear(t, weight, bias).unflatten(-1, (num_heads, -1)).transpose(-3, -2)
        for t, weight, bias in zip((seeds, x, x), in_proj_weight.chunk(3), biases)
    )  # [..., num_heads, rows, head_dim]
    scale = (embed_dim // num_heads) ** -0.5
    weights = _softmax(scale * query @ key.mT, None if valid is None else valid[:, None, None])
    context = (weights @ value).transpose(1, 2).flatten(2)
    context = torch.nn.functional.linear(context, out_proj_weight, out_proj_bias)
    if valid is not None:
        context = context.masked_fill(~valid.any(1)[:, None, None], 0)
    elif rows == 0:
        context = torch.zeros_like(context)
    return context, weights.mean(1)


def penalty(weights: Tensor) -> Tensor:
    """||A A^T - I||^2 in the Frobenius norm for the weights A of every bag: [..., hops, rows] to [...].

    Source: Lin et al., arXiv 1703.03130, equation 8.
    """
    identity = torch.eye(weights.shape[-2], dtype=weights.dtype, device=weights.device)
    return (weights @ weights.mT - identity).square().sum((-2, -1))


def features(x: Tensor, scorer: Scorer) -> Tensor:
    """phi(x), [..., rows, features]."""
    if scorer.key_weight is None:
        return x
    hidden = torch.nn.functional.linear(x, scorer.key_weight, scorer.key_bias).tanh()
    if scorer.gate_weight is None:
        return hidden
    return hidden * torch.nn.functional.linear(x, scorer.gate_weight, scorer.gate_bias).sigmoid()


def scores(x: Tensor, scorer: Scorer) -> Tensor:
    """[..., hops, rows] of x [..., rows, embed_dim], one type for all."""
    return (features(x, scorer) @ (scorer.scale * scorer.query).T).mT


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Along the last axis over what is valid; 0 where nothing is."""
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    if scores.shape[-1] == 0:
        return scores
    top = scores.detach().amax(-1, keepdim=True)
    exponentials = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / total.masked_fill(total == 0, 1)
