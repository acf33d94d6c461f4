"""Additive attention as an operator: ``torch.ops.daam_kernels.additive_attention`` and its backward.

The backward takes the output and one number per query from the forward, and works out the scores anew. Output and
weights are in the arithmetic type, float32 for half types too: rounded, they would make the gradients less exact than
their type is. As with
``density_attention``, eager calls on plain tensors go through an ``autograd.Function``; torch.func, forward-mode AD and
gradients of gradients get the ordinary operations of ``reference.additive_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve
from ..options import AdditiveOptions, arithmetic_type
from ..reference import additive_attention_blocks as blocks
from . import eager
from .registration import register

_NAME = "additive attention"  # in messages of what cannot serve it

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? attn_mask, Tensor? key_mask, Tensor? seed"
_OPTIONS = "bool is_causal, float dropout_p, float scale, bool fast_tanh, bool need_weights, str backend"

_library = torch.library.Library("daam_kernels", "FRAGMENT")
_library.define(f"additive_attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"additive_attention_backward(Tensor grad, Tensor? grad_weights, {_TENSORS}, "
    # the last one is empty without mask_gradient, weights without need_weights
    f"Tensor output, Tensor lse, Tensor weights, bool mask_gradient, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    options: AdditiveOptions,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """(output, weights or None), both differentiable, in float32, or float64 for float64.

    The arguments are checked already.
    ``attn_mask``, boolean or to be added, has 4 dimensions, each of the scores' size or 1; ``key_mask`` is boolean
    [batch, Tk]; ``seed`` is int64 [1], for dropout alone.
    """
    tensors = query, key, value, weight, attn_mask, key_mask, seed
    if eager.is_transformed():
        resolve(backend, query, _NAME)
        return _reference_forward(*tensors, options)
    if not eager.is_plain(*tensors):
        output, _, weights = torch.ops.daam_kernels.additive_attention.default(*tensors, *options, backend)
        return output, weights if options.need_weights else None
    backend = resolve(backend, query, _NAME)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, _, weights = _AdditiveAttention.apply(*tensors, options, backend)
        return output, weights
    output, _, weights = _forward(*tensors, options, backend)
    return output, weights


def _forward(query, key, value, weight, attn_mask, key_mask, seed, options, backend):
    """(output, lse [batch, heads, Tq], weights or None) of a backend by its own name."""
    tensors = query, key, value, weight, attn_mask, key_mask, seed
    if backend == "triton":
        from ..kernels.additive_forward import additive_forward

        return additive_forward(*tensors, options)
    with torch.no_grad():
        return blocks.additive_attention_forward(*tensors, *_of_blocks(options), options.need_weights)


def _backward(
    grad, grad_weights, query, key, value, weight, attn_mask, key_mask, seed, output, lse, weights,
    mask_gradient, options, backend,
):  # fmt: skip
    """(dquery, dkey, dvalue, dweight, dattn_mask or None) of a backend by its own name."""
    tensors = query, key, value, weight, attn_mask, key_mask, seed
    with torch.no_grad():
        delta = (grad * output).sum(-1)
        if grad_weights is not None:
            delta += (grad_weights * weights).sum(-1)
        if backend == "triton":
            from ..kernels.additive_backward import additive_backward

            return additive_backward(grad, grad_weights, *tensors, delta, lse, mask_gradient, options)
        gradients = blocks.additive_attention_backward(
            grad, grad_weights, *tensors, delta, lse, *_of_blocks(options), mask_gradient
        )
    return gradients


def _of_blocks(options):
    return options.is_causal, options.dropout_p, options.scale


def _reference_forward(query, key, value, weight, attn_mask, key_mask, seed, options):
    output, weights = reference.additive_attention(
        query.to(arithmetic_type(query)), key, value, weight, attn_mask=attn_mask, key_padding_mask=key_mask, seed=seed,
        is_causal=options.is_causal, dropout_p=options.dropout_p, scale=options.scale, need_weights=True,
    )  # fmt: skip
    return output, weights if options.need_weights else None


def _reference_backward(grad, grad_weights, query, key, value, weight, attn_mask, key_mask, seed, options, asked):
    """The gradients that are asked for in ordinary operations; a graph of them has derivatives of any order."""
    # Views, so that a gradient stops here and not at what a tensor was made of, as key may be of query.
    tensors = [t.view_as(t) if wanted else t for t, wanted in zip((query, key, value, weight, attn_mask), asked)]
    results = zip(_reference_forward(*tensors, key_mask, seed, options), (grad, grad_weights))
    outputs, gradients = zip(*((result, gradient) for result, gradient in results if gradient is not None))
    inputs = [t for t, wanted in zip(tensors, asked) if wanted]
    found = iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=True))
    return [next(found) if wanted else None for wanted in asked]


class _AdditiveAttention(torch.autograd.Function):
    """The eager path: no dispatcher between autograd and the kernel."""

    @staticmethod
    def forward(ctx, query, key, value, weight, attn_mask, key_mask, seed, options, backend):
        tensors = query, key, value, weight, attn_mask, key_mask, seed
        output, lse, weights = _forward(*tensors, options, backend)
        ctx.save_for_backward(*tensors, output, lse, weights)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        return output, lse, weights

    @staticmethod
    def backward(ctx, grad, _, grad_weights):
        return *_gradients(ctx, grad, grad_weights), None, None, None, None


def _gradients(ctx, grad, grad_weights):
    """(dquery, dkey, dvalue, dweight, dattn_mask) in whatever way autograd asks for them."""
    *tensors, output, lse, weights = ctx.saved_tensors
    if grad is None and grad_weights is None:
        return (None,) * 5
    asked = ctx.needs_input_grad[:5]
    if grad is None:
        grad = torch.zeros_like(output)
    if torch.is_grad_enabled():
        return _reference_backward(grad, grad_weights, *tensors, ctx.options, asked)
    if eager.is_plain(grad, grad_weights):
        backend = resolve(ctx.backend, output, _NAME)
        return _backward(grad, grad_weights, *tensors, output, lse, weights, asked[4], ctx.options, backend)
    *gradients, d_mask = torch.ops.daam_kernels.additive_attention_backward.default(
        grad, grad_weights, *tensors, output, lse, output.new_empty(0) if weights is None else weights,
        asked[4], *ctx.options, ctx.backend,
    )  # fmt: skip
    return *gradients, d_mask if asked[4] else None


def _operator(*arguments):
    *tensors, backend = arguments
    tensors, options = tensors[:7], AdditiveOptions(*tensors[7:])
    output, lse, weights = _forward(*tensors, options, resolve(backend, tensors[0], _NAME))
    return output, lse, output.new_empty(0) if weights is None else weights


def _operator_fake(query, key, value, *rest):
    need_weights = rest[-2]
    rows = query.shape[:3]
    options = dict(dtype=arithmetic_type(query))
    weights = query.new_empty((*rows, key.shape[2]) if need_weights else 0, **options)
    return query.new_empty((*rows, value.shape[3]), **options), query.new_empty(rows, **options), weights


def _operator_backward(grad, grad_weights, *arguments):
    *arguments, backend = arguments
    tensors, mask_gradient, options = arguments[:10], arguments[10], AdditiveOptions(*arguments[11:])
    resolved = resolve(backend, tensors[0], _NAME)
    *gradients, d_mask = _backward(grad, grad_weights, *tensors, mask_gradient, options, resolved)
    return *gradients, grad.new_empty(0) if d_mask is None else d_mask


def _operator_backward_fake(grad, grad_weights, query, key, value, weight, attn_mask, *rest):
    mask_gradient = rest[5]
    contiguous = torch.contiguous_format
    gradients = (torch.empty_like(t, memory_format=contiguous) for t in (query, key, value, weight))
    d_mask = torch.empty_like(attn_mask, memory_format=contiguous) if mask_gradient else grad.new_empty(0)
    return *gradients, d_mask


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options, ctx.backend = AdditiveOptions(*inputs[7:-1]), inputs[-1]
    ctx.mark_non_differentiable(output[1], *(() if ctx.options.need_weights else output[2:]))
    ctx.set_materialize_grads(False)


def _operator_gradient(ctx, grad, _, grad_weights):
    others = 3 + len(AdditiveOptions._fields)  # key_mask, seed, backend and the options
    return *_gradients(ctx, grad, grad_weights), *(None for _ in range(others))


register(
    _library,
    "additive_attention",
    forward=(_operator, _operator_fake),
    backward=(_operator_backward, _operator_backward_fake),
    gradient=_operator_gradient,
    setup_context=_setup_context,
)
