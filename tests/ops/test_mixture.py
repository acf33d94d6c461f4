"""density="mixture" through the public function and the operator: schema, fakes, derivatives, torch.compile, edges."""

import itertools

import pytest
import torch
from daam_kernels import backends, density_attention
from mixture import MIXTURE_BACKENDS, assert_contract, evaluate, mixture, truth
from support import (
    BACKENDS,
    DTYPES,
    assert_close,
    assert_same_bits,
    channels_last,
    device_of,
    every_second,
    generator,
    interpreted,
    narrowed,
    sized,
    transposed,
)
from torch._subclasses.fake_tensor import FakeTensorMode

forward = torch.ops.daam_kernels.density_attention.default
backward = torch.ops.daam_kernels.density_attention_backward.default

# norm_axis, padding_value, padding_stats, normalize, eps, residual, density, multiply
PLAIN = (1, None, "zero", "clamp", 1e-8, False, "mixture", True)
PADDED = (1, 7.0, "exclude", "softmax", 1e-6, True, "mixture", True)


def inputs(backend, dtype=torch.float32, shape=(2, 12, 3), num_heads=2, parameters_type=None):
    """(x, mean_offsets, c, weights)"""
    rng, device = generator(), device_of(backend)
    x = (1 + torch.randn(shape, generator=rng)).to(device, dtype)
    parameters_type = parameters_type or torch.promote_types(dtype, torch.float32)
    return x, *mixture(num_heads, 3, rng, offsets=0.05, dtype=parameters_type, device=device)


def some_mask(x):
    return (torch.rand(x.shape[1:], generator=generator(1)) < 0.7).to(x.device)


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def attention(x, mean_offsets, c, weights, **options):
    return density_attention(x, mean_offsets, c, density="mixture", weights=weights, **options)


# The contract, on every backend


@pytest.mark.parametrize("mean, deviation", [(0, 1), (10, 1), (1e3, 1), (1e4, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm_axis", [1, -1])
@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_contract(backend, norm_axis, dtype, mean, deviation):
    shape = sized(backend, (2, 128, 16), (1, 128, 4)) if norm_axis == 1 else sized(backend, (16, 128), (3, 128))
    for num_gaussians, width, constant in ((1, None, False), (5, 2.0, True), (16, None, True)):
        rng, device = generator(num_gaussians), device_of(backend)
        x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device, dtype)
        noise = torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)
        grad = torch.ones_like(noise) if constant else noise
        parameters = mixture(4, num_gaussians, rng, offsets=0.05 * deviation, width=width, dtype=dtype, device=device)
        got = evaluate(backend, x, *parameters, grad, norm_axis=norm_axis)
        assert [t.dtype for t in got] == [dtype] * 5
        assert_contract(got, truth(x, *parameters, grad, norm_axis=norm_axis), dtype, f"K={num_gaussians}")


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_contract_holds_with_padding_and_a_remainder(backend, dtype, padding_stats):
    rng, device = generator(1), device_of(backend)
    shape = sized(backend, (4, 77, 8), (1, 77, 3))
    x = (1 + torch.randn(shape, generator=rng)).to(device, dtype)
    grad = torch.randn(shape, generator=rng).to(device, dtype)
    mask = torch.rand((shape[0], shape[1], 1), generator=rng).to(device) < 0.7
    mask[0, :19] = False
    x[:, 3::7] = 0.0
    parameters = mixture(4, 5, rng, offsets=0.05, dtype=torch.float64, device=device)
    for normalize, eps, residual in (("clamp", 1e-8, False), ("clamp", 5.0, False), ("softmax", 1e-8, True)):
        options = dict(norm_axis=1, mask=mask, padding_value=0, padding_stats=padding_stats)
        options.update(normalize=normalize, eps=eps, residual=residual)
        got = evaluate(backend, x, *parameters, grad, **options)
        assert_contract(got, truth(x, *parameters, grad, **options), dtype, f"{normalize}, eps={eps}")


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_long_slices(backend):
    rng, device = generator(), device_of(backend)
    x = (10 + torch.randn(2, sized(backend, 20000, 3000), generator=rng)).to(device)
    parameters = mixture(1, 4, rng, offsets=0.05, device=device)
    got = evaluate(backend, x, *parameters, torch.ones_like(x))
    assert_contract(got, truth(x, *parameters, torch.ones_like(x)), torch.float32)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_constant_slices_with_the_clamp_active_keep_their_digits(backend):
    """Shifting a constant slice leaves its weights, so dx is they: all else, a million times as large, cancels."""
    x = torch.full((4, 32), 1000.0, device=device_of(backend))
    parameters = (torch.full((1, 1), value, device=x.device) for value in (1.4e-3, 2.0, 0.0))
    y, dx, *_ = evaluate(backend, x, *parameters, torch.ones_like(x))
    total = y.sum(1) / x[:, 0]
    assert (0.01 < total).all() and (total < 0.9).all(), "clamped, and not 0"
    assert_close(dx, y / x, 5e-6)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_shares_as_they_are(backend):
    """They need not sum to one, and one of 0 is a Gaussian that is not there: no NaN, no gradient, no difference."""
    x, mean_offsets, c, _ = (t.double() for t in inputs(backend))
    shares = torch.tensor([[0.5, 0.0, 2.0], [1.0, 3.0, 0.25]], dtype=torch.float64, device=x.device)
    grad = torch.randn(x.shape, generator=generator(2), dtype=torch.float64).to(x.device)
    for eps in (1e-8, 20.0):
        options = dict(norm_axis=1, weights_softmax=False, eps=eps)
        got = evaluate(backend, x, mean_offsets, c, shares, grad, **options)
        expected = truth(x, mean_offsets, c, shares, grad, **options)
        assert not got[4][0, 1] and not got[2][0, 1] and not got[3][0, 1]
        expected[4][0, 1] = 0
        assert_contract(got, expected, torch.float64)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_logits_of_minus_infinity_give_no_nan(backend):
    x, mean_offsets, c, weights = inputs(backend)
    weights[:, 1] = -torch.inf
    got = evaluate(backend, x, mean_offsets, c, weights, torch.ones_like(x), norm_axis=1)
    assert all(t.isfinite().all() for t in got)
    there = [0, 2]
    y = attention(x, mean_offsets[:, there], c[:, there], weights[:, there], norm_axis=1, backend=backend)
    assert_close(got[0], y, 1e-6)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_only_the_square_of_c_counts_and_a_common_factor_of_the_weights_does_not(backend):
    x, mean_offsets, c, weights = (t.double() for t in inputs(backend))
    y = attention(x, mean_offsets, c, weights, norm_axis=1, backend=backend)
    assert_same_bits(attention(x, mean_offsets, -c, weights, norm_axis=1, backend=backend), y)
    assert_close(attention(x, mean_offsets, c, weights + 3, norm_axis=1, backend=backend), y, 1e-14)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_an_empty_batch(backend):
    x, *parameters = inputs(backend)
    got = evaluate(backend, x[:0], *parameters, x[:0], norm_axis=1)
    assert got[0].shape == got[1].shape == (0, 12, 3) and not any(t.any() for t in got[2:])


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_a_nan_stays_in_its_slice(backend):
    x, *parameters = inputs(backend)
    x[0, 2, 1] = torch.nan
    y, dx, *gradients = evaluate(backend, x, *parameters, torch.ones_like(x), norm_axis=1)
    for t in (y, dx):
        assert t[0, :6, 1].isnan().all()
        assert t.isnan().sum() == 6
    assert all(g[0].isnan().all() and g[1].isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_parameter_gradients_are_bitwise_the_same_every_time(backend):
    x, *parameters = inputs(backend, shape=(3, 40, 5))
    first, again = (evaluate(backend, x, *parameters, x, norm_axis=1) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_the_operator_takes_shares_of_any_layout(backend):
    x, mean_offsets, c, weights = inputs(backend)
    rest, saved = (None, *PLAIN), torch.empty(0, dtype=torch.float32, device=x.device)
    results = []
    for shares in (weights.log_softmax(1), weights.log_softmax(1).T.contiguous().T):
        y, *_ = forward(x, mean_offsets, c, shares, *rest, False, False, backend)
        results.append((y, *backward(torch.ones_like(x), x, mean_offsets, c, shares, None, saved, *PLAIN, backend)))
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


# Which backend serves


def test_a_library_of_the_product_alone_refuses_by_name():
    x, *parameters = inputs("reference")
    message = r"backend asks for 'cuda', which cannot serve .*: it serves density='product' alone, got 'mixture'"
    with pytest.raises(RuntimeError, match=message):
        attention(x, *parameters, norm_axis=1, backend="cuda")


def test_auto_takes_the_library_where_there_is_one():
    x, *parameters = inputs("reference")
    backend = "native" if "native" in BACKENDS else "reference"
    assert backends.resolve("auto", x, "mixture") == backend
    for _ in range(2):  # nothing is remembered of the product
        density_attention(x, *parameters[:2], norm_axis=1)
        expected = attention(x, *parameters, norm_axis=1, backend=backend)
        assert_same_bits(attention(x, *parameters, norm_axis=1), expected)


@pytest.mark.parametrize("triton", [True, False])
def test_auto_on_cuda_is_triton_or_the_reference(triton, monkeypatch):
    class OnGPU:
        device, dtype, is_cuda, is_cpu = torch.device("cuda", 0), torch.float32, True, False

    monkeypatch.setattr(backends, "_triton_installed", lambda: triton)
    monkeypatch.setattr(backends.native, "cuda_status", lambda: (True, ""))
    monkeypatch.setattr(backends.native, "cuda_failure", lambda device: "")
    assert backends.resolve("auto", OnGPU(), "mixture") == ("triton" if triton else "reference")
    assert backends.resolve("auto", OnGPU()) == ("triton" if triton else "cuda")


# The operator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_opcheck_of_both_operators(backend, masked, dtype):
    x, mean_offsets, c, log_shares = inputs(backend, dtype)
    mask, options = (some_mask(x), PADDED) if masked else (None, PLAIN)
    tensors = leaves((x, mean_offsets, c, log_shares.log_softmax(1)))
    torch.library.opcheck(forward, (*tensors, mask, *options, masked, True, backend))
    tensors = [t.detach() for t in tensors]
    torch.library.opcheck(backward, (torch.ones_like(x), *tensors, mask, x.new_empty(0), *options, backend))


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_opcheck_of_long_slices_with_saved_statistics(backend):
    x, mean_offsets, c, log_shares = leaves(inputs(backend, shape=(1, 260, 2)))
    arguments = (x, mean_offsets, c, log_shares, None, *PLAIN, False, True, backend)
    stats = forward(*arguments)[2].detach()
    assert stats.shape == ((3, 4) if backend == "triton" else (0,))
    torch.library.opcheck(forward, arguments)
    tensors = [t.detach() for t in arguments[:4]]
    torch.library.opcheck(backward, (tensors[0], *tensors, None, stats, *PLAIN, backend))


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_the_operator_is_what_the_public_function_computes(backend):
    x, mean_offsets, c, weights = inputs(backend)
    mask = some_mask(x)
    y, details, _ = forward(x, mean_offsets, c, weights.log_softmax(1), mask, *PADDED, True, False, backend)
    names = ("norm_axis", "padding_value", "padding_stats", "normalize", "eps", "residual")
    options = dict(zip(names, PADDED), mask=mask, return_weights=True, backend=backend)
    expected = attention(x, mean_offsets, c, weights, **options)
    assert_same_bits(y, expected[0])
    assert_same_bits(details, expected[1])


@pytest.mark.parametrize("layout", [transposed, every_second, narrowed, channels_last])
@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_other_layouts(backend, layout):
    x, *parameters = inputs(backend, shape=(2, 12, 3, 4))
    grad = torch.randn(x.shape, generator=generator(2)).to(x.device)
    expected = truth(x, *parameters, grad, norm_axis=1)
    got = evaluate(backend, layout(x), *parameters, layout(grad), norm_axis=1)
    assert_contract(got, expected, torch.float32)
    assert got[0].stride() == got[1].stride() == torch.empty_like(layout(x)).stride()


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_parameters_of_other_types_and_layouts(backend):
    x, *parameters = inputs(backend, torch.float32)
    parameters = parameters[0].double(), parameters[1].bfloat16(), parameters[2].half().t().contiguous().t()
    got = evaluate(backend, x, *parameters, torch.ones_like(x), norm_axis=1)
    assert [t.dtype for t in got[2:]] == [torch.float64, torch.bfloat16, torch.float16]
    expected = truth(x, *parameters, torch.ones_like(x), norm_axis=1)
    for g, e, tolerance in zip(got, expected, (2e-6, 5e-6, 1e-4, 2**-8, 2**-11 + 1e-4), strict=True):
        assert_close(g, e, tolerance)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_float64_loses_nothing_to_parameters_of_float32(backend, softmax):
    x, mean_offsets, c, weights = inputs(backend, torch.float64, parameters_type=torch.float32)
    weights, options = weights if softmax else weights.exp(), dict(norm_axis=1, weights_softmax=softmax)
    got = evaluate(backend, x, mean_offsets, c, weights, torch.ones_like(x), **options)
    expected = truth(x, mean_offsets, c, weights, torch.ones_like(x), **options)
    for g, e, tolerance in zip(got, expected, (1e-12, 1e-12, 1e-7, 1e-7, 1e-7), strict=True):
        assert_close(g, e, tolerance)


def test_fake_tensors_with_cuda_metadata():
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 260, 6, device="cuda", dtype=torch.bfloat16).transpose(0, 2)
        parameters = [torch.empty(2, 3, device="cuda") for _ in range(2)]
        log_shares = torch.empty(2, 3, device="cuda", dtype=torch.float64)
        y = attention(x, *parameters, log_shares, norm_axis=1)
        stats = forward(x, *parameters, log_shares, None, *PLAIN, False, True, "auto")[2]
        gradients = backward(y, x, *parameters, log_shares, None, stats, *PLAIN, "auto")
        assert stats.shape == (3, 4 * 6 * 2) and stats.dtype == torch.float32
        for t, like in zip((y, *gradients), (x, x, *parameters, log_shares), strict=True):
            assert t.shape == like.shape and t.dtype == like.dtype and t.device.type == "cuda"


# torch.compile, derivatives, transforms


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_compiles_whole_forward_and_backward(backend, masked):
    def run(x, mean_offsets, c, weights, mask):
        options = dict(norm_axis=1, mask=mask, padding_stats="exclude", return_weights=True, backend=backend)
        y, details = attention(x, mean_offsets, c, weights, **options)
        return y, details, y.square().sum()

    results = []
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    tensors = inputs(backend, shape=(2, 70, 3))
    mask = some_mask(tensors[0]) if masked else None
    for function in (run, compiled):
        each = leaves(tensors)
        y, details, loss = function(*each, mask)
        results.append((y.detach(), details, *torch.autograd.grad(loss, each)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", [("clamp", 1e-8), ("clamp", 3.0), ("softmax", 1e-8)])
@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_derivatives_of_first_and_second_order(backend, normalize, eps, padding_stats):
    rng, device = generator(), device_of(backend)
    x = (2 + torch.randn(2, 6, generator=rng, dtype=torch.float64)).to(device)
    mask = torch.ones(2, 6, dtype=torch.bool, device=device)
    mask[0, 2] = mask[1, 3:5] = False
    tensors = leaves((x, *mixture(2, 2, rng, offsets=0.1, width=1.5, dtype=torch.float64, device=device)))
    options = dict(mask=mask, padding_stats=padding_stats, normalize=normalize, eps=eps, backend=backend)
    fast = interpreted(backend)
    for softmax in (True, False):
        with torch.no_grad():
            tensors[3].abs_()
        options["weights_softmax"] = softmax
        assert torch.autograd.gradcheck(lambda *t: attention(*t, **options), tensors, fast_mode=fast)
        assert torch.autograd.gradgradcheck(lambda *t: attention(*t, **options), tensors, fast_mode=True)


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
def test_transforms_and_forward_mode(backend):
    x, *parameters = (t.double() for t in inputs(backend, shape=(3, 6, 2)))
    tensors = leaves((x, *parameters))

    def loss(*t, norm_axis=0):
        return attention(*t, norm_axis=norm_axis, backend=backend).square().sum()

    expected = torch.autograd.grad(loss(*tensors, norm_axis=1), tensors)
    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), (0, None, None, None))(x, *parameters)
    torch.testing.assert_close(per_sample[0], expected[0])
    for g, e in zip(per_sample[1:], expected[1:], strict=True):
        torch.testing.assert_close(g.sum(0), e)
    direction = torch.ones_like(parameters[2])
    direction[:, 0] = -1
    _, tangent = torch.func.jvp(lambda w: loss(x, *parameters[:2], w, norm_axis=1), (parameters[2],), (direction,))
    torch.testing.assert_close(tangent, (expected[3] * direction).sum())


@pytest.mark.parametrize("backend", MIXTURE_BACKENDS)
@pytest.mark.parametrize("which", list(itertools.product((False, True), repeat=4))[1:])
def test_gradients_where_only_some_are_needed(backend, which):
    tensors = inputs(backend)
    every = leaves(tensors)
    expected = torch.autograd.grad(attention(*every, norm_axis=1, backend=backend).sum(), every)
    some = [t.clone().requires_grad_(needed) for t, needed in zip(tensors, which)]
    y = attention(*some, norm_axis=1, backend=backend)
    got = torch.autograd.grad(y.sum(), [t for t in some if t.requires_grad])
    for g, e in zip(got, [e for e, needed in zip(expected, which) if needed], strict=True):
        assert_same_bits(g, e)
