"""The backward pass of a product of Gaussians over slices that are split: see density_backward.py.

``split_sums`` and ``split_gradient`` read x and the incoming gradient once each, and what the forward pass saved; the
second writes dx, and four sums per block of slices for the parameter gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import (
    density,
    finish_weights,
    from_mean,
    input_gradient,
    load_gaussians,
    load_statistics,
    normaliser,
    partial_offsets,
    pick_first,
    product_at_peak,
    product_quadratic,
    reciprocal_sqrt,
    relative_gradient,
    slice_gradient,
    through_variance,
)
from .density_parameters import save_partials
from .host import SIZES
from .tiles import (
    find_valid,
    first_valid,
    load_tile,
    program_slices,
    rows_within,
    slice_number,
    slice_offsets,
    tile_offsets,
)


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
    """Reads x and g; writes what ``merge_sums`` needs of each run: 10 numbers, [10, chunks, slices]."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    a, center, _spread, _level = product_quadratic(offset, width, real, EPS, ACC)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)
    rstd = reciprocal_sqrt(var)
    peak = -(mean + center) * rstd

    count = tl.zeros([BLOCK_S], ACC)
    seen = tl.zeros([BLOCK_S], ACC)
    g0 = tl.zeros([BLOCK_S], ACC)
    s0 = tl.zeros([BLOCK_S], ACC)
    s1 = tl.zeros([BLOCK_S], ACC)
    s2 = tl.zeros([BLOCK_S], ACC)
    s3 = tl.zeros([BLOCK_S], ACC)
    h0 = tl.zeros([BLOCK_S], ACC)
    h1 = tl.zeros([BLOCK_S], ACC)
    h2 = tl.zeros([BLOCK_S], ACC)
    h3 = tl.zeros([BLOCK_S], ACC)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        within = rows_within(r, n, inside, WHOLE)
        x = load_tile(x_ptr, x_base, r, x_stride_r, within, COLUMNS, VEC, ACC)
        g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
        valid = within
        if PADDED:
            valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
            g = tl.where(valid, g, 0.0)
        domain = valid if EXCLUDE else within
        gap = (x - x0[None, :]) * rstd[None, :]
        if EXCLUDE:
            gap = tl.where(valid, gap, 0.0)
        # g0 is the run's first valid g. Until there is one g is 0, and the sums of h become those of 0 - g0.
        found = tl.where(seen == 0.0, first_valid(g_ptr, g_base, valid, r, g_stride_r, BLOCK_R, COLUMNS, VEC), g0)
        step = g0 - found.to(ACC)
        g0 = found.to(ACC)
        seen += tl.sum(valid.to(ACC), axis=0)
        count += tl.sum(domain.to(ACC), axis=0)

        m = density(gap, peak, domain, a)
        h = g - g0[None, :]
        h0 += step * s0 + tl.sum(m * h, axis=0)
        s0 += tl.sum(m, axis=0)
        m = m * gap
        h1 += step * s1 + tl.sum(m * h, axis=0)
        s1 += tl.sum(m, axis=0)
        m = m * gap
        h2 += step * s2 + tl.sum(m * h, axis=0)
        s2 += tl.sum(m, axis=0)
        m = m * gap
        h3 += step * s3 + tl.sum(m * h, axis=0)
        s3 += tl.sum(m, axis=0)
    at = sums_ptr + number + tl.program_id(1) * slices
    field = slices * num_chunks
    tl.store(at, count, mask=inside)
    tl.store(at + field, g0, mask=inside)
    tl.store(at + 2 * field, s0, mask=inside)
    tl.store(at + 3 * field, s1, mask=inside)
    tl.store(at + 4 * field, s2, mask=inside)
    tl.store(at + 5 * field, s3, mask=inside)
    tl.store(at + 6 * field, h0, mask=inside)
    tl.store(at + 7 * field, h1, mask=inside)
    tl.store(at + 8 * field, h2, mask=inside)
    tl.store(at + 9 * field, h3, mask=inside)


@triton.jit
def merge_moments(sums_ptr, power, shift, there, at, field):
    """Sums over a slice of m gap^power and of m h gap^power, from its runs', whose g0 is off by ``shift``."""
    s = tl.load(sums_ptr + (2 + power) * field + at, mask=there, other=0.0)
    h = tl.load(sums_ptr + (6 + power) * field + at, mask=there, other=0.0)
    return tl.sum(s, axis=0), tl.sum(h + s * shift, axis=0)


@triton.jit
def merge_sums(
    sums_ptr, number, num_slices, num_chunks, inside, x0, peak, var, rstd, a, spread, level,
    CLAMP: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whole slices from the sums of their runs.

    Returns (elements counted, factor from density to weight, clamped, g0, weighted mean of q, T0, U1, U2).
    """
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    field = num_slices * num_chunks
    count = tl.sum(tl.load(sums_ptr + at, mask=there, other=0.0), axis=0)
    g0s = tl.load(sums_ptr + field + at, mask=there, other=0.0)
    g0 = pick_first(g0s, g0s != 0.0, BLOCK_C)
    shift = g0s - g0[None, :]
    s0, h0 = merge_moments(sums_ptr, 0, shift, there, at, field)
    s1, h1 = merge_moments(sums_ptr, 1, shift, there, at, field)
    s2, h2 = merge_moments(sums_ptr, 2, shift, there, at, field)
    s3, h3 = merge_moments(sums_ptr, 3, shift, there, at, field)
    scale, clamped = normaliser(product_at_peak(peak, rstd, a, spread, level), s0, CLAMP)

    deviation = var * rstd
    q0 = x0 * h0 + deviation * (h1 + g0 * s1)
    q1 = x0 * h1 + deviation * (h2 + g0 * s2)
    q2 = x0 * h2 + deviation * (h3 + g0 * s3)
    q_mean = q0 / s0
    t0 = tl.zeros_like(s0)
    u1_gap = (q1 - q_mean * s1) * scale
    u2_gap = (q2 - q_mean * s2) * scale
    if CLAMP:
        t0 = tl.where(clamped, (q0 + g0 * x0 * s0) * scale, t0)
        u1_gap = tl.where(clamped, (q1 + g0 * x0 * s1) * scale, u1_gap)
        u2_gap = tl.where(clamped, (q2 + g0 * x0 * s2) * scale, u2_gap)
    if EXCLUDE:
        t0 = tl.where(count < 2.0, 0.0, t0)
        u1_gap = tl.where(count < 2.0, 0.0, u1_gap)
        u2_gap = tl.where(count < 2.0, 0.0, u2_gap)
    u1, u2 = from_mean(t0, u1_gap, u2_gap, peak)
    return count, scale, clamped, g0, q_mean, t0, u1, u2


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
    a, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)
    rstd = reciprocal_sqrt(var)
    peak = -(mean + center) * rstd
    count, scale, clamped, g0, q_mean, t0, u1, u2 = merge_sums(
        sums_ptr, number, slices, num_chunks, inside, x0, peak, var, rstd, a, spread, level, CLAMP, EXCLUDE, BLOCK_C
    )
    if tl.program_id(1) == 0:
        save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside)
    mean_pz = u1 / tl.maximum(count, 2.0)
    through_var = through_variance(t0, u2, rstd, count, a, spread)

    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        within = rows_within(r, n, inside, WHOLE)
        x = load_tile(x_ptr, x_base, r, x_stride_r, within, COLUMNS, VEC, ACC)
        g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
        valid = within
        g_valid = g
        if PADDED:
            valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
            g_valid = tl.where(valid, g, 0.0)
        domain = valid if EXCLUDE else within
        gap = (x - x0[None, :]) * rstd[None, :]
        if EXCLUDE:
            gap = tl.where(valid, gap, 0.0)
        weights = finish_weights(density(gap, peak, domain, a), scale, valid, count, EXCLUDE)
        q = relative_gradient(g_valid, gap, x0, var * rstd, g0)
        p = slice_gradient(q, q_mean, g_valid, x, weights, domain, count, clamped, CLAMP, PADDED, EXCLUDE)
        pz = p * (gap + peak[None, :]) - mean_pz[None, :]
        standard = gap + (peak + center * rstd)[None, :]
        dx = input_gradient(g, weights, standard, through_var, pz, mean_pz, a * rstd, valid, PADDED, RESIDUAL)
        at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
