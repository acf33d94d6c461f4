"""The rest of the family in short: the same recogniser with a mixture of Gaussians, and what both have learned."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from daam_kernels import FusedMultiHeadGAAM, explain

from .data import Utterances
from .model import NUM_GAUSSIANS, SpeakerRecogniser
from .training import Training, accuracy

_NUM_HEADS = 2


class MixtureLayer(nn.Module):
    """x + the attention of x over time, by a weighted sum of Gaussians that start at different widths."""

    def __init__(self) -> None:
        super().__init__()
        widths = torch.logspace(-0.5, 0.5, NUM_GAUSSIANS)  # in deviations; equal ones would stay equal
        self.attention = FusedMultiHeadGAAM(1, _NUM_HEADS, NUM_GAUSSIANS, widths, padding_value=0.0)

    def forward(self, frames: Tensor, return_attention_details: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, weights), of the shape of frames [utterances, time, coefficients]."""
        return self.attention(frames, return_attention_details, residual=True)


def train_mixture(train: Utterances, test: Utterances, epochs: int, seed: int) -> tuple[Training, float]:
    """The recogniser with a layer of the mixture in the place of its block, trained, and its accuracy on ``test``."""
    torch.manual_seed(seed)
    model = SpeakerRecogniser()
    model.block = MixtureLayer()
    training = Training("mixture", model.to(train.frames.device), train, epochs, seed)
    for _ in tqdm(range(epochs), unit="epoch", desc="mixture", dynamic_ncols=True):
        training.epoch()
    return training, accuracy(training.model, test)


def plot_densities(block: nn.Module, mixture: nn.Module, out: Path) -> list[Path]:
    """Pictures of the learned densities of the fused block, a product, and of the mixture; returns their paths."""
    paths = [out / "quickstart-densities-product.png", out / "quickstart-densities-mixture.png"]
    explain.plot_density(block, paths[0], title="Learned densities of the block: products of Gaussians")
    explain.plot_density(mixture, paths[1], title="Learned densities of the mixture: weighted sums of Gaussians")
    return paths
