"""torch.ops.daam_kernels.density_block and its backward: schema, fakes, autograd, torch.compile."""

import pytest
import torch
from daam_kernels import FusedDensityBlock, density_attention
from daam_kernels.functional import density_block
from support import BACKENDS, assert_close, assert_same_bits, device_of, gaussians, generator, interpreted
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode

if "triton" not in BACKENDS:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = device_of("triton")
operator = torch.ops.daam_kernels.density_block.default
backward = torch.ops.daam_kernels.density_block_backward.default
PLAIN = (1, None, "zero", "clamp", 1e-8)
PADDED = (1, 7.0, "exclude", "softmax", 1e-6)


def inputs(dtype=torch.float64, shape=(2, 7), counts=(2, 1)):
    """x, mean_offsets of every layer, c of every layer, of two heads."""
    rng = generator()
    x = (1 + torch.randn(shape, generator=rng)).to(DEVICE, dtype)
    layers = [gaussians(2, k, rng, offsets=0.05, dtype=dtype, device=DEVICE) for k in counts]
    return x, *map(list, zip(*layers))


def leaves(x, mean_offsets, c):
    return [t.detach().clone().requires_grad_() for t in (x, *mean_offsets, *c)]


def block(x, *parameters, **options):
    half = len(parameters) // 2
    return density_block(x, parameters[:half], parameters[half:], norm_axis=1, backend="triton", **options)


def layer_by_layer(x, *parameters, backend="triton", **options):
    half = len(parameters) // 2
    for m, c in zip(parameters[:half], parameters[half:]):
        x = density_attention(x, m, c, norm_axis=1, residual=True, backend=backend, **options)
    return x


def test_opcheck_of_the_operator():
    x, mean_offsets, c = inputs()
    tensors = leaves(x, mean_offsets, c)
    mask = torch.arange(7, device=DEVICE) != 2
    torch.library.opcheck(operator, (tensors[0], tensors[1:3], tensors[3:], mask, *PADDED, "triton"))


def test_opcheck_of_the_backward():
    x, mean_offsets, c = inputs()
    utils = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    args = (torch.ones_like(x), x, mean_offsets, c, None, *PLAIN, "triton")
    torch.library.opcheck(backward, args, test_utils=utils)


def test_fakes_know_shapes_types_and_layouts():
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 6, 8, device="cuda", dtype=torch.bfloat16).transpose(0, 2)
        parameters = [torch.empty(2, k, device="cuda") for k in (3, 1)]
        y = operator(x, parameters, parameters, None, *PLAIN, "auto")
        dx, *gradients = backward(y, x, parameters, parameters, None, *PLAIN, "auto")
        for t in (y, dx):
            assert (t.shape, t.stride(), t.dtype, t.device) == (x.shape, x.stride(), x.dtype, x.device)
        for found in gradients:
            assert [t.shape for t in found] == [t.shape for t in parameters]


def test_gradcheck():
    tensors = leaves(*inputs())
    mask = torch.arange(7, device=DEVICE) != 2
    function = lambda *t: block(*t, mask=mask, padding_stats="exclude")  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_second_derivatives_are_the_layers():
    tensors = leaves(*inputs())
    found = []
    for function in (block, layer_by_layer):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), tensors))
    for got, expected in zip(*found):
        assert_close(got, expected, 1e-10)


def test_the_gradient_of_a_compiled_call_is_not_differentiable():
    x, mean_offsets, c = inputs()
    x.requires_grad_()
    dx = backward(torch.ones_like(x), x, mean_offsets, c, None, *PLAIN, "triton")[0]
    with pytest.raises(RuntimeError, match="not differentiable itself"):
        dx.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_module_compiles_into_one_graph_with_one_operator(dynamic):
    module = FusedDensityBlock([1, -1], [2, 2], [2, 1], 2, backend="triton", device=DEVICE)
    x = inputs(torch.float32)[0].requires_grad_()
    tensors = x, *module.parameters()
    targets = []

    def backend(graph, example):
        targets[:] = [node.target for node in graph.graph.nodes]  # of the last one: symbolic eps makes it begin anew
        return aot_eager(graph, example)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    expected = torch.autograd.grad(module(x).square().sum(), tensors)
    for got, other in zip(torch.autograd.grad(compiled(x).square().sum(), tensors), expected):
        torch.testing.assert_close(got, other)
    assert targets.count(operator) == 1


def test_functional_transforms_take_ordinary_operations():
    tensors = [t.detach() for t in leaves(*inputs(shape=(2, 5)))]
    got = torch.func.grad(lambda x: block(x, *tensors[1:]).sum())(tensors[0])
    x = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer_by_layer(x, *tensors[1:], backend="reference").sum(), x)
    assert_close(got, expected, 1e-12)


@pytest.mark.skipif(not interpreted("triton"), reason="one backend serves CPU tensors and CUDA tensors alike")
def test_the_operator_goes_layer_by_layer_on_other_backends():
    x, mean_offsets, c = inputs()
    grad = torch.ones_like(x)
    y = operator(x, mean_offsets, c, None, *PLAIN, "reference")
    dx, *gradients = backward(grad, x, mean_offsets, c, None, *PLAIN, "reference")
    tensors = leaves(x, mean_offsets, c)
    expected = layer_by_layer(*tensors, backend="reference")
    assert_same_bits(y, expected.detach())
    for got, other in zip((dx, *gradients[0], *gradients[1]), torch.autograd.grad(expected, tensors, grad)):
        assert_close(got, other, 1e-12)
