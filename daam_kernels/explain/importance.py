"""Importance factors and contributions of layers: averaged weights as [layers, features], in numbers."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checks import check_dense
from .files import complete


def importance_factor(
    weights: Tensor | Mapping[str, Tensor], *, layer_axis: int | None = None, feature_axis: int = -1
) -> Tensor:
    """The importance factor of every feature of every layer: the averaged attention, scaled to [0, 1] as a whole.

    IF = (DA - min(DA)) / (max(DA) - min(DA)); source: arXiv 2401.11143, "Evaluation Metrics". All zero where DA is
    constant. As IF is its own importance factor, whatever takes weights here also takes what this returns.

    Args:
        weights: attention weights. A tensor of at least 2 dimensions, with an axis of layers and one of features; all
            others are averaged over. Or what :func:`collect` returns, whose entries are then the layers. NaN is
            where there are no data.
        layer_axis: of a tensor. None: the last but one.
        feature_axis: of the tensor, or of every entry.

    Returns:
        [layers, features], float64, on the CPU, NaN where there are no data.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
    """
    attention = _layers_by_features(weights, layer_axis, feature_axis)
    known = attention[~attention.isnan()]
    if not known.numel():
        return attention
    low, high = known.min(), known.max()
    return (attention - low) / (high - low) if high > low else attention - low


def layer_contribution(
    weights: Tensor | Mapping[str, Tensor], *, layer_axis: int | None = None, feature_axis: int = -1
) -> Tensor:
    """The share of every layer in the attention weights, in percent: mean weight over the sum of these means.

    Source: arXiv 2401.11143, Figure 3, which gives no formula. It takes the weights themselves; of importance factors
    the smallest was taken off. Where weights are normalised within every layer, which they are if ``norm_axis`` is
    features or time, all contributions are the same, and so are those of whole heads of equal size if it is layers;
    what differs there is how often eps was the divisor.

    Args:
        weights, layer_axis, feature_axis: as in :func:`importance_factor`.

    Returns:
        [layers], float64, on the CPU, with the sum 100; zeros where all weights are zero.

    Raises:
        TypeError, ValueError: an argument does not fit, or weights are negative.
    """
    attention = _layers_by_features(weights, layer_axis, feature_axis)
    if (attention < 0).any():
        raise ValueError(f"weights must not be negative, got {attention.nan_to_num().min().item():g} as a mean")
    means = attention.nanmean(1)
    total = means.nansum()
    return 100 * means / total if total > 0 else means


def write_importance(
    weights: Tensor | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    layer_axis: int | None = None,
    feature_axis: int = -1,
    layer_names: Sequence[str] | None = None,
) -> None:
    """Write the importance factors as CSV with the columns layer, feature (from 1) and importance.

    Args:
        path: the file to write; it appears when it is complete.
        weights, layer_axis, feature_axis: as in :func:`importance_factor`.
        layer_names: one for each layer. None: the entries' names, less what all start with; or numbers from 1.
    """
    importance = importance_factor(weights, layer_axis=layer_axis, feature_axis=feature_axis)
    names = layer_names_of(weights, layer_names, len(importance))
    with complete(Path(path)) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "feature", "importance"))
        for name, row in zip(names, importance.tolist()):
            writer.writerows((name, feature, value) for feature, value in enumerate(row, 1))


def _layers_by_features(weights: Tensor | Mapping[str, Tensor], layer_axis: int | None, feature_axis: int) -> Tensor:
    """[layers, features] in float64 on the CPU."""
    if isinstance(weights, Mapping):
        if layer_axis is not None:
            raise ValueError(
                f"layer_axis must be None for several weights, whose entries are the layers, got {layer_axis}; "
                f"for the axis of one entry give that entry"
            )
        if not weights:
            raise ValueError("weights must have at least one entry, got none")
        rows = {name: _mean_but(entry, (feature_axis,), f"weights[{name!r}]") for name, entry in weights.items()}
        if len({len(row) for row in rows.values()}) > 1:
            sizes = ", ".join(f"{len(row)} at {name!r}" for name, row in rows.items())
            raise ValueError(f"weights must have the same number of features in every entry, got {sizes}")
        return torch.stack(list(rows.values()))
    return _mean_but(weights, (-2 if layer_axis is None else layer_axis, feature_axis), "weights")


def _mean_but(weights: Tensor, kept: tuple[int, ...], name: str) -> Tensor:
    """The mean over all axes but those ``kept``, which come out in their order."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weights).__name__}")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"{name} must be of a floating-point type, got {weights.dtype}")
    check_dense(name, weights)
    if weights.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the device meta")
    dims = weights.dim()
    if dims < len(kept):
        raise ValueError(f"{name} must have at least {len(kept)} dimension(s), got shape {list(weights.shape)}")
    for argument, axis in zip(("layer_axis", "feature_axis")[-len(kept) :], kept):
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"{argument} must be an int, got {axis!r}")
        if not -dims <= axis < dims:
            raise ValueError(
                f"{argument} must be in [{-dims}, {dims - 1}] for {name} of shape {list(weights.shape)}, got {axis}"
            )
    kept = tuple(axis % dims for axis in kept)
    if len(set(kept)) < len(kept):
        raise ValueError(f"layer_axis and feature_axis must be two axes, got {kept[0]} for both")
    weights = weights.detach().cpu().double()
    if not weights.numel():
        raise ValueError(f"{name} must not be empty, got shape {list(weights.shape)}")
    if weights.isinf().any():
        raise ValueError(f"{name} must be finite, or NaN where there are no data, got Inf")
    return weights.movedim(kept, tuple(range(len(kept)))).unsqueeze(-1).flatten(len(kept)).nanmean(-1)


def layer_names_of(weights: Tensor | Mapping[str, Tensor], names: Sequence[str] | None, layers: int) -> list[str]:
    if names is None:
        if not isinstance(weights, Mapping):
            return [str(number) for number in range(1, layers + 1)]
        shared = os.path.commonprefix(list(weights)).rfind(".") + 1
        return [name[shared:] for name in weights]
    if isinstance(names, str) or not hasattr(names, "__len__") or len(names) != layers:
        raise ValueError(f"layer_names must be one name for each of {layers} layers, got {names!r}")
    return [str(name) for name in names]
