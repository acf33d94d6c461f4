"""density="gate" and "gaussian" through the public function and the operator: contract, schema, derivatives, edges."""

import pytest
import torch
from daam_kernels import backends, density_attention
from daam_kernels.functional import density_weights
from support import (
    BACKENDS,
    DTYPES,
    assert_close,
    assert_contract,
    assert_same_bits,
    channels_last,
    device_of,
    every_second,
    generator,
    interpreted,
    sized,
    transposed,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from unnormalised import DENSITIES, attention, columns, evaluate, gaussians, truth

SERVING = tuple(name for name in BACKENDS if name in ("reference", "triton"))
pytestmark = pytest.mark.parametrize("density", DENSITIES)


def inputs(backend, density, dtype=torch.float32, shape=(2, 12, 3), num_heads=2, norm_axis=1, *, mean=1.0, seed=0):
    """(x, grad, mean_offsets, c)"""
    rng, device = generator(seed), device_of(backend)
    x, grad = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    parameters = gaussians(
        density, num_heads, columns(density, shape, norm_axis), rng, offsets=0.05,
        dtype=torch.promote_types(dtype, torch.float32), device=device,
    )  # fmt: skip
    return (mean + x).to(device, dtype), grad.to(device, dtype), *parameters


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("mean, deviation", [(0, 1), (10, 1), (1e3, 1), (1e4, 0.1)])
@pytest.mark.parametrize("norm_axis, dtype", [(1, torch.float64), (1, torch.float32), (-1, torch.float32)], ids=str)
@pytest.mark.parametrize("backend", SERVING)
def test_contract(backend, norm_axis, dtype, mean, deviation, density):
    shape = sized(backend, (2, 128, 16), (1, 64, 4)) if norm_axis == 1 else sized(backend, (16, 128), (3, 64))
    for num_gaussians, constant, multiply in ((1, False, True), (5, True, True), (3, False, False)):
        rng, device = generator(num_gaussians), device_of(backend)
        x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device, dtype)
        grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)
        grad = torch.ones_like(grad) if constant else grad
        heads, count = sized(backend, 4, 1), columns(density, shape, norm_axis, num_gaussians)
        parameters = gaussians(density, heads, count, rng, offsets=0.05 * deviation, dtype=dtype, device=device)
        options = dict(density=density, norm_axis=norm_axis, multiply=multiply)
        got = evaluate(backend, x, *parameters, grad, **options)
        assert [t.dtype for t in got] == [dtype] * 4
        assert_contract(got, truth(x, *parameters, grad, **options), dtype, f"K={num_gaussians}, {multiply=}")


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", SERVING)
def test_contract_holds_with_padding_and_a_remainder(backend, dtype, padding_stats, density):
    shape = sized(backend, (4, 41, 8), (2, 41, 2))
    x, grad, *parameters = inputs(backend, density, dtype, shape, 2)
    mask = torch.rand((shape[0], shape[1], 1), generator=generator(1)).to(x.device) < 0.7
    mask[:2, :20] = False  # slices of padding alone
    mask[1, 11] = True  # and of one valid element
    x[:, 3::7] = 0.0
    for eps, residual in ((None, False), (0.3, True)):
        options = dict(density=density, norm_axis=1, mask=mask, padding_value=0, padding_stats=padding_stats)
        options.update(eps=eps, residual=residual)
        got = evaluate(backend, x, *parameters, grad, **options)
        assert_contract(got, truth(x, *parameters, grad, **options), dtype, f"{eps=}")
    options = dict(density=density, norm_axis=1, mask=mask, padding_stats=padding_stats, multiply=False)
    got = evaluate(backend, x, *parameters, grad, **options)
    assert_contract(got, truth(x, *parameters, grad, **options), dtype, "weights")


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("backend", SERVING)
def test_the_weights_handed_out(backend, padding_stats, density):
    x, _, *parameters = inputs(backend, density, torch.float64)
    mask = torch.rand(x.shape, generator=generator(1)).to(x.device) < 0.7
    options = dict(density=density, norm_axis=1, mask=mask, padding_stats=padding_stats, backend=backend)
    y, weights = density_attention(x, *parameters, return_weights=True, **options)
    assert not weights.requires_grad and weights[~mask].any() == (padding_stats == "zero")
    assert_close(weights, density_weights(x, *parameters, **options), 1e-14)
    assert_close(y, torch.where(mask, x * weights, x), 1e-14)


@pytest.mark.parametrize("backend", SERVING)
def test_constant_slices_keep_their_digits(backend, density):
    """Shifting a constant slice leaves its weights, so dx is they: all else, a million times as large, cancels."""
    x = torch.full((4, 32), 1000.0, device=device_of(backend))
    parameters = (torch.full((1, 1), value, device=x.device) for value in (1.4e-3, 1.0))
    y, dx, *_ = evaluate(backend, x, *parameters, torch.ones_like(x), density=density)
    assert (y > 1).all()
    assert_close(dx, y / x, 5e-6)


@pytest.mark.parametrize("backend", SERVING)
def test_no_gradient_reaches_a_variance_at_its_floor(backend, density):
    x, grad, mean_offsets, c = inputs(backend, density, torch.float64)
    x, parameters = 1 + 1e-4 * (x - 1), (1e-3 * mean_offsets, c)
    options = dict(density=density, norm_axis=1)
    assert_contract(evaluate(backend, x, *parameters, grad, **options), truth(x, *parameters, grad, **options), x.dtype)


@pytest.mark.parametrize("backend", SERVING)
def test_heads_of_one_element(backend, density):
    x, grad, *parameters = inputs(backend, density, torch.float64, (5, 3, 2), 3)
    options = dict(density=density, norm_axis=1)
    assert_contract(evaluate(backend, x, *parameters, grad, **options), truth(x, *parameters, grad, **options), x.dtype)


@pytest.mark.parametrize("layout", [transposed, channels_last, every_second, lambda t: t[:, :, :1].expand(t.shape)])
@pytest.mark.parametrize("backend", SERVING)
def test_memory_layouts(backend, layout, density):
    x, grad, *parameters = inputs(backend, density, torch.float64, (2, 8, 3, 4))
    x, grad = layout(x), transposed(grad)
    for multiply in (True, False):
        options = dict(density=density, norm_axis=1, multiply=multiply)
        got = evaluate(backend, x, *parameters, grad, **options)
        assert_contract(got, truth(x, *parameters, grad, **options), x.dtype)
        assert all(t.stride() == torch.empty_like(x).stride() for t in got[:2])


@pytest.mark.parametrize("backend", SERVING)
def test_an_empty_batch(backend, density):
    x, _, *parameters = inputs(backend, density)
    got = evaluate(backend, x[:0], *parameters, x[:0], norm_axis=1, density=density)
    assert got[0].shape == got[1].shape == (0, 12, 3) and not any(t.any() for t in got[2:])


@pytest.mark.parametrize("backend", SERVING)
def test_a_nan_stays_in_its_slice(backend, density):
    x, _, *parameters = inputs(backend, density)
    x[0, 2, 1] = torch.nan
    y, dx, *gradients = evaluate(backend, x, *parameters, torch.ones_like(x), norm_axis=1, density=density)
    for t in (y, dx):
        assert t[0, :6, 1].isnan().all() and t.isnan().sum() == 6
    assert all(g[0].isnan().any() and g[1].isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", SERVING)
def test_excluded_padding_may_hold_anything(backend, density):
    x, grad, *parameters = inputs(backend, density)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, 3:5] = False
    options = dict(density=density, norm_axis=1, mask=mask, padding_stats="exclude")
    expected = evaluate(backend, x, *parameters, grad, **options)
    got = evaluate(backend, x.masked_fill(~mask, torch.nan), *parameters, grad, **options)
    assert_same_bits(got[0][mask], expected[0][mask])
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("backend", SERVING)
def test_parameter_gradients_are_bitwise_the_same_every_time(backend, density):
    x, grad, *parameters = inputs(backend, density, shape=(3, 40, 5))
    first, again = (evaluate(backend, x, *parameters, grad, norm_axis=1, density=density) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e18])
@pytest.mark.parametrize("backend", SERVING)
def test_finite_input_gives_no_nan(backend, scale, density):
    x = scale * inputs(backend, density, shape=(2, 30, 2), num_heads=1)[0]
    for offset in (0.0, 1e18, -1e18):
        for c in (1e-6, 1e6):
            parameters = (torch.full((1, 2), value, device=x.device) for value in (offset, c))
            for t in evaluate(backend, x, *parameters, torch.ones_like(x), norm_axis=1, density=density):
                assert t.isfinite().all(), (offset, c)


# What does not fit, and which backend serves


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(normalize="softmax"), "normalize must not be given for density='{}', whose weights are as they are"),
        (dict(weights=torch.ones(2, 3)), "weights must be given for density='mixture', and for it alone, got them"),
        (dict(eps=0.0), "eps must be positive and finite, got 0.0"),
        (dict(c=torch.ones(2, 4)), r"c must have shape \[num_heads, |mean_offsets and c must have the same shape"),
        (dict(x=torch.ones(2, 1, 3)), "x must have at least 1 element per head along norm_axis: .* is 1, and 2 head"),
    ],
)
def test_what_does_not_fit_is_named(changes, words, density):
    x, _, mean_offsets, c = inputs("reference", density)
    arguments = dict(dict(x=x, mean_offsets=mean_offsets, c=c, norm_axis=1, density=density), **changes)
    with pytest.raises(ValueError, match=words.format(density)):
        density_attention(**arguments)


def test_features_are_those_behind_the_axis(density):
    x, _, *parameters = inputs("reference", density)
    if density == "gaussian":
        with pytest.raises(
            ValueError, match=r"mean_offsets must have shape \[num_heads, features=1\], .* got \[2, 3\]"
        ):
            density_attention(x.movedim(1, -1), *parameters, density=density)
    with pytest.raises(ValueError, match="density must be one of gate, gaussian, got 'mixture'"):
        density_weights(x, *parameters, density="mixture")


@pytest.mark.parametrize("backend, served", [("native", "'product' and 'mixture'"), ("cuda", "'product'")])
def test_a_library_of_other_densities_refuses_by_name(backend, served, density):
    x, _, *parameters = inputs("reference", density)
    with pytest.raises(RuntimeError, match=rf"it serves density={served} alone, got {density!r}"):
        density_attention(x, *parameters, norm_axis=1, density=density, backend=backend)
    assert backends.resolve("auto", torch.empty(1), density) == "reference"


# The operator, torch.compile, derivatives


def operands(backend, density, *, multiply=True, dtype=torch.float32):
    x, grad, mean_offsets, c = inputs(backend, density, dtype)
    log_shares = torch.zeros_like(c) if density == "gate" else None
    options = (1, None, "zero", "clamp", 1e-5, False, density, multiply)
    return x, grad, (mean_offsets, c.abs(), log_shares, None), options


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("backend", SERVING)
def test_opcheck(backend, multiply, density):
    x, grad, tensors, options = operands(backend, density, multiply=multiply)
    operator = torch.ops.daam_kernels.density_attention.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    given = (x.requires_grad_(), *(t if t is None else t.requires_grad_() for t in tensors))
    torch.library.opcheck(operator, (*given, *options, False, True, backend), test_utils=checks)
    operator = torch.ops.daam_kernels.density_attention_backward.default
    given = [t if t is None else t.detach() for t in given]
    torch.library.opcheck(operator, (grad, *given, x.new_empty(0), *options, backend), test_utils=checks[:2])


def test_fake_tensors_with_cuda_metadata(density):
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 256, 6, device="cuda", dtype=torch.bfloat16).transpose(0, 2)
        parameters = [torch.empty(2, 4, device="cuda") for _ in range(2)]
        y, weights = density_attention(x, *parameters, norm_axis=1, density=density, return_weights=True)
        for t in (y, weights):
            assert t.shape == x.shape and t.dtype == x.dtype and t.device.type == "cuda" and t.stride() == x.stride()


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("backend", SERVING)
def test_compiles_whole_forward_and_backward(backend, multiply, density):
    torch._dynamo.reset()

    def run(x, mean_offsets, c, mask):
        options = dict(density=density, norm_axis=1, mask=mask, padding_stats="exclude", multiply=multiply)
        return attention(backend, x, mean_offsets, c, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, grad, *parameters = inputs(backend, density, shape=(2, 70, 3))
    mask = (torch.rand(x.shape[1:], generator=generator(1)) < 0.7).to(x.device)
    results = []
    for function in (run, compiled):
        each = leaves((x, *parameters))
        y = function(*each, mask)
        results.append((y.detach(), *torch.autograd.grad(y, each, grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("backend", SERVING)
def test_derivatives_of_first_and_second_order(backend, multiply, padding_stats, density):
    x, _, *parameters = inputs(backend, density, torch.float64, (2, 6, 2))
    mask = torch.ones(2, 6, 1, dtype=torch.bool, device=x.device)
    mask[0, 2] = mask[1, 3:5] = False
    tensors = leaves((x, *parameters))
    options = dict(mask=mask, padding_stats=padding_stats, multiply=multiply, norm_axis=1, density=density)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        fast = interpreted(backend) or check is torch.autograd.gradgradcheck
        assert check(lambda *t: attention(backend, *t, **options), tensors, fast_mode=fast)


@pytest.mark.parametrize("backend", SERVING)
def test_transforms(backend, density):
    x, _, *parameters = inputs(backend, density, torch.float64, (3, 6, 2))
    tensors = leaves((x, *parameters))

    def loss(*t, norm_axis=0):
        return attention(backend, *t, norm_axis=norm_axis, density=density).square().sum()

    expected = torch.autograd.grad(loss(*tensors, norm_axis=1), tensors)
    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), (0, None, None))(x, *parameters)
    torch.testing.assert_close(per_sample[0], expected[0])
    for g, e in zip(per_sample[1:], expected[1:], strict=True):
        torch.testing.assert_close(g.sum(0), e)
    _, tangent = torch.func.jvp(lambda t: loss(x, t, parameters[1], norm_axis=1), (parameters[0],), (parameters[0],))
    torch.testing.assert_close(tangent, (expected[1] * parameters[0]).sum())
