"""The native library on the CPU: against float64 over anything that fits, the same bits on any threads, fork, loading.

Gradcheck, opcheck, torch.compile and the numeric contract are in the tests of every backend, of which it is one.
"""

import itertools
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import daam_kernels
import pytest
import torch
from children import python
from daam_kernels import density_attention, native
from daam_kernels.options import DensityOptions
from hypothesis import given, settings
from native.problems import AVAILABLE, INSTRUCTION_SETS, SPLITS, draw_tensors, needs_library, odd_shapes, problems
from support import (
    DTYPES,
    HALF_TYPES,
    TOLERANCES,
    assert_close,
    assert_contract,
    assert_contract_of_any,
    assert_margins_intact,
    assert_same_bits,
    evaluate,
    gaussians,
    generator,
    nan_padded,
    truth,
)

# Against float64


@needs_library
@given(problems())
@settings(max_examples=200)
def test_any_problem(problem):
    x, grad, options, rng = draw_tensors(problem)
    heads = problem["num_heads"], problem["num_gaussians"]
    # Wide ones: for narrow ones the truth of a handful of slices is ill-conditioned in float32.
    parameters = gaussians(*heads, rng, offsets=0.05, width=2.0, dtype=torch.float64)
    got = evaluate("native", x, *parameters, grad, **options)
    assert_contract_of_any(got, x, *parameters, grad, **options)
    assert got[0].stride() == got[1].stride() == torch.empty_like(x).stride()


@needs_library
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_keeps_the_contract(name):
    code = """
    import itertools, torch
    from daam_kernels import native
    from support import DTYPES, assert_contract, evaluate, gaussians, generator, truth

    shapes = ((5, 67), -1), ((3, 33, 19), 1), ((1, 40000), -1), ((9000, 3), 0), ((1, 300, 130), 1)
    shapes += tuple(((2, length, 70), 1) for length in (4, 5, 7, 8, 11, 13, 15, 16, 48, 49))
    for (shape, axis), dtype, masked in itertools.product(shapes, DTYPES, (False, True)):
        rng = generator()
        x = (10 + torch.randn(shape, generator=rng)).to(dtype)
        grad = torch.randn(shape, generator=rng).to(dtype)
        parameters = gaussians(2, 5, rng, offsets=0.05, dtype=torch.promote_types(dtype, torch.float32))
        options = dict(norm_axis=axis)
        if masked:
            options.update(mask=torch.rand(shape, generator=rng) < 0.8, padding_stats="exclude", residual=True)
        got = evaluate("native", x, *parameters, grad, **options)
        assert_contract(got, truth(x, *parameters, grad, **options), dtype, f"{shape} {axis} {dtype} {masked}")
    print(native.instruction_set())
    """
    assert python(code, DAAM_KERNELS_INSTRUCTION_SET=name) == name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, axis, num_heads",
    [((1, 512), -1, 2), ((1, 511), -1, 3), ((1, 6, 256), 1, 2), ((1, 50, 120), 1, 1)],
    ids=["rows", "odd rows", "short columns", "columns"],
)
def test_large_results_equal_small_ones(shape, axis, num_heads, dtype):
    """Results from 16 MiB on are written past the caches; a slice's do not depend on how many others there are."""
    rng = generator()
    copies = (17 << 20) // (torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()) + 1
    x, grad = (torch.randn(copies, *shape[1:], generator=rng).to(dtype) for _ in range(2))
    parameters = gaussians(num_heads, 3, rng, dtype=torch.promote_types(dtype, torch.float32))
    large = evaluate("native", x, *parameters, grad, norm_axis=axis)
    for rows in (slice(0, 20), slice(copies // 2, copies // 2 + 1), slice(copies - 3, copies)):
        small = evaluate("native", x[rows], *parameters, grad[rows], norm_axis=axis)
        for name, whole, part in zip(("y", "dx"), large, small):
            assert_same_bits(whole[rows], part, name)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [7, 8, 30, 96])
def test_short_slices_have_the_same_bits_past_the_caches(length, dtype):
    rng = generator()
    copies = (17 << 20) // (length * torch.empty((), dtype=dtype).element_size()) + 1
    x, grad = (torch.randn(copies, length, generator=rng).to(dtype) for _ in range(2))
    parameters = gaussians(1, 3, rng, width=2.0, dtype=torch.promote_types(dtype, torch.float32))
    large = evaluate("native", x, *parameters, grad, norm_axis=-1)
    # Those that fill groups: what is left of them goes another way.
    for rows in (slice(0, 128), slice(copies // 2 - 64, copies // 2)):
        small = evaluate("native", x[rows], *parameters, grad[rows], norm_axis=-1)
        for name, whole, part in zip(("y", "dx"), large, small):
            assert_same_bits(whole[rows], part, name)
    last = slice(copies - 70, copies)
    expected = truth(x[last], *parameters, grad[last], norm_axis=-1)
    for got, exact, tolerance in zip(large[:2], expected, TOLERANCES[dtype]):
        assert_close(got[last], exact, tolerance)


@needs_library
@pytest.mark.parametrize(
    "shape, dtype",
    [
        *itertools.product([(2, 12, 21), (2, 40, 16), (2, 40, 21)], DTYPES),
        # of float64 they have no kernel of their own, and among slices so short are ill-conditioned ones
        *itertools.product([(2, 4, 40), (2, 6, 40), (2, 7, 40)], [torch.float32, *HALF_TYPES]),
    ],
    ids=str,
)
def test_columns_of_which_some_lie_far_from_the_gaussians(shape, dtype):
    """Their densities are found again, relative to their own largest, of an x whose place products had taken."""
    rng = generator(3)
    x = torch.rand(shape, generator=rng, dtype=torch.float64)
    x[..., ::2] = (x[..., ::2] < 0.2).double()  # of two values, neither of which is within a deviation
    x, parameters = x.to(dtype), (torch.full((1, 2), 1.2), torch.full((1, 2), 0.4))
    parameters = [p.to(torch.float64 if dtype == torch.float64 else torch.float32) for p in parameters]
    options = dict(norm_axis=1, normalize="softmax")
    grad = torch.ones_like(x)
    got = evaluate("native", x, *parameters, grad, **options)
    assert_contract(got, truth(x, *parameters, grad, **options), dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [100.0, 1e4, -1e4])
@pytest.mark.parametrize(
    "shape, axis", [((9, 200), 1), ((40, 35), 0), ((3, 40_000), 1)], ids=["rows", "columns", "rows in runs"]
)
def test_padding_far_from_the_rest_costs_no_digits(shape, axis, value, dtype):
    """The first half, that is, where the backward looks for an element near the Gaussians."""
    rng = generator()
    x, grad = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    mask = torch.ones(shape, dtype=torch.bool)
    mask.narrow(axis, 0, shape[axis] // 2).fill_(False)
    x[~mask] = value
    parameters = gaussians(1, 4, rng, width=2.0, dtype=torch.promote_types(dtype, torch.float32))
    for options in (dict(mask=mask), dict(padding_value=value)):
        got = evaluate("native", x, *parameters, grad, norm_axis=axis, **options)
        assert_contract(got, truth(x, *parameters, grad, norm_axis=axis, **options), dtype)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, axis", [((2, 9000), 1), ((2, 40_000), 1), ((4000, 20), 0), ((9000, 20), 0)])
def test_numbers_whose_squares_add_up_to_infinity_stay_finite(shape, axis, dtype):
    """A number near the mean is looked for among the first elements, which are far from it."""
    x, grad = (torch.randn(shape, generator=generator(seed)) for seed in (0, 1))
    x.narrow(axis, 0, shape[axis] // 4).fill_(-1)
    x = (1e18 * x.clamp(-1, 1)).to(dtype)
    for result in evaluate("native", x, torch.zeros(1, 2), torch.ones(1, 2), grad.to(dtype), norm_axis=axis):
        assert result.isfinite().all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "length, num_heads",
    [  # of slices of two alone the gradient of c is 0
        (2, 3),
        *itertools.product([3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 95, 96, 97], [1, 3]),
    ],
)
def test_short_slices_of_neighbours_in_memory(length, num_heads, masked, dtype):
    """A few features: how they reach a vector's lanes depends on how many there are. A last head has more."""
    rng, slices = generator(length), 37
    features = num_heads * length + num_heads // 2
    x, grad = (torch.randn(slices, features, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    parameters = gaussians(num_heads, 3, rng, width=2.0, dtype=torch.promote_types(dtype, torch.float32))
    options = dict(norm_axis=-1)
    if masked:
        options.update(mask=torch.rand(x.shape, generator=rng) < 0.8, padding_stats="exclude")
        options["mask"][5] = False
    got = evaluate("native", x, *parameters, grad, **options)
    assert_contract(got, truth(x, *parameters, grad, **options), dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", ["clamp", "softmax"])
@pytest.mark.parametrize("length", [2, 3, 5, 8, 9, 24, 25])
def test_a_nan_in_one_short_column_leaves_the_others(length, normalize, dtype):
    rng = generator(length)
    x, grad = (torch.randn(2, length, 100, generator=rng).to(dtype) for _ in range(2))
    parameters, options = gaussians(1, 3, rng, width=2.0), dict(norm_axis=1, normalize=normalize)
    expected = evaluate("native", x, *parameters, grad, **options)
    x[1, 1, 50] = math.nan
    got = evaluate("native", x, *parameters, grad, **options)
    for g, e in zip(got[:2], expected[:2]):
        assert g[1, :, 50].isnan().all()
        g[1, :, 50] = e[1, :, 50]
        assert_close(g, e, 1e-6 if dtype in (torch.float32, torch.float64) else 1e-2)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [2.0, 0.5], ids=["wide", "narrow"])
@pytest.mark.parametrize("length", [2, 3, 5, 8, 9, 24])
def test_short_columns_have_the_same_bits_with_weights(length, width, residual, dtype):
    x = torch.randn(3, length, 100, generator=generator(length)).to(dtype)
    options, tolerance = (
        dict(norm_axis=1, residual=residual),
        {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2),
    )
    parameters = gaussians(1, 3, generator(), width=width, dtype=torch.promote_types(dtype, torch.float32))
    y, weights = density_attention(x, *parameters, return_weights=True, backend="native", **options)
    assert_same_bits(y, density_attention(x, *parameters, backend="native", **options))
    exact = x.double(), *(p.double() for p in parameters)
    expected = density_attention(*exact, return_weights=True, backend="reference", **options)[1]
    assert_close(weights, expected, tolerance, "weights")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.05, 1e-4], ids=["far", "clamped"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 9])
def test_an_odd_short_column_is_exact_and_changes_no_other_group(length, factor, dtype):
    """Groups of short columns are worked on as if none had a slice like that, and again where one has."""
    rng = generator(length)
    x, grad = (torch.randn(1, length, 1500, generator=rng).to(dtype) for _ in range(2))
    offsets, c = torch.tensor([[0.2, 0.3, 0.4]]), torch.full((1, 3), 1.2)
    parameters = [p.to(torch.promote_types(dtype, torch.float32)) for p in (offsets, c)]
    before = evaluate("native", x, *parameters, grad, norm_axis=1)
    x[..., 70] *= factor
    got = evaluate("native", x, *parameters, grad, norm_axis=1)
    assert_contract(got, truth(x, *parameters, grad, norm_axis=1), dtype)
    for name, now, then in zip(("y", "dx"), got, before):
        for others in (slice(0, 64), slice(80, 1500)):
            assert_same_bits(now[..., others], then[..., others], name)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2.0, 0.3], ids=["wide", "narrow"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 8, 9])
def test_short_columns_have_the_same_bits_among_any_others(length, width, dtype):
    """A group's statistics are found before the group ahead of it is done; calls are of sixteen groups."""
    rng, columns = generator(length), 16 * 37 + 5
    x, grad = (torch.randn(2, 2 * length, columns, generator=rng).to(dtype) for _ in range(2))
    parameters = gaussians(2, 3, rng, width=width, dtype=torch.promote_types(dtype, torch.float32))
    whole = evaluate("native", x, *parameters, grad, norm_axis=1)
    for start in (0, 192, 512):  # of 64, which fill groups
        some = slice(start, start + 64)
        part = evaluate("native", x[..., some].contiguous(), *parameters, grad[..., some].contiguous(), norm_axis=1)
        for name, all_of_it, got in zip(("y", "dx"), whole, part):
            assert_same_bits(all_of_it[..., some], got, name)
    if width == 2.0:  # of narrow ones the truth of so few elements is ill-conditioned in float32
        last = slice(columns - 70, columns)
        expected = truth(x[..., last], *parameters, grad[..., last], norm_axis=1)
        for got, exact, tolerance in zip(whole[:2], expected, TOLERANCES[dtype]):
            assert_close(got[..., last], exact, tolerance)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_any_nan_among_the_parameters_stays_one(bits, dtype):
    """Rounded to bfloat16 by arithmetic on its bits, a NaN of ones alone would become 0."""
    nan = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    x = torch.randn(3, 40, generator=generator()).to(dtype)
    for parameters in ((nan, torch.ones(1, 1)), (torch.zeros(1, 1), nan)):
        for result in evaluate("native", x, *parameters, torch.ones_like(x)):
            assert result.isnan().all()


@needs_library
@pytest.mark.parametrize("parameters_type", [torch.float8_e4m3fn, *HALF_TYPES], ids=str)
def test_parameters_in_few_bits(parameters_type):
    x, grad = (torch.randn(6, 40, generator=generator(seed)) for seed in (0, 1))
    exact = torch.tensor([[0.5, -0.25, 0.0]]), torch.tensor([[1.0, 0.5, 2.0]])
    expected = evaluate("native", x, *exact, grad)
    got = evaluate("native", x, *(p.to(parameters_type) for p in exact), grad)
    for g, e in zip(got[:2], expected[:2]):
        assert_same_bits(g, e)
    for g, e in zip(got[2:], expected[2:]):
        assert g.dtype == parameters_type and torch.equal(g.float(), e.to(parameters_type).float())


# Threads


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_bits_on_any_number_of_threads(split, masked, dtype, threads):
    shape, axis, num_heads = SPLITS[split]
    rng = generator()
    x, grad = ((1 + torch.randn(shape, generator=rng)).to(dtype) for _ in range(2))
    parameters = gaussians(num_heads, 3, rng, offsets=0.05, width=2.0)
    options = dict(norm_axis=axis)
    if masked:
        options.update(mask=torch.rand(shape, generator=rng) < 0.7, padding_stats="exclude")
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(evaluate("native", x, *parameters, grad, **options))
    for other in results[1:]:
        for what, got, expected in zip(("y", "dx", "dmean_offsets", "dc"), other, results[0], strict=True):
            assert_same_bits(got, expected, what)


@needs_library
@pytest.mark.parametrize(
    "split",
    ["a long row", "long rows in batches", "many long rows", "few long columns", "long columns in batches"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_slices_are_right(split, dtype):
    shape, axis, num_heads = SPLITS[split]
    rng = generator()
    x, grad = ((4096 + 4096 * torch.randn(shape, generator=rng)).to(dtype) for _ in range(2))  # y is normal in float16
    parameters = gaussians(num_heads, 3, rng, offsets=0.05, width=2.0, dtype=torch.float64)
    got = evaluate("native", x, *parameters, grad, norm_axis=axis)
    assert_contract(got, truth(x, *parameters, grad, norm_axis=axis), dtype)


@needs_library
def test_calls_from_many_python_threads_at_once(threads):
    threads(2)
    rng = generator()
    cases = []
    for shape, axis, num_heads in SPLITS.values():
        x, grad = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        cases.append((x, *gaussians(num_heads, 3, rng, offsets=0.05), grad, axis))

    def run(case):
        *tensors, axis = case
        return evaluate("native", *tensors, norm_axis=axis)

    expected = [run(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for got, exact in zip(pool.map(run, 4 * cases), 4 * expected):
            for g, e in zip(got, exact):
                assert_same_bits(g, e)


class Weighed(torch.utils.data.Dataset):
    """Samples that are weighed where they are loaded, with a gradient on top."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x = torch.randn(40, 64, generator=generator(index))
        y, dx, *_ = evaluate("native", x, torch.zeros(2, 3), torch.ones(2, 3), norm_axis=0)
        return torch.stack([y, dx])


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_workers_of_a_data_loader():
    """In an interpreter of its own: once a GPU has worked in a process, autograd does not in those forked from it."""
    python("""
        import torch
        from native.test_native import Weighed
        from support import assert_same_bits

        torch.set_num_threads(2)
        dataset = Weighed()
        expected = [dataset[index] for index in range(len(dataset))]  # before the fork: the library is loaded and used
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
        for got, exact in zip(loader, expected, strict=True):
            assert_same_bits(got, exact)
    """)


# Memory


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_odd_sizes_and_unaligned_pointers(axis, dtype):
    """Every tensor, results too, lies at an odd place between NaN that must neither be read nor written."""
    for seed, (shape, margin) in enumerate(odd_shapes(axis)):
        rng = generator(seed)
        heads = 2 if shape[axis] > 4 else 1
        tensors = [
            torch.randn(shape, generator=rng).to(dtype),
            *gaussians(heads, 3, rng, width=2.0, dtype=torch.promote_types(dtype, torch.float32)),
            torch.randn(shape, generator=rng).to(dtype),
        ]
        x, mean_offsets, c, grad = (nan_padded(t, margin)[0] for t in tensors)
        options = DensityOptions(axis, None, "zero", "clamp", 1e-8, False)
        outputs = [nan_padded(t, margin) for t in (x, x, x, mean_offsets, c)]
        y, weights, dx, d_offsets, d_c = (view for view, _ in outputs)
        native.density_forward(x, mean_offsets, c, None, options, y, weights)
        known, library = native.problem(mean_offsets, c, None, options, dx, x, grad), native._library()
        pointers = [t.data_ptr() for t in (grad, x, mean_offsets, c)], [t.data_ptr() for t in (dx, d_offsets, d_c)]
        assert library.backward(known.address, *pointers[0], None, *pointers[1], library.parallel_for) == 0
        assert_contract((y, dx, d_offsets, d_c), truth(*tensors, norm_axis=axis), dtype, f"{shape}")
        for _, buffer in outputs:
            assert_margins_intact(buffer, margin)
        expected = density_attention(*tensors[:3], norm_axis=axis, return_weights=True, backend="native")[1]
        assert_close(weights, expected, 0.0 if dtype == torch.float64 else 1e-2)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape, axis", [((6, 20), 1), ((2, 20, 35), 1), ((40, 66), 0), ((2, 50_000), 1)])
def test_a_value_that_is_not_finite_stays_in_its_slice(shape, axis, value, dtype):
    rng = generator()
    x, grad = torch.randn(shape, generator=rng).to(dtype), torch.randn(shape, generator=rng).to(dtype)
    parameters = gaussians(2, 3, rng, width=2.0)
    expected = evaluate("native", x, *parameters, grad, norm_axis=axis)
    first = shape[axis] // 2
    touched = torch.zeros(shape, dtype=torch.bool)
    touched.narrow(axis, 0, first).select(0 if axis else 1, 1).fill_(True)
    broken = x.clone()
    broken[touched.nonzero()[3].unbind()] = value
    got = evaluate("native", broken, *parameters, grad, norm_axis=axis)
    for g, e in zip(got[:2], expected[:2]):
        assert_same_bits(g[~touched], e[~touched])
        assert g[touched].isnan().any()
    for g, e in zip(got[2:], expected[2:]):
        assert g[0].isnan().all()
        assert_same_bits(g[1], e[1])


@needs_library
def test_huge_pages_change_no_bits():
    code = """
    import torch
    from daam_kernels import density_attention, native
    from daam_kernels.options import DensityOptions
    from support import evaluate, gaussians, generator
    x = torch.randn(4, 1 << 20, generator=generator())
    parameters = gaussians(1, 3, generator(1))
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False)
    flags = native.problem(*parameters, None, options, x, x).structure.flags
    print(flags, *(t.view(torch.int32).sum(dtype=torch.int64).item() for t in evaluate("native", x, *parameters)))
    """
    (off, *plain), (on, *huge) = python(code).split(), python(code, DAAM_KERNELS_HUGE_PAGES="1").split()
    assert plain == huge and (off, on) == ("0", "32")


# CUDA, without a GPU: what the C functions are called with


class OnGPU(torch.Tensor):
    is_cpu = property(lambda self: False)


@needs_library
def test_what_the_cuda_functions_are_given(monkeypatch):
    """Pointers in the order of csrc/daam_kernels.h, a workspace as large as asked for, the image, the stream."""
    calls = []

    def recording(count):
        return lambda *arguments: calls.append((count, arguments)) or 0

    functions = dict(cuda_forward=recording(9), cuda_backward=recording(12), cuda_workspace=lambda problem: 64)
    loaded, image = native._library()._replace(**functions), object()
    stream = type("Stream", (), {"cuda_stream": 77})
    monkeypatch.setattr(native, "_load", lambda: loaded)
    monkeypatch.setattr(native, "_cuda_image", lambda: image)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    x, grad, y, weights = (torch.empty(4, 6).as_subclass(OnGPU) for _ in range(4))
    mean_offsets, c, mask = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(4, 6, dtype=torch.bool)
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False)
    native.density_forward(x, mean_offsets, c, mask, options, y, weights)
    gradients = native.density_backward(grad, x, mean_offsets, c, mask, options)
    (count, forward), (backward_count, backward) = calls
    assert (len(forward), len(backward)) == (count, backward_count)
    inputs = [t.data_ptr() for t in (x, mean_offsets, c, mask)]
    assert list(forward[1:]) == [*inputs, y.data_ptr(), weights.data_ptr(), image, 77]
    results = [t.data_ptr() for t in gradients]
    assert list(backward[1:9]) == [grad.data_ptr(), *inputs, *results] and backward[9] and backward[10:] == (image, 77)


# Loading


def test_it_is_not_loaded_at_import():
    python("""
        import ctypes
        import torch
        opened = []
        original = ctypes.CDLL.__init__
        ctypes.CDLL.__init__ = lambda self, name, *a, **k: (opened.append(name), original(self, name, *a, **k))[1]
        import daam_kernels
        assert not [name for name in opened if name and "_core" in str(name)], opened
    """)


SHOW = """
    import torch, daam_kernels
    from daam_kernels import density_attention
    print(daam_kernels.available_backends()["native"].reason)
    print(daam_kernels.available_backends()["cuda"].reason)
    tensors = torch.randn(2, 6), torch.zeros(1, 2), torch.ones(1, 2)
    assert not daam_kernels.available_backends()["native"] and not daam_kernels.available_backends()["cuda"]
    y = density_attention(*tensors)
    assert torch.equal(y, density_attention(*tensors, backend="reference"))
    try:
        density_attention(*tensors, backend="native")
    except RuntimeError as error:
        print(error)
"""


def test_switched_off_at_run_time():
    reason = "switched off by the environment variable DAAM_KERNELS_NO_NATIVE"
    error = f"backend asks for 'native', which cannot serve a tensor on cpu: {reason}"
    assert python(SHOW, DAAM_KERNELS_NO_NATIVE="1").splitlines() == [reason, reason, error]
    if AVAILABLE:
        code = "import daam_kernels; print(daam_kernels.available_backends()['native'].available)"
        assert python(code, DAAM_KERNELS_NO_NATIVE="0") == "True"


def test_a_library_that_does_not_load_says_why(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    cases = {str(broken): "broken.so: ", str(tmp_path / "absent.so"): "absent.so: cannot open shared object file"}
    other = shutil.which("gcc") and subprocess.check_output(["gcc", "-print-file-name=libm.so.6"], text=True).strip()
    if other:
        cases[other] = "daam_abi_version"
    for path, reason in cases.items():
        native_reason, cuda_reason, error = python(SHOW, DAAM_KERNELS_LIBRARY=path).splitlines()
        assert native_reason == cuda_reason and native_reason.startswith(f"{path} does not load: ")
        assert reason in native_reason and native_reason in error


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_library_of_another_version_is_refused(tmp_path):
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int daam_abi_version(void) { return 99; }")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    reason = f"{library} has version 99 of the C interface, this daam_kernels needs 3: reinstall"
    assert python(SHOW, DAAM_KERNELS_LIBRARY=str(library)).splitlines()[0] == reason


@pytest.mark.parametrize(
    "record, reason",
    [
        ('{"native": {"built": false, "detail": "no compiler was found"}}', "no compiler was found"),
        (None, "this is a source tree in which no build ran; pip install . does"),
        ("not JSON", "this is a source tree in which no build ran; pip install . does"),
    ],
)
def test_a_library_that_was_not_built_says_why(record, reason, tmp_path, monkeypatch):
    for name in ("DAAM_KERNELS_LIBRARY", "DAAM_KERNELS_NO_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "_core.so")
    monkeypatch.setattr(native, "_BUILD", tmp_path / "_build.json")
    if record is not None:
        (tmp_path / "_build.json").write_text(record)
    assert native._load.__wrapped__() == f"the native library was not built: {reason}"


@needs_library
def test_without_torchs_threads_everything_runs_in_the_caller(monkeypatch):
    x, parameters = torch.randn(64, 512, generator=generator()), gaussians(2, 3, generator(1))
    expected = density_attention(x, *parameters, backend="native")
    monkeypatch.setattr(native, "_TORCH_LIBRARY", "no such library")
    serial = native._load.__wrapped__()
    assert not serial.parallel_for.value
    monkeypatch.setattr(native, "_load", lambda: serial)
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False)
    y = torch.empty_like(x)
    native.density_forward(x, *parameters, None, options, y, None)
    assert_same_bits(y, expected)


@needs_library
def test_what_the_library_refuses_raises():
    """Of arguments that the public function would not have let through: a head of one element."""
    x = torch.randn(2, 3)
    options = DensityOptions(1, None, "zero", "clamp", 1e-8, False)
    with pytest.raises(RuntimeError, match="native library of daam_kernels failed: it does not serve these arguments"):
        native.density_forward(x, torch.zeros(2, 1), torch.ones(2, 1), None, options, torch.empty_like(x), None)
    with pytest.raises(RuntimeError, match="it does not serve these arguments"):
        native.density_backward(x, x, torch.zeros(2, 1), torch.ones(2, 1), None, options)


@needs_library
def test_what_it_says_of_itself():
    assert native.instruction_set() in native.instruction_sets()
    assert native.instruction_set() in daam_kernels.available_backends()["native"].reason
