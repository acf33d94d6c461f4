"""The classifier of bags: a small network for every image, a pooling over the bag, one score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from daam_kernels import AttentionPool

from .data import PIXELS

POOLINGS = ("attention", "mean", "max")
_FEATURES, _HIDDEN = 64, 32


class BagClassifier(nn.Module):
    """Whether a bag is positive. ``pooling``: gated attention (Ilse et al., arXiv 1802.04712), mean or maximum."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.per_image = nn.Sequential(
            nn.Linear(PIXELS, _FEATURES), nn.ReLU(), nn.Linear(_FEATURES, _FEATURES), nn.ReLU()
        )
        self.pool = AttentionPool(_FEATURES, hidden_dim=_HIDDEN, score="gated") if pooling == "attention" else None
        self.score = nn.Linear(_FEATURES, 1)

    def forward(self, images: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(logits [bags], the images' weights [total], or None where there are none)."""
        features, weights = self.per_image(images), None
        if self.pool is None:
            pooled = torch.segment_reduce(features, self.pooling, lengths=cu_seqlens.diff(), axis=0)
        else:
            pooled, weights = self.pool(features, cu_seqlens=cu_seqlens, need_weights=True)
        return self.score(pooled).squeeze(1), None if weights is None else weights.squeeze(1)
