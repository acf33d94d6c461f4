"""The reference against the public package, against the operator page in 50 digits, and against its own derivatives."""

import itertools

import mpmath
import pytest
import torch
from gaussian_adaptive_attention import MultiHeadGaussianAdaptiveAttention
from support import NEGLIGIBLE, assert_close, gaussians, generator

from daam_kernels.reference import density_attention, density_attention_backward

EXACT = 1e-12


def gradients(x, mean_offsets, c, grad, **options):
    """(y, dx, dmean_offsets, dc) by autograd through the reference's forward."""
    inputs = [t.detach().requires_grad_() for t in (x, mean_offsets, c)]
    y = density_attention(*inputs, **options)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


def assert_all_close(got, expected):
    for name, g, e in zip(("y", "dx", "dmean_offsets", "dc"), got, expected, strict=True):
        assert torch.isfinite(g).all(), f"{name} is not finite"
        if name == "y" or e.norm() > NEGLIGIBLE:
            assert_close(g, e, EXACT, name)


# The public package, on data where its own form is exact


def upstream(x, mean_offsets, c, grad, norm_axis, padding_value):
    num_heads, num_gaussians = c.shape
    module = MultiHeadGaussianAdaptiveAttention(norm_axis, num_heads, num_gaussians, padding_value).double()
    for head, head_offsets, head_c in zip(module.attention_heads, mean_offsets, c, strict=True):
        head.load_state_dict({"mean_offsets": head_offsets, "c": head_c})
    x = x.detach().requires_grad_()
    y, weights = module(x, return_attention_details=True)
    y.backward(grad)
    heads = module.attention_heads
    stacked = [torch.stack([getattr(head, name).grad for head in heads]) for name in ("mean_offsets", "c")]
    return y.detach(), weights, x.grad, *stacked


def assert_equals_upstream(shape, norm_axis, num_heads, num_gaussians, padding_value, seed=0):
    rng = generator(seed)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    if padding_value is not None:
        x[torch.rand(shape, generator=rng) < 0.3] = padding_value
    grad = torch.randn(shape, generator=rng, dtype=torch.float64)
    mean_offsets, c = gaussians(num_heads, num_gaussians, rng, offsets=1.0, dtype=torch.float64)
    options = dict(norm_axis=norm_axis, padding_value=padding_value)
    y, weights, *expected = upstream(x, mean_offsets, c, grad, **options)
    assert_all_close(gradients(x, mean_offsets, c, grad, **options), (y, *expected))
    closed_form = density_attention_backward(grad, x, mean_offsets, c, **options)
    assert_all_close((y, *closed_form), (y, *expected))
    details = density_attention(x, mean_offsets, c, return_weights=True, **options)
    assert_close(details[0], y, EXACT, "y beside weights")
    assert_close(details[1], weights, EXACT, "weights")
    assert not details[1].requires_grad


SHAPES = {2: (9, 11), 3: (5, 9, 8), 4: (3, 7, 8, 9), 5: (8, 6, 9, 7, 10)}


@pytest.mark.parametrize("padding_value", [None, 0, 7])
@pytest.mark.parametrize("dims, norm_axis", [(d, axis) for d in SHAPES for axis in range(-d, d)])
def test_equals_the_public_package_on_every_axis(dims, norm_axis, padding_value):
    # 3 heads: every axis but three has a remainder. The heads are seldom all padding, and then all agree anyway.
    shape = SHAPES[dims][-dims:]
    assert_equals_upstream(shape, norm_axis, min(3, shape[norm_axis] // 2), 4, padding_value)


@pytest.mark.parametrize("num_gaussians", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("remainder", [0, 1, "most"])
@pytest.mark.parametrize("num_heads", range(1, 9))
def test_equals_the_public_package_for_any_heads_and_gaussians(num_heads, remainder, num_gaussians):
    remainder = num_heads - 1 if remainder == "most" else remainder % num_heads
    padding_value = (None, 0, 7)[(num_heads + num_gaussians) % 3]
    shape = (6, 9 * num_heads + remainder, 5)
    assert_equals_upstream(shape, 1, num_heads, num_gaussians, padding_value, seed=num_heads)


# The operator page's table, literally and in 50 digits: no quadratic, no logarithm, no shift


def literal_slice(x, valid, offsets, widths, padding_stats, normalize, eps):
    """(y, w) of one slice of mpmath numbers, as the page's tables say it."""
    n = len(x)
    if padding_stats == "exclude":
        n = sum(valid)
        if n < 2:
            return list(x), [mpmath.mpf(0)] * len(x)
    mean = mpmath.fsum(x_j for x_j, valid_j in zip(x, valid) if valid_j) / n
    if padding_stats == "exclude":
        squares = [(x_j - mean) ** 2 for x_j, valid_j in zip(x, valid) if valid_j]
    else:
        squares = [((x_j if valid_j else 0) - mean) ** 2 for x_j, valid_j in zip(x, valid)]
    var = mpmath.fsum(squares) / (n - 1) + eps
    densities = []
    for x_j, valid_j in zip(x, valid):
        density = mpmath.mpf(0 if padding_stats == "exclude" and not valid_j else 1)
        for offset, width in zip(offsets, widths):
            density *= mpmath.exp(-((x_j - mean - offset) ** 2) / (2 * var * width**2))
            density /= mpmath.sqrt(2 * mpmath.pi * width**2)
        densities.append(density)
    total = mpmath.fsum(densities)
    total = max(total, eps) if normalize == "clamp" else total
    weights = [density / total for density in densities]
    return [x_j * w_j if valid_j else x_j for x_j, w_j, valid_j in zip(x, weights, valid)], weights


def literal(x, valid, mean_offsets, c, padding_stats, normalize, eps, residual):
    """(y, w) of one row x of mpmath numbers, cut into the heads of mean_offsets and c (lists of rows)."""
    chunk = len(x) // len(c)
    y, w = [], []
    for head, (offsets, widths) in enumerate(zip(mean_offsets, c)):
        cut = slice(head * chunk, (head + 1) * chunk if head < len(c) - 1 else len(x))
        slice_y, slice_w = literal_slice(x[cut], valid[cut], offsets, widths, padding_stats, normalize, eps)
        y += [a + b for a, b in zip(slice_y, x[cut])] if residual else slice_y
        w += slice_w
    return y, w


def literal_gradients(x, valid, mean_offsets, c, grad, *options):
    """(dx, dmean_offsets, dc) by central differences, in 100 digits: exact to 1e-40."""
    step = mpmath.mpf(10) ** -40

    def derivative(numbers, j):
        original, losses = numbers[j], []
        for h in (step, -step):
            numbers[j] = original * (1 + h) if original else h
            y, _ = literal(x, valid, mean_offsets, c, *options)
            losses.append(mpmath.fsum(g_j * y_j for g_j, y_j in zip(grad, y)))
        numbers[j] = original
        return (losses[0] - losses[1]) / (2 * step * (original or 1))

    def all_of(numbers):
        return [derivative(numbers, j) for j in range(len(numbers))]

    return all_of(x), [all_of(row) for row in mean_offsets], [all_of(row) for row in c]


def rounded(numbers):
    rows = [[float(v) for v in row] for row in numbers] if isinstance(numbers[0], list) else [float(v) for v in numbers]
    return torch.tensor(rows, dtype=torch.float64)


LITERAL_DATA = {  # mean, deviation of x, scale of the offsets, width of the Gaussians (None: exp(N(0, 1)))
    "N(0, 1)": (0, 1, 1, None),
    "N(1e3, 1)": (1e3, 1, 0.05, None),
    "N(1e4, 0.1)": (1e4, 0.1, 0.005, None),
    "N(1e4, 0.1), c = 2": (1e4, 0.1, 0.005, 2.0),
    "c = 0.1": (0, 1, 0.05, 0.1),
    "N(10, 1), c = 1e-2": (10, 1, 0, 1e-2),
    "N(1e3, 1), c = 1e-3": (1e3, 1, 0.05, 1e-3),
    "c = 1e-6": (0, 1, 0, 1e-6),
    "c = 1e6": (0, 1, 1, 1e6),
    "tiny x": (0, 1e-6, 1e-7, 2.0),
    "far offsets": (0, 1, 1e3, 2.0),
}


@pytest.mark.parametrize("padding", ["none", "zero", "exclude"])
@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
@pytest.mark.parametrize("data", LITERAL_DATA)
def test_equals_the_operator_page_in_high_precision(data, normalize, padding):
    location, deviation, offset_scale, width = LITERAL_DATA[data]
    for seed, residual in ((0, False), (1, True)):
        rng = generator(seed)
        x = location + deviation * torch.randn(13, generator=rng, dtype=torch.float64)
        grad = torch.randn(13, generator=rng, dtype=torch.float64)
        mean_offsets, c = gaussians(2, 3, rng, offsets=offset_scale, width=width, dtype=torch.float64)
        valid = torch.ones(13, dtype=torch.bool)
        if padding != "none":
            valid = torch.rand(13, generator=rng) < 0.7
        stats = "exclude" if padding == "exclude" else "zero"
        mask = None if padding == "none" else valid
        options = dict(mask=mask, padding_stats=stats, normalize=normalize, residual=residual)
        got = gradients(x, mean_offsets, c, grad, **options)
        closed_form = density_attention_backward(grad, x, mean_offsets, c, **options)
        _, weights = density_attention(x, mean_offsets, c, return_weights=True, **options)
        with mpmath.workdps(100):
            exact = [[mpmath.mpf(v) for v in t.tolist()] for t in (x, grad)]
            exact_offsets, exact_c = ([[mpmath.mpf(v) for v in row] for row in t.tolist()] for t in (mean_offsets, c))
            arguments = (stats, normalize, mpmath.mpf(1e-8), residual)
            y, w = literal(exact[0], valid.tolist(), exact_offsets, exact_c, *arguments)
            rest = literal_gradients(exact[0], valid.tolist(), exact_offsets, exact_c, exact[1], *arguments)
        expected = [rounded(t) for t in (y, *rest)]
        assert_close(weights, rounded(w), EXACT, "weights")
        assert_all_close(got, expected)
        assert_all_close((got[0], *closed_form), expected)


# Padding


@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
@pytest.mark.parametrize("residual", [False, True])
def test_exclude_equals_slices_with_the_padding_removed(normalize, residual):
    rng = generator()
    x = 5 + torch.randn(4, 13, 3, generator=rng, dtype=torch.float64)
    grad = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    mean_offsets, c = gaussians(1, 3, rng, offsets=1.0, dtype=torch.float64)
    mask = torch.rand(x.shape, generator=rng) < 0.6
    mask[:, :2] = True
    options = dict(normalize=normalize, residual=residual)
    expected = [x * (1 + residual), grad * (1 + residual), torch.zeros_like(c), torch.zeros_like(c)]
    for i, k in itertools.product(range(4), range(3)):
        keep = mask[i, :, k]
        y, dx, *parameters = gradients(x[i, keep, k], mean_offsets, c, grad[i, keep, k], **options)
        expected[0][i, keep, k], expected[1][i, keep, k] = y, dx
        for total, part in zip(expected[2:], parameters):
            total += part
    options.update(norm_axis=1, mask=mask, padding_stats="exclude")
    assert_all_close(gradients(x, mean_offsets, c, grad, **options), expected)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_padding_value_and_mask_mean_the_same(padding_stats):
    rng = generator()
    x = torch.randn(3, 10, 4, generator=rng, dtype=torch.float64)
    grad = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    mean_offsets, c = gaussians(2, 3, rng, offsets=1.0, dtype=torch.float64)
    first, second = (torch.rand(x.shape, generator=rng) < 0.7 for _ in range(2))
    x[~first] = 7.0
    options = dict(norm_axis=1, padding_stats=padding_stats)
    by_value = gradients(x, mean_offsets, c, grad, padding_value=7, **options)
    assert_all_close(by_value, gradients(x, mean_offsets, c, grad, mask=first, **options))
    both = gradients(x, mean_offsets, c, grad, padding_value=7, mask=second, **options)
    assert_all_close(both, gradients(x, mean_offsets, c, grad, mask=first & second, **options))
    assert not torch.equal(both[0], by_value[0])


# Derivatives

REGIMES = [  # normalize, eps; the large eps makes the clamp active in every slice
    ("clamp", 1e-8),
    ("clamp", 3.0),
    ("softmax", 1e-8),
]


def derivative_inputs(padding):
    rng = generator(3)
    x = 2 + torch.randn(2, 7, 2, generator=rng, dtype=torch.float64)
    mean_offsets, c = gaussians(2, 2, rng, offsets=1.0, dtype=torch.float64)
    c = c.clamp(min=0.5)  # a numeric derivative needs densities that are not all at one element
    mask = None
    if padding is not None:
        mask = torch.ones(x.shape, dtype=torch.bool)
        mask[0, 1:3, 0] = mask[0, 4:6, 0] = mask[1, 3:, 1] = mask[1, 0, :] = False
        mask[0, :3, 1] = torch.tensor([False, True, False])  # one valid element: skipped under "exclude"
    options = dict(norm_axis=1, mask=mask, padding_stats=padding or "zero")
    return [t.requires_grad_() for t in (x, mean_offsets, c)], options


@pytest.mark.parametrize("padding", [None, "zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", REGIMES)
def test_derivatives_of_first_and_second_order(normalize, eps, padding):
    inputs, options = derivative_inputs(padding)
    options.update(normalize=normalize, eps=eps, residual=padding == "zero")

    def function(*tensors):
        return density_attention(*tensors, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    grad = torch.randn(inputs[0].shape, generator=generator(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: density_attention_backward(*tensors, **options), (grad, *inputs))


def test_the_regimes_above_are_what_they_say():
    for normalize, eps in REGIMES:
        inputs, options = derivative_inputs(None)
        weights = density_attention(*inputs, normalize=normalize, eps=eps, return_weights=True, **options)[1]
        totals = torch.cat([weights[:, :3].sum(1), weights[:, 3:].sum(1)])
        if (normalize, eps) == ("clamp", 3.0):
            assert (totals < 0.99).all()
        else:
            torch.testing.assert_close(totals, torch.ones_like(totals))


@pytest.mark.parametrize("padding", ["none", "value", "mask", "both"])
@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", REGIMES)
@pytest.mark.parametrize("residual", [False, True])
def test_closed_form_backward_equals_autograd(residual, normalize, eps, padding_stats, padding):
    rng = generator(5)
    x = 1 + torch.randn(3, 20, 4, generator=rng, dtype=torch.float64)
    grad = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    mean_offsets, c = gaussians(3, 4, rng, offsets=1.0, dtype=torch.float64)
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
    expected = gradients(x, mean_offsets, c, grad, **options)
    closed_form = density_attention_backward(grad, x, mean_offsets, c, **options)
    assert_all_close((expected[0], *closed_form), expected)


def test_closed_form_backward_keeps_what_autograd_loses():
    """q - D cancels for a constant gradient on data with an offset; the page's form must not."""
    rng = generator(6)
    x = (1e4 + 0.1 * torch.randn(4, 64, generator=rng, dtype=torch.float64)).float()
    mean_offsets, c = gaussians(1, 5, rng, width=2.0)
    grad = torch.ones_like(x)
    expected = gradients(x.double(), mean_offsets.double(), c.double(), grad.double())[1:]
    dx, _, dc = density_attention_backward(grad, x, mean_offsets, c)
    assert_close(dx, expected[0], 5e-6, "dx")
    assert_close(dc, expected[2], 1e-4, "dc")


def test_one_dimension_and_parameters_of_another_type():
    rng = generator(7)
    x = torch.randn(33, generator=rng, dtype=torch.float64)
    mean_offsets, c = gaussians(4, 2, rng, offsets=1.0, dtype=torch.float64)
    row = density_attention(x, mean_offsets, c)
    assert_close(density_attention(x.view(1, 33, 1), mean_offsets, c, norm_axis=1).flatten(), row, EXACT)
    narrow = [mean_offsets.bfloat16(), c.half()]
    expected = gradients(x, *(t.double() for t in narrow), torch.ones_like(x))
    got = gradients(x, *narrow, torch.ones_like(x))
    assert [t.dtype for t in got] == [torch.float64, torch.float64, torch.bfloat16, torch.float16]
    assert_close(got[0], expected[0], EXACT)
    assert_close(got[2], expected[2], 2**-8)
    assert_close(got[3], expected[3], 2**-11)
