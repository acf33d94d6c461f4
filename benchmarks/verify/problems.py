"""Every operator of the package on a few small problems, on any device: what its tensors are, and how it is called.

Two sizes: for derivatives, of which numerical ones take an evaluation per element; and for what watches memory, large
enough that every kind of kernel runs: rows and columns, slices that fit a block, are looped over and are split.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

from daam_kernels import additive_attention, attention_pool, density_attention
from daam_kernels.functional import density_block

ROWS, COLUMNS = "rows", "columns"


class Problem(NamedTuple):
    """``function`` of the ``tensors``, all of which it is differentiable in."""

    name: str
    function: Callable[..., Tensor | tuple[Tensor, Tensor]]
    tensors: tuple[Tensor, ...]


class Draw:
    """Random tensors, always the same ones: x of ``dtype``, parameters of at least float32."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.parameters = torch.promote_types(dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def x(self, *shape: int, mean: float = 1.0) -> Tensor:
        return (mean + self.normal(*shape)).to(self.device, self.dtype).requires_grad_()

    def parameter(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.device, self.parameters).requires_grad_()

    def gaussians(self, num_heads: int, columns: int) -> tuple[Tensor, Tensor]:
        """(mean_offsets, c)"""
        found = 0.1 * self.normal(num_heads, columns), (0.3 * self.normal(num_heads, columns)).exp()
        return tuple(t.to(self.device, self.parameters).requires_grad_() for t in found)

    def mask(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.8).to(self.device)

    def ints(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def problems(operator: str, device: str, dtype: torch.dtype, backend: str, small: bool) -> Iterator[Problem]:
    """The problems of one operator, for a backend that serves it."""
    draw = Draw(device, dtype)
    for name, function, tensors in _OPERATORS[operator](draw, small):
        yield Problem(f"{operator}, {name}", partial(function, backend=backend), tuple(tensors))


Named = Iterator[tuple[str, Callable, Sequence[Tensor]]]


def _shapes(small: bool, split: bool = True) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape, norm_axis)"""
    yield ROWS, (4, 9) if small else (8, 1003), -1
    yield COLUMNS, (2, 7, 3) if small else (4, 130, 64), 1
    if split and not small:
        yield f"{ROWS}, split", (1, 40_000), -1
        yield f"{COLUMNS}, split", (1, 9000, 32), 1


def _product(draw: Draw, small: bool) -> Named:
    for name, shape, axis in _shapes(small):
        yield name, partial(density_attention, norm_axis=axis), (draw.x(*shape), *draw.gaussians(2, 3))
        masked = dict(mask=draw.mask(*shape), padding_stats="exclude", normalize="softmax", residual=True)
        tensors = draw.x(*shape), *draw.gaussians(2, 3)
        yield f"{name}, masked", partial(density_attention, norm_axis=axis, **masked), tensors
    if not small:
        for name, shape, axis in (  # enough for every processor
            (f"{COLUMNS}, short", (40, 11, 1000), 1),
            (f"{COLUMNS}, long", (20, 600, 264), 1),
            (f"{ROWS}, many", (5000, 272), -1),
        ):
            yield name, partial(density_attention, norm_axis=axis), (draw.x(*shape), *draw.gaussians(2, 3))
        weighted = partial(density_attention, return_weights=True, padding_value=0.0)
        yield "weights", lambda *t, **backend: weighted(*t, **backend)[0], (draw.x(8, 100), *draw.gaussians(2, 3))


def _mixture(draw: Draw, small: bool) -> Named:
    def call(x, mean_offsets, c, weights, **options):
        return density_attention(x, mean_offsets, c, density="mixture", weights=weights, **options)

    for name, shape, axis in _shapes(small):
        yield name, partial(call, norm_axis=axis), (draw.x(*shape), *draw.gaussians(2, 3), draw.parameter(2, 3))
    if not small:
        # Enough for every processor, of few Gaussians and of more, and without saved statistics.
        for name, shape, axis, num_gaussians in (
            (f"{COLUMNS}, short", (40, 22, 1000), 1, 3),
            (f"{COLUMNS}, long", (20, 600, 264), 1, 6),
            (f"{ROWS}, many", (9000, 333), -1, 4),
        ):
            tensors = draw.x(*shape), *draw.gaussians(2, num_gaussians), draw.parameter(2, num_gaussians)
            yield name, partial(call, norm_axis=axis), tensors
    masked = partial(call, mask=draw.mask(4, 9), padding_stats="exclude")
    yield "masked", masked, (draw.x(4, 9), *draw.gaussians(2, 2), draw.parameter(2, 2))


def _gaussian(draw: Draw, small: bool) -> Named:
    for name, shape, axis in _shapes(small):
        features = shape[2] if axis == 1 else 1
        tensors = draw.x(*shape), *draw.gaussians(2, features)
        yield name, partial(density_attention, density="gaussian", norm_axis=axis), tensors


def _gate(draw: Draw, small: bool) -> Named:
    for name, shape, axis in _shapes(small):
        tensors = draw.x(*shape), *draw.gaussians(2, 3)
        yield name, partial(density_attention, density="gate", norm_axis=axis), tensors


def _block(draw: Draw, small: bool) -> Named:
    def call(x, *parameters, **options):
        half = len(parameters) // 2
        return density_block(x, parameters[:half], parameters[half:], **options)

    for name, shape, axis in _shapes(small, split=False):
        offsets, widths = zip(*(draw.gaussians(2, 2) for _ in range(2)))
        yield name, partial(call, norm_axis=axis), (draw.x(*shape), *offsets, *widths)


def _ragged(draw: Draw, small: bool) -> Named:
    bounds = (0, 5, 9, 16) if small else (0, 700, 716, 2715, 2779)
    for name, features in ((ROWS, 1), (COLUMNS, 3 if small else 64)):
        options = dict(norm_axis=0, cu_seqlens=draw.ints(*bounds), max_seqlen=max(bounds))
        yield name, partial(density_attention, **options), (draw.x(bounds[-1], features), *draw.gaussians(2, 3))


def _additive(draw: Draw, small: bool) -> Named:
    def call(query, key, value, weight, mask=None, **options):
        return additive_attention(query, key, value, weight, attn_mask=mask, need_weights=True, **options)

    batch, heads, hidden, values = (1, 2, 2, 3) if small else (2, 2, 33, 50)
    for name, queries, keys in (("attention", 3, 4), ("decoding", 1, 5)) if small else (
        ("attention", 70, 90), ("decoding", 1, 700),
    ):  # fmt: skip
        tensors = [draw.x(batch, heads, n, size, mean=0.0) for n, size in ((queries, hidden), (keys, hidden))]
        tensors += [draw.x(batch, heads, keys, values, mean=0.0), draw.parameter(heads, hidden)]
        yield name, call, tensors
        yield f"{name}, masked", partial(call, is_causal=queries > 1), (*tensors, draw.x(queries, keys, mean=0.0))


def _pool(draw: Draw, small: bool) -> Named:
    def call(x, *scorer, **options):
        return attention_pool(x, *scorer, need_weights=True, **options)

    size, hops, hidden = (4, 2, 3) if small else (96, 4, 32)
    dense = (2, 5, size) if small else (3, 700, size)
    bounds = (0, 4, 4, 7) if small else (0, 900, 900, 1000, 1333)
    yield "dot", call, (draw.x(*dense, mean=0.0), draw.parameter(hops, size))
    if not small:
        yield "dot, long rows", call, (draw.x(2, 40, 9000, mean=0.0), draw.parameter(2, 9000))
    masked = partial(call, key_padding_mask=draw.mask(*dense[:2]))
    yield "dot, masked", masked, (draw.x(*dense, mean=0.0), draw.parameter(hops, size))
    layers = [draw.parameter(*shape) for _ in range(2) for shape in ((hidden, size), (hidden,))]
    packed = partial(call, cu_seqlens=draw.ints(*bounds), max_seqlen=max(bounds))
    yield "gated, packed", packed, (draw.x(bounds[-1], size, mean=0.0), draw.parameter(hops, hidden), *layers)


_OPERATORS: dict[str, Callable[[Draw, bool], Named]] = {
    "product": _product, "mixture": _mixture, "gaussian": _gaussian, "gate": _gate, "block": _block,
    "ragged": _ragged, "additive": _additive, "pool": _pool,
}  # fmt: skip
OPERATORS = tuple(_OPERATORS)
ON_CUDA_KERNELS = ("product", "ragged")  # that the backend "cuda" serves
