"""Density attention as an operator: ``torch.ops.daam_kernels.density_attention`` and its backward.

Eager calls on plain tensors go through a context-style ``autograd.Function`` straight to the backend, because a
registered operator costs several times a small kernel in Python. Everything that must see an operator (torch.compile,
export, fake tensors, dispatch modes, tensor subclasses) gets the registered one. Both end in ``forward`` and
``backward`` below, so both give the same bits. torch.func and forward-mode AD get the reference's ordinary operations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..backends import resolve
from ..options import DensityOptions

_MIN_SAVED = 64  # shorter slices recompute their statistics: saving them would move as many bytes as x does
_ALWAYS_SAVED = 1024  # a last head with that long a remainder may not fit one block, and then needs them

_OPTIONS = "int norm_axis, float? padding_value, str padding_stats, str normalize, float eps, bool residual"

_library = torch.library.Library("daam_kernels", "DEF")
_library.define(
    f"density_attention(Tensor x, Tensor mean_offsets, Tensor c, Tensor? mask, {_OPTIONS}, "
    "bool return_weights, bool save_stats, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"density_attention_backward(Tensor grad, Tensor x, Tensor mean_offsets, Tensor c, Tensor? mask, Tensor stats, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)"
)


def apply(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    options: DensityOptions,
    return_weights: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, weights) with ``return_weights``; differentiable. The arguments are checked already."""
    if _is_transformed():
        resolve(backend, x)
        return reference.density_attention(
            x, mean_offsets, c, mask=mask, return_weights=return_weights, **options._asdict()
        )
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or mean_offsets.requires_grad or c.requires_grad)
    if not _is_plain_eager(x, mean_offsets, c, mask):
        operator = torch.ops.daam_kernels.density_attention.default
        y, weights, _ = operator(x, mean_offsets, c, mask, *options, return_weights, needs_grad, backend)
    elif needs_grad:
        y, weights = _DensityAttention.apply(x, mean_offsets, c, mask, options, return_weights, backend)
    else:
        y, weights, _ = forward(x, mean_offsets, c, mask, options, return_weights, False, backend)
    return (y, weights) if return_weights else y


def forward(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    options: DensityOptions,
    return_weights: bool,
    save_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, weights, stats) from the backend that serves x; weights and stats are empty where not asked for.

    stats is [3, slices] in the arithmetic type, for slices of at least 64 elements: x0, mean - x0 and the variance,
    in an order of the backend's own, which its backward knows.
    """
    stats = x.new_empty(_stats_shape(x, mean_offsets, options, save_stats), dtype=_arithmetic_type(x))
    if resolve(backend, x) == "triton":
        from ..kernels.density_forward import density_forward

        y = torch.empty_like(x)
        weights = torch.empty_like(x) if return_weights else x.new_empty(0)
        wanted = (weights if return_weights else None, stats if stats.numel() else None)
        density_forward(x, mean_offsets, c, mask, options, y, *wanted)
        return y, weights, stats
    arguments = options._asdict()
    with torch.no_grad():
        result = reference.density_attention(x, mean_offsets, c, mask=mask, return_weights=return_weights, **arguments)
    y, weights = result if return_weights else (result, x.new_empty(0))
    return _as_layout(y, x), _as_layout(weights, x) if return_weights else weights, stats.zero_()


def backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    options: DensityOptions,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dmean_offsets, dc) from the backend that serves x; stats are what its forward saved, or empty."""
    if resolve(backend, x) == "triton":
        from ..kernels.density_backward import density_backward

        return density_backward(grad, x, mean_offsets, c, mask, stats if stats.numel() else None, options)
    with torch.no_grad():
        dx, dmean_offsets, dc = reference.density_attention_backward(
            grad, x, mean_offsets, c, mask=mask, **options._asdict()
        )
    return _as_layout(dx, x), dmean_offsets, dc


class _DensityAttention(torch.autograd.Function):
    """The eager path: no dispatcher between autograd and the kernel."""

    @staticmethod
    def forward(ctx, x, mean_offsets, c, mask, options, return_weights, backend):
        backend = resolve(backend, x)  # once: the backward must be the one that knows what this forward saved
        save_stats = backend != "reference"
        y, weights, stats = forward(x, mean_offsets, c, mask, options, return_weights, save_stats, backend)
        ctx.save_for_backward(x, mean_offsets, c, mask, stats)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return y, weights

    @staticmethod
    def backward(ctx, grad, _weights):
        if grad is None:
            return (None,) * 7
        x, mean_offsets, c, mask, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _differentiable_backward(grad, x, mean_offsets, c, mask, ctx.options)
        else:
            gradients = backward(grad, x, mean_offsets, c, mask, stats, ctx.options, ctx.backend)
        return (*gradients, None, None, None, None)


def _differentiable_backward(grad, x, mean_offsets, c, mask, options):
    """The gradient in ordinary operations, taken where a graph of it was asked for: derivatives of any order."""
    return reference.density_attention_backward(grad, x, mean_offsets, c, mask=mask, **options._asdict())


def _operator(x, mean_offsets, c, mask, *rest):
    *options, return_weights, save_stats, backend = rest
    return forward(x, mean_offsets, c, mask, DensityOptions(*options), return_weights, save_stats, backend)


def _operator_fake(x, mean_offsets, c, mask, *rest):
    *options, return_weights, save_stats, _ = rest
    stats_shape = _stats_shape(x, mean_offsets, DensityOptions(*options), save_stats)
    weights = torch.empty_like(x) if return_weights else x.new_empty(0)
    return torch.empty_like(x), weights, x.new_empty(stats_shape, dtype=_arithmetic_type(x))


def _operator_backward(grad, x, mean_offsets, c, mask, stats, *rest):
    *options, backend = rest
    return backward(grad, x, mean_offsets, c, mask, stats, DensityOptions(*options), backend)


def _operator_backward_fake(grad, x, mean_offsets, c, mask, stats, *rest):
    return tuple(torch.empty_like(t, memory_format=m) for t, m in _gradient_layouts(x, mean_offsets, c))


def _gradient_layouts(x, mean_offsets, c):
    return (x, torch.preserve_format), (mean_offsets, torch.contiguous_format), (c, torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    x, mean_offsets, c, mask, *rest = inputs
    *options, _, _, ctx.backend = rest
    ctx.options = DensityOptions(*options)
    ctx.save_for_backward(x, mean_offsets, c, mask, output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _operator_gradient(ctx, grad, _weights, _stats):
    tensors = (None,) * 3
    if grad is not None:
        x, mean_offsets, c, mask, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            tensors = _differentiable_backward(grad, x, mean_offsets, c, mask, ctx.options)
        else:
            operator = torch.ops.daam_kernels.density_attention_backward.default
            tensors = operator(grad, x, mean_offsets, c, mask, stats, *ctx.options, ctx.backend)
    return (*tensors, None, *(None for _ in ctx.options), None, None, None)


def _refuse_second_gradient(ctx, *_):
    raise RuntimeError(
        "torch.ops.daam_kernels.density_attention_backward is not differentiable itself; for gradients of gradients "
        "call daam_kernels.density_attention outside of torch.compile, with create_graph=True"
    )


for _name, _implementation, _fake in (
    ("density_attention", _operator, _operator_fake),
    ("density_attention_backward", _operator_backward, _operator_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"daam_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "daam_kernels::density_attention", _operator_gradient, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("daam_kernels::density_attention_backward", _refuse_second_gradient, lib=_library)


def _is_transformed() -> bool:
    """Inside torch.func (grad, vmap, jvp, ...) or forward-mode AD, which see no further than ordinary operations.

    They refuse an autograd.Function, and take an operator's tangent to be zero.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_plain_eager(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain and not t.is_meta) for t in tensors)


def _stats_shape(x: Tensor, mean_offsets: Tensor, options: DensityOptions, save_stats: bool) -> tuple[int, ...]:
    num_heads, length = mean_offsets.shape[0], x.shape[options.norm_axis]
    chunk = length // num_heads
    if not save_stats or (chunk < _MIN_SAVED and length - (num_heads - 1) * chunk < _ALWAYS_SAVED):
        return (0,)
    return 3, x.numel() // length * num_heads


def _arithmetic_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as_layout(t: Tensor, x: Tensor) -> Tensor:
    """t in the memory layout of torch.empty_like(x)."""
    out = torch.empty_like(x)
    return t if t.stride() == out.stride() else out.copy_(t)
