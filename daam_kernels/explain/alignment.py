"""The picture of an alignment: which source token each target token was made from. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .pictures import check_path, figure_maker, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 60  # tokens on an axis that can still be read
_MOST_CELLS = 1024  # of an axis, about its pixels


def plot_alignment(
    weights: Tensor | Iterator[Tensor],
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
            several heads average them or take one. Dark is 0, light the largest weight. Or blocks of their rows, one
            after another, as :meth:`daam_kernels.AdditiveAttention.weights_by_rows` gives them, so that the whole is
            never there. Of more than 1024 tokens several share a cell, which has the largest of their weights.
        source, target: the tokens; a string is a sequence of characters.
        path: a PNG or SVG file to write, by its suffix; it appears when it is complete. None: none.
        title: above the picture.

    Returns:
        the figure, which pyplot does not know of.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
    """
    new_figure, path = figure_maker("plot_alignment"), check_path(path)
    _check_tokens(source, target)
    rows, columns = len(target), len(source)
    cells, height, width = _cells(weights, rows, columns)
    figure = new_figure(min(14.0, 2.4 + 0.32 * max(columns, 6)), min(14.0, 1.6 + 0.32 * max(rows, 5)))
    axes = figure.subplots()
    # Cells finer than pixels have to be blended, or some of them would not be seen.
    fine = max(cells.shape) > 300
    image = axes.imshow(
        cells.numpy(), cmap="viridis", vmin=0, aspect="auto", interpolation="antialiased" if fine else "nearest",
        extent=(-0.5, width * cells.shape[1] - 0.5, height * cells.shape[0] - 0.5, -0.5),
    )  # fmt: skip
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    for axis, tokens in ((axes.xaxis, source), (axes.yaxis, target)):
        step = -(-len(tokens) // _MOST_LABELS)
        shown = [str(token) for token in list(tokens)[::step]]
        axis.set_ticks(range(0, len(tokens), step), shown, parse_math=False)  # a price is no formula
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    if max(len(str(token)) for token in source) > 2:
        axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel="source", ylabel="target")
    figure.suptitle(title)
    figure.colorbar(image, ax=axes, pad=0.02, label="weight")
    return saved(figure, path)


def _check_tokens(source: Sequence[str], target: Sequence[str]) -> None:
    for name, tokens in (("source", source), ("target", target)):
        if not isinstance(tokens, Sequence):
            raise TypeError(f"{name} must be a sequence of tokens, got {type(tokens).__name__}")
        if not tokens:
            raise ValueError(f"{name} must have at least 1 token, got none")


def _cells(weights: Tensor | Iterator[Tensor], rows: int, columns: int) -> tuple[Tensor, int, int]:
    """(the cells of the picture, in float32 on the CPU, how many rows and how many columns share one)."""
    height, width = -(-rows // _MOST_CELLS), -(-columns // _MOST_CELLS)
    cells = torch.zeros(-(-rows // height), -(-columns // width))
    done = 0
    for block in _blocks(weights):
        if block.dim() != 2 or block.shape[1] != columns or done + len(block) > rows:
            raise ValueError(
                f"weights must have shape [len(target)={rows}, len(source)={columns}], got {list(block.shape)}"
                + (f" after {done} rows" if done else "")
            )
        reduced = torch.nn.functional.max_pool1d(block.unsqueeze(0), width, ceil_mode=True).squeeze(0).cpu()
        end = done + len(block)
        for number in range(done // height, -(-end // height)):
            part = reduced[max(0, number * height - done) : (number + 1) * height - done]
            cells[number] = torch.maximum(cells[number], part.amax(0))
        done = end
    if done < rows:
        raise ValueError(f"weights must have len(target)={rows} rows, got {done} in all")
    return cells, height, width


def _blocks(weights: Tensor | Iterator[Tensor]) -> Iterable[Tensor]:
    """The rows of the weights, all together or block by block, as tensors of float32 without gradients."""
    if isinstance(weights, Iterator):
        return map(_as_tensor, weights)
    return [_as_tensor(weights)]


def _as_tensor(weights: object) -> Tensor:
    try:
        return torch.as_tensor(weights).detach().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"weights must be a tensor [len(target), len(source)] or an iterator of its rows, got "
            f"{type(weights).__name__}"
        ) from error
