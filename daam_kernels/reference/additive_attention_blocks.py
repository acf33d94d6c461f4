"""Additive attention block by block, forward and backward: the tensor [batch, heads, Tq, Tk, hidden] is never there.

Beside inputs and results it takes memory for one block and for a few numbers per query and key. The backward has only
the logarithm of each query's sum of exponentials from the forward, and works out the scores anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import dropout_keep

_BLOCK = 1 << 18  # activations at a time: about what caches hold, and enough that sharing them among threads pays
_MOST_KEYS = 128


class _Problem(NamedTuple):
    """What both directions share: the inputs of one head, in the arithmetic type, and how their scores are masked."""

    query: Tensor  # [batch, Tq, hidden]
    key: Tensor  # [batch, Tk, hidden]
    value: Tensor  # [batch, Tk, value_dim]
    weight: Tensor  # [hidden]
    attn_mask: Tensor | None  # [batch, Tq, Tk]
    key_mask: Tensor | None  # [batch, Tk]
    slices: Tensor  # [batch, 1], the numbers of batch and head for dropout
    seed: Tensor | None
    is_causal: bool
    dropout_p: float
    scale: float


class _Block(NamedTuple):
    """A block of batches, queries and keys."""

    batches: slice
    rows: slice
    columns: slice

    @property
    def of_queries(self) -> tuple[slice, slice]:
        return self.batches, self.rows

    @property
    def of_keys(self) -> tuple[slice, slice]:
        return self.batches, self.columns


def additive_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, lse [batch, heads, Tq], weights or None), all in float32, or in float64 for float64.

    ``attn_mask`` has 4 dimensions, of the scores' sizes or 1, ``key_mask`` is boolean [batch, Tk]; other arguments are
    as of ``additive_attention``.
    """
    batch, heads, queries, _ = query.shape
    arithmetic = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_empty((batch, heads, queries, value.shape[-1]), dtype=arithmetic)
    lse = query.new_empty((batch, heads, queries), dtype=arithmetic)
    weights = torch.zeros_like(lse).unsqueeze(-1).repeat(1, 1, 1, key.shape[-2]) if need_weights else None
    for head in range(heads):
        problem = _problem(head, query, key, value, weight, attn_mask, key_mask, seed, is_causal, dropout_p, scale)
        buffer = _buffer(problem)
        for blocks in _blocks(problem):
            top = blocks[0]
            scores = torch.cat([_scores(problem, block, _activations(problem, block, buffer)) for block in blocks], -1)
            above = _finite(scores.amax(-1, keepdim=True))
            shares = scores.sub_(above).exp_()
            total = shares.sum(-1, keepdim=True)
            shares /= total.masked_fill(total == 0, 1.0)
            seen = slice(0, shares.shape[-1])
            if dropout_p:
                shares *= _kept(problem, top._replace(columns=seen))
            output[:, head][top.of_queries] = shares @ problem.value[top.batches, seen]
            lse[:, head][top.of_queries] = total.log_().add_(above).squeeze(-1)
            if weights is not None:
                weights[:, head][(*top.of_queries, seen)] = shares
    return output, lse, weights


def additive_attention_backward(
    grad: Tensor,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dquery, dkey, dvalue, dweight, dattn_mask or None), all contiguous.

    ``delta``, [batch, heads, Tq], is each query's sum of its weights times their gradients.
    """
    d_query, d_key, d_value, d_weight = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value, weight)
    )
    d_mask = None
    if mask_gradient:
        d_mask = torch.zeros(attn_mask.shape, dtype=lse.dtype, device=query.device)
    for head in range(query.shape[1]):
        problem = _problem(head, query, key, value, weight, attn_mask, key_mask, seed, is_causal, dropout_p, scale)
        buffer = _buffer(problem)
        sums = [torch.zeros_like(t) for t in problem[:4]]
        for block in (block for blocks in _blocks(problem) for block in blocks):
            activations = _activations(problem, block, buffer)
            row_lse, row_delta = (t[:, head][block.of_queries].unsqueeze(-1) for t in (lse, delta))
            shares = _scores(problem, block, activations).sub_(_finite(row_lse)).exp_()
            g = grad[:, head][block.of_queries]
            d_shares = g @ problem.value[block.of_keys].mT
            if grad_weights is not None:
                d_shares += grad_weights[:, head][(*block.of_queries, block.columns)]
            if dropout_p:
                kept = _kept(problem, block)
                d_shares *= kept
                sums[2][block.of_keys] += (shares * kept).mT @ g
            else:
                sums[2][block.of_keys] += shares.mT @ g
            d_scores = shares.mul_(d_shares.sub_(row_delta))
            if d_mask is not None:
                _add_reduced(d_mask, (block.batches, slice(head, head + 1), block.rows, block.columns), d_scores)
            d_scores *= scale
            _add_gradients(sums, block, activations, d_scores)
        sums[0] *= problem.weight
        sums[1] *= problem.weight
        for result, total in zip((d_query, d_key, d_value), sums):
            result[:, head] = total
        d_weight[head] = sums[3]
    return d_query, d_key, d_value, d_weight, d_mask


def _problem(
    head: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    *scalars,
) -> _Problem:
    arithmetic = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, queries = query.shape[:3]
    slices = (head + heads * torch.arange(batch, device=query.device)).unsqueeze(-1)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, queries, key.shape[2])[:, head]
    tensors = (t.to(arithmetic) for t in (query[:, head], key[:, head], value[:, head], weight[head]))
    return _Problem(*tensors, attn_mask, key_mask, slices, seed, *scalars)


def _blocks(problem: _Problem) -> Iterator[list[_Block]]:
    """For one block of queries after another the blocks of the keys that they may see."""
    (batch, queries, hidden), keys = problem.query.shape, problem.key.shape[1]
    columns = min(keys, _MOST_KEYS)
    rows = max(1, min(queries, _BLOCK // (columns * hidden)))
    batches = max(1, min(batch, _BLOCK // (columns * hidden * rows)))
    for b in range(0, batch, batches):
        for i in range(0, queries, rows):
            end = min(queries, i + rows)
            seen = min(keys, end) if problem.is_causal else keys
            yield [
                _Block(slice(b, min(batch, b + batches)), slice(i, end), slice(j, min(seen, j + columns)))
                for j in range(0, seen, columns)
            ]


def _buffer(problem: _Problem) -> Tensor:
    hidden = problem.query.shape[-1]
    return problem.query.new_empty(max(_BLOCK, min(problem.key.shape[1], _MOST_KEYS) * hidden))


def _activations(problem: _Problem, block: _Block, buffer: Tensor) -> Tensor:
    """tanh(query_ic + key_jc) as [batches, rows, columns, hidden], in the buffer."""
    query, key = problem.query[block.of_queries].unsqueeze(2), problem.key[block.of_keys].unsqueeze(1)
    shape = torch.broadcast_shapes(query.shape, key.shape)
    return torch.add(query, key, out=buffer[: shape.numel()].view(shape)).tanh_()


def _scores(problem: _Problem, block: _Block, activations: Tensor) -> Tensor:
    """[batches, rows, columns], -inf where a key is forbidden."""
    *shape, hidden = activations.shape
    scores = torch.mv(activations.view(-1, hidden), problem.weight).view(shape).mul_(problem.scale)
    if problem.attn_mask is not None:
        mask = problem.attn_mask[(*block.of_queries, block.columns)]
        scores = scores.masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    if problem.key_mask is not None:
        scores.masked_fill_(problem.key_mask[block.of_keys].unsqueeze(1), -torch.inf)
    if problem.is_causal and block.columns.stop > block.rows.start + 1:
        rows, columns = (torch.arange(s.start, s.stop, device=scores.device) for s in (block.rows, block.columns))
        scores.masked_fill_(columns > rows.unsqueeze(-1), -torch.inf)
    return scores


def _finite(lse: Tensor) -> Tensor:
    """0 where no key may be seen, so that exp(-inf - lse) is 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _kept(problem: _Problem, block: _Block) -> Tensor:
    """What dropout multiplies the weights with."""
    rows = torch.arange(block.rows.start, block.rows.stop, device=problem.query.device)
    columns = range(block.columns.start, block.columns.stop)
    keep = dropout_keep(problem.seed, problem.slices[block.batches], rows, columns, problem.dropout_p)
    return keep.to(problem.query.dtype) / (1 - problem.dropout_p)


def _add_reduced(total: Tensor, place: tuple[slice, ...], block: Tensor) -> None:
    """Add [batches, rows, columns] to its place in a tensor some of whose axes, of size 1, stand for all."""
    block = block.unsqueeze(1)
    expanded = [axis for axis, size in enumerate(total.shape) if size == 1]
    if expanded:
        block = block.sum(expanded, keepdim=True)
    total[tuple(slice(None) if axis in expanded else part for axis, part in enumerate(place))] += block


def _add_gradients(sums: list[Tensor], block: _Block, activations: Tensor, d_scores: Tensor) -> None:
    """Add a block's part to the gradients of query and key, both but for the factor weight, and of weight.

    Overwrites the activations.
    """
    sums[3] += torch.mv(activations.view(-1, activations.shape[-1]).T, d_scores.reshape(-1))
    slopes = activations.mul_(activations).sub_(1.0).mul_(d_scores.unsqueeze(-1))  # of tanh, negative
    sums[0][block.of_queries] -= slopes.sum(2)
    sums[1][block.of_keys] -= slopes.sum(1)
