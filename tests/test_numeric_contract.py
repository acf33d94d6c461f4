"""The numeric contract of the operator page: every row, type, number of Gaussians, width, offset and gradient."""

import itertools
from functools import lru_cache

import daam_kernels
import pytest
import torch
from support import (
    BACKENDS,
    DTYPES,
    HALF_TYPES,
    assert_close,
    assert_contract,
    assert_finite_but_for_overflow,
    assert_same_bits,
    device_of,
    evaluate,
    gaussians,
    generator,
    sized,
    truth,
)

from daam_kernels import reference

ROWS = {"N(0, 1)": (0, 1), "N(10, 1)": (10, 1), "N(1e3, 1)": (1e3, 1), "N(1e4, 0.1)": (1e4, 0.1)}  # mean, deviation
PARAMETERS = list(itertools.product((0.0, 0.05), (None, 2.0)))  # offsets in deviations; width, None for exp(N(0, 1))
NUM_HEADS = 4


def shape_of(backend, norm_axis, heads=NUM_HEADS):
    """[8, 128, 64] of the page; interpreted, less of a batch, the slices as long."""
    length = 32 * heads
    if norm_axis == 1:
        return sized(backend, (8, length, 64), (1, length, 64))
    return sized(backend, (64, length), (3, length))


@lru_cache(maxsize=1)  # the truth takes most of the time; backends of one shape ask for it one after the other
def problem(shape, heads_each, device, norm_axis, dtype, row, num_gaussians):
    """x, the parameters in heads_each heads of every kind, and pairs of a gradient and the truth with it."""
    mean, deviation = ROWS[row]
    rng = generator(num_gaussians)
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device, dtype)
    noise = torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)
    to = dict(dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    kinds = [
        gaussians(heads_each, num_gaussians, rng, offsets=offsets * deviation, width=width, **to)
        for offsets, width in PARAMETERS
    ]
    parameters = tuple(map(torch.cat, zip(*kinds)))
    return x, parameters, [(g, truth(x, *parameters, g, norm_axis=norm_axis)) for g in (noise, torch.ones_like(noise))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_gaussians", [1, 5, 8, 16])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_axis", [1, -1])
def test_contract(norm_axis, dtype, row, num_gaussians, backend):
    """Heads know nothing of each other: all kinds of parameters are asked for at once, each in heads of its own."""
    heads_each = sized(backend, NUM_HEADS, 1)
    shape, device = shape_of(backend, norm_axis, 4 * heads_each), device_of(backend)
    x, parameters, gradients = problem(shape, heads_each, device, norm_axis, dtype, row, num_gaussians)
    for (grad, expected), gradient in zip(gradients, ("N(0, 1)", "1")):
        got = evaluate(backend, x, *parameters, grad, norm_axis=norm_axis)
        assert [t.dtype for t in got] == [dtype, dtype, *(t.dtype for t in parameters)]
        for kind, (offsets, width) in enumerate(PARAMETERS):
            what = f"offsets={offsets}, c={width or 'exp(N(0, 1))'}, g={gradient}:"
            part = [
                [t.chunk(4, axis)[kind] for t, axis in zip(four, (norm_axis, norm_axis, 0, 0))]
                for four in (got, expected)
            ]
            if dtype in HALF_TYPES and row == "N(1e4, 0.1)":  # constant in half types: only finiteness is asked
                assert_finite_but_for_overflow(*part, what)
            else:
                assert_contract(*part, dtype, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_within_the_contract_of_y(backend, dtype):
    rng, device, shape = generator(), device_of(backend), shape_of(backend, 1)
    x = (10 + torch.randn(shape, generator=rng)).to(device, dtype)
    mean_offsets, c = gaussians(NUM_HEADS, 5, rng, offsets=0.05, dtype=torch.float64, device=device)
    y, weights = daam_kernels.density_attention(x, mean_offsets, c, norm_axis=1, return_weights=True, backend=backend)
    exact = reference.density_attention(x.cpu().double(), mean_offsets.cpu(), c.cpu(), norm_axis=1, return_weights=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert weights.dtype == dtype
    assert_close(y, exact[0], tolerance, "y")
    assert_close(weights, exact[1], tolerance, "weights")


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract_holds_with_padding(backend, dtype, padding_stats):
    rng, device, shape = generator(1), device_of(backend), shape_of(backend, 1)
    x = (1 + torch.randn(shape, generator=rng)).to(device, dtype)
    grad = torch.randn(shape, generator=rng).to(device, dtype)
    mask = torch.rand((shape[0], shape[1], 1), generator=rng).to(device) < 0.7
    x[:, 3::7] = 0.0
    mean_offsets, c = gaussians(NUM_HEADS, 5, rng, offsets=0.05, dtype=torch.float64, device=device)
    for normalize, residual in (("clamp", False), ("softmax", True)):
        options = dict(norm_axis=1, mask=mask, padding_value=0, padding_stats=padding_stats)
        options.update(normalize=normalize, residual=residual)
        expected = truth(x, mean_offsets, c, grad, **options)
        assert_contract(evaluate(backend, x, mean_offsets, c, grad, **options), expected, dtype, normalize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract_holds_with_the_clamp_active(backend, dtype):
    """A large eps: the sum of every slice is below it, and its weights sum to less than one."""
    rng, device, shape = generator(2), device_of(backend), shape_of(backend, 1)
    x = (1 + torch.randn(shape, generator=rng)).to(device, dtype)
    grad = torch.randn(shape, generator=rng).to(device, dtype)
    mean_offsets, c = gaussians(NUM_HEADS, 3, rng, offsets=0.05, width=2.0, dtype=torch.float64, device=device)
    options = dict(norm_axis=1, eps=5.0)
    _, weights = reference.density_attention(x, mean_offsets, c, return_weights=True, **options)
    assert (weights.double().unflatten(1, (NUM_HEADS, -1)).sum(2) < 0.9).all()
    expected = truth(x, mean_offsets, c, grad, **options)
    assert_contract(evaluate(backend, x, mean_offsets, c, grad, **options), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_contract_holds_for_many_wide_gaussians(backend, dtype):
    """Their densities are some 2^85 below eps: a rounded logarithm of that alone is off by more than the contract."""
    rng, device, shape = generator(5), device_of(backend), shape_of(backend, 1)
    x, grad = (torch.randn(shape, generator=rng).to(device, dtype) for _ in range(2))
    mean_offsets, c = gaussians(NUM_HEADS, 48, rng, offsets=0.05, width=2.0, dtype=torch.float64, device=device)
    expected = truth(x, mean_offsets, c, grad, norm_axis=1)
    assert expected[0].abs().max() < 2e-25
    assert_contract(evaluate(backend, x, mean_offsets, c, grad, norm_axis=1), expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_gradients_are_bitwise_the_same_every_time(backend):
    rng, device, shape = generator(3), device_of(backend), shape_of(backend, 1)
    x = torch.randn(shape, generator=rng).to(device)
    grad = torch.randn(shape, generator=rng).to(device)
    parameters = gaussians(NUM_HEADS, 5, rng, device=device)
    first = evaluate(backend, x, *parameters, grad, norm_axis=1)
    for _ in range(3):
        again = evaluate(backend, x, *parameters, grad, norm_axis=1)
        for name, a, b in zip(("y", "dx", "dmean_offsets", "dc"), again, first, strict=True):
            assert_same_bits(a, b, name)
