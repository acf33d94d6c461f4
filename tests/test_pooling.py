"""daam_kernels.attention_pool: the contract on every backend, kinds of bags, edges, dropout, and what is refused."""

import pytest
import torch
from pooling import POOL_BACKENDS, SCORES, check, evaluate, offsets, problem, truth
from pooling import assert_contract as within
from support import DTYPES, assert_close, assert_same_bits, device_of, generator, transposed

from daam_kernels import attention_pool
from daam_kernels.reference import attention_pool_blocks

KINDS = ("dense", "packed", "full")
every_backend = pytest.mark.parametrize("backend", POOL_BACKENDS)


@every_backend
@pytest.mark.parametrize(
    "score, kind, dtype",
    [(score, kind, torch.float64) for score in SCORES for kind in KINDS]
    + [(*case, dtype) for case in (("dot", "dense"), ("gated", "packed")) for dtype in DTYPES[1:]],
    ids=str,
)
def test_the_contract(backend, score, kind, dtype):
    check(problem(score, kind, dtype, device_of(backend)), backend)


@pytest.mark.parametrize("elements", [16, 120, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_kind(monkeypatch, elements, kind):
    """Parts of a bag, several bags of a batch, several packed bags and parts of them."""
    monkeypatch.setattr(attention_pool_blocks, "_ON_CPU", elements)
    monkeypatch.setattr(attention_pool_blocks, "_MOST_BAGS", 3)
    check(problem("gated", kind, lengths=(9, 0, 14, 3, 1, 1, 0)), "reference")


@every_backend
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_large_scores_neither_overflow_nor_lose_digits(backend, mean):
    p = problem(dtype=torch.float32, device=device_of(backend), mean=mean)
    p = p._replace(tensors=(20 * p.tensors[0] if mean == 0 else p.tensors[0], *p.tensors[1:]))
    got, expected = evaluate(p, backend), truth(p)
    for result, exact, tolerance in zip(got, expected, (2e-5, 2e-5, 2e-4, 2e-4)):  # scores of 100 round by 1e-5
        assert_close(result, exact, tolerance)


@every_backend
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_bag_without_a_valid_row_is_zero_and_gives_no_gradient(backend, kind):
    p = problem("additive", kind, torch.float32, device_of(backend))
    context, weights, dx, *gradients = evaluate(p, backend)
    assert not context[1].any() and all(g.isfinite().all() for g in gradients)
    padding = p.bags["key_padding_mask"]
    if kind == "dense":
        padding = padding | (torch.arange(14, device=padding.device) >= p.bags["lengths"][:, None])
        weights = weights.transpose(1, 2)
    assert not weights[padding].any() and not dx[padding].any() and dx[~padding].all()


@every_backend
def test_a_batch_without_bags_or_rows(backend):
    device = device_of(backend)
    query = torch.ones(2, 3, device=device, requires_grad=True)
    for shape in ((0, 4, 3), (2, 0, 3)):
        x = torch.ones(shape, device=device, requires_grad=True)
        context, weights = attention_pool(x, query, need_weights=True, backend=backend)
        assert context.shape == (shape[0], 2, 3) and weights.shape == (shape[0], 2, shape[1]) and not context.any()
        dx, dquery = torch.autograd.grad(context.sum(), (x, query))
        assert dx.shape == shape and not dquery.any()


@every_backend
@pytest.mark.parametrize("kind", ["full", "packed"])
def test_a_nan_stays_within_its_bag(backend, kind):
    p = problem("dot", kind, torch.float32, device_of(backend), lengths=(4, 4, 4))
    p = p._replace(x=p.x.nan_to_num(), bags={k: v for k, v in p.bags.items() if k == "cu_seqlens"})
    spoilt = p.x.clone()
    spoilt.view(3, 4, -1)[1, 2, 0] = torch.nan
    got, expected = evaluate(p._replace(x=spoilt), backend), evaluate(p, backend)
    for result, exact in zip((got[0], got[2].view(3, 4, -1)), (expected[0], expected[2].view(3, 4, -1))):
        assert result[1].isnan().any()
        assert_close(result[::2], exact[::2], 1e-6)


@every_backend
def test_layouts_and_types_of_results(backend):
    p = problem(kind="full", dtype=torch.bfloat16, device=device_of(backend))
    expected = evaluate(p, backend)
    for x in (transposed(p.x), p.x.transpose(1, 2).contiguous().transpose(1, 2), p.x[:1].expand(4, -1, -1)):
        exact = expected if x.stride(0) else evaluate(p._replace(x=x.contiguous()), backend)
        for result, wanted in zip(evaluate(p._replace(x=x), backend), exact):
            assert result.dtype == wanted.dtype
            assert_close(result, wanted, 2**-7)
    assert [t.dtype for t in expected] == [torch.bfloat16] * 3 + [torch.float32]


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_of_the_seed_and_the_same_backward(backend, kind, monkeypatch):
    p = problem("additive", kind, torch.float64, device_of(backend))
    seen = []

    def rand(*shape, original=torch.rand, **options):
        seen.append(original(*shape, **options))
        return seen[-1]

    monkeypatch.setattr(torch, "rand", rand)
    torch.manual_seed(3)
    got = evaluate(p, backend, dropout_p=0.4)
    within(got, truth(p, seen[0].cpu() >= 0.4, 0.4), torch.float64)
    torch.manual_seed(3)
    assert_same_bits(evaluate(p, backend, dropout_p=0.4)[1].detach(), got[1].detach())


def test_one_hop_and_nested_bags():
    p = problem(kind="packed", lengths=(2, 5, 1), dtype=torch.float32)
    x, cu_seqlens, query = p.x.nan_to_num(), offsets(torch.tensor([2, 5, 1])), p.tensors[0]
    context, weights = attention_pool(x, query, cu_seqlens=cu_seqlens, max_seqlen=5, need_weights=True)
    one = attention_pool(x, query[1], cu_seqlens=cu_seqlens)
    assert one.shape == (3, 8)
    assert_close(one, context[:, 1], 1e-6)
    nested = torch.nested.nested_tensor_from_jagged(x, cu_seqlens).requires_grad_()
    nested_context, nested_weights = attention_pool(nested, query, need_weights=True)
    assert_same_bits(nested_context.detach(), context)
    assert [tuple(t.shape) for t in nested_weights.unbind()] == [(3, 2), (3, 5), (3, 1)]
    assert_close(torch.cat([t.T for t in nested_weights.unbind()]), weights, 1e-7)
    (dx,) = torch.autograd.grad(nested_context.square().sum(), nested)
    assert dx.is_nested and dx.values().abs().sum() > 0


def test_functional_transforms_take_ordinary_operations():
    p = problem(kind="full")
    function = lambda x: attention_pool(x, p.tensors[0]).square().sum()  # noqa: E731
    x = p.x.clone().requires_grad_()
    assert_close(torch.func.grad(function)(p.x), torch.autograd.grad(function(x), x)[0], 1e-12)


X, QUERY = torch.ones(2, 4, 3), torch.ones(2, 3)
PACKED = dict(x=torch.ones(4, 3), cu_seqlens=torch.tensor([0, 1, 4]))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(x=X.to_sparse()), TypeError, "x must be one dense tensor, got one of layout torch.sparse_coo"),
        (dict(query=QUERY.to_sparse()), TypeError, "query must be one dense tensor, got one of layout"),
        (dict(x=X.long()), TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int64"),
        (dict(x=X[0]), ValueError, r"x must have shape \[bags, rows, embed_dim\], .* got \[4, 3\]"),
        (dict(x=X, cu_seqlens=PACKED["cu_seqlens"]), ValueError, r"x must have shape \[total, embed_dim\]"),
        (dict(query=torch.ones(2, 4)), ValueError, r"query must have shape \[hops, embed_dim=3\] .* got \[2, 4\]"),
        (dict(query=QUERY.int()), TypeError, "query must be float64, .* got torch.int32"),
        (dict(key_weight=torch.ones(5, 3)), ValueError, r"query must have shape \[hops, hidden=5\]"),
        (dict(key_weight=torch.ones(3, 5)), ValueError, r"key_weight must have shape \[hidden, embed_dim=3\], got"),
        (dict(key_bias=torch.ones(3)), ValueError, "key_bias must be None without key_weight"),
        (dict(gate_weight=torch.ones(3, 3)), ValueError, "gate_weight must be None without key_weight"),
        (
            dict(key_weight=torch.ones(3, 3), gate_weight=torch.ones(2, 3)),
            ValueError, r"gate_weight must have shape \[3, 3\], like key_weight's, got \[2, 3\]",
        ),
        (dict(key_padding_mask=torch.ones(2, 4)), TypeError, "key_padding_mask must be a boolean tensor, .*float32"),
        (dict(key_padding_mask=torch.ones(2, 3) > 0), ValueError, r"key_padding_mask must have shape \[2, 4\], got"),
        (dict(lengths=torch.ones(2)), TypeError, "lengths must be int32 or int64, got torch.float32"),
        (dict(lengths=torch.tensor([1])), ValueError, r"lengths must have shape \[bags=2\], got \[1\]"),
        (dict(lengths=torch.tensor([1, 5])), ValueError, r"lengths must be in \[0, 4\], .* got 5 for bag 1"),
        (dict(lengths=torch.tensor([-1, 4])), ValueError, r"lengths must be in \[0, 4\], .* got -1 for bag 0"),
        (PACKED | dict(lengths=torch.tensor([1, 3])), ValueError, "lengths must be None where cu_seqlens is given"),
        (PACKED | dict(cu_seqlens=torch.tensor([0, 3])), ValueError, "cu_seqlens must end with .* 4, got 3"),
        (PACKED | dict(cu_seqlens=torch.tensor([0, 5, 4])), ValueError, "cu_seqlens must ascend, got 5 and then 4"),
        (PACKED | dict(cu_seqlens=torch.tensor([0.0, 4])), TypeError, "cu_seqlens must be int32 or int64"),
        (PACKED | dict(max_seqlen=2), ValueError, "max_seqlen must be at least the length .* 3"),
        (dict(max_seqlen=4), ValueError, "max_seqlen must be None without cu_seqlens"),
        (dict(scale=torch.inf), ValueError, "scale must be finite, got inf"),
        (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
        (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        (dict(backend="native"), ValueError, "backend must be one of auto, triton, reference, got 'native'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        attention_pool(**{"x": X, "query": QUERY, **arguments})


def test_memory_beyond_the_results_does_not_grow_with_the_bag():
    """In the forward pass; eager attention would make the scores, the weights, and a hidden layer of x's size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor):
                    self.most = max(self.most, t.untyped_storage().nbytes())
            return result

    rows, embed_dim = 200_000, 16
    x = torch.randn(1, rows, embed_dim, generator=generator()).bfloat16()
    key = torch.randn(64, embed_dim, generator=generator())
    with torch.no_grad(), Largest() as seen:  # the arguments are among what it sees
        attention_pool(x, torch.ones(1, 64), key, backend="reference")
    assert seen.most <= 4 * 64 * (attention_pool_blocks._ON_CPU // embed_dim)
    assert 4 * 64 * (attention_pool_blocks._ON_CPU // embed_dim) < 4 * 64 * rows
