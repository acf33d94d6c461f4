"""torch.ops.daam_kernels.density_attention and its backward: schema, fakes, autograd, torch.compile."""

import itertools

import daam_kernels
import pytest
import torch
from daam_kernels import density_attention
from support import (
    BACKENDS,
    DTYPES,
    FUSED_BACKENDS,
    assert_contract,
    assert_same_bits,
    channels_last,
    device_of,
    every_second,
    gaussians,
    generator,
    interpreted,
    narrowed,
    transposed,
    truth,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

forward = torch.ops.daam_kernels.density_attention.default
backward = torch.ops.daam_kernels.density_attention_backward.default

# norm_axis, padding_value, padding_stats, normalize, eps, residual, density, multiply
PLAIN = (1, None, "zero", "clamp", 1e-8, False, "product", True)
PADDED = (1, 7.0, "exclude", "softmax", 1e-6, True, "product", True)


def inputs(backend, dtype=torch.float32, shape=(2, 12, 3), num_heads=2, parameters_type=None):
    rng, device = generator(), device_of(backend)
    x = (1 + torch.randn(shape, generator=rng)).to(device, dtype)
    parameters_type = parameters_type or torch.promote_types(dtype, torch.float32)
    return x, *gaussians(num_heads, 3, rng, offsets=0.05, dtype=parameters_type, device=device)


def some_mask(x):
    return (torch.rand(x.shape[1:], generator=generator(1)) < 0.7).to(x.device)


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# opcheck


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_operator(backend, masked, dtype):
    x, mean_offsets, c = leaves(inputs(backend, dtype))
    mask, options = (some_mask(x), PADDED) if masked else (None, PLAIN)
    for return_weights in (False, True):
        torch.library.opcheck(forward, (x, mean_offsets, c, None, mask, *options, return_weights, True, backend))


@pytest.mark.parametrize("save_stats", [False, True])
@pytest.mark.parametrize("shape, norm_axis", [((1, 200, 2), 1), ((3, 130), -1), ((130,), 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_with_saved_statistics(backend, shape, norm_axis, save_stats):
    """Slices of 64 elements and more, whose statistics are an output; the operator's norm_axis is never negative."""
    tensors = leaves(inputs(backend, shape=shape)) if save_stats else inputs(backend, shape=shape)
    options = (norm_axis % len(shape), *PLAIN[1:])
    torch.library.opcheck(forward, (*tensors, None, None, *options, False, save_stats, backend))


@pytest.mark.parametrize("layout", [transposed, every_second, narrowed, "expanded", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_other_layouts(backend, layout):
    x, mean_offsets, c = inputs(backend, shape=(2, 12, 3, 4))
    if layout == "expanded":
        x = x[:, :, :1].expand_as(x)
    else:
        x = channels_last(x) if layout == "channels_last" else layout(x)
    torch.library.opcheck(forward, (x, mean_offsets, c, None, None, *PLAIN, True, False, backend))
    stats = torch.empty(0, device=x.device)
    torch.library.opcheck(backward, (x, x, mean_offsets, c, None, None, stats, *PLAIN, backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [12, 140])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_backward_operator(backend, length, masked, dtype):
    tensors = inputs(backend, dtype, shape=(1, length, 2), parameters_type=torch.bfloat16 if masked else None)
    x = tensors[0]
    mask, options = (some_mask(x), PADDED) if masked else (None, PLAIN)
    stats = forward(*tensors, None, mask, *options, False, True, backend)[2]
    assert (stats.numel() > 0) == (length >= 128 and backend == "triton")
    torch.library.opcheck(backward, (torch.ones_like(x), *tensors, None, mask, stats, *options, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_is_what_the_public_function_computes(backend):
    tensors = inputs(backend)
    mask = some_mask(tensors[0])
    y, weights, _ = forward(*tensors, None, mask, *PADDED, True, False, backend)
    names = ("norm_axis", "padding_value", "padding_stats", "normalize", "eps", "residual", "density")
    options = dict(zip(names, PADDED))
    expected = density_attention(*tensors, mask=mask, return_weights=True, backend=backend, **options)
    assert_same_bits(y, expected[0])
    assert_same_bits(weights, expected[1])


# torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def function(backend, **options):
    def run(x, mean_offsets, c, grad, mask):
        y, weights = density_attention(
            x, mean_offsets, c, norm_axis=1, mask=mask, return_weights=True, backend=backend, **options
        )
        return y, weights, (y * grad).sum()

    return run


def run_with_gradients(run, tensors, grad, mask):
    tensors = leaves(tensors)
    y, weights, loss = run(*tensors, grad, mask)
    return (y.detach(), *torch.autograd.grad(loss, tensors), weights)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gives_the_same_bits_forward_and_backward(backend, masked, compiler):
    run = function(backend, padding_stats="exclude", residual=True)
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(backend, dtype, shape=(2, 140, 3))
        mask = some_mask(tensors[0]) if masked else None
        grad = torch.randn(tensors[0].shape, generator=generator(2)).to(tensors[0])
        expected = run_with_gradients(run, tensors, grad, mask)
        got = run_with_gradients(compiled, tensors, grad, mask)
        for name, g, e in zip(("y", "dx", "dmean_offsets", "dc", "weights"), got, expected, strict=True):
            assert_same_bits(g, e, f"{name} {dtype}")
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("layout", [transposed, every_second, narrowed, channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_is_within_the_contract_on_other_layouts(backend, layout):
    run = torch.compile(function(backend), fullgraph=True, backend="inductor")
    x, mean_offsets, c = inputs(backend, shape=(2, 12, 3, 4))
    grad = torch.randn(x.shape, generator=generator(2)).to(x.device)
    tensors = layout(x).detach(), mean_offsets, c
    strided = [t.detach().requires_grad_() for t in tensors]
    y, _, loss = run(*strided, layout(grad), None)
    got = (y, *torch.autograd.grad(loss, strided))
    assert_contract(got, truth(x, mean_offsets, c, grad, norm_axis=1), torch.float32)
    assert y.stride() == torch.empty_like(strided[0]).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_shapes(backend):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    run = function(backend)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for batch, length, width in ((4, 13, 5), (6, 17, 7), (7, 150, 4)):
        tensors = inputs(backend, shape=(batch, length, width))
        grad = torch.ones_like(tensors[0])
        got = run_with_gradients(compiled, tensors, grad, None)
        for g, e in zip(got, run_with_gradients(run, tensors, grad, None), strict=True):
            assert_same_bits(g, e)
    assert len(graphs) <= 2, "a graph for every shape"  # one more where slices become long enough to save statistics


def test_compile_checks_the_arguments_too():
    compiled = torch.compile(function("reference"), backend="eager")
    x, mean_offsets, c = inputs("reference")
    with pytest.raises(ValueError, match="mask must broadcast"):
        compiled(x, mean_offsets, c, x, torch.ones(5, dtype=torch.bool))


# Fake tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", ["contiguous", "transposed", "expanded"])
def test_fake_tensors_with_cuda_metadata(make, dtype):
    """Shapes, types, strides and the device, worked out without a GPU; under no_grad, as CPU builds of torch need."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 256, 6, device="cuda", dtype=dtype)
        x = {"contiguous": x, "transposed": x.transpose(0, 2), "expanded": x.narrow(0, 0, 1).expand(4, 256, 6)}[make]
        parameters = torch.empty(2, 3, device="cuda"), torch.empty(2, 3, device="cuda", dtype=torch.float64)
        y, weights = density_attention(x, *parameters, norm_axis=1, return_weights=True)
        stats = forward(x, *parameters, None, None, *PLAIN, False, True, "auto")[2]
        gradients = backward(torch.empty_like(y), x, *parameters, None, None, stats, *PLAIN, "auto")
        for t in (y, weights, gradients[0]):
            assert t.shape == x.shape and t.dtype == dtype and t.device.type == "cuda"
            assert t.stride() == torch.empty_like(x).stride()
        assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert tuple(stats.shape) == (3, x.shape[0] * x.shape[2] * 2)
        for g, p in zip(gradients[1:], parameters):
            assert g.shape == p.shape and g.dtype == p.dtype and g.device.type == "cuda"


def test_meta_tensors():
    x = torch.empty(4, 6, 256, device="meta").transpose(0, 1)
    y = density_attention(x, torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta"))
    assert y.is_meta and y.shape == x.shape and y.stride() == torch.empty_like(x).stride()


# Derivatives


@pytest.mark.parametrize("norm_axis", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, norm_axis):
    rng, device = generator(), device_of(backend)
    shape = (1, 7, 2) if norm_axis == 1 else (2, 7)
    x = (2 + torch.randn(shape, generator=rng, dtype=torch.float64)).to(device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask.select(norm_axis, 5)[0] = False
    tensors = leaves((x, *gaussians(2, 2, rng, offsets=0.1, width=1.5, dtype=torch.float64, device=device)))
    cases = [({}, None), (dict(padding_stats="exclude", normalize="softmax"), mask), (dict(eps=3.0), mask)]
    for options, case_mask in cases:
        options.update(norm_axis=norm_axis, mask=case_mask, backend=backend, residual=True)

        def run(*t, options=options):
            return density_attention(*t, **options)

        assert torch.autograd.gradcheck(run, tensors, fast_mode=interpreted(backend))


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", [("clamp", 1e-8), ("clamp", 3.0), ("softmax", 1e-8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_derivative_in_eager(backend, normalize, eps, padding_stats):
    rng, device = generator(), device_of(backend)
    x = (2 + torch.randn(2, 6, generator=rng, dtype=torch.float64)).to(device)
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[0, 2] = mask[1, 3:5] = False
    tensors = leaves((x, *gaussians(2, 2, rng, offsets=0.1, width=1.5, dtype=torch.float64, device=device)))
    options = dict(mask=mask, padding_stats=padding_stats, normalize=normalize, eps=eps, backend=backend)
    fast = interpreted(backend)
    assert torch.autograd.gradgradcheck(lambda *t: density_attention(*t, **options), tensors, fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_penalty(backend):
    """What second derivatives are used for, against the same in float64."""
    penalties = []
    for chosen, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        tensors = leaves(t.to(device_of(chosen), dtype) for t in inputs(backend))
        y = density_attention(*tensors, norm_axis=1, backend=chosen)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), tensors))
    for got, expected in zip(*penalties):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got.cpu().double(), expected.cpu(), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_operator_refuses_a_second_derivative(backend):
    tensors = leaves(inputs(backend))
    grad = torch.ones_like(tensors[0], requires_grad=True)
    stats = torch.empty(0, device=grad.device)
    dx, *_ = backward(grad, *tensors, None, None, stats, *PLAIN, backend)
    with pytest.raises(RuntimeError, match="density_attention_backward is not differentiable itself"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_itself_is_differentiable_twice_in_eager(backend):
    x, mean_offsets, c = leaves(t.double() for t in inputs(backend, shape=(1, 6, 2)))
    fast = interpreted(backend)

    def run(*tensors):
        return forward(*tensors, None, None, *PLAIN, False, True, backend)[0]

    assert torch.autograd.gradcheck(run, (x, mean_offsets, c), fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, (x, mean_offsets, c), fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_statistics_carry_no_gradient(backend):
    tensors = leaves(inputs(backend, shape=(1, 140, 2)))
    y, weights, stats = forward(*tensors, None, None, *PLAIN, True, True, backend)
    assert bool(stats.numel()) == (backend == "triton")
    assert y.requires_grad and not weights.requires_grad and not stats.requires_grad
    got = torch.autograd.grad((y * weights).sum(), tensors)
    y = forward(*tensors, None, None, *PLAIN, False, True, backend)[0]
    for g, e in zip(got, torch.autograd.grad((y * weights.clone()).sum(), tensors), strict=True):
        assert_same_bits(g, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_through_one_graph(backend):
    tensors = leaves(inputs(backend))
    loss = density_attention(*tensors, norm_axis=1, backend=backend).sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors)):
        assert_same_bits(a, b)


# Transforms of torch.func, forward mode, checkpoints


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend):
    from torch.utils.checkpoint import checkpoint

    tensors = leaves(inputs(backend))

    def run(*t):
        return density_attention(*t, norm_axis=1, backend=backend)

    expected = torch.autograd.grad(run(*tensors).sum(), tensors)
    got = torch.autograd.grad(checkpoint(run, *tensors, use_reentrant=False).sum(), tensors)
    for g, e in zip(got, expected):
        assert_same_bits(g, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode(backend):
    """An operator without a formula for it would give a tangent of zero, silently."""
    x, mean_offsets, c = (t.double() for t in inputs(backend))
    direction = torch.randn(x.shape, generator=generator(4), dtype=torch.float64).to(x.device)

    def run(t):
        return density_attention(t, mean_offsets, c, norm_axis=1, backend=backend)

    step = 1e-6 * direction
    expected = (run(x + step) - run(x - step)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(run, (x,), (direction,))[1], expected, rtol=1e-6, atol=1e-6)
    for leaf in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(leaf, direction))).tangent
            torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func(backend):
    x, mean_offsets, c = (t.double() for t in inputs(backend, shape=(3, 6, 2)))
    tensors = leaves((x, mean_offsets, c))

    def loss(*t):
        return density_attention(*t, norm_axis=0, backend=backend).square().sum()

    def batched(*t):
        return density_attention(*t, norm_axis=1, backend=backend).square().sum()

    expected = torch.autograd.grad(batched(*tensors), tensors)
    for g, e in zip(torch.func.grad(batched, argnums=(0, 1, 2))(x, mean_offsets, c), expected, strict=True):
        torch.testing.assert_close(g, e)
    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), (0, None, None))(x, mean_offsets, c)
    torch.testing.assert_close(per_sample[0], expected[0])
    for g, e in zip(per_sample[1:], expected[1:], strict=True):
        torch.testing.assert_close(g.sum(0), e)
    hessian = torch.func.hessian(loss)(x[0], mean_offsets, c)
    expected = torch.autograd.functional.hessian(lambda t: loss(t, mean_offsets, c), x[0])
    torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_fused_backends_stay_close_to_the_reference(backend):
    """Not its own formula under another name: another code path, equal only to rounding."""
    tensors = inputs(backend, shape=(2, 70, 3))
    for padding_stats, normalize in itertools.product(("zero", "exclude"), ("clamp", "softmax")):
        options = dict(norm_axis=1, mask=some_mask(tensors[0]), padding_stats=padding_stats, normalize=normalize)
        got = density_attention(*tensors, backend=backend, **options)
        expected = daam_kernels.reference.density_attention(*tensors, **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_backward_is_of_the_forwards_backend(monkeypatch):
    """What "auto" meant at the forward holds: another backend would misread the statistics that were saved."""
    x, mean_offsets, c = (t.requires_grad_() for t in (torch.randn(2, 256), torch.zeros(1, 3), torch.ones(1, 3)))
    expected = torch.autograd.grad(daam_kernels.density_attention(x, mean_offsets, c).square().sum(), (x, c))
    y = daam_kernels.density_attention(x, mean_offsets, c)
    monkeypatch.setenv("DAAM_KERNELS_BACKEND", "no such backend")
    for got, exact in zip(torch.autograd.grad(y.square().sum(), (x, c)), expected, strict=True):
        assert torch.equal(got, exact)
