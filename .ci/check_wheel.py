"""Checks one built wheel: every module of daam_kernels/, the native library and what goes with it, no tests, no
benchmarks, torch as the only dependency.

Usage: python .ci/check_wheel.py WHEEL, from the repository root. The CUDA kernels must be in it where nvcc is found.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

LIBRARY, KERNELS, RECORD = "daam_kernels/_core.so", "daam_kernels/_cuda.fatbin", "daam_kernels/_build.json"


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
        record = archive.read(RECORD).decode()
        with tempfile.TemporaryDirectory() as folder:
            linked = subprocess.run(
                ["ldd", archive.extract(LIBRARY, folder)], check=True, capture_output=True, text=True
            ).stdout
    packaged = {name for name in names if ".dist-info/" not in name}
    expected = {path.as_posix() for path in Path("daam_kernels").rglob("*.py")} | {"daam_kernels/py.typed"}
    expected |= {LIBRARY, RECORD, *([KERNELS] if shutil.which("nvcc") else [])}
    if packaged != expected:
        sys.exit(
            f"missing in the wheel: {sorted(expected - packaged)}; too much: {sorted(packaged - expected)}: {record}"
        )
    if {name: part["built"] for name, part in json.loads(record).items()} != {
        "native": True,
        "cuda": KERNELS in expected,
    }:
        sys.exit(f"the record does not say what the wheel holds: {record}")
    if "-py3-none-linux_" not in wheel:
        sys.exit(f"the wheel must be for every Python on this platform, it is {Path(wheel).name}")
    libraries = {line.split()[0].partition(".so")[0].rpartition("/")[2] for line in linked.splitlines()}
    foreign = libraries - {"linux-vdso", "libstdc++", "libm", "libdl", "libc", "libgcc_s", "libpthread"}
    if {name for name in foreign if not name.startswith("ld-linux")}:
        sys.exit(f"the library is linked to more than it needs, {sorted(foreign)}:\n{linked}")
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    if required != ["torch>=2.11"]:
        sys.exit(f"the package must depend on torch>=2.11 alone, it does on {required}")
    if not any(name.endswith("/LICENSE") for name in names):
        sys.exit("the wheel has no LICENSE")
    print(f"{Path(wheel).name}: {len(packaged)} files, requires {', '.join(required)}")
    print(linked, end="")


if __name__ == "__main__":
    main(sys.argv[1])
