"""The mixture's kernels in Triton's interpreter or on a GPU: long slices, launches, determinism, poisoned results."""

from dataclasses import replace

import daam_kernels
import pytest
import torch
from daam_kernels.options import DensityOptions
from mixture import assert_contract, evaluate, generator, mixture, truth
from support import DTYPES, assert_close, assert_same_bits, device_of

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

from daam_kernels.kernels import density_backward, density_forward, tiling  # noqa: E402

DEVICE = device_of("triton")
FORWARD = ["split_statistics", "split_normaliser", "split_output"]
BACKWARD = ["mixture_split_sums", "mixture_split_gradient"]
LOOPED = ["mixture_backward_looped"]
LONG = {"rows": ((2, 331), 1), "columns": ((270, 8), 0), "thin columns": ((1, 331, 5), 1)}


@pytest.fixture(params=["split", "looped"])
def backward(request):
    """The kernels of a backward pass over slices that no tile holds, in tiles so small that short slices are such."""
    request.getfixturevalue({"split": "small_tiles", "looped": "looped_tiles"}[request.param])
    return {"split": BACKWARD, "looped": LOOPED}[request.param]


def inputs(shape, heads, dtype, *, gaussian_count=3, seed=0, mean=0.0, deviation=1.0):
    rng = generator(seed)
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(DEVICE, dtype)
    grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)
    parameters = mixture(heads, gaussian_count, rng, offsets=0.05 * deviation, dtype=torch.float64, device=DEVICE)
    return x, grad, parameters


def check(x, grad, parameters, **options):
    got = evaluate("triton", x, *parameters, grad, **options)
    assert_contract(got, truth(x, *parameters, grad, **options), x.dtype, str(options))


@pytest.mark.parametrize(
    "layout, dtype",
    [("rows", dtype) for dtype in DTYPES] + [("columns", torch.bfloat16), ("thin columns", torch.float32)],
    ids=str,
)
def test_long_slices(backward, launched, layout, dtype):
    shape, axis = LONG[layout]
    x, grad, parameters = inputs(shape, 2, dtype, mean=3.0)
    check(x, grad, parameters, norm_axis=axis)
    assert launched == FORWARD + backward + ["mixture_parameter_gradients"]


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", [("clamp", 1e-8), ("clamp", 500.0), ("softmax", 1e-8)])
def test_long_slices_with_padding(backward, padding_stats, normalize, eps):
    x, grad, parameters = inputs((2, 100, 3), 2, torch.float32, gaussian_count=2, mean=0.5)
    mask = torch.rand(2, 100, 3, generator=generator(7)).to(DEVICE) < 0.7
    mask[0, :50, 0] = False  # a slice of padding alone
    mask[1, :50, 1] = torch.arange(50, device=DEVICE) == 40  # and one with a single valid element
    x[:, 75:, 2] = 0.0
    options = dict(padding_stats=padding_stats, normalize=normalize, eps=eps, padding_value=0.0)
    check(x, grad, parameters, norm_axis=1, mask=mask, **options)


def test_the_backward_finds_what_no_forward_pass_saved(small_tiles, launched):
    x, grad, (mean_offsets, c, weights) = inputs((2, 331), 2, torch.float32, mean=3.0)
    shares = weights.log_softmax(1)
    expected = evaluate("triton", x, mean_offsets, c, shares.exp(), grad, norm_axis=1, weights_softmax=False)[1:]
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False, "mixture")
    launched.clear()
    got = density_backward.density_backward(grad, x, mean_offsets, c, None, None, options, shares.float())
    assert launched == FORWARD + BACKWARD + ["mixture_parameter_gradients"]
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("dtype, gaussian_count", [(torch.float32, 3), (torch.bfloat16, 5)], ids=str)
def test_short_columns_that_are_looped_over(looped_tiles, launched, dtype, gaussian_count, padding_stats):
    """Slices of 5 and 6, whose statistics are found again backward."""
    x, grad, parameters = inputs((2, 11, 70), 2, dtype, gaussian_count=gaussian_count, mean=3.0)
    mask = torch.rand(x.shape, generator=generator(5)).to(DEVICE) < 0.7
    mask[1, :6, 1] = False  # a slice of padding alone
    check(x, grad, parameters, norm_axis=1, mask=mask, padding_stats=padding_stats)
    assert launched == FORWARD + LOOPED + ["mixture_parameter_gradients"]


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_short_columns_whose_densities_underflow(looped_tiles, launched, padding_stats):
    """Nothing is saved of them, so that they are far shows when they have been summed."""
    x, grad, (mean_offsets, c, weights) = inputs((2, 11, 70), 2, torch.float64)
    mean_offsets[0] += 80
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :5, 0] = False
    parameters = mean_offsets, torch.full_like(c, 2.0), weights
    options = dict(norm_axis=1, normalize="softmax", mask=mask, padding_stats=padding_stats)
    got = evaluate("triton", x, *parameters, grad, **options)
    expected = truth(x, *parameters, grad, **options)
    for name, result, exact in zip(("y", "dx"), got, expected):  # the parameters' gradients cancel there
        assert_close(result, exact, 1e-11, name)
    assert launched == FORWARD + LOOPED + ["mixture_parameter_gradients"]


@pytest.mark.parametrize(
    "dtype, gaussian_count", [(torch.float32, 1), (torch.float32, 6), (torch.bfloat16, 4)], ids=str
)
@pytest.mark.parametrize("layout", LONG)
def test_any_number_of_gaussians_is_looped_over(looped_tiles, launched, layout, dtype, gaussian_count):
    """Up to four have their sums in registers over all tiles; of more, every tile writes its own."""
    shape, axis = LONG[layout]
    x, grad, parameters = inputs(shape, 2, dtype, gaussian_count=gaussian_count, mean=3.0)
    check(x, grad, parameters, norm_axis=axis)
    assert launched == FORWARD + LOOPED + ["mixture_parameter_gradients"]


@pytest.mark.parametrize("shape, axis", [((3, 331), 1), ((331, 64), 0), ((32, 64), 0)], ids=str)
def test_constant_slices_with_the_clamp_active_keep_their_digits(looped_tiles, launched, shape, axis):
    """Shifting a constant slice leaves its weights, so dx is they: all else, a million times as large, cancels."""
    x = torch.full(shape, 1000.0, device=DEVICE)
    parameters = (torch.full((1, 1), value, device=DEVICE) for value in (1.4e-3, 2.0, 0.0))
    y, dx, *_ = evaluate("triton", x, *parameters, torch.ones_like(x), norm_axis=axis)
    total = (y / x).sum(axis)
    assert (0.01 < total).all() and (total < 0.9).all(), "clamped, and not 0"
    assert_close(dx, y / x, 5e-6)
    assert launched[-2:] == LOOPED + ["mixture_parameter_gradients"]


def test_nan_stays_in_its_slice_and_head(backward):
    x, grad, parameters = inputs((2, 331, 5), 2, torch.float32)
    x[0, 2, 1] = torch.nan
    y, dx, *gradients = evaluate("triton", x, *parameters, grad, norm_axis=1)
    for t in (y, dx):
        assert t[0, :165, 1].isnan().all() and t.isnan().sum() == 165
    assert all(g[0].isnan().all() and g[1].isfinite().all() for g in gradients)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_long_slices_on_an_offset_with_a_constant_gradient(backward, padding_stats):
    x, _, parameters = inputs((2, 331), 2, torch.float32, mean=1e4, deviation=0.1)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, -5:] = padding_stats == "zero"
    check(x, torch.ones_like(x), parameters, norm_axis=1, mask=mask, padding_stats=padding_stats)


@pytest.mark.parametrize("shape, axis", [((3, 64), 1), ((2, 24, 33), 1)], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 3.0], ids=["free", "clamped"])
def test_resident_slices_take_one_launch_forward_and_two_backward(launched, shape, axis, eps):
    x, grad, parameters = inputs(shape, 2, torch.float32, gaussian_count=5)
    check(x, grad, parameters, norm_axis=axis, eps=eps, residual=True)
    assert launched == ["forward_resident", "mixture_backward_resident", "mixture_parameter_gradients"]


@pytest.mark.parametrize("mean, deviation", [(0, 1), (1e3, 1), (1e4, 0.1)])
@pytest.mark.parametrize(
    "dtype, gaussian_count",
    [(torch.float64, 8), (torch.float32, 8), (torch.bfloat16, 4), (torch.float16, 4)],
    ids=str,
)
def test_whole_tiles_with_the_gaussians_known_to_the_compiler(monkeypatch, dtype, gaussian_count, mean, deviation):
    """The kernel has neither masks nor a loop, and polynomials in the place of some exponentials. The last of the
    contract's rows would be constant in half types."""
    launches = []

    def run(kernel, launch, *args, original=density_forward.run):
        launches.append(launch.values)
        original(kernel, launch, *args)

    monkeypatch.setattr(density_forward, "run", run)
    deviation = 1e3 if dtype.itemsize == 2 and mean == 1e4 else deviation
    x, grad, parameters = inputs((1, 512), 2, dtype, gaussian_count=gaussian_count, mean=mean, deviation=deviation)
    for g in (grad, torch.ones_like(grad)):
        check(x, g, parameters, norm_axis=1)
    assert [(values["WHOLE"], values["UNROLLED"]) for values in launches] == [(True, gaussian_count)] * 2


@pytest.mark.parametrize("tiles", ["resident", "small_tiles", "looped_tiles"])
def test_bits_do_not_depend_on_the_run(request, tiles):
    if tiles != "resident":
        request.getfixturevalue(tiles)
    shape = (6, 40) if tiles == "resident" else (2, 331)
    x, grad, parameters = inputs(shape, 2, torch.float32)
    first, second = (evaluate("triton", x, *parameters, grad, norm_axis=1) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("tiles", ["resident", "small_tiles", "looped_tiles"])
def test_slices_far_from_all_gaussians(request, tiles):
    """Densities of e^-30 and less, which one head has, lose their digits unless they are over the slice's largest."""
    if tiles != "resident":
        request.getfixturevalue(tiles)
    shape = (3, 40) if tiles == "resident" else (2, 331)
    x, grad, (mean_offsets, c, weights) = inputs(shape, 2, torch.float64)
    mean_offsets[0] += 16
    parameters, options = (mean_offsets, torch.full_like(c, 2.0), weights), dict(norm_axis=1, normalize="softmax")
    got = evaluate("triton", x, *parameters, grad, **options)
    expected = truth(x, *parameters, grad, **options)
    for name, result, exact in zip(("y", "dx"), got, expected):  # the parameters' gradients cancel there
        assert_close(result, exact, 1e-12, name)


@pytest.mark.parametrize("forward", ["resident", "split"])
@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_long_slices_whose_densities_underflow(backward, launched, monkeypatch, padding_stats, forward):
    """One head's are e^-800 and less, the other's are not; and a whole run of one slice is padding."""
    if forward == "resident":
        monkeypatch.setattr(tiling, "BUDGET", replace(tiling.BUDGET, forward_rows=1024))
    x, grad, (mean_offsets, c, weights) = inputs((2, 300), 2, torch.float64)
    mean_offsets[0] += 80
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :40] = False
    parameters = mean_offsets, torch.full_like(c, 2.0), weights
    options = dict(norm_axis=1, normalize="softmax", mask=mask, padding_stats=padding_stats)
    got = evaluate("triton", x, *parameters, grad, **options)
    expected = truth(x, *parameters, grad, **options)
    for name, result, exact in zip(("y", "dx"), got, expected):  # the parameters' gradients cancel there
        assert_close(result, exact, 1e-11, name)
    assert launched == (["forward_resident"] if forward == "resident" else FORWARD) + backward + [
        "mixture_parameter_gradients"
    ]


def test_narrow_gaussians_far_from_the_data_stay_finite():
    x, grad, (mean_offsets, c, weights) = inputs((4, 40), 2, torch.float32)
    for width, offset in ((1e-6, 0.0), (1e-6, 1e3), (1e6, 1e3), (1e-3, 50.0)):
        parameters = mean_offsets + offset, torch.full_like(c, width), weights
        for result in evaluate("triton", x, *parameters, grad, norm_axis=1):
            assert torch.isfinite(result).all(), (width, offset)


@pytest.fixture
def fused(monkeypatch):
    """tl.fma rounds a float32 once, as a GPU's does; the interpreter's rounds the product too."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    separate = interpreter.InterpreterBuilder.create_fma

    def create_fma(builder, x, y, z):
        if x.data.dtype != "float32":
            return separate(builder, x, y, z)
        once = (x.data.astype("float64") * y.data + z.data).astype("float32")
        return interpreter.TensorHandle(once, z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


@pytest.mark.parametrize("tiles", ["resident", "small_tiles", "looped_tiles"])
@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
def test_narrow_gaussians_stay_finite_whatever_is_fused(fused, request, normalize, tiles):
    """Terms of 1e9 and more differ by hundreds where one of them is rounded twice."""
    if tiles != "resident":
        request.getfixturevalue(tiles)
    x, grad, (mean_offsets, c, weights) = inputs((40, 160), 1, torch.float32)
    parameters = mean_offsets + 3.0, torch.full_like(c, 1e-6), weights
    y, *gradients = evaluate("triton", x, *parameters, grad, norm_axis=1, normalize=normalize)
    assert all(torch.isfinite(g).all() for g in (y, *gradients))
    if normalize == "softmax":  # all weight is one element's
        assert torch.equal((y / x).sum(1).round(), torch.ones(40)) and ((y / x).max(1).values > 0.5).all()
    else:
        assert not y.any()


def test_a_gaussian_without_a_share_changes_nothing():
    x, grad, (mean_offsets, c, weights) = inputs((4, 40), 2, torch.float32)
    shares = weights.softmax(1)
    shares[:, 1] = 0
    kept = [t[:, ::2].contiguous() for t in (mean_offsets, c, shares)]
    y, dx, *rest = evaluate("triton", x, mean_offsets, c, shares, grad, norm_axis=1, weights_softmax=False)
    y_kept, dx_kept, *rest_kept = evaluate("triton", x, *kept, grad, norm_axis=1, weights_softmax=False)
    torch.testing.assert_close(y, y_kept, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dx, dx_kept, rtol=1e-5, atol=1e-6)
    for got, expected in zip(rest[:2], rest_kept[:2]):
        torch.testing.assert_close(got[:, ::2], expected, rtol=1e-5, atol=1e-6)
        assert not got[:, 1].any()
