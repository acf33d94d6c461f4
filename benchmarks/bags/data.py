"""Bags of handwritten digits: a bag is positive where a nine is among them, and nobody says which image it is.

The images are scikit-learn's ``load_digits``, 1,797 of 8 by 8 pixels; the bags are drawn as Ilse et al.,
arXiv 1802.04712, section 4.3, draw them from MNIST. No image is in bags of both training and test.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NINE = 9
PIXELS = 64
_TEST_SHARE = 3  # one image in three is for bags of the test
_MOST, _FEWEST = 40, 5  # images in a bag


class Bags(NamedTuple):
    """Images one after another [total, 64], in [0, 1]; bag i is those from cu_seqlens[i] to cu_seqlens[i + 1]."""

    images: Tensor
    digits: Tensor  # [total], for the score and the picture alone
    cu_seqlens: Tensor
    positive: Tensor  # [bags], 1.0 or 0.0

    def some(self, chosen: Tensor) -> Bags:
        """The bags of these numbers."""
        bounds = self.cu_seqlens.tolist()
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in chosen.tolist()])
        lengths = self.cu_seqlens.diff()[chosen]
        return Bags(self.images[rows], self.digits[rows], _ends(lengths), self.positive[chosen])


def load(num_bags: int, seed: int) -> tuple[Bags, Bags]:
    """(training, test), each of ``num_bags``, half of them positive."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, digits = torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target)
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=rng)
    cut = len(digits) // _TEST_SHARE
    parts = order[cut:], order[:cut]
    return tuple(_draw(images[part], digits[part], num_bags, rng) for part in parts)


def _draw(images: Tensor, digits: Tensor, num_bags: int, rng: torch.Generator) -> Bags:
    """Bags of 5 to 40 images; a positive one has nines in the share of one in twenty images, and at least one."""
    nines, others = (digits == NINE).nonzero().squeeze(1), (digits != NINE).nonzero().squeeze(1)
    lengths = torch.randint(_FEWEST, _MOST + 1, (num_bags,), generator=rng)
    rows = []
    for bag, length in enumerate(lengths.tolist()):
        chosen = others[torch.randint(len(others), (length,), generator=rng)]
        if bag % 2 == 0:
            count = max(1, length // 20)
            places = torch.randperm(length, generator=rng)[:count]
            chosen[places] = nines[torch.randint(len(nines), (count,), generator=rng)]
        rows.append(chosen)
    of_bags = torch.cat(rows)
    positive = (torch.arange(num_bags) % 2 == 0).float()
    return Bags(images[of_bags], digits[of_bags], _ends(lengths), positive)


def _ends(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
