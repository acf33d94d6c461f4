"""The kernels of attention pooling: chunks and blocks of hops, bounds, launches, rows too long for a tile."""

import pytest
import torch
from pooling import POOL_BACKENDS, assert_contract, check, evaluate, problem, truth
from support import assert_close, assert_margins_intact, assert_same_bits, device_of, nan_padded

import daam_kernels

if "triton" not in POOL_BACKENDS:
    pytest.skip("triton is not installed", allow_module_level=True)

from daam_kernels.kernels import attention_pool, attention_pool_launch
from daam_kernels.kernels.remembered import forget_launches

DEVICE = device_of("triton")
LENGTHS = (1, 30, 0, 11)


@pytest.fixture(autouse=True)
def nothing_held():
    """A test may change what launches are worked out from."""
    forget_launches()
    yield
    forget_launches()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that bags of a few rows have several chunks, and seven hops several blocks."""
    monkeypatch.setattr(attention_pool_launch, "_ELEMENTS", 64)
    monkeypatch.setattr(attention_pool_launch, "_TILES", 1)
    monkeypatch.setattr(attention_pool_launch, "PROGRAMS", 25)


@pytest.fixture
def launched(monkeypatch):
    """(name, grid) of the kernels launched so far."""
    found = []

    def run(kernel, launch, given, grid, original=attention_pool.run):
        found.append((kernel.fn.__name__, grid))
        original(kernel, launch, given, grid)

    monkeypatch.setattr(attention_pool, "run", run)
    return found


@pytest.fixture
def readers(monkeypatch):
    """After x, which a test puts there: the names of the kernels launched so far that were given x itself."""
    found = []

    def run(kernel, launch, given, grid, original=attention_pool.run):
        tensors = (t for name, t in given.items() if name in kernel.arg_names and isinstance(t, torch.Tensor))
        if any(t.data_ptr() == found[0].data_ptr() for t in tensors):
            found.append(kernel.fn.__name__)
        original(kernel, launch, given, grid)

    monkeypatch.setattr(attention_pool, "run", run)
    return found


FORWARD = {"whole": "pool_sums", "wide": "pool_wide_sums", "hidden": "pool_hidden_sums"}
BACKWARD = {
    "whole": ["pool_gradient", "pool_query_sums"],
    "wide": ["pool_wide_gradient", "pool_query_sums"],
    "hidden": ["pool_hidden_gradient", "pool_hidden_dx", "pool_layer_sums"],
    "wide hidden": ["pool_wide_hidden_gradient", "pool_hidden_dx", "pool_layer_sums", "pool_layer_sums"],
}


def names_of(forward, backward):
    return [FORWARD[forward], "pool_merge", *BACKWARD[backward]]


@pytest.mark.parametrize(
    "score, kind, hops, forward, backward, query",
    [("dot", "packed", 9, 4 * 4 * 2, 4 * 7, 4 * 3 * 3), ("gated", "dense", 20, 4 * 2 * 2, 4 * 2, None)],
)
def test_chunks_of_bags_and_blocks_of_hops(
    small_tiles, launched, monkeypatch, score, kind, hops, forward, backward, query
):
    """The numbers of programs: of bags times chunks times blocks of hops, but backward, where one has all hops."""
    for name, value in dict(_CACHED=128, _ROWS_PER_UNIT=1, _WIDE_HOPS=16).items():  # four rows of eight numbers
        monkeypatch.setattr(attention_pool_launch, name, value)
    p = problem(score, kind, torch.float32, DEVICE, lengths=LENGTHS, hops=hops)
    check(p, "triton")
    assert [name for name, _ in launched] == names_of("wide", "whole" if score == "dot" else "wide hidden")
    assert [grid[0] for _, grid in launched[:3]] == [forward, 4 * hops, backward]
    assert query is None or launched[3][1] == (query, 1)


@pytest.mark.parametrize(
    "score, kind, dtype, layers, hidden",
    [
        ("gated", "packed", torch.float32, torch.float32, 20),
        ("additive", "dense", torch.bfloat16, torch.float32, 5),
        ("gated", "full", torch.float16, torch.float16, 20),
        ("additive", "dense", torch.float64, torch.float32, 30),
        ("additive", "packed", torch.float32, torch.float32, 130),  # in blocks of units
    ],
    ids=str,
)
@pytest.mark.parametrize("fits", [True, False])
def test_hidden_layers(launched, monkeypatch, score, kind, dtype, layers, hidden, fits):
    """Of several chunks, segments and blocks of columns; with the layer of x's own type or another."""
    layers_of = 2 if score == "gated" else 1
    whole = fits and hidden <= 128
    kept = layers_of * hidden + (0 if whole else hidden + 3)
    small = dict(_TILES=1, _ELEMENTS=2048, _ROWS_PER_UNIT=0, _HIDDEN_ELEMENTS=64 * kept)
    if not fits:
        small |= dict(_MOST_HOPS=2, _MOST_CACHED_ROWS=16)
    for name, value in small.items():
        monkeypatch.setattr(attention_pool_launch, name, value)
    p = problem(score, kind, dtype, DEVICE, lengths=(40, 0, 33), embed_dim=70, hidden=hidden)
    p = p._replace(tensors=tuple(None if t is None else t.to(layers) for t in p.tensors))
    of_type = slice(3 if dtype.itemsize > layers.itemsize else None)  # a gradient is rounded to its tensor's type
    assert_contract(evaluate(p, "triton")[of_type], truth(p)[of_type], dtype)
    backward = BACKWARD["hidden" if whole else "wide hidden"]
    assert [name for name, _ in launched] == [FORWARD["hidden" if fits else "wide"], "pool_merge", *backward * 2]
    bags, columns = len(p.grad), 5 if dtype == torch.float64 else 2
    assert [grid for _, grid in launched[2:5]] == [(2 * bags,), (2 * bags,), (-(-layers_of * hidden // 32), columns, 2)]


SIZES = [  # score, kind, dtype, hops, hidden, embed_dim, the sweeps
    ("dot", "packed", torch.float32, 1, None, 9, "whole", "whole"),
    ("dot", "dense", torch.float32, 30, None, 45, "wide", "whole"),
    ("dot", "packed", torch.bfloat16, 70, None, 16, "wide", "whole"),
    ("dot", "dense", torch.float64, 30, None, 7, "wide", "whole"),
    ("dot", "packed", torch.float32, 2, None, 8197, "wide", "wide"),
    ("dot", "dense", torch.float16, 1, None, 8200, "wide", "wide"),
    ("dot", "packed", torch.float64, 3, None, 2051, "wide", "wide"),
    ("additive", "packed", torch.float32, 1, 300, 45, "hidden", "wide hidden"),
    ("gated", "dense", torch.bfloat16, 1, 300, 16, "hidden", "wide hidden"),
    ("gated", "packed", torch.float32, 30, 300, 45, "wide", "wide hidden"),
    ("additive", "dense", torch.float16, 30, 40, 33, "wide", "wide hidden"),
    ("gated", "dense", torch.float64, 30, 40, 9, "wide", "wide hidden"),
    ("additive", "full", torch.float32, 70, 20, 9, "wide", "wide hidden"),
    ("additive", "packed", torch.bfloat16, 1, 20, 8200, "wide", "hidden"),
]


@pytest.mark.parametrize("score, kind, dtype, hops, hidden, embed_dim, forward, backward", SIZES, ids=str)
def test_x_is_read_once_forward_and_twice_backward(
    launched, readers, score, kind, dtype, hops, hidden, embed_dim, forward, backward
):
    """Whatever its sizes, one kernel that takes x forward and two backward; and they are right."""
    p = problem(score, kind, dtype, DEVICE, lengths=(3, 0, 18), embed_dim=embed_dim, hops=hops, hidden=hidden or 1)
    readers.append(p.x)
    check(p, "triton")
    assert [name for name, _ in launched] == names_of(forward, backward)
    read = [FORWARD[forward], BACKWARD[backward][0], "pool_query_sums" if score == "dot" else "pool_layer_sums"]
    assert readers[1:] == read


@pytest.mark.parametrize(
    "score, kind, hops, hidden, embed_dim", [("dot", "packed", 40, 1, 9), ("gated", "dense", 40, 70, 20)]
)
def test_dropout_of_many_hops(monkeypatch, score, kind, hops, hidden, embed_dim):
    """Of a bag in one chunk, whose rows are summed up 32 at a time, in two tiles, on top of what is in memory."""
    for name, value in dict(PROGRAMS=1, _WIDE_ROWS=16, _MOST_CACHED_ROWS=32).items():
        monkeypatch.setattr(attention_pool_launch, name, value)
    sizes = dict(lengths=(75, 0, 5), embed_dim=embed_dim, hops=hops, hidden=hidden)
    p = problem(score, kind, torch.float64, DEVICE, **sizes)
    torch.manual_seed(1)
    got = evaluate(p, "triton", dropout_p=0.3)
    torch.manual_seed(1)
    shape = (p.grad_weights.T if kind == "packed" else p.grad_weights).shape
    keep = torch.rand(shape, device=DEVICE) >= 0.3
    for result, exact in zip(got, truth(p, keep.cpu(), 0.3)):
        assert_close(result, exact, 1e-12)


@pytest.mark.parametrize("score, hops, embed_dim", [("dot", 1, 8200), ("dot", 9, 20), ("gated", 9, 20)])
def test_a_bag_with_nan_does_not_touch_others(score, hops, embed_dim):
    p = problem(score, "packed", torch.float32, DEVICE, lengths=(18, 20, 3), embed_dim=embed_dim, hops=hops)
    expected = evaluate(p, "triton")
    x = p.x.clone()
    x[20] = torch.nan
    bags = {**p.bags, "key_padding_mask": p.bags["key_padding_mask"].clone()}
    bags["key_padding_mask"][20] = False
    got = evaluate(p._replace(x=x, bags=bags), "triton")
    assert got[0][1].isnan().all()
    assert_same_bits(got[0][[0, 2]], expected[0][[0, 2]])
    for result, exact in zip(got[1:3], expected[1:3]):
        assert_same_bits(result[:18], exact[:18])
        assert_same_bits(result[38:], exact[38:])


@pytest.mark.parametrize("score, hops, embed_dim", [("dot", 1, 8200), ("dot", 9, 20), ("gated", 9, 20)])
def test_wide_sweeps_are_deterministic_and_weights_change_nothing_else(score, hops, embed_dim):
    p = problem(score, "dense", torch.float32, DEVICE, lengths=LENGTHS, embed_dim=embed_dim, hops=hops)
    results = evaluate(p, "triton")
    for result, again in zip(results, evaluate(p, "triton")):
        assert_same_bits(result, again)
    alone = daam_kernels.attention_pool(p.x, *(t for t in p.tensors if t is not None), **p.bags, backend="triton")
    assert_same_bits(results[0].detach(), alone)


def test_dropout_and_weights_in_chunks(small_tiles):
    p = problem("dot", "packed", torch.float64, DEVICE, lengths=LENGTHS)
    torch.manual_seed(1)
    got = evaluate(p, "triton", dropout_p=0.3)
    torch.manual_seed(1)
    keep = torch.rand(p.grad_weights.T.shape, device=DEVICE) >= 0.3
    for result, exact in zip(got, truth(p, keep.cpu(), 0.3)):
        assert_close(result, exact, 1e-12)


def test_weights_change_nothing_else(small_tiles):
    p = problem("dot", "dense", torch.float32, DEVICE, lengths=LENGTHS)
    alone = daam_kernels.attention_pool(p.x, p.tensors[0], **p.bags, backend="triton")
    assert_same_bits(evaluate(p, "triton")[0].detach(), alone)


@pytest.mark.parametrize("score, kind", [("dot", "packed"), ("dot", "full"), ("gated", "packed"), ("additive", "full")])
@pytest.mark.parametrize("hops, embed_dim", [(3, 5), (9, 5), (2, 70)])
def test_no_access_out_of_bounds(small_tiles, monkeypatch, score, kind, hops, embed_dim):
    """Every tensor lies in the middle of NaN: what is read of them shows in the results, what is written in them."""
    for name in ("_CACHED", "_ROWS_PER_UNIT"):  # chunks without rows, too
        monkeypatch.setattr(attention_pool_launch, name, 1)
    p = problem(score, kind, torch.float32, DEVICE, lengths=(5, 2, 30), hops=hops, embed_dim=embed_dim)
    p = p._replace(x=p.x.nan_to_num(), bags={k: v for k, v in p.bags.items() if k == "cu_seqlens"})
    expected = truth(p)
    p = p._replace(**{name: nan_padded(getattr(p, name))[0] for name in ("x", "grad", "grad_weights")})
    buffers, new_empty = [], torch.Tensor.new_empty

    def padded(t, shape=None, dtype=None, **keywords):
        shape, dtype = t.shape if shape is None else shape, dtype or t.dtype
        if not dtype.is_floating_point or shape == 0:
            return new_empty(t, shape, dtype=dtype, **keywords)
        view, buffer = nan_padded(torch.full(tuple(shape), torch.nan, dtype=dtype, device=t.device))
        buffers.append(buffer)
        return view

    monkeypatch.setattr(torch, "empty_like", padded)
    monkeypatch.setattr(torch.Tensor, "new_empty", padded)
    got = evaluate(p, "triton")
    monkeypatch.undo()
    assert len(buffers) >= 8
    for buffer in buffers:
        assert_margins_intact(buffer)
    for result, exact in zip(got, expected):
        assert_close(result, exact, 5e-6)


@pytest.mark.parametrize(
    "score, kind, hops, cached", [("dot", "packed", 3, 300), ("dot", "dense", 9, 600), ("gated", "packed", 3, 300)]
)
def test_rows_too_long_for_a_program_are_taken_in_blocks_of_columns(
    small_tiles, launched, monkeypatch, score, kind, hops, cached
):
    monkeypatch.setattr(attention_pool_launch, "_CACHED", cached)  # a row of 70 numbers, or two
    p = problem(score, kind, torch.float32, DEVICE, embed_dim=70, hops=hops, lengths=(3, 0, 5))
    check(p, "triton")
    assert [name for name, _ in launched] == names_of("wide", "wide" if score == "dot" else "hidden")
    if score == "dot":
        assert dict(launched)["pool_query_sums"][1] == 9


def test_dropout_and_weights_of_long_rows(small_tiles):
    p = problem("dot", "packed", torch.float64, DEVICE, embed_dim=70, lengths=(3, 0, 5))
    torch.manual_seed(1)
    got = evaluate(p, "triton", dropout_p=0.3)
    torch.manual_seed(1)
    keep = torch.rand(p.grad_weights.T.shape, device=DEVICE) >= 0.3
    for result, exact in zip(got, truth(p, keep.cpu(), 0.3)):
        assert_close(result, exact, 1e-12)
