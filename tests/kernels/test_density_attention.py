"""The kernels themselves, in Triton's interpreter or on a GPU: long slices, launches, copies, 64-bit offsets."""

import itertools

import daam_kernels
import pytest
import torch
from support import (
    DTYPES,
    assert_close,
    assert_contract,
    assert_same_bits,
    device_of,
    evaluate,
    gaussians,
    generator,
    truth,
)
from torch.utils._python_dispatch import TorchDispatchMode

if not daam_kernels.available_backends()["triton"]:
    pytest.skip("triton is not installed", allow_module_level=True)

from daam_kernels.kernels import density_backward, density_forward, host
from triton.backends.compiler import GPUTarget

DEVICE = device_of("triton")


class OnlyAllocations(TorchDispatchMode):
    """Fails on every operator that would launch a kernel or move data."""

    allowed = {"empty", "empty_like", "new_empty", "detach", "view", "alias", "split_with_sizes", "expand", "ones_like"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ in self.allowed, f"{function} inside the operator"
        return function(*args, **(kwargs or {}))


def inputs(shape, heads, dtype, *, gaussian_count=3, seed=0, mean=0.0):
    rng = generator(seed)
    x = (mean + torch.randn(shape, generator=rng, dtype=torch.float64)).to(DEVICE, dtype)
    grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)
    parameters = gaussians(heads, gaussian_count, rng, offsets=0.05, dtype=torch.float64, device=DEVICE)
    return x, grad, parameters


def check(x, grad, parameters, **options):
    got = evaluate("triton", x, *parameters, grad, **options)
    assert_contract(got, truth(x, *parameters, grad, **options), x.dtype, str(options))


SPLIT = ["split_statistics", "split_normaliser", "split_output"], ["split_sums", "split_gradient"]
LOOPED = ["forward_looped"], ["backward_looped"]


@pytest.fixture(params=["split", "looped"])
def way(request):
    """Tiles that hold no slice whole, and the kernels that they are for."""
    request.getfixturevalue({"split": "small_tiles", "looped": "looped_tiles"}[request.param])
    return {"split": SPLIT, "looped": LOOPED}[request.param]


LONG = {"rows": ((2, 331), 1), "columns": ((331, 36), 0), "thin columns": ((1, 331, 5), 1)}


@pytest.mark.parametrize("layout", LONG)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_slices(way, launched, dtype, layout):
    shape, axis = LONG[layout]
    x, grad, parameters = inputs(shape, 2, dtype, mean=3.0)
    check(x, grad, parameters, norm_axis=axis)
    assert launched == [*way[0], *way[1], "parameter_gradients"]


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
@pytest.mark.parametrize("normalize, eps", [("clamp", 1e-8), ("clamp", 50.0), ("softmax", 1e-8)])
def test_long_slices_with_padding(way, padding_stats, normalize, eps):
    x, grad, parameters = inputs((3, 250), 1, torch.float32, mean=2.0)
    mask = torch.rand((3, 250), generator=generator(5)).to(DEVICE) < 0.7
    mask[0, :130] = False  # a first run without a valid element
    mask[1] = False
    mask[2, 1:] = False
    x[0, 140:150] = 7.0
    options = dict(mask=mask, padding_value=7.0, padding_stats=padding_stats, normalize=normalize, eps=eps)
    check(x, grad, parameters, residual=True, **options)


@pytest.mark.parametrize("padding_stats", ["zero", "exclude"])
def test_long_slices_on_an_offset_with_a_constant_gradient(way, padding_stats):
    x, grad, parameters = inputs((2, 300), 1, torch.float32, mean=1e4)
    mask = None
    if padding_stats == "exclude":
        mask = torch.ones(2, 300, dtype=torch.bool, device=DEVICE)
        mask[:, :70] = False
    check(x, torch.ones_like(grad), parameters, mask=mask, padding_stats=padding_stats)


@pytest.mark.parametrize("padded", [False, True])
def test_short_columns_that_are_looped_over(looped_tiles, launched, padded):
    """Slices of 3 and 4, whose statistics are found again backward."""
    x, grad, parameters = inputs((2, 7, 70), 2, torch.bfloat16, mean=3.0)
    mask = torch.rand(x.shape, generator=generator(5)).to(DEVICE) < 0.7 if padded else None
    check(x, grad, parameters, norm_axis=1, mask=mask, padding_stats="exclude")
    assert launched == [*LOOPED[0], *LOOPED[1], "parameter_gradients"]


@pytest.mark.parametrize("padding_stats", [None, "zero", "exclude"])
@pytest.mark.parametrize("dtype, mean, constant", [
    (torch.float32, 3.0, False), (torch.float32, 1e4, True), (torch.bfloat16, 3.0, False), (torch.float16, 3.0, True),
])  # fmt: skip
def test_rows_that_are_looped_over_several_at_a_time(one_processor, launched, dtype, mean, constant, padding_stats):
    """Two heads of 264 elements; the last tile has slices too many, and at last the first slice has a NaN."""
    x, grad, parameters = inputs((17, 528), 2, dtype, mean=mean)
    if constant:
        grad = torch.ones_like(grad)
    options = {}
    if padding_stats:
        mask = torch.rand(x.shape, generator=generator(5)).to(DEVICE) < 0.7
        mask[1:3] = False
        options = dict(mask=mask, padding_value=0.0, padding_stats=padding_stats)
    check(x, grad, parameters, **options)
    assert launched == ["forward_resident", *LOOPED[1], "parameter_gradients"]
    clean = evaluate("triton", x, *parameters, grad, **options)[:2]
    x[0, 7] = torch.nan
    for got, kept in zip(evaluate("triton", x, *parameters, grad, **options)[:2], clean):
        assert_same_bits(got[1:], kept[1:])
        assert_same_bits(got[0, 264:], kept[0, 264:])


@pytest.mark.parametrize("mean, deviation, width", [(0.0, 1.0, None), (1e4, 0.1, None), (0.0, 1.0, 0.1)])
@pytest.mark.parametrize("shape, axis", [((2, 200), 1), ((150, 24), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_inference_over_long_slices(looped_tiles, launched, dtype, shape, axis, mean, deviation, width):
    """Densities over that at the center of the Gaussians, and where these are narrow, of some over the largest one."""
    rng = generator(4)
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(DEVICE, dtype)
    parameters = gaussians(2, 5, rng, offsets=0.05 * deviation, width=width, dtype=torch.float64, device=DEVICE)
    mask = torch.rand(shape, generator=rng).to(DEVICE) < 0.7
    mask.select(1 - axis, 1)[...] = False
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}[dtype]
    for options in ({}, dict(mask=mask), dict(mask=mask, padding_stats="exclude", residual=True)):
        options["norm_axis"] = axis
        y = daam_kernels.density_attention(x, *parameters, backend="triton", **options)
        assert_close(y, truth(x, *parameters, **options)[0], tolerance)
    assert launched == ["forward_looped"] * 3


def test_inference_over_a_slice_far_from_its_gaussians_leaves_its_neighbours_alone(looped_tiles):
    x, _, _ = inputs((200, 20), 1, torch.float32)
    parameters = torch.zeros(1, 2, device=DEVICE), torch.full((1, 2), 0.3, device=DEVICE)
    options = dict(norm_axis=0, return_weights=True)
    alone = daam_kernels.density_attention(x, *parameters, backend="triton", **options)
    x[:, 7] = 1 + 0.01 * x[:, 7].abs()
    x[::2, 7] *= -1  # none is near the mean
    got = daam_kernels.density_attention(x, *parameters, backend="triton", **options)
    exact = daam_kernels.reference.density_attention(x.double(), *parameters, **options)
    others = torch.arange(20, device=DEVICE) != 7
    for result, before, true in zip(got, alone, exact):
        assert_same_bits(result[:, others], before[:, others])
        assert_close(result[:, 7], true[:, 7], 2e-6)


def test_weights_of_long_slices_come_from_the_same_launch(way, launched):
    x, _, parameters = inputs((2, 300), 1, torch.float64)
    _, weights = daam_kernels.density_attention(x, *parameters, return_weights=True, backend="triton")
    exact = daam_kernels.reference.density_attention(x, *parameters, return_weights=True)[1]
    torch.testing.assert_close(weights, exact, rtol=1e-12, atol=1e-15)
    assert launched == way[0]


def test_gradient_of_long_slices_without_saved_statistics(way):
    x, grad, parameters = inputs((2, 300), 1, torch.float64)
    options = (1, None, "zero", "clamp", 1e-8, False, "product", True)
    *got, _ = torch.ops.daam_kernels.density_attention_backward(
        grad, x, *parameters, None, None, x.new_empty(0), *options, "triton"
    )
    assert_contract((x, *got), (x, *truth(x, *parameters, grad)[1:]), torch.float64)


def test_what_is_not_finite_shows_in_all_of_a_long_slice_and_nowhere_else(way):
    for (shape, axis), value in itertools.product([((2, 331), 1), ((331, 4), 0)], map(float, ("nan", "inf", "-inf"))):
        x, grad, parameters = inputs(shape, 1, torch.float32)
        x[1, 2], slice_of_it = value, 2 if axis == 0 else 1
        expected = torch.ones(shape, dtype=torch.bool)
        expected.select(1 - axis, slice_of_it).fill_(False)
        for result in evaluate("triton", x, *parameters, grad, norm_axis=axis)[:2]:
            assert torch.equal(result.isfinite().cpu(), expected), (shape, value)


@pytest.mark.parametrize("heads, gaussian_count", [(1, 1), (8, 1), (1, 64), (8, 64)])
@pytest.mark.parametrize("shape, axis", [((2, 64), 1), ((1, 64, 16), 1)])
def test_launches_of_resident_slices(launched, shape, axis, heads, gaussian_count):
    x, grad, parameters = inputs(shape, heads, torch.float32, gaussian_count=gaussian_count)
    evaluate("triton", x, *parameters, grad, norm_axis=axis)
    assert launched == ["forward_resident", "backward_resident", "parameter_gradients"]


STRIDED = {
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "every second": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "narrow of a cat": lambda t: torch.cat((t, t), 1).narrow(1, 3, t.shape[1]),
    "narrow in the features": lambda t: torch.cat((t, t), 2).narrow(2, 1, t.shape[2]),
    "expanded": lambda t: t[:1, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("x_layout, grad_layout", list(itertools.product(STRIDED, STRIDED)))
def test_strides_are_honoured_without_copies(monkeypatch, x_layout, grad_layout):
    x, grad, parameters = inputs((2, 12, 6), 2, torch.float32)
    x, grad = STRIDED[x_layout](x), STRIDED[grad_layout](grad)
    options = daam_kernels.options.DensityOptions(1, None, "zero", "clamp", 1e-8, False)
    y = torch.empty_like(x)
    for module in (density_forward, density_backward):  # the interpreter moves tensors, the host code must not
        monkeypatch.setattr(module, "run", lambda *args, **kwargs: None)
    with OnlyAllocations():
        density_forward.density_forward(x, *parameters, None, options, y, None, None)
    if host.slice_view(x.shape, 1, y.stride(), x.stride(), grad.stride()) is not None:
        with OnlyAllocations():
            density_backward.density_backward(grad, x, *parameters, None, None, options)
    else:
        assert {x_layout, grad_layout} & {"transposed", "expanded"} and x_layout != grad_layout


@pytest.mark.parametrize("tiles", [None, "small_tiles", "looped_tiles"])
def test_saved_statistics_where_the_gradient_splits_the_axes_otherwise(request, tiles):
    """x is [1, R, 12]; its gradient merges only as [3, R, 4]: both passes must mean the same slice by a number."""
    if tiles is not None:
        request.getfixturevalue(tiles)
    x, grad, parameters = inputs((1, 128, 3, 4), 2, torch.float64, mean=1.0)
    grad = torch.cat((grad, grad), -1).narrow(-1, 0, 4)
    out = torch.empty_like(x)
    views = (
        host.slice_view(x.shape, 1, out.stride(), x.stride()),
        host.slice_view(x.shape, 1, out.stride(), x.stride(), grad.stride()),
    )
    assert [(v.outer, v.inner) for v in views] == [(1, 12), (3, 4)]
    check(x, grad, parameters, norm_axis=1)


def test_bits_do_not_depend_on_the_run(way):
    x, grad, parameters = inputs((2, 300), 1, torch.float32)
    first, second = (evaluate("triton", x, *parameters, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are compiled here")
def test_the_interpreter_takes_no_assembly_for_the_gpu_beside_it(monkeypatch):
    monkeypatch.setattr("triton.language.target_info.current_target", lambda: GPUTarget("cuda", 90, 32))
    check(*inputs((2, 64), 1, torch.bfloat16))


def test_offsets_past_two_to_the_31(tmp_path):
    """Two slices more than 2^31 elements apart, in a sparse file: 32-bit offsets would read elsewhere."""
    step = 2**31 + 32
    file = tmp_path / "sparse"
    with open(file, "wb") as f:
        f.truncate(2 * (step + 64))
    far = torch.from_file(str(file), shared=True, size=step + 64, dtype=torch.float16)
    far = torch.as_strided(far, (2, 64), (step, 1))
    x, grad, parameters = inputs((2, 64), 1, torch.float16)
    far.copy_(x)
    options = daam_kernels.options.DensityOptions(1, None, "zero", "clamp", 1e-8, False)
    y, stats = torch.empty_like(x), x.new_empty((3, 2), dtype=torch.float32)
    if DEVICE == "cuda":
        pytest.skip("a file is not on the GPU; tests/gpu has tensors of that size")
    density_forward.density_forward(far, *parameters, None, options, y, None, stats)
    got = density_backward.density_backward(grad, far, *parameters, None, stats, options)
    assert_contract((y, *got), truth(x, *parameters, grad), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 2048), (1, 1 << 20)])
def test_launches_counted_by_the_profiler(shape):
    x, grad, parameters = inputs(shape, 1, torch.float32)
    parameters = [p.float() for p in parameters]
    evaluate("triton", x, *parameters, grad)
    limit = 3 if shape[1] > 16384 else 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        daam_kernels.density_attention(x, *parameters, backend="triton")
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) <= limit, [e.name for e in kernels]
