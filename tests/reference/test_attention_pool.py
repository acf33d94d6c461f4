"""The plain formulas of attention pooling against their definitions, row by row, and against torch's own attention."""

import math

import pytest
import torch
from pooling import SCORES, offsets, problem, tensors_of
from support import assert_close, generator
from torch.nn import MultiheadAttention

from daam_kernels import reference
from daam_kernels.reference.attention_pool import penalty


def row_by_row(x, scorer):
    """(context, weights) of one bag [rows, embed_dim] without a tensor operation wider than a row."""
    query, key_weight, key_bias, gate_weight, gate_bias, scale = scorer
    context, weights = [], []
    for q in query:
        exponentials = []
        for row in x:
            phi = row
            if key_weight is not None:
                phi = torch.tanh(key_weight @ row + key_bias)
            if gate_weight is not None:
                phi = phi / (1 + torch.exp(-(gate_weight @ row + gate_bias)))
            exponentials.append(math.exp(scale * float(q @ phi)))
        shares = [e / sum(exponentials) for e in exponentials]
        weights.append(shares)
        context.append(sum(share * row for share, row in zip(shares, x)))
    return torch.stack(context), torch.tensor(weights, dtype=x.dtype)


@pytest.mark.parametrize("score", SCORES)
def test_the_formulas_row_by_row(score):
    x = torch.randn(2, 5, 4, generator=generator(), dtype=torch.float64)
    scorer = reference.Scorer(*tensors_of(score, 4, 3, 6), 0.7)
    context, weights = reference.attention_pool(x, scorer)
    for bag in range(2):
        for got, expected in zip((context[bag], weights[bag]), row_by_row(x[bag], scorer)):
            assert_close(got, expected, 1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_multihead_is_torchs_attention_with_the_seeds_as_queries(bias):
    rng = generator()
    attention = MultiheadAttention(8, 2, bias=bias, batch_first=True, dtype=torch.float64)
    x, seeds = torch.randn(3, 6, 8, generator=rng).double(), torch.randn(2, 8, generator=rng).double()
    valid = torch.rand(3, 6, generator=rng) < 0.7
    valid[:, 0] = True
    if bias:
        torch.nn.init.normal_(attention.in_proj_bias)
    expected = attention(seeds.expand(3, 2, 8), x, x, key_padding_mask=~valid)
    projection = attention.out_proj.weight, attention.out_proj.bias
    got = reference.multihead_attention_pool(
        x, seeds, attention.in_proj_weight, attention.in_proj_bias, *projection, 2, valid=valid
    )
    for result, exact in zip(got, expected):
        assert_close(result, exact, 1e-14)


def test_bags_without_a_valid_row_are_zero_and_give_no_gradient():
    p = problem(kind="full", lengths=(3, 3))
    x, query = p.x.requires_grad_(), p.tensors[0].requires_grad_()
    valid = torch.tensor([[False] * 3, [True] * 3])
    results = reference.attention_pool(x, reference.Scorer(query), valid=valid)
    for result in results:
        assert not result[0].any() and result[1].all()
    dx, dquery = torch.autograd.grad(results[0].square().sum(), (x, query))
    assert not dx[0].any() and dx[1].all() and dquery.isfinite().all()


def test_packed_bags_are_those_alone():
    p = problem(kind="packed", lengths=(4, 0, 2), embed_dim=3)
    x, scorer, counts = p.x.nan_to_num(), reference.Scorer(p.tensors[0]), torch.tensor([4, 0, 2])
    context, weights = reference.ragged_attention_pool(x, offsets(counts), scorer)
    assert not context[1].any()
    for bag, rows in ((0, slice(0, 4)), (2, slice(4, 6))):
        alone = reference.attention_pool(x[None, rows], scorer)
        assert_close(context[bag], alone[0][0], 1e-15)
        assert_close(weights[:, rows], alone[1][0], 1e-15)


def test_the_penalty_is_zero_for_hops_that_look_at_one_row_each():
    weights = torch.tensor([[[1.0, 0, 0], [0, 0, 1]], [[0.5, 0.5, 0], [0.5, 0.5, 0]]])
    assert penalty(weights).tolist() == [0.0, 2 * 0.5**2 + 2 * 0.5**2]


def test_derivatives_of_second_order():
    x = torch.randn(2, 3, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    tensors = [t.requires_grad_() for t in tensors_of("gated", 2, 2, 3)]
    valid = torch.tensor([[True, False, True], [False] * 3])

    def pool(x, *tensors):
        return reference.attention_pool(x, reference.Scorer(*tensors), valid=valid)

    assert torch.autograd.gradgradcheck(pool, (x, *tensors), fast_mode=True)
