"""The block's kernels, in Triton's interpreter or on a GPU: the contract, launches, what goes layer by layer."""

import daam_kernels
import pytest
import torch
from daam_kernels import FusedDensityBlock
from daam_kernels.functional import density_block
from support import (
    DTYPES,
    HALF_TYPES,
    NEGLIGIBLE,
    TOLERANCES,
    assert_close,
    assert_same_bits,
    device_of,
    gaussians,
    generator,
    truth,
)

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = device_of("triton")
SWEEP = ["block_forward_resident", "block_backward_resident", "block_parameter_gradients"]
LAYER_FORWARD = ["forward_resident"]
LAYER_BACKWARD = ["backward_resident", "parameter_gradients"]
ROWS, COLUMNS = ((2, 35), 1), ((1, 21, 36), 1)


def inputs(shape, dtype, counts=(3, 1, 5), *, mean=0.0, deviation=1.0, heads=2):
    """x, y's incoming gradient, and (mean_offsets, c) of every layer."""
    rng = generator()
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(DEVICE, dtype)
    grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)
    options = dict(offsets=0.05 * deviation, dtype=torch.float64, device=DEVICE)
    return x, grad, [gaussians(heads, count, rng, **options) for count in counts]


def evaluate(x, grad, layers, **options):
    """(y, dx, the gradients of every layer's mean_offsets and c) of the block's function."""
    x, *parameters = (t.detach().requires_grad_() for t in (x, *(t for layer in layers for t in layer)))
    y = density_block(x, parameters[::2], parameters[1::2], backend="triton", **options)
    return y.detach(), *torch.autograd.grad(y, (x, *parameters), grad)


def exact(x, grad, layers, **options):
    """The same in float64, layer by layer, each layer's input rounded to x's type."""
    grad = grad.double()
    entered, found = [x], []
    for layer in layers:
        y = truth(entered[-1], *layer, residual=True, **options)[0]
        entered.append(y.to(x.device, x.dtype))
    for x, layer in reversed(list(zip(entered, layers))):
        _, grad, *gradients = truth(x, *layer, grad, residual=True, **options)
        found[:0] = gradients
    return y, grad, *found


def check(x, grad, layers, **options):
    got, expected = evaluate(x, grad, layers, **options), exact(x, grad, layers, **options)
    y, dx, parameters = TOLERANCES[x.dtype]
    for index, (g, e) in enumerate(zip(got, expected, strict=True)):
        name, tolerance = ("y", y) if index == 0 else ("dx", dx) if index == 1 else (f"gradient {index}", parameters)
        assert torch.isfinite(g).all(), name
        if index == 0 or e.norm() > NEGLIGIBLE:
            assert_close(g, e, tolerance, f"{name} {options}")


@pytest.mark.parametrize(
    "layout, dtype, counts",
    [
        *((ROWS, dtype, (3, 1, 5)) for dtype in DTYPES),
        *((COLUMNS, dtype, (3, 1, 5)) for dtype in (torch.float32, torch.bfloat16)),
        (ROWS, torch.float32, (2, 1, 1, 3, 1, 1)),
        (ROWS, torch.float16, (3,)),
    ],
    ids=str,
)
def test_the_contract(launched, layout, dtype, counts):
    shape, axis = layout
    check(*inputs(shape, dtype, counts, mean=1.0), norm_axis=axis)
    assert launched == (SWEEP if len(counts) > 1 else LAYER_FORWARD + LAYER_BACKWARD)


@pytest.mark.parametrize("constant_gradient", [False, True])
def test_the_contract_on_a_large_offset(constant_gradient):
    x, grad, layers = inputs((2, 128), torch.float32, mean=1e4, deviation=0.1)
    check(x, torch.ones_like(grad) if constant_gradient else grad, layers)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("padding_value, masked", [(0.0, False), (7.0, True), (None, True)])
def test_padding_is_tested_on_every_layers_input_and_a_mask_stays(padding_stats, padding_value, masked):
    x, grad, layers = inputs((3, 40), torch.float32, (2, 3), mean=1.0)
    x[0, 5:9] = 0.0
    x[1, 30:] = 7.0
    x[2, :20] = 0.0  # a slice of padding alone
    mask = (torch.rand(x.shape, generator=generator(1)) < 0.8).to(DEVICE) if masked else None
    x[0, 12] = 3.5  # doubled where the mask leaves it out, it becomes the padding value
    check(x, grad, layers, padding_value=padding_value, mask=mask, padding_stats=padding_stats)


def test_a_layer_doubles_padding_that_the_next_one_counts():
    x, grad, layers = inputs((1, 20), torch.float64, (2, 2), heads=1)
    x[0, :4] = 7.0
    check(x, grad, layers, padding_value=7.0, padding_stats="exclude")
    y = evaluate(x, grad, layers, padding_value=7.0, padding_stats="exclude")[0]
    assert (y[0, :4] != 28.0).all()
    x[0, :4] = 0.0
    assert not evaluate(x, grad, layers, padding_value=0.0, padding_stats="exclude")[0][0, :4].any()


@pytest.mark.parametrize("options", [dict(normalize="softmax"), dict(eps=50.0)], ids=str)
def test_normalisers(options):
    check(*inputs((2, 24), torch.float32, (2, 3)), **options)


def test_any_strides():
    x, grad, layers = inputs((2, 3, 12), torch.float64, (2, 1))
    check(x.transpose(0, 1), grad.transpose(0, 1), layers)
    check(x, grad[:, :1, :1].expand(x.shape), layers, norm_axis=2)
    check(x, torch.stack((grad, grad), -1).flatten(-2)[..., ::2], layers)
    windows = x.flatten().unfold(0, 16, 1)[:, :4]  # strides (1, 1)
    check(windows, torch.ones_like(windows), layers, norm_axis=0)


def test_parameters_of_any_type_and_layout():
    x, grad, layers = inputs((2, 20), torch.float32, (3, 2))
    layers = [tuple(t.float().t().contiguous().t() for t in layers[0]), tuple(t.bfloat16() for t in layers[1])]
    got, expected = evaluate(x, grad, layers), exact(x, grad, layers)
    for g, e, tolerance in zip(got, expected, (2e-6, 5e-6, 1e-4, 1e-4, 2**-8, 2**-8), strict=True):
        assert_close(g, e, tolerance)
    assert [t.dtype for t in got[2:]] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_an_empty_batch_has_no_gradients(launched):
    x, grad, layers = inputs((0, 20), torch.float32)
    y, dx, *gradients = evaluate(x, grad, layers)
    assert y.shape == dx.shape == x.shape and not any(t.any() for t in gradients) and launched == []


def test_bits_do_not_depend_on_the_run():
    x, grad, layers = inputs((3, 30), torch.float32, (3, 1))
    for first, second in zip(*(evaluate(x, grad, layers) for _ in range(2))):
        assert_same_bits(first, second)


def test_as_many_layers_in_a_sweep_as_fit(launched, monkeypatch):
    from daam_kernels.kernels import tiling

    monkeypatch.setattr(tiling, "MOST_LAYERS", 3)
    x, grad, layers = inputs((1, 16), torch.float32, (1, 2, 1, 2, 1))
    with torch.no_grad():
        density_block(x, *map(list, zip(*layers)), backend="triton")
    assert launched == SWEEP[:1] * 2
    launched.clear()
    monkeypatch.setattr(tiling, "MOST_LAYERS", 2)
    check(x, grad, layers[:3])
    assert launched == SWEEP[:1] + LAYER_FORWARD + LAYER_BACKWARD + SWEEP[1:]


def test_long_slices_go_layer_by_layer(small_tiles, launched):
    check(*inputs((1, 24), torch.float32, (1, 2), heads=1))
    assert launched == SWEEP
    launched.clear()
    check(*inputs((1, 40), torch.float32, (1, 2), heads=1))
    assert launched == LAYER_FORWARD * 2 + LAYER_BACKWARD * 2


def block(**options):
    torch.manual_seed(0)
    made = dict(norm_axes=[1, -1, 1], num_heads=[2] * 3, num_gaussians=[2, 1, 3], num_layers=3, backend="triton")
    return FusedDensityBlock(**{**made, **options}, dtype=torch.float64, device=DEVICE)


def launches_of(module, x, launched, *arguments, **keywords):
    """What the module launches; its result and gradients are those of the reference."""
    launched.clear()
    y = module(x, *arguments, **keywords)
    y = y[0] if arguments else y
    y.sum().backward()
    forward = [name for name in launched if "forward" in name]
    gradients = [p.grad for p in module.parameters()]
    module.zero_grad()
    exact = FusedDensityBlock.forward(_on_the_reference(module), x, **keywords)
    exact.sum().backward()
    for got, expected in zip((y.detach(), *gradients), (exact.detach(), *(p.grad for p in module.parameters()))):
        assert_close(got, expected, 1e-11)
    return forward


def _on_the_reference(module):
    for layer in module.layers:
        layer.backend = "reference"
    return module


FALLS_BACK = {
    "heads": (dict(num_heads=[2, 1, 2]), LAYER_FORWARD * 3),
    "axes": (dict(norm_axes=[1, 1, 0]), SWEEP[:1] + LAYER_FORWARD),
    "one layer": (dict(norm_axes=[1], num_heads=[2], num_gaussians=[3], num_layers=1), LAYER_FORWARD),
    "all alike": ({}, SWEEP[:1]),
}


@pytest.mark.parametrize("case", FALLS_BACK)
def test_layers_of_a_module_that_share_a_sweep(launched, case):
    options, expected = FALLS_BACK[case]
    x, _, _ = inputs((4, 8), torch.float64)
    assert launches_of(block(**options), x, launched) == expected


def test_a_layer_of_its_own_is_called_by_itself(launched):
    x, _, _ = inputs((3, 8), torch.float64)
    module = block()
    heard = []
    module.layers[0].register_forward_hook(lambda *_: heard.append(1))
    assert launches_of(module, x, launched) == LAYER_FORWARD + SWEEP[:1] and heard
    for name, value in (("eps", 1e-3), ("eps", (1e-8, 1e-3)), ("normalize", "softmax"), ("padding_value", 0.0)):
        module = block()
        setattr(module.layers[2], name, value)
        found = launches_of(module, x, launched)
        assert found[0] == SWEEP[0] and set(found[1:]) == set(LAYER_FORWARD)
    assert launches_of(block(), x, launched, True) == LAYER_FORWARD * 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, c: (m[0], c), "mean_offsets must be a list of tensors"),
        (lambda m, c: (m, c[:1]), "one length, got 2 and 1 layers"),
        (lambda m, c: (m, [c[0], c[1][:1]]), r"mean_offsets\[1\] and c\[1\] must have the same shape"),
        (lambda m, c: ([m[0], m[1][:1]], [c[0], c[1][:1]]), r"the 2 heads of c\[0\] in every layer, got 1 in c\[1\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, _, layers = inputs((2, 8), torch.float32, (1, 1))
    with pytest.raises((TypeError, ValueError), match=message):
        density_block(x, *change(*map(list, zip(*layers))), backend="triton")


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_a_sweep_rounds_between_layers_as_layers_do(dtype):
    x, _, layers = inputs((2, 40), dtype, (2, 3))
    with torch.no_grad():
        once = density_block(x, *map(list, zip(*layers)), backend="triton")
        y = x
        for layer in layers:
            y = daam_kernels.density_attention(y, *layer, residual=True, backend="triton")
    assert_same_bits(once, y)
