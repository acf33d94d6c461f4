"""The reference of additive attention: the formula, element by element, and the forms that it must agree with."""

import numpy as np
import pytest
import torch
from additive import NAMES, exact, masks, problem, public, results
from daam_kernels import reference
from daam_kernels.options import AdditiveProblem
from daam_kernels.reference import additive_attention_blocks as blocks
from daam_kernels.reference.dropout import dropout_keep
from support import assert_close, extended

SHAPE = (2, 3, 5, 7)
KINDS = [None, "causal", "boolean", "added", "padding", "all"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_in_long_double(kind):
    query, key, value, weight, *_ = problem(SHAPE)
    options = masks(kind, SHAPE)
    output, weights = reference.additive_attention(query, key, value, weight, scale=0.7, need_weights=True, **options)
    q, k, v, w = (extended(t) for t in (query, key, value, weight))
    for b, h, i in np.ndindex(SHAPE[:3]):
        scores = np.full(SHAPE[3], -np.inf, np.longdouble)
        for j in range(SHAPE[3]):
            mask = options.get("attn_mask")
            mask = None if mask is None else mask.expand(SHAPE)[b, h, i, j].item()
            forbidden = mask is True or (options.get("is_causal") and j > i)
            if not forbidden and not ("key_padding_mask" in options and options["key_padding_mask"][b, j]):
                scores[j] = np.longdouble(0.7) * (w[h] * np.tanh(q[b, h, i] + k[b, h, j])).sum() + (mask or 0)
        p = np.zeros_like(scores)
        if scores.max() > -np.inf:
            p = np.exp(scores - scores.max())
            p /= p.sum()
        assert np.abs(weights[b, h, i].numpy() - p).max() < 1e-14
        assert np.abs(output[b, h, i].numpy() - (p[:, None] * v[b, h]).sum(0)).max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients(kind):
    shape = (2, 1, 2, 3)
    *tensors, _, _ = problem(shape, hidden=2, value_dim=1)
    options = masks(kind, shape)
    tensors = [t.requires_grad_() for t in tensors]

    def run(*tensors):
        return reference.additive_attention(*tensors, need_weights=True, **options)

    assert torch.autograd.gradcheck(run, tensors)
    if kind == "all":
        assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_size_give_the_same(monkeypatch, kind, dropout_p):
    tensors, options = problem(SHAPE), masks(kind, SHAPE)
    seed = torch.tensor([1 << 40 | 17]) if dropout_p else None
    more = dict(dropout_p=dropout_p, seed=seed, scale=0.7)
    expected = exact(*tensors, **options, **more)
    query, key, value, weight, grad, grad_weights = tensors
    mask = options.get("attn_mask")
    mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
    masked = mask, options.get("key_padding_mask"), seed, options.get("is_causal", False), dropout_p
    arguments = AdditiveProblem(*tensors[:4], *masked, 0.7, False, True, False)
    for block, most_keys in ((1 << 17, 128), (40, 3), (1, 1), (100, 5)):
        monkeypatch.setattr(blocks, "_BLOCK", block)
        monkeypatch.setattr(blocks.Activations, "most_keys", most_keys)
        output, lse, weights = blocks.additive_attention_forward(arguments)
        delta = (grad * output).sum(-1) + (grad_weights * weights).sum(-1)
        added = mask is not None and mask.dtype != torch.bool
        gradients = blocks.additive_attention_backward(arguments, grad, grad_weights, delta, lse, added)
        for got, want in zip((output, weights, *gradients), expected):
            assert_close(got.reshape(want.shape), want, 1e-13)


@pytest.mark.parametrize("size, queries", [(1.0, 5), (1.0, 1), (45.0, 5), (1e-4, 5), (1e-4, 1)])
def test_tanh_of_every_size_in_blocks(size, queries):
    """By exponentials of queries and keys, by a sigmoid (one query, large ones), and by tanh itself (small ones)."""
    query, key, *rest = problem((2, 2, queries, 7), hidden=16, dtype=torch.float32)
    query, key = query * size, key * size
    if size > 1:
        key[0, 0] = 10 - query[0, 0, 0]  # tanh is not saturated everywhere
    tensors = query, key, *rest
    found = zip(NAMES, results(public("reference"), *tensors), exact(*tensors))
    for name, got, want in found:
        if size >= 1 or name != "dquery":  # where tanh is linear a query makes no difference: that is rounding alone
            assert_close(got, want, 2e-6, name)


def test_a_query_without_keys_gives_zero_and_no_gradient():
    tensors = problem((1, 1, 3, 4))
    mask = torch.zeros(3, 4, dtype=torch.float64)
    mask[1] = -torch.inf
    output, weights, *gradients = results(reference.additive_attention, *tensors, attn_mask=mask)
    assert not output[0, 0, 1].any() and not weights[0, 0, 1].any() and not gradients[0][0, 0, 1].any()
    assert all(g.isfinite().all() for g in gradients)


def test_the_random_numbers_are_philox():
    """Known answers of Philox-4x32-10, from the formula in plain integers."""
    seed, (slice_number, row) = 0x0123456789ABCDEF, (5, 9)

    def words(group):
        c, k = [group, row, slice_number, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    expected = [words(j // 4)[j % 4] >= 0.25 * 2**32 for j in range(3, 30)]
    place = torch.tensor([slice_number]), torch.tensor([row])
    assert dropout_keep(torch.tensor([seed]), *place, range(3, 30), 0.25).flatten().tolist() == expected


def test_dropout_drops_its_share():
    rows = torch.arange(300)
    keep = dropout_keep(torch.tensor([1]), torch.tensor([0]), rows, range(400), 0.3)
    assert abs(keep.double().mean().item() - 0.7) < 4 * (0.21 / keep.numel()) ** 0.5
