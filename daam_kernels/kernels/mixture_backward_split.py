"""The backward pass of a mixture, a gate or a per-feature Gaussian over slices that are split: see mixture_backward.py.

``mixture_split_sums``, or ``mixture_split_slopes`` of a density that is not normalised, and ``mixture_split_gradient``
read x and the incoming gradient once each, and what the forward pass saved; the second writes dx, and three sums per
Gaussian and tile for the parameter gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import (
    FAR,
    counted_members,
    finish_weights,
    input_gradient,
    load_statistics,
    partial_offsets,
    pick_first,
    reciprocal_sqrt,
    through_variance_of,
)
from .host import SIZES
from .mixture_sweeps import deviations, finish_mixture_sums
from .mixture_math import (
    centred_gradient,
    gate_density,
    gate_gradient,
    gaussian_part,
    gradient_seen_from,
    mixture_density,
    mixture_peak,
    partial_number,
    slopes,
)
from .tiles import (
    first_valid,
    load_slices,
    load_tile,
    parameter_number,
    program_slices,
    slice_number,
    slice_offsets,
    tile_offsets,
)


@triton.jit
def run_peak(
    x_ptr, mask_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr, x_base, mask_base, x0, mean, rstd, first, n, inside,
    head, num_gaussians, tiles, x_stride_r, mask_stride_r,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The largest term of a run of each slice, whose first row is ``first``, as log2: see ``mixture_peak``."""
    peak = tl.zeros_like(rstd) - FAR
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        x, _, _, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, EXCLUDE, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        _from_x0, d = deviations(x, x0, mean, domain, EXCLUDE)
        found = mixture_peak(d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, CLAMP, ACC)
        peak = tl.maximum(peak, found)
    return peak


@triton.jit(do_not_specialize=SIZES)
def mixture_split_sums(
    x_ptr, g_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, sums_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, tiles,
    x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
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
        peak = run_peak(
            x_ptr, mask_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr, x_base, mask_base,
            x0, mean, rstd, first, n, inside, head, num_gaussians, tiles, x_stride_r, mask_stride_r,
            PADDING, HAS_MASK, EXCLUDE, CLAMP, ACC, COLUMNS, VEC, WHOLE, BLOCK_R,
        )  # fmt: skip
        top = tl.where(far, peak, top)

    count = tl.zeros([BLOCK_S], ACC)
    seen = tl.zeros([BLOCK_S], ACC)
    g0 = tl.zeros([BLOCK_S], ACC)
    s0 = tl.zeros([BLOCK_S], ACC)
    s1 = tl.zeros([BLOCK_S], ACC)
    s2 = tl.zeros([BLOCK_S], ACC)
    q0 = tl.zeros([BLOCK_S], ACC)
    q1 = tl.zeros([BLOCK_S], ACC)
    q2 = tl.zeros([BLOCK_S], ACC)
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
        if PADDED:
            g = tl.where(valid, g, 0.0)
        from_x0, d = deviations(x, x0, mean, valid, EXCLUDE)
        # g0 is the run's first valid g. Until there is one g is 0, and the sums of q become those seen from g0.
        found = tl.where(seen == 0.0, first_valid(g_ptr, g_base, valid, r, g_stride_r, BLOCK_R, COLUMNS, VEC), g0)
        step = (g0 - found.to(ACC)) * x0
        g0 = found.to(ACC)
        seen += tl.sum(valid.to(ACC), axis=0)
        count += tl.sum(domain.to(ACC), axis=0)

        by_one = tl.zeros_like(d)
        by_e = tl.zeros_like(d)
        by_ee = tl.zeros_like(d)
        for k in range(num_gaussians):
            part, e, over_width, _grows = gaussian_part(
                d, rstd, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, number, inside, num_gaussians,
                EPS, CLAMP, True, False, ACC,
            )  # fmt: skip
            part = tl.where(domain, part, 0.0)
            by_one += part
            part *= over_width
            by_e += part
            by_ee += part * e
        q = gradient_seen_from(g, from_x0, x0, g0)
        q0 += step * s0 + tl.sum(by_one * q, axis=0)
        q1 += step * s1 + tl.sum(by_e * q, axis=0)
        q2 += step * s2 + tl.sum(by_ee * q, axis=0)
        s0 += tl.sum(by_one, axis=0)
        s1 += tl.sum(by_e, axis=0)
        s2 += tl.sum(by_ee, axis=0)
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
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and three sums per Gaussian and tile."""
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
    if NORMALISED:
        count, top, scale, clamped, g0, q_mean, sum_slopes, sum_e = merge_mixture_sums(
            sums_ptr, number, slices, num_chunks, inside, x0, CLAMP, EXCLUDE, EPS, BLOCK_C
        )
    else:
        top = rstd  # of no use there
        count, sum_slopes, sum_e = merge_slopes(sums_ptr, number, slices, num_chunks, inside, BLOCK_C)
    members = counted_members(count, NORMALISED)
    mean_slope = sum_slopes / members
    through_var = through_variance_of(sum_e, rstd, var, members, NORMALISED, PER_FEATURE)

    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
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
        from_x0, d = deviations(x, x0, mean, valid, EXCLUDE)
        if NORMALISED:
            densities = mixture_density(
                d, rstd, domain, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, 0, False,
                not CLAMP, ACC,
            )  # fmt: skip
            weights = finish_weights(densities, scale, valid, count, EXCLUDE)
            q = gradient_seen_from(g_valid, from_x0, x0, g0)
            h = centred_gradient(q, q_mean, g_valid, x, scale, domain, count, clamped, CLAMP, EXCLUDE)
        else:
            weights = gate_density(
                d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, feature, inside, num_gaussians,
                EPS, PER_FEATURE, ACC,
            )  # fmt: skip
            h = gate_gradient(g, g_valid, x, domain, MULTIPLY)
        partial = partial_number(block, o, i, inner, tile, tiles, num_chunks, PER_FEATURE, COLUMNS, VEC)
        slope, _first, _second = slopes(
            d, rstd, h, domain, top, mean_offsets_ptr, c_ptr, log_shares_ptr, partials_ptr,
            head, feature, inside, partial, num_gaussians, num_partials, EPS, CLAMP, NORMALISED, PER_FEATURE, ACC,
        )  # fmt: skip
        if not MULTIPLY:  # y is not made of x itself
            g = tl.zeros_like(g)
        through = through_var[None, :] * (d * rstd[None, :])
        dx = input_gradient(g, weights, through, slope - mean_slope[None, :], mean_slope, rstd, valid, PADDED, RESIDUAL)
        at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
