"""A block of layers in one sweep on real hardware: against layer by layer, the same bits, in a CUDA graph."""

import pytest
import torch
from daam_kernels import density_attention
from daam_kernels.functional import density_block
from support import NEGLIGIBLE, TOLERANCES, assert_close, assert_same_bits, gaussians, generator, truth

pytestmark = pytest.mark.gpu

CUDA = "cuda"


def problem(shape, dtype, layers=3, heads=2):
    """(x, y's incoming gradient, mean_offsets of every layer, c of every layer)

    Slices of a few elements or narrow Gaussians would enlarge what a layer's input is off by, which is no one's error.
    """
    rng = generator()
    x, grad = (torch.randn(shape, generator=rng, dtype=torch.float64).to(CUDA, dtype) for _ in range(2))
    parameters = [
        gaussians(heads, 4, rng, offsets=0.05, width=2.0, dtype=torch.float64, device=CUDA) for _ in range(layers)
    ]
    return x, grad, *map(list, zip(*parameters))


def evaluate(x, grad, mean_offsets, c, **options):
    """(y, dx, the gradients of every layer's mean_offsets, of every layer's c)"""
    x, *parameters = (t.detach().requires_grad_() for t in (x, *mean_offsets, *c))
    y = density_block(x, parameters[: len(c)], parameters[len(c) :], backend="triton", **options)
    return y.detach(), *torch.autograd.grad(y, (x, *parameters), grad)


@pytest.mark.parametrize("shape, axis", [((8, 24, 1024), 1), ((64, 2048), 1), ((4, 512, 96), 1), ((6, 40_000), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_contract(dtype, shape, axis):
    """Every layer's input is rounded to x's type, and the last shape's slices do not fit a block."""
    x, grad, mean_offsets, c = problem(shape, dtype)
    y, *gradients = evaluate(x, grad, mean_offsets, c, norm_axis=axis)
    entered = [x]
    for layer in zip(mean_offsets, c):
        exact = truth(entered[-1], *layer, residual=True, norm_axis=axis)[0]
        entered.append(exact.to(CUDA, dtype))
    through, of_offsets, of_c = grad.double(), [], []
    for x, *layer in reversed(list(zip(entered, mean_offsets, c))):
        _, through, d_offsets, d_c = truth(x, *layer, through, residual=True, norm_axis=axis)
        of_offsets.insert(0, d_offsets)
        of_c.insert(0, d_c)
    tolerance, of_x, of_parameters = TOLERANCES[dtype]
    assert_close(y, exact, tolerance, "y")
    assert_close(gradients[0], through, of_x, "dx")
    for number, (got, expected) in enumerate(zip(gradients[1:], (*of_offsets, *of_c), strict=True)):
        assert torch.isfinite(got).all() and expected.norm() > NEGLIGIBLE
        assert_close(got, expected, of_parameters, f"gradient {number}")


def test_the_same_bits_in_every_run_and_in_a_graph():
    tensors = problem((8, 24, 1024), torch.bfloat16)
    expected = evaluate(*tensors, norm_axis=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            again = evaluate(*tensors, norm_axis=1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(*tensors, norm_axis=1)
    graph.replay()
    for results in (again, captured):
        for got, first in zip(results, expected, strict=True):
            assert_same_bits(got.cpu(), first.cpu())


def test_as_layer_by_layer():
    x, _, mean_offsets, c = problem((8, 24, 1024), torch.float32)
    y = density_block(x, mean_offsets, c, norm_axis=1)
    for layer in zip(mean_offsets, c):
        x = density_attention(x, *layer, norm_axis=1, residual=True)
    assert_close(y, x, 3 * TOLERANCES[torch.float32][0])
