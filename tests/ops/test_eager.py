"""Calls that are remembered: what was checked once stays checked, what is unusual still takes the long way."""

import functools
import warnings

import pytest
import torch
import torch._dynamo.testing
from daam_kernels import FusedMultiHeadDAAM, density_attention
from daam_kernels.ops import eager
from support import BACKENDS, FUSED_BACKENDS, assert_same_bits, device_of, gaussians, generator
from torch.utils._python_dispatch import TorchDispatchMode

remembers = pytest.mark.skipif("native" not in BACKENDS, reason="only calls of the native library are remembered")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The calls that are remembered: none at first."""
    fresh = {}
    monkeypatch.setattr(eager, "_calls", fresh)
    return fresh


def inputs(*shape, device="cpu"):
    x = torch.randn(shape or (6, 16), generator=generator()).to(device)
    return x, *gaussians(2, 3, generator(1), offsets=0.05, device=device)


def exact(x, mean_offsets, c, **options):
    return density_attention(x, mean_offsets, c, backend="reference", **options)


@remembers
def test_the_second_call_is_remembered_and_gives_the_same_bits(calls):
    tensors = inputs()
    first = density_attention(*tensors)
    assert len(calls) == 1
    assert_same_bits(density_attention(*tensors), first)
    density_attention(*(t.clone().requires_grad_() for t in tensors)).sum().backward()
    assert len(calls) == 1, "the same call again, whatever is asked of autograd"


@remembers
@pytest.mark.parametrize(
    "change",
    [
        lambda x, o, c: ((x[:4], o, c), {}),
        lambda x, o, c: ((x.t().contiguous().t(), o, c), {}),
        lambda x, o, c: ((x.double(), o, c), {}),
        lambda x, o, c: ((x.view(3, 2, 16), o, c), {}),
        lambda x, o, c: ((x, o[:1], c[:1]), {}),
        lambda x, o, c: ((x, o[:, :2], c[:, :2]), {}),
        lambda x, o, c: ((x, o.double(), c), {}),
        lambda x, o, c: ((x, o, c.bfloat16()), {}),
        lambda x, o, c: ((x, o, c.t().contiguous().t()), {}),
        lambda x, o, c: ((x, o, c), dict(norm_axis=0)),
        lambda x, o, c: ((x, o, c), dict(padding_value=0.0)),
        lambda x, o, c: ((x, o, c), dict(padding_value=0.0, padding_stats="exclude")),
        lambda x, o, c: ((x, o, c), dict(normalize="softmax", eps=3.0)),
        lambda x, o, c: ((x, o, c), dict(eps=3.0)),
        lambda x, o, c: ((x, o, c), dict(residual=True)),
        lambda x, o, c: ((x, o, c), dict(mask=x > 0)),
    ],
)
def test_what_a_call_depends_on(change):
    x, mean_offsets, c = inputs()
    x[:, ::3] = 0
    plain = density_attention(x, mean_offsets, c)
    for _ in range(2):
        tensors, options = change(x, mean_offsets, c)
        got, expected = density_attention(*tensors, **options), exact(*tensors, **options)
        assert got.dtype == expected.dtype and got.stride() == torch.empty_like(tensors[0]).stride()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        y, weights = density_attention(*tensors, return_weights=True, **options)
        assert_same_bits(y, got)
    assert_same_bits(density_attention(x, mean_offsets, c), plain)


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(norm_axis=True), TypeError),
        (dict(norm_axis=1.0), TypeError),
        (dict(eps=True), TypeError),
        (dict(padding_value=True), TypeError),
        (dict(padding_stats=["zero"]), ValueError),
        (dict(normalize={}), ValueError),
        (dict(backend=[]), ValueError),
    ],
)
def test_what_equals_a_good_argument_is_still_refused(options, error):
    tensors = inputs()
    density_attention(*tensors, norm_axis=1, eps=1.0, padding_value=1.0)
    for name, value in dict(norm_axis=1, eps=1.0, padding_value=1.0).items():
        options.setdefault(name, value)
    with pytest.raises(error):
        density_attention(*tensors, **options)


@remembers
def test_no_more_than_so_many_calls_are_remembered(calls, monkeypatch):
    monkeypatch.setattr(eager, "_MOST", 3)
    tensors = inputs()
    for eps in (1.0, 2.0, 3.0, 4.0, 5.0):
        density_attention(*tensors, eps=eps)
        assert 1 <= len(calls) <= 3
    torch.testing.assert_close(density_attention(*tensors, eps=1.0), exact(*tensors, eps=1.0))


@remembers
def test_a_copy_that_x_needs_is_made_every_time(calls):
    """No [outer, R, inner] strides: nothing to remember."""
    x = torch.randn(4, 6, 8, 3, generator=generator()).permute(0, 3, 1, 2)[:, :, ::2, ::2].transpose(1, 3)
    expanded = torch.randn(4, 1, 8, 3, generator=generator(2)).expand(4, 6, 8, 3)
    for t in (x, expanded):
        for axis in range(4):
            for _ in range(2):
                tensors = t.double(), *gaussians(1, 3, generator(1), dtype=torch.float64)
                if t.shape[axis] > 1:
                    y = density_attention(*tensors, norm_axis=axis)
                    torch.testing.assert_close(y, exact(*tensors, norm_axis=axis))


def test_what_changes_on_a_module_counts_at_once():
    x = inputs()[0]
    module = FusedMultiHeadDAAM(-1, 2, 3)
    for change in (
        lambda: None,
        lambda: setattr(module, "eps", 3.0),
        lambda: setattr(module, "normalize", "softmax"),
        lambda: setattr(module, "norm_axis", 0),
        lambda: module.double(),
        lambda: setattr(module, "c", torch.nn.Parameter(module.c.detach() + 1)),
        lambda: module.c.data.mul_(2),
        lambda: torch.nn.utils.parametrize.register_parametrization(module, "c", torch.nn.Softplus()),
    ):
        change()
        options = dict(norm_axis=module.norm_axis, eps=module.eps, normalize=module.normalize)
        expected = exact(x, module.mean_offsets, module.c, **options)
        for _ in range(2):
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


# Tensors that are no plain numbers in memory, and calls that others listen to


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_a_batch_of_gradients_at_once(backend):
    """autograd's own vmap: its batches have no memory to point to."""
    tensors = [t.requires_grad_() for t in inputs(3, 8, device=device_of(backend))]
    y = density_attention(*tensors, backend=backend)
    each = torch.eye(24, device=y.device).view(24, 3, 8)
    got = torch.autograd.grad(y, tensors, each, is_grads_batched=True)
    for g, *rows in zip(got, *(torch.autograd.grad(exact(*tensors), tensors, row) for row in each)):
        torch.testing.assert_close(g, torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_views(backend):
    """The imaginary part of a conjugate is stored without its sign."""
    x, mean_offsets, c = inputs(3, 8, device=device_of(backend))
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    expected = density_attention(x, mean_offsets, c, backend=backend)
    plain = torch.empty_like(negated).copy_(negated)
    for _ in range(2):
        assert_same_bits(density_attention(plain, mean_offsets, c, backend=backend), expected)
        assert_same_bits(density_attention(negated, mean_offsets, c, backend=backend), expected)
    leaf, seen = x.clone().requires_grad_(), []
    y = density_attention(leaf, mean_offsets, c, backend=backend)
    y.register_hook(lambda grad: seen.append(grad.is_neg()))
    (got,) = torch.autograd.grad((torch.complex(x, y).conj() * torch.complex(x, x)).sum().imag, leaf)
    assert seen == [True]
    (expected,) = torch.autograd.grad((density_attention(leaf, mean_offsets, c, backend=backend) * -x).sum(), leaf)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_that_come_back_otherwise(backend):
    """Hooks may keep what was saved in another layout."""
    tensors = [t.requires_grad_() for t in inputs(4, 8, 6, device=device_of(backend))]
    run = functools.partial(density_attention, norm_axis=1, backend=backend)
    expected = torch.autograd.grad(run(*tensors).square().sum(), tensors)
    transposed = (lambda t: t.transpose(0, -1).contiguous(), lambda t: t.transpose(0, -1))
    with torch.autograd.graph.saved_tensors_hooks(*transposed):
        y = run(*tensors)
    for g, e in zip(torch.autograd.grad(y.square().sum(), tensors), expected):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(4))
def test_zeros_that_take_no_memory_are_no_remembered_call(which, backend):
    """Forward-mode derivatives are made of such; the remembered call of their shape read them through null."""
    tensors = inputs(4, 8, device=device_of(backend))
    tensors = [*(t.requires_grad_() for t in tensors), torch.ones_like(tensors[0])]

    def both(x, mean_offsets, c, grad):
        y = density_attention(x, mean_offsets, c + 1, backend=backend)
        return y, *torch.autograd.grad(y, [t for t in (x, mean_offsets, c) if t.requires_grad], grad)

    both(*tensors)  # remembered from here on
    zeros = torch.zeros_like(tensors[which])
    dense, without_memory = (
        both(*(each if i == which else t for i, t in enumerate(tensors)))
        for each in (zeros, torch._efficientzerotensor(zeros.shape, device=zeros.device))
    )
    for result, expected in zip(without_memory, dense, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_see_the_operator(backend):
    class Names(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen = (*self.seen, str(function))
            return function(*arguments, **(keywords or {}))

    tensors = inputs(device=device_of(backend))
    expected = density_attention(*tensors, backend=backend)
    with Names() as names:
        y = density_attention(*tensors, backend=backend)
    assert_same_bits(y, expected)
    assert names.seen == ("daam_kernels.density_attention.default",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tracing_records_the_operator(backend):
    x, *parameters = inputs(device=device_of(backend))
    density_attention(x, *parameters, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda t: density_attention(t, *parameters, backend=backend), x, check_trace=False)
    assert_same_bits(traced(2 * x), density_attention(2 * x, *parameters, backend=backend))


@remembers
def test_transforms_and_compilation_of_a_remembered_call():
    x, *parameters = (t.double() for t in inputs())
    expected = density_attention(x, *parameters)
    batched = torch.vmap(lambda t: density_attention(t, *parameters))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[0], expected)
    _, tangent = torch.func.jvp(lambda t: density_attention(t, *parameters), (x,), (x,))
    torch.testing.assert_close(tangent, torch.func.jvp(lambda t: exact(t, *parameters), (x,), (x,))[1])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda t: density_attention(t, *parameters), fullgraph=True, backend=counter)
    for rows in (6, 5, 4):
        assert_same_bits(compiled(x[:rows]), density_attention(x[:rows], *parameters))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_calls_that_triton_serves_with_machine_code_are_remembered(calls, monkeypatch):
    """The interpreter stands in for it where there is no GPU, whose own calls are not remembered."""
    tensors, device = inputs(3, 16, device=device_of("triton")), device_of("triton")
    grad = torch.ones_like(tensors[0])

    def both():
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = density_attention(*leaves, backend="triton")
        return y, *torch.autograd.grad(y, leaves, grad)

    first = density_attention(*tensors, backend="triton"), *both()
    assert len(calls) == (device == "cuda")
    monkeypatch.setattr("daam_kernels.ops.density_attention._runs_compiled", lambda x: True)
    density_attention(*tensors, backend="triton")
    assert len(calls) == 1
    monkeypatch.delattr("daam_kernels.functional._attend")
    for again, before in zip((density_attention(*tensors, backend="triton"), *both()), first, strict=True):
        assert_same_bits(again, before)
    assert len(calls) == 1


class OnDevice:
    """What is asked of a tensor about where it is: None for a CPU, else the GPU's number."""

    def __init__(self, gpu):
        self.is_cuda, self.get_device = gpu is not None, lambda: -1 if gpu is None else gpu


def test_tensors_on_one_gpu():
    assert eager.on_one_gpu(*map(OnDevice, (1, 1, 1)))
    for apart in ((1, 0, 1), (1, 1, 0), (None, 1, 1), (1, None, 1), (None, None, None)):
        assert not eager.on_one_gpu(*map(OnDevice, apart))
