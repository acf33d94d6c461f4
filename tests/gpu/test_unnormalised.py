"""The gate and the per-feature Gaussian on real hardware, at lengths that the interpreter has no time for."""

import pytest
import torch
from support import assert_contract, assert_same_bits, generator
from unnormalised import DENSITIES, columns, evaluate, gaussians, truth

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("density", DENSITIES)]

CUDA = "cuda"


def problem(density, shape, axis, heads, dtype):
    """(x, y's incoming gradient, parameters)"""
    rng = generator()
    x, grad = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    options = dict(offsets=0.05, dtype=torch.float64, device=CUDA)
    parameters = gaussians(density, heads, columns(density, shape, axis), rng, **options)
    return (1 + x).to(CUDA, dtype), grad.to(CUDA, dtype), parameters


@pytest.mark.parametrize("length", [7, 100, 4099, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", ["last", "middle"])
def test_any_length(axis, dtype, length, density):
    outer = max(1, 40_000 // length)
    shape, norm_axis = ((outer, length), -1) if axis == "last" else ((outer, length, 6), 1)
    x, grad, parameters = problem(density, shape, norm_axis, 3, dtype)
    mask = torch.rand(shape, generator=generator(9)).to(CUDA) < 0.8
    for options in ({}, dict(mask=mask, padding_stats="exclude", residual=True)):
        options.update(density=density, norm_axis=norm_axis)
        got = evaluate("triton", x, *parameters, grad, **options)
        assert_contract(got, truth(x, *parameters, grad, **options), dtype, str(length))


def test_the_same_bits_every_time(density):
    x, grad, parameters = problem(density, (16, 512, 64), 1, 4, torch.bfloat16)
    first = evaluate("triton", x, *parameters, grad, density=density, norm_axis=1)
    for _ in range(10):
        again = evaluate("triton", x, *parameters, grad, density=density, norm_axis=1)
        for a, b in zip(again, first, strict=True):
            assert_same_bits(a.cpu(), b.cpu())
