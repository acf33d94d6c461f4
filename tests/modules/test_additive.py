"""AdditiveAttention: the module's shapes, projections, masks, decoding step by step, other libraries' weights."""

import copy

import numpy as np
import pytest
import torch
from daam_kernels import AdditiveAttention, reference
from support import assert_close, generator


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def test_the_two_lines_of_newcomers():
    query, key, value = torch.randn(1, 20), torch.randn(10, 20), torch.randn(10, 20)
    attention = AdditiveAttention(input_dim=20, hidden_dim=32)
    context, weights = attention(query, key, value)
    assert context.shape == (1, 20) and weights.shape == (1, 10)
    assert_close(weights.sum(), torch.tensor(1.0), 1e-6)
    assert_close(context, weights @ value, 1e-6)
    again, nothing = attention(query, key, value, need_weights=False)
    assert nothing is None
    assert_close(again, context, 1e-6)


def plain(module, query, key, value):
    """[batch, T, size] by the formula, head by head."""
    q, k = module.query_proj(query), module.key_proj(key)
    v = value if module.value_proj is None else module.value_proj(value)
    cut = [t.chunk(module.num_heads, -1) for t in (q, k, v)]
    found = []
    for head, (q, k, v) in enumerate(zip(*cut)):
        w = module.weight[head]
        if module.gain is not None:
            w = module.gain[head] * w / w.norm()
        scores = (torch.tanh(q.unsqueeze(2) + k.unsqueeze(1)) * w).sum(-1)
        found.append(scores.softmax(-1) @ v)
    output = torch.cat(found, -1)
    return output if module.out_proj is None else module.out_proj(output)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_heads, normalize", [(1, False), (1, True), (3, False), (3, True)])
def test_the_formula(num_heads, normalize, bias):
    module = AdditiveAttention(
        6, 9, num_heads, kdim=5, vdim=4, bias=bias, normalize=normalize, dropout=0.5, dtype=torch.float64
    ).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    query, key, value = randn(2, 3, 6), randn(2, 7, 5, seed=1), randn(2, 7, 4, seed=2)
    output, weights = module(query, key, value)
    assert_close(output, plain(module, query, key, value), 1e-12)
    assert output.shape == (2, 3, 4 if num_heads == 1 else 6) and weights.shape == (2, 3, 7)
    every = module(query, key, value, average_attn_weights=False)[1]
    assert every.shape == (2, num_heads, 3, 7)
    assert_close(every.mean(1), weights, 1e-12)
    for index in range(2):  # unbatched
        alone, own = module(query[index], key[index], value[index])
        assert_close(alone, output[index], 1e-12)
        assert_close(own, weights[index], 1e-12)
    assert not torch.equal(module.train()(query, key, value)[0], output)  # dropout


def test_masks():
    module = AdditiveAttention(6, num_heads=2, dtype=torch.float64)
    query, key = randn(2, 3, 6), randn(2, 5, 6, seed=1)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    output, weights = module(query, key, key_padding_mask=padding)
    assert not weights[1, :, 2:].any()
    assert_close(output[1], module(query[1], key[1, :2])[0], 1e-12)
    assert_close(output[1], module(query[1], key[1], key_padding_mask=padding[1])[0], 1e-12)
    per_head = torch.rand(4, 3, 5, generator=generator()) < 0.4
    per_head[..., 0] = False
    got = module(query, key, attn_mask=per_head)[0]
    assert_close(got, module(query, key, attn_mask=per_head.view(2, 2, 3, 5))[0], 1e-12)
    weights = module(query, key, attn_mask=per_head, average_attn_weights=False)[1]
    assert torch.equal(weights == 0, per_head.view(2, 2, 3, 5))
    weights = module(query, key, is_causal=True)[1]
    assert not weights.triu(1).any() and torch.equal(weights[:, 0, 0], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [None, "boolean", "added", "one row"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_by_rows_are_those_of_the_whole(kind, is_causal):
    module = AdditiveAttention(6, num_heads=2, dropout=0.5, dtype=torch.float64)
    query, key = randn(2, 7, 6), randn(2, 5, 6, seed=1)
    mask = {None: None, "boolean": randn(4, 7, 5) > 1, "added": randn(7, 5), "one row": randn(5) > 1}[kind]
    options = dict(attn_mask=mask, is_causal=is_causal, key_padding_mask=torch.arange(5) >= torch.tensor([[5], [3]]))
    for average in (True, False):
        options["average_attn_weights"] = average
        expected = module.eval()(query, key, **options)[1]
        blocks = list(module.train().weights_by_rows(query, key, rows=3, **options))
        assert [block.shape[-2] for block in blocks] == [3, 3, 1]
        assert_close(torch.cat(blocks, -2), expected, 1e-12)
    (whole,) = module.weights_by_rows(query[0], module.project_keys(key[0]), is_causal=is_causal)
    assert whole.shape == (7, 5) and not whole.requires_grad
    with pytest.raises(ValueError, match="attn_mask must broadcast to .*Tq=7.* got"):
        module.weights_by_rows(query, key, attn_mask=randn(6, 5))


def test_a_fully_padded_sequence_gives_no_nan():
    module = AdditiveAttention(4)
    query = torch.randn(2, 3, 4, requires_grad=True)
    output, weights = module(query, torch.randn(2, 5, 4), key_padding_mask=torch.tensor([[True] * 5, [False] * 5]))
    output.sum().backward()
    assert not output[0].any() and not weights[0].any() and not query.grad[0].any()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("num_heads", [1, 2])
def test_decoding_step_by_step_with_projected_keys(num_heads):
    module = AdditiveAttention(6, 4, num_heads, kdim=5, vdim=8, dtype=torch.float64)
    query, key, value = randn(2, 3, 6), randn(2, 7, 5, seed=1), randn(2, 7, 8, seed=2)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    output, weights = module(query, key, value, key_padding_mask=padding)
    keys = module.project_keys(key, value)
    for step in range(3):
        now, own = module(query[:, step : step + 1], keys, key_padding_mask=padding)
        assert_close(now, output[:, step : step + 1], 1e-12)
        assert_close(own, weights[:, step : step + 1], 1e-12)


def test_keys_follow_the_beams():
    module = AdditiveAttention(6, num_heads=2, dtype=torch.float64)
    query, encoded, beams = randn(3, 1, 6), randn(2, 5, 6, seed=1), torch.tensor([1, 0, 1])
    keys = module.project_keys(encoded)
    assert_close(module(query, keys.reorder(beams))[0], module(query, encoded[beams])[0], 1e-12)
    with pytest.raises(TypeError, match=r"batches must be a tensor of int64 or int32, .* got torch.bool \[2\]"):
        keys.reorder(torch.ones(2).bool())
    with pytest.raises(ValueError, match="got keys without a batch"):
        module.project_keys(encoded[0]).reorder(beams)


def test_a_decoder_that_attends_to_its_own_past():
    module = AdditiveAttention(6, num_heads=2, dtype=torch.float64)
    x = randn(2, 5, 6)
    expected = module(x, x, is_causal=True)[0]
    keys = None
    for step in range(5):
        now = x[:, step : step + 1]
        more = module.project_keys(now)
        keys = more if keys is None else keys.append(more)
        assert_close(module(now, keys)[0], expected[:, step : step + 1], 1e-12)


@pytest.mark.parametrize("use_scale", [True, False])
def test_keras_weights(use_scale):
    """Keras' published formula: scores = sum(scale * tanh(query + key), axis=-1), softmax, times value."""
    scale = np.linspace(-1, 1, 6)
    options = dict(dtype=torch.float64)
    if use_scale:
        module = AdditiveAttention.from_keras([scale], **options)
    else:
        module = AdditiveAttention.from_keras([], dim=6, **options)
    query, key, value = randn(2, 3, 6), randn(2, 7, 6, seed=1), randn(2, 7, 4, seed=2)
    q, k, v = (t.numpy() for t in (query, key, value))
    scores = ((scale if use_scale else 1.0) * np.tanh(q[:, :, None] + k[:, None])).sum(-1)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    output, got = module(query, key, value)
    assert_close(got, torch.from_numpy(weights), 1e-12)
    assert_close(output, torch.from_numpy(weights @ v), 1e-12)
    assert module.weight.requires_grad == use_scale and len(list(module.parameters())) == 1
    module.reset_parameters()  # there are no projections to reset


def test_opennmt_weights():
    """GlobalAttention("mlp") as published: linear_out([c; query]), c by softmax(v . tanh(W_q q + b + W_c memory))."""
    shapes = {
        "linear_query.weight": (6, 6), "linear_query.bias": (6,), "linear_context.weight": (6, 6), "v.weight": (1, 6),
        "linear_out.weight": (6, 12), "linear_out.bias": (6,),
    }  # fmt: skip
    state = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    module = AdditiveAttention.from_opennmt(state, dtype=torch.float64)
    source, memory = randn(2, 3, 6, seed=8), randn(2, 7, 6, seed=9)
    query = source @ state["linear_query.weight"].T + state["linear_query.bias"]
    context = memory @ state["linear_context.weight"].T
    align = (torch.tanh(query[:, :, None] + context[:, None]) @ state["v.weight"].T).squeeze(-1).softmax(-1)
    joined = torch.cat((align @ memory, source), -1)
    output, weights = module(source, memory)
    assert_close(weights, align, 1e-12)
    assert_close(output, joined @ state["linear_out.weight"].T + state["linear_out.bias"], 1e-12)
    assert_close(module(source[0], memory[0])[0], output[0], 1e-12)
    with pytest.raises(ValueError, match="state_dict must have the names .* got .*linear_cover.weight"):
        AdditiveAttention.from_opennmt(state | {"linear_cover.weight": randn(6, 1)})
    with pytest.raises(ValueError, match=r"state_dict must hold linear_out.weight of shape \[6, 12\].* got \[6, 11\]"):
        AdditiveAttention.from_opennmt(state | {"linear_out.weight": randn(6, 11)})
    with pytest.raises(TypeError, match="state_dict must hold tensors, got ndarray for v.weight"):
        AdditiveAttention.from_opennmt(state | {"v.weight": np.ones((1, 6))})
    with pytest.raises(TypeError, match="num_heads must not be given"):
        AdditiveAttention.from_opennmt(state, num_heads=2)


def test_compiles_with_sizes_that_change():
    module = AdditiveAttention(6, num_heads=2, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((3, 5), (4, 7)):
        arguments = randn(2, queries, 6), randn(2, keys, 6)
        mask = randn(2, 1, queries, keys, seed=1)
        for got, expected in zip(compiled(*arguments, attn_mask=mask), module(*arguments, attn_mask=mask)):
            assert_close(got, expected, 1e-12)


def test_training_in_half_types_and_autocast():
    module = AdditiveAttention(8, num_heads=1)
    x = torch.randn(2, 5, 8)
    expected = module(x, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(module(x, x)[0], expected, 0.03)
    half = AdditiveAttention(8, num_heads=2, dtype=torch.bfloat16)
    half(x.bfloat16(), x.bfloat16())[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


BAD = [
    (dict(input_dim=0), ValueError, "input_dim must be an int of at least 1, got 0"),
    (dict(hidden_dim=9, num_heads=2), ValueError, "hidden_dim must be a multiple of num_heads=2, got 9"),
    (dict(input_dim=9, hidden_dim=8, num_heads=2), ValueError, "input_dim must be a multiple of num_heads=2, got 9"),
    (dict(dropout=1.5), ValueError, r"dropout must be in \[0, 1\), got 1.5"),
    (dict(backend="fast"), ValueError, "backend must be one of"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message for _, _, message in BAD])
def test_arguments_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        AdditiveAttention(**({"input_dim": 8} | change))


CALLS = [
    (lambda m, q, k: m(q[..., :3], k), ValueError, r"query must have shape .*input_dim=6.* got \[2, 3, 3\]"),
    (lambda m, q, k: m(q.long(), k), TypeError, "query must be float64.* got torch.int64"),
    (lambda m, q, k: m(q, k[:, :0]), ValueError, "key must have at least 1 key, got an empty set of keys"),
    (lambda m, q, k: m(q, k[0]), ValueError, "query and key must both be batched or neither"),
    (lambda m, q, k: m(q, k[:1]), ValueError, "key must have query's batch of 2, got 1"),
    (lambda m, q, k: m(q, k, k[:, :2]), ValueError, r"value must have one row for each key, \[2, 5\], got"),
    (lambda m, q, k: m(q, k, k[0]), ValueError, "value must have key's 3 dimensions, got shape"),
    (lambda m, q, k: m(q, m.project_keys(k), k), ValueError, "value must be None where key is ProjectedKeys"),
    (lambda m, q, k: m(q, "keys"), TypeError, "key must be a tensor, got str"),
    (lambda m, q, k: m(q, k, key_padding_mask=torch.ones(2, 4).bool()), ValueError, "key_padding_mask must have shape"),
    (
        lambda m, q, k: m(q[0], k[0], key_padding_mask=torch.ones(1, 5).bool()),
        ValueError,
        r"key_padding_mask must have shape \[Tk=5\] where query is unbatched, got \[1, 5\]",
    ),
    (
        lambda m, q, k: m(q.double(), k),
        TypeError,
        "query must be of the module's type, torch.float32, got torch.float64",
    ),
    (lambda m, q, k: m(q, k.to("meta")), ValueError, "key must be on the module's device, cpu, got meta"),
    (lambda m, q, k: m.project_keys(k).append(k), TypeError, "more must be ProjectedKeys.* got Tensor"),
    (
        lambda m, q, k: m.project_keys(k).append(m.project_keys(k[:1])),
        ValueError,
        r"more must have a key of torch.float32 and shape \[batch=2, heads=1, Tk, .*got torch.float32 \[1, 1, ",
    ),
    (
        lambda m, q, k: m.project_keys(k).append(copy.deepcopy(m).double().project_keys(k.double())),
        ValueError,
        "more must have a key of torch.float32 .*got torch.float64",
    ),
]


@pytest.mark.parametrize("call, error, message", CALLS, ids=[message for _, _, message in CALLS])
def test_inputs_that_do_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call(AdditiveAttention(6), torch.randn(2, 3, 6), torch.randn(2, 5, 6))


def test_keras_weights_that_do_not_fit():
    for weights, dim in (([np.ones(3)] * 2, None), ([], None), ([np.ones((3, 2))], None), ([np.ones(3)], 4), ([], 2.5)):
        with pytest.raises(ValueError, match="weights must be|dim must be"):
            AdditiveAttention.from_keras(weights, dim)
    with pytest.raises(TypeError, match=r"weights must be \[scale\], scale an array, got 'scale'"):
        AdditiveAttention.from_keras(["scale"])


def test_the_module_is_what_the_reference_computes_from_its_projections():
    module = AdditiveAttention(6, num_heads=2, dtype=torch.float64)
    query, key = randn(2, 3, 6), randn(2, 5, 6, seed=1)
    keys = module.project_keys(key)
    expected = reference.additive_attention(
        module._heads(module.query_proj(query)), keys.key, keys.value, module.weight
    )
    assert_close(module(query, key)[0], module.out_proj(expected.transpose(1, 2).flatten(2)), 1e-12)
