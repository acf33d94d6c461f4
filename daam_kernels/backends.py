"""Which backend serves a tensor: what works here, what does not and why, and how "auto" chooses."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

BACKENDS = ("triton", "native", "cuda", "reference")
ENVIRONMENT_VARIABLE = "DAAM_KERNELS_BACKEND"
ADDITIVE_ATTENTION = "additive attention"  # in the place of a density
DENSITIES = {"native": ("product", "mixture"), "cuda": ("product",)}  # of the backends that do not serve all

_RAW_VARIABLE = os.environ.encodekey(ENVIRONMENT_VARIABLE)


class BackendStatus(NamedTuple):
    """Whether a backend works here, and where it does not, why. True or false as a condition."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def available_backends() -> dict[str, BackendStatus]:
    """The backends by name, with whether each works on this machine and, where it does not, why."""
    on_gpu = torch.cuda.is_available()
    started = on_gpu and torch.cuda.is_initialized()  # to start CUDA only to ask would forbid to fork afterwards
    return {
        "triton": _triton_status(on_gpu),
        "native": BackendStatus(*native.status()),
        "cuda": _cuda_status(on_gpu, torch.device("cuda", torch.cuda.current_device()) if started else None),
        "reference": BackendStatus(True, "plain PyTorch, any device"),
    }


def resolve(backend: str, x: Tensor, density: str = "product") -> str:
    """The backend that serves x with this density, or another operator by name, for one of ``BACKENDS`` or "auto".

    Raises:
        ValueError: the name is unknown, here or in the environment variable that overrides "auto".
        RuntimeError: the backend was asked for by name and cannot serve a tensor on this device or of this type, or
            not this density.
    """
    asked = "backend"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
        asked = f"the environment variable {ENVIRONMENT_VARIABLE}"
        if backend == "auto":
            return next(name for name in _preferred(x) if _status(name, x, density))
        if backend not in BACKENDS:
            raise ValueError(f"{asked} must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    status = _status(backend, x, density)
    if not status:
        raise RuntimeError(f"{asked} asks for {backend!r}, which cannot serve a tensor on {x.device}: {status.reason}")
    return backend


def reference_form(device_type: str, intermediates: int) -> str:
    """How "auto" computes on a CPU what has two forms: by its "formula", or in "blocks", native ones where there are.

    ``intermediates``: of additive attention batch * heads * Tq * Tk * hidden, of attention pooling of dense bags
    bags * rows * max(embed_dim, hidden, hops). The formula holds all of them, several times in training.

    Evidence, on one thread of an AVX2 CPU, float32, forward and with the backward: at 2 ** 8 to 2 ** 17 intermediates
    the formula took 0.3 to 0.8 of the time of additive attention's blocks in plain PyTorch, at 2 ** 18 0.5 to 1.5, at
    2 ** 21 4 to 12; of native blocks 0.3 to 0.7 up to 2 ** 16, 0.8 to 1.0 at 2 ** 17, 1.1 to 1.2 at 2 ** 18; of
    pooling's 0.37 to 0.9 up to 2 ** 17, in float64 too. Of the densities none needs a rule: where native serves one it
    took at most 0.7 of the time of plain PyTorch, from 2 elements to millions, of the product from 1 Gaussian to a
    million, of the mixture at most 0.25, from 1 to 1000. On CUDA nothing has been measured: no rule.
    """
    return "formula" if device_type == "cpu" and intermediates <= 1 << 17 else "blocks"


def takes_formula(backend: str, x: Tensor, intermediates: int) -> bool:
    """Whether "auto", which nothing overrides, leaves x to plain PyTorch by :func:`reference_form`'s formula."""
    if backend != "auto" or reference_form(x.device.type, intermediates) != "formula":
        return False
    if raw_variable() is None:
        return True
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() in ("", "auto")


def raw_variable() -> object:
    """What decides about "auto" beside the tensor, in whatever form is there first: only for telling it from others.

    os.environ.get encodes the name and raises inside, which takes as long as a small kernel.
    """
    try:
        return os.environ._data.get(_RAW_VARIABLE)
    except AttributeError:  # somebody put a dictionary in the place of os.environ
        return os.environ.get(ENVIRONMENT_VARIABLE)


def _preferred(x: Tensor) -> tuple[str, ...]:
    if x.is_cuda:
        return "triton", "cuda", "reference"
    return ("native", "reference") if x.is_cpu else ("reference",)


def _status(backend: str, x: Tensor, density: str) -> BackendStatus:
    if density == ADDITIVE_ATTENTION and backend == "native":
        if x.dtype == torch.float64:
            return BackendStatus(False, f"of {density} it serves float32, bfloat16 and float16, got {x.dtype}")
    elif density not in DENSITIES.get(backend, (density,)):
        served = " and ".join(map(repr, DENSITIES[backend]))
        return BackendStatus(False, f"it serves density={served} alone, got {density!r}")
    if backend == "triton":
        return _triton_status(x.is_cuda)
    if backend == "native":
        status = BackendStatus(*native.status())
        return status if not status or x.is_cpu else BackendStatus(False, "needs a CPU tensor")
    if backend == "cuda":
        if x.is_cuda and x.dtype not in native.CUDA_TYPES:
            return BackendStatus(False, f"it takes float32, bfloat16 and float16, got {x.dtype}")
        return _cuda_status(x.is_cuda, x.device if x.is_cuda else None)
    return BackendStatus(True, "")


def _cuda_status(on_gpu: bool, device: torch.device | None) -> BackendStatus:
    """``device``: the one that the kernels have to load on; None: only what can be said without starting CUDA."""
    available, reason = native.cuda_status()
    if available and not on_gpu:
        available, reason = False, "needs a CUDA tensor"
    if available and device is not None:
        failure = native.cuda_failure(device)
        available, reason = not failure, failure or reason
    return BackendStatus(available, reason)


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
