"""Training of one recogniser, step by step, with its own clock; two of them can be trained in turns."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import block_timer
from .data import Utterances

_BATCH = 30
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 1e-2


class Training:
    """A model, its optimiser and the order of its batches, which depends on ``seed`` alone.

    Attributes:
        losses: the mean training loss of every epoch so far.
        step_seconds: the duration of every step so far: forward, backward and optimiser.
        block_seconds: that of the block's forward and backward alone, once after every epoch, so that what else the
            machine does slows it as it slows the steps.
    """

    def __init__(self, name: str, model: nn.Module, data: Utterances, epochs: int, seed: int) -> None:
        self.name, self.model, self.data = name, model, data
        self.order = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        steps = epochs * -(-len(data.lengths) // _BATCH)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.block_seconds: list[float] = []
        self.time_block = block_timer(model.block, data.frames[:_BATCH])

    def epoch(self) -> None:
        """One pass over the data."""
        self.model.train()
        total = 0.0
        for batch in torch.randperm(len(self.data.lengths), generator=self.order).split(_BATCH):
            frames, lengths, speakers = (part[batch] for part in self.data)
            start = time.perf_counter()
            loss = self._step(frames, lengths, speakers)  # a number, so the device is done with it
            self.step_seconds.append(time.perf_counter() - start)
            total += loss * len(batch)
        self.losses.append(total / len(self.data.lengths))
        self.block_seconds.append(self.time_block())

    def step_milliseconds(self) -> float:
        """The median of all steps but the first epoch's, in which caches and pools fill."""
        per_epoch = len(self.step_seconds) // len(self.losses)
        return 1e3 * statistics.median(self.step_seconds[per_epoch if len(self.losses) > 1 else 0 :])

    def block_milliseconds(self) -> float:
        """The median of the block alone, without the first epoch too."""
        return 1e3 * statistics.median(self.block_seconds[1:] or self.block_seconds)

    def _step(self, frames: Tensor, lengths: Tensor, speakers: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(frames, lengths), speakers)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, data: Utterances) -> float:
    """The share of utterances whose speaker the model names."""
    model.eval()
    return (model(data.frames, data.lengths).argmax(1) == data.speakers).double().mean().item()
