"""Additive attention as an operator: ``torch.ops.daam_kernels.additive_attention`` and its backward.

The backward takes the output and one number per query from the forward, and works out the scores anew, and the weights
where they have a gradient. The output is in the arithmetic type, float32 for half types too: rounded, it would make the
gradients less exact than their type is. As with ``density_attention``, eager calls on plain tensors go through an
``autograd.Function``; few activations on a CPU (:func:`..backends.reference_form`), torch.func, forward-mode AD and
gradients of gradients get the ordinary operations of ``reference.additive_attention``.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .. import reference
from ..backends import ADDITIVE_ATTENTION as _NAME, resolve, takes_formula
from ..native_additive import NativeActivations
from ..options import AdditiveProblem
from ..reference import additive_attention_blocks as blocks
from . import eager
from .registration import register

_ACTIVATIONS = {"native": NativeActivations, "reference": blocks.Activations}

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? attn_mask, Tensor? key_mask, Tensor? seed, "
    "bool is_causal, float dropout_p, float scale, bool fast_tanh, bool need_weights, bool average_weights"
)
_NUM_ARGUMENTS = len(AdditiveProblem._fields) + 1  # and the backend

_library = torch.library.Library("daam_kernels", "FRAGMENT")
# The last results are empty without need_weights and mask_gradient.
_library.define(f"additive_attention({_PROBLEM}, str backend) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"additive_attention_backward(Tensor grad, Tensor? grad_weights, {_PROBLEM}, Tensor output, Tensor lse, "
    "bool mask_gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def apply(problem: AdditiveProblem, backend: str) -> tuple[Tensor, Tensor | None]:
    """(output, weights or None), both differentiable.

    The output is in float32, or float64 for float64; the weights are of query's type, [batch, heads, Tq, Tk], or
    [batch, 1, Tq, Tk] averaged.
    """
    if eager.is_transformed():
        resolve(backend, problem.query, _NAME)
        return _reference_forward(problem)
    if not eager.is_plain(*problem.tensors):
        output, _, weights = torch.ops.daam_kernels.additive_attention.default(*problem, backend)
        return output, weights if problem.need_weights else None
    activations = math.prod(problem.shape_of_scores) * problem.query.shape[-1]
    if takes_formula(backend, problem.query, activations):
        output, weights = _reference_forward(problem)
        if problem.need_weights and torch.is_grad_enabled() and problem.value.requires_grad:
            weights = weights + problem.value[..., :0].sum()  # 0: value has zeros for a gradient, as from blocks
        return output, weights
    backend = resolve(backend, problem.query, _NAME)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in problem.tensors):
        output, _, weights = _AdditiveAttention.apply(*problem, backend)
        return output, weights
    output, _, weights = _forward(problem, backend)
    return output, weights


def _forward(problem: AdditiveProblem, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, lse [batch, heads, Tq], weights or None) of a backend by its own name."""
    if backend == "triton":
        from ..kernels.additive_forward import additive_forward

        return additive_forward(problem)
    with torch.no_grad():
        return blocks.additive_attention_forward(problem, _ACTIVATIONS[backend])


def _backward(
    problem: AdditiveProblem,
    grad: Tensor,
    grad_weights: Tensor | None,
    output: Tensor,
    lse: Tensor,
    mask_gradient: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """(dquery, dkey, dvalue, dweight, dattn_mask or None) of a backend by its own name."""
    if backend == "triton":
        from ..kernels.additive_backward import additive_backward
        from ..kernels.additive_weights import additive_weights_delta
    else:
        additive_backward = partial(blocks.additive_attention_backward, make=_ACTIVATIONS[backend])
        additive_weights_delta = partial(blocks.additive_weights_delta, make=_ACTIVATIONS[backend])
    with torch.no_grad():
        delta = (grad * output).sum(-1)
        if grad_weights is not None:
            if problem.average_weights:
                grad_weights = grad_weights.to(lse.dtype) / lse.shape[1]
            grad_weights = grad_weights.expand(problem.shape_of_scores)
            delta += additive_weights_delta(problem, lse, grad_weights)
        return additive_backward(problem, grad, grad_weights, delta, lse, mask_gradient)


def _reference_forward(problem: AdditiveProblem) -> tuple[Tensor, Tensor | None]:
    query, key, value, weight, attn_mask, key_mask, seed = problem.tensors
    output, weights = reference.additive_attention(
        query.to(problem.arithmetic), key, value, weight, attn_mask=attn_mask, key_padding_mask=key_mask, seed=seed,
        is_causal=problem.is_causal, dropout_p=problem.dropout_p, scale=problem.scale, need_weights=True,
    )  # fmt: skip
    if problem.average_weights:
        weights = weights.mean(1, keepdim=True)
    return output, weights.to(query.dtype) if problem.need_weights else None


def _reference_backward(
    problem: AdditiveProblem, grad: Tensor, grad_weights: Tensor | None, asked: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients that are asked for in ordinary operations; a graph of them has derivatives of any order."""
    # Views, so that a gradient stops here and not at what a tensor was made of, as key may be of query.
    tensors = [t.view_as(t) if wanted else t for t, wanted in zip(problem, asked)]
    results = zip(_reference_forward(AdditiveProblem(*tensors, *problem[5:])), (grad, grad_weights))
    outputs, gradients = zip(*((result, gradient) for result, gradient in results if gradient is not None))
    inputs = [t for t, wanted in zip(tensors, asked) if wanted]
    found = iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=True))
    return [next(found) if wanted else None for wanted in asked]


class _AdditiveAttention(torch.autograd.Function):
    """The eager path: no dispatcher between autograd and the kernel."""

    @staticmethod
    def forward(ctx, *arguments):
        problem, backend = AdditiveProblem(*arguments[:-1]), arguments[-1]
        output, lse, weights = _forward(problem, backend)
        _save(ctx, problem, output, lse, backend)
        ctx.mark_non_differentiable(lse)
        return output, lse, weights

    @staticmethod
    def backward(ctx, grad, _, grad_weights):
        return _gradients(ctx, grad, grad_weights)


def _save(ctx, problem: AdditiveProblem, output: Tensor, lse: Tensor, backend: str) -> None:
    ctx.save_for_backward(*problem.tensors, output, lse)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.backend = problem[7:], backend


def _gradients(ctx, grad, grad_weights):
    """The gradients of every argument in whatever way autograd asks for them."""
    *tensors, output, lse = ctx.saved_tensors
    problem = AdditiveProblem(*tensors, *ctx.options)
    asked = ctx.needs_input_grad[:5]
    rest = (None,) * (_NUM_ARGUMENTS - 5)
    if grad is None and grad_weights is None:
        return (None,) * 5 + rest
    if grad is None:
        grad = torch.zeros_like(output)
    if torch.is_grad_enabled():
        return *_reference_backward(problem, grad, grad_weights, asked), *rest
    if eager.is_plain(grad, grad_weights):
        backend = resolve(ctx.backend, output, _NAME)
        return *_backward(problem, grad, grad_weights, output, lse, asked[4], backend), *rest
    operator = torch.ops.daam_kernels.additive_attention_backward.default
    *gradients, d_mask = operator(grad, grad_weights, *problem, output, lse, asked[4], ctx.backend)
    return *gradients, d_mask if asked[4] else None, *rest


def _operator(*arguments):
    problem, backend = AdditiveProblem(*arguments[:-1]), arguments[-1]
    output, lse, weights = _forward(problem, resolve(backend, problem.query, _NAME))
    return output, lse, problem.query.new_empty(0) if weights is None else weights


def _operator_fake(*arguments):
    problem = AdditiveProblem(*arguments[:-1])
    output, lse, weights = problem.new_results()
    return output, lse, problem.query.new_empty(0) if weights is None else weights


def _operator_backward(grad, grad_weights, *arguments):
    *arguments, output, lse, mask_gradient, backend = arguments
    problem, backend = AdditiveProblem(*arguments), resolve(backend, output, _NAME)
    *gradients, d_mask = _backward(problem, grad, grad_weights, output, lse, mask_gradient, backend)
    return *gradients, grad.new_empty(0) if d_mask is None else d_mask


def _operator_backward_fake(grad, grad_weights, *arguments):
    *arguments, _output, _lse, mask_gradient, _backend = arguments
    problem, contiguous = AdditiveProblem(*arguments), torch.contiguous_format
    gradients = (torch.empty_like(t, memory_format=contiguous) for t in problem.tensors[:4])
    d_mask = torch.empty_like(problem.attn_mask, memory_format=contiguous) if mask_gradient else grad.new_empty(0)
    return *gradients, d_mask


def _setup_context(ctx, inputs, output):
    problem = AdditiveProblem(*inputs[:-1])
    _save(ctx, problem, *output[:2], inputs[-1])
    ctx.mark_non_differentiable(output[1], *(() if problem.need_weights else output[2:]))


def _operator_gradient(ctx, grad, _, grad_weights):
    return _gradients(ctx, grad, grad_weights)


register(
    _library,
    "additive_attention",
    forward=(_operator, _operator_fake),
    backward=(_operator_backward, _operator_backward_fake),
    gradient=_operator_gradient,
    setup_context=_setup_context,
)
