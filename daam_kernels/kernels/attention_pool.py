"""Attention pooling over ragged bags.

Forward, x is read from memory once. ``pool_sums`` has the scores, the softmax as it goes, relative to the largest score
of its rows so far, and the weighted sum; ``pool_hidden_sums`` has the hidden layer of a tile too. Where the sums do not
fit a program, for rows too long or hops too many, ``pool_wide_sums`` has them in memory, of either kind of scores.
``pool_merge`` joins the chunks of a bag in a fixed order.

Backward, x is read from memory twice. Of scores that are products with the query, ``pool_gradient``, or
``pool_wide_gradient`` of long rows, writes dx and the scores' gradient, and ``pool_query_sums`` sums the rows up,
weighed with that, for the query's gradient. Of a hidden layer, ``pool_hidden_gradient`` has the layer again, and writes
its gradient, of a segment of rows at a time, or ``pool_wide_hidden_gradient`` where its units or hops do not fit a
program; ``pool_hidden_dx`` makes dx of it, and ``pool_layer_sums`` reads x again for the layers' gradients.

A program that reads its rows again does so right away, and as few of them as stay in the cache; so it is with programs
that share rows, which run together. With a hidden layer 16 rows are the least that a program takes: if they are longer
than some 20 KB, those of all programs at once are more than an H200's cache holds.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..options import Pooling
from .attention_pool_host import Sweep, dot_backward_sweeps, forward_sweeps, hidden_backward_sweeps, sizes_of
from .attention_pool_layers import scorer_of
from .attention_pool_wide import pool_wide_sums
from .attention_pool_wide_gradient import pool_wide_gradient
from .host import device_of, run


def pool_forward(pooling: Pooling, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """(context, lse) as of ``attention_pool_blocks.forward``; fills scores, where they are given full of -inf."""
    x, arithmetic, hops = _rows_of(pooling.x), pooling.arithmetic, pooling.query.shape[0]
    summing, merging = forward_sweeps(sizes_of(pooling, x))
    if summing.kernel is pool_wide_sums and scores is None:
        scores = x.new_empty(pooling.shape_of_scores, dtype=arithmetic)
    shape = pooling.num_bags, summing.numbers["num_chunks"], hops
    sums = x.new_empty((*shape, x.shape[-1]), dtype=arithmetic)
    tops, totals = (x.new_empty(shape, dtype=arithmetic) for _ in range(2))
    context = x.new_empty((pooling.num_bags, hops, x.shape[-1]), dtype=arithmetic)
    lse = x.new_empty((pooling.num_bags, hops), dtype=arithmetic)
    found = dict(sums_ptr=sums, tops_ptr=tops, totals_ptr=totals)
    with device_of(x):
        _run(summing, _bags_of(pooling, x) | scorer_of(pooling) | found | dict(scores_ptr=scores))
        _run(merging, found | dict(context_ptr=context, lse_ptr=lse))
    return context, lse


def pool_backward(
    pooling: Pooling, grad: Tensor, grad_weights: Tensor | None, lse: Tensor, inner: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """(dx, the gradients of the scorer's tensors) as of ``attention_pool_blocks.backward``."""
    x = _rows_of(pooling.x)
    whole = pooling.lengths is None  # else rows beyond them are not visited
    dx = torch.empty_like(pooling.x) if whole else torch.zeros_like(pooling.x)
    into = dx if dx.stride(-1) == 1 or x.shape[-1] == 1 else torch.zeros_like(x)
    given = _bags_of(pooling, x) | scorer_of(pooling)
    given.update(grad_ptr=grad, grad_weights_ptr=grad_weights, lse_ptr=lse, inner_ptr=inner, dx_ptr=into)
    backward = _dot_backward if pooling.key_weight is None else _hidden_backward
    gradients = backward(pooling, x, given, into)
    return dx if into is dx else dx.copy_(into), gradients


def _dot_backward(pooling: Pooling, x: Tensor, given: dict[str, Any], dx: Tensor) -> list[Tensor | None]:
    """Writes dx, and returns the gradients of the scorer's tensors."""
    (hops, embed_dim), arithmetic = pooling.query.shape, pooling.arithmetic
    gradient, query_sums = dot_backward_sweeps(sizes_of(pooling, x, dx))
    given["d_scores_ptr"] = (torch.empty if pooling.lengths is None else torch.zeros)(
        pooling.shape_of_scores, dtype=arithmetic, device=x.device
    )
    if gradient.kernel is pool_wide_gradient:
        given["given_ptr"] = x.new_empty(pooling.shape_of_scores, dtype=arithmetic)
    shape = pooling.num_bags, query_sums.numbers["num_chunks"], hops, embed_dim
    sums = given["sums_ptr"] = x.new_empty(shape, dtype=arithmetic)
    with device_of(x):
        _run(gradient, given)
        _run(query_sums, given)
    d_query = pooling.scale * sums.sum((0, 1), dtype=torch.float64)
    return [d_query.to(pooling.query.dtype), None, None, None, None]


def _hidden_backward(pooling: Pooling, x: Tensor, given: dict[str, Any], dx: Tensor) -> list[Tensor | None]:
    """The same with a hidden layer, a segment of rows after the other."""
    sweeps = hidden_backward_sweeps(sizes_of(pooling, x, dx))
    cut, (hops, hidden), embed_dim = sweeps.cut, pooling.query.shape, x.shape[-1]
    units, kept = hidden * cut.layers, cut.segment_rows
    new = functools.partial(x.new_empty, dtype=pooling.arithmetic)
    d_query = new((pooling.num_bags * cut.num_chunks if cut.whole else cut.sum_blocks, hops, hidden))
    d_weight, d_bias = new((cut.sum_blocks, units, embed_dim)), new((cut.sum_blocks, units))
    given.update(
        given_ptr=new(pooling.shape_of_scores), d_hidden_ptr=new((kept, units)), d_query_ptr=d_query,
        d_weight_ptr=d_weight, d_bias_ptr=d_bias,
    )  # fmt: skip
    valid = pooling.valid_rows()  # the sums are of rows wherever they lie, which does not say what is within lengths
    valid = None if valid is None else valid.contiguous().view(torch.uint8).flatten()
    if not cut.whole:
        phi, d_scores = new((kept, hidden)), new((kept, hops))
        given.update(phi_ptr=phi, d_scores_ptr=d_scores)
        of_phi = dict(x_ptr=phi, d_hidden_ptr=d_scores, d_weight_ptr=d_query, d_bias_ptr=None, first_row=0)
    sums = [t.new_zeros(t.shape[1:], dtype=torch.float64) for t in (d_query, d_weight, d_bias)]
    num_rows = x.numel() // embed_dim
    with device_of(x):
        for first in range(0, num_rows, kept):
            end = min(first + kept, num_rows)
            given.update(first_row=first, end_row=end)
            _run(sweeps.gradient, given)
            _run(sweeps.dx, given)
            _run(sweeps.layer_sums, given | dict(valid_ptr=valid))
            if sweeps.products is not None:
                of_phi.update(valid_ptr=None if valid is None else valid[first:end], end_row=end - first)
                _run(sweeps.products, of_phi)
            for total, found in zip(sums, (d_query, d_weight, d_bias)):
                total += found.sum(0, dtype=torch.float64)
    d_query, d_weights, d_biases = pooling.scale * sums[0], sums[1].split(hidden), sums[2].split(hidden)
    found = d_query, *(t for layer in zip(d_weights, d_biases) for t in layer), None, None
    # copied: an operator's results share no memory
    return [None if like is None else t.to(like.dtype, copy=True) for t, like in zip(found, pooling.scorer_tensors)]


def _run(sweep: Sweep, given: dict[str, Any]) -> None:
    run(sweep.kernel, sweep.launch, given | sweep.numbers, sweep.grid)


def _bags_of(pooling: Pooling, x: Tensor) -> dict[str, Tensor | None]:
    """x, and what says which of its rows are whose."""
    valid = None if pooling.valid is None else pooling.valid.contiguous().view(torch.uint8)
    return dict(
        x_ptr=x, valid_ptr=valid, keep_ptr=None if pooling.keep is None else pooling.keep.view(torch.uint8),
        cu_seqlens_ptr=pooling.cu_seqlens, lengths_ptr=pooling.lengths,
    )  # fmt: skip


def _rows_of(x: Tensor) -> Tensor:
    """x, copied where its rows are not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
