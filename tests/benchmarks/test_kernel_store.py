"""The kernel benchmark's results are whole on disk after every case, and an interrupted run goes on."""

import argparse
import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.kernels import cli, store
from benchmarks.kernels.cell import new_cell
from benchmarks.kernels.contender import FORWARD
from benchmarks.kernels.shapes import SHAPES
from benchmarks.report import read_csv

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def options(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    common = ["--device", "cpu", "--budget", "1e-9", "--contenders", "fused,softmax", "--direction", "fwd"]
    return parser.parse_args([*common, *words])


@pytest.fixture
def quiet(monkeypatch):
    """No pictures, which have tests of their own, and no collection of garbage: both take seconds."""
    monkeypatch.setattr("benchmarks.kernels.sweep.release", lambda case: None)
    monkeypatch.setattr("benchmarks.kernels.plots.plot", lambda *_: [])


def cases_in(path):
    return [store.case_of(row)[0] for row in json.loads(path.read_text())["rows"]]


def test_an_interrupted_run_leaves_whole_files_and_goes_on(tmp_path, monkeypatch, capsys, quiet):
    real, swept = cli.sweep, []

    def interrupted(shape, *arguments):
        if shape.name == "wavlm":
            raise KeyboardInterrupt
        swept.append(shape.name)
        yield from real(shape, *arguments)

    monkeypatch.setattr(cli, "sweep", interrupted)
    words = ["--shapes", "tiny,wavlm,slice_8", "--out", str(tmp_path), "--num-gaussians", "1,2"]
    assert cli.run(options(*words)) == 130
    assert "with --resume" in capsys.readouterr().out
    assert cases_in(tmp_path / "kernels-cpu.json") == ["tiny"] * 6
    first = (tmp_path / "kernels-cpu.json").read_text()

    monkeypatch.setattr(cli, "sweep", lambda shape, *rest: swept.append(shape.name) or iter([]))
    assert cli.run(options(*words, "--resume")) == 0
    assert "2 cases are there: tiny float32, tiny float32" in capsys.readouterr().out
    assert swept == ["tiny"] * 2 + ["wavlm"] * 2 + ["slice_8"] * 2
    assert json.loads(first)["rows"] == json.loads((tmp_path / "kernels-cpu.json").read_text())["rows"]

    rows = read_csv(tmp_path / "kernels-cpu.csv")
    assert [row["num_gaussians"] for row in rows] == ["1"] * 3 + ["2"] * 3
    assert {row["direction"] for row in rows} == {FORWARD} and all(float(row["gb_per_s"]) > 0 for row in rows)
    assert not list(tmp_path.glob("*.part"))


def test_a_run_is_compared_and_not_taken_up_where_it_was_made_otherwise(tmp_path, quiet):
    words = ["--shapes", "tiny", "--out", str(tmp_path)]
    assert cli.run(options(*words)) == 0
    before = (tmp_path / "kernels-cpu.json").read_text()
    first = json.loads(before)
    for row in first["rows"]:
        row["wall_us"] *= 1 if row["contender"] == "copy" else 1e-3  # kernels that were a thousand times as fast
        row["wall_us_iqr"] = 0.0
    (tmp_path / "old.json").write_text(json.dumps(first))
    assert cli.run(options(*words, "--resume", "--compare", str(tmp_path / "old.json"))) == 1
    with pytest.raises(SystemExit, match="seed: 0 then, 7 now"):
        cli.run(options(*words, "--resume", "--seed", "7"))
    assert (tmp_path / "kernels-cpu.json").read_text() == before


def test_the_csv_says_what_the_json_says_whatever_came_between_the_two(tmp_path, monkeypatch, capsys, quiet):
    words = ["--shapes", "tiny", "--out", str(tmp_path)]
    with monkeypatch.context() as ending:
        ending.setattr(store, "write_csv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.run(options(*words)) == 130
    assert len(cases_in(tmp_path / "kernels-cpu.json")) == 3 and not (tmp_path / "kernels-cpu.csv").exists()
    assert cli.run(options(*words, "--resume")) == 0
    content = (tmp_path / "kernels-cpu.csv").read_text()
    assert content.count("\n") == 4

    (tmp_path / "kernels-cpu.csv").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "kernels-cpu.csv").read_text() == content


def test_a_run_that_measures_nothing_does_not_end_as_if_it_had(tmp_path, monkeypatch, quiet):
    with pytest.raises(SystemExit, match="nothing is left to measure: --shapes, --num-heads"):
        cli.run(options("--shapes", "ragged", "--num-heads", "8", "--out", str(tmp_path)))
    monkeypatch.setattr("benchmarks.kernels.sweep.available_memory", lambda: 1)
    assert cli.run(options("--shapes", "tiny", "--out", str(tmp_path))) == 1
    (row,) = json.loads((tmp_path / "kernels-cpu.json").read_text())["rows"]
    assert row["status"] == "failed" and row["note"].startswith("MemoryError")


def test_differences_leave_out_the_moment():
    old = {"date": "1", "load_at_start": 0.1, "torch": "2.11", "device": "a"}
    new = {"date": "2", "load_at_start": 0.9, "torch": "2.13", "device": "a", "settings": "x"}
    assert store.differences(old, new) == ["torch: 2.11 then, 2.13 now", "settings: None then, x now"]


@pytest.mark.parametrize("text", [None, "{", '{"rows": []}', '{"environment": {}, "rows": []}', "[]"])
def test_a_file_without_results_is_refused_by_name(tmp_path, text):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="old.json has no results of the kernel benchmark"):
        store.load(path)


ROW = asdict(new_cell(replace(SHAPES["tiny"], num_gaussians=4), torch.float32, FORWARD, "copy"))


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"rows": [ROW, {**ROW, "wall_us": "1.5"}]}, "wall_us of row 2 is '1.5'"),
        ({"rows": [{name: value for name, value in ROW.items() if name != "status"}]}, "row 1 lacks status"),
        ({"rows": [{**ROW, "direction": "up"}]}, "direction of row 1 is 'up'"),
        ({"rows": [ROW, 3]}, "int"),
        ({"environment": None}, "NoneType"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_row_that_no_reader_could_use_is_refused_by_its_number(tmp_path, change, complaint):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"environment": {}, "rows": [ROW], **change}))
    with pytest.raises(SystemExit, match=f"old.json has no results of the kernel .*{complaint}"):
        main(["compare", str(path), str(path)])


def test_columns_that_an_older_version_did_not_write_have_no_value(tmp_path):
    newer = ("kernel_us", "launches", "note")
    older = {name: value for name, value in ROW.items() if name not in newer} | {"wall_us": 3}
    (tmp_path / "old.json").write_text(json.dumps({"environment": {}, "rows": [older | {"unheard": 1}]}))
    assert store.load(tmp_path / "old.json")["rows"] == [{**older, **dict.fromkeys(newer)}]
    assert main(["compare", *[str(tmp_path / "old.json")] * 2]) == 0
