"""Any strides of x and of the incoming gradient, in NaN-poisoned memory and beside NaN, give the contiguous result."""

import daam_kernels
import pytest
import torch
from support import (
    BACKENDS,
    TOLERANCES,
    assert_close,
    assert_contract,
    assert_margins_intact,
    assert_same_bits,
    channels_last,
    device_of,
    evaluate,
    every_second,
    gaussians,
    generator,
    nan_padded,
    narrowed,
    sized,
    transposed,
    truth,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def expanded(t):
    """One number or row of t, for all of its first axis; zero strides."""
    return t[:1].expand_as(t)


def permuted(t):
    """The values of t with its axes in the opposite order in memory: no two of them can be merged."""
    axes = list(range(t.dim()))[::-1]
    return t.permute(axes).contiguous().permute(axes)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "expanded": expanded,
    "narrow of a cat": narrowed,
    "transposed": transposed,
    "every second element": every_second,
    "permuted": permuted,
}
X_LAYOUTS = {**LAYOUTS, "channels_last": channels_last}

SHAPE = (3, 18, 2, 4)
FEW = (2, 10, 2, 3)


def inputs(backend, dtype, seed=0):
    rng, shape, device = generator(seed), sized(backend, SHAPE, FEW), device_of(backend)
    x = (10 + torch.randn(shape, generator=rng)).to(device, dtype)
    grad = torch.randn(shape, generator=rng).to(device, dtype)
    parameters_type = torch.promote_types(dtype, torch.float32)
    return x, grad, gaussians(2, 3, rng, offsets=0.05, dtype=parameters_type, device=device)


@pytest.mark.parametrize("norm_axis", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradient(backend, layout, dtype, norm_axis):
    x, grad, parameters = inputs(backend, dtype)
    num_heads = 2 if norm_axis == 1 else 1
    parameters = [t[:num_heads] for t in parameters]
    strided = LAYOUTS[layout](grad)
    if layout != "contiguous":
        assert not strided.is_contiguous()
    expected = truth(x, *parameters, strided, norm_axis=norm_axis)
    assert_contract(evaluate(backend, x, *parameters, strided, norm_axis=norm_axis), expected, dtype, layout)


@pytest.mark.parametrize("norm_axis", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_sum(backend, norm_axis):
    x, _, parameters = inputs(backend, torch.float32)
    parameters = [t[: 2 if norm_axis == 1 else 1] for t in parameters]
    expected = truth(x, *parameters, norm_axis=norm_axis)
    assert_contract(evaluate(backend, x, *parameters, norm_axis=norm_axis), expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_a_cat(backend):
    """What autograd hands down behind torch.cat: a narrow of the gradient of the whole."""
    x, grad, parameters = inputs(backend, torch.float32)
    leaf = x.clone().requires_grad_()
    y = daam_kernels.density_attention(leaf, *parameters, norm_axis=1, backend=backend)
    torch.cat([y, leaf, y], 3).backward(torch.cat([grad, torch.zeros_like(grad), 2 * grad], 3))
    expected = truth(x, *parameters, 3 * grad, norm_axis=1)
    assert_close(leaf.grad, expected[1], TOLERANCES[torch.float32][1], "dx")


@pytest.mark.parametrize("norm_axis", [0, 1, 2, -1])
@pytest.mark.parametrize("layout", X_LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x(backend, layout, norm_axis):
    x, grad, (mean_offsets, c) = inputs(backend, torch.float32)
    parameters = mean_offsets[:1], c[:1]
    strided = X_LAYOUTS[layout](x)
    if layout == "expanded" and norm_axis == 0:
        strided = x[:, :1].expand_as(x)
    expected = truth(strided, *parameters, grad, norm_axis=norm_axis)
    y, dx, *rest = evaluate(backend, strided, *parameters, grad, norm_axis=norm_axis)
    assert_contract((y, dx, *rest), expected, torch.float32, layout)
    assert y.stride() == dx.stride() == torch.empty_like(strided).stride()


@pytest.mark.parametrize("layout", X_LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x_gradient_and_mask_all_strided(backend, layout):
    x, grad, parameters = inputs(backend, torch.float32)
    x[0, ::3] = 7.0
    strided, strided_grad = X_LAYOUTS[layout](x), permuted(grad)
    mask = transposed(torch.rand(x.shape, generator=generator(1)) < 0.8).to(x.device)
    for mask_view in (mask, mask[:, :, :, :1], mask[:1].expand_as(mask)):
        options = dict(norm_axis=1, padding_value=7, mask=mask_view, padding_stats="exclude", residual=True)
        expected = truth(strided, *parameters, strided_grad, **options)
        got = evaluate(backend, strided, *parameters, strided_grad, **options)
        assert_contract(got, expected, torch.float32, layout)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second element"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_may_come_back_in_another_layout(backend, layout):
    """From hooks that keep them elsewhere. Heads are so long that Triton saves their statistics as well."""
    rng, device = generator(), device_of(backend)
    x, grad = (torch.randn(3, 130, 2, generator=rng).to(device) for _ in range(2))
    tensors = [LAYOUTS[layout](t) for t in (x, *gaussians(2, 3, rng, offsets=0.05, device=device))]
    expected = truth(*tensors, grad, norm_axis=1)
    for unpack in (torch.Tensor.contiguous, permuted):
        for _ in range(2):  # the second call is remembered
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                got = evaluate(backend, *tensors, grad, norm_axis=1)
            assert_contract(got, expected, torch.float32, f"{layout}, {unpack.__name__}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm_axis", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_inside_nan_buffers(backend, norm_axis, dtype):
    """Nothing beyond the inputs is read, or it would be NaN; nothing there is written."""
    x, grad, parameters = inputs(backend, dtype)
    parameters = [t[: 2 if norm_axis == 1 else 1] for t in parameters]
    expected = truth(x, *parameters, grad, norm_axis=norm_axis)
    views, buffers = zip(*(nan_padded(t) for t in (x, *parameters, grad)))
    assert_contract(evaluate(backend, *views, norm_axis=norm_axis), expected, dtype)
    for buffer, view, original in zip(buffers, views, (x, *parameters, grad)):
        assert_margins_intact(buffer)
        assert_same_bits(view, original)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_changed(backend):
    x, grad, parameters = inputs(backend, torch.float32)
    before = [t.clone() for t in (x, *parameters, grad)]
    evaluate(backend, x, *parameters, grad, norm_axis=1, residual=True)
    for t, original in zip((x, *parameters, grad), before):
        assert_same_bits(t, original)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_parameters(backend):
    x, grad, (mean_offsets, c) = inputs(backend, torch.float32)
    expected = truth(x, mean_offsets, c, grad, norm_axis=1)
    for make in (transposed, every_second, narrowed):
        strided = make(mean_offsets), make(c)
        assert not strided[1].is_contiguous()
        assert_contract(evaluate(backend, x, *strided, grad, norm_axis=1), expected, torch.float32, make.__name__)
    one = c[:1, :1].expand_as(c)
    expected = truth(x, one, one, grad, norm_axis=1)
    assert_contract(evaluate(backend, x, one, one, grad, norm_axis=1), expected, torch.float32, "expanded")
