"""The picture: test bags with the weight of every image, and the losses."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from daam_kernels.explain.files import complete

from .data import NINE, Bags

_SHOWN, _MOST = 4, 16
_NINE, _OTHER = "#c0392b", "#b9b9b9"
_STYLES = {"attention": "#c0392b", "mean": "#4a6fa5", "max": "#7a7a7a"}


def plot(model, test: Bags, losses: dict[str, list[float]], path: Path) -> None:
    """Write it. The bags are the first positive ones of at most 16 images, and one negative."""
    with torch.no_grad():
        _, weights = model(test.images, test.cu_seqlens)
    bounds, lengths = test.cu_seqlens.tolist(), test.cu_seqlens.diff()
    small = [bag for bag in range(len(lengths)) if _MOST // 2 < lengths[bag] <= _MOST]
    positive = [bag for bag in small if test.positive[bag]][: _SHOWN - 1]
    chosen = positive + [bag for bag in small if not test.positive[bag]][:1]

    figure = Figure(figsize=(11, 2.6 + 1.55 * len(chosen)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5 * len(chosen), 2.6))
    columns = max(int(lengths[bag]) for bag in chosen)
    panels = above.subplots(len(chosen) * 2, columns, squeeze=False, height_ratios=(2, 1) * len(chosen))
    for panel in panels.flat:
        panel.set_axis_off()
    for line, bag in enumerate(chosen):
        what = "positive" if test.positive[bag] else "negative"
        panels[2 * line, 0].set_title(f"{what} bag of {int(lengths[bag])}", loc="left", fontsize=9)
        for column, row in enumerate(range(bounds[bag], bounds[bag + 1])):
            color = _NINE if test.digits[row] == NINE else _OTHER
            panels[2 * line, column].imshow(test.images[row].view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            bar = panels[2 * line + 1, column]
            bar.bar([0], [weights[row].item()], color=color, width=0.8)
            bar.set(ylim=(0, 1.45), xlim=(-0.5, 0.5))
            bar.text(0, weights[row].item() + 0.06, f"{weights[row]:.2f}", ha="center", fontsize=7)
    above.suptitle("Weights of the images in new bags; red: a nine, which makes a bag positive", fontsize=11)
    curve = below.subplots()
    for name, values in losses.items():
        curve.plot(range(1, len(values) + 1), values, label=name, color=_STYLES[name])
    curve.set(xlabel="epoch", ylabel="training loss", yscale="log")
    curve.spines[["top", "right"]].set_visible(False)
    curve.legend(frameon=False, title="pooling")
    with complete(path) as part:
        figure.savefig(part, format="png", dpi=130)
