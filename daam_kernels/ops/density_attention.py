"""Density attention as an operator: ``torch.ops.daam_kernels.density_attention`` and its backward.

Eager calls on plain tensors go through a context-style ``autograd.Function`` straight to the backend, because a
registered operator costs several times a small kernel in Python. Everything that must see an operator (torch.compile,
export, fake tensors, dispatch modes, tensor subclasses) gets the registered one. Both end in ``forward`` and
``backward`` below, so both give the same bits. torch.func and forward-mode AD get the reference's ordinary operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, reference
from ..backends import resolve
from ..options import DensityOptions
from . import eager

_MIN_SAVED = 64  # shorter slices recompute their statistics: saving them would move as many bytes as x does
_ALWAYS_SAVED = 1024  # a last head with that long a remainder may not fit one block, and then needs them

_TENSORS = "Tensor x, Tensor mean_offsets, Tensor c, Tensor? log_shares, Tensor? mask"
_OPTIONS = (
    "int norm_axis, float? padding_value, str padding_stats, str normalize, float eps, bool residual, str density, "
    "bool multiply"
)

_library = torch.library.Library("daam_kernels", "DEF")
_library.define(
    f"density_attention({_TENSORS}, {_OPTIONS}, "
    "bool return_weights, bool save_stats, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"density_attention_backward(Tensor grad, {_TENSORS}, Tensor stats, "
    f"{_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)"  # the last one is empty without log_shares
)


def apply(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    log_shares: Tensor | None,
    mask: Tensor | None,
    options: DensityOptions,
    return_weights: bool,
    backend: str,
    call: tuple | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, weights) with ``return_weights``; differentiable. The arguments are checked already.

    ``log_shares``: [num_heads, num_gaussians], contiguous, float32 or float64, for a density that has them, else None.
    ``call`` is the signature of them all, to remember how they were served; None for what is not remembered.
    """
    tensors = x, mean_offsets, c, log_shares
    if eager.is_transformed():
        resolve(backend, x, options.density)
        return _reference_forward(*tensors, mask, options, return_weights)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not eager.is_plain(*tensors, mask):
        operator = torch.ops.daam_kernels.density_attention.default
        y, weights, _ = operator(*tensors, mask, *options, return_weights, needs_grad, backend)
        return (y, weights) if return_weights else y
    backend = resolve(backend, x, options.density)  # once: the backward must know what this forward saved
    if call is not None and backend == "native":
        _remember(call, x, mean_offsets, c, options)
    if needs_grad:
        return _DensityAttention.apply(*tensors, mask, options, return_weights, backend)
    y, weights = _forward(*tensors, mask, options, return_weights, None, backend)
    return (y, weights) if return_weights else y


def _remember(call: tuple, x: Tensor, mean_offsets: Tensor, c: Tensor, options: DensityOptions) -> None:
    """How the native library serves this call, unless it has to copy x first."""
    problem = native.problem(mean_offsets, c, None, options, torch.empty_like(x), x)
    if problem is None:
        return
    fill = native.bound_forward(problem)
    served = _Served(fill, options)

    def run(x, mean_offsets, c):
        if (x.requires_grad or c.requires_grad or mean_offsets.requires_grad) and torch.is_grad_enabled():
            return _apply_remembered(x, mean_offsets, c, served)
        y = torch.empty_like(x)
        fill(x, mean_offsets, c, y)
        return y

    eager.remember(call, run)


def _forward(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    log_shares: Tensor | None,
    mask: Tensor | None,
    options: DensityOptions,
    return_weights: bool,
    stats: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """(y, weights or None) of a backend by its own name. Triton fills stats for its backward; others leave them."""
    if backend == "reference":
        with torch.no_grad():
            result = _reference_forward(x, mean_offsets, c, log_shares, mask, options, return_weights)
        y, weights = result if return_weights else (result, None)
        return _as_layout(y, x), _as_layout(weights, x) if return_weights else None
    y = torch.empty_like(x)
    weights = torch.empty_like(x) if return_weights else None
    if backend == "triton":
        from ..kernels.density_forward import density_forward

        density_forward(x, mean_offsets, c, mask, options, y, weights, stats, **_named(log_shares))
    else:
        native.density_forward(x, mean_offsets, c, mask, options, y, weights)
    return y, weights


def _backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    log_shares: Tensor | None,
    mask: Tensor | None,
    stats: Tensor | None,
    options: DensityOptions,
    backend: str,
) -> tuple[Tensor, ...]:
    """(dx, dmean_offsets, dc), and dlog_shares where these are, of a backend by its own name.

    stats are what its forward saved, or None.
    """
    if backend in ("native", "cuda"):
        return native.density_backward(grad, x, mean_offsets, c, mask, options)
    if backend == "triton":
        from ..kernels.density_backward import density_backward

        return density_backward(grad, x, mean_offsets, c, mask, stats, options, **_named(log_shares))
    with torch.no_grad():
        dx, *rest = _reference_backward(grad, x, mean_offsets, c, log_shares, mask, options)
    return _as_layout(dx, x), *rest


class _DensityAttention(torch.autograd.Function):
    """The eager path: no dispatcher between autograd and the kernel."""

    @staticmethod
    def forward(ctx, x, mean_offsets, c, log_shares, mask, options, return_weights, backend):
        stats = _new_stats(x, mean_offsets, options, backend) if backend == "triton" else None
        tensors = x, mean_offsets, c, log_shares, mask
        y, weights = _forward(*tensors, options, return_weights, _or_none(stats), backend)
        ctx.save_for_backward(*tensors, stats)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        if weights is None:
            return y
        ctx.mark_non_differentiable(weights)
        return y, weights

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        gradients = _gradients(grad, *ctx.saved_tensors, ctx.options, ctx.backend)
        return (*gradients, None, None, None, None)


class _Served:
    """How a call that is remembered is served: ``fill`` computes y, ``gradients`` those of x, mean_offsets and c."""

    def __init__(self, fill, options):
        self.fill, self.options = fill, options
        self._backwards = {}  # by the strides of y's gradient; None where something has to be copied first

    def gradients(self, grad, x, mean_offsets, c):
        if torch.is_grad_enabled() or not eager.is_plain(grad):
            return _gradients(grad, x, mean_offsets, c, None, None, None, self.options, "native")[:3]
        strides = grad.stride()
        if strides not in self._backwards:
            problem = native.problem(mean_offsets, c, None, self.options, torch.empty_like(x), x, grad)
            self._backwards[strides] = None if problem is None else native.bound_backward(problem)
        bound = self._backwards[strides]
        if bound is None:
            return native.density_backward(grad, x, mean_offsets, c, None, self.options)
        return bound(grad, x, mean_offsets, c)


class _Remembered(torch.autograd.Function):
    """The same as _DensityAttention for a call that is remembered."""

    @staticmethod
    def forward(ctx, x, mean_offsets, c, served):
        y = torch.empty_like(x)
        served.fill(x, mean_offsets, c, y)
        ctx.save_for_backward(x, mean_offsets, c)
        ctx.served = served
        return y

    @staticmethod
    def backward(ctx, grad):
        return (*ctx.served.gradients(grad, *ctx.saved_tensors), None)


# Function.apply in Python is there for torch.func alone, whose calls are never remembered, and takes 7 us.
_apply_remembered = super(torch.autograd.Function, _Remembered).apply


def _gradients(grad, x, mean_offsets, c, log_shares, mask, stats, options, backend):
    """(dx, dmean_offsets, dc, dlog_shares or None) in whatever way autograd asks for them."""
    tensors = x, mean_offsets, c, log_shares, mask
    if torch.is_grad_enabled():
        gradients = _reference_backward(grad, *tensors, options)
    elif eager.is_plain(grad):
        gradients = _backward(grad, *tensors, _or_none(stats), options, backend)
    else:
        operator = torch.ops.daam_kernels.density_attention_backward.default
        gradients = operator(grad, *tensors, x.new_empty(0) if stats is None else stats, *options, backend)
    return gradients if log_shares is not None else (*gradients[:3], None)


def _reference_forward(x, mean_offsets, c, log_shares, mask, options, return_weights):
    return reference.density_attention(
        x, mean_offsets, c, log_shares=log_shares, mask=mask, return_weights=return_weights, **options._asdict()
    )


def _reference_backward(grad, x, mean_offsets, c, log_shares, mask, options):
    """The gradient in ordinary operations; a graph of them has derivatives of any order."""
    return reference.density_attention_backward(
        grad, x, mean_offsets, c, log_shares=log_shares, mask=mask, **options._asdict()
    )


def _named(log_shares):
    return {} if log_shares is None else {"log_shares": log_shares}


def _operator(x, mean_offsets, c, log_shares, mask, *rest):
    *options, return_weights, save_stats, backend = rest
    options = DensityOptions(*options)
    stats = _new_stats(x, mean_offsets, options, backend if save_stats else None)
    resolved = resolve(backend, x, options.density)
    tensors = x, mean_offsets, c, log_shares, mask
    y, weights = _forward(*tensors, options, return_weights, _or_none(stats), resolved)
    return y, weights if return_weights else x.new_empty(0), stats if resolved == "triton" else stats.zero_()


def _operator_fake(x, mean_offsets, c, log_shares, mask, *rest):
    *options, return_weights, save_stats, backend = rest
    weights = torch.empty_like(x) if return_weights else x.new_empty(0)
    stats = _new_stats(x, mean_offsets, DensityOptions(*options), backend if save_stats else None)
    return torch.empty_like(x), weights, stats


def _operator_backward(grad, x, mean_offsets, c, log_shares, mask, stats, *rest):
    *options, backend = rest
    options = DensityOptions(*options)
    resolved = resolve(backend, x, options.density)
    gradients = _backward(grad, x, mean_offsets, c, log_shares, mask, _or_none(stats), options, resolved)
    return gradients if log_shares is not None else (*gradients, x.new_empty(0))


def _operator_backward_fake(grad, x, mean_offsets, c, log_shares, mask, stats, *rest):
    parameters = mean_offsets, c, x.new_empty(0) if log_shares is None else log_shares
    gradients = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters)
    return torch.empty_like(x), *gradients


def _setup_context(ctx, inputs, output):
    *tensors, _, _, ctx.backend = inputs
    ctx.options = DensityOptions(*tensors[5:])
    ctx.save_for_backward(*tensors[:5], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _operator_gradient(ctx, grad, _weights, _stats):
    gradients = (None,) * 4
    if grad is not None:
        *tensors, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _reference_backward(grad, *tensors, ctx.options)
        else:
            operator = torch.ops.daam_kernels.density_attention_backward.default
            gradients = operator(grad, *tensors, stats, *ctx.options, ctx.backend)
        log_shares = tensors[3]
        gradients = gradients if log_shares is not None else (*gradients[:3], None)
    return (*gradients, None, *(None for _ in ctx.options), None, None, None)


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


def _new_stats(x: Tensor, mean_offsets: Tensor, options: DensityOptions, backend: str | None) -> Tensor:
    """What a forward saves for Triton's backward; empty where slices are short, or where nothing is saved.

    That is for backends other than Triton, and for densities other than the product.

    It depends on the arguments alone, not on what "auto" is on this machine: a graph may run on another one.
    [3, slices] in the arithmetic type: x0, mean - x0 and the variance, in an order that Triton's backward knows.
    """
    num_heads, length = mean_offsets.shape[0], x.shape[options.norm_axis]
    chunk = length // num_heads
    short = chunk < _MIN_SAVED and length - (num_heads - 1) * chunk < _ALWAYS_SAVED
    saves = options.density == "product" and (backend == "triton" or (backend == "auto" and x.is_cuda))
    shape = (3, x.numel() // length * num_heads) if saves and not short else (0,)
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _or_none(stats: Tensor | None) -> Tensor | None:
    return stats if stats is not None and stats.numel() else None


def _as_layout(t: Tensor, x: Tensor) -> Tensor:
    """t in the memory layout of torch.empty_like(x)."""
    out = torch.empty_like(x)
    return t if t.stride() == out.stride() else out.copy_(t)
