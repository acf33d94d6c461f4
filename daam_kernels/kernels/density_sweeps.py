"""Sweeps over slices that a tile does not hold whole, a tile at a time, in functions of Triton.

A thread keeps numbers of its own for each place of a tile, so that what is summed over a slice is exchanged between
threads once, however many tiles there are. ``tiles`` start at row ``first`` of the slices.
"""

import triton
import triton.language as tl

from .density_math import (
    FAR,
    LN_2,
    counted_members,
    counted_values,
    density,
    find_peak,
    finish_weights,
    from_mean,
    gap_from,
    input_gradient,
    inverse_of,
    nearer_of,
    normaliser,
    product_at_peak,
    relative_gradient,
    slice_gradient,
    store_output,
    through_variance,
    value_at_peak,
    variance,
)
from .tiles import first_of_run, load_slices, load_tile, tile_offsets


@triton.jit
def sweep_statistics(
    x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, center, EPS: tl.constexpr,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(elements counted, x0, mean - x0, variance) of whole slices, in two sweeps; x0 is x at the largest density."""
    rows = tl.arange(0, BLOCK_R)
    x0 = first_of_run(
        x_ptr, x_base, x_stride_r, x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, 0, tiles, n, inside,
        PADDING, HAS_MASK, PADDED, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
    )  # fmt: skip

    sums = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    counts = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    for t in tl.range(tiles, loop_unroll_factor=2):
        x, _, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, t * BLOCK_R + rows, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        sums += tl.where(domain, counted_values(x - x0[None, :], x0, valid, PADDED, EXCLUDE), 0.0)
        if EXCLUDE:
            counts += domain.to(ACC)
    count = tl.zeros_like(x0) + n
    if EXCLUDE:
        count = tl.sum(counts, axis=0)
    members = counted_members(count, True)
    mean = tl.sum(sums, axis=0) * inverse_of(members)

    squares = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    nearest = tl.full([BLOCK_R, BLOCK_S], FAR, ACC)  # of the element nearest to the center, how far it is
    x_nearest = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    for t in tl.range(tiles, loop_unroll_factor=2):
        x, _, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, t * BLOCK_R + rows, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        shifted = x - x0[None, :]
        counted = counted_values(shifted, x0, valid, PADDED, EXCLUDE)
        deviation = tl.where(domain, counted - mean[None, :], 0.0)
        squares += deviation * deviation
        nearest, x_nearest = nearer_of(shifted - (mean + center)[None, :], x, nearest, x_nearest, domain)
    var = variance(tl.sum(squares, axis=0), members, EPS, True, False)
    x_peak = value_at_peak(x_nearest, nearest, find_peak(nearest, nearest < FAR), nearest < FAR, x0)
    return count, x_peak, mean - (x_peak - x0), var


@triton.jit
def sweep_densities(
    x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, x0, rate, peak,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sum of each slice's densities over its largest one."""
    rows = tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    for t in tl.range(tiles, loop_unroll_factor=2):
        x, _, _, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, t * BLOCK_R + rows, n, inside,
            PADDING, HAS_MASK, EXCLUDE, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        sums += density(gap_from(x, x0, rate, domain, EXCLUDE), peak, domain)
    return tl.sum(sums, axis=0)


@triton.jit
def sweep_output(
    x_ptr, x_base, x_stride_r, y_ptr, weights_ptr, y_base, y_stride_r, mask_ptr, mask_base, mask_stride_r,
    tiles, n, inside, count, x0, rate, peak, scale,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes y, and the weights where asked for."""
    rows = tl.arange(0, BLOCK_R)
    for t in tl.range(tiles, loop_unroll_factor=2):
        r = t * BLOCK_R + rows
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        densities = density(gap_from(x, x0, rate, domain, EXCLUDE), peak, domain)
        weights = finish_weights(densities, scale, valid, count, EXCLUDE)
        at = tile_offsets(y_base, r, y_stride_r, COLUMNS, VEC)
        store_output(y_ptr, weights_ptr, at, x, weights, valid, within, MULTIPLY, PADDED, RESIDUAL)


@triton.jit
def sweep_sums(
    x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
    first, tiles, n, inside, x0, rate, peak,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of ``tiles`` tiles from row ``first`` on: (elements counted, g0, sums of m gap^k, sums of m h gap^k; k = 0 to 3).

    m is the density over the slice's largest, h = g - g0, and g0 the first valid g. A thread adds up its own elements,
    and what it has is exchanged once.
    """
    g0 = first_of_run(
        g_ptr, g_base, g_stride_r, x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, first, tiles,
        n, inside, PADDING, HAS_MASK, PADDED, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
    )  # fmt: skip
    count = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    s0 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    s1 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    s2 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    s3 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    h0 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    h1 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    h2 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    h3 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
        if PADDED:
            g = tl.where(valid, g, 0.0)
        gap = gap_from(x, x0, rate, valid, EXCLUDE)
        m = density(gap, peak, domain)
        h = g - g0[None, :]
        if EXCLUDE:
            count += domain.to(ACC)
        s0 += m
        h0 += m * h
        m = m * gap
        s1 += m
        h1 += m * h
        m = m * gap
        s2 += m
        h2 += m * h
        m = m * gap
        s3 += m
        h3 += m * h
    s0, s1, s2, s3 = tl.sum(s0, axis=0), tl.sum(s1, axis=0), tl.sum(s2, axis=0), tl.sum(s3, axis=0)
    h0, h1, h2, h3 = tl.sum(h0, axis=0), tl.sum(h1, axis=0), tl.sum(h2, axis=0), tl.sum(h3, axis=0)
    rows = tl.zeros([BLOCK_S], ACC) + tl.minimum(tl.maximum(n - first, 0), tiles * BLOCK_R)
    if EXCLUDE:
        rows = tl.sum(count, axis=0)
    return rows, g0, s0, s1, s2, s3, h0, h1, h2, h3


@triton.jit
def finish_sums(
    count, g0, s0, s1, s2, s3, h0, h1, h2, h3, x0, peak, var, rstd, slope, spread, level,
    CLAMP: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """(factor from density to weight, clamped, weighted mean of q, T0, U1, U2) of slices, from ``sweep_sums``."""
    scale, clamped = normaliser(product_at_peak(peak, rstd, spread, level), s0, CLAMP)
    deviation = var * (rstd * (1.0 / slope))
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
    return scale, clamped, q_mean, t0, u1, u2


@triton.jit
def sweep_gradient(
    x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, dx_ptr, dx_base, dx_stride_r,
    mask_ptr, mask_base, mask_stride_r, first, tiles, n, inside,
    count, g0, scale, clamped, q_mean, t0, u1, u2, x0, peak, var, rstd, slope, center, spread,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes dx of ``tiles`` tiles from row ``first`` on."""
    mean_pz = u1 / tl.maximum(count, 2.0)
    through_var = through_variance(t0, u2, rstd, count, slope, spread)
    rate, deviation = rstd * slope, var * (rstd * (1.0 / slope))
    through_z = rate * (2.0 * LN_2)
    for tile in tl.range(tiles, loop_unroll_factor=2):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
        g_valid = g
        if PADDED:
            g_valid = tl.where(valid, g, 0.0)
        gap = gap_from(x, x0, rate, valid, EXCLUDE)
        weights = finish_weights(density(gap, peak, domain), scale, valid, count, EXCLUDE)
        q = relative_gradient(g_valid, gap, x0, deviation, g0)
        p = slice_gradient(q, q_mean, g_valid, x, weights, domain, count, clamped, CLAMP, PADDED, EXCLUDE)
        pz = p * (gap + peak[None, :]) - mean_pz[None, :]
        standard = gap + (peak + center * rate)[None, :]
        dx = input_gradient(g, weights, standard, through_var, pz, mean_pz, through_z, valid, PADDED, RESIDUAL)
        at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
