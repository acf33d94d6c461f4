"""Compiles the CUDA kernels and reports on their machine code, without a GPU: ``python tests/native/cuda_compile.py``.

Fails where a kernel spills registers, or a kernel for contiguous rows or columns has no 16-byte loads and stores.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
_RECIPE = runpy.run_path(str(ROOT / "csrc" / "cuda" / "fatbin.py"))

ARCHITECTURES = tuple(f"sm_{a}" for a in _RECIPE["ARCHITECTURES"])
KERNELS = (
    *(
        f"daam_{direction}_{kind}"
        for direction, kind in product(
            ("forward", "backward"),
            (
                f"{way}_{dtype}{padded}"
                for dtype in ("float32", "bfloat16", "float16")
                for way, padded in product(("rows", "columns", "strided"), ("", "_padded"))
                if way + padded != "strided_padded"  # strided ones always expect padding
            ),
        )
    ),
    "daam_parameter_gradients",
)

_WIDE_LOADS = re.compile(r"ld\.global\.nc\.v4\.[bfu]32|cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 16")
_WIDE_STORES = re.compile(r"st\.global\.(?:v4\.[bfu]32|v2\.[bfu]64)")


class Compiled(NamedTuple):
    """One kernel on one architecture; accesses of the PTX, which all architectures share."""

    name: str
    architecture: str
    registers: int
    spilled: int  # bytes, with those of the functions that it calls
    wide_loads: int
    wide_stores: int


def compile_kernels(folder: Path) -> list[Compiled]:
    """The kernels of a fresh fat binary, by nvcc's own report and its PTX."""
    command = _RECIPE["command"](shutil.which("nvcc"), str(folder / "kernels.fatbin"))
    nvcc = subprocess.run(
        [*command, "-Xptxas", "-v", "--keep", "--keep-dir", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if nvcc.returncode:
        raise RuntimeError(nvcc.stdout)
    return read_report(nvcc.stdout, (folder / "density.ptx").read_text())


def read_report(report: str, ptx: str) -> list[Compiled]:
    """The kernels that ``ptxas -v`` reports on, each with the functions that it calls, and their PTX."""
    bodies = {body.partition("(")[0]: body for body in ptx.split(".entry ")[1:]}
    found = []
    for section in report.split("Compiling entry function ")[1:]:
        kernel = re.match(r"'(\w+)' for '(\w+)'\n", section)
        registers = re.findall(r"Used (\d+) registers", section)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", section)
        if not kernel or len(registers) != 1 or len(spills) != section.count("Function properties for") or not spills:
            raise RuntimeError(f"this is not what ptxas -v used to print:\n{section}")
        body = bodies[kernel[1]]
        found.append(
            Compiled(
                *kernel.groups(),
                registers=int(registers[0]),
                spilled=sum(int(stores) + int(loads) for stores, loads in spills),
                wide_loads=len(_WIDE_LOADS.findall(body)),
                wide_stores=len(_WIDE_STORES.findall(body)),
            )
        )
    return found


def faults(kernels: list[Compiled]) -> list[str]:
    """What is wrong with them."""
    found = []
    for k in kernels:
        if k.spilled:
            found.append(f"{k.name} spills {k.spilled} bytes on {k.architecture}")
        if ("_rows_" in k.name or "_columns_" in k.name) and not (k.wide_loads and k.wide_stores):
            found.append(f"{k.name} has {k.wide_loads} loads and {k.wide_stores} stores of 16 bytes")
    compiled = [(k.name, k.architecture) for k in kernels]
    if sorted(compiled) != sorted(product(KERNELS, ARCHITECTURES)):
        missing = sorted(set(product(KERNELS, ARCHITECTURES)) - set(compiled))
        found.append(f"{len(compiled)} kernels, not {len(KERNELS)} for each of {ARCHITECTURES}; missing: {missing}")
    return found


def main() -> int:
    if shutil.which("nvcc") is None:
        print("nvcc was not found")
        return 1
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_kernels(Path(folder))
        size = (Path(folder) / "kernels.fatbin").stat().st_size
    print(f"{len(kernels)} kernels, {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s\n")
    print(f"{'registers on':44}" + "".join(f"{a:>8}" for a in ARCHITECTURES))
    for name in sorted({k.name for k in kernels}):
        registers = {k.architecture: k.registers for k in kernels if k.name == name}
        print(f"{name:44}" + "".join(f"{registers.get(a, '-'):>8}" for a in ARCHITECTURES))
    problems = faults(kernels)
    print("\n" + ("\n".join(problems) or "no spills; 16-byte loads and stores in all kernels for rows and columns"))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
