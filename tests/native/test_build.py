"""setup.py: what it builds, what it leaves out and the record of both. The library here is one small file."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytest.importorskip("setuptools", minversion="77")  # what pyproject.toml asks for
pytestmark = pytest.mark.skipif(sys.platform == "win32" or not shutil.which("g++"), reason="needs g++")

SOURCE = """#include "daam_kernels.h"
int daam_abi_version(void) { return ANSWER; }
"""
FATBIN = """def command(nvcc, output):
    return [nvcc, "-o", output]
"""


@pytest.fixture
def tree(tmp_path):
    """A source tree as small as it can be, with a library of one function and no CUDA kernels."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "daam_kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "csrc" / "daam_kernels.h", tmp_path / "csrc")
    (tmp_path / "csrc" / "library.cpp").write_text(SOURCE.replace("ANSWER", "DAAM_ABI_VERSION"))
    return tmp_path


def add_nvcc(tree: Path, script: str) -> dict[str, str]:
    """Gives the tree CUDA kernels; the environment in which nvcc is this shell script, $2 being its output."""
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "fatbin.py").write_text(FATBIN)
    nvcc = tree / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "compilation tools, release 0.0" && exit\n{script}\n')
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"}


def setup(tree: Path, *arguments: str, **variables: str) -> None:
    unset = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "DAAM_KERNELS_NO_NATIVE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=tree,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout


def build(tree: Path, **variables: str) -> dict[str, dict]:
    """The record of a build in place."""
    setup(tree, "build_ext", "--inplace", **variables)
    return json.loads((tree / "daam_kernels" / "_build.json").read_text())


def built(tree: Path) -> set[str]:
    return {path.name for path in (tree / "daam_kernels").iterdir()} - {"__init__.py"}


def test_library_is_built_in_place_and_loads(tree):
    record = build(tree)
    assert record["native"]["built"] and "g++" in record["native"]["detail"]
    assert record["cuda"] == {"built": False, "detail": "csrc/cuda has no kernels"}
    assert built(tree) == {"_core.so", "_build.json"}
    assert ctypes.CDLL(str(tree / "daam_kernels" / "_core.so")).daam_abi_version() == 3


def test_a_change_of_source_or_header_is_built(tree):
    build(tree)
    header = tree / "csrc" / "daam_kernels.h"
    header.write_text(header.read_text().replace("DAAM_ABI_VERSION 3", "DAAM_ABI_VERSION 71"))
    build(tree)
    shutil.copy(tree / "daam_kernels" / "_core.so", tree / "second.so")  # one path is loaded only once in a process
    assert ctypes.CDLL(str(tree / "second.so")).daam_abi_version() == 71


def test_a_change_of_flags_is_built_and_nothing_else(tree):
    library = tree / "daam_kernels" / "_core.so"
    (tree / "csrc" / "library.cpp").write_text(SOURCE.replace("ANSWER", "WHEN"))

    def built_with(flags: str) -> tuple[bytes, int]:
        assert build(tree, CFLAGS=flags, CXXFLAGS=flags)["native"]["built"]
        return library.read_bytes(), library.stat().st_mtime_ns

    fives, sixes = built_with("-DWHEN=5"), built_with("-DWHEN=6")
    assert fives[0] != sixes[0]
    assert built_with("-DWHEN=6") == sixes  # the time too: it was not compiled again


@pytest.mark.parametrize("compiler", ["false", "there-is-no-such-compiler"])
def test_a_compiler_that_fails_stops_nothing_and_leaves_no_earlier_library(tree, compiler):
    build(tree)
    record = build(tree, CC=compiler, CXX=compiler)
    assert not record["native"]["built"] and compiler in record["native"]["detail"]
    assert not record["cuda"]["built"] and "native library" in record["cuda"]["detail"]
    assert built(tree) == {"_build.json"}


@pytest.mark.parametrize(
    "compiler, reason", [("./silent", "_core.so"), ("g++ 'without an end", "quotes"), ("", "No such file")], ids=str
)
def test_a_compiler_that_is_none_stops_nothing(tree, compiler, reason):
    (tree / "silent").write_text("#!/bin/sh\n")
    (tree / "silent").chmod(0o755)
    record = build(tree, CC=compiler, CXX=compiler)
    assert not record["native"]["built"] and reason in record["native"]["detail"]
    assert built(tree) == {"_build.json"}


def test_an_nvcc_that_does_not_say_its_release_is_used(tree):
    found = add_nvcc(tree, 'echo kernels > "$2"')
    nvcc = tree / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("release 0.0", ""))
    record = build(tree, **found)
    assert record["native"]["built"] and record["cuda"] == {"built": True, "detail": "nvcc: of an unknown release"}


def test_source_that_does_not_compile_stops_nothing(tree):
    (tree / "csrc" / "library.cpp").write_text(SOURCE.replace("ANSWER", "no_such_name"))
    record = build(tree)
    assert not record["native"]["built"] and "exit" in record["native"]["detail"]
    assert built(tree) == {"_build.json"}


def test_a_missing_symbol_fails_the_build_and_not_the_loading(tree):
    (tree / "csrc" / "library.cpp").write_text("int elsewhere();\n" + SOURCE.replace("ANSWER", "elsewhere()"))
    assert not build(tree)["native"]["built"]


def test_it_is_left_out_on_request(tree):
    build(tree)
    record = build(tree, DAAM_KERNELS_NO_NATIVE="1")
    assert not record["native"]["built"] and "DAAM_KERNELS_NO_NATIVE" in record["native"]["detail"]
    assert built(tree) == {"_build.json"}
    assert build(tree, DAAM_KERNELS_NO_NATIVE="0")["native"]["built"]


def test_cuda_kernels_are_built_where_nvcc_is(tree):
    record = build(tree, **add_nvcc(tree, 'echo kernels > "$2"'))
    assert record["native"]["built"]
    assert record["cuda"] == {"built": True, "detail": "nvcc: compilation tools, release 0.0"}
    assert built(tree) == {"_core.so", "_cuda.fatbin", "_build.json"}


def test_an_nvcc_that_fails_takes_nothing_else_with_it(tree):
    record = build(tree, **add_nvcc(tree, 'echo half > "$2"; exit 3'))
    assert record["native"]["built"]
    assert not record["cuda"]["built"] and "nvcc failed with exit code 3" in record["cuda"]["detail"]
    assert built(tree) == {"_core.so", "_build.json"}


@pytest.mark.parametrize("native", [True, False])
def test_one_wheel_for_every_python(tree, native):
    setup(tree, "bdist_wheel", **({} if native else {"DAAM_KERNELS_NO_NATIVE": "1"}))
    (wheel,) = (tree / "dist").glob("*.whl")
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert (platform == "any") == (not native)
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist()}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert f"Root-Is-Purelib: {str(not native).lower()}" in archive.read(metadata).decode()
    assert "_build.json" in names
    assert ("_core.so" in names) == native
