"""Tables, CSV and JSON of the benchmarks."""

import errno
import json
from pathlib import Path

import pytest

from benchmarks.report import format_table, read_csv, write_csv, write_json, write_text
from daam_kernels.explain.files import complete


def test_csv_keeps_every_column_and_writes_none_as_empty(tmp_path):
    write_csv(tmp_path / "a.csv", [{"shape": "a, b", "time": 1.5, "note": None}, {"shape": "c", "commit": "12"}])
    assert read_csv(tmp_path / "a.csv") == [
        {"shape": "a, b", "time": "1.5", "note": "", "commit": ""},
        {"shape": "c", "time": "", "note": "", "commit": "12"},
    ]


def test_table_aligns_names_left_and_numbers_right():
    table = format_table(["name", "us", ""], [["copy", "1.0", ""], ["fused", "12.5", "wrong: y"]])
    assert table.splitlines() == [
        "name     us",
        "-----  ----  --------",
        "copy    1.0",
        "fused  12.5  wrong: y",
    ]


def test_json_round_trip(tmp_path):
    content = {"rows": [{"time": None, "name": "x"}], "environment": {"threads": 2}}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == content


def test_no_file_has_a_number_that_json_does_not_know(tmp_path):
    row = {"error": float("inf"), "times": [float("nan"), 1.0], "note": "error of y is inf"}
    write_json(tmp_path / "a.json", {"rows": [row]})
    write_csv(tmp_path / "a.csv", [row])
    refused = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    (read,) = json.loads((tmp_path / "a.json").read_text(), **refused)["rows"]
    assert read == {**row, "error": None, "times": [None, 1.0]}
    assert read_csv(tmp_path / "a.csv") == [{"error": "", "times": "[None, 1.0]", "note": "error of y is inf"}]


def test_two_runs_write_the_same_file_without_each_other(tmp_path, monkeypatch):
    path, write = tmp_path / "a.json", Path.write_text

    def interleaved(part, text, **options):
        write(part, text, **options)
        if text == "of the first run":
            write_text(path, "of the second")
            assert path.read_text() == "of the second"

    monkeypatch.setattr(Path, "write_text", interleaved)
    write_text(path, "of the first run")
    assert path.read_text() == "of the first run" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_what_was_there_and_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("earlier")
    with pytest.raises(OSError, match="No space left on device: .*a.json") as raised:
        with complete(path) as part:
            part.write_text("half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(path) and path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
