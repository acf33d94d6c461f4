"""Attention pooling for arrays: NumPy in, NumPy out, with training, files and a picture.

NumPy, tqdm and matplotlib are imported where they are needed; with torch tensors NumPy is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count, check_finite
from .explain.files import complete
from .modules.pooling import AttentionPool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TASKS = ("classification", "regression")
_FORMAT = 1  # of the files


class _Bags(NamedTuple):
    """Bags one after another, and how what is made of them is handed back."""

    rows: Tensor  # [total, input_dim]
    cu_seqlens: Tensor
    kind: str  # "bag", "batch" or "list"
    arrays: bool  # NumPy's, or lists of numbers

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()


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
        bags = self._bags("inputs", inputs)
        context, weights = self._attend(bags)
        each = [part.T for part in weights.split(bags.lengths)]
        results: tuple[Any, Any] = context, each
        if bags.kind == "bag":
            results = context[0], each[0]
        elif bags.kind == "batch":
            results = context, torch.stack(each)
        return _as_arrays(results) if bags.arrays else results

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
        check_choice("task", task, _TASKS)
        check_count("epochs", epochs, 1)
        check_count("batch_size", batch_size, 1)
        for name, value in (("learning_rate", learning_rate), ("penalty", penalty)):
            if check_finite(name, value) < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        _check_seed(seed)
        bags = self._bags("inputs", inputs)
        if bags.kind == "bag":
            raise ValueError(f"inputs must be a batch or a list of inputs, got one of shape {list(bags.rows.shape)}")
        bags = bags._replace(rows=bags.rows.detach().to(self.mean))
        wanted, outputs = self._checked_targets(targets, len(bags.lengths), task)
        scale = None
        if task == "regression":
            scale = _standard(wanted)
            wanted = (wanted - scale[0]) / scale[1]
        rounds = _bar(epochs) if progress else range(epochs)
        self.task, self.losses = task, []
        self.mean, self.deviation = _standard(bags.rows)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.head = nn.Linear(self.attention_units * self.input_dim, outputs).to(self.mean)
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), learning_rate)
        steps = epochs * -(-len(wanted) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in rounds:
            total = 0.0
            for chosen in torch.randperm(len(wanted), generator=order).split(batch_size):
                batch = _some(bags, chosen.tolist())
                loss = self._loss(batch, wanted[chosen.to(wanted.device)], penalty)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
            self.losses.append(total / len(wanted))
            if progress:
                rounds.set_postfix_str(f"loss {self.losses[-1]:.4f}", refresh=False)
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
        bags = self._bags("inputs", inputs)
        outputs = self._predicted(bags._replace(rows=bags.rows.detach().to(self.mean)))[0]
        if self.task == "classification":
            result = self.classes[outputs.argmax(1).cpu().numpy()]
        else:
            result = outputs.squeeze(1).cpu().numpy()
        return result[0] if bags.kind == "bag" else result

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one ``.npz`` file, which ``numpy.load`` reads; it appears when it is complete."""
        numpy, path = _numpy("save"), _checked_path(path)
        described = dict(
            format=_FORMAT, input_dim=self.input_dim, attention_units=self.attention_units, score=self.pool.score,
            hidden_dim=self.pool.hidden_dim, seed=self.seed, task=self.task, losses=self.losses,
        )  # fmt: skip
        arrays = {name: t.detach().cpu().numpy() for name, t in self.state_dict().items()}
        if self.classes is not None:
            arrays["classes"] = self.classes
        with complete(path) as part, open(part, "wb") as file:
            numpy.savez(file, description=numpy.array(json.dumps(described)), **arrays)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionMechanism:
        """The mechanism that :meth:`save` wrote.

        Raises:
            ValueError: the file is not one of these.
        """
        numpy, path = _numpy("load"), _checked_path(path)
        try:
            with numpy.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, EOFError, BadZipFile):
            arrays = {}
        if "description" not in arrays:
            raise ValueError(f"path must be a file that AttentionMechanism.save wrote, got {os.fspath(path)!r}")
        described = json.loads(str(arrays.pop("description")))
        if described["format"] != _FORMAT:
            raise ValueError(f"path must be a file of format {_FORMAT}, got one of format {described['format']}")
        names = "input_dim", "attention_units", "hidden_dim", "score", "seed"
        found = cls(**{name: described[name] for name in names})
        found.task, found.losses, found.classes = described["task"], described["losses"], arrays.pop("classes", None)
        if "head.weight" in arrays:
            found.head = nn.Linear(*arrays["head.weight"].shape[::-1])
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
        from .explain import pictures

        new_figure, path = pictures.figure_maker("plot"), pictures.check_path(path)
        bags = self._bags("inputs", inputs)
        if bags.kind != "bag":
            raise ValueError(f"inputs must be one input [rows, input_dim={self.input_dim}], got a {bags.kind} of them")
        if row_names is not None and len(row_names) != len(bags.rows):
            raise ValueError(f"row_names must have one for each of the {len(bags.rows)} rows, got {len(row_names)}")
        with torch.no_grad():
            weights = self._attend(bags)[1].T.cpu().double()
        units, rows = weights.shape
        figure = new_figure(min(12.0, max(5.0, 1.5 + 0.3 * rows)), min(9.0, 1.6 + 0.4 * units))
        axes = figure.subplots()
        image = axes.imshow(
            weights.numpy(), cmap="viridis", vmin=0, aspect="auto", interpolation="nearest",
            extent=(0.5, rows + 0.5, units + 0.5, 0.5),
        )  # fmt: skip
        if row_names is None:
            pictures.count_from_one(axes.xaxis, rows)
        else:
            positions, shown = pictures.readable_ticks(list(map(str, row_names)))
            axes.set_xticks(positions, shown, rotation=90 if max(map(len, shown)) > 3 else 0)
        axes.set_yticks(range(1, units + 1))
        axes.set(xlabel="row", ylabel="unit", title=title)
        figure.colorbar(image, ax=axes, pad=0.015, label="weight")
        return pictures.saved(figure, path)

    def _attend(self, bags: _Bags) -> tuple[Tensor, Tensor]:
        """(context vectors of every bag, weights [total, units]), in the rows' own units."""
        mean, deviation = self.mean.to(bags.rows.dtype), self.deviation.to(bags.rows.dtype)
        context, weights = self.pool((bags.rows - mean) / deviation, cu_seqlens=bags.cu_seqlens, need_weights=True)
        return context * deviation + mean, weights  # a unit's weights sum to 1

    def _predicted(self, bags: _Bags) -> tuple[Tensor, Tensor]:
        rows = (bags.rows - self.mean) / self.deviation
        context, weights = self.pool(rows, cu_seqlens=bags.cu_seqlens, need_weights=True)
        return self.head(context.reshape(len(bags.cu_seqlens) - 1, -1)), weights

    def _loss(self, bags: _Bags, wanted: Tensor, penalty: float) -> Tensor:
        outputs, weights = self._predicted(bags)
        if self.task == "classification":
            loss = nn.functional.cross_entropy(outputs, wanted)
        else:
            loss = nn.functional.mse_loss(outputs, wanted)
        if penalty:
            loss = loss + penalty * self.pool.penalty(weights, bags.cu_seqlens).mean()
        return loss

    def _bags(self, name: str, inputs: Any) -> _Bags:
        arrays = not _has_tensors(inputs)
        if arrays:
            inputs = _tensors_of(name, inputs)
        kind = "list"
        if isinstance(inputs, Tensor):
            if inputs.dim() not in (2, 3):
                raise ValueError(
                    f"{name} must be [rows, input_dim={self.input_dim}], [batch, rows, {self.input_dim}] or a list of "
                    f"[rows, {self.input_dim}], got shape {list(inputs.shape)}"
                )
            kind = "bag" if inputs.dim() == 2 else "batch"
            inputs = [inputs] if kind == "bag" else list(inputs.unbind())
        if not inputs:
            raise ValueError(f"{name} must hold at least one input, got none")
        for number, bag in enumerate(inputs):
            where = f"{name}[{number}]" if kind == "list" else name
            if not isinstance(bag, Tensor):
                raise TypeError(f"{where} must be a tensor like the others, got {type(bag).__name__}")
            if bag.is_complex() or bag.dtype == torch.bool:
                raise TypeError(f"{where} must hold real numbers, got {bag.dtype}")
            if bag.dim() != 2 or bag.shape[0] == 0 or bag.shape[1] != self.input_dim:
                shape = [len(inputs), *bag.shape] if kind == "batch" else list(bag.shape)
                raise ValueError(f"{where} must have at least one row, of input_dim={self.input_dim} numbers each, "
                                 f"got shape {shape}")  # fmt: skip
        rows = torch.cat([bag if bag.is_floating_point() else bag.to(torch.get_default_dtype()) for bag in inputs])
        ends = torch.tensor([0, *(len(bag) for bag in inputs)], device=rows.device).cumsum(0)
        return _Bags(rows, ends, kind, arrays)

    def _checked_targets(self, targets: Any, count: int, task: str) -> tuple[Tensor, int]:
        """(what the outputs are compared with, how many numbers they have)."""
        numpy = _numpy("fit")
        array = numpy.asarray(targets.detach().cpu() if isinstance(targets, Tensor) else targets)
        if array.ndim == 0 or len(array) != count or array.ndim > (1 if task == "classification" else 2):
            taken = "[inputs]" if task == "classification" else "[inputs] or [inputs, outputs]"
            raise ValueError(f"targets must have shape {taken} for {count} inputs, got {list(array.shape)}")
        if task == "classification":
            if array.dtype == object:
                raise TypeError("targets must be numbers or strings, all of one kind, got objects")
            self.classes, numbers = numpy.unique(array, return_inverse=True)
            return torch.from_numpy(numbers.reshape(-1)).to(self.mean.device), len(self.classes)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"targets must be real numbers for task='regression', got {array.dtype}")
        self.classes = None
        wanted = torch.from_numpy(array.reshape(count, -1).astype("float32")).to(self.mean)
        return wanted, wanted.shape[1]

    def extra_repr(self) -> str:
        return f"{self.input_dim}, {self.attention_units}" + (f", task={self.task!r}" if self.task else "")


def _standard(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation, 1 where it is 0) of every column."""
    deviation, mean = torch.std_mean(rows, 0, correction=0)
    return mean, torch.where(deviation > 0, deviation, 1)


def _some(bags: _Bags, chosen: list[int]) -> _Bags:
    """The bags of these numbers, one after another."""
    bounds = bags.cu_seqlens.tolist()
    rows = torch.cat([bags.rows[bounds[i] : bounds[i + 1]] for i in chosen])
    ends = torch.tensor([0, *(bounds[i + 1] - bounds[i] for i in chosen)], device=rows.device).cumsum(0)
    return bags._replace(rows=rows, cu_seqlens=ends)


def _has_tensors(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) or isinstance(inputs, (list, tuple)) and any(
        isinstance(bag, Tensor) for bag in inputs
    )  # fmt: skip


def _tensors_of(name: str, inputs: Any) -> Tensor | list[Tensor]:
    """One tensor of an array or of a rectangle of nested lists; a list of tensors of a list of these."""
    numpy = _numpy("calculate_attention")
    if isinstance(inputs, (list, tuple)):
        depth, first = 0, inputs
        while isinstance(first, (list, tuple)) and first:
            depth, first = depth + 1, first[0]
        depth += getattr(first, "ndim", 0)
        sizes = {len(bag) for bag in inputs} if depth == 3 else {0}
        if depth == 3 and (len(sizes) > 1 or isinstance(inputs[0], numpy.ndarray)):
            return [_tensor_of(numpy, f"{name}[{number}]", bag) for number, bag in enumerate(inputs)]
    return _tensor_of(numpy, name, inputs)


def _tensor_of(numpy: Any, name: str, values: Any) -> Tensor:
    try:
        array = numpy.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangle of numbers, got rows of different lengths") from error
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    if array.dtype not in (numpy.float64, numpy.float32, numpy.float16):
        array = array.astype(numpy.float64)
    return torch.from_numpy(numpy.ascontiguousarray(array))


def _as_arrays(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.detach().cpu().numpy()
    return type(results)(_as_arrays(result) for result in results)


def _bar(epochs: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            f"fit shows its progress with tqdm, which could not be imported ({error}): "
            "pip install 'daam_kernels[explain]', or pass progress=False"
        ) from error
    return tqdm(range(epochs), unit="epoch", dynamic_ncols=True)


def _numpy(caller: str) -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError(
            f"{caller} needs NumPy for arrays and files, which could not be imported ({error}): pip install numpy, "
            "or pass torch tensors to calculate_attention"
        ) from error
    return numpy


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int of at least 0, got {seed!r}")
    return seed


def _checked_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {os.fspath(path)!r}")
    return path
