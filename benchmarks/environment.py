"""Where and with what a benchmark ran: what must stand beside every number."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import daam_kernels
from daam_kernels import native
from daam_kernels.kernels import tuning

INTERRUPTED = 130  # the exit status by which a shell knows a program that Ctrl-C ended

_REPOSITORY = Path(__file__).resolve().parent.parent
_SETTINGS = (  # that change the numbers
    "DAAM_KERNELS_BACKEND", "DAAM_KERNELS_HUGE_PAGES", "DAAM_KERNELS_INSTRUCTION_SET", "DAAM_KERNELS_TUNED",
)  # fmt: skip
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe(device: torch.device) -> dict[str, str | int | float | None]:
    """Device, driver, versions, commit and date; None where a thing does not exist here.

    Nothing that names the machine or its folders: it is meant to be published.
    """
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "l2_mb": torch.cuda.get_device_properties(device).L2_cache_size / 1e6 if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "daam_kernels": daam_kernels.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "upstream": _version("gaussian-adaptive-attention"),
        "instruction_set": native.instruction_set() if native.status()[0] else None,
        "huge_pages": _huge_pages(),
        "tuned_tiles": len(tuning.tuned_choices(torch.empty(0, device=device).device)) or None,
        "settings": " ".join(f"{name}={os.environ[name]}" for name in _SETTINGS if os.environ.get(name)) or None,
        "python": platform.python_version(),
        "platform": _system(),
    }


def usable_device(name: str) -> torch.device:
    """The device of that name; ends the program with a message where this machine or this torch has none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here")
    return torch.device(name)


def usable_folder(path: Path, named_by: str = "--out") -> Path:
    """The folder, made where it does not exist; ends the program with a message where nothing can be written to it.

    To be asked before anything is measured. ``named_by``: what a user sets it with.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SystemExit(f"{named_by} {path}: it takes a folder to write to, {error.strerror or error}") from None
    return path


def available_memory() -> int | None:
    """Bytes of main memory that a new tensor could take, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _huge_pages() -> str | None:
    """What Linux does with transparent huge pages: always, madvise (for who asks) or never."""
    try:
        chosen = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        return None
    return chosen[1] if chosen else None


def _system() -> str:
    """Such as Linux 6.1.0 x86_64; what a builder put behind the kernel's number may name the machine."""
    number = re.match(r"[\d.]*", platform.release())[0]
    return " ".join(part for part in (platform.system(), number, platform.machine()) if part)


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    commit = _output("git", "-C", str(_REPOSITORY), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(_REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changes else commit


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that the command prints, or None where it prints nothing, fails or does not exist."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None
