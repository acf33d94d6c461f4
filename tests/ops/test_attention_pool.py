"""torch.ops.daam_kernels.attention_pool and its backward: schema, fakes, autograd, torch.compile."""

import pytest
import torch
from pooling import POOL_BACKENDS, problem
from support import assert_close, device_of
from torch._subclasses.fake_tensor import FakeTensorMode

from daam_kernels import AttentionPool, attention_pool

operator = torch.ops.daam_kernels.attention_pool.default
backward = torch.ops.daam_kernels.attention_pool_backward.default
every_backend = pytest.mark.parametrize("backend", POOL_BACKENDS)
SMALL = dict(lengths=(3, 0, 2), embed_dim=2, hops=2, hidden=3)


def arguments(score, kind, backend, dropout_p=0.0):
    """Those of the operator."""
    p = problem(score, kind, device=device_of(backend), **SMALL)
    mask, lengths, cu_seqlens = (p.bags.get(name) for name in ("key_padding_mask", "lengths", "cu_seqlens"))
    x, *tensors = (None if t is None else t.clone().requires_grad_() for t in (p.x.nan_to_num(), *p.tensors))
    valid = None if mask is None else ~mask
    keep = None
    if dropout_p:
        shape = p.grad_weights.shape if cu_seqlens is None else p.grad_weights.T.shape
        keep = torch.arange(shape.numel(), device=x.device).view(shape) % 3 != 1
    return (x, *tensors, valid, lengths, cu_seqlens, keep, 0.7, dropout_p, None)


@every_backend
@pytest.mark.parametrize("score, kind, dropout_p", [("gated", "dense", 0.3), ("dot", "packed", 0.0)])
def test_opcheck(backend, score, kind, dropout_p):
    inputs = arguments(score, kind, backend, dropout_p)
    torch.library.opcheck(operator, (*inputs, True, backend))
    with torch.no_grad():
        inputs = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs)
        results = operator(*inputs, True, backend)
        grads = torch.ones_like(results[0]), torch.ones_like(results[1])
        utils = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
        torch.library.opcheck(backward, (*grads, *inputs[:10], *results, *inputs[10:], backend), test_utils=utils)


@every_backend
@pytest.mark.parametrize("score, kind, dropout_p", [("gated", "dense", 0.3), ("dot", "packed", 0.3)])
def test_gradients_of_first_and_second_order(backend, score, kind, dropout_p):
    inputs = arguments(score, kind, backend, dropout_p)
    tensors = [t for t in inputs[:6] if t is not None]

    def function(*tensors):
        given = iter(tensors)
        return operator(*(None if t is None else next(given) for t in inputs[:6]), *inputs[6:], True, backend)[:2]

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_a_tensor_computed_from_another_gets_its_own_gradient():
    """Of second order too, where the first is taken of a graph in ordinary operations."""
    x = problem(kind="full", **SMALL).x.requires_grad_()
    function = lambda x: attention_pool(x, x.mean((0, 1))).square().sum()  # noqa: E731
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_the_gradient_of_a_compiled_call_is_not_differentiable():
    inputs = arguments("dot", "full", "reference")
    results = operator(*inputs, False, "reference")
    dx = backward(torch.ones_like(results[0]), None, *inputs[:10], *results, *inputs[10:], "reference")[0]
    with pytest.raises(RuntimeError, match="not differentiable itself"):
        dx.sum().backward()


def test_fakes_know_shapes_types_and_devices():
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 6, 8, device="cuda", dtype=torch.bfloat16)
        query, key = torch.empty(3, 5, device="cuda"), torch.empty(5, 8, device="cuda")
        packed = torch.empty(6, 8, device="cuda", dtype=torch.bfloat16)
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="cuda")
        for bags, x, counts in ((4, x, None), (2, packed, cu_seqlens)):
            tensors = x, query, key, None, None, None, None, None, counts, None
            results = operator(*tensors, 1.0, 0.0, None, True, "auto")
            shapes = (bags, 3, 8), (4, 3, 6) if counts is None else (3, 6), (bags, 3)
            assert tuple(t.shape for t in results) == shapes
            assert all(t.is_cuda and t.dtype == torch.float32 for t in results)
            found = backward(results[0], None, *tensors, *results, 1.0, 0.0, None, "auto")
            assert [t.shape for t in found] == [x.shape, query.shape, key.shape, (0,), (0,), (0,)]
            assert found[0].dtype == torch.bfloat16 and found[0].is_cuda


@pytest.mark.parametrize("score", ["additive", "multihead"])
def test_a_module_compiles_into_one_graph(score):
    p = problem(kind="packed", dtype=torch.float32)
    module, x = AttentionPool(8, 2, score=score, dropout=0.1).eval(), p.x.nan_to_num().requires_grad_()
    tensors = x, *module.parameters()

    def loss(module):
        context, weights = module(x, cu_seqlens=p.bags["cu_seqlens"], need_weights=True)
        return context.square().sum() + weights.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(module), tensors)
    for got, other in zip(torch.autograd.grad(loss(compiled), tensors), expected):
        assert_close(got, other, 1e-6)
    assert module.train() and torch.isfinite(loss(compiled))  # dropout draws within the graph
