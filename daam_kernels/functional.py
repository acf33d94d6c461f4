"""The public functions: check the arguments, then call the operator. Validation lives here and only here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import BACKENDS
from .ops import eager
from .ops.density_attention import apply
from .options import DensityOptions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DENSITIES = ("product", "mixture")


def density_attention(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    density: str = "product",
    weights: Tensor | None = None,
    weights_softmax: bool = True,
    norm_axis: int = -1,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    normalize: str = "clamp",
    eps: float = 1e-8,
    residual: bool = False,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Weigh x by the density of its own values: fused density adaptive attention.

    Along ``norm_axis``, cut into heads, every slice of x is standardised with its own mean and variance, weighed
    by the product or the mixture of num_gaussians learned Gaussians, normalised to sum to one, and multiplied with x.
    Source: Ioannides et al., arXiv 2401.11143, Algorithm 2; the product is equal to the PyPI package
    gaussian-adaptive-attention, the mixture to the first generation of its public code.

    Args:
        x: float64, float32, bfloat16 or float16, any number of dimensions, any strides. ``norm_axis`` of size R is
            cut into num_heads chunks of R // num_heads, at least 2; the last head also takes the remainder.
        mean_offsets: [num_heads, num_gaussians], offsets of the Gaussians from a slice's mean, in units of x.
        c: [num_heads, num_gaussians], their widths in units of a slice's standard deviation; only c^2 counts.
        density: ``"product"`` of the Gaussians, or their ``"mixture"``, sum_k share_k exp(-(d - offset_k)^2 / (2 var
            c_k^2)) for an element at distance d from its slice's mean.
        weights: [num_heads, num_gaussians], of the mixture alone, which needs them.
        weights_softmax: whether the softmax of ``weights`` over the Gaussians of a head is their shares; if not, they
            are the shares as they are, not negative, of any sum. A share of 0 is a Gaussian that is not there, and has
            no gradient. The shares are worked out in float64 for float64 weights, else in float32.
        norm_axis: the axis that statistics and weights are taken along; may be negative.
        padding_value: elements equal to it (rounded to x's type) are padding. None: no such value.
        mask: boolean, broadcastable to x, True where x is valid. With ``padding_value``, valid means both.
        padding_stats: ``"zero"`` counts padded elements as zeros in mean and variance and leaves their density in
            the sum, as the public package does; ``"exclude"`` ignores them altogether.
        normalize: ``"clamp"`` divides by max(sum, eps), as the public package does; ``"softmax"`` by the sum.
        eps: positive, added to the variance and the floor of the sum.
        residual: add x to the result.
        return_weights: return (y, weights), the weights detached.
        backend: ``"auto"``, ``"triton"``, ``"native"``, ``"cuda"`` or ``"reference"``; see
            ``available_backends()``. The environment variable DAAM_KERNELS_BACKEND overrides auto.

    Returns:
        y: x's shape, type and memory layout; x * weights where x is valid, x where it is padding.
        weights: with ``return_weights``, the same shape, type and layout.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        RuntimeError: the backend was asked for by name and cannot serve x.
    """
    call = None
    if density == "product" and weights is None:
        call = eager.signature(
            x, mean_offsets, c, mask, return_weights,
            norm_axis, padding_value, padding_stats, normalize, eps, residual, backend,
        )  # fmt: skip
        run = eager.remembered(call)
        if run is not None:
            return run(x, mean_offsets, c)
    options = DensityOptions(
        _check_axis(norm_axis, x),
        _check_padding_value(padding_value),
        _check_choice("padding_stats", padding_stats, ("zero", "exclude")),
        _check_choice("normalize", normalize, ("clamp", "softmax")),
        _check_eps(eps, x),
        bool(residual),
        _check_choice("density", density, _DENSITIES),
    )
    _check_gaussians(x, mean_offsets=mean_offsets, c=c)
    if (weights is None) != (density == "product"):
        what = "None" if weights is None else "them"
        raise ValueError(f"weights must be given for density='mixture', and for it alone, got {what} for {density!r}")
    if weights is not None:
        _check_gaussians(x, mean_offsets=mean_offsets, weights=weights)
    _check_heads(x.shape[options.norm_axis], mean_offsets.shape[0], options.norm_axis)
    if mask is not None:
        _check_mask(mask, x)
    _check_choice("backend", backend, ("auto", *BACKENDS))
    log_shares = None if weights is None else _log_shares(weights, bool(weights_softmax))
    return apply(x, mean_offsets, c, log_shares, mask, options, bool(return_weights), backend, call)


def _log_shares(weights: Tensor, softmax: bool) -> Tensor:
    """Logarithms of the shares of a mixture's Gaussians, -inf for one that is not there."""
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if softmax:
        return weights.log_softmax(1).contiguous()
    absent = weights == 0  # log 0 has no gradient: the way back must not meet it
    return torch.where(absent, -math.inf, torch.where(absent, 1, weights).log()).contiguous()


def _check_axis(norm_axis: int, x: Tensor) -> int:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if isinstance(norm_axis, bool) or not isinstance(norm_axis, (int, torch.SymInt)):
        raise TypeError(f"norm_axis must be an int, got {type(norm_axis).__name__}")
    dims = x.dim()
    if dims == 0:
        raise ValueError("x must have at least 1 dimension, got a scalar tensor")
    if not -dims <= norm_axis < dims:
        raise ValueError(f"norm_axis must be in [{-dims}, {dims - 1}] for x of shape {_shape(x)}, got {norm_axis}")
    return norm_axis % dims


def _check_gaussians(x: Tensor, **parameters: Tensor) -> None:
    for name, parameter in parameters.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
        if not parameter.dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating-point type, got {parameter.dtype}")
        if parameter.dim() != 2 or 0 in parameter.shape:
            raise ValueError(
                f"{name} must have shape [num_heads, num_gaussians], both at least 1, got {_shape(parameter)}"
            )
        if parameter.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {parameter.device}")
    first, second = parameters.values()
    if first.shape != second.shape:
        raise ValueError(
            f"{' and '.join(parameters)} must have the same shape [num_heads, num_gaussians], "
            f"got {_shape(first)} and {_shape(second)}"
        )


def _check_heads(length: int, num_heads: int, axis: int) -> None:
    if length < 2 * num_heads:
        raise ValueError(
            f"x must have at least 2 elements per head along norm_axis: its size along axis {axis} is {length}, "
            f"and {num_heads} head(s) take at least {2 * num_heads}"
        )


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, True where x is valid, got {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on x's device, {x.device}, got {mask.device}")
    fits = mask.dim() <= x.dim() and all(m == 1 or m == n for m, n in zip(mask.shape[::-1], x.shape[::-1]))
    if not fits:
        raise ValueError(f"mask must broadcast to x's shape {_shape(x)}, got {_shape(mask)}")


def _check_padding_value(padding_value: float | None) -> float | None:
    if padding_value is None:
        return None
    if isinstance(padding_value, bool) or not isinstance(padding_value, (int, float)):
        raise TypeError(f"padding_value must be a number or None, got {type(padding_value).__name__}")
    return float(padding_value)


def _check_eps(eps: float, x: Tensor) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:  # comparisons alone: torch.compile may hand over a symbol for a number
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if x.dtype != torch.float64 and eps <= 2.0**-150:  # float32's smallest number is 2^-149, ties round to even
        raise ValueError(f"eps must not round to 0 in the arithmetic of x's type, {x.dtype}, got {eps}")
    return float(eps)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)
