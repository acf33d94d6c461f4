"""``python -m benchmarks host``: every layer computes the same, what is wrong or fails is told, and a run writes."""

import csv
import json
import math

import pytest
import torch
from support import device_of

from benchmarks.__main__ import main
from benchmarks.host import cli, layers
from benchmarks.kernels.contender import BOTH, FORWARD
from benchmarks.kernels.data import make_case
from benchmarks.kernels.shapes import SHAPES, Shape
from daam_kernels import native

OURS = (layers.MODULE, layers.FUNCTION, layers.DISPATCHED, layers.DIRECT, layers.BACKEND, layers.LAUNCH)


@pytest.fixture
def threads():
    """As many threads afterwards as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case(shape=SHAPES["tiny"], dtype=torch.float32, device="cpu"):
    return make_case(shape, dtype, torch.device(device), 4)


def test_layers_of_triton_and_launches_that_are_repeated():
    pytest.importorskip("triton")
    small = case(Shape("small", (2, 8), 1, 2), torch.float64, device_of("triton"))
    made = {name: make() for name, make in layers.layers(small, "triton").items()}
    expected = made[layers.FUNCTION].calls[BOTH]()
    for name in OURS:
        got = made[name].calls[BOTH]()
        if name == layers.LAUNCH:
            for result in got:
                result.fill_(math.nan)
            got = made[name].calls[BOTH]()
        for result, true in zip(got, expected, strict=True):
            assert torch.equal(result.detach(), true.detach()), name


def test_what_is_wrong_or_fails_is_told(monkeypatch):
    def fails():
        raise MemoryError("none left")

    def wrong():
        return layers.Layer("wrong", {FORWARD: lambda: (0 * tiny.x,), BOTH: fails})

    tiny = case()
    peers = {layers.LAYER_NORM: layers.layers(tiny, "auto")[layers.LAYER_NORM]}
    monkeypatch.setattr(cli, "layers", lambda *_: {"wrong": wrong, "not made": fails, **peers})
    rows = {(row["direction"], row["layer"]): row for row in cli.measure(tiny, "auto", 0.01)}
    assert rows[FORWARD, "wrong"]["status"] == "wrong" and "error of y is 1.0e+00" in rows[FORWARD, "wrong"]["note"]
    assert rows[BOTH, "wrong"]["note"] == rows[BOTH, "not made"]["note"] == "MemoryError: none left"
    assert rows[FORWARD, "wrong"]["us"] is None and rows[FORWARD, layers.LAYER_NORM]["over_layer_norm"] == 1


def test_a_gpus_own_time_stands_beside(monkeypatch):
    """Without one: a tensor that says it is there, and a graph that says how long it takes."""
    tiny = case()
    launch = layers.Layer(layers.LAUNCH, dict.fromkeys((FORWARD, BOTH), lambda: ()), judged=False)
    peer = layers.layers(tiny, "auto")[layers.LAYER_NORM]
    monkeypatch.setattr(cli, "layers", lambda *_: {layers.LAUNCH: lambda: launch, layers.LAYER_NORM: peer})
    monkeypatch.setattr(cli, "graph_timer", lambda calls: lambda: 1e-6 * len(calls))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    rows = [row for row in cli.measure(tiny, "auto", 0.01) if row["layer"] == "kernels on the device"]
    assert [(row["direction"], round(row["us"])) for row in rows] == [(FORWARD, 20), (BOTH, 20)]


@pytest.mark.usefixtures("threads")
def test_a_run(tmp_path, capsys):
    arguments = ["host", "--device", "cpu", "--cases", "tiny", "--budget", "0.05", "--out", str(tmp_path)]
    assert main(arguments) == (0 if native.status()[0] else 1)
    content = json.loads((tmp_path / "host-cpu.json").read_text())
    assert content["environment"]["threads"] == 1
    rows = content["rows"]
    assert [row["layer"] for row in rows if row["direction"] == BOTH][: len(OURS)] == list(OURS)
    for row in rows:
        if native.status()[0] or row["layer"] != layers.LAUNCH:
            assert row["status"] == "ok" and row["us"] >= row["us_best"] > 0 and row["us_iqr"] >= 0
    with open(tmp_path / "host-cpu.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "tiny [10x128] float32, 4 heads, K = 4, forward+backward" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown case 'none'"):
        main(["host", "--cases", "none"])


def test_a_backend_that_cannot_serve_is_told():
    with pytest.raises(SystemExit, match="--backend cuda: backend asks for 'cuda', which cannot serve"):
        main(["host", "--device", "cpu", "--backend", "cuda"])
