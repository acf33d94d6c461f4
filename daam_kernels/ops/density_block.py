"""A block of residual layers in one sweep, as an operator: ``torch.ops.daam_kernels.density_block`` and its backward.

It takes layers that share axis, heads and options, and saves its input alone: Triton's backward works out the layers'
inputs anew on chip. Where slices do not fit, or another backend serves after all, the operator goes layer by layer.
As with ``density_attention``, eager calls on plain tensors go through an ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import resolve
from ..kernels.tiling import MOST_LAYERS, fits_block
from ..options import DensityOptions
from . import density_attention, eager
from . import density_attention as layers
from .registration import register

_TENSORS = "Tensor x, Tensor[] mean_offsets, Tensor[] c, Tensor? mask"
_OPTIONS = "int norm_axis, float? padding_value, str padding_stats, str normalize, float eps, str backend"

_library = torch.library.Library("daam_kernels", "FRAGMENT")
_library.define(f"density_block({_TENSORS}, {_OPTIONS}) -> Tensor")
_library.define(f"density_block_backward(Tensor grad, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor[], Tensor[])")


def serves(x: Tensor, backend: str) -> bool:
    """Whether a sweep over several layers can be had for a tensor like x: Triton's alone."""
    if backend != "triton" and not (backend == "auto" and x.is_cuda) or eager.is_transformed():
        return False
    # A graph may run on another machine than the one that traces it.
    return torch.compiler.is_compiling() or resolve(backend, x) == "triton"


def apply(
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    mask: Tensor | None,
    options: DensityOptions,
    backend: str,
) -> Tensor:
    """The last layer's y, in as few sweeps as slices of that length allow; differentiable.

    The arguments are checked already.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *mean_offsets, *c))
    at_once = _layers_at_once(x, c, mask, options, needs_grad) if serves(x, backend) else 1
    for first in range(0, len(c), at_once):
        sweep = slice(first, first + at_once)
        if len(c[sweep]) == 1:
            x = density_attention.apply(
                x, mean_offsets[first], c[first], None, mask, None, options, False, backend, None
            )
        else:
            x = _sweep(x, mean_offsets[sweep], c[sweep], mask, options, backend, needs_grad)
    return x


def _layers_at_once(
    x: Tensor, c: Sequence[Tensor], mask: Tensor | None, options: DensityOptions, needs_grad: bool
) -> int:
    """How many layers a sweep takes, the sweeps as even as can be."""
    most = min(len(c), MOST_LAYERS)
    while most > 1 and not _fits(x, c[:most], mask, options, needs_grad):
        most -= 1
    sweeps = -(-len(c) // most)
    return -(-len(c) // sweeps)


def _sweep(
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    mask: Tensor | None,
    options: DensityOptions,
    backend: str,
    needs_grad: bool,
) -> Tensor:
    if not eager.is_plain(x, *mean_offsets, *c, mask):
        operator = torch.ops.daam_kernels.density_block.default
        return operator(x, list(mean_offsets), list(c), mask, *options[:5], backend)
    backend = resolve(backend, x)
    if needs_grad:
        return _DensityBlock.apply(mask, options, backend, x, *mean_offsets, *c)
    return _block_forward(x, mean_offsets, c, mask, options, backend)


def _fits(x: Tensor, c: Sequence[Tensor], mask: Tensor | None, options: DensityOptions, backward: bool) -> bool:
    axis, padded = options.norm_axis, mask is not None or options.padding_value is not None
    columns = x.stride(axis) != 1
    return fits_block(x.shape[axis], c[0].shape[0], len(c), x.dtype.itemsize, backward, columns, padded)


def _layer_inputs(
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    mask: Tensor | None,
    options: DensityOptions,
    backend: str,
) -> list[Tensor]:
    """The input of every layer, and the last one's y, layer by layer."""
    inputs = [x]
    for layer in zip(mean_offsets, c):
        y, _ = layers.forward(inputs[-1], *layer, None, mask, None, options, False, None, backend)
        inputs.append(y)
    return inputs


def _block_forward(
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    mask: Tensor | None,
    options: DensityOptions,
    backend: str,
) -> Tensor:
    """y of a backend by its own name."""
    if backend != "triton" or not _fits(x, c, mask, options, False):
        return _layer_inputs(x, mean_offsets, c, mask, options, backend)[-1]
    from ..kernels.density_block import block_forward

    y = torch.empty_like(x)
    block_forward(x, mean_offsets, c, mask, options, y)
    return y


def _block_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    mask: Tensor | None,
    options: DensityOptions,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx, dmean_offsets of every layer, dc of every layer) of a backend by its own name."""
    if backend == "triton" and _fits(x, c, mask, options, True):
        from ..kernels.density_block import block_backward

        return block_backward(grad, x, mean_offsets, c, mask, options)
    inputs = _layer_inputs(x, mean_offsets, c, mask, options, backend)
    return _through_layers(
        lambda grad, *layer: layers.backward(grad, *layer, None, mask, None, None, options, backend),
        grad,
        inputs,
        mean_offsets,
        c,
    )


def _reference_gradients(grad, x, mean_offsets, c, mask, options):
    """The gradients in ordinary operations; a graph of them has derivatives of any order."""
    inputs = [x]
    for layer in zip(mean_offsets, c):
        inputs.append(layers.reference_forward(inputs[-1], *layer, None, mask, None, options, False))
    return _through_layers(
        lambda grad, *layer: layers.reference_backward(grad, *layer, None, mask, None, options),
        grad,
        inputs,
        mean_offsets,
        c,
    )


def _through_layers(backward, grad, inputs, mean_offsets, c):
    """(dx, dmean_offsets, dc) by ``backward`` of one layer after another, the last one first."""
    d_mean_offsets, d_c = [], []
    for layer in reversed(list(zip(inputs, mean_offsets, c))):
        grad, *gradients = backward(grad, *layer)
        for found, gradient in zip((d_mean_offsets, d_c), gradients):
            found.insert(0, gradient)
    return grad, d_mean_offsets, d_c


class _DensityBlock(torch.autograd.Function):
    """The eager path: no dispatcher between autograd and the kernel."""

    @staticmethod
    def forward(ctx, mask, options, backend, x, *parameters):
        ctx.save_for_backward(x, mask, *parameters)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return _block_forward(x, *_halves(parameters), mask, options, backend)

    @staticmethod
    def backward(ctx, grad):
        x, mask, *parameters = ctx.saved_tensors
        if grad is None:
            return (None,) * (4 + len(parameters))
        tensors = grad, x, *_halves(parameters), mask
        if torch.is_grad_enabled():
            dx, *gradients = _reference_gradients(*tensors, ctx.options)
        elif eager.is_plain(grad):
            dx, *gradients = _block_backward(*tensors, ctx.options, ctx.backend)
        else:
            operator = torch.ops.daam_kernels.density_block_backward.default
            dx, *gradients = operator(*tensors, *ctx.options[:5], ctx.backend)
        return None, None, None, dx, *gradients[0], *gradients[1]


def _halves(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(mean_offsets of every layer, c of every layer)"""
    half = len(parameters) // 2
    return list(parameters[:half]), list(parameters[half:])


def _operator(x, mean_offsets, c, mask, *rest):
    *options, backend = rest
    return _block_forward(x, mean_offsets, c, mask, DensityOptions(*options, residual=True), resolve(backend, x))


def _operator_backward(grad, x, mean_offsets, c, mask, *rest):
    *options, backend = rest
    options = DensityOptions(*options, residual=True)
    return _block_backward(grad, x, mean_offsets, c, mask, options, resolve(backend, x))


def _operator_fake(x, *_):
    return torch.empty_like(x)


def _operator_backward_fake(grad, x, mean_offsets, c, *_):
    contiguous = torch.contiguous_format
    gradients = ([torch.empty_like(t, memory_format=contiguous) for t in tensors] for tensors in (mean_offsets, c))
    return torch.empty_like(x), *gradients


def _setup_context(ctx, inputs, output):
    x, mean_offsets, c, mask, *options, ctx.backend = inputs
    ctx.options = DensityOptions(*options, residual=True)
    ctx.save_for_backward(x, mask, *mean_offsets, *c)
    ctx.set_materialize_grads(False)


def _operator_gradient(ctx, grad):
    x, mask, *parameters = ctx.saved_tensors
    if grad is None:
        dx, gradients = None, [[None] * (len(parameters) // 2)] * 2
    elif torch.is_grad_enabled():
        dx, *gradients = _reference_gradients(grad, x, *_halves(parameters), mask, ctx.options)
    else:
        operator = torch.ops.daam_kernels.density_block_backward.default
        dx, *gradients = operator(grad, x, *_halves(parameters), mask, *ctx.options[:5], ctx.backend)
    return dx, *gradients, None, *(None for _ in ctx.options[:5]), None


register(
    _library,
    "density_block",
    forward=(_operator, _operator_fake),
    backward=(_operator_backward, _operator_backward_fake),
    gradient=_operator_gradient,
    setup_context=_setup_context,
    eager="the block",
)
