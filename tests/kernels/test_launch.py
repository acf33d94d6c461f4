"""Launch configurations, checked without a GPU: every slice is covered once, nothing is larger than a GPU allows."""

from itertools import product
from math import gcd, prod

import pytest
import torch
from benchmarks.kernels.shapes import SHAPES
from benchmarks.tune.candidates import neighbours
from hypothesis import given
from hypothesis import strategies as st

from daam_kernels.kernels import launch, tiling
from daam_kernels.kernels.launch import density_launch
from daam_kernels.kernels.tiling import density_tile, fits_block
from daam_kernels.ops.density_attention import _MOST_RESIDENT
from daam_kernels.slices import packed_view, slice_view

FLAGS = {"PADDED": False, "MIXTURE": False, "NORMALISED": True, "PER_FEATURE": False}


def view_of(outer, length, inner):
    return slice_view((outer, length, inner), 1, (length * inner, inner, 1), (length * inner, inner, 1))


@given(
    outer=st.integers(1, 1 << 20),
    heads=st.integers(1, 70),
    extra=st.integers(0, 1 << 22),
    inner=st.integers(1, 1 << 16),
    itemsize=st.sampled_from([2, 4, 8]),
    backward=st.booleans(),
    padded=st.booleans(),
)
def test_tiles_cover_every_slice_and_fit(outer, heads, extra, inner, itemsize, backward, padded):
    length = 2 * heads + extra
    longest = length - (heads - 1) * (length // heads)
    view = view_of(outer, length, inner)
    tile = density_tile(view, heads, itemsize, backward, padded)
    assert_covers(tile, view, heads, itemsize)
    if tile.num_chunks:
        assert tiling.power_of_two(tile.num_chunks) * tile.block_s <= 2 * tiling.BUDGET.merged
    elif tile.looped:
        assert longest * tile.block_s * itemsize <= tiling._CACHED
    else:
        assert longest <= tile.block_r < 2 * longest


@given(
    outer=st.integers(1, 1 << 20),
    heads=st.integers(1, 70),
    extra=st.integers(0, 1 << 22),
    inner=st.integers(1, 1 << 16),
    itemsize=st.sampled_from([2, 4, 8]),
    backward=st.booleans(),
    steps=st.lists(st.integers(0, 20), max_size=4),
)
def test_every_choice_without_a_fault_covers_every_slice_and_fits(
    outer, heads, extra, inner, itemsize, backward, steps
):
    """Those that the tuner can come upon, starting from the ladder's."""
    view = view_of(outer, 2 * heads + extra, inner)
    problem = tiling.density_problem(view, heads, itemsize, backward)
    choice = tiling.ladder(problem)
    assert not tiling.fault(problem, choice)
    for step in steps:
        around = neighbours(problem, choice)
        assert choice not in around
        if around:
            choice = around[step % len(around)]
            assert_covers(tiling.cut(problem, choice), view, heads, itemsize)


def assert_covers(tile, view, heads, itemsize):
    outer, length, inner = view.outer, view.length, view.inner
    longest = length - (heads - 1) * (length // heads)
    assert tile.block_r & (tile.block_r - 1) == 0 and tile.block_s & (tile.block_s - 1) == 0
    if tile.num_chunks:
        assert (
            tile.num_chunks * tile.tiles * tile.block_r >= longest > (tile.num_chunks - 1) * tile.tiles * tile.block_r
        )
        assert tile.num_chunks <= 65535  # of a grid's second axis
    else:
        assert tile.tiles * tile.block_r >= longest > (tile.tiles - 1) * tile.block_r
    rows, slices = tile.block_r * tile.tiles * max(1, tile.num_chunks), tile.num_blocks * tile.block_s
    if tile.whole:  # what the programs take is what there is, to the element
        assert rows * heads * slices == length * outer * inner
    else:
        assert rows * heads * slices > length * outer * inner or length % heads
    if tile.columns:
        assert tile.num_blocks % outer == 0
        assert tile.num_blocks // outer * tile.block_s >= inner > (tile.num_blocks // outer - 1) * tile.block_s
    else:
        assert tile.num_blocks * tile.block_s >= outer * inner > (tile.num_blocks - 1) * tile.block_s
    assert 1 <= tile.num_warps <= 16 and 32 * tile.num_warps * tile.registers <= 65536
    elements = 16384 if itemsize < 8 else 4096
    assert tile.block_r * tile.block_s <= elements
    assert itemsize * tile.vec <= 16


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", ["columns", "rows", "one feature"])
def test_tiles_cover_packed_sequences_of_every_length(monkeypatch, layout, heads):
    """Up to max_seqlen: that of 15 leaves the last of 8 heads 8 elements, that of 16 two."""
    features = 1 if layout == "one feature" else 36
    strides = (features, 1) if layout == "columns" else (1, 1000)
    budget = tiling.Budget(32, 256, 32, 256, split=32, split_forward=32, usual=32, merged=64)
    monkeypatch.setattr(tiling, "BUDGET", budget)
    seen = set()
    for max_seqlen in range(2 * heads, 90):
        view = packed_view(5, max_seqlen, features, strides, strides)
        tile = density_tile(view, heads, 4, False)
        longest = max(n // heads + n % heads for n in range(2 * heads, max_seqlen + 1))
        assert tile.block_r * tile.tiles * max(1, tile.num_chunks) >= longest
        assert tile.num_blocks == 5 * -(-features // tile.block_s)  # the slices of a block are of one sequence
        assert tile.columns == (layout == "columns") and tile.vec == (4 if tile.columns else 1)
        values = density_launch(view, ("y", "x"), heads, 2, 4, FLAGS).values
        assert values["num_slices"] == 5 * heads * features and values["x_stride_o"] == 0
        seen.add(tile.resident)
    assert True in seen and (False in seen or heads > 2)


@given(
    outer=st.integers(1, 1 << 10),
    heads=st.integers(1, 8),
    chunk=st.integers(2, 1 << 15),
    inner=st.integers(1, 1 << 12),
    unit=st.sampled_from(["r", "i", "none"]),
    layers=st.integers(2, tiling.MOST_LAYERS),
    itemsize=st.sampled_from([2, 4, 8]),
    backward=st.booleans(),
    padded=st.booleans(),
)
def test_a_block_that_fits_is_not_split_whatever_the_strides(
    outer, heads, chunk, inner, unit, layers, itemsize, backward, padded
):
    length = heads * chunk
    strides = {"r": (inner * length, 1, length), "i": (inner * length, inner, 1), "none": (0, 2 * inner, 2)}[unit]
    x = (inner * length, 1, 1) if unit == "i" else strides  # overlapping windows: rows by the norm axis alone
    for dense in (strides, x):
        view = slice_view((outer, length, inner), 1, strides, dense)
        columns = dense[1] != 1
        if view is not None and fits_block(length, heads, layers, itemsize, backward, columns, padded):
            tile = density_tile(view, heads, itemsize, backward, padded, layers)
            assert tile.num_chunks == 0 and tile.block_r >= chunk
            assert tile.num_warps <= (8 if tile.columns or backward else 16)


@pytest.mark.parametrize("unit", ["r", "i"])
@pytest.mark.parametrize("itemsize, padded", list(product([2, 4, 8], [False, True])))
def test_slices_of_which_a_sum_of_gaussians_saves_nothing_are_never_split(itemsize, padded, unit):
    """The backward pass would have to go over x twice more."""
    for inner, length in product((1, 8, 33, 4096), (_MOST_RESIDENT, _MOST_RESIDENT - 1)):
        strides = (inner * length, 1, length) if unit == "r" else (inner * length, inner, 1)
        view = slice_view((1 << 12, length, inner), 1, strides, strides, strides)
        for backward in (False, True):
            assert density_tile(view, 1, itemsize, backward, padded).num_chunks == 0


@pytest.mark.parametrize("backward", [False, True])
def test_blocks_whose_slices_fit(backward):
    for layers, rows in ((3, 4096), (6, 2048)):
        rows = rows if backward else 16384
        assert fits_block(rows, 1, layers, 4, backward, False, False)
        assert not fits_block(rows + 1, 1, layers, 4, backward, False, False)
    assert fits_block(8 * 64, 8, 6, 2, backward, True, False)
    assert not fits_block(8 * 2, 8, tiling.MOST_LAYERS + 1, 4, backward, False, False)
    assert not fits_block(8 * 2, 8, 4, 4, backward, True, True)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("shape, axis", [((64, 4000), 1), ((8, 24, 1024), 1), ((64, 2048, 512), 1), ((2, 40, 5120), 1)])
def test_sizes_are_divided_by_what_divides_all_of_them(shape, axis, itemsize):
    dense = torch.empty(shape, device="meta").stride()
    view = slice_view(shape, axis, dense, dense)
    values = density_launch(view, ("y", "x"), 4, 5, itemsize, FLAGS).values
    vec = 16 // itemsize
    assert values["VEC"] == vec
    if values["COLUMNS"]:
        assert (values["inner"] * vec, values["chunk"]) == (view.inner, view.length // 4)
        assert values["x_stride_i"] == 1 and values["x_stride_r"] * vec == view.strides[1][1]
    else:
        assert (values["chunk"] * vec, values["length"] * vec) == (view.length // 4, view.length)
        assert values["x_stride_r"] == 1
    assert values["x_stride_o"] * vec == view.strides[1][0]


@pytest.mark.parametrize("shape, axis", [((64, 4001), 1), ((8, 24, 1023), 1)])
def test_odd_sizes_are_not_divided(shape, axis):
    dense = torch.empty(shape, device="meta").stride()
    view = slice_view(shape, axis, dense, dense)
    assert density_launch(view, ("y", "x"), 3, 5, 4, FLAGS).values["VEC"] == 1


def test_the_contiguous_axis_decides_what_neighbours_in_a_tile_are():
    channels_last = torch.empty(8, 256, 14, 14, device="meta").to(memory_format=torch.channels_last)
    view = slice_view(channels_last.shape, 1, channels_last.stride(), channels_last.stride())
    assert (view.outer, view.length, view.inner) == (8 * 14 * 14, 256, 1)
    assert not density_tile(view, 8, 4, False).columns
    assert density_tile(view_of(8, 256, 196), 8, 4, False).columns


def test_few_long_slices_are_split_over_the_whole_gpu():
    for view, processors in product((view_of(1, 1 << 24, 1), view_of(4, 1 << 20, 8)), PROCESSORS.values()):
        for backward in (False, True):
            tile = density_tile(view, 1, 4, backward, processors=processors)
            assert 2 * processors <= tile.num_chunks * tile.num_blocks <= 4 * processors
    assert density_tile(view_of(1 << 16, 1 << 16, 1), 1, 4, False).num_chunks == 1  # enough slices as they are


def modes(shape, axis, heads, itemsize, **options):
    """How a forward and a backward pass over a contiguous tensor go about their slices."""
    dense = torch.empty(shape, device="meta").stride()
    for names in (("y", "x"), ("dx", "x", "g")):
        flags = dict(FLAGS, PADDED=options.get("padded", False), MIXTURE=options.get("mixture", False))
        flags["NORMALISED"] = options.get("normalised", True)
        tile = density_launch(slice_view(shape, axis, *[dense] * len(names)), names, heads, 4, itemsize, flags).tile
        yield "resident" if tile.resident else "looped" if tile.looped else "split"


@pytest.mark.parametrize("itemsize", [2, 4])
def test_slices_that_the_cache_holds_are_looped_over(itemsize):
    """One launch forward and two backward, whatever their length: frames, feature maps of 256 channels, layers."""
    assert list(modes((64, 2048, 512), 1, 8, itemsize)) == ["looped", "looped"]
    assert list(modes((32, 256, 56 * 56), 1, 1, itemsize)) == ["looped", "looped"]
    assert list(modes((64, 2048, 512), 1, 8, itemsize, padded=True)) == ["looped", "looped"]
    assert list(modes((32, 40, 5120), 1, 8, itemsize)) == ["looped", "looped"]  # slices of 5
    assert list(modes((2, 24, 1024), 1, 8, itemsize)) == ["resident", "resident"]  # too few for a processor each
    assert list(modes((1, 2048, 512), 1, 1, itemsize)) == ["split", "split"]  # 8 programs would leave a GPU idle
    assert list(modes((1 << 13, 4096), 1, 1, itemsize)) == ["resident", "looped" if itemsize == 2 else "resident"]
    assert list(modes((1 << 9, 4096), 1, 1, itemsize)) == ["resident", "resident"]  # a warp each would be too few
    rows = 1 << 15
    assert list(modes((512, rows), 1, 1, itemsize)) == ["looped", "looped"]
    assert list(modes((512, 4 * rows), 1, 1, itemsize)) == ["split", "split"]  # 256 kB of x and more
    assert list(modes((1, 2048, 512), 1, 1, itemsize, mixture=True)) == ["split", "split"]
    for shape, axis, heads in (((64, 2048, 512), 1, 8), ((32, 256, 56 * 56), 1, 1), ((64, 512, 2048), 2, 8)):
        assert list(modes(shape, axis, heads, itemsize, mixture=True)) == ["resident", "looped"]
        gate = modes(shape, axis, heads, itemsize, mixture=True, normalised=False)
        assert "looped" not in gate  # which has no such kernels, nor has the mixture forward
    assert list(modes((1 << 20, 64), 1, 1, itemsize, mixture=True)) == ["resident", "resident"]  # nothing to share


def test_the_number_of_gaussians_changes_one_block_size_alone():
    view = view_of(64, 2048, 512)
    one, many = (density_launch(view, ("y", "x"), 8, k, 4, FLAGS) for k in (1, 64))
    assert one.tile == many.tile
    differing = {name for name in one.values if one.values[name] != many.values[name]}
    assert differing == {"BLOCK_K", "num_gaussians"}


PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}  # A100, H200, B200


def tiles_of(shape, itemsize, processors):
    """(problem, tile) of both directions of a shape of the performance page."""
    x = torch.empty(shape.dims, device="meta")
    dense = (x.to(memory_format=torch.channels_last) if shape.channels_last else x).stride()
    for backward in (False, True):
        layouts = (dense,) * (3 if backward else 2)
        if shape.sequences:
            view = packed_view(len(shape.sequences), max(shape.sequences), shape.dims[1], *layouts)
        else:
            view = slice_view(shape.dims, shape.norm_axis % x.dim(), *layouts)
        mixed = (shape.num_gaussians or 4) if shape.operator == "mixture" else 0
        density = "mixture" if mixed else "product"
        problem = tiling.density_problem(view, shape.num_heads, itemsize, backward, False, 1, mixed, density)
        yield problem, tiling.cut(problem, tiling.ladder(problem, processors), processors)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("architecture", PROCESSORS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_ladder_is_sensible_for_the_shapes_that_count(name, architecture, itemsize):
    """On each of the architectures, all of which have 65536 registers and 2048 threads a processor.

    A register model, of 4 bytes each: x and the weight of an element, the gradient too in a backward pass; the
    statistics of each slice that a thread has a part of, as many as it loads at once in columns; addresses. It says 68
    to 224 of six kernels for which the compiler takes 75 to 235 on sm_90. A thread that loops keeps sums for each of
    its places, up to three forward and eight backward: 112 and 160, for which the compiler takes 99 to 128 and 167.
    """
    processors = PROCESSORS[architecture]
    for problem, tile in tiles_of(SHAPES[name], itemsize, processors):
        threads, words = 32 * tile.num_warps, max(1, itemsize // 4)
        elements = -(-tile.block_r * tile.block_s // threads)
        of_element, of_slice = (3, 20) if problem.backward else (2, 12)
        if tile.looped:
            of_element, of_slice = (11, 4) if problem.backward else (4, 5)
        registers = words * (elements * of_element + of_slice * (tile.vec if tile.columns else 1))
        assert registers + 40 <= tile.registers <= 65536 // threads
        assert tile.vec == gcd(16 // itemsize, problem.inner if tile.columns else problem.chunk)
        if tile.columns:  # bytes beside each other that a warp reads of a row
            narrowest = 64 if tile.block_r * 128 // itemsize > tiling.BUDGET.forward_columns // 4 else 128
            assert tile.block_s * itemsize >= min(narrowest, problem.inner * itemsize)
        else:  # beside each other in a slice; a loop asks for two tiles at once
            assert tile.block_r * itemsize >= min(64 if tile.looped else 512, problem.longest * itemsize)
        programs = tile.num_blocks * problem.num_heads * max(1, tile.num_chunks)
        numel = problem.outer * problem.length * problem.inner
        few = numel <= processors * tiling.BUDGET.usual // words**2  # not even a tile for each processor
        assert programs >= 0.9 * processors or few


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "narrow": lambda t: torch.cat((t, t), -1).narrow(-1, 1, t.shape[-1]),
    "expanded": lambda t: t[:1].expand(t.shape),
    "channels first to last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_view_has_the_elements_of_its_tensor(layout, axis):
    x = LAYOUTS[layout](torch.arange(3 * 4 * 5).view(3, 4, 5))
    out = torch.empty_like(x)
    view = slice_view(x.shape, axis, out.stride(), x.stride())
    assert view is not None and view.outer * view.length * view.inner == x.numel()
    sizes = (view.outer, view.length, view.inner)
    seen = torch.as_strided(x, sizes, view.strides[1], x.storage_offset())
    written = torch.as_strided(out.copy_(x), sizes, view.strides[0])
    assert torch.equal(seen, written)
    assert torch.equal(seen.sum(1).flatten().sort().values, x.sum(axis).flatten().sort().values)


def test_no_view_where_the_axes_do_not_merge():
    x = torch.empty(4, 6, 8, 10)[:, :3]
    assert slice_view(x.shape, 3, torch.empty(x.shape).stride(), x.stride()).strides[1] == (480, 1, 10)
    x = torch.empty(4, 6, 8, 10)[:, :3, :, :5]
    assert slice_view(x.shape, 2, torch.empty(x.shape).stride(), x.stride()) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_every_dense_layout_has_a_view(shape, data):
    order = data.draw(st.permutations(range(len(shape))))
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    view = slice_view(x.shape, axis, x.stride(), x.stride())
    assert view is not None and view.length == shape[axis] and view.outer * view.inner * view.length == prod(shape)


@pytest.mark.parametrize("shape", [(64, 2048, 8), (1, 1 << 20, 1), (4, 65536, 64)], ids=str)
def test_every_tile_of_a_mixture_has_partial_sums_of_its_own(shape):
    one, many = (
        density_launch(view_of(*shape), ("dx", "x"), 1, 4, 4, dict(FLAGS, MIXTURE=mixture)) for mixture in (False, True)
    )
    tile = many.tile
    assert one.values["num_partials"] == one.tile.num_blocks
    assert many.values["num_partials"] == tile.num_blocks * max(1, tile.num_chunks) * tile.tiles
    assert many.values["BLOCK_P"] >= min(launch._REDUCTION, many.values["num_partials"])


@pytest.mark.parametrize("shape, heads, whole", [
    ((64, 2048, 1), 8, True), ((64, 2048, 512), 8, True), ((1, 1 << 20, 1), 1, True), ((63, 2048, 1), 8, False),
    ((64, 2000, 1), 8, False), ((64, 2049, 1), 8, False), ((64, 2048, 500), 8, False), ((1, 1000000, 1), 1, False),
])  # fmt: skip
def test_where_every_tile_is_whole(shape, heads, whole):
    assert density_tile(view_of(*shape), heads, 4, False).whole == whole


def test_a_packed_tile_is_never_whole():
    assert not density_tile(packed_view(4, 2048, 512, (512, 1), (512, 1)), 8, 4, False).whole


def test_a_thread_has_more_elements_where_exponentials_take_the_time():
    def elements_and_registers(itemsize, num_mixed, shape=(64, 8192, 1), backward=False, padded=False):
        tile = density_tile(view_of(*shape), 1, itemsize, backward, padded, 1, num_mixed)
        return tile.block_r * tile.block_s // (32 * tile.num_warps), tile.registers

    assert elements_and_registers(2, 4) == (64, 255) and elements_and_registers(4, 4) == (32, 128)
    assert elements_and_registers(2, 8) == (32, 128) and elements_and_registers(4, 8) == (32, 128)
    assert elements_and_registers(2, 4, shape=(64, 8000, 1)) == (16, 128)
    assert elements_and_registers(2, 4, padded=True) == (16, 128)
    for plain in ({"num_mixed": 0}, {"num_mixed": 4, "backward": True}):
        assert elements_and_registers(2, **plain) == (16, 128)


def test_a_thread_has_more_elements_where_programs_are_many():
    def elements(shape=(1 << 14, 2048, 1), itemsize=2, backward=False, **options):
        tile = density_tile(view_of(*shape), 1, itemsize, backward, **options)
        return tile.block_r * tile.block_s // (32 * tile.num_warps)

    assert elements() == elements(itemsize=4) == elements((1 << 14, 256, 1)) == 32
    others = (64, 2048, 1), (1 << 14, 2000, 1), (1 << 17, 128, 1)  # few programs, masks, short slices
    assert [elements(shape) for shape in others] == [8] * 3
    assert elements(padded=True) == elements(num_layers=3) == 8
    assert elements(itemsize=4, backward=True) == 16
    assert elements(others[0], backward=True) == 8


@pytest.mark.parametrize("num_mixed", [0, 4])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("length", [128, 256, 512, 1000, 1024, 1 << 14])
def test_rows_are_looped_over_backward_by_few_threads_each(length, itemsize, num_mixed):
    """What a thread does once for a slice is shared by 32 elements at least; the cache has 8 kB a warp, of x and g."""
    density = "mixture" if num_mixed else "product"
    problem = tiling.density_problem(view_of(1 << 16, length, 1), 1, itemsize, True, False, 1, num_mixed, density)
    tile = tiling.cut(problem, tiling.ladder(problem))
    threads, rows = 32 * tile.num_warps, tiling.power_of_two(length)
    assert tile.looped and tile.block_r * tile.block_s * itemsize == 16 * threads
    assert rows * tile.block_s >= 32 * threads
    assert rows * tile.block_s * itemsize <= 4096 * tile.num_warps or tile.num_warps == 8
    assert 64 <= tile.block_r * itemsize


def test_rows_that_are_not_looped_over_backward():
    def looped(shape, itemsize=2):
        return density_tile(view_of(*shape), 1, itemsize, True).looped

    assert looped((1 << 16, 256, 1)) and not looped((1 << 10, 256, 1))  # too few warps
    assert not looped((1 << 16, 64, 1)) and not looped((1 << 16, 301, 1))  # short; not 16 bytes at a time
    assert not (looped((1 << 16, 301, 1), 4) or looped((1 << 16, 2048, 1), 4) or looped((1 << 16, 256, 1), 8))
    few = tiling.density_problem(view_of(16, 256, 1), 1, 4, True, num_mixed=4, density="mixture")
    assert tiling.cut(few, tiling.ladder(few)).resident


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1 << 12, 2048, 1), (64, 2048, 512)], ids=["rows", "columns"])
def test_up_to_four_gaussians_have_one_place_for_the_sums_of_all_tiles(shape, itemsize):
    def backward(num_gaussians, heads=8, **flags):
        flags = {**FLAGS, "MIXTURE": True, **flags}
        outer, length, inner = shape
        view = slice_view(shape, 1, *[(length * inner, inner, 1)] * 3)
        return density_launch(view, ("dx", "x", "g"), heads, num_gaussians, itemsize, flags)

    for k in (1, 4, 5):
        launch = backward(k)
        known = k if k <= 4 and itemsize < 8 else 0  # numbers of float64 take two registers
        assert launch.tile.looped and launch.values["UNROLLED"] == known
        assert launch.values["num_partials"] == launch.tile.num_blocks * (1 if known else launch.tile.tiles)
    masked = backward(4, PADDED=True)
    assert masked.values["UNROLLED"] == (4 if shape[2] == 1 and itemsize < 8 else 0)  # masks take registers in columns


@pytest.mark.parametrize("num_gaussians, padded, known", [(4, False, 4), (4, True, 0), (5, False, 0)])
def test_up_to_four_gaussians_have_one_place_for_the_sums_of_a_run(num_gaussians, padded, known):
    view = slice_view((1, 1 << 20), 1, *[(1 << 20, 1)] * 3)
    flags = dict(FLAGS, MIXTURE=True, PADDED=padded)
    launch = density_launch(view, ("dx", "x", "g"), 1, num_gaussians, 4, flags)
    tile = launch.tile
    assert tile.num_chunks > 1 and launch.values["UNROLLED"] == known
    assert launch.values["num_partials"] == tile.num_blocks * tile.num_chunks * (1 if known else tile.tiles)


@pytest.mark.parametrize("itemsize, most", [(2, 4), (4, 8)])
def test_few_gaussians_of_a_mixture_are_known_to_the_compiler(itemsize, most):
    def unrolled(shape, num_gaussians, **flags):
        flags = {**FLAGS, "MIXTURE": True, **flags}
        return density_launch(view_of(*shape), ("y", "x"), 1, num_gaussians, itemsize, flags).values["UNROLLED"]

    assert [unrolled((64, 8192, 1), k) for k in (1, most, most + 1)] == [1, most, 0]
    assert unrolled((64, 256, 1), 4) == 0  # of 8 slices in a tile
    assert unrolled((64, 2048, 64), 2) == 0
    assert unrolled((64, 8192, 1), 2, MIXTURE=False) == unrolled((64, 8192, 1), 2, NORMALISED=False) == 0
