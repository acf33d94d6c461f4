"""The mixture of the native library on the CPU: against extended precision, every way through memory, far and narrow.

What every backend has to do is in the tests of the operator.
"""

import math

import pytest
import torch
from children import python
from daam_kernels import native
from daam_kernels.options import DensityOptions
from hypothesis import given, settings
from mixture import NAMES, assert_contract, assert_contract_of_any, evaluate, mixture, truth
from native.problems import INSTRUCTION_SETS, SPLITS, draw_tensors, needs_library, odd_shapes, problems
from support import (
    DTYPES,
    assert_close,
    assert_margins_intact,
    assert_same_bits,
    generator,
    nan_padded,
)

pytestmark = needs_library

# Rows and columns, whole and in runs: each is another way through memory.
WAYS = {
    "short rows": ((9, 26), -1),
    "rows": ((5, 307), -1),
    "rows in runs": ((2, 40_001), -1),
    "short columns": ((3, 7, 75), 1),
    "columns": ((2, 70, 133), 1),
    "columns in runs": ((9001, 5), 0),
}


def inputs(shape, dtype, *, heads=1, gaussians=3, mean=0.0, seed=0, **options):
    """(x, mean_offsets, c, weights, grad)"""
    rng = generator(seed)
    x, grad = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    parameters = mixture(heads, gaussians, rng, dtype=torch.promote_types(dtype, torch.float32), **options)
    return (mean + x).to(dtype), *parameters, grad.to(dtype)


# Against extended precision


@given(problems())
@settings(max_examples=100)
def test_any_problem(problem):
    x, grad, options, rng = draw_tensors(problem)
    # Wide ones: for narrow ones the truth of a handful of slices is ill-conditioned in float32.
    parameters = mixture(
        problem["num_heads"], problem["num_gaussians"], rng, offsets=0.05, width=2.0, dtype=torch.float64
    )
    got = evaluate("native", x, *parameters, grad, **options)
    assert_contract_of_any(got, x, *parameters, grad=grad, **options)
    assert got[0].stride() == got[1].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("padding", ["none", "zero", "exclude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_through_memory(way, dtype, padding):
    shape, axis = WAYS[way]
    x, *parameters, grad = inputs(shape, dtype, heads=2, mean=3.0, offsets=0.05, width=2.0)
    options = dict(norm_axis=axis)
    if padding != "none":
        mask = torch.rand(shape, generator=generator(1)) < 0.7
        mask.select(0 if axis else 1, 0).fill_(False)  # slices of padding alone
        options.update(mask=mask, padding_stats=padding, residual=True)
    got = evaluate("native", x, *parameters, grad, **options)
    assert_contract_of_any(got, x, *parameters, grad=grad, **options)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_keeps_the_contract(name):
    code = """
    from daam_kernels import native
    from mixture import assert_contract_of_any, evaluate
    from native.test_mixture import WAYS, inputs
    from support import DTYPES

    for shape, axis in WAYS.values():
        for dtype in DTYPES:
            x, *parameters, grad = inputs(shape, dtype, heads=2, mean=10.0, offsets=0.05, width=2.0)
            got = evaluate("native", x, *parameters, grad, norm_axis=axis)
            assert_contract_of_any(got, x, *parameters, grad=grad, norm_axis=axis)
    print(native.instruction_set())
    """
    assert python(code, DAAM_KERNELS_INSTRUCTION_SET=name) == name


@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
@pytest.mark.parametrize("way", WAYS)
def test_slices_far_from_all_gaussians(way, normalize):
    """Their densities are 2^-1000 and less, and relative to the largest of them as exact as any."""
    shape, axis = WAYS[way]
    x, offsets, c, weights, grad = inputs(shape, torch.float64, heads=2)
    options = dict(norm_axis=axis, normalize=normalize)
    parameters = offsets + 80, torch.full_like(c, 2.0), weights
    expected = truth(x, *parameters, grad, **options)
    for name, got, exact in zip(NAMES[:2], evaluate("native", x, *parameters, grad, **options), expected):
        assert_close(got, exact, 1e-11, name)  # the parameters' gradients cancel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [100.0, -1e4])
@pytest.mark.parametrize("way", WAYS)
def test_padding_far_from_the_rest_costs_no_digits(way, value, dtype):
    """The first half, that is, where the backward looks for an element near the mean."""
    shape, axis = WAYS[way]
    x, *parameters, grad = inputs(shape, dtype, width=2.0)
    mask = torch.ones(shape, dtype=torch.bool)
    mask.narrow(axis, 0, shape[axis] // 2).fill_(False)
    x[~mask] = value
    for options in (dict(mask=mask), dict(padding_value=value)):
        got = evaluate("native", x, *parameters, grad, norm_axis=axis, **options)
        assert_contract_of_any(got, x, *parameters, grad=grad, norm_axis=axis, **options)


@pytest.mark.parametrize("way", WAYS)
def test_some_slices_are_far_and_their_neighbours_are_not(way):
    """Of a group of slices that lie in the lanes of a vector, one in three is."""
    shape, axis = WAYS[way]
    x, offsets, _, weights, grad = inputs(shape, torch.float32)
    slices = x.movedim(axis, -1)
    far = (torch.arange(slices[..., 0].numel()) % 3 == 0).view(slices.shape[:-1])
    slices[far] = (slices[far] > 1).float()  # of two values, neither of which is within many widths
    c = torch.full_like(offsets, 0.1)
    options = dict(norm_axis=axis, normalize="softmax")
    parameters = torch.full_like(offsets, 0.4), c, weights
    expected = truth(x, *parameters, grad, **options)
    got = evaluate("native", x, *parameters, grad, **options)
    assert_contract(got[:2] + expected[2:], expected, torch.float32)
    assert all(g.isfinite().all() for g in got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
@pytest.mark.parametrize("width", [1e-6, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e18])
def test_any_width_and_size_stays_finite(scale, width, normalize, dtype):
    if scale > torch.finfo(dtype).max:
        pytest.skip("beyond the type")
    for shape, axis in WAYS.values():
        x, offsets, c, weights, grad = inputs(shape, torch.float64, heads=2, gaussians=4)
        x.narrow(axis, 0, shape[axis] // 4).fill_(-1)  # where a number near the mean is looked for
        x, c = (scale * x.clamp(-1, 1)).to(dtype), (width * torch.tensor([1.0, 1.0, 2.0, 1.0 / width])).expand_as(c)
        offsets = offsets + torch.tensor([0.0, 100.0, -scale, 0.0])
        for got in evaluate("native", x, offsets, c, weights, grad.to(dtype), norm_axis=axis, normalize=normalize)[:2]:
            assert got.isfinite().all() or dtype == torch.float16 and not got.isnan().any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_gaussians_without_a_share(way, all_of_them):
    shape, axis = WAYS[way]
    x, offsets, c, weights, grad = inputs(shape, torch.float32, heads=2, gaussians=4, width=2.0)
    shares = torch.tensor([0.3, 0.0, 0.2, 0.0]) * (not all_of_them)
    options = dict(norm_axis=axis, weights_softmax=False)
    got = evaluate("native", x, offsets, c, shares.expand_as(c), grad, **options)
    if all_of_them:  # weights of 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in got[:2])
        return
    there = shares > 0
    few = offsets[:, there], c[:, there], shares[there].expand(2, 2)
    expected = evaluate("native", x, *few, grad, **options)
    for g, e in zip(got[:2], expected[:2]):
        assert_close(g, e, 1e-6)
    for g, e in zip(got[2:4], expected[2:4]):
        assert_close(g[:, there], e, 1e-5)
        assert not g[:, ~there].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_value_that_is_not_finite_stays_in_its_slice(way, value):
    shape, axis = WAYS[way]
    x, *parameters, grad = inputs(shape, torch.float32, heads=2, width=2.0)
    expected = evaluate("native", x, *parameters, grad, norm_axis=axis)
    touched = torch.zeros(shape, dtype=torch.bool)
    touched.narrow(axis, 0, shape[axis] // 2).select(0 if axis else 1, 1).fill_(True)
    broken = x.clone()
    broken[touched.nonzero()[2].unbind()] = value
    got = evaluate("native", broken, *parameters, grad, norm_axis=axis)
    for g, e in zip(got[:2], expected[:2]):
        assert_close(
            g[~touched], e[~touched], 1e-6
        )  # others of its group may be found again, relative to their nearest
        assert g[touched].isnan().any()
    for g, e in zip(got[2:], expected[2:]):
        assert g[0].isnan().all()
        assert_same_bits(g[1], e[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_any_nan_among_the_parameters_stays_one(bits, dtype):
    """Rounded to bfloat16 by arithmetic on its bits, a NaN of ones alone would become 0."""
    nan = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    x = torch.randn(3, 40, generator=generator()).to(dtype)
    for number in range(3):
        parameters = [torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1)]
        parameters[number] = nan
        for result in evaluate("native", x, *parameters, torch.ones_like(x)):
            assert result.isnan().all()


# Memory and threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_bits_on_any_number_of_threads(split, masked, dtype, threads):
    shape, axis, heads = SPLITS[split]
    x, *parameters, grad = inputs(shape, dtype, heads=heads, gaussians=2, mean=1.0, width=2.0)
    options = dict(norm_axis=axis)
    if masked:
        options.update(mask=torch.rand(shape, generator=generator(1)) < 0.7, padding_stats="exclude")
    results = []
    for count in (1, 3):
        threads(count)
        results.append(evaluate("native", x, *parameters, grad, **options))
    for what, got, expected in zip(NAMES, *results, strict=True):
        assert_same_bits(got, expected, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_odd_sizes_and_unaligned_pointers(axis, dtype):
    """Every tensor, results too, lies at an odd place between NaN that must neither be read nor written."""
    for seed, (shape, margin) in enumerate(odd_shapes(axis)):
        tensors = inputs(shape, dtype, heads=2 if shape[axis] > 4 else 1, seed=seed, width=2.0)
        *_, logits, _ = tensors
        x, mean_offsets, c, _, grad = (nan_padded(t, margin)[0] for t in tensors)
        log_shares = nan_padded(logits.double().log_softmax(1), margin)[0]
        outputs = [nan_padded(t, margin) for t in (x, x, x, mean_offsets, c, log_shares)]
        y, weights, dx, d_offsets, d_c, d_shares = (view for view, _ in outputs)
        options = DensityOptions(axis, None, "zero", "clamp", 1e-8, False, "mixture")
        native.density_forward(x, mean_offsets, c, None, options, y, weights, log_shares)
        known, library = native.problem(mean_offsets, c, None, options, dx, x, grad), native._library()
        inward = [t.data_ptr() for t in (grad, x, mean_offsets, c, log_shares)]
        outward = [t.data_ptr() for t in (dx, d_offsets, d_c, d_shares)]
        assert library.mixture_backward(known.address, *inward, None, *outward, library.parallel_for) == 0
        d_weights = d_shares - log_shares.exp() * d_shares.sum(1, keepdim=True)
        assert_contract((y, dx, d_offsets, d_c, d_weights), truth(*tensors, norm_axis=axis), dtype, f"{shape}")
        assert_close(x.double() * weights.double(), y, 1e-2)
        for _, buffer in outputs:
            assert_margins_intact(buffer, margin)
