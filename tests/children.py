"""Code in an interpreter of its own, for what is decided when the native library is loaded."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("DAAM_KERNELS_NO_NATIVE", "DAAM_KERNELS_HUGE_PAGES", "DAAM_KERNELS_INSTRUCTION_SET")


def python(code: str, **variables: str) -> str:
    """What code prints in another interpreter, which sees these variables and this one's library."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
