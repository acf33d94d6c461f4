"""Which backend serves a tensor: what works here, what does not and why, and how "auto" chooses."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "native", "reference")
ENVIRONMENT_VARIABLE = "DAAM_KERNELS_BACKEND"


class BackendStatus(NamedTuple):
    """Whether a backend works here, and where it does not, why. True or false as a condition."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def available_backends() -> dict[str, BackendStatus]:
    """The backends by name, with whether each works on this machine and, where it does not, why."""
    return {
        "triton": _triton_status(torch.cuda.is_available()),
        "native": BackendStatus(False, "this version of daam_kernels ships no native library"),
        "reference": BackendStatus(True, "plain PyTorch, any device"),
    }


def resolve(backend: str, x: Tensor) -> str:
    """The backend that serves x, for one of ``BACKENDS`` or "auto".

    Raises:
        ValueError: the name is unknown, here or in the environment variable that overrides "auto".
        RuntimeError: the backend was asked for by name and cannot serve a tensor on this device.
    """
    asked = "backend"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
        asked = f"the environment variable {ENVIRONMENT_VARIABLE}"
        if backend == "auto":
            return "triton" if x.is_cuda and _triton_status(True) else "reference"
        if backend not in BACKENDS:
            raise ValueError(f"{asked} must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    status = _triton_status(x.is_cuda) if backend == "triton" else available_backends()[backend]
    if not status:
        raise RuntimeError(f"{asked} asks for {backend!r}, which cannot serve a tensor on {x.device}: {status.reason}")
    return backend


@lru_cache(maxsize=None)
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _triton_status(on_gpu: bool) -> BackendStatus:
    if not _triton_installed():
        return BackendStatus(False, "triton is not installed (CUDA builds of torch bring it; else pip install triton)")
    if on_gpu:
        return BackendStatus(True, "Triton kernels on the GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return BackendStatus(True, "Triton's interpreter, on CPU tensors (slow, for tests)")
    return BackendStatus(False, "needs a CUDA tensor (or TRITON_INTERPRET=1, set before triton is imported)")
