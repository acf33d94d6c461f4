"""The shapes that count, as the performance page lists them, and what the tensors of one of them are called."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

from torch import Tensor


Normal = Callable[..., Tensor]  # of dimensions: numbers from N(0, 1), float32


@dataclass(frozen=True)
class Shape:
    """One x: its dimensions, the axis that is normalised, in how many heads, the layout in memory, and for whom.

    Attributes:
        operator: one of the family, a key of ``OPERATORS``.
        layers: of a block.
        sequences: the lengths of those that are packed along axis 0.
        num_gaussians: where the shape is about this number; None: the one that is asked for.
        on_cpu: whether a CPU runs it where no shapes are named: all of them would take hours there.
    """

    name: str
    dims: tuple[int, ...]
    norm_axis: int
    num_heads: int
    channels_last: bool = False
    operator: str = "product"
    layers: int = 1
    sequences: tuple[int, ...] = ()
    num_gaussians: int | None = None
    on_cpu: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.dims)


def _ragged(count: int, shortest: int, longest: int, features: int) -> Shape:
    """``count`` sequences of evenly spread lengths, in no order."""
    step = (longest - shortest) / (count - 1)
    lengths = tuple(shortest + round(step * (97 * index % count)) for index in range(count))
    return Shape("ragged", (sum(lengths), features), 0, 4, operator="ragged", sequences=lengths, on_cpu=False)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wavlm", (8, 24, 1024), 1, 8),
        Shape("llama", (32, 40, 5120), 1, 8),
        Shape("beit", (32, 24, 1024), 1, 8),
        Shape("frames", (64, 2048, 512), 1, 8),
        Shape("features", (64, 512, 2048), -1, 8),
        Shape("image", (32, 256, 56, 56), 1, 8),
        Shape("image_channels_last", (32, 256, 56, 56), 1, 8, channels_last=True),
        Shape("long", (1, 16777216), 1, 1),
        Shape("long_middle", (4, 1048576, 8), 1, 1),
        Shape("tiny", (10, 128), 1, 4),
        Shape("mixture", (8, 24, 1024), 1, 8, operator="mixture"),
        Shape("mixture_frames", (64, 2048, 512), 1, 8, operator="mixture", on_cpu=False),
        Shape("mixture_frames_k64", (64, 2048, 512), 1, 8, operator="mixture", num_gaussians=64, on_cpu=False),
        Shape("frames_k1", (64, 2048, 512), 1, 8, num_gaussians=1, on_cpu=False),
        Shape("frames_k16", (64, 2048, 512), 1, 8, num_gaussians=16, on_cpu=False),
        Shape("frames_k64", (64, 2048, 512), 1, 8, num_gaussians=64, on_cpu=False),
        # One head: of three layers with slices of three elements, which eight heads would leave, rounding x between the
        # layers alone moves dx by 1e-5 to 1e-4, and no result could be told from a wrong one.
        Shape("block3", (8, 24, 1024), 1, 1, operator="block", layers=3),
        Shape("block6", (8, 24, 1024), 1, 1, operator="block", layers=6, on_cpu=False),
        Shape("block3_features", (64, 512, 2048), -1, 8, operator="block", layers=3, on_cpu=False),
        Shape("block6_features", (64, 512, 2048), -1, 8, operator="block", layers=6, on_cpu=False),
        Shape("jepa", (32, 512, 1500), 2, 1, operator="gate", on_cpu=False),
        _ragged(256, 10, 4000, 512),
    )
}


@dataclass(frozen=True)
class Case:
    """One shape with its data: x and grad of the timed type, parameters in float32 (most are [heads, num_gaussians]).

    The parameters are float64 where x is, as a module converted with ``.double()`` would have them.
    """

    shape: Shape
    x: Tensor
    grad: Tensor
    parameters: dict[str, Tensor]

    @property
    def mean_offsets(self) -> Tensor:
        return self.parameters["mean_offsets"]

    @property
    def c(self) -> Tensor:
        return self.parameters["c"]

    @property
    def num_gaussians(self) -> int:
        return self.mean_offsets.shape[-1]
