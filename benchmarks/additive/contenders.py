"""What computes additive attention: the formula, the formula compiled, FlexAttention, and ours."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from daam_kernels import additive_attention

Contender = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

OURS = "daam_kernels"
INFERENCE_ONLY = frozenset({"flex_attention"})  # on a CPU it has no backward
COMPILED = frozenset({"torch.compile", "flex_attention"})
BUILDS_ACTIVATIONS = {"eager": 4.0, "torch.compile": 3.0}  # tensors of all activations that training holds, at most


def eager(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """The formula, [batch, heads, T, size]."""
    activations = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3))
    return (activations @ weight[:, None, :, None]).squeeze(-1).softmax(-1) @ value


def make(name: str) -> Contender:
    """The contender of that name, which may compile at its first call."""
    if name == "eager":
        return eager
    if name == "torch.compile":
        return torch.compile(eager, dynamic=False)
    if name == "flex_attention":
        return _flex()
    return additive_attention


NAMES = (*BUILDS_ACTIVATIONS, "flex_attention", OURS)


def _flex() -> Contender:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        def score(dot, b, h, i, j):
            return (weight[h] * torch.tanh(query[b, h, i] + key[b, h, j])).sum()

        return compiled(query, key, value, score_mod=score, scale=1.0)

    return attend
