"""The backward pass of density attention.

With w the weights, q_j = valid_j g_j x_j the gradient of w_j, D = sum w q (0 where the clamp is active) and
p_j = w_j (q_j - D), everything follows from T0 = sum p, U1 = sum p z and U2 = sum p z^2 of each slice. Both steps
cancel: q - D where g is nearly constant and x has an offset, the sums where a few elements hold nearly all the weight.
So x is seen from x0, the element of the largest density, and z from its peak: with gap = (x - x0) / sqrt(var),
q is x0 (g - g0) + g (x - x0), which differs from g x by a constant, and the sums are those of p gap and p gap^2.

``backward_resident`` reads x and the incoming gradient once and writes dx once, for slices that fit one block;
``split_sums`` and ``split_gradient`` read both twice. The parameter gradients need four sums per head, which every
block writes and ``parameter_gradients`` adds in a fixed order: no atomics, the same bits from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import DensityOptions
from .density_forward import density_forward
from .density_math import (
    LN_2,
    count_elements,
    density,
    find_peak,
    finish_weights,
    from_statistics,
    input_gradient,
    load_gaussians,
    load_statistics,
    normaliser,
    partial_offsets,
    pick_first,
    product_at_peak,
    product_quadratic,
    product_weights,
    reciprocal_sqrt,
    relative_gradient,
    standardise,
    tile_statistics,
)
from .host import SIZES, arithmetic_type, device_of, prepare, run
from .mixture_backward import mixture_backward
from .tiles import (
    find_valid,
    first_valid,
    load_tile,
    program_slices,
    rows_within,
    slice_number,
    slice_offsets,
    store_rounded,
    tile_offsets,
)


@triton.jit
def slice_gradient(
    q, q_mean, g_valid, x, weights, domain, count, clamped,
    CLAMP: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """p of a tile; ``q_mean`` is the weighted mean of q."""
    q -= q_mean[None, :]
    if CLAMP:
        q = tl.where(clamped[None, :], g_valid * x, q)
    p = weights * q
    if PADDED:
        p = tl.where(domain, p, 0.0)
    if EXCLUDE:
        p = tl.where((count < 2.0)[None, :], 0.0, p)
    return p


@triton.jit
def from_mean(t0, u1_gap, u2_gap, peak):
    """U1 and U2 from the sums of p gap and p gap^2."""
    return u1_gap + peak * t0, u2_gap + peak * (2.0 * u1_gap + peak * t0)


@triton.jit
def through_variance(t0, u2, rstd, count, a, spread):
    """What dx gets through the variance, over (x - mean) / sqrt(var)."""
    return (a * u2 + spread * (2.0 * LN_2) * rstd * rstd * t0) * rstd / (tl.maximum(count, 2.0) - 1.0)


@triton.jit
def resident_gradient(
    x, g, weights, gap, peak, x0, var, rstd, count, clamped, valid, domain, a, center, spread,
    CLAMP: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """(dx, T0, U1, U2) of slices that the tile holds whole; x0 is x at the peak, from which gap is."""
    g_valid = g
    if PADDED:
        g_valid = tl.where(valid, g, 0.0)
    # g0 is the weighted mean of g, so what q holds of x0 is what g varies by.
    q = relative_gradient(g_valid, gap, x0, var * rstd, tl.sum(weights * g_valid, axis=0))
    q_mean = tl.sum(weights * q, axis=0)
    p = slice_gradient(q, q_mean, g_valid, x, weights, domain, count, clamped, CLAMP, PADDED, EXCLUDE)
    u1_gap = tl.sum(p * gap, axis=0)
    u2_gap = tl.sum(p * gap * gap, axis=0)
    t0 = tl.zeros_like(u1_gap)
    if CLAMP:
        t0 = tl.where(clamped, tl.sum(p, axis=0), 0.0)
    u1, u2 = from_mean(t0, u1_gap, u2_gap, peak)
    members = tl.maximum(count, 2.0)
    mean_pz = u1 / members
    pz = p * (gap + peak[None, :]) - mean_pz[None, :]
    if CLAMP:  # the mean that rounding left
        pz -= (tl.sum(tl.where(domain, pz, 0.0), axis=0) / members)[None, :]
    through_var = through_variance(t0, u2, rstd, count, a, spread)
    standard = gap + (peak + center * rstd)[None, :]
    dx = input_gradient(g, weights, standard, through_var, pz, mean_pz, a * rstd, valid, PADDED, RESIDUAL)
    return dx, t0, u1, u2


@triton.jit
def save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside):
    """The four sums that the parameter gradients need, over the slices of a block, at [head, 4, block]."""
    at = partials_ptr + head.to(tl.int64) * 4 * num_partials + block
    tl.store(at, tl.sum(tl.where(inside, t0, 0.0), axis=0))
    tl.store(at + num_partials, tl.sum(tl.where(inside, t0 * rstd * rstd, 0.0), axis=0))
    tl.store(at + 2 * num_partials, tl.sum(tl.where(inside, u1 * rstd, 0.0), axis=0))
    tl.store(at + 3 * num_partials, tl.sum(tl.where(inside, u2, 0.0), axis=0))


@triton.jit(do_not_specialize=SIZES)
def backward_resident(
    x_ptr, g_ptr, dx_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, partials_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_partials,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and four sums per block. One sweep."""
    head, block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    a, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
    r = tl.arange(0, BLOCK_R)
    within = rows_within(r, n, inside, WHOLE)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    x = load_tile(x_ptr, x_base, r, x_stride_r, within, COLUMNS, VEC, ACC)
    g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
    valid = within
    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
        valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
    domain = valid if EXCLUDE else within
    if stats_ptr is not None:
        number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
        x0, mean, var = load_statistics(stats_ptr, number, num_slices, inside)
        count = count_elements(domain, x0, n, EXCLUDE)
        rstd, peak, gap = from_statistics(x, x0, mean, var, center)
    else:
        if PADDED:
            first = first_valid(x_ptr, x_base, valid, r, x_stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
        else:
            first = tl.load(x_ptr + x_base, mask=inside, other=0.0).to(ACC)
        shifted = x - first[None, :]
        count, mean, var = tile_statistics(shifted, first, valid, domain, n, EPS, PADDED, EXCLUDE)
        rstd = reciprocal_sqrt(var)
        z = standardise(shifted, mean, rstd, center)
        peak = find_peak(z, domain)
        gap = z - peak[None, :]
        x0 = first + (mean + center + peak * (var * rstd))
    if EXCLUDE:
        gap = tl.where(valid, gap, 0.0)
    weights, clamped = product_weights(gap, peak, rstd, valid, domain, count, a, spread, level, CLAMP, EXCLUDE)
    dx, t0, u1, u2 = resident_gradient(
        x, g, weights, gap, peak, x0, var, rstd, count, clamped, valid, domain, a, center, spread,
        CLAMP, PADDED, EXCLUDE, RESIDUAL,
    )  # fmt: skip
    at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
    save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside)


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


@triton.jit
def head_gradients(
    at, mean_offsets_ptr, c_ptr, d_mean_offsets_ptr, d_c_ptr, head,
    num_gaussians, num_partials, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums [4, partials] of one head, in float64 and a fixed order; the chain rule to K."""
    lane = tl.arange(0, BLOCK_P)
    t0 = tl.zeros([BLOCK_P], tl.float64)
    t0_var = tl.zeros([BLOCK_P], tl.float64)
    u1_std = tl.zeros([BLOCK_P], tl.float64)
    u2 = tl.zeros([BLOCK_P], tl.float64)
    for first in range(0, num_partials, BLOCK_P):
        p = first + lane
        t0 += tl.load(at + p, mask=p < num_partials, other=0.0).to(tl.float64)
        t0_var += tl.load(at + num_partials + p, mask=p < num_partials, other=0.0).to(tl.float64)
        u1_std += tl.load(at + 2 * num_partials + p, mask=p < num_partials, other=0.0).to(tl.float64)
        u2 += tl.load(at + 3 * num_partials + p, mask=p < num_partials, other=0.0).to(tl.float64)
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    inverse = tl.where(real, 1.0 / (width * width), 0.0)
    center = tl.sum(offset * inverse, axis=0) / tl.sum(inverse, axis=0)
    sum_t0 = tl.sum(t0, axis=0)
    sum_t0_var = tl.sum(t0_var, axis=0)
    sum_u1 = tl.sum(u1_std, axis=0)
    d_a = -0.5 * (tl.sum(u2, axis=0) + 2.0 * center * sum_u1 + center * center * sum_t0_var)
    d_b = sum_u1 + center * sum_t0_var
    d_offset = (d_b - offset * sum_t0_var) * inverse
    d_width = -2.0 * (d_a + offset * d_b - 0.5 * offset * offset * sum_t0_var) * inverse / width - sum_t0 / width
    k = head.to(tl.int64) * num_gaussians + tl.arange(0, BLOCK_K)
    store_rounded(d_mean_offsets_ptr + k, d_offset, real)
    store_rounded(d_c_ptr + k, d_width, real)


@triton.jit(do_not_specialize=SIZES)
def parameter_gradients(
    partials_ptr, mean_offsets_ptr, c_ptr, d_mean_offsets_ptr, d_c_ptr,
    num_gaussians, num_partials, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradients of one head's parameters from partial sums [heads, 4, partials]."""
    head = tl.program_id(0)
    at = partials_ptr + head.to(tl.int64) * 4 * num_partials
    head_gradients(
        at, mean_offsets_ptr, c_ptr, d_mean_offsets_ptr, d_c_ptr, head, num_gaussians, num_partials, BLOCK_K, BLOCK_P
    )


def density_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    stats: Tensor | None,
    options: DensityOptions,
    log_shares: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dmean_offsets, dc), and dlog_shares where there are log_shares.

    ``stats`` is what the forward pass saved, None where it saved nothing.
    """
    if options.density != "product":
        return mixture_backward(grad, x, mean_offsets, c, log_shares, mask, stats, options, cu_seqlens)
    mean_offsets, c = mean_offsets.contiguous(), c.contiguous()
    dx = torch.empty_like(x)
    gradients = torch.empty_like(mean_offsets), torch.empty_like(c)
    if x.numel() == 0:
        return dx, *(t.zero_() for t in gradients)
    launch, (x, g), mask = prepare(x, mean_offsets, mask, cu_seqlens, options, ("dx", "x", "g"), dx, grad)
    heads, blocks = mean_offsets.shape[0], launch.values["num_partials"]
    partials = x.new_empty((heads, 4, blocks), dtype=arithmetic_type(x))
    pointers = dict(
        x_ptr=x, g_ptr=g, dx_ptr=dx, mask_ptr=mask, cu_seqlens_ptr=cu_seqlens, stats_ptr=stats, partials_ptr=partials,
        mean_offsets_ptr=mean_offsets, c_ptr=c, d_mean_offsets_ptr=gradients[0], d_c_ptr=gradients[1],
    )  # fmt: skip
    with device_of(x):
        if not launch.tile.num_chunks:
            run(backward_resident, launch, pointers)
        else:
            if stats is None:  # only where the operator is called by hand: the forward pass saves them
                stats = pointers["stats_ptr"] = partials.new_empty((3, launch.num_slices))
                density_forward(x, mean_offsets, c, mask, options, dx, None, stats, cu_seqlens=cu_seqlens)
            pointers["sums_ptr"] = partials.new_empty((10, launch.tile.num_chunks, launch.num_slices))
            run(split_sums, launch, pointers)
            run(split_gradient, launch, pointers)
        run(parameter_gradients, launch, pointers, grid=(heads,))
    return dx, *gradients
