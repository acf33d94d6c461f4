"""The picture of an alignment: which source token each target token was made from. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .pictures import _check_path, _new_figure, _saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 60  # tokens on an axis that can still be read


def plot_alignment(
    weights: Tensor,
    source: Sequence[str],
    target: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "Alignment",
) -> Figure:
    """Heat map of attention weights: source tokens from left to right, target tokens from top to bottom.

    Source: Bahdanau et al., arXiv 1409.0473, Figure 3.

    Args:
        weights: [len(target), len(source)], as :class:`daam_kernels.AdditiveAttention` gives them for one sequence; of
            several heads average them or take one. Dark is 0, light the largest weight.
        source, target: the tokens; a string is a sequence of characters.
        path: a PNG or SVG file to write, by its suffix; it appears when it is complete. None: none.
        title: above the picture.

    Returns:
        the figure, which pyplot does not know of.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
    """
    new_figure, path = _new_figure("plot_alignment"), _check_path(path)
    weights = _check_weights(weights, source, target)
    rows, columns = weights.shape
    figure = new_figure(min(14.0, 2.4 + 0.32 * max(columns, 6)), min(14.0, 1.6 + 0.32 * max(rows, 5)))
    axes = figure.subplots()
    # Cells finer than pixels have to be blended, or some of them would not be seen.
    fine = max(rows, columns) > 300
    image = axes.imshow(
        weights.numpy(), cmap="viridis", vmin=0, aspect="auto", interpolation="antialiased" if fine else "nearest"
    )
    for axis, tokens in ((axes.xaxis, source), (axes.yaxis, target)):
        step = -(-len(tokens) // _MOST_LABELS)
        axis.set_ticks(range(0, len(tokens), step), [str(token) for token in list(tokens)[::step]])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    if max(len(str(token)) for token in source) > 2:
        axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel="source", ylabel="target")
    figure.suptitle(title)
    figure.colorbar(image, ax=axes, pad=0.02, label="weight")
    return _saved(figure, path)


def _check_weights(weights: Tensor, source: Sequence[str], target: Sequence[str]) -> Tensor:
    """The weights in float32, on the CPU."""
    try:
        weights = torch.as_tensor(weights).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"weights must be a tensor [len(target), len(source)], got {type(weights).__name__}") from error
    for name, tokens in (("source", source), ("target", target)):
        if not isinstance(tokens, Sequence):
            raise TypeError(f"{name} must be a sequence of tokens, got {type(tokens).__name__}")
        if not tokens:
            raise ValueError(f"{name} must have at least 1 token, got none")
    if weights.shape != (len(target), len(source)):
        raise ValueError(
            f"weights must have shape [len(target)={len(target)}, len(source)={len(source)}], got {list(weights.shape)}"
        )
    return weights
