"""The native library: where it is, why it is not there, and its C interface, of density attention in full.

The interface is csrc/daam_kernels.h. Nothing is loaded before it is asked for. The environment is read then, once:
``DAAM_KERNELS_NO_NATIVE=1`` refuses to load, ``DAAM_KERNELS_LIBRARY`` names another file than the package's own,
``DAAM_KERNELS_HUGE_PAGES=1`` asks for huge pages below large results.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from .options import DensityOptions
from .sequences import packing
from .slices import slice_view, with_views

CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_HERE = Path(__file__).resolve().parent
_LIBRARY, _CUDA_IMAGE, _BUILD = _HERE / "_core.so", _HERE / "_cuda.fatbin", _HERE / "_build.json"
_ABI_VERSION = 3
_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_HAS_PADDING_VALUE, _HAS_MASK, _EXCLUDE, _SOFTMAX, _RESIDUAL, _HUGE_PAGES = (1 << bit for bit in range(6))
_STATUS = {
    1: "out of memory",
    2: "it does not serve these arguments",
    3: "the CUDA driver is missing, or too old",
    4: "the compiled CUDA kernels do not load on this device",
    5: "a CUDA kernel could not be launched",
}
_TORCH_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")


class _Strides(ctypes.Structure):
    _fields_ = [("outer", c_int64), ("row", c_int64), ("inner", c_int64)]


class _Density(ctypes.Structure):
    """daam_density: one problem, all but its pointers."""

    _fields_ = [
        *((name, c_int64) for name in ("outer", "length", "inner", "num_heads", "num_gaussians")),
        *((name, _Strides) for name in ("x", "out", "grad", "mask")),
        *((name, 2 * c_int64) for name in ("offsets_strides", "widths_strides")),
        *((name, c_double) for name in ("eps", "padding_value")),
        *((name, c_int32) for name in ("type", "offsets_type", "widths_type", "flags")),
    ]


class Problem(NamedTuple):
    """A problem for the library, and where it lies: the address holds as long as the structure is referred to."""

    address: int
    structure: _Density


class _Library(NamedTuple):
    """The functions of a loaded library, typed."""

    forward: Callable[..., int]
    backward: Callable[..., int]
    mixture_forward: Callable[..., int]
    mixture_backward: Callable[..., int]
    cuda_forward: Callable[..., int]
    cuda_backward: Callable[..., int]
    cuda_workspace: Callable[[int], int]
    cuda_load: Callable[[int], int]
    additive_scores: Callable[..., int]
    additive_gradients: Callable[..., int]
    instruction_set: Callable[[], bytes]
    instruction_sets: Callable[[], bytes]
    parallel_for: c_void_p  # torch's own threads; null on a torch without it, where all runs in the calling thread
    flags: int


# What there is


def status() -> tuple[bool, str]:
    """Whether the library is there and serves the CPU; what it is, or why it is not."""
    found = _load()
    if isinstance(found, str):
        return False, found
    return True, f"C++ kernels on the CPU ({instruction_set()})"


def cuda_status() -> tuple[bool, str]:
    """Whether the library has CUDA kernels; whether they load on a device: :func:`cuda_failure`."""
    found = _load()
    if isinstance(found, str):
        return False, found
    if not _CUDA_IMAGE.exists():
        return False, f"the CUDA kernels of csrc were not compiled: {_build_detail('cuda')}"
    if torch.version.cuda is None:
        return False, "needs a torch that was built for CUDA"
    return True, "CUDA C++ kernels on the GPU"


_loaded_on: set[torch.device] = set()


def cuda_failure(device: torch.device) -> str:
    """Why the CUDA kernels do not load on this device; nothing where they do. Starts CUDA on it."""
    if device in _loaded_on:
        return ""
    with torch.cuda.device(device):
        code = _library().cuda_load(_cuda_image())
    if code:  # asked again: memory may be free by then
        return _reason(code)
    _loaded_on.add(device)
    return ""


def instruction_set() -> str:
    """What the CPU kernels run with; needs the library."""
    return _library().instruction_set().decode()


def instruction_sets() -> tuple[str, ...]:
    """What they could run with on this machine, the best one first; needs the library."""
    return tuple(_library().instruction_sets().decode().split())


# Density attention


def problem(
    mean_offsets: Tensor, c: Tensor, mask: Tensor | None, options: DensityOptions, out: Tensor, *tensors: Tensor
) -> Problem | None:
    """The problem of tensors like ``out``, which is dense: x, and y's gradient where there is one.

    None where one must be copied first: it has no [outer, R, inner] strides, or is a parameter of an unknown type.
    """
    return _problem(
        options,
        out.shape,
        out.dtype,
        mean_offsets.shape,
        mean_offsets.stride(),
        mean_offsets.dtype,
        c.stride(),
        c.dtype,
        mask is not None,
        out.stride(),
        *(t.stride() for t in tensors),
        *(() if mask is None else (mask.stride(),)),
    )


def bound_forward(known: Problem) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """What fills y on the CPU from x, mean_offsets and c, for a problem that is known to be theirs; without a mask."""
    library = _library()
    forward, parallel_for = library.forward, library.parallel_for

    def fill(x, mean_offsets, c, y):
        code = forward(
            known.address, x.data_ptr(), mean_offsets.data_ptr(), c.data_ptr(), None, y.data_ptr(), None, parallel_for
        )
        if code:
            _fail(code)

    return fill


def bound_backward(known: Problem) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """What gives (dx, dmean_offsets, dc) on the CPU of y's gradient, x, mean_offsets and c, as bound_forward does."""
    library = _library()
    backward, parallel_for = library.backward, library.parallel_for

    def gradients(grad, x, mean_offsets, c):
        dx = torch.empty_like(x)
        d_offsets, d_c = _new_gradients(mean_offsets, c)
        code = backward(
            known.address, grad.data_ptr(), x.data_ptr(), mean_offsets.data_ptr(), c.data_ptr(), None,
            dx.data_ptr(), d_offsets.data_ptr(), d_c.data_ptr(), parallel_for,
        )  # fmt: skip
        if code:
            _fail(code)
        return dx, d_offsets, d_c

    return gradients


def density_forward(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    options: DensityOptions,
    y: Tensor,
    weights: Tensor | None,
    log_shares: Tensor | None = None,
) -> None:
    """Fill y, and weights where it is given, on the device of x: CPU or CUDA. Both are as torch.empty_like(x).

    ``log_shares``: [num_heads, num_gaussians] of a mixture, on a CPU alone.
    """
    if not x.numel():
        return
    mean_offsets, c = _served(mean_offsets), _served(c)
    known, (x,), mask = _prepare(mean_offsets, c, mask, options, y, x)
    library = _library()
    parameters = known.address, x.data_ptr(), mean_offsets.data_ptr(), c.data_ptr()
    pointers = _pointer(mask), y.data_ptr(), _pointer(weights)
    if log_shares is not None:
        log_shares = _contiguous_double(log_shares)
        code = library.mixture_forward(*parameters, log_shares.data_ptr(), *pointers, library.parallel_for)
    elif x.is_cpu:
        code = library.forward(*parameters, *pointers, library.parallel_for)
    else:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            code = library.cuda_forward(*parameters, *pointers, _cuda_image(), stream)
    if code:
        _fail(code)


def density_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    options: DensityOptions,
    dx: Tensor | None = None,
    log_shares: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dmean_offsets, dc) for y's gradient, on the device of x: CPU or CUDA. ``dx``: what to fill with it.

    Of a mixture dlog_shares after them, in float64.
    """
    if mean_offsets.dtype not in _TYPES or c.dtype not in _TYPES:
        served = _served(mean_offsets), _served(c)
        dx, d_offsets, d_c, *rest = density_backward(grad, x, *served, mask, options, dx, log_shares)
        return dx, d_offsets.to(mean_offsets.dtype), d_c.to(c.dtype), *rest
    dx = torch.empty_like(x) if dx is None else dx
    shares = () if log_shares is None else (_contiguous_double(log_shares),)
    gradients = _new_gradients(mean_offsets, c, *shares)
    if not x.numel():
        return dx, *(g.zero_() for g in gradients)
    known, (x, grad), mask = _prepare(mean_offsets, c, mask, options, dx, x, grad)
    library = _library()
    parameters = known.address, grad.data_ptr(), x.data_ptr(), mean_offsets.data_ptr(), c.data_ptr()
    pointers = _pointer(mask), dx.data_ptr(), *(g.data_ptr() for g in gradients)
    if shares:
        code = library.mixture_backward(*parameters, shares[0].data_ptr(), *pointers, library.parallel_for)
    elif x.is_cpu:
        code = library.backward(*parameters, *pointers, library.parallel_for)
    else:
        with torch.cuda.device(x.device):
            workspace = torch.empty(library.cuda_workspace(known.address), dtype=torch.uint8, device=x.device)
            stream = torch.cuda.current_stream().cuda_stream
            code = library.cuda_backward(*parameters, *pointers, workspace.data_ptr(), _cuda_image(), stream)
    if code:
        _fail(code)
    return dx, *gradients


def ragged_forward(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    options: DensityOptions,
    y: Tensor,
    weights: Tensor | None,
    log_shares: Tensor | None = None,
) -> None:
    """The same of packed sequences, one after another; x is [total, features]."""
    mask, options = None if mask is None else mask.expand(x.shape), options._replace(max_seqlen=None)
    for rows in packing(cu_seqlens).rows:
        part_mask, part_weights = (None if t is None else t[rows] for t in (mask, weights))
        density_forward(x[rows], mean_offsets, c, part_mask, options, y[rows], part_weights, log_shares)


def ragged_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    options: DensityOptions,
    log_shares: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same of packed sequences; what they give to the parameters is added in float64, the first one first."""
    dx = torch.empty_like(x)
    mask, options = None if mask is None else mask.expand(x.shape), options._replace(max_seqlen=None)
    parameters = mean_offsets.double(), c.double()
    sums = [torch.zeros_like(p) for p in (*parameters, *(() if log_shares is None else (log_shares.double(),)))]
    for rows in packing(cu_seqlens).rows:
        part_mask = None if mask is None else mask[rows]
        _, *gradients = density_backward(grad[rows], x[rows], *parameters, part_mask, options, dx[rows], log_shares)
        for total, gradient in zip(sums, gradients):
            total += gradient
    return dx, sums[0].to(mean_offsets.dtype), sums[1].to(c.dtype), *sums[2:]


def additive_scores(problem: int, *pointers: int) -> None:
    """daam_additive_scores, on torch's threads."""
    library = _library()
    code = library.additive_scores(problem, *pointers, library.parallel_for)
    if code:
        _fail(code)


def additive_gradients(problem: int, *pointers: int) -> None:
    """daam_additive_gradients, on torch's threads."""
    library = _library()
    code = library.additive_gradients(problem, *pointers, library.parallel_for)
    if code:
        _fail(code)


def _new_gradients(*parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters)


def _prepare(mean_offsets, c, mask, options, out, *tensors) -> tuple[Problem, Sequence[Tensor], Tensor | None]:
    """The problem, and the tensors and the mask to give with it: copies where they have no view."""
    if mask is not None:
        mask = mask.expand(out.shape)
    known = problem(mean_offsets, c, mask, options, out, *tensors)
    if known is None:
        if mask is None:
            tensors = with_views(out, options.norm_axis, *tensors)
        else:
            *tensors, mask = with_views(out, options.norm_axis, *tensors, mask)
        known = problem(mean_offsets, c, mask, options, out, *tensors)
    return known, tensors, mask


@lru_cache(maxsize=4096)
def _problem(
    options: DensityOptions,
    shape: torch.Size,
    dtype: torch.dtype,
    parameters: torch.Size,
    offsets_strides: tuple[int, int],
    offsets_type: torch.dtype,
    widths_strides: tuple[int, int],
    widths_type: torch.dtype,
    has_mask: bool,
    *layouts: tuple[int, ...],
) -> Problem | None:
    view = slice_view(shape, options.norm_axis, *layouts)
    if view is None or offsets_type not in _TYPES or widths_type not in _TYPES:
        return None
    strides = [_Strides(*s) for s in view.strides]
    mask = strides.pop() if has_mask else _Strides()
    out, x, grad = strides if len(strides) == 3 else (*strides, _Strides())
    padding = options.padding_in(dtype)
    flags = (
        _library().flags
        | (_HAS_PADDING_VALUE if padding is not None else 0)
        | (_HAS_MASK if has_mask else 0)
        | (_EXCLUDE if options.padding_stats == "exclude" else 0)
        | (_SOFTMAX if options.normalize == "softmax" else 0)
        | (_RESIDUAL if options.residual else 0)
    )
    structure = _Density(
        *(view.outer, view.length, view.inner, *parameters, x, out, grad, mask),
        *((2 * c_int64)(*offsets_strides), (2 * c_int64)(*widths_strides), options.eps, padding or 0),
        *(_TYPES[dtype], _TYPES[offsets_type], _TYPES[widths_type], flags),
    )
    return Problem(ctypes.addressof(structure), structure)


def _served(parameter: Tensor) -> Tensor:
    """In a type that the library knows: parameters may be of any floating-point type, 8 bits included."""
    return parameter if parameter.dtype in _TYPES else parameter.float()


def _contiguous_double(log_shares: Tensor) -> Tensor:
    """As the library takes them: saved_tensors_hooks, or a caller of the operator, may give them in another layout."""
    return log_shares.double().contiguous()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _fail(code: int) -> None:
    raise RuntimeError(f"the native library of daam_kernels failed: {_reason(code)}")


def _reason(code: int) -> str:
    return _STATUS.get(code, f"status {code}")


# Loading


def _library() -> _Library:
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@lru_cache(maxsize=None)
def _load() -> _Library | str:
    """The library, or why it is not there."""
    if _switched_on("DAAM_KERNELS_NO_NATIVE"):
        return "switched off by the environment variable DAAM_KERNELS_NO_NATIVE"
    named = os.environ.get("DAAM_KERNELS_LIBRARY")
    path = named or str(_LIBRARY)
    if not named and not _LIBRARY.exists():
        return f"the native library was not built: {_build_detail('native')}"
    try:
        core = ctypes.CDLL(path)
        version = core.daam_abi_version()
        if version != _ABI_VERSION:
            return f"{path} has version {version} of the C interface, this daam_kernels needs {_ABI_VERSION}: reinstall"
        return _typed(core)
    except (OSError, AttributeError) as error:
        return f"{path} does not load: {' '.join(str(error).split())}"


def _typed(core: ctypes.CDLL) -> _Library:
    def function(name: str, arguments: int, result: Any = ctypes.c_int) -> Callable:
        found = getattr(core, name)
        found.argtypes, found.restype = [c_void_p] * arguments, result
        return found

    return _Library(
        function("daam_density_forward", 8),
        function("daam_density_backward", 10),
        function("daam_mixture_forward", 9),
        function("daam_mixture_backward", 12),
        function("daam_cuda_density_forward", 9),
        function("daam_cuda_density_backward", 12),
        function("daam_cuda_workspace", 1, c_int64),
        function("daam_cuda_load", 1),
        function("daam_additive_scores", 6),
        function("daam_additive_gradients", 9),
        function("daam_instruction_set", 0, ctypes.c_char_p),
        function("daam_instruction_sets", 0, ctypes.c_char_p),
        _torch_parallel_for(),
        _HUGE_PAGES if _switched_on("DAAM_KERNELS_HUGE_PAGES") else 0,
    )


def _torch_parallel_for() -> c_void_p:
    try:
        loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _TORCH_LIBRARY))  # the one that torch has loaded
        return ctypes.cast(loaded.torch_parallel_for, c_void_p)
    except (OSError, AttributeError):
        return c_void_p()


@lru_cache(maxsize=None)
def _cuda_image() -> ctypes.Array:
    """The fat binary in memory, where the driver expects it to stay."""
    return ctypes.create_string_buffer(_CUDA_IMAGE.read_bytes())


def _build_detail(part: str) -> str:
    try:
        return json.loads(_BUILD.read_text(encoding="utf-8"))[part]["detail"]
    except (OSError, ValueError, LookupError, TypeError):
        return "this is a source tree in which no build ran; pip install . does"


def _switched_on(name: str) -> bool:
    return os.environ.get(name, "0").strip() not in ("", "0")
