"""The mixture in the reference: against its formulas written out, plainly and in extended precision; derivatives."""

import itertools

import pytest
import torch
from mixture import NAMES, assert_contract, mixture, truth
from support import (
    DTYPES,
    HALF_TYPES,
    NEGLIGIBLE,
    TOLERANCES,
    assert_close,
    assert_finite_but_for_overflow,
    gaussians,
    generator,
)

from daam_kernels.reference import density_attention, density_attention_backward

EXACT = 1e-12


def assert_all_close(got, expected):
    for name, g, e in zip(NAMES, got, expected, strict=True):
        assert torch.isfinite(g).all(), f"{name} is not finite"
        if name == "y" or e.norm() > NEGLIGIBLE:
            assert_close(g, e, EXACT, name)


def by_autograd(x, mean_offsets, c, weights, grad, **options):
    """(y, dx, dmean_offsets, dc, dweights) by autograd through the reference's forward."""
    inputs = [t.detach().requires_grad_() for t in (x, mean_offsets, c, weights)]
    y = density_attention(*inputs[:3], density="mixture", log_shares=inputs[3].log_softmax(1), **options)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


def in_closed_form(x, mean_offsets, c, weights, grad, **options):
    """The same by the closed form; the softmax's own gradient is autograd's."""
    weights = weights.detach().requires_grad_()
    log_shares = weights.log_softmax(1)
    options.update(density="mixture", log_shares=log_shares.detach())
    y = density_attention(x, mean_offsets, c, **options)
    dx, d_offsets, d_c, d_shares = density_attention_backward(grad, x, mean_offsets, c, **options)
    assert d_shares.dtype == log_shares.dtype
    (d_weights,) = torch.autograd.grad(log_shares, weights, d_shares)
    return y, dx, d_offsets, d_c, d_weights


def first_generation(x, mean_offsets, c, shares, norm_axis, padding_value, eps=1e-8):
    """(y, w) as the first generation's public code computes them, which ends at the last whole chunk."""
    num_heads, num_gaussians = c.shape
    chunk = x.shape[norm_axis] // num_heads
    outputs, details = [], []
    for head in range(num_heads):
        part = x.narrow(norm_axis, head * chunk, chunk)
        valid = torch.ones_like(part, dtype=torch.bool) if padding_value is None else part != padding_value
        kept = torch.where(valid, part, 0)
        mean = kept.mean(norm_axis, keepdim=True)
        deviation = (kept.var(norm_axis, keepdim=True) + eps).sqrt()
        density = torch.zeros_like(part)
        for k in range(num_gaussians):
            z = (part - mean - mean_offsets[head, k]) / deviation
            density = density + shares[head, k] * torch.exp(-(z**2) / (2 * c[head, k] ** 2))
        w = density / density.sum(norm_axis, keepdim=True).clamp(min=eps)
        outputs.append(torch.where(valid, part * w, part))
        details.append(w)
    return torch.cat(outputs, norm_axis), torch.cat(details, norm_axis)


@pytest.mark.parametrize("eps", [1e-8, 3.0], ids=["free", "clamped"])
@pytest.mark.parametrize("padding_value", [None, 0, 7])
@pytest.mark.parametrize("shape, norm_axis", [((9, 12), 1), ((5, 9, 8), -2), ((3, 6, 8, 9), 1), ((12,), 0)])
def test_equals_the_first_generations_formulas(shape, norm_axis, padding_value, eps):
    for num_heads, num_gaussians in ((1, 1), (3, 4), (3, 16)):
        rng = generator(num_gaussians)
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        if padding_value is not None:
            x[torch.rand(shape, generator=rng) < 0.3] = padding_value
        grad = torch.randn(shape, generator=rng, dtype=torch.float64)
        parameters = mixture(num_heads, num_gaussians, rng, offsets=1.0, dtype=torch.float64)
        options = dict(norm_axis=norm_axis, padding_value=padding_value, eps=eps)
        inputs = [t.clone().requires_grad_() for t in (x, *parameters)]
        y, w = first_generation(*inputs[:3], inputs[3].softmax(1), **options)
        expected = (y.detach(), *torch.autograd.grad(y, inputs, grad))
        assert_all_close(by_autograd(x, *parameters, grad, **options), expected)
        assert_all_close(in_closed_form(x, *parameters, grad, **options), expected)
        arguments = dict(density="mixture", log_shares=parameters[2].log_softmax(1), return_weights=True, **options)
        details = density_attention(x, *parameters[:2], **arguments)
        assert_close(details[0], y, EXACT, "y beside weights")
        assert_close(details[1], w, EXACT, "weights")
        assert not details[1].requires_grad


def test_the_last_head_takes_the_remainder():
    rng = generator()
    x = torch.randn(3, 14, 2, generator=rng, dtype=torch.float64)
    mean_offsets, c, weights = mixture(3, 4, rng, offsets=1.0, dtype=torch.float64)
    log_shares = weights.log_softmax(1)
    y = density_attention(x, mean_offsets, c, norm_axis=1, density="mixture", log_shares=log_shares)
    for head, part in enumerate(x.split([4, 4, 6], 1)):
        row = slice(head, head + 1)
        one = density_attention(
            part, mean_offsets[row], c[row], norm_axis=1, density="mixture", log_shares=log_shares[row]
        )
        assert_close(y[:, 4 * head : 4 * head + part.shape[1]], one, EXACT, f"head {head}")


LITERAL_DATA = {  # mean, deviation of x, scale of the offsets, width of the Gaussians (None: exp(N(0, 1)))
    "N(0, 1)": (0, 1, 1, None),
    "N(1e3, 1)": (1e3, 1, 0.05, None),
    "N(1e4, 0.1)": (1e4, 0.1, 0.005, None),
    "N(1e4, 0.1), c = 2": (1e4, 0.1, 0.005, 2.0),
    "c = 0.1": (0, 1, 1, 0.1),
    "N(10, 1), c = 1e-2": (10, 1, 0, 1e-2),
    "c = 1e-6": (0, 1, 0, 1e-6),
    "c = 1e6": (0, 1, 1, 1e6),
    "tiny x": (0, 1e-6, 1e-7, 2.0),
}


@pytest.mark.parametrize("padding", ["none", "zero", "exclude"])
@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
@pytest.mark.parametrize("data", LITERAL_DATA)
def test_equals_the_operator_page_in_extended_precision(data, normalize, padding):
    location, deviation, offset_scale, width = LITERAL_DATA[data]
    # Padding that counts as zeros puts the deviation at 5e3, and elements 0.1 apart differ by 1e-5 in the Gaussians'
    # shares of them: as many digits the sums of these differences lose to rounding.
    tolerance = 1e-10 if location == 1e4 and padding == "zero" else EXACT
    for seed, residual in ((0, False), (1, True)):
        rng = generator(seed)
        x = location + deviation * torch.randn(2, 13, generator=rng, dtype=torch.float64)
        grad = torch.randn(2, 13, generator=rng, dtype=torch.float64)
        parameters = mixture(2, 3, rng, offsets=offset_scale, width=width, dtype=torch.float64)
        mask = None if padding == "none" else torch.rand(2, 13, generator=rng) < 0.7
        stats = "exclude" if padding == "exclude" else "zero"
        options = dict(mask=mask, padding_stats=stats, normalize=normalize, residual=residual)
        expected = truth(x, *parameters, grad, **options)
        *got, d_weights = in_closed_form(x, *parameters, grad, **options)
        *rest, exact_d_weights = expected
        for name, g, e in zip(NAMES, got, rest, strict=False):
            assert_close(g, e, EXACT if name in ("y", "dx") else tolerance, name)
        # Flat densities give every Gaussian the same share of every element, and then this is 0 but for rounding.
        assert (d_weights - exact_d_weights).norm() <= EXACT * (grad * expected[0]).abs().sum(), "dweights"


ROWS = {"N(0, 1)": (0, 1), "N(10, 1)": (10, 1), "N(1e3, 1)": (1e3, 1), "N(1e4, 0.1)": (1e4, 0.1)}  # mean, deviation


@pytest.mark.parametrize("num_gaussians", [1, 5, 16])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(dtype, row, num_gaussians):
    mean, deviation = ROWS[row]
    rng, shape = generator(num_gaussians), (2, 128, 32)
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
    noise = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    parameters_type = torch.float64 if dtype == torch.float64 else torch.float32
    for offsets, width, constant in itertools.product((0.0, 0.05), (None, 2.0), (False, True)):
        what = f"offsets={offsets}, c={width or 'exp(N(0, 1))'}, g={1 if constant else 'N(0, 1)'}:"
        parameters = mixture(4, num_gaussians, rng, offsets=offsets * deviation, width=width, dtype=parameters_type)
        grad = torch.ones_like(noise) if constant else noise
        got = in_closed_form(x, *parameters, grad, norm_axis=1)
        assert [t.dtype for t in got] == [dtype, dtype, *[parameters_type] * 3]
        expected = truth(x, *parameters, grad, norm_axis=1)
        if dtype in HALF_TYPES and row == "N(1e4, 0.1)":  # constant in half types: only finiteness is asked
            assert_finite_but_for_overflow(got[:4], expected[:4], what)
            assert got[4].isfinite().all()
        else:
            assert_contract(got, expected, dtype, what)


def test_constant_slices_with_the_clamp_active_keep_their_digits():
    """What x gets through its own place and through the mean cancels there, both 1e6 times as large as what is left."""
    x = torch.full((4, 32), 1000.0)
    mean_offsets, c, weights = torch.tensor([[1.4e-3]]), torch.tensor([[2.0]]), torch.zeros(1, 1)
    y, dx, *_ = in_closed_form(x, mean_offsets, c, weights, torch.ones_like(x))
    total = y.sum(1) / x[:, 0]
    assert (0.01 < total).all() and (total < 0.9).all(), "clamped, and not 0"
    assert_close(dx, y / x, TOLERANCES[torch.float32][1], "dx is the weights")


def test_of_one_gaussian_is_what_the_product_of_one_is_but_for_a_factor_that_cancels():
    """Far offsets and narrow Gaussians included: one form of the arithmetic for both."""
    rng = generator(3)
    x = torch.randn(4, 60, generator=rng, dtype=torch.float64)
    grad = torch.randn(4, 60, generator=rng, dtype=torch.float64)
    for scale, width in ((0.05, 2.0), (1e3, 2.0), (1.0, 1e-3), (0.0, 1e6)):
        mean_offsets, c = gaussians(2, 1, rng, offsets=scale, width=width, dtype=torch.float64)
        options = dict(normalize="softmax")
        product = density_attention(x, mean_offsets, c, **options)
        expected = density_attention_backward(grad, x, mean_offsets, c, **options)
        options.update(density="mixture", log_shares=torch.zeros_like(c))
        *got, d_shares = density_attention_backward(grad, x, mean_offsets, c, **options)
        assert_close(density_attention(x, mean_offsets, c, **options), product, EXACT, "y")
        for name, g, e in zip(NAMES[1:], got, expected, strict=False):
            assert_close(g, e, EXACT, name)
        assert (d_shares.abs() < 1e-14).all(), "a share of 1 has no gradient where the weights sum to 1"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_narrow_gaussians_apart_from_each_other_keep_their_digits(dtype):
    """Elements near one Gaussian must not pay for being far from the slice's densest element."""
    rng = generator(4)
    x = torch.randn(8, 64, generator=rng, dtype=torch.float64).to(dtype)
    grad = torch.randn(8, 64, generator=rng, dtype=torch.float64).to(dtype)
    mean_offsets = torch.tensor([[-1.5, 0.0, 1.5]], dtype=dtype)
    c, weights = torch.full_like(mean_offsets, 0.05), torch.tensor([[0.0, 6.0, 1.0]], dtype=dtype)
    expected = truth(x, mean_offsets, c, weights, grad)
    assert_contract(in_closed_form(x, mean_offsets, c, weights, grad), expected, dtype)


# Gaussians that are not there


@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
def test_a_log_share_of_minus_infinity_is_a_gaussian_that_is_not_there(normalize):
    rng = generator(5)
    x = torch.randn(3, 12, generator=rng, dtype=torch.float64)
    grad = torch.randn(3, 12, generator=rng, dtype=torch.float64)
    mean_offsets, c, weights = mixture(2, 4, rng, offsets=1.0, dtype=torch.float64)
    log_shares = weights.log_softmax(1)
    log_shares[:, 2] = -torch.inf
    there = [0, 1, 3]

    def run(mean_offsets, c, log_shares):
        inputs = [t.detach().clone().requires_grad_() for t in (x, mean_offsets, c, log_shares)]
        options = dict(density="mixture", normalize=normalize)
        y = density_attention(*inputs[:3], log_shares=inputs[3], **options)
        through = torch.autograd.grad(y, inputs, grad)
        *inputs, log_shares = (t.detach() for t in inputs)
        return y.detach(), through, density_attention_backward(grad, *inputs, log_shares=log_shares, **options)

    y, *gradients = run(mean_offsets, c, log_shares)
    expected_y, *expected = run(mean_offsets[:, there], c[:, there], log_shares[:, there])
    assert_close(y, expected_y, EXACT, "y")
    for got, without in zip(gradients, expected, strict=True):
        assert_close(got[0], without[0], EXACT, "dx")
        for g, e in zip(got[1:], without[1:], strict=True):
            assert_close(g[:, there], e, EXACT)
            assert not g[:, 2].any()


@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
def test_a_head_without_any_gaussian_is_finite(normalize):
    rng = generator(6)
    x = torch.randn(3, 12, generator=rng).requires_grad_()
    mean_offsets, c, _ = mixture(2, 3, rng, offsets=1.0)
    log_shares = torch.zeros(2, 3)
    log_shares[1] = -torch.inf
    inputs = [x, *(t.requires_grad_() for t in (mean_offsets, c, log_shares))]
    y = density_attention(*inputs[:3], density="mixture", log_shares=log_shares, normalize=normalize)
    if normalize == "clamp":
        assert not y[:, 6:].any(), "0 / max(0, eps)"
    through = torch.autograd.grad(y.sum(), inputs)
    closed = density_attention_backward(
        torch.ones_like(x), *inputs[:3], density="mixture", log_shares=log_shares, normalize=normalize
    )
    assert all(t.isfinite().all() for t in (y, *through, *closed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_input_gives_no_nan(dtype):
    for magnitude, width in itertools.product((1e-18, 1.0, 1e18), (1e-6, 1.0, 1e6)):
        rng = generator(7)
        x = (magnitude * torch.randn(3, 24, generator=rng, dtype=torch.float64)).to(dtype)
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        parameters = mixture(2, 3, rng, offsets=1.0, width=width)
        for mask in (None, torch.rand(3, 24, generator=rng) < 0.5):
            for result in in_closed_form(x, *parameters, torch.ones_like(x), mask=mask):
                assert not result.isnan().any()


# Derivatives

REGIMES = [("clamp", 1e-8), ("clamp", 3.0), ("softmax", 1e-8)]  # the large eps makes the clamp active in every slice


@pytest.mark.parametrize("padding", [None, "zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", REGIMES)
def test_derivatives_of_first_and_second_order(normalize, eps, padding):
    rng = generator(3)
    x = 2 + torch.randn(2, 6, 2, generator=rng, dtype=torch.float64)
    mean_offsets, c, weights = mixture(2, 2, rng, offsets=1.0, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, mean_offsets, c.clamp(min=0.5), weights)]
    mask = None
    if padding is not None:
        mask = torch.ones(x.shape, dtype=torch.bool)
        mask[0, 1:3, 0] = mask[1, 3:, 1] = mask[1, 0, :] = False
        mask[0, :3, 1] = torch.tensor([False, True, False])  # one valid element: skipped under "exclude"
    options = dict(norm_axis=1, mask=mask, padding_stats=padding or "zero", normalize=normalize, eps=eps)
    options.update(density="mixture", residual=padding == "zero")

    def function(x, mean_offsets, c, weights):
        return density_attention(x, mean_offsets, c, log_shares=weights.log_softmax(1), **options)

    def backward(grad, x, mean_offsets, c, weights):
        return density_attention_backward(grad, x, mean_offsets, c, log_shares=weights.log_softmax(1), **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    grad = torch.randn(x.shape, generator=generator(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backward, (grad, *inputs), fast_mode=True)


@pytest.mark.parametrize("padding", ["none", "value", "mask", "both"])
@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", REGIMES)
def test_closed_form_backward_equals_autograd(normalize, eps, padding_stats, padding):
    rng = generator(5)
    x = 1 + torch.randn(3, 20, 4, generator=rng, dtype=torch.float64)
    grad = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    parameters = mixture(3, 4, rng, offsets=1.0, dtype=torch.float64)
    for residual in (False, True):
        options = dict(norm_axis=-2, padding_stats=padding_stats, normalize=normalize, eps=eps, residual=residual)
        if padding in ("value", "both"):
            x[torch.rand(x.shape, generator=rng) < 0.3] = -2.0
            x[0, :6] = -2.0  # slices of padding alone
            options["padding_value"] = -2.0
        if padding in ("mask", "both"):
            mask = torch.rand(3, 20, 1, generator=rng) < 0.7
            mask[1, 6:12] = False
            mask[2, :6, 0] = torch.tensor([False, False, True, False, False, False])  # one valid element
            options["mask"] = mask
        expected = by_autograd(x, *parameters, grad, **options)
        assert_all_close(in_closed_form(x, *parameters, grad, **options), expected)


def test_the_gradients_of_the_shares_sum_to_zero_where_the_weights_sum_to_one():
    rng = generator(8)
    x = torch.randn(4, 30, generator=rng, dtype=torch.float64)
    mean_offsets, c, weights = mixture(2, 5, rng, offsets=1.0, dtype=torch.float64)
    d_shares = density_attention_backward(
        torch.randn(4, 30, generator=rng, dtype=torch.float64), x, mean_offsets, c,
        density="mixture", log_shares=weights.log_softmax(1),
    )[3]  # fmt: skip
    assert (d_shares.abs() > 1e-6).all()
    assert (d_shares.sum(1).abs() < 1e-13).all()
