"""The density gate in the reference: against the public code's formulas and in extended precision; derivatives."""

import itertools
import math

import numpy as np
import pytest
import torch
from support import (
    DTYPES,
    HALF_TYPES,
    NEGLIGIBLE,
    TOLERANCES,
    assert_close,
    assert_same_bits,
    generator,
)
from torch import Tensor

from daam_kernels.reference import density_gate

EXACT = 1e-12
NAMES = ("y", "gate", "dx", "dweight", "dbias", "dmean_offsets", "dlog_sigma", "dalpha")
ROWS = {"N(0, 1)": (0, 1), "N(10, 1)": (10, 1), "N(1e3, 1)": (1e3, 1), "N(1e4, 0.1)": (1e4, 0.1)}  # mean, deviation


def parameters(channels: int, gaussians: int, rng, *, offsets=0.0, spread=1.0, alpha=0.05, dtype=torch.float64):
    """(weight, bias, mean_offsets, log_sigma, alpha): log_sigma ~ log 0.5 + ``spread`` N(0, 1)."""

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    weight, bias = normal(1, channels, 1) / math.sqrt(channels), normal(1)
    mean_offsets, log_sigma = offsets * normal(gaussians), math.log(0.5) + spread * normal(gaussians)
    return tuple(t.to(dtype) for t in (weight, bias, mean_offsets, log_sigma, torch.tensor(alpha).double()))


def evaluate(x, given, grad, grad_gate=None, **options):
    """(y, gate, dx, dweight, dbias, dmean_offsets, dlog_sigma, dalpha)."""
    inputs = [t.detach().requires_grad_() for t in (x, *given)]
    y, gate = density_gate(*inputs, **options)
    outputs, grads = ([y], [grad]) if grad_gate is None else ([y, gate], [grad, grad_gate])
    return (y.detach(), gate.detach(), *torch.autograd.grad(outputs, inputs, grads))


def truth(x, given, grad, grad_gate=None, *, mask: Tensor | None = None, padding_stats: str = "exclude"):
    """What ``evaluate`` gives, of the same rounded inputs, in numpy's long double: the formulas and the chain rule."""
    assert np.finfo(np.longdouble).eps < 2e-19, "this machine has no extended precision to hold float64 against"

    def exact(t):
        return t.detach().double().numpy().astype(np.longdouble)

    values, g, w, b, offsets, nu, alpha = map(exact, (x, grad, *given))
    batch, _, time = values.shape
    valid = np.ones((batch, 1, time), bool) if mask is None else mask.expand(batch, 1, time).numpy()
    counted = valid if padding_stats == "exclude" else np.ones_like(valid)
    n = np.maximum(counted.sum(2, keepdims=True), 1)
    a = (w * values).sum(1, keepdims=True) + b
    kept = np.where(valid, a, 0)
    mean = kept.sum(2, keepdims=True) / n
    mean = mean + np.where(counted, kept - mean, 0).sum(2, keepdims=True) / n  # what rounding at an offset left
    apart = np.where(counted, kept - mean, 0)
    apart = apart - np.where(counted, apart.sum(2, keepdims=True) / n, 0)
    var = (apart**2).sum(2, keepdims=True) / n
    std = np.sqrt(np.maximum(var, np.longdouble(1e-6)))
    gate, d_a, d_std = np.zeros_like(a), np.zeros_like(a), np.zeros_like(std)
    d_offsets, d_nu = np.zeros_like(offsets), np.zeros_like(nu)
    gain = alpha * np.where(valid, g * values, 0).sum(1, keepdims=True)
    if grad_gate is not None:
        gain = gain + np.where(counted, exact(grad_gate), 0)
    for k, offset in enumerate(offsets):
        s = np.log1p(np.exp(nu[k])) + np.longdouble(1e-3)
        scale = std * s + np.longdouble(1e-8)
        z = (a - mean - offset) / scale
        m = np.where(counted, np.exp(-(z**2) / 2) / (s * np.sqrt(2 * np.arccos(np.longdouble(-1)))), 0) / len(offsets)
        gate = gate + m
        d_z = -gain * m * z
        d_scale = -(d_z * z / scale).sum(2, keepdims=True)
        d_a = d_a + d_z / scale
        d_std = d_std + d_scale * s
        d_offsets[k] = -(d_z / scale).sum()
        d_nu[k] = ((d_scale * std).sum() - (gain * m).sum() / s) / (1 + np.exp(-nu[k]))
    d_var = np.where(var > 1e-6, d_std / (2 * std), 0)
    d_a = d_a + np.where(valid, 2 * d_var * apart - d_a.sum(2, keepdims=True), 0) / np.where(valid, n, 1)
    y = np.where(valid, values * (1 + alpha * gate), values)
    dx = np.where(valid, g * (1 + alpha * gate), g) + w * d_a
    d_weight, d_bias = (d_a * values).sum((0, 2)).reshape(w.shape), d_a.sum().reshape(1)
    d_alpha = np.asarray(np.where(valid, g * values * gate, 0).sum())
    results = (y, gate, dx, d_weight, d_bias, d_offsets, d_nu, d_alpha)
    return tuple(torch.from_numpy(np.asarray(t, np.float64)) for t in results)


def assert_contract(got, expected, dtype, bias_counts=False, what=""):
    y_tolerance, dx_tolerance, parameters_tolerance = TOLERANCES[dtype]
    for name, g, e in zip(NAMES, got, expected, strict=True):
        assert torch.isfinite(g).all(), f"{what} {name} is not finite"
        if name == "dbias" and not bias_counts:
            assert not g.any(), f"{what} the gate does not depend on the bias"
        elif name in ("y", "gate") or e.norm() > NEGLIGIBLE:
            tolerance = {"y": y_tolerance, "gate": y_tolerance, "dx": dx_tolerance}.get(name, parameters_tolerance)
            assert_close(g, e, tolerance, f"{what} {name}")


def public_code(x, weight, bias, mean_offsets, log_sigma, alpha):
    """(y, gate) as the public training code computes them."""
    a = torch.nn.functional.conv1d(x, weight, bias)
    mean, std = a.mean(2, keepdim=True), a.var(2, keepdim=True, unbiased=False).clamp_min(1e-6).sqrt()
    sigma = torch.nn.functional.softplus(log_sigma) + 1e-3
    logs = [
        -0.5 * ((a - (mean + offset)) / (std * s + 1e-8)) ** 2 - torch.log(s) - 0.5 * math.log(2 * math.pi)
        for offset, s in zip(mean_offsets, sigma)
    ]
    gate = torch.exp(torch.logsumexp(torch.stack(logs, -1), -1) - math.log(len(logs)))
    return x * (1 + alpha * gate), gate


@pytest.mark.parametrize("gaussians", [1, 4, 7])
@pytest.mark.parametrize("deviation", [1.0, 1e-4], ids=["free", "floored"])
def test_equals_the_public_codes_formulas(gaussians, deviation):
    rng = generator(gaussians)
    x = deviation * torch.randn(3, 6, 40, generator=rng, dtype=torch.float64)
    given = parameters(6, gaussians, rng, offsets=deviation)
    given[1].mul_(deviation)  # a bias that is large beside the deviation costs that code digits
    inputs = [t.clone().requires_grad_() for t in (x, *given)]
    y, gate = public_code(*inputs)
    grad, grad_gate = (torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in (y, gate))
    got = evaluate(x, given, grad, grad_gate)
    expected = (y, gate, *torch.autograd.grad([y, gate], inputs, [grad, grad_gate]))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        if name != "dbias":  # 0 but for rounding there
            assert_close(a, b, EXACT, name)
    assert expected[4].abs().max() < 1e-11 and not got[4].any()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype, row):
    mean, deviation = ROWS[row]
    rng = generator(1)
    shape = (4, 32, 96)
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
    noise = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for gaussians, offsets, constant in itertools.product((1, 4, 16), (0.0, 0.5), (False, True)):
        given = parameters(32, gaussians, rng, offsets=offsets * deviation, dtype=kind)
        grad = torch.ones_like(noise) if constant else noise
        got = evaluate(x, given, grad)
        assert [t.dtype for t in got] == 3 * [dtype] + 5 * [kind]
        what = f"K={gaussians}, offsets={offsets}, g={1 if constant else 'N(0, 1)'}:"
        expected = truth(x, given, grad)
        if dtype in HALF_TYPES and row == "N(1e4, 0.1)":  # constant in half types: only finiteness is asked
            for name, g, e in zip(NAMES, got, expected, strict=True):
                assert (g.isfinite() | (e.abs() > 0.99 * torch.finfo(g.dtype).max)).all(), f"{what} {name}"
        else:
            assert_contract(got, expected, dtype, what=what)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_holds_with_padding(dtype, padding_stats):
    rng = generator(2)
    x = (1 + torch.randn(5, 8, 40, generator=rng)).to(dtype)
    grad = torch.randn(x.shape, generator=rng).to(dtype)
    grad_gate = torch.randn(5, 1, 40, generator=rng).to(dtype)
    mask = (torch.arange(40) < torch.tensor([40, 23, 7, 1, 0])[:, None])[:, None]
    given = parameters(8, 4, rng, offsets=0.5)
    for gate_too in (None, grad_gate):
        options = dict(mask=mask, padding_stats=padding_stats)
        got, expected = evaluate(x, given, grad, gate_too, **options), truth(x, given, grad, gate_too, **options)
        assert_contract(got, expected, dtype, padding_stats == "zero")
        assert torch.equal(got[0][~mask.expand_as(x)], x[~mask.expand_as(x)])
        assert got[1][~mask].any() == (padding_stats == "zero")


def test_masked_sequences_get_what_they_get_alone():
    rng = generator(3)
    x = torch.randn(3, 5, 20, generator=rng, dtype=torch.float64)
    given = parameters(5, 4, rng, offsets=0.5)
    lengths = [20, 11, 1]
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None])[:, None]
    filled = x.masked_fill(~mask, torch.nan).requires_grad_()
    y, gate = density_gate(filled, *given, mask=mask)
    torch.where(mask, y, 0).square().sum().backward()
    for row, length in enumerate(lengths):
        alone = x[row : row + 1, :, :length].clone().requires_grad_()
        y_alone, gate_alone = density_gate(alone, *given)
        y_alone.square().sum().backward()
        assert_close(y[row, :, :length], y_alone[0], EXACT, f"y of {length}")
        assert_close(gate[row, :, :length], gate_alone[0], EXACT, f"gate of {length}")
        assert_close(filled.grad[row, :, :length], alone.grad[0], EXACT, f"dx of {length}")


def test_a_sequence_of_padding_gives_no_gradient_to_the_parameters():
    rng = generator(4)
    x = torch.randn(1, 3, 6, generator=rng)
    given = parameters(3, 2, rng, dtype=torch.float32)
    mask = torch.zeros(1, 1, 6, dtype=torch.bool)
    for padding_stats in ("zero", "exclude"):
        y, _, dx, *gradients = evaluate(x, given, torch.ones_like(x), mask=mask, padding_stats=padding_stats)
        assert torch.equal(y, x) and (dx == 1).all() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("options", [{}, {"padding_stats": "zero"}, {"padding_stats": "exclude"}], ids=str)
def test_derivatives(options):
    rng = generator(5)
    x = torch.randn(2, 2, 5, generator=rng, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([3, 4])[:, None])[:, None] if options else None
    inputs = [t.requires_grad_() for t in (x, *parameters(2, 2, rng, offsets=0.5))]

    def function(*inputs):
        return density_gate(*inputs, mask=mask, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_nan_stays_in_its_sequence():
    rng = generator(6)
    x = torch.randn(3, 4, 9, generator=rng)
    given = parameters(4, 4, rng, dtype=torch.float32)
    clean = evaluate(x, given, torch.ones_like(x))
    x[1, 2, 3] = torch.nan
    got = evaluate(x, given, torch.ones_like(x))
    for g, e in zip(got[:3], clean[:3]):
        assert g[1].isnan().all() and torch.equal(g[::2], e[::2])


@pytest.mark.parametrize("log_sigma", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("scale", [0, 1e-30, 1e18])
def test_finite_input_gives_no_nan(scale, log_sigma):
    rng = generator(7)
    x = scale * torch.randn(3, 16, 300, generator=rng)
    weight, bias, *_, alpha = parameters(16, 2, rng, dtype=torch.float32)
    for offset in (0.0, 1e18, -1e18):
        given = weight, bias, torch.full((2,), offset), torch.full((2,), log_sigma), alpha
        assert all(t.isfinite().all() for t in evaluate(x, given, torch.ones_like(x))), offset


def test_an_empty_batch():
    given = parameters(4, 3, generator(), dtype=torch.float32)
    x = torch.zeros(0, 4, 9)
    y, gate, dx, *gradients = evaluate(x, given, x)
    assert y.shape == dx.shape == (0, 4, 9) and gate.shape == (0, 1, 9)
    assert all(g.shape == p.shape and not g.any() for g, p in zip(gradients, given, strict=True))


def test_gradients_are_bitwise_the_same_every_time():
    rng = generator(8)
    x, grad = (torch.randn(8, 32, 301, generator=rng) for _ in range(2))
    given = parameters(32, 4, rng, dtype=torch.float32)
    first = evaluate(x, given, grad)
    for name, a, b in zip(NAMES, evaluate(x, given, grad), first, strict=True):
        assert_same_bits(a, b, name)


def test_autocast_leaves_the_arithmetic_alone():
    rng = generator(9)
    x = torch.randn(2, 8, 30, generator=rng)
    given = parameters(8, 4, rng, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = density_gate(x, *given)
    for a, b in zip(got, density_gate(x, *given), strict=True):
        assert_same_bits(a, b)


def test_results_have_the_layout_of_x():
    given = parameters(4, 2, generator(), dtype=torch.float32)
    x = torch.randn(3, 9, 4).transpose(1, 2)
    for t in (x, x.half(), torch.randn(3, 4, 18)[..., ::2]):
        assert density_gate(t, *given)[0].stride() == torch.empty_like(t).stride()
