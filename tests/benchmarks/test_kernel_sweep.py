"""The kernel benchmark judges before it times, and goes on where a contender is wrong, missing or failing."""

import math
from functools import partial

import pytest
import torch

from benchmarks.kernels import sweep
from benchmarks.kernels.bare import BARE, BARE_FRESH, BARE_HUGE
from benchmarks.kernels.cell import new_cell
from benchmarks.kernels.check import complaint, errors, relative_error, truth
from benchmarks.kernels.contender import BACKWARD, BOTH, DIRECTIONS, FORWARD
from benchmarks.kernels.contenders import (
    CLOSED_FORM,
    CLOSED_FORM_COMPILED,
    COPY,
    FRESH_COPY,
    FUSED,
    UPSTREAM,
    UPSTREAM_COMPILED,
    contenders,
)
from benchmarks.kernels.data import make_case
from benchmarks.kernels.shapes import SHAPES, Shape
from benchmarks.kernels.table import section
from daam_kernels import native, reference

LIMITS = sweep.Limits(budget=0.0, call=60.0)
needs_native = pytest.mark.skipif(not native.status()[0], reason="the native library is not there")


FAMILY = [
    dict(operator="mixture"),
    dict(operator="block", layers=3),
    dict(operator="gate"),
    dict(operator="ragged", dims=(19, 6), axis=0, sequences=(5, 4, 10)),
]


def small_case(dtype=torch.float32, dims=(4, 12, 6), axis=1, **options):
    return make_case(Shape("small", dims, axis, 2, **options), dtype, torch.device("cpu"), 3)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """These tensors are small, and collecting garbage after each of them is most of what a test takes."""
    monkeypatch.setattr(sweep, "release", lambda case: None)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_truth_is_the_float64_reference_however_it_is_cut(monkeypatch, axis):
    monkeypatch.setattr("benchmarks.kernels.check._PART", 60)
    case = small_case(dims=(5, 12, 6), axis=axis)
    x, *parameters = (t.detach().double().requires_grad_() for t in (case.x, case.mean_offsets, case.c))
    y = reference.density_attention(x, *parameters, norm_axis=axis)
    gradients = torch.autograd.grad(y, (x, *parameters), case.grad.double())
    true = truth(case)
    for result, expected in zip((true.y, true.dx, *true.parameters), (y, *gradients)):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [UPSTREAM, CLOSED_FORM, FUSED])
def test_contenders_are_right(name, dtype):
    if name == UPSTREAM:
        pytest.importorskip("gaussian_adaptive_attention")
    case = small_case(dtype)
    contender, true = contenders(case)[name](), truth(case)
    for direction in DIRECTIONS:
        found = errors(direction, contender(direction, case.x, case.grad), true)
        assert complaint(contender, found) is None
        assert (found.y is None, found.dx is None) == (direction == BACKWARD, direction == FORWARD)


@pytest.mark.parametrize("options", FAMILY, ids=lambda options: options["operator"])
def test_all_of_the_family_are_checked_and_right(options):
    others = {"block": {UPSTREAM, f"{FUSED}, layer by layer"}, "ragged": {f"{FUSED}, one by one"}}
    expected, never = others.get(options["operator"], set()), {UPSTREAM_COMPILED, BARE}
    for dtype in (torch.float64, torch.bfloat16):
        case = small_case(dtype, **options)
        true, makers = truth(case), contenders(case)
        assert expected | {CLOSED_FORM, FUSED} <= set(makers) and not never & set(makers)
        assert (UPSTREAM in makers) == (UPSTREAM in expected)
        for name in (CLOSED_FORM, FUSED, *expected):
            if name == UPSTREAM:
                pytest.importorskip("gaussian_adaptive_attention")
            contender = makers[name]()
            for direction in DIRECTIONS:
                results = contender(direction, case.x, case.grad)
                assert complaint(contender, errors(direction, results, true)) is None
            assert len(results) >= 2 + len(case.parameters)  # of the last direction, both
            wrong = [*results[:-1], results[-1] * 1.5]
            assert dtype == torch.bfloat16 or "parameters" in complaint(contender, errors(BOTH, wrong, true))


@pytest.mark.parametrize("options", FAMILY, ids=lambda options: options["operator"])
def test_truth_of_the_family_is_the_same_however_it_is_cut(monkeypatch, options):
    case = small_case(**options)
    whole = truth(case)
    monkeypatch.setattr("benchmarks.kernels.check._PART", 60)
    cut = truth(case)
    assert len(whole.parameters) == len(case.parameters)
    for a, b in zip((cut.y, cut.dx, *cut.parameters), (whole.y, whole.dx, *whole.parameters)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_second_backend_of_a_gpu_is_timed_and_judged_too(monkeypatch):
    case = small_case()
    assert f"{FUSED}, cuda" not in contenders(case)
    monkeypatch.setattr("benchmarks.kernels.contenders._other_backends", lambda case: ["reference"])
    contender = contenders(case)[f"{FUSED}, reference"]()
    assert complaint(contender, errors(BOTH, contender(BOTH, case.x, case.grad), truth(case))) is None
    assert contender.tolerance == contenders(case)[FUSED]().tolerance


def test_packed_sequences_are_estimated_on_a_part_of_them(monkeypatch):
    case = small_case(**FAMILY[-1])
    monkeypatch.setattr(sweep, "_PROBE", 7 * 6)
    assert sweep._excess(case, BOTH, contenders(case)[CLOSED_FORM](), LIMITS) is None
    ragged = SHAPES["ragged"]
    assert sum(ragged.sequences) == ragged.dims[0] and min(ragged.sequences) == 10 and max(ragged.sequences) == 4000
    assert len(set(ragged.sequences)) == 256


def test_gaussians_of_a_shape_come_first_and_many_are_not_compiled():
    case = small_case(num_gaussians=20)
    assert case.num_gaussians == 20 and UPSTREAM in contenders(case)
    assert UPSTREAM_COMPILED not in contenders(case) and UPSTREAM_COMPILED in contenders(small_case())


def test_a_sweep_of_the_family(monkeypatch):
    def few(case):
        makers = contenders(case)
        return {name: make for name, make in makers.items() if name.startswith((FUSED, COPY))}

    monkeypatch.setattr(sweep, "contenders", few)
    for options in FAMILY:
        for group in sweep.measure(small_case(**options), LIMITS, lambda what, share: None):
            assert all(cell.status == "ok" and cell.wall_us and cell.over_upstream is None for cell in group)
            assert group[0].operator == options["operator"] in section(group)
            assert ("3 layers" in section(group)) == (group[0].layers == 3)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [BARE, BARE_FRESH, BARE_HUGE])
def test_bare_kernels_keep_the_contract_of_the_fused_operator(monkeypatch, name, dtype):
    monkeypatch.setattr("benchmarks.kernels.bare._FRESH_MATTERS", 0)
    case = small_case(dtype)
    makers, true = contenders(case), truth(case)
    contender = makers[name]()
    assert contender.tolerance == makers[FUSED]().tolerance
    for direction in DIRECTIONS:
        first, second = (contender(direction, case.x, case.grad) for _ in range(2))
        assert complaint(contender, errors(direction, first, true)) is None
        made_anew = [a.data_ptr() != b.data_ptr() for a, b in zip(first, second)]
        assert set(made_anew[: 2 if direction == BOTH else 1]) == {name != BARE}


@needs_native
@pytest.mark.parametrize("environment", [0, native._HUGE_PAGES], ids=["not set", "set"])
def test_only_one_bare_kernel_asks_for_huge_pages_whatever_the_environment_says(monkeypatch, environment):
    monkeypatch.setattr("benchmarks.kernels.bare._FRESH_MATTERS", 0)
    monkeypatch.setattr(native, "_library", lambda library=native._library(): library._replace(flags=environment))
    native._problem.cache_clear()
    try:
        case = small_case()
        makers = contenders(case)
        for name, expected in ((BARE, 0), (BARE_FRESH, 0), (BARE_HUGE, native._HUGE_PAGES)):
            contender = makers[name]()
            for problem in (contender.forward, contender.backward):
                assert problem.structure.flags & native._HUGE_PAGES == expected
    finally:
        native._problem.cache_clear()


def test_bare_kernels_are_left_out_without_the_library_and_fresh_ones_for_small_tensors(monkeypatch):
    names = list(contenders(small_case()))
    assert BARE_FRESH not in names and BARE_HUGE not in names and FRESH_COPY in names
    monkeypatch.setattr(native, "status", lambda: (False, "not built"))
    assert BARE not in contenders(small_case())


@pytest.mark.parametrize("result, error", [([3.0, 4.0], 0.0), ([3.0, 4.5], 0.1), ([3.0, math.nan], math.inf)])
def test_relative_error(monkeypatch, result, error):
    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor(result), true) == pytest.approx(error)
    monkeypatch.setattr("benchmarks.kernels.check._PART", 1)  # so that it is cut
    assert relative_error(torch.tensor(result), true) == pytest.approx(error)
    assert relative_error(torch.tensor(result[1]), true[1]) == pytest.approx(
        abs(result[1] - 4) / 4 if error < 1 else error
    )


def test_relative_error_of_another_shape_or_a_vanished_truth():
    assert relative_error(torch.zeros(2, 1), torch.zeros(2)) == math.inf
    assert relative_error(torch.full((2,), 1e-3), torch.zeros(2)) == 0.0


def test_a_wrong_a_failing_and_a_missing_contender_get_no_number(monkeypatch):
    def with_faults(case):
        makers = contenders(case)
        right = makers[CLOSED_FORM]()

        def wrong():
            contender = contenders(case)[CLOSED_FORM]()
            contender.function = lambda x, function=contender.function: function(x) * 1.01
            return contender

        def failing():
            contender = contenders(case)[CLOSED_FORM]()
            contender.function = lambda x: x.view(-1, 7)
            return contender

        def missing():
            raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

        return {"right": lambda: right, "wrong": wrong, "failing": failing, UPSTREAM: missing, COPY: makers[COPY]}

    monkeypatch.setattr(sweep, "contenders", with_faults)
    shares = []
    groups = list(sweep.measure(small_case(), LIMITS, lambda what, share: shares.append(share)))
    assert [group[0].direction for group in groups] == list(DIRECTIONS)
    assert sum(shares) == pytest.approx(1)
    for group in groups:
        right, wrong, failing, missing, copy = group
        assert (right.status, copy.status, copy.of_copy) == ("ok", "ok", 1.0)
        assert right.wall_us > 0 and right.of_copy > 0 and right.over_upstream is None
        assert right.gb_per_s == pytest.approx(right.bytes / right.wall_us / 1e3) and right.launches is None
        assert (wrong.status, wrong.wall_us) == ("wrong", None)
        assert wrong.note.startswith(f"error of {'dx' if wrong.direction == BACKWARD else 'y'} is 1.0e-02")
        assert (failing.status, failing.wall_us) == ("failed", None) and failing.note.startswith("RuntimeError")
        assert (missing.status, missing.note) == ("skipped", "nowhere is not installed")
        assert section(group).count("\n") == 3 + len(group)


@pytest.mark.parametrize(
    "limits, memory, note",
    [(sweep.Limits(0.0, 0.0), None, "limit 0 s"), (LIMITS, 1, "GB of memory")],
    ids=["too slow", "too large"],
)
def test_what_would_not_end_or_fit_is_skipped_with_the_reason(monkeypatch, limits, memory, note):
    monkeypatch.setattr(sweep, "_PROBE", 100)
    monkeypatch.setattr(sweep, "available_memory", lambda: memory)
    case = small_case()
    cell = new_cell(case.shape, case.x.dtype, BOTH, CLOSED_FORM)
    assert not sweep._admit(case, BOTH, contenders(case)[CLOSED_FORM](), limits, cell, truth(case))
    assert cell.status == "skipped" and note in cell.note and cell.error_y is None


def test_what_compiles_slowly_is_skipped_where_asked_or_where_its_eager_form_is(monkeypatch):
    case = small_case()
    eager = new_cell(case.shape, case.x.dtype, BOTH, UPSTREAM)
    assert sweep._not_compiled(None, LIMITS) is None
    assert sweep._not_compiled(eager, LIMITS) is None
    assert "--compile-upstream" in sweep._not_compiled(eager, sweep.Limits(0.0, 60.0, compile_slowly=False))
    eager.status = "skipped"
    assert sweep._not_compiled(eager, LIMITS) == "the eager form is skipped"

    def few(case):
        makers = contenders(case)
        return {name: makers[name] for name in (UPSTREAM, UPSTREAM_COMPILED, COPY)}

    pytest.importorskip("gaussian_adaptive_attention")
    monkeypatch.setattr(sweep, "contenders", few)
    limits = sweep.Limits(0.0, 60.0, compile_slowly=False)
    for eager, compiled, _ in sweep.measure(small_case(), limits, lambda what, share: None):
        assert (eager.status, compiled.status, compiled.wall_us) == ("ok", "skipped", None)


def test_compiled_forms_have_names_of_their_own():
    pytest.importorskip("gaussian_adaptive_attention")
    makers = contenders(small_case())
    for eager, compiled in ((UPSTREAM, UPSTREAM_COMPILED), (CLOSED_FORM, CLOSED_FORM_COMPILED)):
        assert (makers[eager]().name, makers[compiled]().name) == (eager, compiled)
        assert (makers[eager]().compiled, makers[compiled]().compiled) == (False, True)
    assert makers[UPSTREAM_COMPILED]().slow_to_compile and not makers[CLOSED_FORM_COMPILED]().slow_to_compile


def test_the_table_shows_fresh_memory_apart():
    group = []
    for name, microseconds in ((BARE, 2000.0), (BARE_FRESH, 5500.0), (BARE_HUGE, 3000.0)):
        cell = new_cell(small_case().shape, torch.float32, FORWARD, name)
        cell.wall_us, cell.peak_mb = microseconds, 0.0042
        group.append(cell)
    *table, last = section(group).splitlines()
    parts = "kernel alone 2.0 ms", "into fresh memory 5.5 ms (+3.5)", "with DAAM_KERNELS_HUGE_PAGES=1 3.0 ms (+1.0)"
    assert last == ", ".join(parts)
    assert table[2].split()[-2:] == ["peak", "MB"] and table[4].endswith("0.004")
    assert max(map(len, table)) < 120
    assert "fresh memory" not in section(group[:1]) and "HUGE" not in section(group[:2])


def test_the_backward_alone_is_the_backward_alone():
    case, forwards = small_case(), []
    for name in (CLOSED_FORM, FUSED):
        contender = contenders(case)[name]()
        function = contender.function
        contender.function = lambda x: forwards.append(name) or function(x)
        call = contender.prepare(BACKWARD, case.x, case.grad)
        first, second = call(), call()
        assert forwards.count(name) == 1
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_compiled_forms_keep_the_graph_of_a_backward_that_is_timed_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # no C++ compiler needed
    case = small_case()
    contender = contenders(case)[CLOSED_FORM_COMPILED]()
    assert not torch._functorch.config.donated_buffer  # else the inductor refuses
    call = contender.prepare(BACKWARD, case.x, case.grad)
    first = [t.clone() for t in call()]
    assert all(torch.equal(a, b) for a, b in zip(first, call()))
    assert complaint(contender, errors(BACKWARD, first, truth(case))) is None


def test_a_case_whose_data_does_not_fit_is_one_failed_row_a_direction(monkeypatch):
    shape = Shape("vast", (1 << 20, 1 << 20), 1, 1, num_gaussians=1)
    arguments = shape, torch.float32, torch.device("cpu"), 0, LIMITS, None
    (forward,), (backward,), (both,) = sweep.sweep(*arguments)
    assert (forward.direction, backward.direction, both.direction) == DIRECTIONS
    assert (both.contender, both.status) == (sweep.INPUTS, "failed") and both.note.startswith("MemoryError: x, its gra")
    assert "failed: MemoryError" in section([both])
    monkeypatch.setattr(sweep, "available_memory", lambda: None)
    assert "alloc" in next(sweep.sweep(*arguments))[0].note.lower()  # what torch itself says of 4 TB


def test_saved_memory_counts_what_the_backward_holds_beside_the_inputs():
    x, grad = torch.randn(100, requires_grad=True), torch.randn(100)
    with sweep._count_saved(x, grad) as saved:
        y = (x * 2).exp()  # saves its own result
        z = y * x  # saves y, which is there already, and x, which does not count
    assert saved() == 400
    torch.testing.assert_close(torch.autograd.grad(z, x, grad)[0], grad * (2 * x * y + y))


def test_saved_memory_is_that_of_the_moment_when_the_backward_begins():
    class SavesInItsBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.exp())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                (y,) = ctx.saved_tensors
                y = y.detach().requires_grad_()
                return torch.autograd.grad(y.exp().exp().sum(), y)[0] * grad

    x, grad, others = torch.randn(100, requires_grad=True), torch.randn(100), []
    with sweep._count_saved(x, grad) as saved:
        for _ in range(3):
            SavesInItsBackward.apply(x)  # and is freed
            others.append(torch.empty(100))  # where that was
        torch.autograd.grad(SavesInItsBackward.apply(x), x, grad)
    assert saved() == 400


def test_layout_of_the_channels_last_case():
    x = make_case(Shape("i", (2, 8, 3, 3), 1, 2, channels_last=True), torch.float32, torch.device("cpu"), 2).x
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def test_shapes_have_heads_of_two_elements_or_more():
    assert all(shape.dims[shape.norm_axis] >= 2 * shape.num_heads for shape in SHAPES.values())
