"""The tensors of a shape, drawn at random."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .operators import OPERATORS
from .shapes import Case, Shape


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device, num_gaussians: int, seed: int = 0) -> Case:
    """x and grad ~ N(0, 1), offsets ~ 0.05 N(0, 1), c = exp(N(0, 1)): the data of the numeric contract.

    ``num_gaussians`` counts where the shape does not say; the case's own shape always says.
    """
    generator = torch.Generator(device).manual_seed(seed)
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator, device=device)

    def data() -> Tensor:
        return normal(*shape.dims).to(dtype).contiguous(memory_format=layout)

    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    shape = replace(shape, num_gaussians=shape.num_gaussians or num_gaussians)
    drawn = OPERATORS[shape.operator].parameters(shape, shape.num_gaussians, normal)
    parameters = {name: value.to(of_parameters) for name, value in drawn.items()}
    return Case(shape, data().requires_grad_(), data(), parameters)
