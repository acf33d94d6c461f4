"""``python -m benchmarks bags``: find bags with a nine among real digits, by attention, mean and max pooling."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ..environment import describe
from ..report import format_table, write_csv, write_json

_BATCH = 32
_LEARNING_RATE = 2e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this example."""
    parser.add_argument("--out", type=Path, default=Path("bags-out"), help="folder (default: %(default)s)")
    parser.add_argument("--bags", type=int, default=600, help="for training, and as many for the test")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, a batch is small)")


def run(options: argparse.Namespace) -> int:
    """Train with each pooling, score, print, write; returns the exit status."""
    for name in ("bags", "epochs", "threads"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(options, name)}")
    from .data import load
    from .model import POOLINGS
    from .plots import plot

    torch.set_num_threads(options.threads)
    train, test = load(options.bags, options.seed)
    print(f"{options.bags} bags to train, as many of other images to test; {len(test.digits)} images in these")
    results = {name: _train(name, train, options) for name in POOLINGS}
    rows = []
    for name, (model, losses, seconds) in results.items():
        accuracy, found = score(model, test)
        row = {"pooling": name, "test_accuracy": accuracy, "nines_found": found, "last_loss": losses[-1]}
        rows.append(row | {"seconds": seconds})
    shown = [
        [row["pooling"], f"{100 * row['test_accuracy']:.1f} %",
         "-" if row["nines_found"] is None else f"{100 * row['nines_found']:.1f} %", f"{row['seconds']:.0f} s"]
        for row in rows
    ]  # fmt: skip
    print(format_table(["pooling", "bags right", "nines found", "training"], shown))
    print("a nine is found where it has the largest weight of its bag; nothing has told the model which images are")

    options.out.mkdir(parents=True, exist_ok=True)
    paths = [options.out / name for name in ("bags.json", "bags-losses.csv", "bags.png")]
    write_json(paths[0], {"environment": describe(torch.device("cpu")), "seed": options.seed, "rows": rows})
    curves = zip(*(losses for _, losses, _ in results.values()))
    write_csv(paths[1], [{"epoch": epoch, **dict(zip(results, values))} for epoch, values in enumerate(curves, 1)])
    plot(results["attention"][0], test, {name: losses for name, (_, losses, _) in results.items()}, paths[2])
    print("written:", *(f"  {path}" for path in paths), sep="\n")
    return 0


def _train(pooling: str, train, options: argparse.Namespace):
    """(model, the mean loss of every epoch, seconds)."""
    from tqdm import tqdm

    from .model import BagClassifier

    torch.manual_seed(options.seed)
    model = BagClassifier(pooling)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=1e-3)
    steps = options.epochs * -(-len(train.positive) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, start = [], time.perf_counter()
    with tqdm(range(options.epochs), unit="epoch", desc=pooling, dynamic_ncols=True) as epochs:
        for _ in epochs:
            total = 0.0
            for chosen in torch.randperm(len(train.positive)).split(_BATCH):
                batch = train.some(chosen)
                logits, _ = model(batch.images, batch.cu_seqlens)
                loss = F.binary_cross_entropy_with_logits(logits, batch.positive)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
            losses.append(total / len(train.positive))
            epochs.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
    return model, losses, time.perf_counter() - start


@torch.no_grad()
def score(model, test) -> tuple[float, float | None]:
    """(share of bags that are right, share of positive ones whose largest weight is a nine's, or None)."""
    from .data import NINE

    logits, weights = model(test.images, test.cu_seqlens)
    accuracy = ((logits > 0) == (test.positive > 0)).double().mean().item()
    if weights is None:
        return accuracy, None
    bounds = test.cu_seqlens.tolist()
    bags = test.positive.nonzero().squeeze(1).tolist()
    largest = [bounds[bag] + int(weights[bounds[bag] : bounds[bag + 1]].argmax()) for bag in bags]
    return accuracy, (test.digits[largest] == NINE).double().mean().item()
