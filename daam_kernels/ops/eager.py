"""Eager calls on plain tensors of a CPU or one GPU, remembered once checked and resolved: the next goes to the kernel.

To check a call and to find its backend takes several times as long as a small kernel. All of it depends on the
arguments' types, layouts and values, tensor contents apart, and on one environment variable: the signature of a call.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import raw_variable

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_STRIDED = torch.strided
_MOST = 4096  # calls that are remembered; then it begins anew

_calls: dict[tuple, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_transforms_active = torch._C._are_functorch_transforms_active
_num_modes = torch._C._len_torch_dispatch_stack


def is_transformed() -> bool:
    """Inside torch.func (grad, vmap, jvp, ...) or forward-mode AD, which see no further than ordinary operations.

    They refuse an autograd.Function, and take an operator's tangent to be zero.
    """
    return not _is_compiling() and (_transforms_active() or forward_ad._current_level >= 0)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd has to know of the call, and the tensors are numbers in memory."""
    if _is_compiling() or _is_tracing() or _num_modes():
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or not _have_memory(t)):
            return False
    return True


def signature(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, return_weights: bool,
    norm_axis: int, padding_value: float | None, padding_stats: str, normalize: str, eps: float, residual: bool,
    backend: str,
) -> tuple | None:  # fmt: skip
    """What decides about a call, with nothing checked yet; None for one that is not remembered."""
    if (
        _is_compiling()
        or mask is not None
        or return_weights
        or type(x) not in _PLAIN
        or type(mean_offsets) not in _PLAIN
        or type(c) not in _PLAIN
        or x.is_nested  # of the strided layout: has neither shape nor strides
        or x.layout is not _STRIDED
        or not (x.is_cpu and mean_offsets.is_cpu and c.is_cpu or on_one_gpu(x, mean_offsets, c))
        or x.is_neg()
        or mean_offsets.is_neg()
        or c.is_neg()
        or forward_ad._current_level >= 0
        or _transforms_active()
        or _num_modes()
        or _is_tracing()
        or not _have_memory(x, mean_offsets, c)
    ):
        return None
    return (
        x.shape, x.stride(), x.dtype, x.get_device(),
        mean_offsets.shape, mean_offsets.stride(), mean_offsets.dtype,
        c.shape, c.stride(), c.dtype,
        norm_axis, padding_value, padding_stats, normalize, eps, not residual, backend, raw_variable(),
        type(norm_axis), type(padding_value), type(eps),  # True equals 1, and is refused
    )  # fmt: skip


def on_one_gpu(x: Tensor, *others: Tensor) -> bool:
    """Whether all are CUDA tensors of the same device."""
    return x.is_cuda and all(t.is_cuda and t.get_device() == x.get_device() for t in others)


def remembered(call: tuple | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What gives y of x, mean_offsets and c for calls of this signature."""
    if call is None:
        return None
    try:
        return _calls.get(call)
    except TypeError:  # an argument that cannot be hashed is none that fits
        return None


def remember(call: tuple, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    if len(_calls) >= _MOST:
        _calls.clear()
    _calls[call] = run


def _have_memory(*tensors: Tensor) -> bool:
    """Not so meta and sparse tensors, zeros without storage, a vmap's batches, and where there are no elements."""
    try:
        for t in tensors:
            if t.data_ptr() == 0:
                return False
    except RuntimeError:
        return False
    return True
