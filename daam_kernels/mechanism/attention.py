"""The module: what it attends to, what it learns, and what it is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_finite
from ..modules.pooling import AttentionPool
from . import files
from .bags import Bags, as_arrays, bags_of
from .extras import bar
from .training import TASKS, standard, targets_of, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AttentionMechanism(nn.Module):
    """Which rows of an input matter, as weights, and what they are together, as one vector for each attention unit.

    A unit (a *hop*) gives every row a score, w . tanh(V row + b); the softmax of the scores over the rows are the
    unit's weights, and the sum of the rows, weighed with them, its context vector. :meth:`fit` learns the units for a
    task, with a linear layer on top of the context vectors, and puts the rows' columns on one scale for it.
    Source: Lin et al., *A Structured Self-attentive Sentence Embedding*, arXiv 1703.03130.

    Args:
        input_dim: numbers in a row.
        attention_units: hops.
        hidden_dim: of the scores' hidden layer. None: input_dim, at least 16.
        score: ``"additive"`` as above, ``"gated"`` or ``"dot"``, as in :class:`daam_kernels.AttentionPool`.
        seed: of the parameters' first values.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        ImportError: NumPy, tqdm or matplotlib is needed and not installed.
    """

    def __init__(
        self,
        input_dim: int,
        attention_units: int,
        *,
        hidden_dim: int | None = None,
        score: str = "additive",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("input_dim", input_dim, 1)
        check_count("attention_units", attention_units, 1)
        check_choice("score", score, ("additive", "gated", "dot"))
        self.input_dim, self.attention_units, self.seed = input_dim, attention_units, _check_seed(seed)
        if hidden_dim is None and score != "dot":
            hidden_dim = max(16, input_dim)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.pool = AttentionPool(input_dim, attention_units, hidden_dim, score)
        self.head: nn.Linear | None = None
        self.task: str | None = None
        self.classes: Any = None  # of a classification, sorted: an array
        self.losses: list[float] = []
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("deviation", torch.ones(input_dim))

    def calculate_attention(self, inputs: Any) -> tuple[Any, Any]:
        """(context_vector, attention_weights).

        Args:
            inputs: one input [rows, input_dim]; a batch [batch, rows, input_dim]; or a list of inputs, whose numbers of
                rows may differ. NumPy arrays, nested lists of numbers, or torch tensors; integers are cast, to float64
                or, in a tensor, to torch's default type.

        Returns:
            context_vector: [input_dim] for one unit, else [units, input_dim]; for a batch or a list with one such entry
                for each input in front.
            attention_weights: [units, rows]; [batch, units, rows]; or for a list a list of these.
            Arrays for arrays and lists; for tensors tensors, which gradients go through.

        Raises:
            TypeError, ValueError: ``inputs`` does not fit; the message says what it got and what it takes.
        """
        bags = bags_of("inputs", inputs, self.input_dim)
        context, weights = self._attend(bags)
        each = [part.T for part in weights.split(bags.lengths)]
        results: tuple[Any, Any] = context, each
        if bags.kind == "bag":
            results = context[0], each[0]
        elif bags.kind == "batch":
            results = context, torch.stack(each)
        return as_arrays(results) if bags.arrays else results

    forward = calculate_attention

    def fit(
        self,
        inputs: Any,
        targets: Any,
        *,
        task: str = "classification",
        epochs: int = 50,
        learning_rate: float = 0.01,
        batch_size: int = 32,
        penalty: float = 0.0,
        progress: bool = True,
        seed: int = 0,
    ) -> AttentionMechanism:
        """Learn the units and a linear layer on top of them; returns self, whose ``losses`` are those of the epochs.

        Columns of the rows, and of a regression's targets, are standardised, and losses are in such units.

        Args:
            inputs: a batch or a list, as in :meth:`calculate_attention`.
            targets: for every input its class, a number or a string; or for ``task="regression"`` a number, or a row
                of them.
            task: ``"classification"`` (cross entropy) or ``"regression"`` (mean squared error).
            learning_rate: of AdamW at the start; it falls to 0 along a cosine.
            penalty: times the mean of :meth:`daam_kernels.AttentionPool.penalty`, which drives units apart, is added
                to the loss.
            progress: show a bar, by tqdm.
            seed: of the layer's first values and the order of the inputs.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
            ImportError: ``progress`` needs tqdm, which is not installed.
        """
        check_choice("task", task, TASKS)
        check_count("epochs", epochs, 1)
        check_count("batch_size", batch_size, 1)
        for name, value in (("learning_rate", learning_rate), ("penalty", penalty)):
            if check_finite(name, value) < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        _check_seed(seed)
        bags = bags_of("inputs", inputs, self.input_dim)
        if bags.kind == "bag":
            raise ValueError(f"inputs must be a batch or a list of inputs, got one of shape {list(bags.rows.shape)}")
        bags = bags._replace(rows=bags.rows.detach().to(self.mean))
        wanted, outputs, self.classes = targets_of(targets, len(bags.lengths), task, self.mean)
        scale = None
        if task == "regression":
            scale = standard(wanted)
            wanted = (wanted - scale[0]) / scale[1]
        rounds = bar(epochs) if progress else range(epochs)
        self.task, self.losses = task, []
        self.mean, self.deviation = standard(bags.rows)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.head = nn.Linear(self.attention_units * self.input_dim, outputs).to(self.mean)

        def loss(chosen: Tensor) -> Tensor:
            return self._loss(bags.some(chosen.tolist()), wanted[chosen.to(wanted.device)], penalty)

        options = dict(learning_rate=learning_rate, batch_size=batch_size, seed=seed)
        for mean_loss in train(self.parameters(), loss, len(wanted), epochs, rounds, **options):
            self.losses.append(mean_loss)
            if progress:
                rounds.set_postfix_str(f"loss {mean_loss:.4f}", refresh=False)
        if scale is not None:  # the layer's outputs are the targets themselves
            mean, deviation = scale
            with torch.no_grad():
                self.head.weight *= deviation[:, None]
                self.head.bias.mul_(deviation).add_(mean)
        return self

    @torch.no_grad()
    def predict(self, inputs: Any) -> Any:
        """What :meth:`fit` has learned to say of inputs: their classes, or numbers, as an array.

        Raises:
            RuntimeError: there was no :meth:`fit`.
        """
        if self.head is None:
            raise RuntimeError("predict needs a fit before it, or a file of a fitted mechanism")
        bags = bags_of("inputs", inputs, self.input_dim)
        outputs = self._predicted(bags._replace(rows=bags.rows.detach().to(self.mean)))[0]
        if self.task == "classification":
            result = self.classes[outputs.argmax(1).cpu().numpy()]
        else:
            result = outputs.squeeze(1).cpu().numpy()
        return result[0] if bags.kind == "bag" else result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one ``.npz`` file, which ``numpy.load`` reads; it appears when it is complete."""
        description = dict(
            input_dim=self.input_dim, attention_units=self.attention_units, score=self.pool.score,
            hidden_dim=self.pool.hidden_dim, seed=self.seed, task=self.task, losses=self.losses,
            dtype=str(self.mean.dtype).removeprefix("torch."),
        )  # fmt: skip
        contents = self.state_dict() if self.classes is None else {**self.state_dict(), "classes": self.classes}
        return files.write(path, description, contents)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionMechanism:
        """The mechanism that :meth:`save` wrote.

        Raises:
            ValueError: the file is not one of these.
        """
        described, arrays = files.read(path)
        names = "input_dim", "attention_units", "hidden_dim", "score", "seed"
        found = cls(**{name: described[name] for name in names})
        found.to(getattr(torch, described.get("dtype", "float32")))  # the first files did not say
        found.task, found.losses, found.classes = described["task"], described["losses"], arrays.pop("classes", None)
        if "head.weight" in arrays:
            found.head = nn.Linear(*arrays["head.weight"].shape[::-1]).to(found.mean)
        found.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return found

    def plot(
        self,
        inputs: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        row_names: Sequence[str] | None = None,
        title: str = "Attention weights",
    ) -> Figure:
        """Heat map of the weights of one input [rows, input_dim]: rows from left to right, units from top to bottom.

        Args:
            path: a PNG or SVG file to write, by its suffix; it appears when it is complete. None: none.
            row_names: below the picture, one for each row. None: numbers from 1.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        """
        from ..explain import pictures
        from .picture import heat_map

        new_figure, path = pictures.figure_maker("plot"), pictures.check_path(path)
        bags = bags_of("inputs", inputs, self.input_dim)
        if bags.kind != "bag":
            raise ValueError(f"inputs must be one input [rows, input_dim={self.input_dim}], got a {bags.kind} of them")
        if row_names is not None and len(row_names) != len(bags.rows):
            raise ValueError(f"row_names must have one for each of the {len(bags.rows)} rows, got {len(row_names)}")
        with torch.no_grad():
            weights = self._attend(bags)[1].T.cpu().double()
        return pictures.saved(heat_map(new_figure, weights, row_names, title), path)

    def _attend(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """(context vectors of every bag, weights [total, units]), in the rows' own units."""
        mean, deviation = self.mean.to(bags.rows.dtype), self.deviation.to(bags.rows.dtype)
        context, weights = self.pool((bags.rows - mean) / deviation, cu_seqlens=bags.cu_seqlens, need_weights=True)
        return context * deviation + mean, weights  # a unit's weights sum to 1

    def _predicted(self, bags: Bags) -> tuple[Tensor, Tensor]:
        rows = (bags.rows - self.mean) / self.deviation
        context, weights = self.pool(rows, cu_seqlens=bags.cu_seqlens, need_weights=True)
        return self.head(context.reshape(len(bags.cu_seqlens) - 1, -1)), weights

    def _loss(self, bags: Bags, wanted: Tensor, penalty: float) -> Tensor:
        outputs, weights = self._predicted(bags)
        if self.task == "classification":
            loss = nn.functional.cross_entropy(outputs, wanted)
        else:
            loss = nn.functional.mse_loss(outputs, wanted)
        if penalty:
            loss = loss + penalty * self.pool.penalty(weights, bags.cu_seqlens).mean()
        return loss

    def extra_repr(self) -> str:
        return f"{self.input_dim}, {self.attention_units}" + (f", task={self.task!r}" if self.task else "")


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int of at least 0, got {seed!r}")
    return seed
