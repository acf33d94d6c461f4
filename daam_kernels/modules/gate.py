"""The density gate of a speech encoder as a module.

Source: Ioannides et al., arXiv 2512.07168, and ``GAttnGateG`` of its public training code, whose parameters this
module has under the same names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_dense, check_first
from ..functional import BACKENDS, check_valid_mask, check_x, density_weights
from ..reference.gate import project, scale_frames


class FusedDensityGate(nn.Module):
    """Scale every frame by the density of a learned projection along time: y = x (1 + alpha gate).

    The density is that of :func:`daam_kernels.density_attention` with ``density="gate"``; the projection before it and
    the product with x are plain PyTorch operations. Source: arXiv 2512.07168, ``GAttnGateG``.

    Args:
        channels: channels of x.
        num_gaussians: number of Gaussians, the mean of whose normal densities is the gate.
        alpha: what the learned strength starts from.
        padding_stats: ``"exclude"`` leaves masked frames out, so that a sequence gets what it gets without padding;
            ``"zero"`` counts them as zeros in mean and variance of the projection.
        backend: as in :func:`daam_kernels.density_attention`.

    Parameters: ``to_attn.weight`` [1, channels, 1] and ``to_attn.bias`` [1], ``gaa.mean_offsets`` and
    ``gaa.log_sigma`` [num_gaussians], ``alpha`` [], as in the public code, so checkpoints travel both ways. Without
    padding that counts as zeros the bias makes no difference, and its gradient is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    density = "gate"

    def __init__(
        self,
        channels: int,
        num_gaussians: int = 4,
        alpha: float = 0.05,
        *,
        padding_stats: str = "exclude",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("channels", channels, 1)
        check_count("num_gaussians", num_gaussians, 1)
        self.channels = channels
        self.num_gaussians = num_gaussians
        self.initial_alpha = check_first("alpha", alpha, dtype)
        self.padding_stats = check_choice("padding_stats", padding_stats, ("zero", "exclude"))
        self.backend = check_choice("backend", backend, ("auto", *BACKENDS))
        options = dict(device=device, dtype=dtype)
        self.to_attn = nn.Conv1d(channels, 1, 1, **options)
        self.gaa = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(num_gaussians, **options)) for name in ("mean_offsets", "log_sigma")}
        )
        self.alpha = nn.Parameter(torch.empty((), **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters anew, as the public code does: the projection as torch does, offsets 0, log 0.5, alpha."""
        self.to_attn.reset_parameters()
        nn.init.zeros_(self.gaa["mean_offsets"])
        nn.init.constant_(self.gaa["log_sigma"], math.log(0.5))
        nn.init.constant_(self.alpha, self.initial_alpha)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, gate), both of x's type; the gate is part of the graph, as in the public code.

        Args:
            x: [batch, channels, time]. float64, float32, bfloat16 or float16.
            mask: boolean, [batch, time], or broadcastable to [batch, 1, time], True where a frame is valid.

        Returns:
            y: x's shape, x * (1 + alpha * gate) where a frame is valid, x where it is padding.
            gate: [batch, 1, time], the density. At padding it is 0 under ``padding_stats="exclude"``, what the formula
            gives under ``"zero"``.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        """
        check_x(x)
        if x.dim() != 3 or x.shape[1] != self.channels or x.shape[2] == 0:
            raise ValueError(
                f"x must have shape [batch, channels={self.channels}, time], time at least 1, got {list(x.shape)}"
            )
        if x.device != self.alpha.device:
            raise ValueError(f"x must be on the parameters' device, {self.alpha.device}, got {x.device}")
        valid = None if mask is None else _frames(mask, x).expand(x.shape[0], 1, x.shape[2])
        projected = project(x, self.to_attn.weight, self.to_attn.bias, valid, self.padding_stats)
        gaussians = (self.gaa[name].unsqueeze(0) for name in ("mean_offsets", "log_sigma"))
        gate = density_weights(
            projected, *gaussians, density="gate", mask=valid, padding_stats=self.padding_stats, backend=self.backend
        )
        return scale_frames(x, gate, self.alpha, valid)

    def upstream_state_dict(self) -> dict[str, Tensor]:
        """The parameters as the public code's module loads them: copies, detached, under the same names as here."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def extra_repr(self) -> str:
        shown = f"channels={self.channels}, num_gaussians={self.num_gaussians}, alpha={self.initial_alpha}"
        defaults = {"padding_stats": "exclude", "backend": "auto"}
        own = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join((shown, *(f"{name}={value!r}" for name, value in own.items())))


def _frames(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as one that broadcasts to [batch, 1, time]."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean tensor, got {type(mask).__name__}")
    check_dense("mask", mask)
    frames = mask.unsqueeze(1) if mask.dim() == 2 else mask
    target = (x.shape[0], 1, x.shape[2])
    fits = frames.dim() <= 3 and all(m in (1, n) for m, n in zip(frames.shape[::-1], target[::-1]))
    if not fits:
        raise ValueError(
            f"mask must have shape [batch={x.shape[0]}, time={x.shape[2]}] or broadcast to {list(target)}, "
            f"got {list(mask.shape)}"
        )
    check_valid_mask(frames, x)
    return frames
