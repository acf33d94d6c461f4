"""The backward pass of a product of Gaussians over slices that are split over blocks: see density_backward.py.

``split_sums`` and ``split_gradient`` read x and the incoming gradient once each, and what the forward pass saved; the
second writes dx, and four sums per block of slices for the parameter gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import (
    load_gaussians,
    load_statistics,
    partial_offsets,
    pick_first,
    product_quadratic,
    reciprocal_sqrt,
)
from .density_parameters import save_partials
from .density_sweeps import finish_sums, sweep_gradient, sweep_sums
from .host import SIZES
from .tiles import program_slices, slice_number, slice_offsets


@triton.jit(do_not_specialize=SIZES)
def split_sums(
    x_ptr, g_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, sums_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, tiles,
    x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x and g; writes what ``merge_sums`` needs of each run: 8 numbers, [8, chunks, slices]."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    slope, center, _spread, _level = product_quadratic(offset, width, real, EPS, ACC)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)
    rate = reciprocal_sqrt(var) * slope
    peak = -(mean + center) * rate
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    count, g0, s0, s1, s2, q0, q1, q2 = sweep_sums(
        x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
        first, tiles, n, inside, x0, rate, peak,
        PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S,
    )  # fmt: skip
    at = sums_ptr + number + tl.program_id(1) * slices
    field = slices * num_chunks
    tl.store(at, count, mask=inside)
    tl.store(at + field, g0, mask=inside)
    tl.store(at + 2 * field, s0, mask=inside)
    tl.store(at + 3 * field, s1, mask=inside)
    tl.store(at + 4 * field, s2, mask=inside)
    tl.store(at + 5 * field, q0, mask=inside)
    tl.store(at + 6 * field, q1, mask=inside)
    tl.store(at + 7 * field, q2, mask=inside)


@triton.jit
def merge_moments(sums_ptr, power, step, there, at, field):
    """Sums over a slice of m gap^power and of m q gap^power, from its runs', whose q are off by ``step``."""
    s = tl.load(sums_ptr + (2 + power) * field + at, mask=there, other=0.0)
    q = tl.load(sums_ptr + (5 + power) * field + at, mask=there, other=0.0)
    return tl.sum(s, axis=0), tl.sum(q + s * step, axis=0)


@triton.jit
def merge_sums(sums_ptr, number, num_slices, num_chunks, inside, x0, BLOCK_C: tl.constexpr):
    """What ``sweep_sums`` returns, of whole slices from that of their runs."""
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    field = num_slices * num_chunks
    count = tl.sum(tl.load(sums_ptr + at, mask=there, other=0.0), axis=0)
    g0s = tl.load(sums_ptr + field + at, mask=there, other=0.0)
    g0 = pick_first(g0s, g0s != 0.0, BLOCK_C)
    step = (g0s - g0[None, :]) * x0[None, :]
    s0, q0 = merge_moments(sums_ptr, 0, step, there, at, field)
    s1, q1 = merge_moments(sums_ptr, 1, step, there, at, field)
    s2, q2 = merge_moments(sums_ptr, 2, step, there, at, field)
    return count, g0, s0, s1, s2, q0, q1, q2


@triton.jit(do_not_specialize=SIZES)
def split_gradient(
    x_ptr, g_ptr, dx_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, sums_ptr, partials_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, num_partials, tiles,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
    VEC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and four sums per block of slices."""
    head, block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    slope, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)
    rstd = reciprocal_sqrt(var)
    peak = -(mean + center) * rstd * slope
    count, g0, s0, s1, s2, q0, q1, q2 = merge_sums(sums_ptr, number, slices, num_chunks, inside, x0, BLOCK_C)
    scale, g0, q_mean, t0, u1, u2 = finish_sums(
        count, g0, s0, s1, s2, q0, q1, q2, x0, peak, rstd, spread, level, CLAMP, EXCLUDE
    )
    if tl.program_id(1) == 0:
        save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside)
    sweep_gradient(
        x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, dx_ptr, dx_base, dx_stride_r,
        mask_ptr, mask_base, mask_stride_r, tl.program_id(1).to(tl.int64) * tiles * BLOCK_R, tiles, n, inside,
        count, g0, scale, q_mean, t0, u1, u2, x0, peak, rstd, slope, center, spread,
        PADDING, HAS_MASK, PADDED, EXCLUDE, RESIDUAL, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
    )  # fmt: skip
