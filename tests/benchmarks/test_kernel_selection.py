"""What the command line of the kernel benchmark chooses, and what it says of words that it does not know."""

import pytest

from benchmarks.kernels import selection
from benchmarks.kernels.contender import BOTH, FORWARD
from benchmarks.kernels.contenders import COPY, FRESH_COPY, FUSED, UPSTREAM, UPSTREAM_COMPILED, all_names
from benchmarks.kernels.scaling import GROUPS
from benchmarks.kernels.shapes import SHAPES


@pytest.mark.parametrize("text", ["wavelm", "tiny,wavelm", ""])
def test_an_unknown_shape_is_named(text):
    with pytest.raises(SystemExit, match="unknown shape '(wavelm)?', known are wavlm.*, scaling and what"):
        selection.choose_shapes(text, on_gpu=False)


def test_shapes_are_named_by_themselves_or_by_their_group():
    names = [shape.name for shape in selection.choose_shapes("tiny, inner,inner_8", on_gpu=False)]
    assert names == ["tiny", *(f"inner_{n}" for n in (1, 2, 8, 32, 128, 512, 2048, 8192))]
    assert [shape.name for shape in selection.choose_shapes("slice_8", on_gpu=True)] == ["slice_8"]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_groups_grow_in_one_size_alone(on_gpu):
    slices, inner, size = (GROUPS[name](on_gpu) for name in ("slice", "inner", "size"))
    assert len({shape.numel for shape in slices}) == len({shape.numel for shape in inner}) == 1
    assert (slices[0].dims[-1], slices[-1].dims[-1]) == (8, 1 << 24)
    assert (inner[0].dims[-1], inner[-1].dims[-1]) == (1, 8192)
    assert 4 * size[-1].numel == (8 << 30 if on_gpu else 64 << 20)
    assert not {shape.name for shape in GROUPS["scaling"](on_gpu)} & set(SHAPES)


def test_gaussians_and_heads_multiply_shapes_that_leave_room_for_them():
    shapes = [SHAPES[name] for name in ("wavlm", "frames_k64", "jepa", "ragged", "long")]
    cases, notes = selection.multiply(shapes, [1, 4], [1, 8])
    found = [(shape.name, shape.num_gaussians, shape.num_heads) for shape in cases]
    expected = [("wavlm", 1, 1), ("wavlm", 4, 1), ("wavlm", 1, 8), ("wavlm", 4, 8), ("frames_k64", 64, 1)]
    assert found[:5] == expected and found[5:8] == [("frames_k64", 64, 8), ("jepa", 1, 1), ("jepa", 4, 1)]
    assert notes == ["ragged is left out with 8 heads: some would have less than two elements"]
    unchanged, _ = selection.multiply(shapes, None, None)
    assert [(s.num_gaussians, s.num_heads) for s in unchanged] == [(4, 8), (64, 8), (4, 1), (4, 4), (4, 1)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("upstream", {UPSTREAM, UPSTREAM_COMPILED}),
        ("fused (triton),upstream co", {name for name in all_names() if FUSED in name} | {UPSTREAM_COMPILED}),
        ("copy, fresh output", {FRESH_COPY}),
        ("copy, fused, one by one", {COPY, FRESH_COPY, f"{FUSED}, one by one"}),
    ],
)
def test_contenders_are_chosen_by_the_beginning_of_their_names(text, expected):
    assert selection.choose_contenders(text) == expected


@pytest.mark.parametrize("text", ["fussed", "copy,", "upstream,nothing"])
def test_an_unknown_contender_is_answered_with_all_that_there_are(text):
    with pytest.raises(SystemExit) as caught:
        selection.choose_contenders(text)
    assert "unknown contender" in str(caught.value) and all(name in str(caught.value) for name in all_names())


def test_directions():
    assert selection.choose("both,fwd,both", selection.DIRECTIONS_BY_OPTION, "direction") == [BOTH, FORWARD]
    with pytest.raises(SystemExit, match="unknown direction 'backward', known are fwd, bwd, both"):
        selection.choose("backward", selection.DIRECTIONS_BY_OPTION, "direction")
