"""daam_kernels.additive_attention: what it takes, what it refuses, and results that do not depend on the layout."""

import daam_kernels
import pytest
import torch
from additive import assert_contract, check_average, exact, masks, problem, public, results
from daam_kernels import additive_attention, reference
from support import DTYPES, assert_close, assert_same_bits, every_second, transposed

SHAPE = (2, 2, 5, 7)


@pytest.mark.parametrize("kind", [None, "causal", "boolean", "added", "padding", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_contract(dtype, kind):
    tensors, options = problem(SHAPE, dtype=dtype), masks(kind, SHAPE)
    assert_contract(results(public("reference"), *tensors, **options), exact(*tensors, **options), dtype)


def test_the_weights_alone_have_a_gradient_and_the_output_alone():
    tensors = problem(SHAPE)
    for chosen in (0, 1):
        found = []
        for function in (additive_attention, public("reference"), reference.additive_attention):
            inputs = [t.clone().requires_grad_() for t in tensors[:4]]
            result = function(*inputs, need_weights=True)[chosen]
            unused = function is reference.additive_attention  # the others give zeros
            found.append(torch.autograd.grad(result.square().sum(), inputs, allow_unused=unused))
        for *every, expected in zip(*found):
            for got in every:
                assert_close(got, torch.zeros_like(got) if expected is None else expected, 1e-12)


def test_layouts_give_the_same_bits():
    *tensors, _, _ = problem(SHAPE)
    expected = additive_attention(*tensors)
    for layout in (transposed, every_second, lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1)):
        assert_same_bits(additive_attention(*map(layout, tensors)), expected)
    value = tensors[2][:1, :1].expand(tensors[2].shape)
    assert_same_bits(additive_attention(*tensors[:2], value, tensors[3]),
                     additive_attention(*tensors[:2], value.clone(), tensors[3]))  # fmt: skip


def test_masks_mean_what_they_mean_in_multihead_attention():
    tensors = [t.float() for t in problem((2, 2, 5, 5), hidden=3)[:4]]
    boolean = torch.rand(5, 5) < 0.4
    boolean[:, 0] = False
    weights = additive_attention(*tensors, attn_mask=boolean, need_weights=True)[1]
    assert (weights[..., boolean] == 0).all() and (weights[..., ~boolean] > 0).all()
    added = torch.zeros(5, 5).masked_fill(boolean, -torch.inf)
    assert_close(additive_attention(*tensors, attn_mask=added, need_weights=True)[1], weights, 1e-6)
    padding = torch.tensor([[False] * 4 + [True], [True] + [False] * 4])
    expected = additive_attention(*tensors, attn_mask=boolean | padding[:, None, None])
    assert_close(additive_attention(*tensors, attn_mask=boolean, key_padding_mask=padding), expected, 1e-6)
    bias = torch.zeros(2, 5).masked_fill(padding, -torch.inf)
    assert_close(additive_attention(*tensors, attn_mask=boolean, key_padding_mask=bias), expected, 1e-6)
    assert_close(additive_attention(*tensors, attn_mask=added, key_padding_mask=bias), expected, 1e-6)


def test_a_mask_that_is_expanded_already_has_the_gradient_of_what_it_was_made_of():
    *tensors, grad, _ = problem(SHAPE)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    found = []
    for mask in (bias, bias.expand(SHAPE), bias[None, None, None]):
        found.append(torch.autograd.grad(additive_attention(*tensors, attn_mask=mask), bias, grad)[0])
    assert_close(found[1], found[0], 1e-12)
    assert_close(found[2], found[0], 1e-12)


def test_dropout_is_decided_by_torchs_seed_and_the_same_backward():
    *tensors, grad, _ = problem((1, 2, 6, 40))
    tensors = [t.requires_grad_() for t in tensors]
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        output, weights = additive_attention(*tensors, dropout_p=0.5, need_weights=True)
        runs.append((output.detach(), *torch.autograd.grad(output, tensors, grad)))
    for first, second in zip(*runs):
        assert_same_bits(first, second)
    dropped = (weights == 0).double().mean().item()
    assert 0.35 < dropped < 0.65
    assert not torch.equal(additive_attention(*tensors, dropout_p=0.5), output)
    # The output is linear in the values: its gradient is the weights that forward had, dropped ones included.
    assert_close(runs[0][3], weights.transpose(-2, -1) @ grad, 1e-12)
    full = additive_attention(*tensors, need_weights=True)[1]
    kept = weights != 0
    assert_close(weights[kept], 2 * full[kept], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_mean_of_the_heads_weights(dtype):
    check_average("reference", dtype)


def test_nothing_of_the_weights_size_is_kept_for_the_backward():
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    tensors = [t.requires_grad_() for t in problem((1, 2, 40, 50))[:4]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        weights = additive_attention(*tensors, need_weights=True, backend="reference")[1]
    assert max(sizes) < 40 * 50
    assert weights.square().sum().requires_grad


def test_no_queries_and_no_batch():
    for shape in ((2, 2, 0, 7), (0, 2, 5, 7)):
        output, weights, *gradients = results(public("reference"), *problem(shape))
        assert output.shape == (*shape[:3], 4) and weights.shape == shape
        assert all(not g.any() for g in gradients)


BAD = [
    (dict(query=[1.0]), TypeError, "query must be a tensor, got list"),
    (dict(query=torch.ones(2, 2, 5, 3, dtype=torch.int64)), TypeError, "query must be float64.* got torch.int64"),
    (
        dict(query=torch.ones(5, 3).double()),
        ValueError,
        r"query must have shape \[batch, heads, Tq.* got \[5, 3\]",
    ),
    (
        dict(key=torch.ones(2, 2, 7, 3).double().to_sparse()),
        TypeError,
        "key must be one dense tensor, got one of layout torch.sparse_coo",
    ),
    (dict(key=torch.ones(2, 2, 7, 3)), TypeError, "key must be of query's type, torch.float64, got torch.float32"),
    (dict(key=torch.ones(2, 2, 7, 4).double()), ValueError, r"key must have shape .*hidden=3.* got \[2, 2, 7, 4\]"),
    (dict(key=torch.ones(2, 2, 0, 3).double()), ValueError, "key must have at least 1 key, got an empty set"),
    (dict(value=torch.ones(2, 2, 6, 4).double()), ValueError, r"value must have shape .*Tk=7.* got \[2, 2, 6, 4\]"),
    (dict(value=torch.ones(2, 2, 7, 4, device="meta").double()), ValueError, "value must be on query's device"),
    (dict(weight=torch.ones(3).double()), ValueError, r"weight must have shape \[heads=2, hidden=3\], got \[3\]"),
    (dict(weight=torch.ones(2, 3).int()), TypeError, "weight must be of a floating-point type, got torch.int32"),
    (dict(attn_mask=torch.ones(5, 7).int()), TypeError, "attn_mask must be a boolean tensor, .* got torch.int32"),
    (dict(attn_mask=torch.ones(7, 5)), ValueError, r"attn_mask must broadcast to .*Tk=7.* got \[7, 5\]"),
    (dict(attn_mask="causal"), TypeError, "attn_mask must be a boolean tensor, .* got str"),
    (
        dict(key_padding_mask=torch.ones(2, 7).long()),
        TypeError,
        "key_padding_mask must be a boolean tensor, .* got torch.int64",
    ),
    (dict(key_padding_mask=torch.ones(7, 2).bool()), ValueError, r"key_padding_mask must have shape .* got \[7, 2\]"),
    (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (dict(dropout_p="0.1"), TypeError, "dropout_p must be a number, got str"),
    (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    (dict(backend="flash"), ValueError, "backend must be one of auto, .* got 'flash'"),
    (dict(backend="native"), RuntimeError, "backend asks for 'native', which cannot serve"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_what_does_not_fit_is_named(change, error, message):
    arguments = dict(zip(("query", "key", "value", "weight"), problem(SHAPE)))
    with pytest.raises(error, match=message):
        additive_attention(**(arguments | change))


def test_a_nested_tensor_is_refused():
    nested = torch.nested.nested_tensor([torch.ones(2, 3, 4), torch.ones(2, 5, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query must be one dense tensor, got a nested one"):
        daam_kernels.additive_attention(nested, *problem(SHAPE)[1:4])
