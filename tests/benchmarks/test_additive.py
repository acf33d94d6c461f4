"""``python -m benchmarks additive``: contenders agree, what does not fit is skipped, a run writes its results."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.additive import cli, contenders, measure
from daam_kernels import reference

SHAPE = (1, 2, 12, 14, 8, 6)


def test_a_contender_is_checked_and_measured():
    for name in ("eager", contenders.OURS):
        cell = measure.measure(name, list(SHAPE), "float32", "cpu", None, 0.01)
        assert cell["status"] == "ok" and cell["training_error"] < 1e-5
        assert all(cell[f"{kind}_ms"] > 0 and cell[f"{kind}_mb"] >= 0 for kind in ("inference", "training"))


def test_the_eager_contender_is_the_formula():
    query, key, value = (torch.randn(1, 2, 5, 3, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(2, 3, dtype=torch.float64)
    expected = reference.additive_attention(query, key, value, weight)
    torch.testing.assert_close(contenders.eager(query, key, value, weight), expected)


def test_a_wrong_contender_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "make", lambda name: lambda q, k, v, w: v.mean(-2, keepdim=True).expand_as(q))
    cell = measure.measure("eager", [1, 1, 9, 9, 4, 4], "float32", "cpu", None, 0.01)
    assert cell["status"] == "wrong" and "inference: relative error" in cell["note"] and "inference_ms" not in cell


def test_what_does_not_fit_into_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(cli, "available_memory", lambda: 1 << 30)
    cpu = torch.device("cpu")
    assert "GB" in cli._excess("eager", "batch T4096", "float32", cpu)["note"]
    assert cli._excess(contenders.OURS, "batch T4096", "float32", cpu) is None
    assert cli._excess("eager", "T512", "float32", cpu) is None


def test_a_short_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(cli.SHAPES, "T128", (1, 1, 16, 16, 8, 8))
    arguments = ["--shapes", "T128", "--contenders", "eager,daam_kernels", "--quick", "--out", str(tmp_path)]
    assert main(["additive", "--device", "cpu", *arguments]) == 0
    rows = json.loads((tmp_path / "additive-cpu.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"] and (tmp_path / "additive-cpu.png").exists()
    assert "training" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown shape 'T1'"):
        main(["additive", "--shapes", "T1"])
