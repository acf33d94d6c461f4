"""The quickstart's picture: both loss curves, and what the fused block attends to in one utterance."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
import torch  # noqa: E402
from torch import nn  # noqa: E402

from daam_kernels.explain.files import complete  # noqa: E402

from ..report import read_csv  # noqa: E402
from .data import Utterances  # noqa: E402

_STYLES = ({"color": "#9a9a9a", "linewidth": 4.5}, {"color": "#c0392b", "linewidth": 1.6, "linestyle": "--"})
_PADDING = "#e3e3e3"


def plot(curves: Path, summary: dict, model: nn.Module, test: Utterances, path: Path) -> None:
    """Write the picture of the loss curves in the CSV ``curves`` and of the attention weights of ``model``."""
    utterance = int((test.lengths - test.lengths.double().quantile(0.8)).abs().argmin())  # padded, but not mostly
    frames, length = test.frames[utterance], int(test.lengths[utterance])
    with torch.no_grad():
        _, details = model.block(test.frames[utterance : utterance + 1], return_attention_details=True)

    figure = plt.figure(figsize=(12, 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    curve, difference = above.subplots(1, 2, width_ratios=(1.7, 1))
    _losses(curve, difference, read_csv(curves), summary)
    panels = below.subplots(2, 2, sharex=True, sharey=True).flat
    largest = frames.abs().max().item()
    _map(panels[0], frames, length, "coefficients (standardised)", "RdBu_r", -largest, largest)
    for panel, (layer, weights) in zip(panels[1:], details.items()):
        heads = model.block.layers[int(layer.removeprefix("layer_"))].num_heads
        _map(panel, weights[0], length, f"attention weights, {layer.replace('_', ' ')}", "viridis", 0, None, heads)
    for panel in panels[2:]:
        panel.set_xlabel("frame")
    for panel in panels[::2]:
        panel.set_ylabel("coefficient")
    speaker = int(test.speakers[utterance]) + 1
    below.suptitle(f"Test utterance {utterance + 1}, speaker {speaker}, {length} frames; grey: padding; lines: heads")
    with complete(path) as part:
        figure.savefig(part, format="png", dpi=130)
    plt.close(figure)


def _losses(curve, difference, rows: list[dict[str, str]], summary: dict) -> None:
    epochs = [int(row["epoch"]) for row in rows]
    names = [name for name in rows[0] if name != "epoch"]
    losses = [[float(row[name]) for row in rows] for name in names]
    for name, values, style in zip(names, losses, _STYLES):
        accuracy, step, block = (summary[of][name] for of in ("test_accuracy", "step_ms", "block_ms"))
        label = f"{name}: {100 * accuracy:.1f} % right, {step:.1f} ms a step, {block:.1f} ms the block alone"
        curve.plot(epochs, values, label=label, **style)
    curve.set(yscale="log", xlabel="epoch", ylabel="training loss (cross entropy)")
    environment = summary["environment"]
    title = f"{environment['device']}, {environment['threads']} thread(s), backend {environment['backend']}"
    curve.set_title(title, fontsize=10)
    curve.legend(frameon=False)
    gaps = [abs(a - b) or float("nan") for a, b in zip(*losses)]  # a log axis cannot show two equal losses
    difference.plot(epochs, gaps, color="#2c3e50", linewidth=1.2)
    difference.set(yscale="log", xlabel="epoch", ylabel="|difference of the losses|")
    difference.set_title(f"largest difference {summary['largest_loss_difference']:.1e}", fontsize=10)
    for panel in (curve, difference):
        panel.grid(which="major", linewidth=0.4, color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)


def _map(panel, values: torch.Tensor, length: int, title: str, colors: str, low, high, heads: int = 0) -> None:
    """Frames from left to right, coefficients from bottom to top, frames beyond ``length`` in grey."""
    picture = values.float().cpu().T.clone()
    picture[:, length:] = float("nan")
    total, coefficients = values.shape
    image = panel.imshow(
        picture.numpy(), cmap=matplotlib.colormaps[colors].with_extremes(bad=_PADDING), vmin=low, vmax=high,
        aspect="auto", origin="lower", interpolation="nearest", extent=(0.5, total + 0.5, 0.5, coefficients + 0.5),
    )  # fmt: skip
    for head in range(1, heads):
        panel.axvline(head * (total // heads) + 0.5, color="white", linewidth=1.2)
    panel.set_title(title, fontsize=10)
    panel.set_xticks([1, *range(5, total + 1, 5)])
    panel.set_yticks(range(2, coefficients + 1, 2))
    panel.figure.colorbar(image, ax=panel, pad=0.01)
