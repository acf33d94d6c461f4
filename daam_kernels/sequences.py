"""Packed sequences: which rows of x belong together, read from ``cu_seqlens`` and checked.

Whoever has to know the numbers on the host asks here. From another device they are read once for each tensor and
version of it, because to read them waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Packing(NamedTuple):
    """What ``cu_seqlens`` says: sequence i is rows bounds[i] to bounds[i + 1]."""

    bounds: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def rows(self) -> list[slice]:
        return [slice(begin, end) for begin, end in zip(self.bounds, self.bounds[1:])]


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # from a tensor to (its version, its packing)


def packing(cu_seqlens: Tensor) -> Packing:
    """The packing on the host.

    Raises:
        RuntimeError: under the capture of a CUDA graph, which cannot wait for the device.
    """
    if cu_seqlens.is_cpu:
        return _packing(cu_seqlens)
    if _is_captured(cu_seqlens):
        raise RuntimeError(
            "cu_seqlens cannot be read while a CUDA graph is captured: give max_seqlen, and use backend='triton'"
        )
    if cu_seqlens.is_inference():  # it has no version: nobody can tell whether it has changed
        return _packing(cu_seqlens)
    version, found = _read.get(cu_seqlens, (None, None))
    if version != cu_seqlens._version:
        found = _packing(cu_seqlens)
        _read[cu_seqlens] = cu_seqlens._version, found
    return found


def check_packing(cu_seqlens: Tensor, total: int, num_heads: int, max_seqlen: int | None, fewest: int) -> None:
    """That the sequences are the ``total`` rows of x one after another, with the ``fewest`` elements for every head.

    Under the capture of a CUDA graph nothing can be read, and nothing is checked.

    Raises:
        ValueError: they are not; the message names the sequence.
    """
    if _is_captured(cu_seqlens):
        return
    bounds, lengths = known = packing(cu_seqlens)
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, got {bounds[0]}")
    shortest = min(lengths, default=fewest * num_heads)
    if shortest < fewest * num_heads:
        number = lengths.index(shortest)
        if shortest < 0:
            raise ValueError(
                f"cu_seqlens must ascend, got {bounds[number]} and then {bounds[number + 1]} for sequence {number}"
            )
        raise ValueError(
            f"every sequence in cu_seqlens must have at least {fewest} element(s) per head: "
            f"sequence {number} has length {shortest}, and {num_heads} head(s) take at least {fewest * num_heads}"
        )
    if bounds[-1] != total:
        raise ValueError(f"cu_seqlens must end with the size of x along the packed axis, {total}, got {bounds[-1]}")
    if max_seqlen is not None and max_seqlen < known.longest:
        raise ValueError(
            f"max_seqlen must be at least the length of the longest sequence, {known.longest} "
            f"(sequence {lengths.index(known.longest)}), got {max_seqlen}"
        )


def lengths_of(lengths: Tensor) -> tuple[int, ...]:
    """``lengths`` on the host, read once like ``cu_seqlens``."""
    return packing(lengths).bounds


def check_lengths(lengths: Tensor, longest: int) -> None:
    """That every length is in [0, ``longest``]; under the capture of a CUDA graph nothing is checked.

    Raises:
        ValueError: one is not; the message names it.
    """
    if _is_captured(lengths):
        return
    for number, length in enumerate(lengths_of(lengths)):
        if not 0 <= length <= longest:
            raise ValueError(f"lengths must be in [0, {longest}], the rows of x, got {length} for bag {number}")


def _packing(cu_seqlens: Tensor) -> Packing:
    bounds = tuple(cu_seqlens.tolist())
    return Packing(bounds, tuple(end - begin for begin, end in zip(bounds, bounds[1:])))


def _is_captured(cu_seqlens: Tensor) -> bool:
    return cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
