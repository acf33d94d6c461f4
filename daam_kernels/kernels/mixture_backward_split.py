"""The backward pass of a mixture, a gate or a per-feature Gaussian over slices that are split: see mixture_backward.py.

``mixture_split_sums``, or ``mixture_split_slopes`` of a density that is not normalised, and ``mixture_split_gradient``
read x and the incoming gradient once each, and what the forward pass saved; the second writes dx, and three sums per
Gaussian and tile, or run, for the parameter gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import (
    FAR,
    counted_members,
    input_gradient,
    load_statistics,
    partial_offsets,
    pick_first,
    reciprocal_sqrt,
    through_variance_of,
)
from .host import SIZES
from .mixture_math import gate_density, gate_gradient, partial_number, slopes
from .mixture_sweeps import (
    deviations,
    finish_mixture_sums,
    load_narrow_gaussians,
    seen_from_nowhere,
    sweep_mixture_gradient,
    sweep_mixture_sums,
    sweep_peak,
)
from .tiles import (
    load_slices,
    load_tile,
    parameter_number,
    program_slices,
    slice_number,
    slice_offsets,
    tile_offsets,
)


@triton.jit(do_not_specialize=SIZES)
def mixture_split_sums(
    x_ptr, g_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, sums_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, tiles,
    x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
    UNROLLED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads x and g; writes what ``merge_mixture_sums`` needs of each run: 9 numbers, [9, chunks, slices].

    Slices that the forward pass marked as far from all Gaussians have their x read twice."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, marked = load_statistics(stats_ptr, number, slices, inside)
    rstd = reciprocal_sqrt(tl.abs(marked))
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    top = tl.zeros([BLOCK_S], ACC)
    far = marked < 0.0
    if tl.max(far.to(tl.int32), axis=0) > 0:
        peak = sweep_peak(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, first, tiles, n, inside, x0, mean, rstd,
            mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
            PADDING, HAS_MASK, EXCLUDE, CLAMP, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
        )  # fmt: skip
        top = tl.where(far, peak, top)
    gaussians = load_narrow_gaussians(mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, UNROLLED, ACC)
    count, g0, s0, s1, s2, q0, q1, q2 = sweep_mixture_sums(
        x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
        first, tiles, n, inside, x0, mean, rstd, top,
        gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
        PADDING, HAS_MASK, PADDED, EXCLUDE, CLAMP, COLUMNS, VEC, WHOLE, ACC, UNROLLED, BLOCK_R, BLOCK_S,
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
    tl.store(at + 8 * field, top, mask=inside)


@triton.jit
def merge_power(sums_ptr, power, step, fall, there, at, field):
    """Sums over a slice of m e^power and of m e^power q, from its runs'.

    A run's q is off by ``step``, and its m are ``fall`` of the slice's.
    """
    s = tl.load(sums_ptr + (2 + power) * field + at, mask=there, other=0.0) * fall
    q = tl.load(sums_ptr + (5 + power) * field + at, mask=there, other=0.0) * fall
    return tl.sum(s, axis=0), tl.sum(q + s * step, axis=0)


@triton.jit
def merge_mixture_sums(
    sums_ptr, number, num_slices, num_chunks, inside, x0,
    CLAMP: tl.constexpr, EXCLUDE: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whole slices from the sums of their runs.

    Returns (elements counted, log2 of the peak, factor from density to weight, clamped, g0, weighted mean of q, and the
    sums of the slopes and of the slopes times e).
    """
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    field = num_slices * num_chunks
    count = tl.sum(tl.load(sums_ptr + at, mask=there, other=0.0), axis=0)
    g0s = tl.load(sums_ptr + field + at, mask=there, other=0.0)
    g0 = pick_first(g0s, g0s != 0.0, BLOCK_C)
    step = (g0s - g0[None, :]) * x0[None, :]
    tops = tl.load(sums_ptr + 8 * field + at, mask=there, other=-FAR)
    top = tl.max(tops, axis=0)
    fall = tl.exp2(tops - top[None, :])
    s0, q0 = merge_power(sums_ptr, 0, step, fall, there, at, field)
    s1, q1 = merge_power(sums_ptr, 1, step, fall, there, at, field)
    s2, q2 = merge_power(sums_ptr, 2, step, fall, there, at, field)
    scale, clamped, q_mean, first, second = finish_mixture_sums(
        count, top, g0, x0, s0, s1, s2, q0, q1, q2, CLAMP, EXCLUDE, EPS
    )
    return count, top, scale, clamped, g0, q_mean, first, second


@triton.jit(do_not_specialize=SIZES)
def mixture_split_slopes(
    x_ptr, g_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, sums_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, num_partials, tiles,
    x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    EPS: tl.constexpr, PER_FEATURE: tl.constexpr, MULTIPLY: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads x and g; writes how many elements of each run count, the sum of the slopes and that of the slopes times e,
    [3, chunks, slices]: all that a density that is not normalised needs."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    feature = parameter_number(head, i, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)
    rstd = reciprocal_sqrt(var)

    count = tl.zeros([BLOCK_S], ACC)
    sum_slopes = tl.zeros([BLOCK_S], ACC)
    sum_e = tl.zeros([BLOCK_S], ACC)
    start_of_run = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    for tile in range(tiles):
        r = start_of_run + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
        g_valid = g
        if PADDED:
            g_valid = tl.where(valid, g, 0.0)
        _from_x0, d = deviations(x, x0, mean, valid, EXCLUDE)
        count += tl.sum(domain.to(ACC), axis=0)
        h = gate_gradient(g, g_valid, x, domain, MULTIPLY)
        _slope, first, second = slopes(
            d, rstd, h, domain, rstd, mean_offsets_ptr, c_ptr, log_shares_ptr, None,
            head, feature, inside, number, num_gaussians, num_partials, EPS, False, False, PER_FEATURE, ACC,
        )  # fmt: skip
        sum_slopes += first
        sum_e += second
    at = sums_ptr + number + tl.program_id(1) * slices
    field = slices * num_chunks
    tl.store(at, count, mask=inside)
    tl.store(at + field, sum_slopes, mask=inside)
    tl.store(at + 2 * field, sum_e, mask=inside)


@triton.jit
def merge_slopes(sums_ptr, number, num_slices, num_chunks, inside, BLOCK_C: tl.constexpr):
    """(elements counted, sum of the slopes, sum of the slopes times e) of whole slices from those of their runs."""
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    field = num_slices * num_chunks
    count = tl.sum(tl.load(sums_ptr + at, mask=there, other=0.0), axis=0)
    first = tl.sum(tl.load(sums_ptr + field + at, mask=there, other=0.0), axis=0)
    return count, first, tl.sum(tl.load(sums_ptr + 2 * field + at, mask=there, other=0.0), axis=0)


@triton.jit(do_not_specialize=SIZES)
def mixture_split_gradient(
    x_ptr, g_ptr, dx_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, sums_ptr, partials_ptr,
    mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, num_partials, tiles,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, NORMALISED: tl.constexpr, PER_FEATURE: tl.constexpr,
    MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
    WHOLE: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and three sums per Gaussian and tile, or run where the Gaussians are UNROLLED."""
    head, block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)
    var = tl.abs(var)
    rstd = reciprocal_sqrt(var)
    feature = parameter_number(head, i, inner, COLUMNS, VEC)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    if NORMALISED:
        count, top, scale, clamped, g0, q_mean, sum_slopes, sum_e = merge_mixture_sums(
            sums_ptr, number, slices, num_chunks, inside, x0, CLAMP, EXCLUDE, EPS, BLOCK_C
        )
    else:
        count, sum_slopes, sum_e = merge_slopes(sums_ptr, number, slices, num_chunks, inside, BLOCK_C)
    members = counted_members(count, NORMALISED)
    mean_slope = sum_slopes / members
    through_var = through_variance_of(sum_e, rstd, var, members, NORMALISED, PER_FEATURE)
    if NORMALISED:
        g0, q_mean, h_scale = seen_from_nowhere(count, g0, q_mean, scale, clamped, CLAMP, EXCLUDE)
        gaussians = load_narrow_gaussians(mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, UNROLLED, ACC)
        run = block * num_chunks + tl.program_id(1)
        sweep_mixture_gradient(
            x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, dx_ptr, dx_base, dx_stride_r,
            mask_ptr, mask_base, mask_stride_r, first, tiles, n, inside,
            count, g0, scale, q_mean, h_scale, mean_slope, through_var, x0, mean, rstd, top,
            gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, partials_ptr, head,
            run if UNROLLED > 0 else run * tiles, num_gaussians, num_partials,
            PADDING, HAS_MASK, PADDED, EXCLUDE, CLAMP, RESIDUAL, COLUMNS, VEC, WHOLE, ACC, UNROLLED, BLOCK_R, BLOCK_S,
        )  # fmt: skip
    else:
        for tile in range(tiles):
            r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
            x, within, valid, domain = load_slices(
                x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
                PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
            )  # fmt: skip
            g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
            g_valid = g
            if PADDED:
                g_valid = tl.where(valid, g, 0.0)
            _from_x0, d = deviations(x, x0, mean, valid, EXCLUDE)
            weights = gate_density(
                d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, feature, inside, num_gaussians,
                EPS, PER_FEATURE, ACC,
            )  # fmt: skip
            h = gate_gradient(g, g_valid, x, domain, MULTIPLY)
            partial = partial_number(block, o, i, inner, tile, tiles, num_chunks, PER_FEATURE, COLUMNS, VEC)
            slope, _first, _second = slopes(
                d, rstd, h, domain, rstd, mean_offsets_ptr, c_ptr, log_shares_ptr, partials_ptr,
                head, feature, inside, partial, num_gaussians, num_partials, EPS, CLAMP, False, PER_FEATURE, ACC,
            )  # fmt: skip
            if not MULTIPLY:  # y is not made of x itself
                g = tl.zeros_like(g)
            through = through_var[None, :] * (d * rstd[None, :])
            dx = input_gradient(
                g, weights, through, slope - mean_slope[None, :], mean_slope, rstd, valid, PADDED, RESIDUAL
            )
            at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
