"""An encoder and a decoder with additive attention between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from daam_kernels import AdditiveAttention

from .data import PAD, SIZE, START

_WIDTH = 64


class Reverser(nn.Module):
    """Letters to letters: a bidirectional GRU reads, another GRU writes, and attends to what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(SIZE, _WIDTH, padding_idx=PAD)
        self.target = nn.Embedding(SIZE, _WIDTH, padding_idx=PAD)
        self.encoder = nn.GRU(_WIDTH, _WIDTH // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(_WIDTH, _WIDTH, batch_first=True)
        self.attention = AdditiveAttention(_WIDTH, kdim=_WIDTH, vdim=_WIDTH)
        self.letters = nn.Linear(2 * _WIDTH, SIZE)

    def encode(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(what was read of each letter, and of the whole word as the decoder's first state)"""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.source(letters), lengths, batch_first=True, enforce_sorted=False
        )
        read, last = self.encoder(packed)
        read, _ = nn.utils.rnn.pad_packed_sequence(read, batch_first=True, total_length=letters.shape[1])
        return read, last.transpose(0, 1).flatten(1).unsqueeze(0)

    def forward(self, letters: Tensor, lengths: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """(scores of every next letter, weights), all steps at once, each after the letters that should be there."""
        read, state = self.encode(letters, lengths)
        before = torch.cat((torch.full_like(written[:, :1], START), written[:, :-1]), 1)
        states, _ = self.decoder(self.target(before), state)
        context, weights = self.attention(states, read, key_padding_mask=letters == PAD)
        return self.letters(torch.cat((states, context), -1)), weights

    @torch.no_grad()
    def write(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(letters, weights), step by step, each after its own letters; the keys are projected once."""
        read, state = self.encode(letters, lengths)
        keys, padding = self.attention.project_keys(read), letters == PAD
        now = torch.full_like(letters[:, :1], START)
        written, alignment = [], []
        for _ in range(letters.shape[1]):
            states, state = self.decoder(self.target(now), state)
            context, weights = self.attention(states, keys, key_padding_mask=padding)
            now = self.letters(torch.cat((states, context), -1)).argmax(-1)
            written.append(now)
            alignment.append(weights)
        return torch.cat(written, 1), torch.cat(alignment, 1)
