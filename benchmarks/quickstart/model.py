"""The speaker recogniser: a block of the public package over time, a layer per frame, pooling, a classifier."""

from __future__ import annotations

import torch
from gaussian_adaptive_attention import GaussianBlock
from torch import Tensor, nn

from .data import COEFFICIENTS, SPEAKERS

NUM_LAYERS, NUM_HEADS, NUM_GAUSSIANS = 3, 4, 5
_HIDDEN = 64


class SpeakerRecogniser(nn.Module):
    """Which of 9 speakers an utterance is by.

    The block stands first, on the coefficients themselves: it weighs every coefficient's frames by their density over
    time, in 4 heads of about 7 frames each. There padding is exactly 0 and stays so, because each layer gives
    x + x w and 0 stays 0; behind a layer with a bias it would no longer be recognised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block = GaussianBlock(
            norm_axes=[1] * NUM_LAYERS,
            num_heads=[NUM_HEADS] * NUM_LAYERS,
            num_gaussians=[NUM_GAUSSIANS] * NUM_LAYERS,
            num_layers=NUM_LAYERS,
            padding_value=0.0,
        )
        # The package's GitHub code starts with c = exp(N(0, 1)), its release on PyPI with N(0, 1). There some widths
        # are nearly 0, and as gradients grow with 1/c^3, rounding alone soon sets two equal trainings apart.
        with torch.no_grad():
            for layer in self.block.layers:
                for head in layer.attention_heads:
                    head.c.exp_()
        self.per_frame = nn.Sequential(
            nn.Linear(COEFFICIENTS, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _HIDDEN), nn.GELU()
        )
        self.classifier = nn.Linear(2 * _HIDDEN, SPEAKERS)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Logits [utterances, speakers] for frames [utterances, time, coefficients], zero beyond each length."""
        valid = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]).unsqueeze(-1)
        hidden = self.per_frame(self.block(frames)) * valid
        mean = hidden.sum(1) / lengths[:, None]
        deviation = ((hidden - mean[:, None]).square() * valid).sum(1) / lengths[:, None]
        return self.classifier(torch.cat([mean, (deviation + 1e-5).sqrt()], 1))
