"""The CUDA launches and kernels of csrc/cuda, run from end to end on a CPU: cuda_emulation.cpp says what that proves.

The numeric contract and whatever else is asked of every backend: test_what_is_asked_of_every_backend.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from support import (
    assert_close,
    assert_contract,
    assert_contract_of_any,
    assert_margins_intact,
    assert_same_bits,
    gaussians,
    generator,
    nan_padded,
    truth,
)

from .cuda_compile import ARCHITECTURES, KERNELS, Compiled, faults, read_report
from .cuda_library import OPTIONS, ROOT, Library, compile_emulation, environment

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARED_BYTES = 9000  # of a device on which slices of a few thousand elements do not fit
SANITIZED = os.environ.get("DAAM_TEST_SANITIZED") == "1"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
PRELOADED = ("libasan.so", "libstdc++.so")  # before Python, which is not instrumented


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp("cuda"), flags=SANITIZE if SANITIZED else ("-O2",))


@pytest.fixture(scope="module")
def library(compiled):
    found = Library(*compiled)
    assert found.status == 0
    return found


@pytest.fixture
def kernels_of(library, capfd):
    """Runs a function; returns what it returns and the names of the kernels that it launched."""

    def run(function):
        capfd.readouterr()
        with environment(EMULATION_TRACE="1"):
            result = function()
        lines = capfd.readouterr().err.splitlines()
        return result, [line.split()[0] for line in lines if line.startswith("daam_")]

    return run


def problem_of(shape, dtype, num_heads, rng, num_gaussians=3, width=None):
    x = (1 + torch.randn(shape, generator=rng)).to(dtype)
    grad = torch.randn(shape, generator=rng).to(dtype)
    return x, *gaussians(num_heads, num_gaussians, rng, offsets=0.05, width=width), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, axis, kind",
    [
        ((5, 128), 1, "rows"),
        ((3, 8), 1, "rows"),
        ((2, 1024), 1, "rows"),
        ((2, 3, 4096), 2, "rows"),
        ((2, 24, 32), 1, "columns"),
        ((300, 8), 0, "columns"),
        ((2, 3, 5, 16), 1, "columns"),
        ((1000, 16), 0, "columns"),
        ((5, 127), 1, "strided"),
        ((7, 2), 1, "strided"),
        ((3, 33, 5), 1, "strided"),
        ((1500, 3), 0, "strided"),
    ],
)
def test_each_way_through_memory(library, kernels_of, shape, axis, kind, dtype):
    rng, name = generator(), str(dtype).removeprefix("torch.")
    x, mean_offsets, c, grad = problem_of(shape, dtype, 1, rng)
    got, kernels = kernels_of(lambda: library.evaluate(x, mean_offsets, c, grad, norm_axis=axis))
    assert kernels == [f"daam_{d}_{kind}_{name}" for d in ("forward", "backward")] + ["daam_parameter_gradients"]
    assert_contract(got, truth(x, mean_offsets, c, grad, norm_axis=axis), dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, axis", [((2, 8192), 1), ((2048, 16), 0), ((2, 4999), 1), ((4001, 3), 0)])
def test_slices_that_shared_memory_does_not_hold(library, shape, axis, dtype, padded):
    rng = generator(1)
    x, mean_offsets, c, grad = problem_of(shape, dtype, 2, rng)
    options = dict(norm_axis=axis)
    if padded:
        options.update(mask=torch.rand(shape, generator=rng) < 0.7, padding_stats="exclude", residual=True)
    held = library.evaluate(x, mean_offsets, c, grad, **options)
    got = library.on_device(SHARED_BYTES).evaluate(x, mean_offsets, c, grad, **options)
    assert_contract(got, truth(x, mean_offsets, c, grad, **options), dtype)
    assert_contract(held, truth(x, mean_offsets, c, grad, **options), dtype)


@st.composite
def problems(draw):
    """(x, mean_offsets, c, grad, options): views into NaN, at any offset, of any of three layouts each."""
    axes = [draw(st.integers(1, 5)) for _ in range(draw(st.integers(0, 2)))]
    axis = draw(st.integers(0, len(axes)))
    num_heads = draw(st.integers(1, 3))
    length = draw(st.integers(2 * num_heads, 40)) * draw(st.sampled_from([1, 8]))
    shape = (*axes[:axis], length, *(n * draw(st.sampled_from([1, 8])) for n in axes[axis:]))
    rng, dtype = generator(draw(st.integers(0, 99))), draw(st.sampled_from(DTYPES))
    # Wide Gaussians: of narrow ones the truth of a handful of slices is ill-conditioned in float32.
    x, mean_offsets, c, grad = problem_of(shape, dtype, num_heads, rng, draw(st.integers(1, 40)), width=2.0)
    options = dict(
        norm_axis=axis,
        normalize=draw(st.sampled_from(["clamp", "softmax"])),
        padding_stats=draw(st.sampled_from(["zero", "exclude"])),
        eps=draw(st.sampled_from([1e-8, 0.5])),
        residual=draw(st.booleans()),
    )
    if draw(st.booleans()):
        options["padding_value"] = 0.0
        x = torch.where(torch.rand(shape, generator=rng) < 0.3, 0, x)
    if draw(st.booleans()):
        narrow = [n if draw(st.booleans()) else 1 for n in shape]
        options["mask"] = torch.rand(narrow, generator=rng) < 0.8
    layouts = st.tuples(st.integers(0, 9), st.sampled_from([1, 2]))
    return placed(x, *draw(layouts)), mean_offsets, c, placed(grad, *draw(layouts)), options


def placed(t, offset, step):
    """The values of t, every ``step``-th element of a NaN-filled buffer, ``offset`` elements from its start."""
    buffer = torch.full((t.numel() * step + offset + 9,), math.nan, dtype=t.dtype)
    view = buffer[offset:].as_strided(t.shape, [s * step for s in t.stride()])
    return view.copy_(t)


@settings(max_examples=80)
@given(problems())
def test_any_problem(library, problem):
    x, mean_offsets, c, grad, options = problem
    assert_contract_of_any(library.evaluate(x, mean_offsets, c, grad, **options), x, mean_offsets, c, grad, **options)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, axis", [((3, 64), 1), ((2, 12, 16), 1), ((3, 65), 1), ((2, 12, 15), 1)])
def test_nothing_is_written_beside_the_results(library, shape, axis, dtype, offset):
    x, mean_offsets, c, grad = problem_of(shape, dtype, 2, generator(2))
    options = OPTIONS._replace(norm_axis=axis)
    (y, y_buffer), (weights, weights_buffer), (dx, dx_buffer) = (nan_padded(t, 64 + offset) for t in (x, x, x))
    y.fill_(math.nan), weights.fill_(math.nan), dx.fill_(math.nan)
    library.forward(x, mean_offsets, c, options=options, y=y, weights=weights)
    library.backward(grad, x, mean_offsets, c, options=options, dx=dx)
    for buffer in (y_buffer, weights_buffer, dx_buffer):
        assert_margins_intact(buffer, 64 + offset)
    assert y.isfinite().all() and dx.isfinite().all()
    assert_close(x.double() * weights.double(), y, {torch.float32: 1e-6}.get(dtype, 2.0**-8), "x * weights")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, axis", [((9, 2048), 1), ((2, 300, 64), 1), ((4, 1031), 1), ((700, 5), 0)])
def test_the_same_bits_in_any_order_of_threads(library, shape, axis, dtype, padded):
    """What another order changes is a race; twice the same order, and something was not set."""
    rng = generator(3)
    x, mean_offsets, c, grad = problem_of(shape, dtype, 2, rng)
    options = dict(norm_axis=axis)
    if padded:
        options.update(mask=torch.rand(shape, generator=rng) < 0.8, padding_stats="exclude")
    first = library.evaluate(x, mean_offsets, c, grad, **options)
    again = library.evaluate(x, mean_offsets, c, grad, **options)
    with environment(EMULATION_REVERSED="1"):
        reversed_ = library.evaluate(x, mean_offsets, c, grad, **options)
    for name, a, b, r in zip(("y", "dx", "dmean_offsets", "dc"), first, again, reversed_, strict=True):
        assert_same_bits(b, a, name)
        assert_same_bits(r, a, f"{name}, reversed")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape, axis", [((6, 64), 1), ((2, 30, 16), 1), ((6, 63), 1)])
def test_what_is_not_finite_stays_in_its_slice(library, shape, axis, value):
    x, mean_offsets, c, grad = problem_of(shape, torch.float32, 1, generator(4))
    clean = library.evaluate(x, mean_offsets, c, grad, norm_axis=axis)
    bad = x.clone()
    at = (1, *([2] * (x.dim() - 1)))
    bad[at] = value
    got = library.evaluate(bad, mean_offsets, c, grad, norm_axis=axis)
    inside = torch.zeros_like(x, dtype=torch.bool).movedim(axis, 0)
    inside[(slice(None), *(n for d, n in enumerate(at) if d != axis))] = True
    inside = inside.movedim(0, axis)
    for g, e in zip(got[:2], clean[:2]):
        assert g[inside].isnan().all()
        assert_same_bits(g[~inside], e[~inside])


def test_parameter_gradients_of_more_blocks_than_write_partial_sums(library):
    x, mean_offsets, c, grad = problem_of((200, 50, 32), torch.float32, 8, generator(5), num_gaussians=70)
    got = library.evaluate(x, mean_offsets, c, grad)
    assert_contract(got, truth(x, mean_offsets, c, grad), torch.float32)


@pytest.mark.parametrize("offsets_type", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_other_types_and_strides(library, offsets_type):
    x, mean_offsets, c, grad = problem_of((4, 64), torch.float32, 2, generator(6))
    mean_offsets, c = mean_offsets.to(offsets_type).t().contiguous().t(), c[:, :1].expand(2, 3)
    got = library.evaluate(x, mean_offsets, c, grad)
    expected = truth(x, mean_offsets, c, grad)
    assert got[2].dtype == offsets_type and got[3].dtype == torch.float32
    for name, g, e in zip(("y", "dx", "dmean_offsets", "dc"), got, expected, strict=True):
        assert_close(g, e, 2.0**-8 if name == "dmean_offsets" else 1e-4, name)


def test_an_empty_batch(library):
    x, mean_offsets, c, grad = problem_of((0, 64), torch.float32, 2, generator(7))
    y, dx, *gradients = library.evaluate(x, mean_offsets, c, grad)
    assert y.shape == dx.shape == x.shape
    assert not any(t.any() for t in gradients)


def test_what_is_not_served_is_refused(library):
    for dtype, length in ((torch.float64, 64), (torch.float32, 3)):
        x, mean_offsets, c, _ = problem_of((2, length), dtype, 2, generator())
        with pytest.raises(RuntimeError, match="status 2"):
            library.forward(x, mean_offsets, c)
        with pytest.raises(RuntimeError, match="status 2"):
            library.backward(x, x, mean_offsets, c)
    assert library.host.daam_cuda_workspace(bytes(1000)) == 0  # no heads, among other things


def test_without_a_driver_or_kernels(compiled, tmp_path):
    host, driver = compiled
    alone = Path(shutil.copy(host, tmp_path / "libhost.so"))  # another library, which has not looked for a driver yet
    assert Library(alone, tmp_path / "missing.so").status == 3
    assert Library(host, driver, image=b"of another device").status == 4
    with environment(EMULATION_NO_DEVICE="1"):
        assert in_another_thread(lambda: Library(host, driver).status) == 3


def test_what_failed_to_load_is_tried_again(compiled):
    library = Library(*compiled)
    library._buffer.value = b"changed"  # what the driver refuses, at an address of its own
    with environment(EMULATION_CONTEXT="1"):
        assert library.load() == 4
        library._buffer.value = b"emulated"
        assert library.load() == 0


def test_threads_without_a_context(library):
    """Those of torch's backward pass may have none: they get the first device's own."""
    x, mean_offsets, c, grad = problem_of((2, 64), torch.float32, 1, generator(8))
    expected = library.evaluate(x, mean_offsets, c, grad)
    got = in_another_thread(lambda: library.evaluate(x, mean_offsets, c, grad))
    for g, e in zip(got, expected, strict=True):
        assert_same_bits(g, e)


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_kernels_are_loaded_once_for_each_context(compiled):
    library = Library(*compiled)
    before = library.loads
    for context, loads in (("2", 1), ("2", 1), ("3", 2), ("2", 2)):
        with environment(EMULATION_CONTEXT=context):  # all at one address, as after another was destroyed
            assert library.load() == 0
        assert library.loads - before == loads


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("source", ["driver.cpp", "launch.cpp"])
def test_the_host_code_compiles_without_warnings(compiler, source):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, str(ROOT / "csrc" / "cuda" / source)], check=True)


def test_launches_fit_the_device(tmp_path):
    """Every launch that plan() makes of thousands of problems, checked by a program of its own."""
    sources = ROOT / "tests/native/cuda_launches.cpp", ROOT / "csrc/cuda/launch.cpp"
    command = ["g++", "-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*command, "-o", tmp_path / "check", *sources], check=True)
    result = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert result.returncode == 0 and int(result.stdout.split()[0]) > 10000, result.stdout + result.stderr


def test_what_is_asked_of_every_backend(compiled):
    """The suite of all backends with these kernels as the native one: edges, layouts, the numeric contract."""
    files = ("tests/test_functional.py", "tests/test_gradient_layouts.py", "tests/test_numeric_contract.py")
    # The contract in one number of Gaussians, which the kernels know nothing of: all would take minutes.
    some = "native and not float64 and not (test_contract and (-1-native or -8-native or -16-native))"
    folder = str(compiled[0].parent)
    output = _pytest("-p", "native.cuda_emulated", "-k", some, *files, DAAM_TEST_EMULATION=folder)
    launches = re.search(r"emulated CUDA kernels: (\d+) launches", output)
    assert launches and int(launches[1]) > 300, output[-1000:]


def test_no_access_out_of_bounds():
    """All problems above with AddressSanitizer and UndefinedBehaviorSanitizer."""
    preload = (subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in PRELOADED)
    _pytest(
        "tests/native/test_cuda.py",
        *("-k", "memory or problem or beside or other_types or deliberately"),
        LD_PRELOAD=" ".join(preload),
        ASAN_OPTIONS="detect_leaks=0",
        DAAM_TEST_SANITIZED="1",
    )


@pytest.mark.skipif(not SANITIZED, reason="only the sanitizers see it")
def test_a_deliberately_bad_call_is_noticed(compiled):
    host, driver = map(str, compiled)
    code = f"""
        import torch
        from pathlib import Path
        from native.cuda_library import Library
        library = Library(Path({host!r}), Path({driver!r}))
        x, ones, y = torch.randn(4, 64), torch.ones(1, 1), torch.empty(4, 64)
        y.untyped_storage().resize_(y.nbytes - 4)  # y keeps its shape
        library.forward(x, ones, ones, y=y)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-2000:]


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'daam_forward_rows_float32' for 'sm_80'
ptxas info    : Function properties for daam_forward_rows_float32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 672 bytes cmem[0]
ptxas info    : Function properties for _ZN4daam4cuda17quadratic_by_warpERKNS0_4TaskEl
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'daam_parameter_gradients' for 'sm_80'
ptxas info    : Function properties for daam_parameter_gradients
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 58 registers, used 1 barriers, 672 bytes cmem[0]
"""
PTX = """\
.visible .entry daam_forward_rows_float32(
cp.async.cg.shared.global [%r3], [%rd4], 16;
ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2];
st.global.v4.f32 [%rd7], {%f1, %f2, %f3, %f4};
.visible .entry daam_parameter_gradients(
cp.async.ca.shared.global [%r3], [%rd4], 4;
ld.global.f32 %f1, [%rd2];
ld.global.nc.v2.u32 {%r1, %r2}, [%rd2];
st.global.v4.u16 [%rd7], {%rs1, %rs2, %rs3, %rs4};
"""


def test_the_report_on_machine_code_is_read():
    assert read_report(REPORT, PTX) == [
        Compiled("daam_forward_rows_float32", "sm_80", registers=80, spilled=12, wide_loads=2, wide_stores=1),
        Compiled("daam_parameter_gradients", "sm_80", registers=58, spilled=0, wide_loads=0, wide_stores=0),
    ]
    for word in ("spill", "Used", "for 'sm"):
        with pytest.raises(RuntimeError, match="not what ptxas"):
            read_report(REPORT.replace(word, "otherwise"), PTX)


def test_faults_of_machine_code_are_found():
    good = [Compiled(name, a, 80, 0, 1, 1) for name in KERNELS for a in ARCHITECTURES]
    assert len(good) == 31 * 3 and not faults(good)
    assert good[0][:2] == ("daam_forward_rows_float32", "sm_80")
    for change, fault in (
        (dict(spilled=8), "spills 8 bytes on sm_80"),
        (dict(wide_loads=0), "has 0 loads and 1 stores of 16 bytes"),
        (dict(wide_stores=0), "has 1 loads and 0 stores of 16 bytes"),
    ):
        assert faults([good[0]._replace(**change), *good[1:]]) == [f"daam_forward_rows_float32 {fault}"]
    strided = [k._replace(wide_loads=0, wide_stores=0) for k in good if "_strided_" in k.name]
    assert not faults([*strided, *(k for k in good if "_strided_" not in k.name)])
    for kernels in (good[:-1], [], [*good, good[0]]):
        (found,) = faults(kernels)
        assert found.startswith(f"{len(kernels)} kernels, not 31")


def _pytest(*arguments, **variables):
    """pytest on the emulation, in a process of its own, which sees no GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    usual = {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "", "CUDA_VISIBLE_DEVICES": ""}
    variables = {**usual, **variables, "PYTHONPATH": paths}
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout
