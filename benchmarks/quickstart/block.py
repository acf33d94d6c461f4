"""The attention block alone, without the layers around it and the optimiser, and which backend computes it."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from daam_kernels import available_backends
from daam_kernels.backends import resolve

from ..timing import wall_timer


def block_timer(block: nn.Module, frames: Tensor) -> Callable[[], float]:
    """Seconds of one forward and backward of the block on frames [utterances, time, coefficients].

    The gradients are the parameters' alone, as in a training step: the block stands first, on the data.
    """
    grad, parameters = torch.ones_like(frames), tuple(block.parameters())
    return wall_timer([lambda: torch.autograd.grad(block(frames), parameters, grad)], frames.device)


def backends_of(block: nn.Module, frames: Tensor) -> list[str]:
    """The backends that the layers of a fused block run on for such frames, without repetition."""
    return sorted({resolve(layer.backend, frames) for layer in block.layers})


def backend_details(backends: Sequence[str], on_gpu: bool) -> str:
    """What these backends are; where plain PyTorch is among them, why there is no kernel."""
    found = available_backends()
    text = " and ".join(f"{name!r} ({found[name].reason})" for name in backends)
    wanted = "triton" if on_gpu else "native"
    if "reference" in backends and not found[wanted]:
        text += f"; {wanted!r} is not available: {found[wanted].reason}"
    return text
