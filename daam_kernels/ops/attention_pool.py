"""Attention pooling as an operator: ``torch.ops.daam_kernels.attention_pool`` and its backward.

Its results are small beside x, and of the arithmetic's type, so that nothing is rounded between forward and backward.
Triton's kernels take the scores, with the hidden layer of additive and gated ones, the softmax and the sums over rows
in one sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import resolve, takes_formula
from ..options import Pooling
from ..reference import attention_pool_blocks as in_blocks
from ..sequences import check_lengths, check_packing, lengths_of, packing
from . import eager
from .registration import register

_TENSORS = (
    "Tensor x, Tensor query, Tensor? key_weight, Tensor? key_bias, Tensor? gate_weight, Tensor? gate_bias, "
    "Tensor? valid, Tensor? lengths, Tensor? cu_seqlens, Tensor? keep"
)
_OPTIONS = "float scale, float dropout_p, SymInt? max_seqlen"

_NAME = "attention pooling"  # in messages of what cannot serve it

_library = torch.library.Library("daam_kernels", "FRAGMENT")
_library.define(f"attention_pool({_TENSORS}, {_OPTIONS}, bool need_weights, str backend) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"attention_pool_backward(Tensor? grad_context, Tensor? grad_weights, {_TENSORS}, Tensor context, Tensor weights, "
    f"Tensor lse, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def apply(pooling: Pooling, need_weights: bool, backend: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """(context [bags, hops, embed_dim], weights [bags, hops, rows] or [hops, total], or None, whether a bag has a
    valid row [bags]), the first two of the arithmetic's type and differentiable. The arguments are checked already.
    """
    if eager.is_transformed() or _takes_formula(pooling, backend):
        resolve(backend, pooling.x, _NAME)
        _check_bags(pooling)
        context, weights = _reference(pooling)
        found = _found_in_reference(pooling)
    else:
        context, weights, lse = torch.ops.daam_kernels.attention_pool.default(*pooling, need_weights, backend)
        found = lse[:, 0] != -torch.inf
    return context, weights if need_weights else None, found


def _takes_formula(pooling: Pooling, backend: str) -> bool:
    if pooling.cu_seqlens is not None or not eager.is_plain(*pooling[:10]):
        return False
    hops, hidden_or_embed_dim = pooling.query.shape
    bags, rows, embed_dim = pooling.x.shape
    return takes_formula(backend, pooling.x, bags * rows * max(embed_dim, hidden_or_embed_dim, hops))


def _scorer(pooling: Pooling) -> reference.Scorer:
    return reference.Scorer(*pooling.scorer_tensors, pooling.scale)


def _check_bags(pooling: Pooling) -> None:
    if pooling.cu_seqlens is not None:
        check_packing(pooling.cu_seqlens, pooling.x.shape[0], 1, pooling.max_seqlen, 0)
    if pooling.lengths is not None:
        check_lengths(pooling.lengths, pooling.x.shape[1])


def _blocks(pooling: Pooling):
    lengths = None if pooling.lengths is None else lengths_of(pooling.lengths)
    bounds = None if pooling.cu_seqlens is None else packing(pooling.cu_seqlens).bounds
    return in_blocks.blocks(pooling.x, pooling.valid, lengths, bounds)


def _reference(pooling: Pooling) -> tuple[Tensor, Tensor]:
    options = dict(keep=pooling.keep, dropout_p=pooling.dropout_p)
    if pooling.cu_seqlens is None:
        return reference.attention_pool(pooling.x, _scorer(pooling), valid=pooling.valid_rows(), **options)
    return reference.ragged_attention_pool(
        pooling.x, pooling.cu_seqlens, _scorer(pooling), valid=pooling.valid, **options
    )


def _found_in_reference(pooling: Pooling) -> Tensor:
    valid = pooling.valid_rows()
    if pooling.cu_seqlens is None:
        return pooling.x.new_ones(pooling.x.shape[:2], dtype=torch.bool).any(1) if valid is None else valid.any(1)
    if valid is None:
        return pooling.cu_seqlens.diff() > 0
    rows = packing(pooling.cu_seqlens).rows
    return torch.cat([valid[:0], *(valid[bag].any().view(1) for bag in rows)])


def _on_triton(pooling: Pooling, backend: str) -> bool:
    """Whether the kernels serve it; a batch without rows is left to plain PyTorch."""
    return resolve(backend, pooling.x, _NAME) == "triton" and pooling.x.numel() > 0


def _operator(*arguments):
    *arguments, need_weights, backend = arguments
    pooling = Pooling(*arguments)
    _check_bags(pooling)
    scores = pooling.x.new_empty(pooling.shape_of_scores if need_weights else 0, dtype=pooling.arithmetic)
    if need_weights:
        scores.fill_(-torch.inf)
    into = scores if need_weights else None
    if _on_triton(pooling, backend):
        from ..kernels.attention_pool import pool_forward

        context, lse = pool_forward(pooling, into)
    else:
        scorer, blocks = _scorer(pooling), _blocks(pooling)
        context, lse = in_blocks.forward(
            pooling.x, scorer, blocks, pooling.num_bags, pooling.keep, pooling.dropout_p, into
        )
    if need_weights:
        lengths = None if pooling.cu_seqlens is None else pooling.cu_seqlens.diff()
        scores = in_blocks.weights_from_scores(scores, lse, lengths)
        if pooling.keep is not None:
            scores.mul_(pooling.keep).div_(1 - pooling.dropout_p)
    return context, scores, lse


def _operator_fake(*arguments):
    *arguments, need_weights, _ = arguments
    pooling = Pooling(*arguments)
    x, hops, options = pooling.x, pooling.query.shape[0], dict(dtype=pooling.arithmetic)
    context = x.new_empty((pooling.num_bags, hops, x.shape[-1]), **options)
    weights = x.new_empty(pooling.shape_of_scores if need_weights else 0, **options)
    return context, weights, x.new_empty((pooling.num_bags, hops), **options)


def _operator_backward(grad_context, grad_weights, *arguments):
    *arguments, context, weights, lse, scale, dropout_p, max_seqlen, backend = arguments
    pooling = Pooling(*arguments, scale, dropout_p, max_seqlen)
    grad = torch.zeros_like(context) if grad_context is None else grad_context.contiguous()
    inner = (grad * context).sum(-1)
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
        through_weights = weights * grad_weights
        if pooling.cu_seqlens is None:
            inner += through_weights.sum(-1)
        elif through_weights.numel():
            lengths = pooling.cu_seqlens.long().diff()
            # unsafe: to check the lengths, as the forward did, waits for the GPU
            inner += torch.segment_reduce(through_weights.T.contiguous(), "sum", lengths=lengths, axis=0, unsafe=True)
    if _on_triton(pooling, backend):
        from ..kernels.attention_pool import pool_backward

        dx, gradients = pool_backward(pooling, grad, grad_weights, lse, inner)
    else:
        scorer, blocks = _scorer(pooling), _blocks(pooling)
        dx, gradients = in_blocks.backward(
            grad, grad_weights, pooling.x, scorer, blocks, pooling.keep, pooling.dropout_p, lse, inner
        )
    return dx, *(pooling.x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _operator_backward_fake(grad_context, grad_weights, x, *arguments):
    gradients = (
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in arguments[:5]
    )
    return torch.empty_like(x), *gradients


def _setup_context(ctx, inputs, output):
    *arguments, ctx.need_weights, ctx.backend = inputs
    pooling = Pooling(*arguments)
    ctx.options = pooling.scale, pooling.dropout_p, pooling.max_seqlen
    ctx.save_for_backward(*pooling[:10], *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _operator_gradient(ctx, grad_context, grad_weights, _lse):
    *tensors, context, weights, lse = ctx.saved_tensors
    grad_weights = grad_weights if ctx.need_weights else None
    gradients: tuple = (None,) * 6
    if grad_context is not None or grad_weights is not None:
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(grad_context, grad_weights, Pooling(*tensors, *ctx.options))
        else:
            operator = torch.ops.daam_kernels.attention_pool_backward.default
            saved = context, weights, lse
            found = operator(grad_context, grad_weights, *tensors, *saved, *ctx.options, ctx.backend)
            gradients = tuple(None if t is None else g for t, g in zip(tensors, found))
    return (*gradients, *(None for _ in range(4 + len(ctx.options) + 2)))


def _differentiable_gradients(grad_context, grad_weights, pooling: Pooling) -> tuple[Tensor | None, ...]:
    """The gradient in ordinary operations; a graph of them has derivatives of any order."""
    # By way of copies: where one of the tensors was computed from another, its gradient must not go on to that.
    copies = [None if t is None else t.view_as(t) for t in pooling[:6]]
    outputs = _reference(Pooling(*copies, *pooling[6:]))
    given = [(output, grad) for output, grad in zip(outputs, (grad_context, grad_weights)) if grad is not None]
    asked = [t for t in copies if t is not None and t.requires_grad]
    outputs, grads = zip(*given)
    found = iter(torch.autograd.grad(outputs, asked, grads, create_graph=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in copies)


register(
    _library,
    "attention_pool",
    forward=(_operator, _operator_fake),
    backward=(_operator_backward, _operator_backward_fake),
    gradient=_operator_gradient,
    setup_context=_setup_context,
)
