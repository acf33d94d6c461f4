"""A block of residual layers of density attention, each y = x + x w, in one sweep.

``block_forward_resident`` reads x once and writes the last layer's y once. ``block_backward_resident`` reads x and the
incoming gradient once and writes dx once: it works out the layers' inputs anew and keeps them in registers. Between
layers x is rounded to its storage type, as if it had been stored; the gradient is not. The parameter gradients need
four sums per layer and head, which ``block_parameter_gradients`` adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import DensityOptions
from .density_backward import resident_gradient
from .density_math import (
    count_elements,
    find_peak,
    from_statistics,
    load_gaussians,
    pick_first,
    product_quadratic,
    product_weights,
    reciprocal_sqrt,
    standardise,
    tile_statistics,
    value_at_peak,
    weighted_output,
)
from .density_parameters import head_gradients, save_partials
from .host import SIZES, arithmetic_type, device_of, prepare, run
from .tiles import find_valid, load_tile, program_slices, rows_within, slice_offsets, tile_offsets


@triton.jit
def few_neighbours(i, LAYERS: tl.constexpr):
    """i, of neighbouring slices, so that the compiler gives 4 or 2 of them to a thread, not 16 bytes' worth: for each a
    thread holds some twenty numbers, and three more per layer."""
    most: tl.constexpr = 4 if LAYERS <= 3 else 2
    return i // most * most + i % most


@triton.jit
def layer_quadratic(
    mean_offsets_ptr, c_ptr, head, num_gaussians, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """(slope, center, spread, level) of one layer's head."""
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    return product_quadratic(offset, width, real, EPS, ACC)


@triton.jit
def layer_weights(
    x, allowed, within, n, slope, center, spread, level,
    PADDING: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr, CLAMP: tl.constexpr, EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(weights of a layer whose input is x, valid elements, x at the peak, mean from there, variance + eps)."""
    valid = layer_valid(x, allowed, PADDING)
    domain = valid if EXCLUDE else within
    if PADDED:
        x0 = pick_first(x, valid, BLOCK_R)
    else:
        x0 = tl.sum(tl.where((tl.arange(0, BLOCK_R) == 0)[:, None], x, 0.0), axis=0)
    shifted = x - x0[None, :]
    count, mean, var = tile_statistics(shifted, x0, valid, domain, n, EPS, PADDED, EXCLUDE)
    rstd = reciprocal_sqrt(var)
    z = standardise(shifted, mean, rstd * slope, center)
    peak = find_peak(z, domain)
    gap = z - peak[None, :]
    weights, _clamped = product_weights(gap, peak, rstd, valid, domain, count, spread, level, CLAMP, EXCLUDE)
    x_peak = value_at_peak(x, z, peak, domain, x0)
    return weights, valid, x_peak, mean - (x_peak - x0), var


@triton.jit
def layer_valid(x, allowed, PADDING: tl.constexpr):
    """Which elements of a layer's input are not padding, of those that the mask allows."""
    return find_valid(x, allowed, None, None, None, None, PADDING, False)


@triton.jit(do_not_specialize=SIZES)
def block_forward_resident(
    x_ptr, y_ptr, mask_ptr, mean_offsets_ptrs, c_ptrs,
    outer, chunk, length, inner, num_heads, num_gaussians,
    y_stride_o, y_stride_r, y_stride_i, x_stride_o, x_stride_r, x_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, LAYERS: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
    VEC: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x, writes y. One sweep."""
    head, _block, start, n, o, i, inside = program_slices(
        None, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    y_base = slice_offsets(o, i, start, y_stride_o, y_stride_r, y_stride_i, COLUMNS, VEC)
    r = tl.arange(0, BLOCK_R)
    within = rows_within(r, n, inside, WHOLE)
    x = load_tile(x_ptr, x_base, r, x_stride_r, within, COLUMNS, VEC, ACC)
    allowed = within
    if HAS_MASK:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
        allowed = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, None, True)
    for layer in tl.static_range(LAYERS):
        slope, center, spread, level = layer_quadratic(
            mean_offsets_ptrs[layer], c_ptrs[layer], head, num_gaussians[layer], EPS, ACC, BLOCK_K
        )
        weights, valid, _x_peak, _mean, _var = layer_weights(
            x, allowed, within, n, slope, center, spread, level, PADDING, PADDED, EXCLUDE, CLAMP, EPS, BLOCK_R
        )
        x = weighted_output(x, weights, valid, PADDED, True).to(y_ptr.dtype.element_ty).to(ACC)
    at = tile_offsets(y_base, r, y_stride_r, COLUMNS, VEC)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=SIZES)
def block_backward_resident(
    x_ptr, g_ptr, dx_ptr, mask_ptr, partials_ptr, mean_offsets_ptrs, c_ptrs,
    outer, chunk, length, inner, num_heads, num_gaussians, num_partials,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, LAYERS: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
    VEC: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and four sums per layer and block of slices, at [layer, head, 4, block]. One sweep."""
    head, block, start, n, o, i, inside = program_slices(
        None, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    if COLUMNS:
        i = few_neighbours(i, LAYERS)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    r = tl.arange(0, BLOCK_R)
    within = rows_within(r, n, inside, WHOLE)
    x = load_tile(x_ptr, x_base, r, x_stride_r, within, COLUMNS, VEC, ACC)
    g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
    allowed = within
    if HAS_MASK:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
        allowed = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, None, True)

    inputs = ()
    statistics = ()
    for layer in tl.static_range(LAYERS):
        inputs = inputs + (x.to(x_ptr.dtype.element_ty),)
        slope, center, spread, level = layer_quadratic(
            mean_offsets_ptrs[layer], c_ptrs[layer], head, num_gaussians[layer], EPS, ACC, BLOCK_K
        )
        weights, valid, x0, mean, var = layer_weights(
            x, allowed, within, n, slope, center, spread, level, PADDING, PADDED, EXCLUDE, CLAMP, EPS, BLOCK_R
        )
        statistics = statistics + (x0, mean, var)
        x = weighted_output(x, weights, valid, PADDED, True).to(x_ptr.dtype.element_ty).to(ACC)

    for layer in tl.static_range(LAYERS - 1, -1, -1):
        slope, center, spread, level = layer_quadratic(
            mean_offsets_ptrs[layer], c_ptrs[layer], head, num_gaussians[layer], EPS, ACC, BLOCK_K
        )
        x = inputs[layer].to(ACC)
        valid = layer_valid(x, allowed, PADDING)
        domain = valid if EXCLUDE else within
        x0 = statistics[3 * layer]
        var = statistics[3 * layer + 2]
        rstd, peak, gap = from_statistics(x, x0, statistics[3 * layer + 1], var, slope, center)
        count = count_elements(domain, x0, n, EXCLUDE)
        if EXCLUDE:
            gap = tl.where(valid, gap, 0.0)
        weights, clamped = product_weights(gap, peak, rstd, valid, domain, count, spread, level, CLAMP, EXCLUDE)
        g, t0, u1, u2 = resident_gradient(
            x, g, weights, gap, peak, x0, var, rstd, count, clamped, valid, domain, slope, center, spread,
            CLAMP, PADDED, EXCLUDE, True,
        )  # fmt: skip
        sums = partials_ptr + layer * (num_heads * 4).to(tl.int64) * num_partials
        save_partials(sums, head, block, num_partials, t0, u1, u2, rstd, inside)
    at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
    tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=SIZES)
def block_parameter_gradients(
    partials_ptr, mean_offsets_ptrs, c_ptrs, d_mean_offsets_ptrs, d_c_ptrs,
    num_heads, num_gaussians, num_partials, LAYERS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradients of one head's parameters in one layer from partial sums [layers, heads, 4, partials]."""
    head = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        if tl.program_id(1) == layer:
            at = partials_ptr + (layer * num_heads + head).to(tl.int64) * 4 * num_partials
            head_gradients(
                at, mean_offsets_ptrs[layer], c_ptrs[layer], d_mean_offsets_ptrs[layer], d_c_ptrs[layer], head,
                num_gaussians[layer], num_partials, BLOCK_K, BLOCK_P,
            )  # fmt: skip


def block_forward(
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    mask: Tensor | None,
    options: DensityOptions,
    y: Tensor,
) -> None:
    """Fill y, dense, from x, whose slices fit (``tiling.fits_block``)."""
    if x.numel() == 0:
        return
    launch, (x,), mask = prepare(x, mean_offsets, mask, None, options, ("y", "x"), y)
    pointers = dict(
        x_ptr=x, y_ptr=y, mask_ptr=mask,
        mean_offsets_ptrs=tuple(t.contiguous() for t in mean_offsets), c_ptrs=tuple(t.contiguous() for t in c),
    )  # fmt: skip
    with device_of(x):
        run(block_forward_resident, launch, pointers)


def block_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Sequence[Tensor],
    c: Sequence[Tensor],
    mask: Tensor | None,
    options: DensityOptions,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx, dmean_offsets of every layer, dc of every layer), for x whose slices fit (``tiling.fits_block``)."""
    mean_offsets, c = (tuple(t.contiguous() for t in layers) for layers in (mean_offsets, c))
    dx = torch.empty_like(x)
    d_mean_offsets, d_c = (tuple(torch.empty_like(t) for t in layers) for layers in (mean_offsets, c))
    if x.numel() == 0:
        return dx, [t.zero_() for t in d_mean_offsets], [t.zero_() for t in d_c]
    launch, (x, g), mask = prepare(x, mean_offsets, mask, None, options, ("dx", "x", "g"), dx, grad)
    layers, heads = len(c), c[0].shape[0]
    partials = x.new_empty((layers, heads, 4, launch.values["num_partials"]), dtype=arithmetic_type(x))
    pointers = dict(
        x_ptr=x, g_ptr=g, dx_ptr=dx, mask_ptr=mask, partials_ptr=partials,
        mean_offsets_ptrs=mean_offsets, c_ptrs=c, d_mean_offsets_ptrs=d_mean_offsets, d_c_ptrs=d_c,
    )  # fmt: skip
    with device_of(x):
        run(block_backward_resident, launch, pointers)
        run(block_parameter_gradients, launch.parameters, pointers, grid=(heads, layers))
    return dx, list(d_mean_offsets), list(d_c)
