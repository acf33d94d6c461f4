"""Attention by a product of Gaussians over slices that a tile does not hold whole, but the processor's cache does.

One program goes over its slices a tile at a time, several times: forward for the statistics, the densities' sum and the
output, backward for the sums and dx. x and the incoming gradient come from memory the first time and from the cache
after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import (
    far_from_center,
    load_gaussians,
    load_statistics,
    normaliser,
    product_least,
    product_quadratic,
    reciprocal_sqrt,
    save_statistics,
)
from .density_parameters import save_partials
from .density_sweeps import (
    finish_sums,
    sweep_densities,
    sweep_gradient,
    sweep_output,
    sweep_statistics,
    sweep_sums,
)
from .host import SIZES
from .tiles import program_slices, slice_number, slice_offsets


@triton.jit
def forward_of_slices(
    x_ptr, y_ptr, weights_ptr, mask_ptr, stats_ptr, x_base, x_stride_r, y_base, y_stride_r, mask_base, mask_stride_r,
    number, num_slices, n, inside, slope, center, spread, level,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """The forward pass of the slices ``inside``; returns which of them CENTRED densities are too small for."""
    tiles = tl.cdiv(n, BLOCK_R)
    count, x0, mean, var = sweep_statistics(
        x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, center, EPS,
        PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S, CENTRED,
    )  # fmt: skip
    rstd = reciprocal_sqrt(var)
    rate = rstd * slope
    peak = -(mean + center) * rate
    if stats_ptr is not None:
        save_statistics(stats_ptr, x0, mean, var, number, num_slices, inside)
    total = sweep_densities(
        x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, x0, rate, peak,
        PADDING, HAS_MASK, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S, CENTRED,
    )  # fmt: skip
    over = tl.zeros_like(peak) if CENTRED else peak
    scale, _ = normaliser(product_least(over, rstd, spread, level), total, CLAMP)
    sweep_output(
        x_ptr, x_base, x_stride_r, y_ptr, weights_ptr, y_base, y_stride_r, mask_ptr, mask_base, mask_stride_r,
        tiles, n, inside, count, x0, rate, peak, scale,
        PADDING, HAS_MASK, PADDED, EXCLUDE, MULTIPLY, RESIDUAL, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, CENTRED,
    )  # fmt: skip
    return inside & (count >= 2.0) & far_from_center(total, count)


@triton.jit(do_not_specialize=SIZES)
def forward_looped(
    x_ptr, y_ptr, weights_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices,
    y_stride_o, y_stride_r, y_stride_i, x_stride_o, x_stride_r, x_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Reads x, writes y, the weights and 3 numbers per slice where asked for. One launch.

    CENTRED densities are over that at the center of the Gaussians, to which long slices have an element near: which is
    nearest need not be known, unless it is to be saved. Slices that have none are worked on once more.
    """
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    slope, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    y_base = slice_offsets(o, i, start, y_stride_o, y_stride_r, y_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    centred: tl.constexpr = CENTRED and stats_ptr is None
    far = forward_of_slices(
        x_ptr, y_ptr, weights_ptr, mask_ptr, stats_ptr, x_base, x_stride_r, y_base, y_stride_r,
        mask_base, mask_stride_r, number, num_slices, n, inside, slope, center, spread, level,
        PADDING, HAS_MASK, PADDED, EXCLUDE, CLAMP, EPS, MULTIPLY, RESIDUAL, ACC, COLUMNS, VEC, WHOLE,
        BLOCK_R, BLOCK_S, centred,
    )  # fmt: skip
    if centred:
        if tl.max(far.to(tl.int32), axis=0) > 0:
            tl.debug_barrier()  # what the threads write again may be each other's
            forward_of_slices(
                x_ptr, y_ptr, weights_ptr, mask_ptr, stats_ptr, x_base, x_stride_r, y_base, y_stride_r,
                mask_base, mask_stride_r, number, num_slices, n, far, slope, center, spread, level,
                PADDING, HAS_MASK, PADDED, EXCLUDE, CLAMP, EPS, MULTIPLY, RESIDUAL, ACC, COLUMNS, VEC, False,
                BLOCK_R, BLOCK_S, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def backward_looped(
    x_ptr, g_ptr, dx_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, partials_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_partials,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x and g; writes dx, and four sums per block. One launch, which finds the statistics that nobody saved."""
    head, block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    slope, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    tiles = tl.cdiv(n, BLOCK_R)
    if stats_ptr is not None:
        number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
        x0, mean, var = load_statistics(stats_ptr, number, num_slices, inside)
    else:
        _, x0, mean, var = sweep_statistics(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, center, EPS,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S,
        )  # fmt: skip
    rstd = reciprocal_sqrt(var)
    rate = rstd * slope
    peak = -(mean + center) * rate
    count, g0, s0, s1, s2, q0, q1, q2 = sweep_sums(
        x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
        0, tiles, n, inside, x0, rate, peak,
        PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S,
    )  # fmt: skip
    scale, g0, q_mean, t0, u1, u2 = finish_sums(
        count, g0, s0, s1, s2, q0, q1, q2, x0, peak, rstd, spread, level, CLAMP, EXCLUDE
    )
    save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside)
    sweep_gradient(
        x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, dx_ptr, dx_base, dx_stride_r,
        mask_ptr, mask_base, mask_stride_r, 0, tiles, n, inside,
        count, g0, scale, q_mean, t0, u1, u2, x0, peak, rstd, slope, center, spread,
        PADDING, HAS_MASK, PADDED, EXCLUDE, RESIDUAL, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
    )  # fmt: skip
