"""The shapes that count, as the performance page lists them, and the tensors of one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One x: its dimensions, the axis that is normalised, in how many heads, and the layout in memory."""

    name: str
    dims: tuple[int, ...]
    norm_axis: int
    num_heads: int
    channels_last: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.dims)


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
    )
}


@dataclass(frozen=True)
class Case:
    """One shape with its data: x and grad of the timed type, parameters [num_heads, num_gaussians] in float32.

    The parameters are float64 where x is, as a module converted with ``.double()`` would have them.
    """

    shape: Shape
    x: Tensor
    grad: Tensor
    mean_offsets: Tensor
    c: Tensor


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device, num_gaussians: int, seed: int = 0) -> Case:
    """x and grad ~ N(0, 1), offsets ~ 0.05 N(0, 1), c = exp(N(0, 1)): the data of the numeric contract."""
    generator = torch.Generator(device).manual_seed(seed)
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator, device=device)

    def data() -> Tensor:
        return normal(*shape.dims).to(dtype).contiguous(memory_format=layout)

    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    heads = (shape.num_heads, num_gaussians)
    mean_offsets, c = (0.05 * normal(*heads)).to(of_parameters), normal(*heads).exp().to(of_parameters)
    return Case(shape, data().requires_grad_(), data(), mean_offsets, c)
