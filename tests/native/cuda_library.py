"""csrc/cuda on a CPU: its host code as a library of its own, launching emulated kernels (cuda_emulation.cpp).

Tensors are CPU tensors here, and pointers to the "device" are theirs. Compiled once per session, by g++.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import contextmanager
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from daam_kernels import native
from daam_kernels.options import DensityOptions
from daam_kernels.slices import slice_view
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
OPTIONS = DensityOptions(-1, None, "zero", "clamp", 1e-8, False)


def compile_library(output: Path, *sources: str, flags: tuple[str, ...] = ()) -> Path:
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
        *flags,
    ]
    subprocess.run([*command, "-o", str(output), *(str(ROOT / s) for s in sources), "-ldl"], check=True)
    return output


def compile_emulation(folder: Path, flags: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """(the host code, the driver that it is to load)."""
    host, driver = emulation_in(folder)
    compile_library(host, "csrc/cuda/driver.cpp", "csrc/cuda/launch.cpp", flags=flags)
    compile_library(driver, "tests/native/cuda_emulation.cpp", flags=flags)
    return host, driver


def emulation_in(folder: Path) -> tuple[Path, Path]:
    """Where compile_emulation() puts them."""
    return folder / "libhost.so", folder / "libdriver.so"


@contextmanager
def environment(**variables: str | None):
    """Environment variables as the C code sees them; None takes one out."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables):
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class Library:
    """The daam_cuda_* functions of a compiled csrc/cuda, with ``driver`` in the place of libcuda.

    Each has an image of its own, and so asks the driver anew what the device can.
    """

    def __init__(self, host: Path, driver: Path, image: bytes = b"emulated"):
        self._paths, self._buffer = (host, driver), ctypes.create_string_buffer(image)
        self.image = ctypes.addressof(self._buffer)
        self.host = ctypes.CDLL(str(host))
        self.host.daam_cuda_density_forward.argtypes = [c_void_p] * 9
        self.host.daam_cuda_density_backward.argtypes = [c_void_p] * 12
        self.host.daam_cuda_workspace.argtypes = [c_void_p]
        self.host.daam_cuda_workspace.restype = c_int64
        self.host.daam_cuda_load.argtypes = [c_void_p]
        with environment(DAAM_KERNELS_CUDA_DRIVER=str(driver)):
            self.status = self.load()  # the driver is looked for once
        self._driver = ctypes.CDLL(str(driver)) if driver.exists() else None

    def load(self) -> int:
        return self.host.daam_cuda_load(self.image)

    @property
    def launches(self) -> int:
        """Of all kernels, by all libraries with this driver."""
        return c_int.in_dll(self._driver, "emulated_launches").value

    @property
    def loads(self) -> int:
        """Of modules, by all libraries with this driver."""
        return c_int.in_dll(self._driver, "emulated_loads").value

    def on_device(self, shared_bytes: int) -> Library:
        """The same on a device whose blocks have no more shared memory."""
        with environment(EMULATION_SHARED_BYTES=str(shared_bytes)):
            return Library(*self._paths)

    def forward(
        self, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None = None, *,
        options: DensityOptions = OPTIONS, y: Tensor | None = None, weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """y; every tensor is used as it lies in memory, nothing is copied."""
        y = torch.empty_like(x) if y is None else y
        known = _problem(x, mean_offsets, c, mask, options, y, x)
        pointers = (_pointer(t) for t in (x, mean_offsets, c, mask, y, weights))
        self._check(self.host.daam_cuda_density_forward(known.address, *pointers, self.image, None))
        return y

    def backward(
        self, grad: Tensor, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None = None, *,
        options: DensityOptions = OPTIONS, dx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dx, dmean_offsets, dc); the workspace has the size that the library asks for, and NaN around it."""
        dx = torch.empty_like(x) if dx is None else dx
        gradients = [torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in (mean_offsets, c)]
        known = _problem(x, mean_offsets, c, mask, options, dx, x, grad)
        size = self.host.daam_cuda_workspace(known.address) // 4
        workspace = torch.full((size + 128,), torch.nan)
        pointers = [_pointer(t) for t in (grad, x, mean_offsets, c, mask, dx, *gradients, workspace[64:])]
        self._check(self.host.daam_cuda_density_backward(known.address, *pointers, self.image, None))
        assert workspace[:64].isnan().all() and workspace[64 + size :].isnan().all(), "written beside the workspace"
        return dx, *gradients

    def evaluate(self, x, mean_offsets, c, grad=None, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, dx, dmean_offsets, dc), as support.evaluate() has them of a backend."""
        mask = options.pop("mask", None)
        axis = options.pop("norm_axis", -1) % x.dim()
        options = OPTIONS._replace(norm_axis=axis, **options)
        grad = torch.ones_like(x) if grad is None else grad
        y = self.forward(x, mean_offsets, c, mask, options=options)
        return y, *self.backward(grad, x, mean_offsets, c, mask, options=options)

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}")


def _problem(x, mean_offsets, c, mask, options, out, *tensors) -> native.Problem:
    """What native.problem() makes of them, which needs the built library."""
    tensors = (out, *tensors) if mask is None else (out, *tensors, mask.expand(x.shape))
    view = slice_view(x.shape, options.norm_axis % x.dim(), *(t.stride() for t in tensors))
    assert view is not None, "no [outer, R, inner] strides for these tensors"
    padding = options.padding_in(x.dtype)
    flags = (
        (padding is not None, native._HAS_PADDING_VALUE),
        (mask is not None, native._HAS_MASK),
        (options.padding_stats == "exclude", native._EXCLUDE),
        (options.normalize == "softmax", native._SOFTMAX),
        (options.residual, native._RESIDUAL),
    )
    known = native._Density(
        outer=view.outer if x.numel() else 0, length=view.length, inner=view.inner,
        num_heads=c.shape[0], num_gaussians=c.shape[1],
        eps=options.eps, padding_value=padding or 0.0,
        type=native._TYPES[x.dtype], offsets_type=native._TYPES[mean_offsets.dtype], widths_type=native._TYPES[c.dtype],
        flags=sum(bit for there, bit in flags if there),
    )  # fmt: skip
    names = ["out", "x", "grad"][: len(view.strides) - (mask is not None)] + ["mask"] * (mask is not None)
    for name, strides in zip(names, view.strides, strict=True):
        setattr(known, name, native._Strides(*strides))
    known.offsets_strides[:] = mean_offsets.stride()
    known.widths_strides[:] = c.stride()
    return native.Problem(ctypes.addressof(known), known)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
