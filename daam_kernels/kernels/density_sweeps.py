"""Sweeps over slices that a tile does not hold whole, a tile at a time, in functions of Triton.

A thread keeps numbers of its own for each place of a tile, so that what is summed over a slice is exchanged between
threads once, however many tiles there are. ``tiles`` start at row ``first`` of the slices.
"""

import triton
import triton.language as tl

from .density_math import (
    FAR,
    LN_2,
    NEARER,
    centred_density,
    counted_members,
    counted_values,
    density,
    distance_to,
    find_peak,
    finish_weights,
    from_mean,
    input_gradient,
    inverse_of,
    nearer_of,
    normaliser,
    product_least,
    relative_gradient,
    slice_gradient,
    store_output,
    through_variance,
    unless_clamped,
    value_at_peak,
    variance,
)
from .tiles import first_of_run, load_slices, load_tile, tile_offsets


@triton.jit
def sweep_mean(
    x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(elements counted, x0, mean - x0) of whole slices; x0 is the first valid x."""
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
    return count, x0, tl.sum(sums, axis=0) * inverse_of(counted_members(count, True))


@triton.jit
def sweep_statistics(
    x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, center, EPS: tl.constexpr,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, AMONG_FIRST: tl.constexpr = False,
):  # fmt: skip
    """(elements counted, x0, mean - x0, variance) of whole slices, in two sweeps; x0 is x at the largest density, or
    at the largest AMONG_FIRST rows, those of one tile."""
    rows = tl.arange(0, BLOCK_R)
    count, x0, mean = sweep_mean(
        x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside,
        PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S,
    )  # fmt: skip
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
        if not AMONG_FIRST:
            nearest, x_nearest = nearer_of(shifted - (mean + center)[None, :], x, nearest, x_nearest, domain)
    if AMONG_FIRST:
        x, _, _, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, rows, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        nearest, x_nearest = nearer_of((x - x0[None, :]) - (mean + center)[None, :], x, nearest, x_nearest, domain)
    var = variance(tl.sum(squares, axis=0), counted_members(count, True), EPS, True, False)
    found = tl.abs(nearest) < NEARER
    x_peak = value_at_peak(x_nearest, nearest, find_peak(nearest, found), found, x0)
    return count, x_peak, mean - (x_peak - x0), var


@triton.jit
def sweep_densities(
    x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, x0, rate, peak,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """The sum of each slice's densities over its largest one, or over that at the center; z is ``peak`` at x0."""
    rows = tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    for t in tl.range(tiles, loop_unroll_factor=2):
        x, _, _, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, t * BLOCK_R + rows, n, inside,
            PADDING, HAS_MASK, EXCLUDE, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        gap = distance_to(x, x0, domain, EXCLUDE) * rate[None, :]
        if CENTRED:
            sums += centred_density(gap + peak[None, :], domain)
        else:
            sums += density(gap, peak, domain)
    return tl.sum(sums, axis=0)


@triton.jit
def sweep_output(
    x_ptr, x_base, x_stride_r, y_ptr, weights_ptr, y_base, y_stride_r, mask_ptr, mask_base, mask_stride_r,
    tiles, n, inside, count, x0, rate, peak, scale,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Writes y, and the weights where asked for."""
    rows = tl.arange(0, BLOCK_R)
    for t in tl.range(tiles, loop_unroll_factor=2):
        r = t * BLOCK_R + rows
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        gap = distance_to(x, x0, domain, EXCLUDE) * rate[None, :]
        if CENTRED:
            densities = centred_density(gap + peak[None, :], domain)
        else:
            densities = density(gap, peak, domain)
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
    """Of ``tiles`` tiles from row ``first`` on: (elements counted, g0, sums of m gap^k, sums of m q gap^k; k = 0 to 2).

    m is the density over the slice's largest, q = x0 (g - g0) + g (x - x0), and g0 the first valid g. A thread adds up
    its own elements, and what it has is exchanged once.
    """
    g0 = first_of_run(
        g_ptr, g_base, g_stride_r, x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, first, tiles,
        n, inside, PADDING, HAS_MASK, PADDED, COLUMNS, VEC, WHOLE, ACC, BLOCK_R,
    )  # fmt: skip
    count = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    s0 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    s1 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    s2 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    q0 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    q1 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    q2 = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    unrolled: tl.constexpr = 1 if ACC == tl.float64 else 2  # numbers of float64 take two registers
    for tile in tl.range(tiles, loop_unroll_factor=unrolled):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
        if PADDED:
            g = tl.where(valid, g, 0.0)
        from_x0 = distance_to(x, x0, valid, EXCLUDE)
        gap = from_x0 * rate[None, :]
        m = density(gap, peak, domain)
        q = relative_gradient(g, from_x0, x0, g0, tl.zeros_like(x0))
        if EXCLUDE:
            count += domain.to(ACC)
        s0 += m
        q0 += m * q
        m = m * gap
        s1 += m
        q1 += m * q
        m = m * gap
        s2 += m
        q2 += m * q
    s0, s1, s2 = tl.sum(s0, axis=0), tl.sum(s1, axis=0), tl.sum(s2, axis=0)
    q0, q1, q2 = tl.sum(q0, axis=0), tl.sum(q1, axis=0), tl.sum(q2, axis=0)
    rows = tl.zeros([BLOCK_S], ACC) + tl.minimum(tl.maximum(n - first, 0), tiles * BLOCK_R)
    if EXCLUDE:
        rows = tl.sum(count, axis=0)
    return rows, g0, s0, s1, s2, q0, q1, q2


@triton.jit
def finish_sums(
    count, g0, s0, s1, s2, q0, q1, q2, x0, peak, rstd, spread, level, CLAMP: tl.constexpr, EXCLUDE: tl.constexpr
):
    """(factor from density to weight, what g and q are relative to, T0, U1, U2) of slices, from ``sweep_sums``."""
    scale, clamped = normaliser(product_least(peak, rstd, spread, level), s0, CLAMP)
    q_mean = q0 / s0
    away = q_mean
    t0 = tl.zeros_like(s0)
    if CLAMP:
        away = tl.where(clamped, -g0 * x0, away)  # from q to g x
        t0 = tl.where(clamped, (q0 - away * s0) * scale, t0)
    u1_gap = (q1 - away * s1) * scale
    u2_gap = (q2 - away * s2) * scale
    if EXCLUDE:
        t0 = tl.where(count < 2.0, 0.0, t0)
        u1_gap = tl.where(count < 2.0, 0.0, u1_gap)
        u2_gap = tl.where(count < 2.0, 0.0, u2_gap)
    u1, u2 = from_mean(t0, u1_gap, u2_gap, peak)
    return scale, unless_clamped(g0, clamped, CLAMP), unless_clamped(q_mean, clamped, CLAMP), t0, u1, u2


@triton.jit
def sweep_gradient(
    x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, dx_ptr, dx_base, dx_stride_r,
    mask_ptr, mask_base, mask_stride_r, first, tiles, n, inside,
    count, g0, scale, q_mean, t0, u1, u2, x0, peak, rstd, slope, center, spread,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes dx of ``tiles`` tiles from row ``first`` on."""
    mean_pz = u1 / tl.maximum(count, 2.0)
    through_var = through_variance(t0, u2, rstd, count, slope, spread)
    rate = rstd * slope
    through_z = rate * (2.0 * LN_2)
    through_var_at_peak = through_var * (peak + center * rate)
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
        from_x0 = distance_to(x, x0, valid, EXCLUDE)
        gap = from_x0 * rate[None, :]
        weights = finish_weights(density(gap, peak, domain), scale, valid, count, EXCLUDE)
        q = relative_gradient(g_valid, from_x0, x0, g0, q_mean)
        p = slice_gradient(q, weights, domain, count, PADDED, EXCLUDE)
        pz = p * (gap + peak[None, :]) - mean_pz[None, :]
        through = through_var[None, :] * gap + through_var_at_peak[None, :]
        dx = input_gradient(g, weights, through, pz, mean_pz, through_z, valid, PADDED, RESIDUAL)
        at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
