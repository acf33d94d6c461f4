"""Additive attention block by block, forward and backward: the tensor [batch, heads, Tq, Tk, hidden] is never there.

Beside inputs and results it takes memory for one block and for a few numbers per query and key. The backward has only
the logarithm of each query's sum of exponentials from the forward, and works out the scores anew. What is summed over
the hidden units of a block is left to ``activations``, :class:`Activations` or what does the same elsewhere.

On a CPU one tanh takes as long as twenty of the other operations on a number of a block. Hence

    tanh(q + k) = 1 - 2 r,   r = 1 / (1 + exp(2 q) exp(2 k)),   1 - tanh(q + k)^2 = 4 (r - r^2)

with exponentials of queries and of keys alone; for one query, and where an exponential would overflow, r is a sigmoid.
It is as exact as tanh in absolute terms, not relative to a tanh near 0: where queries and keys are small tanh stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .dropout import dropout_keep

if TYPE_CHECKING:
    from ..options import AdditiveProblem

_BLOCK = 1 << 20  # activations at a time: so many that what is done once for a block hardly counts
_MOST_SCORES = 1 << 20  # of all keys that a block of queries sees, as far as one query has no more
_LARGEST = 40.0  # of queries and keys in size: exp(2 * 40) and its inverse are normal numbers in float32
_SMALL = 0.125  # of the roots of queries' and keys' mean squares together


class Activations:
    """tanh(query_ic + key_jc) of a block, or r in its place, and its sums; tensors of a head in the arithmetic type."""

    most_keys = 128  # of a block

    def __init__(self, problem: AdditiveProblem):
        (batch, _, queries, keys), hidden = problem.shape_of_scores, problem.query.shape[3]
        self.most_pairs = max(1, _BLOCK // hidden)  # of a query and a key in a block
        of_query = min(keys, self.most_keys) * hidden
        size = min(max(_BLOCK, of_query), batch * queries * of_query)
        self._buffer = problem.query.new_empty(size, dtype=problem.arithmetic)
        self._last = self._buffer
        self._one = self._buffer.new_ones(())
        inputs = problem.query, problem.key
        self._halved = _is_large(*inputs)  # r in the place of tanh
        self._separated = self._halved and queries > 1 and _are_within(_LARGEST, *inputs)

    def scores(self, query: Tensor, key: Tensor, weight: Tensor, scale: float) -> Tensor:
        """[batches, rows, columns] of query [batches, rows, hidden] and key [batches, columns, hidden]."""
        shape = *query.shape[:2], *key.shape[1:]
        query, key, weight = query.unsqueeze(2), key.unsqueeze(1), weight * scale
        found = self._last = self._buffer[: math.prod(shape)].view(shape)
        of_pairs = found.view(-1, shape[-1])
        if not self._halved:
            torch.add(query, key, out=found).tanh_()
            return torch.mv(of_pairs, weight).view(shape[:-1])
        if self._separated:
            torch.addcmul(self._one, query.mul(2).exp_(), key.mul(2).exp_(), out=found).reciprocal_()
        else:
            torch.add(query.mul(-2), key, alpha=-2, out=found).sigmoid_()
        return torch.addmv(weight.sum(), of_pairs, weight, alpha=-2).view(shape[:-1])

    def add_gradients(
        self,
        d_scores: Tensor,
        query: Tensor,
        key: Tensor,
        weight: Tensor,
        d_query: Tensor,
        d_key: Tensor,
        d_weight: Tensor,
    ) -> None:
        """Add what the gradient of the last scores before their scale gives. Overwrites the activations."""
        found = self._last
        of_weight = torch.mv(found.view(-1, found.shape[-1]).T, d_scores.reshape(-1))
        if self._halved:
            d_weight += d_scores.sum() - 2 * of_weight
            slopes = torch.addcmul(found, found, found, value=-1, out=found).mul_((4 * d_scores).unsqueeze(-1))
        else:
            d_weight += of_weight
            slopes = torch.addcmul(self._one, found, found, value=-1, out=found).mul_(d_scores.unsqueeze(-1))
        d_query += slopes.sum(2).mul_(weight)
        d_key += slopes.sum(1).mul_(weight)


def _is_large(query: Tensor, key: Tensor) -> bool:
    """Whether errors of r do not count beside what a tanh of them is."""
    if not (query.is_cpu and query.numel() and key.numel()):
        return False
    return sum(torch.linalg.vector_norm(t).item() / t.numel() ** 0.5 for t in (query, key)) >= _SMALL


def _are_within(largest: float, *tensors: Tensor) -> bool:
    extremes = (extreme.item() for t in tensors for extreme in torch.aminmax(t))
    return all(-largest <= extreme <= largest for extreme in extremes)  # a NaN is neither


Maker = Callable[["AdditiveProblem"], Activations]


class _Head(NamedTuple):
    """What both directions share: the inputs of one head, in the arithmetic type, and how their scores are masked."""

    query: Tensor  # [batch, Tq, hidden]
    key: Tensor  # [batch, Tk, hidden]
    value: Tensor  # [batch, Tk, value_dim]
    weight: Tensor  # [hidden]
    attn_mask: Tensor | None  # [batch, Tq, Tk]
    key_mask: Tensor | None  # [batch, Tk]
    slices: range  # the numbers of batch and head, for dropout
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
    problem: AdditiveProblem, make: Maker = Activations
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, lse [batch, heads, Tq], weights or None).

    Weights are of query's type, [batch, heads, Tq, Tk], or their mean over the heads, [batch, 1, Tq, Tk]; the others
    are in float32, or in float64 for float64.
    """
    output, lse, weights = problem.new_results()
    if weights is not None:
        weights.zero_()  # what a causal query does not see is not visited
    heads = _heads(problem)
    activations = make(problem)
    for blocks in _blocks(problem, activations):
        top, seen, mean = blocks[0], slice(0, blocks[-1].columns.stop), 0.0
        for number, head in enumerate(heads):
            parts = [_scores(head, block, activations) for block in blocks]
            scores = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
            above = _finite(scores.amax(-1, keepdim=True))
            shares = scores.sub_(above).exp_()
            total = shares.sum(-1, keepdim=True)
            shares /= total.masked_fill(total == 0, 1.0)
            if problem.dropout_p:
                shares *= _kept(head, top._replace(columns=seen))
            output[:, number][top.of_queries] = shares @ head.value[top.batches, seen]
            lse[:, number][top.of_queries] = total.log_().add_(above).squeeze(-1)
            if weights is None:
                continue
            if problem.average_weights:
                mean += shares / len(heads)
            else:
                weights[:, number][(*top.of_queries, seen)] = shares
        if problem.average_weights and weights is not None:
            weights[:, 0][(*top.of_queries, seen)] = mean
    return output, lse, weights


def additive_weights_delta(
    problem: AdditiveProblem, lse: Tensor, grad_weights: Tensor, make: Maker = Activations
) -> Tensor:
    """Each query's sum of its weights times their gradients, [batch, heads, Tq]; of [batch, heads, Tq, Tk]."""
    delta = torch.zeros_like(lse)
    activations = make(problem)
    for number, head in enumerate(_heads(problem)):
        for block in (block for blocks in _blocks(problem, activations) for block in blocks):
            shares = _shares(head, block, activations, lse[:, number])
            if problem.dropout_p:
                shares *= _kept(head, block)
            shares *= grad_weights[:, number][(*block.of_queries, block.columns)]
            delta[:, number][block.of_queries] += shares.sum(-1)
    return delta


def additive_attention_backward(
    problem: AdditiveProblem,
    grad: Tensor,
    grad_weights: Tensor | None,
    delta: Tensor,
    lse: Tensor,
    mask_gradient: bool,
    make: Maker = Activations,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(dquery, dkey, dvalue, dweight, dattn_mask or None), all contiguous.

    ``grad_weights``: [batch, heads, Tq, Tk]; ``delta``, [batch, heads, Tq], is each query's sum of its weights times
    their gradients, those through the output too.
    """
    results = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in problem.tensors[:4]]
    d_mask = None
    if mask_gradient:
        d_mask = torch.zeros(problem.attn_mask.shape, dtype=lse.dtype, device=lse.device)
    activations = make(problem)
    for number, head in enumerate(_heads(problem)):
        # Added up in place, but for half types.
        of_head = [*(t[:, number] for t in results[:3]), results[3][number]]
        sums = [t.zero_() if t.dtype == lse.dtype else t.new_zeros(t.shape, dtype=lse.dtype) for t in of_head]
        for block in (block for blocks in _blocks(problem, activations) for block in blocks):
            shares = _shares(head, block, activations, lse[:, number])
            g = grad[:, number][block.of_queries]
            d_shares = g @ head.value[block.of_keys].mT
            if grad_weights is not None:
                d_shares += grad_weights[:, number][(*block.of_queries, block.columns)]
            if problem.dropout_p:
                kept = _kept(head, block)
                d_shares *= kept
                sums[2][block.of_keys].baddbmm_((shares * kept).mT, g)
            else:
                sums[2][block.of_keys].baddbmm_(shares.mT, g)
            d_scores = shares.mul_(d_shares.sub_(delta[:, number][block.of_queries].unsqueeze(-1)))
            if d_mask is not None:
                _add_reduced(d_mask, (block.batches, slice(number, number + 1), block.rows, block.columns), d_scores)
            d_scores *= problem.scale
            inputs, of_inputs = _inputs(head, block), (sums[0][block.of_queries], sums[1][block.of_keys])
            activations.add_gradients(d_scores, *inputs, head.weight, *of_inputs, sums[3])
        for result, total in zip(of_head, sums):
            if result is not total:
                result.copy_(total)
    return *results, d_mask


def _heads(problem: AdditiveProblem) -> list[_Head]:
    batch, heads, queries, keys = problem.shape_of_scores
    mask = problem.attn_mask
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    query, key, value, weight = (t.to(problem.arithmetic) for t in problem.tensors[:4])
    return [
        _Head(
            query[:, head], key[:, head], value[:, head], weight[head], None if mask is None else mask[:, head],
            problem.key_mask, range(head, head + batch * heads, heads), problem.seed, problem.is_causal,
            problem.dropout_p, problem.scale,
        )
        for head in range(heads)
    ]  # fmt: skip


def _blocks(problem: AdditiveProblem, activations: Activations) -> Iterator[list[_Block]]:
    """For one block of queries after another the blocks of the keys that they may see."""
    batch, _, queries, keys = problem.shape_of_scores
    columns = min(keys, activations.most_keys)
    rows = max(1, min(queries, activations.most_pairs // columns, _MOST_SCORES // keys))
    batches = max(1, min(batch, activations.most_pairs // (columns * rows), _MOST_SCORES // (keys * rows)))
    for b in range(0, batch, batches):
        for i in range(0, queries, rows):
            end = min(queries, i + rows)
            seen = min(keys, end) if problem.is_causal else keys
            yield [
                _Block(slice(b, min(batch, b + batches)), slice(i, end), slice(j, min(seen, j + columns)))
                for j in range(0, seen, columns)
            ]


def _inputs(head: _Head, block: _Block) -> tuple[Tensor, Tensor]:
    return head.query[block.of_queries], head.key[block.of_keys]


def _scores(head: _Head, block: _Block, activations: Activations) -> Tensor:
    """[batches, rows, columns], -inf where a key is forbidden."""
    scores = activations.scores(*_inputs(head, block), head.weight, head.scale)
    if head.attn_mask is not None:
        mask = head.attn_mask[(*block.of_queries, block.columns)]
        scores = scores.masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    if head.key_mask is not None:
        scores.masked_fill_(head.key_mask[block.of_keys].unsqueeze(1), -torch.inf)
    if head.is_causal and block.columns.stop > block.rows.start + 1:
        rows, columns = (torch.arange(s.start, s.stop, device=scores.device) for s in (block.rows, block.columns))
        scores.masked_fill_(columns > rows.unsqueeze(-1), -torch.inf)
    return scores


def _shares(head: _Head, block: _Block, activations: Activations, lse: Tensor) -> Tensor:
    """The weights before dropout, [batches, rows, columns], for lse [batch, Tq]."""
    row_lse = _finite(lse[block.of_queries]).unsqueeze(-1)
    return _scores(head, block, activations).sub_(row_lse).exp_()


def _finite(lse: Tensor) -> Tensor:
    """0 where no key may be seen, so that exp(-inf - lse) is 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _kept(head: _Head, block: _Block) -> Tensor:
    """What dropout multiplies the weights with."""
    rows = torch.arange(block.rows.start, block.rows.stop, device=head.query.device)
    columns = range(block.columns.start, block.columns.stop)
    slices = torch.tensor(head.slices[block.batches], device=head.query.device).unsqueeze(-1)
    keep = dropout_keep(head.seed, slices, rows, columns, head.dropout_p)
    return keep.to(head.query.dtype) / (1 - head.dropout_p)


def _add_reduced(total: Tensor, place: tuple[slice, ...], block: Tensor) -> None:
    """Add [batches, rows, columns] to its place in a tensor some of whose axes, of size 1, stand for all."""
    block = block.unsqueeze(1)
    expanded = [axis for axis, size in enumerate(total.shape) if size == 1]
    if expanded:
        block = block.sum(expanded, keepdim=True)
    total[tuple(slice(None) if axis in expanded else part for axis, part in enumerate(place))] += block
