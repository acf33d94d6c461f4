"""``python -m benchmarks alignment``: train a small model to reverse real words, and look at what it attends to."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..environment import describe
from ..report import format_table, write_csv, write_json

_BATCH = 64
_LEARNING_RATE = 3e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this example."""
    parser.add_argument("--out", type=Path, default=Path("alignment-out"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, a batch is small)")


def run(options: argparse.Namespace) -> int:
    """Train, score, print, write; returns the exit status."""
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(options, name)}")
    from tqdm import tqdm  # here and below: the extras are needed by whoever runs this, not by whoever asks for help

    from daam_kernels.explain import plot_alignment

    from .data import LETTERS, load
    from .model import Reverser

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train, test = load(options.seed)
    print(f"{len(train.texts)} words to train, {len(test.texts)} others to test", flush=True)
    model = Reverser()
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, options.steps)
    losses, start = [], time.perf_counter()
    with tqdm(range(options.steps), unit="step", dynamic_ncols=True) as steps:
        for _ in steps:
            chosen = torch.randint(len(train.texts), (_BATCH,))
            letters, wanted, lengths = (part[chosen] for part in (train.letters, train.reversed, train.lengths))
            scores, _ = model(letters, lengths, wanted)
            loss = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            steps.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
    seconds = time.perf_counter() - start

    model.eval()
    written, weights = model.write(test.letters, test.lengths)
    words, letters, aligned = score(written, weights, test.reversed, test.lengths)
    table = [["words", f"{100 * words:.1f} %"], ["letters", f"{100 * letters:.1f} %"]]
    print(format_table(["right in new words", ""], [*table, ["alignments", f"{100 * aligned:.1f} %"]]))
    print("an alignment is right where the largest weight is at the letter that is written")

    options.out.mkdir(parents=True, exist_ok=True)
    paths = [options.out / name for name in ("alignment.json", "alignment-loss.csv", "alignment.png")]
    summary = {"steps": options.steps, "seed": options.seed, "seconds": seconds, "last_loss": losses[-1]}
    summary |= {"words": words, "letters": letters, "alignments": aligned}
    write_json(paths[0], {"environment": describe(torch.device("cpu")), **summary})
    write_csv(paths[1], [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    longest = int(test.lengths.argmax())
    size = int(test.lengths[longest])
    target = "".join(LETTERS[max(0, number - 2)] for number in written[longest, :size].tolist())
    title = f"Reversing a new word, {100 * aligned:.0f} % aligned"
    plot_alignment(weights[longest, :size, :size], test.texts[longest], target, paths[2], title=title)
    print("written:", *(f"  {path}" for path in paths), sep="\n")
    return 0


def score(written: Tensor, weights: Tensor, wanted: Tensor, lengths: Tensor) -> tuple[float, float, float]:
    """Shares of words and of letters that are right, and of letters whose largest weight is at their own source."""
    steps = torch.arange(wanted.shape[1])
    inside = steps < lengths[:, None]
    right = (written == wanted) & inside
    aligned = (weights.argmax(-1) == lengths[:, None] - 1 - steps) & inside
    words = (right | ~inside).all(1).double().mean().item()
    total = inside.sum().item()
    return words, right.sum().item() / total, aligned.sum().item() / total
