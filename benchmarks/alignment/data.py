"""Real words to reverse: those of the Python documentation, which comes with Python."""

from __future__ import annotations

import random
import re
import string
from typing import NamedTuple

import torch
from torch import Tensor

LETTERS = string.ascii_lowercase
PAD, START = 0, 1  # before the letters
SIZE = 2 + len(LETTERS)


class Words(NamedTuple):
    """Words as numbers, [count, longest], 0 behind their end; ``reversed`` are the same words from back to front."""

    texts: list[str]
    letters: Tensor
    reversed: Tensor
    lengths: Tensor


def load(seed: int, test_share: float = 0.1) -> tuple[Words, Words]:
    """Words to train with and others to test with, of 4 to 10 letters."""
    from pydoc_data.topics import topics

    found = sorted(set(re.findall(r"(?<![\w.])[a-z]{4,10}(?![\w.])", " ".join(topics.values()))))
    random.Random(seed).shuffle(found)
    tests = round(len(found) * test_share)
    return _numbers(found[tests:]), _numbers(found[:tests])


def _numbers(texts: list[str]) -> Words:
    rows = [torch.tensor([LETTERS.index(letter) + 2 for letter in text]) for text in texts]
    padded, backwards = (
        torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (rows, [row.flip(0) for row in rows])
    )
    return Words(texts, padded, backwards, torch.tensor([len(text) for text in texts]))
