"""Tables, CSV and JSON of the benchmarks."""

import json

import pytest

from benchmarks.report import format_table, read_csv, write_csv, write_json


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
