"""The kernels of attention pooling: chunks and blocks of hops, bounds, launches, rows too long for a tile."""

import pytest
import torch
from pooling import POOL_BACKENDS, assert_contract, check, evaluate, problem, truth
from support import assert_close, assert_margins_intact, assert_same_bits, device_of, nan_padded

import daam_kernels

if "triton" not in POOL_BACKENDS:
    pytest.skip("triton is not installed", allow_module_level=True)

from daam_kernels.kernels import attention_pool, attention_pool_launch

DEVICE = device_of("triton")
LENGTHS = (1, 30, 0, 11)


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

    def run(kernel, grid, original=attention_pool.run, **arguments):
        found.append((kernel.fn.__name__, grid))
        original(kernel, grid, **arguments)

    monkeypatch.setattr(attention_pool, "run", run)
    return found


@pytest.mark.parametrize("score, kind, hops, chunks, blocks", [("dot", "packed", 7, 4, 2), ("gated", "dense", 9, 3, 3)])
def test_chunks_of_bags_and_blocks_of_hops(small_tiles, launched, score, kind, hops, chunks, blocks):
    p = problem(score, kind, torch.float32, DEVICE, lengths=LENGTHS, hops=hops)
    check(p, "triton")
    of_layers = ["pool_hidden_gradient", "pool_hidden_dx", "pool_layer_sums"]  # which have all hops at once
    backward = ["pool_gradient", "pool_sums"] if score == "dot" else of_layers
    assert [name for name, _ in launched] == ["pool_sums", "pool_merge", *backward]
    assert [grid[:2] for _, grid in launched[:2]] == [(4 * chunks, blocks), (4 * hops, 1)]
    assert launched[2][1] == ((4 * 7, 1) if score == "dot" else (4 * 1,))


@pytest.mark.parametrize(
    "score, kind, dtype, layers, hidden",
    [
        ("gated", "packed", torch.float32, torch.float32, 20),
        ("additive", "dense", torch.bfloat16, torch.float32, 5),
        ("gated", "full", torch.float16, torch.float16, 20),
        ("additive", "dense", torch.float64, torch.float32, 30),
        ("additive", "packed", torch.float32, torch.float32, 130),  # in two blocks of units, backward by torch
    ],
    ids=str,
)
@pytest.mark.parametrize("fits", [True, False])
def test_hidden_layers(launched, monkeypatch, score, kind, dtype, layers, hidden, fits):
    """Of several chunks, segments and blocks of columns; with the layer of x's own type or another."""
    layers_of = 2 if score == "gated" else 1
    small = dict(_TILES=1, _ELEMENTS=2048, _ROWS_PER_UNIT=0, _HIDDEN_ELEMENTS=64 * hidden * layers_of)
    for name, value in small.items() if fits else {"_MOST_HIDDEN": 0, "_QUERY_ELEMENTS": 0}.items():
        monkeypatch.setattr(attention_pool_launch, name, value)
    p = problem(score, kind, dtype, DEVICE, lengths=(40, 0, 33), embed_dim=70, hidden=hidden)
    p = p._replace(tensors=tuple(None if t is None else t.to(layers) for t in p.tensors))
    of_type = slice(3 if dtype.itemsize > layers.itemsize else None)  # a gradient is rounded to its tensor's type
    assert_contract(evaluate(p, "triton")[of_type], truth(p)[of_type], dtype)
    names = ["pool_hidden_gradient", "pool_hidden_dx", "pool_layer_sums"] * 2 if hidden <= 128 else ["pool_gradient"]
    expected = ["pool_hidden_sums", "pool_merge", *names] if fits else ["pool_sums", "pool_merge", "pool_gradient"]
    assert [name for name, _ in launched] == expected
    if fits and hidden <= 128:
        bags, blocks = len(p.grad), (-(-layers_of * hidden // 32), 5 if dtype == torch.float64 else 2)
        assert [grid for _, grid in launched[-3:]] == [(2 * bags,), (2 * bags,), (*blocks, 2)]


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
def test_no_access_out_of_bounds(small_tiles, monkeypatch, score, kind):
    """Every tensor lies in the middle of NaN: what is read of them shows in the results, what is written in them."""
    p = problem(score, kind, torch.float32, DEVICE, lengths=(5, 2, 30), embed_dim=5)
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


@pytest.mark.parametrize("score, kind", [("dot", "packed"), ("dot", "dense"), ("gated", "packed")])
def test_rows_too_long_for_a_program_are_taken_in_blocks_of_columns(small_tiles, launched, monkeypatch, score, kind):
    monkeypatch.setattr(attention_pool_launch, "_QUERY_ELEMENTS", 0)  # nor do their units fit one
    p = problem(score, kind, torch.float32, DEVICE, embed_dim=70, lengths=(3, 0, 5))
    check(p, "triton")
    products = ["pool_products"] * (score == "dot")
    sums = ["pool_sums"] * (score == "dot")
    expected = [*products, "pool_sums", "pool_merge", *products, "pool_products", "pool_gradient", *sums]
    assert [name for name, _ in launched] == expected
    assert dict(launched)["pool_sums"][2] == dict(launched)["pool_gradient"][1] == 9


def test_dropout_and_weights_of_long_rows(small_tiles):
    p = problem("dot", "packed", torch.float64, DEVICE, embed_dim=70, lengths=(3, 0, 5))
    torch.manual_seed(1)
    got = evaluate(p, "triton", dropout_p=0.3)
    torch.manual_seed(1)
    keep = torch.rand(p.grad_weights.T.shape, device=DEVICE) >= 0.3
    for result, exact in zip(got, truth(p, keep.cpu(), 0.3)):
        assert_close(result, exact, 1e-12)
