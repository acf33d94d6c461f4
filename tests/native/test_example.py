"""csrc/example: a C++ program that uses the library without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import daam_kernels
from daam_kernels import native

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = Path(daam_kernels.__file__).with_name("_core.so")
AVAILABLE, REASON = native.status()
SOURCE = ROOT / "csrc" / "example" / "density_attention.cpp"


@pytest.mark.skipif(not (AVAILABLE and LIBRARY.exists()), reason=f"needs the native library: {REASON}")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_example_builds_with_the_library_and_finds_its_results_right(tmp_path):
    program = tmp_path / "density_attention"
    # The second way that the example names; .ci/run takes the first, with the library's sources.
    command = ["g++", "-O2", "-std=c++17", "-pthread", "-I", ROOT / "csrc", SOURCE, LIBRARY, "-o", program]
    subprocess.run(command, check=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "DAAM_KERNELS_INSTRUCTION_SET"}
    result = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("right") == 5 and "the same numbers" in result.stdout

    least = native.instruction_sets()[-1]
    environment["DAAM_KERNELS_INSTRUCTION_SET"] = least
    result = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and f"instruction set {least} of" in result.stdout
