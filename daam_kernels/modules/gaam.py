"""The first generation of the Gaussian attention as a module: many heads, each a mixture of Gaussians.

Source: the public code of arXiv 2401.11143 before its release on PyPI, ``MultiHeadGaussianAdaptiveAttention`` with
``initial_c`` and ``learnable_weights``, whose arguments, outputs and checkpoints this module takes (with one head also
those of its ``GaussianAdaptiveAttention``). One thing differs: that code drops the remainder of the axis over the heads
from its result; here the last head takes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_first
from .daam import HEADS, PARAMETERS, add_axis_of_heads, check_shape, MultiHead


class FusedMultiHeadGAAM(MultiHead):
    """Gaussian adaptive attention with many heads: y = x * w, w the normalised mixture of Gaussians of x itself.

    Drop-in for ``MultiHeadGaussianAdaptiveAttention`` of the first generation, whose checkpoints ``load_state_dict``
    takes. Source: the public code of arXiv 2401.11143, first generation.

    Args:
        norm_axis: the axis that is cut into heads, the last one taking the remainder; may be negative.
        num_heads: number of heads.
        num_gaussians: number of Gaussians of each head.
        initial_c: what the widths start from, in units of a slice's standard deviation: a number, or a tensor
            [num_gaussians].
        learnable_weights: True for weights that are learned, the softmax of which are the shares of the Gaussians; or
            the shares themselves, a tensor [num_gaussians], not negative, used as they are.
        padding_value: elements equal to it are padding. None: no such value.
        eps: positive, added to the variance and the floor of the normalising sum. Or one for each head, which costs
            one call per head.
        padding_stats, normalize, backend: as in :func:`daam_kernels.density_attention`.

    Parameters: ``mean_offsets``, ``c`` and ``weights``, all [num_heads, num_gaussians]; with given shares a buffer
    ``shares`` of that shape in the place of ``weights``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    _SHOWN = ("norm_axis", "num_heads", "num_gaussians", "initial_c", "learnable_weights", "padding_value", "eps")

    def __init__(
        self,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        initial_c: float | Tensor = 2,
        learnable_weights: bool | Tensor = True,
        padding_value: float | None = None,
        eps: float | Sequence[float] = 1e-8,
        *,
        padding_stats: str = "zero",
        normalize: str = "clamp",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_shape(norm_axis, num_heads, num_gaussians)
        super().__init__(
            num_heads, norm_axis, num_heads, num_gaussians, padding_value, 0, eps,
            padding_stats, normalize, backend, device, dtype,
        )  # fmt: skip
        self.initial_c = _check_initial_c(initial_c, num_gaussians, dtype)
        self.learnable_weights = _check_learnable_weights(learnable_weights, num_gaussians)
        weights = torch.empty(num_heads, num_gaussians, device=device, dtype=dtype)
        if self.learnable_weights is True:
            self.weights = nn.Parameter(weights)
        else:
            self.register_buffer("shares", weights)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters anew: offsets 0, ``c`` = ``initial_c``, weights 1 or the shares that were given."""
        nn.init.zeros_(self.mean_offsets)
        with torch.no_grad():
            self.c.copy_(_exact(self.initial_c))
        if self.learnable_weights is True:
            nn.init.ones_(self.weights)
        else:
            self.shares.copy_(_exact(self.learnable_weights))

    def gaussians(self) -> dict:
        learned = self.learnable_weights is True
        return super().gaussians() | {
            "density": "mixture",
            "weights": self.weights if learned else self.shares,
            "weights_softmax": learned,
        }

    def _parameter_names(self) -> tuple[str, ...]:
        return (*PARAMETERS, "weights") if self.learnable_weights is True else PARAMETERS

    def _own_state_dict(self, state_dict, prefix, errors):
        shares = prefix + "shares"
        is_public = any(key.startswith(prefix + HEADS) for key in state_dict)
        if self.num_heads == 1:
            is_public |= add_axis_of_heads(state_dict, prefix, self._parameter_names())
        if self.learnable_weights is not True and is_public and shares not in state_dict:
            # The public code keeps given shares out of its checkpoints; its first days put them there as a buffer.
            keys = [f"{prefix}{HEADS}{head}.fixed_weights" for head in range(self.num_heads)]
            if all(key in state_dict for key in keys):
                state_dict[shares] = torch.stack([state_dict.pop(key) for key in keys])
            else:
                given = _exact(self.learnable_weights).to(self.shares.dtype).expand(self.shares.shape)
                state_dict[shares] = given if self.shares.is_meta else self.shares
        return super()._own_state_dict(state_dict, prefix, errors)


def _check_initial_c(
    initial_c: float | Tensor, num_gaussians: int, dtype: torch.dtype | None
) -> float | tuple[float, ...]:
    """A number, or a tuple of one for each Gaussian."""
    if isinstance(initial_c, Tensor):
        initial_c = _numbers("initial_c", initial_c, num_gaussians)
    else:
        check_first("initial_c", initial_c, dtype)
    if initial_c == 0 or (isinstance(initial_c, tuple) and 0 in initial_c):
        raise ValueError(f"initial_c must not be 0, got {initial_c}")
    return initial_c


def _check_learnable_weights(learnable_weights: bool | Tensor, num_gaussians: int) -> bool | tuple[float, ...]:
    """True, or a tuple of the shares."""
    if learnable_weights is True:
        return True
    if learnable_weights is False:
        raise ValueError(
            f"learnable_weights must be True, or a tensor [{num_gaussians}] of the shares to use as they are: "
            "False alone does not say which, got False"
        )
    if not isinstance(learnable_weights, Tensor):
        raise TypeError(f"learnable_weights must be True or a tensor [{num_gaussians}], got {learnable_weights!r}")
    shares = _numbers("learnable_weights", learnable_weights, num_gaussians)
    if min(shares) < 0:
        raise ValueError(f"learnable_weights must not be negative, got {shares}")
    return shares


def _numbers(name: str, values: Tensor, num_gaussians: int) -> tuple[float, ...]:
    if values.shape != (num_gaussians,):
        raise ValueError(f"{name} must have shape [num_gaussians] = [{num_gaussians}], got {list(values.shape)}")
    if values.is_meta or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of real numbers, got {values.dtype} on {values.device}")
    numbers = tuple(values.double().tolist())
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be finite, got {numbers}")
    return numbers


def _exact(numbers: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
