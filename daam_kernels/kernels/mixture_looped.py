"""The backward pass of a mixture over slices that the processor's cache holds: see mixture_backward.py.

One program goes over its slices a tile at a time, once for their sums and once for dx. x and the incoming gradient come
from memory the first time and from the cache after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import counted_members, load_statistics, reciprocal_sqrt, through_variance_of
from .host import SIZES
from .mixture_math import far_from_all
from .mixture_sweeps import (
    clear_partials,
    finish_mixture_sums,
    load_narrow_gaussians,
    seen_from_nowhere,
    sweep_mixture_gradient,
    sweep_mixture_statistics,
    sweep_mixture_sums,
    sweep_peak,
    sweep_slopes,
)
from .tiles import program_slices, slice_number, slice_offsets


@triton.jit(do_not_specialize=SIZES)
def mixture_backward_looped(
    x_ptr, g_ptr, dx_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, partials_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_partials, tiles,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads x and g; writes dx, and three sums per Gaussian and block, or tile where the Gaussians are not UNROLLED.

    One launch, which finds the statistics that nobody saved, and the peaks of slices far from all Gaussians.
    """
    head, block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    gaussians = load_narrow_gaussians(mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, UNROLLED, ACC)
    own_tiles = tl.cdiv(n, BLOCK_R)  # of the longest slices there are ``tiles``
    top = tl.zeros([BLOCK_S], ACC)
    if stats_ptr is not None:
        number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
        x0, mean, marked = load_statistics(stats_ptr, number, num_slices, inside)
        var, far = tl.abs(marked), marked < 0.0
        rstd = reciprocal_sqrt(var)
        if tl.max(far.to(tl.int32), axis=0) > 0:
            peak = sweep_peak(
                x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, 0, own_tiles, n, inside, x0, mean, rstd,
                mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
                PADDING, HAS_MASK, EXCLUDE, CLAMP, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
            )  # fmt: skip
            top = tl.where(far, peak, top)
    else:
        x0, mean, var = sweep_mixture_statistics(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, own_tiles, n, inside, EPS,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S,
        )  # fmt: skip
        rstd = reciprocal_sqrt(var)
    count, g0, s0, s1, s2, q0, q1, q2 = sweep_mixture_sums(
        x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
        0, own_tiles, n, inside, x0, mean, rstd, top,
        gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
        PADDING, HAS_MASK, PADDED, EXCLUDE, CLAMP, COLUMNS, VEC, WHOLE, ACC, UNROLLED, BLOCK_R, BLOCK_S,
    )  # fmt: skip
    if stats_ptr is None:
        far = far_from_all(s0, inside & (count > 0.0))
        if tl.max(far.to(tl.int32), axis=0) > 0:
            peak = sweep_peak(
                x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, 0, own_tiles, n, inside, x0, mean, rstd,
                mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
                PADDING, HAS_MASK, EXCLUDE, CLAMP, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
            )  # fmt: skip
            top = tl.where(far, peak, top)
            count, g0, s0, s1, s2, q0, q1, q2 = sweep_mixture_sums(
                x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
                0, own_tiles, n, inside, x0, mean, rstd, top,
                gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
                PADDING, HAS_MASK, PADDED, EXCLUDE, CLAMP, COLUMNS, VEC, WHOLE, ACC, UNROLLED, BLOCK_R, BLOCK_S,
            )  # fmt: skip
    scale, clamped, q_mean, sum_slopes, sum_e = finish_mixture_sums(
        count, top, g0, x0, s0, s1, s2, q0, q1, q2, CLAMP, EXCLUDE, EPS
    )
    members = counted_members(count, True)
    mean_slope = sum_slopes / members
    g0, q_mean, h_scale = seen_from_nowhere(count, g0, q_mean, scale, clamped, CLAMP, EXCLUDE)
    if CLAMP:
        if tl.max(clamped.to(tl.int32), axis=0) > 0:
            left = sweep_slopes(
                x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
                own_tiles, n, inside, x0, mean, rstd, top, g0, q_mean, h_scale, mean_slope,
                gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
                PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, UNROLLED, BLOCK_R, BLOCK_S,
            )  # fmt: skip
            mean_slope += tl.where(clamped, left / members, 0.0)
    through_var = through_variance_of(sum_e, rstd, var, members, True, False)
    partial = block if UNROLLED > 0 else block * tiles
    sweep_mixture_gradient(
        x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, dx_ptr, dx_base, dx_stride_r,
        mask_ptr, mask_base, mask_stride_r, 0, own_tiles, n, inside,
        count, g0, scale, q_mean, h_scale, mean_slope, through_var, x0, mean, rstd, top,
        gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, partials_ptr, head, partial, num_gaussians, num_partials,
        PADDING, HAS_MASK, PADDED, EXCLUDE, CLAMP, RESIDUAL, COLUMNS, VEC, WHOLE, ACC, UNROLLED, BLOCK_R, BLOCK_S,
    )  # fmt: skip
    if UNROLLED == 0:
        clear_partials(partials_ptr, head, partial + own_tiles, partial + tiles, num_gaussians, num_partials)
