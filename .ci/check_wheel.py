"""Checks one built wheel: every module of daam_kernels/, no tests, no benchmarks, torch as the only dependency.

Usage: python .ci/check_wheel.py WHEEL, from the repository root.
"""

import sys
import zipfile
from email.parser import Parser
from pathlib import Path


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    packaged = {name for name in names if ".dist-info/" not in name}
    sources = {path.as_posix() for path in Path("daam_kernels").rglob("*.py")} | {"daam_kernels/py.typed"}
    if packaged != sources:
        sys.exit(f"missing in the wheel: {sorted(sources - packaged)}; too much: {sorted(packaged - sources)}")
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    if required != ["torch>=2.11"]:
        sys.exit(f"the package must depend on torch>=2.11 alone, it does on {required}")
    if not any(name.endswith("/LICENSE") for name in names):
        sys.exit("the wheel has no LICENSE")
    print(f"{Path(wheel).name}: {len(packaged)} files, requires {', '.join(required)}")


if __name__ == "__main__":
    main(sys.argv[1])
