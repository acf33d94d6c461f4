"""Attention pooling block by block, for bags that are large, many or ragged: what a CPU runs.

A block is a run of rows that stays in the cache: of one bag, of several of a batch, or of several packed ones, the
rows of each of which are then told apart by a mask. Forward, every row is read once, and the softmax of a bag is
kept up as its blocks come (its largest score, and sums relative to that). The backward pass is the closed form,

    p = exp(s - lse),   dp = grad . x,   ds = p (dp - D),   D = grad . context,   dx = p grad + ds (ds/dx)

and reads every row once too. Nothing of x's size is made but dx. All sums have a fixed order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_pool import Scorer

_ON_CPU, _ELSEWHERE = 1 << 21, 1 << 24  # elements of x in a block: threads wait for each other after every one
_MOST_BAGS = 32  # packed ones in a block: every row meets every bag of its block


class Block(NamedTuple):
    """Rows of x that are taken at once: ``rows`` of each of the groups, which are bags, or a stretch of packed ones."""

    groups: slice | None  # None: packed, the one group is the stretch
    rows: slice
    bags: slice  # as many for each group
    member: Tensor | None  # boolean, [groups, bags of a group, rows]; None: every row is of its group's one bag
    padded: bool  # whether there are rows that are of no bag

    def rows_of(self, t: Tensor) -> Tensor:
        """[groups, rows, ...] of [bags, rows, ...] or [total, ...]."""
        return t[None, self.rows] if self.groups is None else t[self.groups, self.rows]

    def hops_of(self, t: Tensor) -> Tensor:
        """[groups, hops, rows] of [bags, hops, rows] or [hops, total]."""
        return t[None, :, self.rows] if self.groups is None else t[self.groups, :, self.rows]

    def bags_of(self, t: Tensor) -> Tensor:
        """[groups, bags of a group, ...] of [bags, ...]: a view."""
        t = t[self.bags]
        return t.unsqueeze(0) if self.groups is None else t.unsqueeze(1)

    def values_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[groups, rows, embed_dim] of x in ``dtype``, with 0 for rows that are of no bag."""
        values = self.rows_of(x).to(dtype)
        if not self.padded:
            return values
        return values.masked_fill(~self.member.any(1).unsqueeze(-1), 0)


def blocks(
    x: Tensor, valid: Tensor | None, lengths: Sequence[int] | None, bounds: Sequence[int] | None
) -> Iterator[Block]:
    """All rows that bags have, block by block; of packed bags with ``bounds``, else of x [bags, rows, embed_dim]."""
    at_once = max(1, (_ON_CPU if x.is_cpu else _ELSEWHERE) // max(1, x.shape[-1]))
    return _dense(x, valid, lengths, at_once) if bounds is None else _packed(x, valid, bounds, at_once)


def _dense(x: Tensor, valid: Tensor | None, lengths: Sequence[int] | None, at_once: int) -> Iterator[Block]:
    count, longest = x.shape[:2]
    together = max(1, at_once // max(1, longest))
    for first in range(0, count, together):
        groups = slice(first, min(first + together, count))
        ends = [longest] if lengths is None else lengths[groups]
        for begin in range(0, max(ends), at_once):
            rows = slice(begin, min(begin + at_once, max(ends)))
            member = None if valid is None else valid[groups, rows].unsqueeze(1)
            if min(ends) < rows.stop:
                there = torch.arange(rows.start, rows.stop, device=x.device)
                within = (there < torch.tensor(ends, device=x.device)[:, None]).unsqueeze(1)
                member = within if member is None else member & within
            yield Block(groups, rows, groups, member, member is not None)


def _packed(x: Tensor, valid: Tensor | None, bounds: Sequence[int], at_once: int) -> Iterator[Block]:
    begin, total = 0, x.shape[0]
    while begin < total:
        first = bisect_right(bounds, begin) - 1
        end = min(begin + at_once, bounds[min(first + _MOST_BAGS, len(bounds) - 1)])
        last = bisect_right(bounds, end - 1)
        rows, bags, member = slice(begin, end), slice(first, last), None
        if last - first > 1:
            there = torch.arange(begin, end, device=x.device)
            edges = torch.tensor(bounds[first : last + 1], device=x.device)[:, None]
            member = ((there >= edges[:-1]) & (there < edges[1:])).unsqueeze(0)
        if valid is not None:
            of_rows = valid[rows].view(1, 1, -1)
            member = of_rows if member is None else member & of_rows
        yield Block(None, rows, bags, member, valid is not None)
        begin = end


def forward(
    x: Tensor,
    scorer: Scorer,
    parts: Sequence[Block] | Iterator[Block],
    num_bags: int,
    keep: Tensor | None,
    dropout_p: float,
    scores: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(context [num_bags, hops, embed_dim], lse [num_bags, hops], the log of the sum of the scores' exponentials).

    ``scores``: [bags, hops, rows] or [hops, total], full of -inf, to write them to; or None. All of the arithmetic's
    type.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    scorer, hops = scorer.to(dtype), scorer.query.shape[0]
    top = x.new_full((num_bags, hops), -torch.inf, dtype=dtype)
    total = torch.zeros_like(top)
    context = x.new_zeros((num_bags, hops, x.shape[-1]), dtype=dtype)
    for block in parts:
        values = block.values_of(x, dtype)
        of_rows = scored(values, scorer)[0]
        if scores is not None:
            known = of_rows if not block.padded else of_rows.masked_fill(~block.member.any(1).unsqueeze(1), -torch.inf)
            block.hops_of(scores).copy_(known)
        of_bags = _of_bags(of_rows, block)
        before = block.bags_of(top)
        after = torch.maximum(before, of_bags.amax(-1))
        base = after.masked_fill(after == -torch.inf, 0)
        shares = (of_bags - base.unsqueeze(-1)).exp_()
        fade = (before - base).exp_()
        before.copy_(after)
        sums = block.bags_of(total)
        sums.mul_(fade).add_(shares.sum(-1))
        shares = _dropped(shares, block, keep, dropout_p)
        block.bags_of(context).mul_(fade.unsqueeze(-1)).add_(_weighted(shares, values, block))
    found = total != 0
    context /= torch.where(found, total, 1).unsqueeze(-1)
    return context, top + total.log()


def backward(
    grad: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    scorer: Scorer,
    parts: Sequence[Block] | Iterator[Block],
    keep: Tensor | None,
    dropout_p: float,
    lse: Tensor,
    inner: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """(dx, the gradients of the scorer's tensors).

    ``grad``: of the context; ``grad_weights``: of the weights, in the layout of the scores, or None; ``inner``: D,
    [num_bags, hops].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    dx, gradients = torch.zeros_like(x), ScorerGradients(scorer)
    scorer = scorer.to(dtype)
    base = lse.masked_fill(lse == -torch.inf, 0)
    for block in parts:
        values = block.values_of(x, dtype)
        of_rows, hidden = scored(values, scorer)
        shares = (_of_bags(of_rows, block) - block.bags_of(base).unsqueeze(-1)).exp_()
        block_grad = block.bags_of(grad)
        d_shares = (block_grad.flatten(1, 2) @ values.mT).unflatten(1, block_grad.shape[1:3])
        if grad_weights is not None:
            d_shares += block.hops_of(grad_weights).unsqueeze(1)
        d_shares = _dropped(d_shares, block, keep, dropout_p)
        d_scores = shares * (d_shares - block.bags_of(inner).unsqueeze(-1))
        if block.member is not None:
            d_scores.masked_fill_(~block.member.unsqueeze(2), 0)
        shares = _dropped(shares, block, keep, dropout_p)
        d_values = _returned(shares, block_grad, block)
        d_values += gradients.add(d_scores.sum(1), values, hidden, scorer)
        block.rows_of(dx).copy_(d_values)
    return dx, gradients.result()


class ScorerGradients:
    """Sums of the gradients of a scorer's tensors over blocks, in float64."""

    def __init__(self, scorer: Scorer) -> None:
        self._like = scorer.tensors
        self._sums = [None if t is None else torch.zeros_like(t, dtype=torch.float64) for t in scorer.tensors]

    def add(self, d_scores: Tensor, values: Tensor, hidden: tuple[Tensor, ...], scorer: Scorer) -> Tensor:
        """The rows' gradient [groups, rows, embed_dim] through their scores' [groups, hops, rows]; adds the tensors'.

        ``hidden`` is what the forward pass has of these rows' hidden layer: its tanh, and its gate.
        """
        query, key_weight, key_bias, gate_weight, gate_bias = self._sums
        d_scores = scorer.scale * d_scores
        phi = values if scorer.key_weight is None else hidden[0] if len(hidden) == 1 else hidden[0] * hidden[1]
        query += d_scores.transpose(0, 1).flatten(1) @ phi.flatten(0, 1)
        d_phi = d_scores.mT @ scorer.query
        if scorer.key_weight is None:
            return d_phi
        tanh, gate = hidden if len(hidden) == 2 else (*hidden, None)
        d_hidden = d_phi * (1 - tanh * tanh) * (1 if gate is None else gate)
        d_values = self._through(d_hidden, values, scorer.key_weight, key_weight, key_bias)
        if gate is not None:
            d_gate = d_phi * tanh * gate * (1 - gate)
            d_values += self._through(d_gate, values, scorer.gate_weight, gate_weight, gate_bias)
        return d_values

    def _through(self, d_hidden: Tensor, values: Tensor, weight: Tensor, d_weight: Tensor, d_bias: Tensor | None):
        d_weight += d_hidden.flatten(0, 1).T @ values.flatten(0, 1)
        if d_bias is not None:
            d_bias += d_hidden.sum((0, 1))
        return d_hidden @ weight

    def result(self) -> list[Tensor | None]:
        """The gradients, each of its own tensor's type; None for what is not there."""
        return [None if t is None else t.to(like.dtype) for t, like in zip(self._sums, self._like)]


def weights_from_scores(scores: Tensor, lse: Tensor, lengths: Tensor | None) -> Tensor:
    """The softmax, in the place of ``scores``: [bags, hops, rows], or [hops, total] of bags of these ``lengths``.

    Nothing is read on the host.
    """
    base = lse.masked_fill(lse == -torch.inf, 0)
    if lengths is None:
        return scores.sub_(base.unsqueeze(-1)).exp_()
    of_rows = base.repeat_interleave(lengths, 0, output_size=scores.shape[1])
    return scores.sub_(of_rows.T).exp_()


def scored(values: Tensor, scorer: Scorer) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(scores [groups, hops, rows], what the way back needs of the hidden layer), all of one type."""
    hidden: tuple[Tensor, ...] = ()
    phi = values
    if scorer.key_weight is not None:
        phi = torch.nn.functional.linear(values, scorer.key_weight, scorer.key_bias).tanh_()
        hidden = (phi,)
        if scorer.gate_weight is not None:
            gate = torch.nn.functional.linear(values, scorer.gate_weight, scorer.gate_bias).sigmoid_()
            hidden, phi = (phi, gate), phi * gate
    return (phi @ (scorer.scale * scorer.query).T).mT, hidden


def _of_bags(scores: Tensor, block: Block) -> Tensor:
    """[groups, bags of a group, hops, rows], -inf where a row is of another bag or none."""
    if block.member is None:
        return scores.unsqueeze(1)
    return scores.unsqueeze(1).masked_fill(~block.member.unsqueeze(2), -torch.inf)


def _dropped(shares: Tensor, block: Block, keep: Tensor | None, dropout_p: float) -> Tensor:
    if keep is None:
        return shares
    return shares * block.hops_of(keep).unsqueeze(1) / (1 - dropout_p)


def _weighted(shares: Tensor, values: Tensor, block: Block) -> Tensor:
    """[groups, bags of a group, hops, embed_dim]: the rows weighed with their shares [..., hops, rows]."""
    sums = (shares.flatten(1, 2) @ values).unflatten(1, shares.shape[1:3])
    if shares.shape[1] > 1 and not sums.isfinite().all():  # 0 times what one bag has must not reach the others
        for bag, there in enumerate(block.member[0]):
            sums[0, bag] = shares[0, bag][:, there] @ values[0, there]
    return sums


def _returned(shares: Tensor, grad: Tensor, block: Block) -> Tensor:
    """[groups, rows, embed_dim]: the gradient [..., hops, embed_dim] of their sums handed back to the rows."""
    d_values = shares.flatten(1, 2).mT @ grad.flatten(1, 2)
    if shares.shape[1] > 1 and not d_values.isfinite().all():
        d_values.zero_()
        for bag, there in enumerate(block.member[0]):
            d_values[0, there] = shares[0, bag][:, there].T @ grad[0, bag]
    return d_values
