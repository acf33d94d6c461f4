"""From tensors to a launch: views, copies where a view does not exist, and the arguments that all kernels share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..options import DensityOptions
from ..sequences import packing
from ..slices import packed_view, slice_view, with_views
from .direct import Given, Plan
from .launch import DensityLaunch, Launch, density_launch
from .remembered import remembered
from .tiling import PROCESSORS
from .tuning import tuned_choices

# Plain numbers: what divides them is told to the compiler by VEC, so their values must not make new kernels.
SIZES = ["outer", "chunk", "length", "num_heads", "num_gaussians", "num_slices", "num_chunks", "num_partials", "tiles"]


def arithmetic_type(x: Tensor) -> torch.dtype:
    """The type that sums are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def prepare(
    x: Tensor,
    mean_offsets: Tensor | Sequence[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: DensityOptions,
    names: tuple[str, ...],
    out: Tensor,
    *others: Tensor,
) -> tuple[DensityLaunch, tuple[Tensor, ...], Tensor | None]:
    """The launch for ``out``, dense and of x's shape, and the tensors x, *others and mask to launch it with.

    ``mean_offsets`` are those of the layer, or of every layer of a block.
    ``names`` are what the kernels call out, x and the others. A tensor is copied only where it has no
    [outer, R, inner] strides.
    """
    tensors = (x, *others) if mask is None else (x, *others, mask.expand(x.shape))
    num_sequences = None
    if cu_seqlens is None:
        tensors = with_views(out, options.norm_axis, *tensors, in_order=_in_order(options))
    else:
        num_sequences = cu_seqlens.numel() - 1
        if options.max_seqlen is None:
            options = options._replace(max_seqlen=packing(cu_seqlens).longest)
    layouts = tuple(t.stride() for t in (out, *tensors))
    if isinstance(mean_offsets, Tensor):
        num_heads, num_gaussians = mean_offsets.shape
    else:
        num_heads, num_gaussians = mean_offsets[0].shape[0], tuple(m.shape[1] for m in mean_offsets)
    launch = _launch(
        x.shape, num_sequences, x.dtype, x.device, layouts, names, mask is not None, num_heads, num_gaussians, options
    )
    if mask is None:
        return launch, tensors, None
    return launch, tensors[:-1], tensors[-1].view(torch.uint8)


def viewable(out: Tensor, options: DensityOptions) -> Tensor:
    """``out``, or where it is in no order that its density can be written in, a tensor to write instead and copy."""
    if not _in_order(options) or slice_view(out.shape, options.norm_axis, out.stride(), in_order=True) is not None:
        return out
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _in_order(options: DensityOptions) -> bool:
    """Whether inner must be the axes behind ``norm_axis``, in their order: a parameter of each is at stake."""
    return options.density == "gaussian"


def run(kernel: Any, launch: Launch, given: dict[str, Given], grid: tuple[int, ...] = ()) -> None:
    """Launch a kernel on those of the given arguments that it takes, over the launch's grid or one of its own."""
    plan = launch.plans.get(kernel.fn)
    if plan is None:
        plan = launch.plans[kernel.fn] = Plan(kernel, launch, given)
    plan(given, (*(grid or launch.grid), 1, 1)[:3])


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which must be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@remembered(4096)
def _launch(
    shape: torch.Size,
    num_sequences: int | None,
    dtype: torch.dtype,
    device: torch.device,
    layouts: tuple[tuple[int, ...], ...],
    names: tuple[str, ...],
    has_mask: bool,
    num_heads: int,
    num_gaussians: int | tuple[int, ...],
    options: DensityOptions,
) -> DensityLaunch:
    if num_sequences is None:
        view = slice_view(shape, options.norm_axis, *layouts, in_order=_in_order(options))
    else:  # of no more than all rows, whatever max_seqlen says
        view = packed_view(num_sequences, min(options.max_seqlen, shape[0]), shape[1], *layouts)
    padding = options.padding_in(dtype)
    padded = padding is not None or has_mask
    flags = {
        "PADDING": padding,
        "HAS_MASK": has_mask,
        "PADDED": padded,
        "EXCLUDE": padded and options.padding_stats == "exclude",
        "CLAMP": options.normalize == "clamp",
        "MIXTURE": options.density != "product",  # evaluated Gaussian by Gaussian
        "NORMALISED": options.normalised,
        "PER_FEATURE": options.density == "gaussian",
        "MULTIPLY": options.multiply,
        "RESIDUAL": options.residual,
        "EPS": options.eps,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    num_gaussians = 1 if flags["PER_FEATURE"] else num_gaussians
    of_device = processors(device), tuned_choices(device)
    return density_launch(view, names, num_heads, num_gaussians, dtype.itemsize, flags, *of_device)


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
