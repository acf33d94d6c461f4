"""The paper's per-feature density attention as a module: many heads over an encoder's layers, a Gaussian per feature.

Source: Ioannides et al., arXiv 2401.11143, Algorithm 1, and ``MultiHeadDAAM`` of its public code, whose checkpoints
this module takes. Beyond one time step that code reshapes time and features into each other and averages y over time;
here the density is that of the true mean over time, and y keeps its time steps.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_finite, check_first
from ..functional import (
    BACKENDS,
    check_padding_value,
    check_valid_mask,
    check_x,
    density_attention,
    density_weights,
)
from ..reference.feature import mean_over_time, weigh_time_steps
from ..reference.statistics import valid_elements

_HEADS = ("daams", "gcts")  # what the public code calls its list of heads
_PUBLIC_NAMES = {"c": "c", "mean_offset": "mean_offsets"}  # of a head's parameters there, in its order, and ours


class FusedMultiHeadFeatureDAAM(nn.Module):
    """Per-feature density attention over layers: y = x * w, w the Gaussian of each feature among its head's layers.

    ``DAAMv1`` (8 heads) and ``DAAMv2`` (1 head) of the paper, by :func:`daam_kernels.density_attention` with
    ``density="gaussian"``; with a time axis the mean over it and the product with x are plain PyTorch operations.
    Source: arXiv 2401.11143, Algorithm 1.

    Args:
        num_layers: layers of the encoder, cut into heads; the last head takes the remainder.
        feature_size: features of a layer.
        num_heads: number of heads, at most num_layers.
        c: what the scales start from, not 0; the Gaussian is exp(-(d - offset)^2 / (2 c (var + eps))).
        eps: positive, added to the variance.
        padding_value: elements equal to it are padding. None: no such value.
        padding_stats: ``"zero"`` counts padding as zeros in the means over time and layers and in the variance,
            ``"exclude"`` leaves it out.
        backend: as in :func:`daam_kernels.density_attention`.

    Parameters: ``mean_offsets`` and ``c``, both [num_heads, feature_size]. ``c`` is linear, its sign is kept.
    ``load_state_dict`` also takes the public code's, ``daams.0.c``, ``daams.0.mean_offset``, ... or ``gcts.0.c``, ...,
    each [1, feature_size].

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
    """

    density = "gaussian"

    def __init__(
        self,
        num_layers: int,
        feature_size: int,
        num_heads: int = 8,
        c: float = 2,
        eps: float = 1e-5,
        *,
        padding_value: float | None = None,
        padding_stats: str = "zero",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), ("feature_size", feature_size), ("num_heads", num_heads)):
            check_count(name, value, 1)
        if num_heads > num_layers:
            raise ValueError(f"num_heads must be at most num_layers={num_layers}, got {num_heads}")
        self.initial_c = check_first("c", c, dtype)
        if c == 0:
            raise ValueError(f"c must not be 0, got {c}")
        if check_finite("eps", eps) <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        check_padding_value(padding_value)
        self.num_layers = num_layers
        self.feature_size = feature_size
        self.num_heads = num_heads
        self.eps = eps
        self.padding_value = padding_value
        self.padding_stats = check_choice("padding_stats", padding_stats, ("zero", "exclude"))
        self.backend = check_choice("backend", backend, ("auto", *BACKENDS))
        self.mean_offsets = nn.Parameter(torch.empty(num_heads, feature_size, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.empty(num_heads, feature_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters anew: offsets 0, scales the ``c`` of the constructor."""
        nn.init.zeros_(self.mean_offsets)
        nn.init.constant_(self.c, self.initial_c)

    def forward(
        self,
        x: Tensor,
        return_attention_details: bool = False,
        *,
        mask: Tensor | None = None,
        residual: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y = x * weights(x), or (y, weights), the weights detached; both of x's shape and type.

        Padding is x in y. Its weights are what the formula gives under ``padding_stats="zero"``, and 0 under
        ``"exclude"``.

        Args:
            x: [batch, num_layers, feature_size], or [batch, num_layers, time, feature_size], where the density of the
                mean over time weighs every time step. float64, float32, bfloat16 or float16.
            return_attention_details: return (y, weights).
            mask: boolean, broadcastable to x, True where x is valid. With ``padding_value``, valid means both.
            residual: add x to the result.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, what it got and what it takes.
        """
        check_x(x)
        layers, features = self.num_layers, self.feature_size
        if x.dim() not in (3, 4) or x.shape[1] != layers or x.shape[-1] != features or x.shape[-2] == 0:
            raise ValueError(
                f"x must have shape [batch, num_layers={layers}, feature_size={features}] or "
                f"[batch, num_layers={layers}, time, feature_size={features}], time at least 1, got {list(x.shape)}"
            )
        gaussians = self.mean_offsets, self.c
        options = dict(density="gaussian", norm_axis=1, padding_stats=self.padding_stats, eps=self.eps)
        options["backend"] = self.backend
        returned = dict(residual=residual, return_weights=return_attention_details)
        if x.dim() == 3:
            return density_attention(x, *gaussians, padding_value=self.padding_value, mask=mask, **options, **returned)
        if mask is not None:
            check_valid_mask(mask, x)
        valid = valid_elements(x, self.padding_value, mask)
        mean, counted = mean_over_time(x, valid, self.padding_stats)
        weights = density_weights(mean, *gaussians, mask=counted, **options)
        return weigh_time_steps(x, weights, valid, self.padding_stats, **returned)

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in ("num_layers", "feature_size", "num_heads")}
        shown |= {"c": self.initial_c, "eps": self.eps}
        defaults = {"padding_value": None, "padding_stats": "zero", "backend": "auto"}
        shown |= {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def upstream_state_dict(self, heads: str = "daams") -> dict[str, Tensor]:
        """The parameters as the public code's module loads them: copies, detached, [1, feature_size] each.

        Args:
            heads: what that module calls its list of heads, ``"daams"`` or ``"gcts"``.
        """
        check_choice("heads", heads, _HEADS)
        return {
            f"{heads}.{head}.{name}": getattr(self, own).detach()[head : head + 1].clone()
            for head in range(self.num_heads)
            for name, own in _PUBLIC_NAMES.items()
        }

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = dict(state_dict)
        absent = self._take_public_heads(own, prefix, errors)
        named: list[str] = []
        super()._load_from_state_dict(own, prefix, metadata, strict, named, unexpected, errors)
        missing += [key for name in named for key in absent.get(name, [name])]

    def _take_public_heads(self, state_dict: dict, prefix: str, errors: list[str]) -> dict[str, list[str]]:
        """Turn the public code's heads in ``state_dict`` into our parameters; the keys to report for each one it lacks.

        What is there as ours already stays so. What cannot be right, strict or not, is added to ``errors``.
        """
        pattern = re.compile(re.escape(prefix) + rf"({'|'.join(_HEADS)})\.(0|[1-9][0-9]*)\.({'|'.join(_PUBLIC_NAMES)})")
        found = [match for match in map(pattern.fullmatch, state_dict) if match]
        spelling = next((heads for heads in _HEADS if any(match[1] == heads for match in found)), None)
        found = [
            match for match in found if match[1] == spelling and prefix + _PUBLIC_NAMES[match[3]] not in state_dict
        ]
        if not found:
            return {}
        count = 1 + max(int(match[2]) for match in found)
        if count != self.num_heads:
            errors.append(
                f"the checkpoint has {count} heads at {f'{prefix}{spelling}.*'!r}, "
                f"and this module has num_heads={self.num_heads}"
            )
        taken = {match[0]: state_dict.pop(match[0]) for match in found}
        wrong = {key: list(t.shape) for key, t in taken.items() if t.shape != (1, self.feature_size)}
        errors += [f"{key} must have shape [1, feature_size={self.feature_size}], got {wrong[key]}" for key in wrong]
        absent = {}
        for name, own in _PUBLIC_NAMES.items():
            keys = [f"{prefix}{spelling}.{head}.{name}" for head in range(self.num_heads)]
            absent[prefix + own] = [key for key in keys if key not in taken]
            if count != self.num_heads or wrong:
                absent[prefix + own] = []  # said above, better
            elif not absent[prefix + own]:
                state_dict[prefix + own] = torch.cat([taken[key] for key in keys])
        return absent
