"""Density attention of packed sequences in plain PyTorch: one after another, as if each came alone.

Arguments, shapes and types are those of :mod:`.density_attention`; x is [total, *features], ``norm_axis`` 0, and
sequence i is its rows cu_seqlens[i] to cu_seqlens[i + 1]. Heads are cut within each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .density_attention import density_attention, density_attention_backward


def ragged_density_attention(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    return_weights: bool = False,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, weights), of x's shape; see :func:`density_attention` for the options."""
    outputs, details = [x[:0]], [x[:0].detach()]  # so that no sequences are an empty result
    for part, part_mask in _sequences(cu_seqlens, x, mask):
        y, weights = density_attention(part, mean_offsets, c, mask=part_mask, return_weights=True, **options)
        outputs.append(y)
        details.append(weights)
    return (torch.cat(outputs), torch.cat(details)) if return_weights else torch.cat(outputs)


def ragged_density_attention_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    log_shares: Tensor | None = None,
    **options,
) -> tuple[Tensor, ...]:
    """(dx, dmean_offsets, dc), and dlog_shares after them of the mixture; the parameters' are sums in float64."""
    parameters = [p for p in (mean_offsets, c, log_shares) if p is not None]
    wide = [p.double() for p in parameters]
    named = {} if log_shares is None else {"log_shares": wide[2]}
    parts, sums = [x[:0]], [torch.zeros_like(p) for p in wide]
    for part_grad, part, part_mask in _sequences(cu_seqlens, grad, x, mask):
        dx, *gradients = density_attention_backward(part_grad, part, *wide[:2], mask=part_mask, **named, **options)
        parts.append(dx)
        sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
    return torch.cat(parts), *(total.to(p.dtype) for total, p in zip(sums, parameters))


def _sequences(cu_seqlens: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The rows of each sequence of the tensors, the last of which broadcasts to the one before it, or is None."""
    *tensors, mask = tensors
    if mask is not None:
        mask = mask.expand_as(tensors[-1])
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds, bounds[1:]):
        yield *(t[begin:end] for t in tensors), None if mask is None else mask[begin:end]
