"""The public functions: check the arguments, then call the operator. Validation lives here and only here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backends import BACKENDS
from .checks import FLOATING_TYPES, check_choice, check_dense, check_mask, check_max_seqlen, check_number, shape_of
from .ops import density_block as block
from .ops import eager
from .ops.density_attention import apply
from .options import DensityOptions
from .reference.gate import gate_widths

_DEFAULT_EPS = {"gaussian": 1e-5}
_DENSITIES = ("product", "mixture", "gate", "gaussian")


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
    eps: float | None = None,
    residual: bool = False,
    return_weights: bool = False,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weigh x by the density of its own values: fused density adaptive attention.

    Along ``norm_axis``, cut into heads, every slice of x is standardised with its own mean and variance, and multiplied
    with a density of its own values: the product or the mixture of num_gaussians learned Gaussians, normalised to sum
    to one; a gate, their mean normal density; or a Gaussian for each feature; these two are not normalised.
    Source: Ioannides et al., arXiv 2401.11143, Algorithm 2; the product is equal to the PyPI package
    gaussian-adaptive-attention, the mixture to the first generation of its public code. The gaussian is Algorithm 1,
    the gate arXiv 2512.07168.

    Args:
        x: float64, float32, bfloat16 or float16, any number of dimensions, any strides. ``norm_axis`` of size R is
            cut into num_heads chunks of R // num_heads, at least 2, or 1 for the gate and the gaussian, whose
            variances are the biased ones; the last head also takes the remainder.
        mean_offsets: [num_heads, num_gaussians], offsets of the Gaussians from a slice's mean, in units of x; of the
            gaussian [num_heads, features], features being the product of the sizes of x behind ``norm_axis``.
        c: of the same shape, their widths in units of a slice's standard deviation; only c^2 counts. Of the gate their
            widths are softplus(c) + 1e-3. Of the gaussian they are scales of the variance: linear, with a sign.
        density: for an element at distance d from its slice's mean, ``"product"`` of the Gaussians; their
            ``"mixture"``, sum_k share_k exp(-(d - offset_k)^2 / (2 var c_k^2)); the ``"gate"``, mean_k exp(-z_k^2 / 2)
            / (s_k sqrt(2 pi)), s_k = softplus(c_k) + 1e-3, z_k = (d - offset_k) / (sqrt(max(var, 1e-6)) s_k + eps); or
            the ``"gaussian"``, exp(-(d - offset)^2 / (2 c (var + 1e-8 + eps))).
        weights: [num_heads, num_gaussians], of the mixture alone, which needs them.
        weights_softmax: whether the softmax of ``weights`` over the Gaussians of a head is their shares; if not, they
            are the shares as they are, not negative, of any sum. A share of 0 is a Gaussian that is not there, and has
            no gradient. The shares are worked out in float64 for float64 weights or x, else in float32.
        norm_axis: the axis that statistics and weights are taken along; may be negative.
        padding_value: elements equal to it (rounded to x's type) are padding. None: no such value.
        mask: boolean, broadcastable to x, True where x is valid. With ``padding_value``, valid means both.
        padding_stats: ``"zero"`` counts padded elements as zeros in mean and variance and leaves their density in
            the sum, as the public package does; ``"exclude"`` ignores them altogether.
        normalize: ``"clamp"`` divides by max(sum, eps), as the public package does; ``"softmax"`` by the sum, and is
            refused for the gate and the gaussian, which divide by nothing.
        eps: positive, added to the variance and the floor of the sum; of the gate added to the Gaussians' widths. None:
            1e-5 for the gaussian, else 1e-8, as in the public codes.
        residual: add x to the result.
        return_weights: return (y, weights), the weights detached.
        backend: ``"auto"``, ``"triton"``, ``"native"``, ``"cuda"`` or ``"reference"``; see
            ``available_backends()``. The environment variable DAAM_KERNELS_BACKEND overrides auto.
        cu_seqlens: int32 or int64, [num_sequences + 1], on x's device, of sequences packed along ``norm_axis``, which
            must be 0: x is [total, *features], and sequence i its rows cu_seqlens[i] to cu_seqlens[i + 1]. It starts
            with 0 and ends with total. Every sequence is normalised by itself: heads are cut within it, and it has at
            least 2 elements for each (1 for the gate and the gaussian). On a GPU its numbers are read and checked once
            for each tensor, and again when that has changed, which waits for the GPU; while a CUDA graph is captured
            they are neither.
        max_seqlen: the length of the longest sequence, or more, from which Triton's tiles are chosen; None: read from
            ``cu_seqlens``. Needed while a CUDA graph is captured.

    A nested x of the jagged layout, [batch, j, *features], is taken as it is, with its ragged axis, 1, as
    ``norm_axis``: its values are packed sequences already, ``cu_seqlens`` its offsets. ``mask`` is then a nested tensor
    with the same offsets, or broadcasts to the values. No padding is made.

    Returns:
        y: x's shape, type and memory layout; x * weights where x is valid, x where it is padding.
        weights: with ``return_weights``, the same shape, type and layout. For a nested x both are nested, with its
            offsets. Of packed sequences with several axes of features, both may be contiguous instead.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        RuntimeError: the backend was asked for by name and cannot serve x.
    """
    call = None
    if density == "product" and weights is None and cu_seqlens is None and max_seqlen is None:
        call = eager.signature(
            x, mean_offsets, c, mask, return_weights,
            norm_axis, padding_value, padding_stats, normalize, eps, residual, backend,
        )  # fmt: skip
        run = eager.remembered(call)
        if run is not None:
            return run(x, mean_offsets, c)
    x_nested = None
    if isinstance(x, Tensor) and x.is_nested:
        x_nested = _check_nested(x, norm_axis, cu_seqlens)
        x, cu_seqlens, norm_axis = x.values(), x.offsets(), 0
        if isinstance(mask, Tensor) and mask.is_nested:
            mask = _check_nested_mask(mask, x_nested).values()
    options = _check_options(
        x, norm_axis, padding_value, padding_stats, normalize, eps, residual, density,
        max_seqlen=check_max_seqlen(max_seqlen, cu_seqlens),
    )  # fmt: skip
    if normalize != "clamp" and not options.normalised:
        raise ValueError(f"normalize must not be given for density={density!r}, whose weights are as they are")
    if (weights is None) != (density != "mixture"):
        what = "None" if weights is None else "them"
        raise ValueError(f"weights must be given for density='mixture', and for it alone, got {what} for {density!r}")
    arguments = mask, cu_seqlens, options, bool(return_weights), backend, call
    results = _attend(x, mean_offsets, c, weights, bool(weights_softmax), *arguments)
    if x_nested is None:
        return results
    return _map(lambda t: torch.nested.nested_tensor_from_jagged(t, x_nested.offsets()), results)


def density_weights(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    density: str,
    norm_axis: int = -1,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weights of the gate or the gaussian themselves, of x's shape, type and layout, and differentiable.

    For modules that weigh another tensor than x with them. Arguments and errors are those of
    :func:`density_attention`; at padding the weights are what the formula gives, or 0 where it is excluded.
    """
    check_choice("density", density, ("gate", "gaussian"))
    options = _check_options(x, norm_axis, None, padding_stats, "clamp", eps, False, density, multiply=False)
    return _attend(x, mean_offsets, c, None, False, mask, None, options, False, backend, None)


def _attend(x, mean_offsets, c, weights, weights_softmax, mask, cu_seqlens, options, return_weights, backend, call):
    """What is left to check once the options are, and then the operator."""
    if options.density == "gaussian":
        _check_gaussians(x, math.prod(x.shape[options.norm_axis + 1 :]), mean_offsets=mean_offsets, c=c)
    else:
        _check_gaussians(x, mean_offsets=mean_offsets, c=c)
    if weights is not None:
        _check_gaussians(x, mean_offsets=mean_offsets, weights=weights)
    if cu_seqlens is None:
        check_heads(x.shape[options.norm_axis], mean_offsets.shape[0], options.norm_axis, options.fewest)
    else:
        _check_cu_seqlens(cu_seqlens, x, options.norm_axis)
    if mask is not None:
        check_valid_mask(mask, x)
    check_choice("backend", backend, ("auto", *BACKENDS))
    log_shares = None if weights is None else _log_shares(_worked_with(weights, x), weights_softmax)
    if options.density == "gate":
        c, log_shares = gate_widths(_worked_with(c, x))
    arguments = options, return_weights, backend, call
    if cu_seqlens is None:
        return apply(x, mean_offsets, c, log_shares, mask, None, *arguments)
    shape = x.shape
    mask = None if mask is None else _rows_of_features(mask.expand(shape))
    results = apply(_rows_of_features(x), mean_offsets, c, log_shares, mask, cu_seqlens.contiguous(), *arguments)
    return results if len(shape) == 2 else _map(lambda t: t.reshape(shape), results)


def _rows_of_features(x: Tensor) -> Tensor:
    """[total, *features] as [total, features]."""
    return x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)


def _map(function: Callable[[Tensor], Tensor], results: Tensor | tuple[Tensor, Tensor]):
    """The function of y, or of y and the weights."""
    return tuple(map(function, results)) if isinstance(results, tuple) else function(results)


def density_block(
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    *,
    norm_axis: int = -1,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    normalize: str = "clamp",
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """Residual layers of density attention, each of which adds its own input's, with one axis and number of heads.

    On Triton all layers run in one sweep where a slice fits on chip, else as many as possible; other backends go layer
    by layer. Between layers x is rounded to its type either way.
    Source: Ioannides et al., arXiv 2401.11143, Algorithm 4.

    Args:
        x: as in :func:`density_attention`.
        mean_offsets, c: one tensor [num_heads, num_gaussians] for each layer; num_gaussians may differ.
        padding_value: elements of a layer's input equal to it are padding, so a value other than 0, which the first
            layer doubles, is lost after it.
        mask: the same for every layer.
        norm_axis, padding_stats, normalize, eps, backend: as in :func:`density_attention`, of every layer.

    Returns:
        the last layer's output, of x's shape, type and memory layout; x itself where there are no layers.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it got and what it takes.
        RuntimeError: the backend was asked for by name and cannot serve x.
    """
    if isinstance(x, Tensor) and x.is_nested:
        raise TypeError("x must be one dense tensor, got a nested one: call density_attention layer by layer")
    options = _check_options(x, norm_axis, padding_value, padding_stats, normalize, eps, True, "product")
    for name, layers in (("mean_offsets", mean_offsets), ("c", c)):
        if not isinstance(layers, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, one for each layer, got {type(layers).__name__}")
    if len(mean_offsets) != len(c):
        raise ValueError(f"mean_offsets and c must have one length, got {len(mean_offsets)} and {len(c)} layers")
    for layer in range(len(c)):
        _check_gaussians(x, **{f"mean_offsets[{layer}]": mean_offsets[layer], f"c[{layer}]": c[layer]})
        if len(c[layer]) != len(c[0]):
            raise ValueError(
                f"c must have the {len(c[0])} heads of c[0] in every layer, got {len(c[layer])} in c[{layer}]"
            )
        check_heads(x.shape[options.norm_axis], len(c[0]), options.norm_axis)
    if mask is not None:
        check_valid_mask(mask, x)
    check_choice("backend", backend, ("auto", *BACKENDS))
    return block.apply(x, mean_offsets, c, mask, options, backend)


def sweeps_blocks(x: Tensor, backend: str) -> bool:
    """Whether :func:`density_block` can take several layers of tensors like x in a sweep."""
    return isinstance(x, Tensor) and not x.is_nested and block.serves(x, backend)


def _check_options(
    x: Tensor,
    norm_axis: int,
    padding_value: float | None,
    padding_stats: str,
    normalize: str,
    eps: float | None,
    residual: bool,
    density: str,
    **others,
) -> DensityOptions:
    check_x(x)
    check_choice("density", density, _DENSITIES)
    return DensityOptions(
        check_axis(norm_axis, x),
        check_padding_value(padding_value),
        check_choice("padding_stats", padding_stats, ("zero", "exclude")),
        check_choice("normalize", normalize, ("clamp", "softmax")),
        _check_eps(_DEFAULT_EPS.get(density, 1e-8) if eps is None else eps, x),
        bool(residual),
        density,
        **others,
    )


def _worked_with(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter in the arithmetic type, or in its own where that is more exact."""
    return parameter.to(torch.promote_types(torch.promote_types(parameter.dtype, x.dtype), torch.float32))


def _log_shares(weights: Tensor, softmax: bool) -> Tensor:
    """Logarithms of the shares of a mixture's Gaussians, -inf for one that is not there."""
    if softmax:
        return weights.log_softmax(1).contiguous()
    absent = weights == 0  # log 0 has no gradient: the way back must not meet it
    return torch.where(absent, -math.inf, torch.where(absent, 1, weights).log()).contiguous()


def check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING_TYPES:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    check_dense("x", x)


def check_axis(norm_axis: int, x: Tensor) -> int:
    """The axis of x, counted from 0."""
    if isinstance(norm_axis, bool) or not isinstance(norm_axis, (int, torch.SymInt)):
        raise TypeError(f"norm_axis must be an int, got {type(norm_axis).__name__}")
    dims = x.dim()
    if dims == 0:
        raise ValueError("x must have at least 1 dimension, got a scalar tensor")
    if not -dims <= norm_axis < dims:
        raise ValueError(f"norm_axis must be in [{-dims}, {dims - 1}] for x of shape {shape_of(x)}, got {norm_axis}")
    return norm_axis % dims


def _check_gaussians(x: Tensor, features: int | None = None, **parameters: Tensor) -> None:
    """Parameters of the shape [num_heads, num_gaussians], or of [num_heads, features] where there are any."""
    columns = "num_gaussians" if features is None else f"features={features}"
    for name, parameter in parameters.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
        if not parameter.dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating-point type, got {parameter.dtype}")
        check_dense(name, parameter)
        if parameter.dim() != 2 or 0 in parameter.shape:
            raise ValueError(
                f"{name} must have shape [num_heads, {columns}], both at least 1, got {shape_of(parameter)}"
            )
        if features is not None and parameter.shape[1] != features:
            raise ValueError(
                f"{name} must have shape [num_heads, {columns}], as x's axes behind norm_axis have that many elements, "
                f"got {shape_of(parameter)}"
            )
        if parameter.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {parameter.device}")
    first, second = parameters.values()
    if first.shape != second.shape:
        raise ValueError(
            f"{' and '.join(parameters)} must have the same shape [num_heads, {columns}], "
            f"got {shape_of(first)} and {shape_of(second)}"
        )


def check_heads(length: int, num_heads: int, axis: int, fewest: int = 2) -> None:
    if length < fewest * num_heads:
        raise ValueError(
            f"x must have at least {fewest} element{'s' * (fewest > 1)} per head along norm_axis: its size along axis "
            f"{axis} is {length}, and {num_heads} head(s) take at least {fewest * num_heads}"
        )


def _check_nested(x: Tensor, norm_axis: int, cu_seqlens: Tensor | None) -> Tensor:
    if x.layout != torch.jagged:
        raise ValueError(
            f"x must be dense or a nested tensor of the layout torch.jagged, got a nested one of {x.layout}"
        )
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None for a nested x, which has offsets of its own")
    if x._ragged_idx != 1:
        raise ValueError(f"x, a nested tensor, must have its ragged axis at 1, got it at {x._ragged_idx}")
    if x.lengths() is not None:
        raise ValueError(
            "x, a nested tensor, must have sequences that follow one another without gaps, got one with lengths() of "
            "its own; x.contiguous() has none"
        )
    if check_axis(norm_axis, x) != 1:
        raise ValueError(
            f"norm_axis must be the ragged axis of a nested x, 1 or {1 - x.dim()}, got {norm_axis}: "
            "pass norm_axis=1, or x.values() for another axis"
        )
    return x


def _check_nested_mask(mask: Tensor, x: Tensor) -> Tensor:
    if mask.layout != torch.jagged or mask.lengths() is not None or mask.offsets() is not x.offsets():
        raise ValueError("mask, a nested tensor, must be of the layout torch.jagged with x's own offsets")
    return mask


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, axis: int) -> None:
    """All but its numbers, which are checked where they are there."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [num_sequences + 1], got {shape_of(cu_seqlens)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on x's device, {x.device}, got {cu_seqlens.device}")
    if axis != 0:
        raise ValueError(
            f"norm_axis must be 0, the packed axis of x, where cu_seqlens is given, got axis {axis} of x of shape "
            f"{shape_of(x)}: pass norm_axis=0"
        )


def check_valid_mask(mask: Tensor, x: Tensor) -> None:
    check_mask("mask", mask, "where x is valid", "x", x)
    fits = mask.dim() <= x.dim() and all(m == 1 or m == n for m, n in zip(mask.shape[::-1], x.shape[::-1]))
    if not fits:
        raise ValueError(f"mask must broadcast to x's shape {shape_of(x)}, got {shape_of(mask)}")


def check_padding_value(padding_value: float | None) -> float | None:
    if padding_value is None:
        return None
    return check_number("padding_value", padding_value, "a number or None")


def _check_eps(eps: float, x: Tensor) -> float:
    eps = check_number("eps", eps)
    if not 0 < eps < math.inf:  # comparisons alone: torch.compile may hand over a symbol for a number
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if x.dtype != torch.float64 and eps <= 2.0**-150:  # float32's smallest number is 2^-149, ties round to even
        raise ValueError(f"eps must not round to 0 in the arithmetic of x's type, {x.dtype}, got {eps}")
    return eps
