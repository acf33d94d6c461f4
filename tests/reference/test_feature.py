"""The per-feature Gaussian in the reference: against the paper's code and in extended precision; derivatives."""

import itertools

import numpy as np
import pytest
import torch
from support import (
    DTYPES,
    HALF_TYPES,
    NEGLIGIBLE,
    TOLERANCES,
    assert_close,
    assert_finite_but_for_overflow,
    assert_same_bits,
    generator,
)
from torch import Tensor

from daam_kernels.reference import feature_density_attention

EXACT = 1e-12
NAMES = ("y", "dx", "dmean_offsets", "dc")
ROWS = {"N(0, 1)": (0, 1), "N(10, 1)": (10, 1), "N(1e3, 1)": (1e3, 1), "N(1e4, 0.1)": (1e4, 0.1)}  # mean, deviation


def parameters(num_heads: int, features: int, rng, *, offsets: float = 0.0, width: float | None = None, dtype=None):
    """(mean_offsets, c): offsets ~ ``offsets`` N(0, 1), c ~ exp(N(0, 1)), or all ``width``."""
    shape = num_heads, features
    mean_offsets = offsets * torch.randn(shape, generator=rng, dtype=torch.float64)
    c = torch.randn(shape, generator=rng, dtype=torch.float64).exp()
    c = c if width is None else torch.full_like(c, width)
    return mean_offsets.to(dtype or torch.float64), c.to(dtype or torch.float64)


def evaluate(x, mean_offsets, c, grad, **options):
    """(y, dx, dmean_offsets, dc)."""
    inputs = [t.detach().requires_grad_() for t in (x, mean_offsets, c)]
    y = feature_density_attention(*inputs, **options)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


def truth(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    grad: Tensor,
    *,
    padding_value: float | None = None,
    mask: Tensor | None = None,
    padding_stats: str = "zero",
    eps: float = 1e-5,
    residual: bool = False,
):
    """(y, dx, dmean_offsets, dc) of the same rounded inputs, in numpy's long double: formulas and chain rule."""
    assert np.finfo(np.longdouble).eps < 2e-19, "this machine has no extended precision to hold float64 against"

    def exact(t):
        return t.detach().double().numpy().astype(np.longdouble)

    valid = torch.ones_like(x, dtype=torch.bool) if padding_value is None else x != padding_value
    valid = (valid if mask is None else valid & mask).numpy()
    values, g, offsets, widths = map(exact, (x, grad, mean_offsets, c))
    if x.dim() == 3:
        values, g, valid = (t[:, :, None] for t in (values, g, valid))
    y, dx = np.empty_like(values), np.empty_like(values)
    d_offsets, d_widths = np.zeros_like(offsets), np.zeros_like(widths)
    heads, chunk = len(widths), values.shape[1] // len(widths)
    for head in range(heads):
        cut = np.s_[:, head * chunk : (head + 1) * chunk if head < heads - 1 else None]
        v_x, v_g, v_valid, offset, c_head = values[cut], g[cut], valid[cut], offsets[head], widths[head]
        kept = np.where(v_valid, v_x, 0)
        steps = np.full_like(kept[:, :, :1], v_x.shape[2])
        counted = np.ones_like(steps)
        if padding_stats == "exclude":
            steps = np.maximum(v_valid.sum(2, keepdims=True), 1)
            counted = v_valid.any(2, keepdims=True)
        n = np.maximum(counted.sum(1, keepdims=True), 1)
        a = kept.sum(2, keepdims=True) / steps
        mean = a.sum(1, keepdims=True) / n
        apart = np.where(counted, a - mean, 0)
        var = (apart**2).sum(1, keepdims=True) / n + np.longdouble(1e-8) + np.longdouble(eps)
        e = np.where(v_valid.any(2, keepdims=True), a, v_x.mean(2, keepdims=True)) - mean - offset
        density = np.exp(-(e**2) / (2 * c_head * var))
        p = np.where(v_valid, v_g * v_x, 0).sum(2, keepdims=True) * density
        slope = p * e / (c_head * var)
        d_offsets[head] = slope.sum((0, 1, 2))
        d_widths[head] = (slope * e / (2 * c_head)).sum((0, 1, 2))
        d_var = (slope * e / (2 * var)).sum(1, keepdims=True)
        d_a = counted * (slope.sum(1, keepdims=True) + 2 * d_var * apart) / n - slope
        y[cut] = np.where(v_valid, v_x * density, v_x) + residual * v_x
        dx[cut] = np.where(v_valid, v_g * density + d_a / steps, v_g) + residual * v_g
    if x.dim() == 3:
        y, dx = y[:, :, 0], dx[:, :, 0]
    return tuple(torch.from_numpy(t.astype(np.float64)) for t in (y, dx, d_offsets, d_widths))


def assert_contract(got, expected, dtype, what=""):
    y_tolerance, dx_tolerance, parameters_tolerance = TOLERANCES[dtype]
    for name, g, e in zip(NAMES, got, expected, strict=True):
        assert torch.isfinite(g).all(), f"{what} {name} is not finite"
        if name == "y" or e.norm() > NEGLIGIBLE:
            tolerance = {"y": y_tolerance, "dx": dx_tolerance}.get(name, parameters_tolerance)
            assert_close(g, e, tolerance, f"{what} {name}")


def paper(x, mean_offsets, c, eps=1e-5):
    """(y, w) as the paper's code computes them, x [batch, layers, features], the layers divisible by the heads."""
    outputs, details = [], []
    for part, offset, width in zip(x.chunk(len(c), 1), mean_offsets, c):
        mean = part.mean(1, keepdim=True)
        var = ((part**2).mean(1, keepdim=True) - mean**2).abs() + 1e-8
        z = (part - (mean + offset)) / torch.sqrt(var + eps)
        w = torch.exp(-(z**2 / (2 * width)))
        outputs.append(part * w)
        details.append(w)
    return torch.cat(outputs, 1), torch.cat(details, 1)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_equals_the_papers_code(heads, eps):
    rng = generator(heads)
    x, grad = (torch.randn(5, 24, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    given = parameters(heads, 7, rng, offsets=1.0)
    inputs = [t.clone().requires_grad_() for t in (x, *given)]
    y, w = paper(*inputs, eps)
    got = evaluate(x, *given, grad, eps=eps)
    for name, a, b in zip(NAMES, got, (y, *torch.autograd.grad(y, inputs, grad)), strict=True):
        assert_close(a, b, EXACT, name)
    y_again, weights = feature_density_attention(x, *given, eps=eps, return_weights=True)
    assert torch.equal(y_again, got[0])
    assert_close(weights, w, EXACT, "weights")
    assert not feature_density_attention(*inputs, return_weights=True)[1].requires_grad


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 26, 64), (4, 25, 9, 16)], ids=["layers", "time"])
def test_contract(shape, dtype, row):
    mean, deviation = ROWS[row]
    rng = generator(1)
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
    noise = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for offsets, width, constant in itertools.product((0.0, 0.05), (None, 2.0), (False, True)):
        given = parameters(4, shape[-1], rng, offsets=offsets * deviation, width=width, dtype=kind)
        grad = torch.ones_like(noise) if constant else noise
        got = evaluate(x, *given, grad)
        assert [t.dtype for t in got] == [dtype, dtype, kind, kind]
        what = f"offsets={offsets}, c={width or 'exp(N(0, 1))'}, g={1 if constant else 'N(0, 1)'}:"
        expected = truth(x, *given, grad)
        if dtype in HALF_TYPES and row == "N(1e4, 0.1)":  # constant in half types: only finiteness is asked
            assert_finite_but_for_overflow(got, expected, what)
        else:
            assert_contract(got, expected, dtype, what)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 14, 6), (4, 14, 5, 6)], ids=["layers", "time"])
def test_contract_holds_with_padding(shape, dtype, padding_stats):
    rng = generator(2)
    x = (1 + torch.randn(shape, generator=rng)).to(dtype)
    grad = torch.randn(shape, generator=rng).to(dtype)
    mask = torch.rand(shape[:-1], generator=rng).unsqueeze(-1) < 0.7
    mask[0, :4] = mask[1, 5] = False  # a whole slice of padding; with time, a layer
    x[:, 3::5] = 0.1  # rounded in every type but float64
    given = parameters(3, 6, rng, offsets=0.05)
    for residual, eps, padding_value in ((False, 1e-5, 0.1), (True, 0.5, None)):
        options = dict(mask=mask, padding_value=padding_value, padding_stats=padding_stats, residual=residual, eps=eps)
        got = evaluate(x, *given, grad, **options)
        rounded = padding_value and torch.tensor(padding_value, dtype=dtype).item()
        expected = truth(x, *given, grad, **options | {"padding_value": rounded})
        assert_contract(got, expected, dtype, f"residual={residual}")


def test_weights_at_padding():
    rng = generator(3)
    x = torch.randn(3, 9, 4, generator=rng, dtype=torch.float64)
    mask = torch.rand(3, 9, 1, generator=rng) < 0.6
    given = parameters(2, 4, rng, offsets=1e-3, width=2.0)
    y, weights = feature_density_attention(x, *given, mask=mask, return_weights=True)
    padded = ~mask.expand_as(x)
    assert torch.equal(y[padded], x[padded])
    first = torch.where(mask, x, 0)[:, :4]
    var = first.var(1, keepdim=True, unbiased=False) + 1e-8 + 1e-5
    expected = torch.exp(-((x[:, :4] - first.mean(1, keepdim=True) - given[0][0]) ** 2) / (2 * given[1][0] * var))
    assert_close(weights[:, :4], expected, EXACT)
    y, weights = feature_density_attention(x, *given, mask=mask, padding_stats="exclude", return_weights=True)
    assert torch.equal(y[padded], x[padded]) and not weights[padded].any() and weights[~padded].all()


def test_excluded_padding_is_as_if_it_were_not_there():
    rng = generator(4)
    x = torch.randn(2, 7, 6, 5, generator=rng, dtype=torch.float64)
    given = parameters(1, 5, rng, offsets=0.3)
    options = dict(padding_stats="exclude", return_weights=True)
    layers, steps = (torch.arange(7) < 4).view(7, 1, 1), (torch.arange(6) < 5).view(6, 1)
    filled = x.masked_fill(~(layers & steps), torch.nan).requires_grad_()
    y, weights = feature_density_attention(filled, *given, mask=layers & steps, **options)
    alone = x[:, :4, :5].clone().requires_grad_()
    y_alone, weights_alone = feature_density_attention(alone, *given, return_weights=True)
    assert_close(y[:, :4, :5], y_alone, EXACT)
    assert_close(weights[:, :4, :5], weights_alone, EXACT)
    y[:, :4, :5].square().sum().backward()
    y_alone.square().sum().backward()
    assert_close(filled.grad[:, :4, :5], alone.grad, EXACT)


def test_one_valid_layer_is_a_slice_of_one_and_none_has_no_gradient():
    rng = generator(5)
    x = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    mask = torch.zeros(2, 3, 1, dtype=torch.bool)
    mask[0, 1] = True
    given = [t.requires_grad_() for t in parameters(1, 4, rng, offsets=1e-3)]
    y = feature_density_attention(x, *given, mask=mask, padding_stats="exclude")
    assert_close(y[0, 1], feature_density_attention(x[:1, 1:2], *given)[0, 0], EXACT)
    assert torch.equal(y[1], x[1])
    assert not any(g.any() for g in torch.autograd.grad(y[1].sum(), given))


def test_the_last_head_takes_the_remainder():
    rng = generator(6)
    x = torch.randn(3, 14, 5, generator=rng, dtype=torch.float64)
    mean_offsets, c = parameters(4, 5, rng, offsets=1.0)
    y = feature_density_attention(x, mean_offsets, c)
    for head, part in enumerate(x.split([3, 3, 3, 5], 1)):
        row = slice(head, head + 1)
        one = feature_density_attention(part, mean_offsets[row], c[row])
        assert_close(y[:, 3 * head : 3 * head + part.shape[1]], one, EXACT, f"head {head}")


def test_time_is_averaged_and_every_step_weighed_alike():
    rng = generator(7)
    x = torch.randn(3, 8, 6, 5, generator=rng, dtype=torch.float64)
    given = parameters(2, 5, rng, offsets=1.0)
    y, weights = feature_density_attention(x, *given, return_weights=True)
    _, expected = paper(x.mean(2), *given)
    assert weights.shape == x.shape
    assert_close(weights, expected.unsqueeze(2).expand_as(x), EXACT)
    assert_close(y, x * expected.unsqueeze(2), EXACT)
    one = x[:, :, :1].contiguous()
    without_time = feature_density_attention(one[:, :, 0], *given)
    assert_close(feature_density_attention(one, *given).squeeze(2), without_time, EXACT)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("shape", [(1, 5, 2), (1, 5, 2, 2)])
def test_derivatives(shape, padding_stats):
    rng = generator(8)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    mask = torch.rand(shape, generator=rng) < 0.7
    inputs = [t.requires_grad_() for t in (x, *parameters(2, 2, rng, offsets=0.5))]
    for options in ({}, dict(mask=mask, padding_stats=padding_stats, residual=True)):

        def function(*inputs):
            return feature_density_attention(*inputs, **options)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_nan_stays_in_its_slice(padding_stats):
    rng = generator(9)
    x = torch.randn(3, 7, 4, generator=rng)
    mean_offsets, c = parameters(2, 4, rng, dtype=torch.float32)
    mask = torch.ones(3, 7, 1, dtype=torch.bool)
    clean = evaluate(x, mean_offsets, c, torch.ones_like(x), mask=mask, padding_stats=padding_stats)
    x[1, 5, 2] = torch.nan
    got = evaluate(x, mean_offsets, c, torch.ones_like(x), mask=mask, padding_stats=padding_stats)
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[1, 3:, 2] = True
    for g, e in zip(got[:2], clean[:2]):
        assert g[touched].isnan().all() and torch.equal(g[~touched], e[~touched])
    for g, e in zip(got[2:], clean[2:]):
        assert g[1, 2].isnan() and g.isnan().sum() == 1 and torch.equal(g[0], e[0])


@pytest.mark.parametrize("width", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [0, 1e-30, 1e18])
def test_finite_input_gives_no_nan(scale, width):
    rng = generator(10)
    for offset in (0.0, 1e18, -1e18):
        x = scale * torch.randn(4, 300, 3, generator=rng)
        given = torch.full((1, 3), offset), torch.full((1, 3), width)
        assert all(t.isfinite().all() for t in evaluate(x, *given, torch.ones_like(x))), offset


@pytest.mark.parametrize("shape", [(0, 6, 4), (0, 6, 3, 4)])
def test_an_empty_batch(shape):
    x = torch.zeros(shape)
    y, dx, *gradients = evaluate(x, *parameters(2, 4, generator(), dtype=torch.float32), x)
    assert y.shape == dx.shape == shape
    assert all(g.shape == (2, 4) and not g.any() for g in gradients)


def test_gradients_are_bitwise_the_same_every_time():
    rng = generator(11)
    x, grad = (torch.randn(16, 24, 65, generator=rng) for _ in range(2))
    given = parameters(8, 65, rng, dtype=torch.float32)
    first = evaluate(x, *given, grad)
    for name, a, b in zip(NAMES, evaluate(x, *given, grad), first, strict=True):
        assert_same_bits(a, b, name)


def test_results_have_the_layout_of_x():
    given = parameters(2, 4, generator(), dtype=torch.float32)
    x = torch.randn(4, 6, 5).permute(2, 1, 0)
    wide = torch.randn(3, 6, 8)[..., ::2]
    steps = torch.randn(3, 6, 4, 2).transpose(2, 3)
    for t in (x, x.half(), wide, steps):
        for result in feature_density_attention(t, *given, return_weights=True):
            assert result.stride() == torch.empty_like(t).stride() and result.dtype == t.dtype
