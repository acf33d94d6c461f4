"""Density attention as an operator: ``torch.ops.daam_kernels.density_attention`` and its backward.

Eager calls on plain tensors go through a context-style ``autograd.Function`` straight to the backend, because a
registered operator costs several times a small kernel in Python. Everything that must see an operator (torch.compile,
export, fake tensors, dispatch modes, tensor subclasses) gets the registered one. Both end in ``forward`` and
``backward`` below, so both give the same bits. torch.func and forward-mode AD get the reference's ordinary operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import native, reference
from ..backends import resolve
from ..options import DensityOptions
from ..reference import density_attention_blocks as in_blocks
from ..sequences import check_packing
from . import eager
from .registration import register

_MIN_SAVED = 64  # shorter slices recompute their statistics: saving them would move as many bytes as x does
_ALWAYS_SAVED = 1024  # a last head with that long a remainder may not fit one block, and then needs them
_MOST_RESIDENT = 128  # slices so long fit one block whatever they are; only longer sums of Gaussians need what is saved

_TENSORS = "Tensor x, Tensor mean_offsets, Tensor c, Tensor? log_shares, Tensor? mask"
_OPTIONS = (
    "int norm_axis, float? padding_value, str padding_stats, str normalize, float eps, bool residual, str density, "
    "bool multiply"
)

_SEQUENCES = "Tensor? cu_seqlens=None, SymInt? max_seqlen=None"

_library = torch.library.Library("daam_kernels", "DEF")
_library.define(
    f"density_attention({_TENSORS}, {_OPTIONS}, "
    f"bool return_weights, bool save_stats, str backend, {_SEQUENCES}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"density_attention_backward(Tensor grad, {_TENSORS}, Tensor stats, "
    # the last one is empty without log_shares
    f"{_OPTIONS}, str backend, {_SEQUENCES}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def apply(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    log_shares: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: DensityOptions,
    return_weights: bool,
    backend: str,
    call: tuple | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, weights) with ``return_weights``; differentiable. The arguments are checked already.

    ``log_shares``: [num_heads, num_gaussians], contiguous, float32 or float64, for a density that has them, else None.
    ``cu_seqlens``: [num_sequences + 1], contiguous, for a packed x of shape [total, features], else None.
    ``call`` is the signature of them all, to remember how they were served; None for what is not remembered.
    """
    tensors = x, mean_offsets, c, log_shares, mask, cu_seqlens
    if eager.is_transformed():
        resolve(backend, x, options.density)
        _check_packing(x, mean_offsets, cu_seqlens, options)
        return reference_forward(*tensors, options, return_weights)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not eager.is_plain(*tensors):
        operator = torch.ops.daam_kernels.density_attention.default
        *scalars, max_seqlen = options
        y, weights, _ = operator(*tensors[:5], *scalars, return_weights, needs_grad, backend, cu_seqlens, max_seqlen)
        return (y, weights) if return_weights else y
    backend = resolve(backend, x, options.density)  # once: the backward must know what this forward saved
    if call is not None and backend == "native":
        _remember(call, x, mean_offsets, c, options)
    elif call is not None and backend == "triton" and _runs_compiled(x):
        eager.remember(call, _launched(options))
    if needs_grad:
        return _DensityAttention.apply(*tensors, options, return_weights, backend)
    y, weights = forward(*tensors, options, return_weights, None, backend)
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


def _runs_compiled(x: Tensor) -> bool:
    """Whether Triton serves x with machine code; its interpreter serves a CPU only as long as a variable is set."""
    return x.is_cuda


def _launched(options: DensityOptions) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How Triton serves a call with these options."""

    def run(x, mean_offsets, c):
        tensors = x, mean_offsets, c, None, None, None
        if (x.requires_grad or c.requires_grad or mean_offsets.requires_grad) and torch.is_grad_enabled():
            return _DensityAttention.apply(*tensors, options, False, "triton")
        return forward(*tensors, options, False, None, "triton")[0]

    return run


def forward(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    log_shares: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: DensityOptions,
    return_weights: bool,
    stats: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """(y, weights or None) of a backend by its own name. Triton fills stats for its backward; others leave them."""
    _check_packing(x, mean_offsets, cu_seqlens, options)
    if backend == "reference":
        with torch.no_grad():
            if cu_seqlens is None:
                named = _reference_options(log_shares, mask, options)
                return in_blocks.forward(x, mean_offsets, c, return_weights=return_weights, **named)
            result = reference_forward(x, mean_offsets, c, log_shares, mask, cu_seqlens, options, return_weights)
        y, weights = result if return_weights else (result, None)
        return _as_layout(y, x), _as_layout(weights, x) if return_weights else None
    y = torch.empty_like(x)
    weights = torch.empty_like(x) if return_weights else None
    if backend == "triton":
        from ..kernels.density_forward import density_forward

        density_forward(x, mean_offsets, c, mask, options, y, weights, stats, log_shares, cu_seqlens)
    elif cu_seqlens is not None:
        native.ragged_forward(x, mean_offsets, c, cu_seqlens, mask, options, y, weights, log_shares)
    else:
        native.density_forward(x, mean_offsets, c, mask, options, y, weights, log_shares)
    return y, weights


def backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    log_shares: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    stats: Tensor | None,
    options: DensityOptions,
    backend: str,
) -> tuple[Tensor, ...]:
    """(dx, dmean_offsets, dc), and dlog_shares where these are, of a backend by its own name.

    stats are what its forward saved, or None.
    """
    if backend in ("native", "cuda"):
        if cu_seqlens is None:
            gradients = native.density_backward(grad, x, mean_offsets, c, mask, options, None, log_shares)
        else:
            gradients = native.ragged_backward(grad, x, mean_offsets, c, cu_seqlens, mask, options, log_shares)
        return gradients if log_shares is None else (*gradients[:3], gradients[3].to(log_shares.dtype))
    if backend == "triton":
        from ..kernels.density_backward import density_backward

        return density_backward(grad, x, mean_offsets, c, mask, stats, options, log_shares, cu_seqlens)
    with torch.no_grad():
        if cu_seqlens is None:
            return in_blocks.backward(grad, x, mean_offsets, c, **_reference_options(log_shares, mask, options))
        dx, *rest = reference_backward(grad, x, mean_offsets, c, log_shares, mask, cu_seqlens, options)
    return _as_layout(dx, x), *rest


class _DensityAttention(torch.autograd.Function):
    """The eager path: no dispatcher between autograd and the kernel."""

    @staticmethod
    def forward(ctx, x, mean_offsets, c, log_shares, mask, cu_seqlens, options, return_weights, backend):
        stats = new_stats(x, mean_offsets, cu_seqlens, options, backend) if backend == "triton" else None
        tensors = x, mean_offsets, c, log_shares, mask, cu_seqlens
        y, weights = forward(*tensors, options, return_weights, or_none(stats), backend)
        ctx.save_for_backward(*tensors, stats)
        ctx.options, ctx.backend, ctx.layout = options, backend, x.stride()
        ctx.set_materialize_grads(False)
        if weights is None:
            return y
        ctx.mark_non_differentiable(weights)
        return y, weights

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 9
        *tensors, stats = ctx.saved_tensors
        gradients = _gradients(grad, *tensors, _in_order(stats, tensors[0], ctx), ctx.options, ctx.backend)
        return (*gradients, None, None, None, None, None)


class _Served:
    """How a call that is remembered is served: ``fill`` computes y, ``gradients`` those of x, mean_offsets and c."""

    def __init__(self, fill, options):
        self.fill, self.options = fill, options
        self._backwards = {}  # by all strides: saved_tensors_hooks may change them; None where something must be copied

    def gradients(self, grad, x, mean_offsets, c):
        if torch.is_grad_enabled() or not eager.is_plain(grad):
            return _gradients(grad, x, mean_offsets, c, None, None, None, None, self.options, "native")[:3]
        strides = grad.stride(), x.stride(), mean_offsets.stride(), c.stride()
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


def _gradients(grad, x, mean_offsets, c, log_shares, mask, cu_seqlens, stats, options, backend):
    """(dx, dmean_offsets, dc, dlog_shares or None) in whatever way autograd asks for them."""
    tensors = x, mean_offsets, c, log_shares, mask, cu_seqlens
    if torch.is_grad_enabled():
        gradients = reference_backward(grad, *tensors, options)
    elif eager.is_plain(grad):
        gradients = backward(grad, *tensors, or_none(stats), options, backend)
    else:
        gradients = _call_backward(grad, *tensors, x.new_empty(0) if stats is None else stats, options, backend)
    return gradients if log_shares is not None else (*gradients[:3], None)


def reference_forward(x, mean_offsets, c, log_shares, mask, cu_seqlens, options, return_weights):
    named = _reference_options(log_shares, mask, options) | {"return_weights": return_weights}
    if cu_seqlens is None:
        return reference.density_attention(x, mean_offsets, c, **named)
    return reference.ragged_density_attention(x, mean_offsets, c, cu_seqlens, **named)


def reference_backward(grad, x, mean_offsets, c, log_shares, mask, cu_seqlens, options):
    """The gradient in ordinary operations; a graph of them has derivatives of any order."""
    named = _reference_options(log_shares, mask, options)
    if cu_seqlens is None:
        return reference.density_attention_backward(grad, x, mean_offsets, c, **named)
    return reference.ragged_density_attention_backward(grad, x, mean_offsets, c, cu_seqlens, **named)


def _reference_options(log_shares, mask, options):
    return options.of_reference() | {"log_shares": log_shares, "mask": mask}


def _check_packing(x, mean_offsets, cu_seqlens, options):
    if cu_seqlens is not None:
        check_packing(cu_seqlens, x.shape[0], mean_offsets.shape[0], options.max_seqlen, options.fewest)


def _unpack(arguments, num_others):
    """(options, cu_seqlens, ...), the last ones being ``num_others`` that an operator takes between the two."""
    num_scalars = len(DensityOptions._fields) - 1
    scalars, others = arguments[:num_scalars], arguments[num_scalars : num_scalars + num_others]
    cu_seqlens, max_seqlen, *_ = (*arguments[num_scalars + num_others :], None, None)
    return DensityOptions(*scalars, max_seqlen), cu_seqlens, *others


def _operator(x, mean_offsets, c, log_shares, mask, *rest):
    options, cu_seqlens, return_weights, save_stats, backend = _unpack(rest, 3)
    stats = new_stats(x, mean_offsets, cu_seqlens, options, backend if save_stats else None)
    resolved = resolve(backend, x, options.density)
    tensors = x, mean_offsets, c, log_shares, mask, cu_seqlens
    y, weights = forward(*tensors, options, return_weights, or_none(stats), resolved)
    return y, weights if return_weights else x.new_empty(0), stats if resolved == "triton" else stats.zero_()


def _operator_fake(x, mean_offsets, c, log_shares, mask, *rest):
    options, cu_seqlens, return_weights, save_stats, backend = _unpack(rest, 3)
    weights = torch.empty_like(x) if return_weights else x.new_empty(0)
    stats = new_stats(x, mean_offsets, cu_seqlens, options, backend if save_stats else None)
    return torch.empty_like(x), weights, stats


def _operator_backward(grad, x, mean_offsets, c, log_shares, mask, stats, *rest):
    options, cu_seqlens, backend = _unpack(rest, 1)
    resolved = resolve(backend, x, options.density)
    gradients = backward(grad, x, mean_offsets, c, log_shares, mask, cu_seqlens, or_none(stats), options, resolved)
    return gradients if log_shares is not None else (*gradients, x.new_empty(0))


def _operator_backward_fake(grad, x, mean_offsets, c, log_shares, mask, stats, *rest):
    parameters = mean_offsets, c, x.new_empty(0) if log_shares is None else log_shares
    gradients = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters)
    return torch.empty_like(x), *gradients


def _call_backward(grad, x, mean_offsets, c, log_shares, mask, cu_seqlens, stats, options, backend):
    operator = torch.ops.daam_kernels.density_attention_backward.default
    *scalars, max_seqlen = options
    return operator(grad, x, mean_offsets, c, log_shares, mask, stats, *scalars, backend, cu_seqlens, max_seqlen)


def _setup_context(ctx, inputs, output):
    ctx.options, cu_seqlens, *_, ctx.backend = _unpack(inputs[5:], 3)
    ctx.layout = inputs[0].stride()
    ctx.save_for_backward(*inputs[:5], cu_seqlens, output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _operator_gradient(ctx, grad, _weights, _stats):
    gradients = (None,) * 4
    if grad is not None:
        *tensors, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = reference_backward(grad, *tensors, ctx.options)
        else:
            stats = _in_order(stats, tensors[0], ctx)
            gradients = _call_backward(grad, *tensors, stats, ctx.options, ctx.backend)
        log_shares = tensors[3]
        gradients = gradients if log_shares is not None else (*gradients[:3], None)
    others = 6  # mask, cu_seqlens, return_weights, save_stats, backend, and max_seqlen, which is one of the options
    return (*gradients, *(None for _ in range(others + len(ctx.options) - 1)))


register(
    _library,
    "density_attention",
    forward=(_operator, _operator_fake),
    backward=(_operator_backward, _operator_backward_fake),
    gradient=_operator_gradient,
    setup_context=_setup_context,
)


def new_stats(
    x: Tensor, mean_offsets: Tensor, cu_seqlens: Tensor | None, options: DensityOptions, backend: str | None
) -> Tensor:
    """What a forward saves for Triton's backward; empty where slices are short, and for other backends.

    The lengths of packed sequences may not be known here, so short ones save it too.

    It depends on the arguments alone, not on what "auto" is on this machine: a graph may run on another one.
    [3, slices] in the arithmetic type: x0, mean - x0 and the variance, in an order that Triton's backward knows, and
    with a sign that tells it something about a mixture.
    """
    saves = backend == "triton" or (backend == "auto" and x.is_cuda)
    if saves and cu_seqlens is not None:
        shape = (3, (cu_seqlens.shape[0] - 1) * mean_offsets.shape[0] * x.shape[1])
    else:
        num_heads, length = mean_offsets.shape[0], x.shape[options.norm_axis]
        chunk = length // num_heads
        longest = length - (num_heads - 1) * chunk
        if options.density == "product":
            short = chunk < _MIN_SAVED and longest < _ALWAYS_SAVED
        else:
            short = longest <= _MOST_RESIDENT
        shape = (3, x.numel() // length * num_heads) if saves and not short else (0,)
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _in_order(stats: Tensor | None, x: Tensor, ctx) -> Tensor | None:
    """The stats for an x that saved_tensors_hooks may give back in another layout, whose slices have another order.

    They are empty then: to be found again.
    """
    if stats is None:
        return None
    return stats.contiguous() if x.stride() == ctx.layout else stats.new_empty(0)


def or_none(stats: Tensor | None) -> Tensor | None:
    return stats if stats is not None and stats.numel() else None


def _as_layout(t: Tensor, x: Tensor) -> Tensor:
    """t in the memory layout of torch.empty_like(x)."""
    out = torch.empty_like(x)
    return t if t.stride() == out.stride() else out.copy_(t)
