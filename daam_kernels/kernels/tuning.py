"""Tiles that ``python -m benchmarks tune`` found faster than the ladder's, on disk, one file for each model of device.

``daam_kernels/tuned-DEVICE.json`` lies in the user's cache folder, or in the folder that DAAM_KERNELS_CACHE names. It
counts for the kernels, the triton and the device that it was measured with, and for nothing else: another version, a
broken file or a tile that must not be launched is as if it were not there. DAAM_KERNELS_TUNED=0 turns all of it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..cache import cache_folder
from .tiling import Choice, Problem, fault

SWITCH, FOLDER = "DAAM_KERNELS_TUNED", "DAAM_KERNELS_CACHE"

_FORMAT = 1
_NOTHING: Mapping[Problem, Choice] = MappingProxyType({})
_log = logging.getLogger(__name__)
_replacement: Mapping[Problem, Choice] | None = None


class Device(NamedTuple):
    """What a measurement holds for: the name of the model, and its compute capability or architecture."""

    name: str
    capability: str


class TunedFile(NamedTuple):
    """What a file holds that may be launched, and why it holds nothing or less than it says; empty where it is fine."""

    choices: Mapping[Problem, Choice]
    reason: str


def tuned_choices(device: torch.device) -> Mapping[Problem, Choice]:
    """The choices for this device, read from disk once."""
    if _replacement is not None:
        return _replacement
    model = model_of(device) if switched_on() else None
    return _NOTHING if model is None else _read_once(path_of(model), model)


def switched_on() -> bool:
    """Whether tuned tiles are used: unless DAAM_KERNELS_TUNED is 0."""
    return os.environ.get(SWITCH, "").strip() != "0"


def model_of(device: torch.device) -> Device | None:
    """What is tuned of a device; None where nothing can be: a CPU, where Triton does not run but in its interpreter."""
    if device.type == "cuda":
        return _gpu_model(device.index)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return Device("interpreter", "none") if interpreted else None


def path_of(device: Device) -> Path:
    """The file of that device; it need not exist."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{device.name} {device.capability}".lower()).strip("-")
    return folder() / f"tuned-{name}.json"


def folder() -> Path:
    """Where the files lie; it need not exist."""
    return Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else cache_folder()


def read(path: Path, device: Device) -> TunedFile:
    """What the file holds for this device, for these kernels and this triton. Raises nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, entries = content["version"], content["tiles"]
        expected = _version(device)
        if version != expected:
            differs = [name for name in expected if version.get(name) != expected[name]]
            return TunedFile(_NOTHING, f"it was measured with another {' and '.join(differs) or 'format'}")
        found = [(Problem(**entry["problem"]), Choice(**entry["choice"])) for entry in entries]
        faults = {problem: reason for problem, choice in found if (reason := fault(problem, choice))}
    except FileNotFoundError:
        return TunedFile(_NOTHING, "there is no such file")
    except Exception as error:  # a file may hold anything: what goes wrong with it is no call's
        return TunedFile(_NOTHING, f"it cannot be read: {error!r}")
    good = {problem: choice for problem, choice in found if problem not in faults}
    reason = f"{len(faults)} of {len(found)} tiles do not fit, such as: {next(iter(faults.values()))}" if faults else ""
    return TunedFile(MappingProxyType(good), reason)


def store(device: Device, changes: Mapping[Problem, Choice | None]) -> Path:
    """Write choices into the device's file beside those that it holds already; None takes one away.

    Another process that stores at the same time loses nothing, and one that reads sees the file before or after.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        merged = dict(read(path, device).choices) | dict(changes)
        tiles = [
            {"problem": asdict(problem), "choice": asdict(choice)}
            for problem, choice in merged.items()
            if choice is not None
        ]
        _write_whole(path, json.dumps({"version": _version(device), "tiles": tiles}, indent=1))
    _read_once.cache_clear()
    return path


@contextlib.contextmanager
def replaced(choices: Mapping[Problem, Choice]) -> Iterator[None]:
    """Launch with these choices in the place of what any file holds; the tuner's, and not safe among threads."""
    from .remembered import forget_launches

    global _replacement
    before, _replacement = _replacement, choices
    forget_launches()
    try:
        yield
    finally:
        _replacement = before
        forget_launches()


@lru_cache(maxsize=None)
def _read_once(path: Path, device: Device) -> Mapping[Problem, Choice]:
    choices, reason = read(path, device)
    if reason:
        _log.debug("tuned tiles in %s: %d used; %s", path, len(choices), reason)
    return choices


@lru_cache(maxsize=None)
def _gpu_model(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    on_nvidia = torch.version.hip is None  # where the name of an architecture is that of the device
    return Device(found.name, f"{found.major}.{found.minor}" if on_nvidia else found.gcnArchName)


def _version(device: Device) -> dict[str, Any]:
    return {"format": _FORMAT, "kernels": _kernels(), "triton": _triton(), **device._asdict()}


@lru_cache(maxsize=None)
def _kernels() -> str:
    """A hash of their sources."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()[:16]


@lru_cache(maxsize=None)
def _triton() -> str:
    for distribution in ("triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return "unknown"


def _write_whole(path: Path, text: str) -> None:
    # In the same folder, so that the last step is one rename on one file system: whole or not at all.
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part", text=True)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows: the file is whole all the same, but of two writers the later one wins
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
