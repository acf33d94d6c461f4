"""The mixture on real hardware, at sizes that the interpreter has no time for."""

import daam_kernels
import pytest
import torch
from mixture import assert_contract, evaluate, generator, mixture, truth

pytestmark = pytest.mark.gpu

CUDA = "cuda"


def problem(shape, num_heads, num_gaussians, dtype, mean=0.0, **parameters):
    rng = generator()
    x, grad = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    parameters = mixture(num_heads, num_gaussians, rng, dtype=torch.float64, device=CUDA, **parameters)
    return (mean + x).to(CUDA, dtype), grad.to(CUDA, dtype), parameters


# As of the product: lengths from one warp's worth to many blocks, with a remainder; both kinds of axis.
@pytest.mark.parametrize("length", [7, 64, 100, 1000, 4099, 20_000, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", ["last", "middle"])
def test_any_length(axis, dtype, length):
    outer = max(1, 40_000 // length)
    shape, norm_axis = ((outer, length), -1) if axis == "last" else ((outer, length, 6), 1)
    x, grad, parameters = problem(shape, 3, 5, dtype, mean=1.0, offsets=0.05, width=2.0)
    mask = torch.rand(shape, generator=generator(9)).to(CUDA) < 0.8
    for options in ({}, dict(mask=mask, padding_stats="exclude", residual=True), dict(mask=mask)):
        got = evaluate("triton", x, *parameters, grad, norm_axis=norm_axis, **options)
        assert_contract(got, truth(x, *parameters, grad, norm_axis=norm_axis, **options), dtype, str(length))


@pytest.mark.parametrize("num_gaussians", [1, 16, 64])
@pytest.mark.parametrize("shape, axis", [((64, 2048), 1), ((4, 512, 256), 1)], ids=["rows", "columns"])
def test_any_number_of_gaussians(shape, axis, num_gaussians):
    x, grad, parameters = problem(shape, 8, num_gaussians, torch.float32, offsets=0.05, width=2.0)
    got = evaluate("triton", x, *parameters, grad, norm_axis=axis)
    assert_contract(got, truth(x, *parameters, grad, norm_axis=axis), torch.float32)


@pytest.mark.parametrize("shape, heads", [((3, 515, 200), 2), ((3, 40, 200), 8), ((64, 1000, 1), 2)], ids=str)
@pytest.mark.parametrize("num_gaussians", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contract_of_slices_that_are_looped_over(launched_by_one, dtype, num_gaussians, shape, heads):
    """Columns with and without saved statistics, and rows; up to four Gaussians have their sums in registers."""
    x, grad, parameters = problem(shape, heads, num_gaussians, dtype, mean=1.0, offsets=0.05)
    mask = torch.rand(shape, generator=generator(9)).to(CUDA) < 0.8
    for options in ({}, dict(mask=mask, padding_stats="exclude", residual=True), dict(mask=mask)):
        got = evaluate("triton", x, *parameters, grad, norm_axis=1, **options)
        assert_contract(got, truth(x, *parameters, grad, norm_axis=1, **options), dtype, str(options))
    ours = {name for name in launched_by_one if name.startswith("mixture")}
    assert ours == {"mixture_backward_looped", "mixture_parameter_gradients"}


@pytest.mark.parametrize("norm_axis", [1, -1])
def test_gradcheck(norm_axis):
    shape = (2, 9, 3) if norm_axis == 1 else (6, 9)
    x, _, parameters = problem(shape, 2, 3, torch.float64, mean=2.0, offsets=0.1, width=1.5)
    tensors = [t.requires_grad_() for t in (x, *parameters)]

    def run(x, mean_offsets, c, weights):
        return daam_kernels.density_attention(
            x, mean_offsets, c, density="mixture", weights=weights, norm_axis=norm_axis, backend="triton"
        )

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)
