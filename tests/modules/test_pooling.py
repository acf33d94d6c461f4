"""AttentionPool: every score against its formula, the shapes of results, the penalty, torch's own attention."""

import pytest
import torch
from pooling import SCORES, offsets, problem
from support import assert_close, generator

from daam_kernels import AttentionPool, attention_pool, reference


def drawn(module):
    """Its parameters drawn anew from N(0, 1/4), biases too."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator(parameter.numel()))
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_scores_are_the_functions(score, bias):
    hidden = None if score == "dot" else 5
    module, p = drawn(AttentionPool(8, 3, hidden, score, bias=bias)), problem(kind="dense", dtype=torch.float32)
    context, weights = module(p.x, **p.bags, need_weights=True)
    layers = [t for layer in (module.key, module.gate) if layer is not None for t in (layer.weight, layer.bias)]
    expected = attention_pool(p.x, module.query, *layers, **p.bags, need_weights=True)
    torch.testing.assert_close((context, weights), expected, rtol=0, atol=0)
    assert module(p.x, **p.bags)[1] is None
    assert {layer is None for layer in (module.key, module.gate)} == {"dot": {True}, "gated": {False}}.get(
        score, {True, False}
    )


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("hops", [1, 3])
def test_multihead_is_the_plain_formula_and_its_gradients(hops, kind):
    p = problem(kind=kind, hops=hops)
    module = drawn(AttentionPool(8, hops, score="multihead", num_heads=2, dtype=torch.float64))
    x = p.x.requires_grad_()
    context, weights = module(x, **p.bags, need_weights=True)
    assert context.shape == ((4, 8) if hops == 1 else (4, 3, 8)) and not context[1].any()
    grad = p.grad.squeeze(1) if hops == 1 else p.grad
    got = torch.autograd.grad((context, weights), (x, *module.parameters()), (grad, p.grad_weights))

    parameters = (
        module.query, module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias, 2
    )  # fmt: skip
    mask = p.bags["key_padding_mask"]
    if kind == "dense":
        valid = ~mask & (torch.arange(x.shape[1]) < p.bags["lengths"][:, None])
        exact, exact_weights = reference.multihead_attention_pool(x, *parameters, valid=valid)
    else:
        bounds = p.bags["cu_seqlens"].tolist()
        bags = [
            reference.multihead_attention_pool(x[None, i:j], *parameters, valid=~mask[None, i:j])
            for i, j in zip(bounds, bounds[1:])
        ]
        exact = torch.cat([context for context, _ in bags])
        exact_weights = torch.cat([weights[0] for _, weights in bags], 1).T
    expected = torch.autograd.grad((exact, exact_weights), (x, *module.parameters()), (p.grad, p.grad_weights))
    assert_close(context, exact.squeeze(1) if hops == 1 else exact, 1e-12)
    assert_close(weights, exact_weights, 1e-12)
    for result, wanted in zip(got, expected):
        if wanted.abs().max() > 1e-12:
            assert_close(result, wanted, 1e-12)


def test_multihead_takes_the_parameters_of_torchs_attention():
    attention = torch.nn.MultiheadAttention(8, 4, batch_first=True)
    module = AttentionPool(8, 2, score="multihead", num_heads=4)
    missing, unexpected = module.load_state_dict(attention.state_dict(), strict=False)
    assert missing == ["query"] and not unexpected
    x = torch.randn(3, 5, 8, generator=generator())
    expected = attention(module.query.expand(3, 2, 8), x, x)
    for got, exact in zip(module(x, need_weights=True), expected):
        assert_close(got, exact, 1e-6)


@pytest.mark.parametrize("score", ["dot", "multihead"])
def test_nested_bags_and_packed_ones_agree(score):
    counts = torch.tensor([3, 1, 6])
    x, cu_seqlens = torch.randn(10, 8, generator=generator()), offsets(counts)
    module = drawn(AttentionPool(8, 2, score=score))
    nested = module(torch.nested.nested_tensor_from_jagged(x, cu_seqlens), need_weights=True)
    packed = module(x, cu_seqlens=cu_seqlens, need_weights=True)
    padded = torch.nn.utils.rnn.pad_sequence(x.split(counts.tolist()), batch_first=True)
    dense = module(padded, lengths=counts, need_weights=True)
    assert_close(nested[0], packed[0], 1e-6)
    assert_close(dense[0], packed[0], 1e-6)
    for bag, weights in enumerate(nested[1].unbind()):
        assert_close(weights, dense[1][bag, :, : counts[bag]], 1e-6)
    penalties = module.penalty(nested[1]), module.penalty(packed[1], cu_seqlens), module.penalty(dense[1])
    assert penalties[0].shape == (3,)
    for other in penalties[1:]:
        assert_close(other, penalties[0], 1e-6)


def test_the_penalty_trains_hops_apart():
    """Two hops that start alike come to look at different rows."""
    x = torch.eye(4)[None] * 3
    module = AttentionPool(4, 2)
    with torch.no_grad():
        module.query.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2))
        module.query[1, 2] += 0.01
    optimizer = torch.optim.Adam(module.parameters(), 0.2)
    first = None
    for _ in range(150):
        loss = module.penalty(module(x, need_weights=True)[1]).sum()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * first
    rows = module(x, need_weights=True)[1][0].argmax(1)
    assert rows[0] != rows[1]


def test_dropout_is_of_training_alone():
    module, x = AttentionPool(8, 3, dropout=0.5), torch.ones(2, 40, 8)
    weights = module(x, need_weights=True)[1]
    assert 0.3 < (weights == 0).double().mean() < 0.7
    assert_close(weights[weights != 0], torch.full_like(weights[weights != 0], 2 / 40), 1e-6)
    assert not (module.eval()(x, need_weights=True)[1] == 0).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(embed_dim=0), "embed_dim must be an int of at least 1, got 0"),
        (dict(hops=1.5), "hops must be an int of at least 1, got 1.5"),
        (dict(score="soft"), "score must be one of dot, additive, gated, multihead, got 'soft'"),
        (dict(hidden_dim=4), "hidden_dim must be None for score='dot'"),
        (dict(score="gated", hidden_dim=0), "hidden_dim must be an int of at least 1, got 0"),
        (dict(num_heads=2), "num_heads must be None for score='dot', got 2"),
        (dict(score="multihead", num_heads=3), "num_heads must divide embed_dim, 8, got 3"),
        (dict(dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
        (dict(backend="cuda"), "backend must be one of auto, triton, reference, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionPool(**{"embed_dim": 8, **arguments})


def test_bad_input_is_named():
    module = AttentionPool(8, 2)
    with pytest.raises(ValueError, match=r"x must have embed_dim=8 numbers in a row, got shape \[2, 3, 4\]"):
        module(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"weights must have shape \[bags, hops=2, rows\], got \[2, 3, 4\]"):
        module.penalty(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="ask for need_weights=True"):
        module.penalty(module(torch.ones(2, 3, 8))[1])
    with pytest.raises(TypeError, match="weights must be float64, .* got torch.int64"):
        module.penalty(torch.ones(1, 2, 3).long())
    with pytest.raises(ValueError, match="cu_seqlens must end with .* 10, got 9"):
        module.penalty(torch.ones(10, 2), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="x must be dense or a nested tensor of the layout torch.jagged"):
        module(torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)]))


def test_repr_says_what_it_is():
    assert "8, hops=2, score='multihead', num_heads=8" in repr(AttentionPool(8, 2, score="multihead"))
