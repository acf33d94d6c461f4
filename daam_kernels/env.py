"""What a bug report needs, on one page: ``python -m daam_kernels.env``."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, available_backends, native
from .kernels import tuning

# Every variable that the package reads, and what it does.
VARIABLES = {
    "DAAM_KERNELS_BACKEND": 'the backend that "auto" takes',
    "DAAM_KERNELS_NO_NATIVE": "1: native and cuda are neither built nor loaded",
    "DAAM_KERNELS_LIBRARY": "another native library than the package's own",
    "DAAM_KERNELS_INSTRUCTION_SET": "of the native CPU kernels, instead of the best one",
    "DAAM_KERNELS_HUGE_PAGES": "1: native asks for huge pages below large results",
    "DAAM_KERNELS_CUDA_DRIVER": "another library with the CUDA driver's interface",
    "DAAM_KERNELS_TUNED": "0: tiles found by python -m benchmarks tune are not used",
    "DAAM_KERNELS_CACHE": "the folder that they are kept in, instead of the user's cache folder",
    "TRITON_INTERPRET": "1: triton runs in its interpreter, on CPU tensors",
}

_PACKAGE = Path(__file__).resolve().parent


def report() -> str:
    """The page. Needs neither the native library nor triton nor a GPU."""
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Backends": _backends(),
        "Native library": _native(),
        "Tuned tiles": _tuned(),
        "Environment variables": _environment(),
    }
    return "\n\n".join("\n".join([title, *_table(rows)]) for title, rows in sections.items())


def _versions() -> dict[str, str]:
    return {
        "daam_kernels": f"{__version__}, {_PACKAGE}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}",
        "triton": _installed("triton"),
    }


def _devices() -> dict[str, str]:
    cpu = f"{_cpu_model()}, {platform.machine()}, {os.cpu_count()} processors, torch uses {torch.get_num_threads()}"
    if not torch.cuda.is_available():
        return {"CPU": cpu, "GPU": "none that torch can use"}
    found = {"CPU": cpu}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
    return found


def _backends() -> dict[str, str]:
    return {
        name: f"{'available' if status else 'not available'}: {status.reason}"
        for name, status in available_backends().items()
    }


def _native() -> dict[str, str]:
    loaded, reason = native.status()
    rows = {"built": _build_record(), "loaded": "yes" if loaded else f"no: {reason}"}
    if loaded:
        rows["instruction set"] = f"{native.instruction_set()}, of {', '.join(native.instruction_sets())}"
    return rows


def _tuned() -> dict[str, str]:
    if not torch.cuda.is_available():
        devices = [torch.device("cpu")]
    else:
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = {}
    for model in filter(None, map(tuning.model_of, devices)):
        path = tuning.path_of(model)
        choices, reason = tuning.read(path, model)
        used = f"{len(choices)} used" if tuning.switched_on() else f"not used: {tuning.SWITCH} is 0"
        rows[model.name] = f"{path}, {used}{reason and f' ({reason})'}"
    return rows or {"none": f"there is no GPU to tune for; they would lie in {tuning.folder()}"}


def _environment() -> dict[str, str]:
    return {
        name: f"{os.environ[name]!r} ({effect})" if name in os.environ else f"not set ({effect})"
        for name, effect in VARIABLES.items()
    }


def _build_record() -> str:
    try:
        record = json.loads((_PACKAGE / "_build.json").read_text(encoding="utf-8"))
        parts = [f"{name}: {'yes' if part['built'] else 'no'}, {part['detail']}" for name, part in record.items()]
    except FileNotFoundError:
        return "no build ran here"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "its record, _build.json, cannot be read"
    return "; ".join(parts)


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or "unknown"


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {value}" for name, value in rows.items()]


if __name__ == "__main__":
    print(report())
