"""Inputs of every form, arrays, lists and tensors, as bags one after another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_dense
from .extras import numpy_for


class Bags(NamedTuple):
    """Bags one after another, and how what is made of them is handed back."""

    rows: Tensor  # [total, input_dim]
    cu_seqlens: Tensor
    kind: str  # "bag", "batch" or "list"
    arrays: bool  # NumPy's, or lists of numbers

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def some(self, chosen: list[int]) -> Bags:
        """The bags of these numbers, one after another."""
        bounds = self.cu_seqlens.tolist()
        rows = torch.cat([self.rows[bounds[i] : bounds[i + 1]] for i in chosen])
        ends = torch.tensor([0, *(bounds[i + 1] - bounds[i] for i in chosen)], device=rows.device).cumsum(0)
        return self._replace(rows=rows, cu_seqlens=ends)


def bags_of(name: str, inputs: Any, input_dim: int) -> Bags:
    """The inputs of a caller, who calls them ``name``, checked."""
    arrays = not _has_tensors(inputs)
    if arrays:
        inputs = _tensors_of(name, inputs)
    kind = "list"
    if isinstance(inputs, Tensor):
        check_dense(name, inputs)
        if inputs.dim() not in (2, 3):
            raise ValueError(
                f"{name} must be [rows, input_dim={input_dim}], [batch, rows, {input_dim}] or a list of "
                f"[rows, {input_dim}], got shape {list(inputs.shape)}"
            )
        kind = "bag" if inputs.dim() == 2 else "batch"
        inputs = [inputs] if kind == "bag" else list(inputs.unbind())
    if not inputs:
        raise ValueError(f"{name} must hold at least one input, got none")
    for number, bag in enumerate(inputs):
        where = f"{name}[{number}]" if kind == "list" else name
        if not isinstance(bag, Tensor):
            raise TypeError(f"{where} must be a tensor like the others, got {type(bag).__name__}")
        check_dense(where, bag)
        if bag.is_complex() or bag.dtype == torch.bool:
            raise TypeError(f"{where} must hold real numbers, got {bag.dtype}")
        if bag.dim() != 2 or bag.shape[0] == 0 or bag.shape[1] != input_dim:
            shape = [len(inputs), *bag.shape] if kind == "batch" else list(bag.shape)
            raise ValueError(f"{where} must have at least one row, of input_dim={input_dim} numbers each, "
                             f"got shape {shape}")  # fmt: skip
    rows = torch.cat([bag if bag.is_floating_point() else bag.to(torch.get_default_dtype()) for bag in inputs])
    ends = torch.tensor([0, *(len(bag) for bag in inputs)], device=rows.device).cumsum(0)
    return Bags(rows, ends, kind, arrays)


def as_arrays(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.detach().cpu().numpy()
    return type(results)(as_arrays(result) for result in results)


def _has_tensors(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) or isinstance(inputs, (list, tuple)) and any(
        isinstance(bag, Tensor) for bag in inputs
    )  # fmt: skip


def _tensors_of(name: str, inputs: Any) -> Tensor | list[Tensor]:
    """One tensor of an array or of a rectangle of nested lists; a list of tensors of a list of these."""
    numpy = numpy_for("calculate_attention")
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
