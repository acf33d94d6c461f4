"""``python -m benchmarks pool``: contenders agree, what is wrong is told, and a quick run writes its files."""

import csv
import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.pool import cases, cli


@pytest.mark.parametrize("name", ["tiny", "tiny ragged"])
def test_contenders_agree_with_the_truth(name):
    case = cases.make_case(cases.SHAPES[name], torch.float64, torch.device("cpu"))
    expected = cases.truth(case)
    for function in (f for name, f in cases.contenders(case).items() if "compiled" not in name):
        context = function(case.x, case.parameters)
        got = context, *torch.autograd.grad(context, (case.x, *case.parameters), case.grad)
        for result, exact in zip(got, expected, strict=True):
            torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-9)


def test_a_wrong_result_and_a_failure_are_told(monkeypatch):
    case = cases.make_case(cases.SHAPES["tiny"], torch.float32, torch.device("cpu"))

    def fails(x, parameters):
        raise MemoryError

    made = {"wrong": lambda x, p: 0 * x[:, :1] + p[0] * 0, "fails": fails}
    monkeypatch.setattr(cli, "contenders", lambda case: made)
    assert [row["status"] for row in cli.measure(case, "float32", 0.01, True)] == ["wrong", "failed: MemoryError"]


def test_a_quick_run(tmp_path, capsys):
    pytest.importorskip("tqdm")
    assert main(["pool", "--quick", "--budget", "0.02", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "pool-cpu.json").read_text())["rows"]
    ours = [row for row in rows if row["contender"] == cases.OURS]
    assert [row["shape"] for row in ours] == ["tiny", "tiny ragged"]
    for row in ours:
        assert (
            row["status"] == "ok" and row["error"] < 1e-5 and row["forward ms"] > 0 and row["forward+backward mb"] > 0
        )
    with open(tmp_path / "pool-cpu.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    with pytest.raises(SystemExit, match="unknown shape 'none'"):
        main(["pool", "--shapes", "none"])
