"""The operator of additive attention: torch.library's checks, autograd, torch.compile, torch.func."""

import pytest
import torch
from additive import masks, problem
from daam_kernels import additive_attention, reference
from support import assert_close, assert_same_bits
from torch._dynamo.backends.debugging import aot_eager

SHAPE = (2, 2, 2, 3)
forward = torch.ops.daam_kernels.additive_attention.default
backward = torch.ops.daam_kernels.additive_attention_backward.default


def leaves(dtype=torch.float64):
    return [t.requires_grad_() for t in problem(SHAPE, hidden=2, value_dim=2, dtype=dtype)[:4]]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", [None, "all"])
def test_opcheck(kind, need_weights):
    options = masks(kind, SHAPE)
    mask = options.get("attn_mask")
    mask = None if mask is None else mask[None].requires_grad_()
    rest = mask, options.get("key_padding_mask"), torch.tensor([3]) if kind else None
    scalars = bool(kind), 0.25 if kind else 0.0, 0.5, False, need_weights, need_weights and bool(kind)
    tensors = leaves()
    torch.library.opcheck(forward, (*tensors, *rest, *scalars, "reference"))
    tensors = [t.detach() for t in tensors]
    results = forward(*tensors, *(None if t is None else t.detach() for t in rest), *scalars, "reference")
    grads = torch.ones_like(results[0]), torch.ones_like(results[2]) if need_weights else None
    rest = tuple(None if t is None else t.detach() for t in rest)
    arguments = (*grads, *tensors, *rest, *scalars, *results[:2], kind == "all", "reference")
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", [None, "added", "padding"])
def test_gradcheck_and_gradgradcheck(kind):
    shape = (2, 1, 2, 2)
    options = masks(kind, shape)
    tensors = [t.requires_grad_() for t in problem(shape, hidden=2, value_dim=1)[:4]]
    if kind == "added":  # added to a constant, as a finite mask plus one that forbids would be
        tensors.append(torch.randn(2, 1, dtype=torch.float64, requires_grad=True))

    def run(*tensors):
        mask = {"attn_mask": options["attn_mask"] + tensors[4]} if kind == "added" else {}
        return additive_attention(*tensors[:4], need_weights=True, scale=0.8, **(options | mask))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_second_gradients_where_query_is_made_of_key():
    """A gradient must stop at the operator's own inputs, and not follow one of them into another."""
    found = []
    for function in (additive_attention, reference.additive_attention):
        key, value, weight = (t.detach().clone().requires_grad_() for t in leaves()[1:])
        output = function(key * 2, key, value, weight)
        (first,) = torch.autograd.grad(output.square().sum(), key, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), (key, value, weight))))
    for got, expected in zip(*found):
        assert_close(got, expected, 1e-12)


def test_the_gradient_of_a_compiled_call_is_not_differentiable():
    tensors = leaves()
    plain = [t.detach() for t in tensors]
    rest = None, None, None, False, 0.0, 1.0, False, False, False
    results = forward(*plain, *rest, "reference")
    gradients = backward(torch.ones_like(results[0]), None, *tensors, *rest, *results[:2], False, "reference")
    with pytest.raises(RuntimeError, match="not differentiable itself"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    options = masks("padding", SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(additive_attention, fullgraph=True, backend=aot_eager, dynamic=dynamic)
    tensors = leaves()
    found = []
    for function in (additive_attention, compiled):
        output, weights = function(*tensors, need_weights=True, backend="reference", **options)
        loss = output.square().sum() + weights.square().sum()
        found.append((output.detach(), weights.detach(), *torch.autograd.grad(loss, tensors)))
    for got, expected in zip(*found):
        assert_same_bits(got, expected)


def test_a_compiled_call_drops_weights_too():
    torch._dynamo.reset()
    compiled = torch.compile(additive_attention, fullgraph=True, backend=aot_eager)
    output, weights = compiled(*leaves(), dropout_p=0.5, need_weights=True)
    assert 0 < (weights == 0).sum() < weights.numel()


def test_functional_transforms_take_ordinary_operations():
    tensors = [t.detach() for t in leaves()]
    got = torch.func.grad(lambda q: additive_attention(q, *tensors[1:]).sum())(tensors[0])
    query = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(additive_attention(query, *tensors[1:]).sum(), query)
    assert_close(got, expected, 1e-12)
