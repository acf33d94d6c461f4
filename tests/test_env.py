"""The page of ``python -m daam_kernels.env``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import daam_kernels
from daam_kernels import env

ROOT = Path(__file__).resolve().parent.parent


def page(**variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in env.VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-m", "daam_kernels.env"],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_page_without_the_library_says_why():
    text = page(DAAM_KERNELS_NO_NATIVE="1")
    assert re.search(rf"torch +{re.escape(torch.__version__)}", text)
    assert re.search(rf"daam_kernels +{re.escape(daam_kernels.__version__)}", text)
    assert re.search(r"loaded +no: .*DAAM_KERNELS_NO_NATIVE", text)
    assert re.search(r"native +not available: .*DAAM_KERNELS_NO_NATIVE", text)
    assert re.search(r"DAAM_KERNELS_NO_NATIVE +'1'", text)
    assert "instruction set  " not in text


def test_page_names_the_instruction_sets():
    if not daam_kernels.available_backends()["native"]:
        pytest.skip("the native library is not here")
    found = re.search(r"instruction set +(\w+), of ([\w, ]+)\n", page())
    assert found and found[1] == found[2].split(", ")[0]
    least = found[2].split(", ")[-1]
    assert re.search(rf"instruction set +{least}, of ", page(DAAM_KERNELS_INSTRUCTION_SET=least))


def test_page_lists_every_backend_with_its_reason():
    text = env.report()
    for name, status in daam_kernels.available_backends().items():
        assert re.search(rf"^  {name} +(not )?available: {re.escape(status.reason)}$", text, re.MULTILINE)


def test_a_build_record_is_read(monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text(
        '{"native": {"built": true, "detail": "g++ 1.0"}, "cuda": {"built": false, "detail": "nvcc was not found"}}'
    )
    monkeypatch.setattr(env, "_PACKAGE", tmp_path)
    assert re.search(r"built +native: yes, g\+\+ 1\.0; cuda: no, nvcc was not found\n", env.report())


@pytest.mark.parametrize("record", ["", "no JSON", "[]", '{"native": {}}', '{"native": null}'])
def test_a_build_record_that_cannot_be_read_stops_nothing(record, monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text(record)
    monkeypatch.setattr(env, "_PACKAGE", tmp_path)
    assert re.search(r"built +its record, _build.json, cannot be read\n", env.report())


def test_every_variable_that_the_package_reads_is_listed():
    package = [path for path in (ROOT / "daam_kernels").rglob("*.py") if path.name != "env.py"]
    sources = [*package, *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]
    # In quotes, as a name is read; the C sources have macros that begin alike.
    read = {name for path in sources for name in re.findall(r'"(DAAM_KERNELS_[A-Z_]+)"', path.read_text("utf-8"))}
    assert read == {name for name in env.VARIABLES if name.startswith("DAAM_")}
