"""On real hardware: the contract, derivatives, layouts, huge tensors, streams, graphs, and the same bits every time."""

import daam_kernels
import pytest
import torch
from daam_kernels import density_attention
from support import (
    DTYPES,
    HALF_TYPES,
    NEGLIGIBLE,
    TOLERANCES,
    assert_close,
    assert_contract,
    assert_finite_but_for_overflow,
    assert_margins_intact,
    assert_same_bits,
    channels_last,
    evaluate,
    every_second,
    gaussians,
    generator,
    nan_padded,
    narrowed,
    transposed,
    truth,
)

pytestmark = pytest.mark.gpu

CUDA = "cuda"
ROWS = {"N(0, 1)": (0, 1), "N(10, 1)": (10, 1), "N(1e3, 1)": (1e3, 1), "N(1e4, 0.1)": (1e4, 0.1)}


def problem(shape, num_heads, num_gaussians, dtype=torch.float32, seed=0, mean=0.0, deviation=1.0, **parameters):
    rng = generator(seed)
    x = (mean + deviation * torch.randn(shape, generator=rng, dtype=torch.float64)).to(CUDA, dtype)
    grad = torch.randn(shape, generator=rng, dtype=torch.float64).to(CUDA, dtype)
    parameters.setdefault("dtype", torch.promote_types(dtype, torch.float32))
    return x, *gaussians(num_heads, num_gaussians, rng, device=CUDA, **parameters), grad


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Those that have kernels of their own on a GPU."""
    status = daam_kernels.available_backends()[request.param]
    if not status:
        pytest.skip(status.reason)
    return request.param


def test_auto_chooses_triton():
    from daam_kernels import backends

    x = torch.empty(0, device=CUDA)
    assert daam_kernels.available_backends()["triton"]
    assert backends.resolve("auto", x) == "triton"
    assert backends.resolve("auto", x.cpu()) in ("native", "reference")


@pytest.mark.parametrize("num_gaussians", [1, 5, 8, 16])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_axis", [1, -1])
def test_contract_at_the_size_of_the_page(norm_axis, dtype, row, num_gaussians):
    mean, deviation = ROWS[row]
    for offsets in (0.0, 0.05 * deviation):
        for width in (None, 2.0):
            x, mean_offsets, c, grad = problem(
                (8, 128, 64), 4, num_gaussians, dtype, mean=mean, deviation=deviation, offsets=offsets, width=width
            )
            for g in (grad, torch.ones_like(grad)):
                got = evaluate("triton", x, mean_offsets, c, g, norm_axis=norm_axis)
                expected = truth(x, mean_offsets, c, g, norm_axis=norm_axis)
                if dtype in HALF_TYPES and row == "N(1e4, 0.1)":
                    assert_finite_but_for_overflow(got, expected)
                else:
                    assert_contract(got, expected, dtype, f"offsets={offsets}, c={width}")


def check_what_is_looped_over(shape, axis, row, dtype, heads):
    mean, deviation = ROWS[row]
    x, mean_offsets, c, grad = problem(shape, heads, 5, dtype, mean=mean, deviation=deviation, offsets=0.05 * deviation)
    mask = torch.rand(x.shape, generator=generator(9)).to(CUDA) < 0.8
    for options in ({}, dict(mask=mask, padding_stats="exclude", residual=True), dict(mask=mask)):
        options["norm_axis"] = axis
        got = evaluate("triton", x, mean_offsets, c, grad, **options)
        expected = truth(x, mean_offsets, c, grad, **options)
        if dtype in HALF_TYPES and row == "N(1e4, 0.1)":
            assert_finite_but_for_overflow(got, expected)
        else:
            assert_contract(got, expected, dtype, f"{options}")


@pytest.mark.parametrize("length, heads", [(24, 8), (40, 8), (128, 4), (515, 2), (1030, 1)])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_of_columns_that_are_looped_over(launched_by_one, row, dtype, length, heads):
    check_what_is_looped_over((3, length, 200), 1, row, dtype, heads)
    assert set(launched_by_one) == {"forward_looped", "backward_looped", "parameter_gradients"}


@pytest.mark.parametrize("length, heads", [(1024, 8), (1056, 4), (1000, 1)])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_of_rows_that_are_looped_over(launched_by_one, row, dtype, length, heads):
    check_what_is_looped_over((101, length), -1, row, dtype, heads)
    backward = "backward_resident" if dtype == torch.float64 else "backward_looped"
    assert set(launched_by_one) == {"forward_resident", backward, "parameter_gradients"}


# Lengths of a slice from one warp's worth to many blocks, with a remainder; both kinds of axis.
@pytest.mark.parametrize("length", [7, 64, 100, 1000, 4099, 20_000, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", ["last", "middle"])
def test_any_length(backend, axis, dtype, length):
    num_heads = 3
    outer = max(1, 40_000 // length)
    shape, norm_axis = ((outer, length), -1) if axis == "last" else ((outer, length, 6), 1)
    x, mean_offsets, c, grad = problem(shape, num_heads, 5, dtype, mean=1.0, offsets=0.05, width=2.0)
    mask = torch.rand(shape, generator=generator(9)).to(CUDA) < 0.8
    for options in ({}, dict(mask=mask, padding_stats="exclude", residual=True), dict(mask=mask)):
        options["norm_axis"] = norm_axis
        got = evaluate(backend, x, mean_offsets, c, grad, **options)
        assert_contract(got, truth(x, mean_offsets, c, grad, **options), dtype, str(length))


@pytest.mark.parametrize("norm_axis", [1, -1])
def test_gradcheck(norm_axis):
    shape = (2, 9, 3) if norm_axis == 1 else (6, 9)
    x, mean_offsets, c, _ = problem(shape, 2, 3, torch.float64, mean=2.0, offsets=0.1, width=1.5)
    tensors = [t.requires_grad_() for t in (x, mean_offsets, c)]
    mask = torch.ones(shape, dtype=torch.bool, device=CUDA)
    mask.select(norm_axis, 4)[1] = False
    for options in ({}, dict(mask=mask, padding_stats="exclude", residual=True), dict(mask=mask, eps=3.0)):
        options.update(norm_axis=norm_axis, backend="triton")

        def run(*t, options=options):
            return density_attention(*t, **options)

        assert torch.autograd.gradcheck(run, tensors)
        assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("norm_axis", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [narrowed, every_second, transposed, channels_last, "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(backend, dtype, layout, norm_axis):
    x, mean_offsets, c, grad = problem((8, 40, 6, 16), 2, 5, dtype, mean=10.0, offsets=0.05, width=2.0)
    if layout == "expanded":
        strided = x.narrow((norm_axis + 1) % 4, 0, 1).expand_as(x)
        strided_grad = grad[:1, :1, :1, :1].expand_as(grad)
    else:
        strided, strided_grad = layout(x), layout(grad)
    y, dx, *rest = evaluate(backend, strided, mean_offsets, c, strided_grad, norm_axis=norm_axis)
    expected = truth(strided, mean_offsets, c, strided_grad, norm_axis=norm_axis)
    assert_contract((y, dx, *rest), expected, dtype)
    assert y.stride() == dx.stride() == torch.empty_like(strided).stride()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape, norm_axis", [((5, 333), -1), ((3, 130, 35), 1), ((2, 40_000), -1)])
def test_nothing_is_read_or_written_beside_the_tensors(backend, shape, norm_axis):
    tensors = problem(shape, 2, 5, torch.float32, width=2.0)
    views, buffers = zip(*(nan_padded(t, 4096) for t in tensors))
    got = evaluate(backend, *views, norm_axis=norm_axis)
    assert_contract(got, truth(*tensors, norm_axis=norm_axis), torch.float32)
    for buffer in buffers:
        assert_margins_intact(buffer, 4096)


@pytest.mark.parametrize("shape, norm_axis", [((512, 512), -1), ((64, 256, 96), 1), ((4, 100_000), -1)])
def test_the_same_bits_every_time(backend, shape, norm_axis):
    tensors = problem(shape, 4, 8, torch.bfloat16)
    first = evaluate(backend, *tensors, norm_axis=norm_axis)
    for _ in range(20):
        again = evaluate(backend, *tensors, norm_axis=norm_axis)
        for name, a, b in zip(("y", "dx", "dmean_offsets", "dc"), again, first, strict=True):
            assert_same_bits(a.cpu(), b.cpu(), name)


def skip_unless_free(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} GB are free")


@pytest.mark.huge
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2**31 // 512 + 5, 512), (2**31 // 2**18 + 3, 256, 1024)], ids=["last", "middle"])
def test_more_than_two_to_the_31_elements(shape, dtype):
    """Offsets past int32, forward and backward, on slices from the beginning, the 2^30th element and the end."""
    skip_unless_free(20)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=CUDA).requires_grad_()
    assert x.numel() > 2**31
    mean_offsets, c = gaussians(4, 3, generator(), offsets=0.05, width=2.0, device=CUDA)
    y = density_attention(x, mean_offsets, c, norm_axis=1, backend="triton")
    grad = torch.ones((), dtype=dtype, device=CUDA).expand(shape)
    (dx,) = torch.autograd.grad(y, x, grad)
    for row in (0, 1, shape[0] // 2, shape[0] - 2, shape[0] - 1):
        part = x.detach()[row : row + 1]
        expected = truth(part, mean_offsets, c, norm_axis=1)
        assert_close(y[row : row + 1], expected[0], TOLERANCES[dtype][0], f"y[{row}]")
        assert_close(dx[row : row + 1], expected[1], TOLERANCES[dtype][1], f"dx[{row}]")


@pytest.mark.huge
def test_one_slice_of_more_than_two_to_the_31_elements():
    """In bfloat16: each weight is about 2^-31, and float16 ends at 2^-24."""
    skip_unless_free(20)
    torch.manual_seed(0)
    length = 2**31 + 1000
    x = torch.randn(1, length, dtype=torch.bfloat16, device=CUDA).requires_grad_()
    mean_offsets, c = gaussians(1, 3, generator(), offsets=0.05, width=2.0, device=CUDA)
    y = density_attention(x, mean_offsets, c, normalize="softmax", backend="triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones((), dtype=x.dtype, device=CUDA).expand(x.shape))

    parts = x.detach()[0].split(2**26)
    mean = sum(part.double().sum() for part in parts) / length
    var = sum((part.double() - mean).square().sum() for part in parts) / (length - 1) + 1e-8

    def density(part):
        d = part.double().unsqueeze(0) - mean - mean_offsets[0].double().unsqueeze(1)
        return torch.exp(-(d.square() / (2 * var * c[0].double().unsqueeze(1).square())).sum(0))

    total = sum(density(part).sum() for part in parts)
    for cut in (slice(0, 5000), slice(2**31 - 2500, 2**31 + 1000)):
        part = x.detach()[0, cut]
        assert_close(y[0, cut], part.double() * density(part) / total, TOLERANCES[torch.bfloat16][0], f"y[{cut}]")
    # x + t gives y + t: the gradients of the sum of y add up to one.
    added = sum(part.double().sum().item() for part in dx[0].split(2**26))
    assert abs(added - 1) < 0.01


@pytest.mark.huge
def test_strides_past_two_to_the_31():
    """Few elements, far apart."""
    skip_unless_free(12)
    base = torch.empty(2**31 // 64 + 8, 128, dtype=torch.float16, device=CUDA)
    x, mean_offsets, c, grad = problem((4, 128), 2, 3, torch.float16, mean=1.0, width=2.0)
    step = (base.shape[0] - 1) // 3
    view = base[::step][:4]
    assert 3 * view.stride(0) > 2**31
    view.copy_(x)
    assert_contract(evaluate("triton", view, mean_offsets, c, grad), truth(x, mean_offsets, c, grad), torch.float16)


def test_two_streams(backend):
    problems = [problem((64, 256, 128), 4, 5, seed=seed) for seed in range(2)]
    expected = [evaluate(backend, *p, norm_axis=1) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = [[], []]
    for _ in range(20):
        for stream, p, result in zip(streams, problems, results):
            with torch.cuda.stream(stream):
                result.append(evaluate(backend, *p, norm_axis=1))
    torch.cuda.synchronize()
    for result, e in zip(results, expected):
        for got in result:
            for a, b in zip(got, e, strict=True):
                assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("shape, norm_axis", [((32, 128, 64), 1), ((2, 100_000), -1)])
def test_graph_capture(backend, shape, norm_axis):
    x, mean_offsets, c, grad = problem(shape, 4, 5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels compile outside of the capture
        for _ in range(3):
            evaluate(backend, x, mean_offsets, c, grad, norm_axis=norm_axis)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(backend, x, mean_offsets, c, grad, norm_axis=norm_axis)
    for seed in (1, 2):
        new = problem(shape, 4, 5, seed=seed)
        for static, fresh in zip((x, mean_offsets, c, grad), new):
            static.copy_(fresh)
        graph.replay()
        for a, b in zip(captured, evaluate(backend, *new, norm_axis=norm_axis), strict=True):
            assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_gives_the_same_bits(dtype):
    x, mean_offsets, c, grad = problem((8, 128, 64), 4, 5, dtype)
    tensors = [t.requires_grad_() for t in (x, mean_offsets, c)]

    def run(*t):
        return (density_attention(*t, norm_axis=1) * grad).sum()

    expected = torch.autograd.grad(run(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True)(*tensors), tensors)
    for g, e in zip(got, expected, strict=True):
        assert_same_bits(g.cpu(), e.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_agrees_with_the_reference_there(dtype):
    """The reference runs on the GPU too, where its sums are taken in another order."""
    x, mean_offsets, c, grad = problem((16, 128, 32), 4, 5, dtype, mean=1.0, offsets=0.05)
    got = evaluate("reference", x, mean_offsets, c, grad, norm_axis=1)
    expected = truth(x, mean_offsets, c, grad, norm_axis=1)
    assert expected[2].norm() > NEGLIGIBLE
    assert_contract(got, expected, dtype)


def test_no_synchronisation_and_no_memory_of_the_size_of_x(backend):
    """A call may not wait for the GPU, and makes no tensor of x's size but y (and dx)."""
    x, mean_offsets, c, grad = problem((64, 512, 256), 4, 5, torch.float32)
    tensors = [t.requires_grad_() for t in (x, mean_offsets, c)]
    for _ in range(2):
        y = density_attention(*tensors, norm_axis=1, backend=backend)
        torch.autograd.grad(y, tensors, grad)
    del y
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = density_attention(*tensors, norm_axis=1, backend=backend)
        torch.autograd.grad(y, tensors, grad)
        peak = torch.cuda.max_memory_allocated() - before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert peak < 2.2 * x.numel() * x.element_size()
