"""The backward pass of density attention.

With w the weights, q_j = valid_j g_j x_j the gradient of w_j, D = sum w q (0 where the clamp is active) and
p_j = w_j (q_j - D), everything follows from T0 = sum p, U1 = sum p z and U2 = sum p z^2 of each slice. q - D is
taken apart, because it cancels where g is nearly constant and x has an offset: with h = g - g0 and t = g (x - x0)
it is x0 (h - sum w h) + (t - sum w t).

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
from .density_math import (
    FAR,
    LN_2,
    count_elements,
    density,
    find_valid,
    finish_weights,
    first_valid,
    head_span,
    load_gaussians,
    load_statistics,
    merge_normaliser,
    nearest_distance,
    normaliser,
    partial_offsets,
    pick_first,
    product_quadratic,
    reciprocal_sqrt,
    rescale,
    slice_coordinates,
    slice_number,
    slice_offsets,
    standardise,
    tile_offsets,
    tile_statistics,
)
from .density_forward import sweep_statistics
from .host import SIZES, arithmetic_type, device_of, prepare, run


@triton.jit
def slice_gradient(
    g_valid, x, shifted, x0, weights, domain, count, clamped, g0, q_mean,
    CLAMP: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """p of a tile; ``q_mean`` is the weighted mean of x0 (g - g0) + g (x - x0)."""
    q = (g_valid - g0[None, :]) * x0[None, :] + (g_valid * shifted - q_mean[None, :])
    if CLAMP:
        q = tl.where(clamped[None, :], g_valid * x, q)
    p = weights * q
    if PADDED:
        p = tl.where(domain, p, 0.0)
    if EXCLUDE:
        p = tl.where((count < 2.0)[None, :], 0.0, p)
    return p


@triton.jit
def input_gradient(
    g, p, weights, z, rstd, t0, u1, u2, count, a, center, spread, valid,
    PADDED: tl.constexpr, EXCLUDE: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """dx of a tile: through x itself, through every z, and through the slice's mean and variance.

    The latter two are one linear function of z per slice.
    """
    members = tl.maximum(count, 2.0)
    through_mean = a * rstd * u1 / members
    through_var = (a * u2 + spread * (2.0 * LN_2) * rstd * rstd * t0) * rstd / (members - 1.0)
    constant = through_mean + through_var * (center * rstd)
    direct = g * weights + constant[None, :] + through_var[None, :] * z
    if EXCLUDE:
        direct = tl.where((count < 2.0)[None, :], g, direct)
    if PADDED:
        direct = tl.where(valid, direct, g)
    dx = direct - p * z * (a * rstd)[None, :]
    if RESIDUAL:
        dx += g
    return dx


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
    x_ptr, g_ptr, dx_ptr, mask_ptr, stats_ptr, partials_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_partials,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and four sums per block. One sweep."""
    head = tl.program_id(0) % num_heads
    start, n = head_span(head, num_heads, chunk, length, COLUMNS, VEC)
    block = tl.program_id(0) // num_heads
    o, i, inside = slice_coordinates(block, outer, inner, COLUMNS, VEC, BLOCK_S)
    r = tl.arange(0, BLOCK_R)
    within = (r < n)[:, None] & inside[None, :]
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    x = tl.load(x_ptr + tile_offsets(x_base, r, x_stride_r, COLUMNS, VEC), mask=within, other=0.0).to(ACC)
    g = tl.load(g_ptr + tile_offsets(g_base, r, g_stride_r, COLUMNS, VEC), mask=within, other=0.0).to(ACC)
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    a, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
    valid = within
    g_valid = g
    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
        valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
        g_valid = tl.where(valid, g, 0.0)
    domain = valid if EXCLUDE else within
    if stats_ptr is not None:
        number = slice_number(o, i, head, num_heads, inner, COLUMNS, VEC)
        x0, mean, var = load_statistics(stats_ptr, number, num_slices, inside)
        shifted = x - x0[None, :]
        count = count_elements(domain, x0, n, EXCLUDE)
    else:
        if PADDED:
            x0 = first_valid(x_ptr, x_base, valid, r, x_stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
        else:
            x0 = tl.load(x_ptr + x_base, mask=inside, other=0.0).to(ACC)
        shifted = x - x0[None, :]
        count, mean, var = tile_statistics(shifted, x0, valid, domain, n, EPS, PADDED, EXCLUDE)
    if EXCLUDE:
        shifted = tl.where(valid, shifted, 0.0)
    rstd = reciprocal_sqrt(var)
    z = standardise(shifted, mean, rstd, center)
    nearest = nearest_distance(z, domain)
    densities = density(z, nearest, domain, a)
    scale, clamped = normaliser(nearest, tl.sum(densities, axis=0), rstd, a, spread, level, CLAMP)
    weights = finish_weights(densities, scale, valid, count, EXCLUDE)

    # With g0 the weighted mean of g, x0 (g - g0) adds to q_mean only what rounding left.
    g0 = tl.sum(weights * g_valid, axis=0)
    q_mean = tl.sum(weights * ((g_valid - g0[None, :]) * x0[None, :] + g_valid * shifted), axis=0)
    p = slice_gradient(
        g_valid, x, shifted, x0, weights, domain, count, clamped, g0, q_mean, CLAMP, PADDED, EXCLUDE
    )
    u1 = tl.sum(p * z, axis=0)
    u2 = tl.sum(p * z * z, axis=0)
    t0 = tl.zeros_like(u1)
    if CLAMP:
        t0 = tl.where(clamped, tl.sum(p, axis=0), 0.0)
    dx = input_gradient(
        g, p, weights, z, rstd, t0, u1, u2, count, a, center, spread, valid, PADDED, EXCLUDE, RESIDUAL
    )
    at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
    save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside)


@triton.jit(do_not_specialize=SIZES)
def split_sums(
    x_ptr, g_ptr, mask_ptr, stats_ptr, sums_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, tiles,
    x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x and g; writes what ``merge_sums`` needs of each run: 12 numbers, [12, chunks, slices]."""
    head = tl.program_id(0) % num_heads
    start, n = head_span(head, num_heads, chunk, length, COLUMNS, VEC)
    o, i, inside = slice_coordinates(tl.program_id(0) // num_heads, outer, inner, COLUMNS, VEC, BLOCK_S)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, num_heads, inner, COLUMNS, VEC)
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    a, center, _spread, _level = product_quadratic(offset, width, real, EPS, ACC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)

    rstd = reciprocal_sqrt(var)
    count = tl.zeros([BLOCK_S], ACC)
    seen = tl.zeros([BLOCK_S], ACC)
    g0 = tl.zeros([BLOCK_S], ACC)
    nearest = tl.full([BLOCK_S], FAR, ACC)
    s0 = tl.zeros([BLOCK_S], ACC)
    s1 = tl.zeros([BLOCK_S], ACC)
    s2 = tl.zeros([BLOCK_S], ACC)
    h0 = tl.zeros([BLOCK_S], ACC)
    h1 = tl.zeros([BLOCK_S], ACC)
    h2 = tl.zeros([BLOCK_S], ACC)
    t0 = tl.zeros([BLOCK_S], ACC)
    t1 = tl.zeros([BLOCK_S], ACC)
    t2 = tl.zeros([BLOCK_S], ACC)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        within = (r < n)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_offsets(x_base, r, x_stride_r, COLUMNS, VEC), mask=within, other=0.0).to(ACC)
        g = tl.load(g_ptr + tile_offsets(g_base, r, g_stride_r, COLUMNS, VEC), mask=within, other=0.0).to(ACC)
        valid = within
        if PADDED:
            valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
        domain = valid if EXCLUDE else within
        shifted = x - x0[None, :]
        if EXCLUDE:
            shifted = tl.where(valid, shifted, 0.0)
        g_valid = tl.where(valid, g, 0.0)
        found = first_valid(g_ptr, g_base, valid, r, g_stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
        # Sums of h so far are of zeros where no valid element was seen, but g - g0 is -g0 at padding.
        renew = seen == 0.0
        g0_before = g0
        g0 = tl.where(renew, found, g0)
        h0 += (g0_before - g0) * s0
        h1 += (g0_before - g0) * s1
        h2 += (g0_before - g0) * s2
        seen += tl.sum(valid.to(ACC), axis=0)
        count += tl.sum(domain.to(ACC), axis=0)

        z = standardise(shifted, mean, rstd, center)
        before = nearest
        nearest = tl.minimum(before, nearest_distance(z, domain))
        shrink = rescale(before, nearest, a)
        m = density(z, nearest, domain, a)
        mz = m * z
        mzz = mz * z
        h = g_valid - g0[None, :]
        t = g_valid * shifted
        s0 = s0 * shrink + tl.sum(m, axis=0)
        s1 = s1 * shrink + tl.sum(mz, axis=0)
        s2 = s2 * shrink + tl.sum(mzz, axis=0)
        h0 = h0 * shrink + tl.sum(m * h, axis=0)
        h1 = h1 * shrink + tl.sum(mz * h, axis=0)
        h2 = h2 * shrink + tl.sum(mzz * h, axis=0)
        t0 = t0 * shrink + tl.sum(m * t, axis=0)
        t1 = t1 * shrink + tl.sum(mz * t, axis=0)
        t2 = t2 * shrink + tl.sum(mzz * t, axis=0)
    at = sums_ptr + number + tl.program_id(1) * slices
    field = slices * num_chunks
    tl.store(at, nearest, mask=inside)
    tl.store(at + field, s0, mask=inside)
    tl.store(at + 2 * field, s1, mask=inside)
    tl.store(at + 3 * field, s2, mask=inside)
    tl.store(at + 4 * field, h0, mask=inside)
    tl.store(at + 5 * field, h1, mask=inside)
    tl.store(at + 6 * field, h2, mask=inside)
    tl.store(at + 7 * field, t0, mask=inside)
    tl.store(at + 8 * field, t1, mask=inside)
    tl.store(at + 9 * field, t2, mask=inside)
    tl.store(at + 10 * field, tl.where(seen > 0.0, g0, 0.0), mask=inside)
    tl.store(at + 11 * field, count, mask=inside)


@triton.jit
def merge_sums(
    sums_ptr, number, num_slices, num_chunks, inside, x0, rstd, a, spread, level,
    CLAMP: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whole slices from the sums of their runs.

    Returns (elements counted, smallest z^2, factor from density to weight, clamped, g0, weighted mean of
    x0 (g - g0) + g (x - x0), T0, U1, U2).
    """
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    field = num_slices * num_chunks
    nearest, s0 = merge_normaliser(sums_ptr, number, num_slices, num_chunks, inside, a, BLOCK_C)
    nearests = tl.load(sums_ptr + at, mask=there, other=FAR)
    g0s = tl.load(sums_ptr + 10 * field + at, mask=there, other=0.0)
    count = tl.sum(tl.load(sums_ptr + 11 * field + at, mask=there, other=0.0), axis=0)
    g0 = pick_first(g0s, g0s != 0.0, BLOCK_C)
    shrink = rescale(nearests, nearest[None, :], a)
    moved = (g0s - g0[None, :]) * shrink
    s0s = tl.load(sums_ptr + field + at, mask=there, other=0.0)
    s1s = tl.load(sums_ptr + 2 * field + at, mask=there, other=0.0)
    s2s = tl.load(sums_ptr + 3 * field + at, mask=there, other=0.0)
    s1 = tl.sum(s1s * shrink, axis=0)
    s2 = tl.sum(s2s * shrink, axis=0)
    h0 = tl.sum(tl.load(sums_ptr + 4 * field + at, mask=there, other=0.0) * shrink + s0s * moved, axis=0)
    h1 = tl.sum(tl.load(sums_ptr + 5 * field + at, mask=there, other=0.0) * shrink + s1s * moved, axis=0)
    h2 = tl.sum(tl.load(sums_ptr + 6 * field + at, mask=there, other=0.0) * shrink + s2s * moved, axis=0)
    t0 = tl.sum(tl.load(sums_ptr + 7 * field + at, mask=there, other=0.0) * shrink, axis=0)
    t1 = tl.sum(tl.load(sums_ptr + 8 * field + at, mask=there, other=0.0) * shrink, axis=0)
    t2 = tl.sum(tl.load(sums_ptr + 9 * field + at, mask=there, other=0.0) * shrink, axis=0)

    scale, clamped = normaliser(nearest, s0, rstd, a, spread, level, CLAMP)
    h_mean = h0 / s0
    t_mean = t0 / s0
    q_mean = x0 * h_mean + t_mean
    u0 = tl.zeros_like(s0)
    u1 = (x0 * (h1 - h_mean * s1) + (t1 - t_mean * s1)) * scale
    u2 = (x0 * (h2 - h_mean * s2) + (t2 - t_mean * s2)) * scale
    if CLAMP:
        u0 = tl.where(clamped, (x0 * (h0 + g0 * s0) + t0) * scale, u0)
        u1 = tl.where(clamped, (x0 * (h1 + g0 * s1) + t1) * scale, u1)
        u2 = tl.where(clamped, (x0 * (h2 + g0 * s2) + t2) * scale, u2)
    if EXCLUDE:
        u0 = tl.where(count < 2.0, 0.0, u0)
        u1 = tl.where(count < 2.0, 0.0, u1)
        u2 = tl.where(count < 2.0, 0.0, u2)
    return count, nearest, scale, clamped, g0, q_mean, u0, u1, u2


@triton.jit(do_not_specialize=SIZES)
def split_gradient(
    x_ptr, g_ptr, dx_ptr, mask_ptr, stats_ptr, sums_ptr, partials_ptr, mean_offsets_ptr, c_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, num_partials, tiles,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
    VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and four sums per block of slices."""
    head = tl.program_id(0) % num_heads
    start, n = head_span(head, num_heads, chunk, length, COLUMNS, VEC)
    o, i, inside = slice_coordinates(tl.program_id(0) // num_heads, outer, inner, COLUMNS, VEC, BLOCK_S)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, num_heads, inner, COLUMNS, VEC)
    offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
    a, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = load_statistics(stats_ptr, number, slices, inside)
    rstd = reciprocal_sqrt(var)
    count, nearest, scale, clamped, g0, q_mean, t0, u1, u2 = merge_sums(
        sums_ptr, number, slices, num_chunks, inside, x0, rstd, a, spread, level, CLAMP, EXCLUDE, BLOCK_C
    )
    if tl.program_id(1) == 0:
        save_partials(partials_ptr, head, tl.program_id(0) // num_heads, num_partials, t0, u1, u2, rstd, inside)

    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        within = (r < n)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_offsets(x_base, r, x_stride_r, COLUMNS, VEC), mask=within, other=0.0).to(ACC)
        g = tl.load(g_ptr + tile_offsets(g_base, r, g_stride_r, COLUMNS, VEC), mask=within, other=0.0).to(ACC)
        valid = within
        g_valid = g
        if PADDED:
            valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
            g_valid = tl.where(valid, g, 0.0)
        domain = valid if EXCLUDE else within
        shifted = x - x0[None, :]
        if EXCLUDE:
            shifted = tl.where(valid, shifted, 0.0)
        z = standardise(shifted, mean, rstd, center)
        weights = finish_weights(density(z, nearest, domain, a), scale, valid, count, EXCLUDE)
        p = slice_gradient(
            g_valid, x, shifted, x0, weights, domain, count, clamped, g0, q_mean, CLAMP, PADDED, EXCLUDE
        )
        dx = input_gradient(
            g, p, weights, z, rstd, t0, u1, u2, count, a, center, spread, valid, PADDED, EXCLUDE, RESIDUAL
        )
        at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=SIZES)
def parameter_gradients(
    partials_ptr, mean_offsets_ptr, c_ptr, d_mean_offsets_ptr, d_c_ptr,
    num_gaussians, num_partials, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums [heads, 4, partials] of one head, in float64 and a fixed order; the chain rule to K."""
    head = tl.program_id(0)
    at = partials_ptr + head.to(tl.int64) * 4 * num_partials
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
    tl.store(d_mean_offsets_ptr + k, d_offset.to(d_mean_offsets_ptr.dtype.element_ty), mask=real)
    tl.store(d_c_ptr + k, d_width.to(d_c_ptr.dtype.element_ty), mask=real)


def density_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    stats: Tensor | None,
    options: DensityOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dmean_offsets, dc); ``stats`` is what the forward pass saved, None where it saved nothing."""
    mean_offsets, c = mean_offsets.contiguous(), c.contiguous()
    dx = torch.empty_like(x)
    gradients = torch.empty_like(mean_offsets), torch.empty_like(c)
    if x.numel() == 0:
        return dx, *(t.zero_() for t in gradients)
    launch, (x, g), mask = prepare(x, mean_offsets, mask, options, ("dx", "x", "g"), dx, grad)
    heads, blocks = mean_offsets.shape[0], launch.values["num_partials"]
    partials = x.new_empty((heads, 4, blocks), dtype=arithmetic_type(x))
    pointers = dict(
        x_ptr=x, g_ptr=g, dx_ptr=dx, mask_ptr=mask, stats_ptr=stats, partials_ptr=partials,
        mean_offsets_ptr=mean_offsets, c_ptr=c, d_mean_offsets_ptr=gradients[0], d_c_ptr=gradients[1],
    )  # fmt: skip
    with device_of(x):
        if not launch.tile.num_chunks:
            run(backward_resident, launch, pointers)
        else:
            if stats is None:
                pointers["stats_ptr"] = sweep_statistics(launch, pointers)["stats_ptr"]
            pointers["sums_ptr"] = partials.new_empty((12, launch.tile.num_chunks, launch.num_slices))
            run(split_sums, launch, pointers)
            run(split_gradient, launch, pointers)
        run(parameter_gradients, launch, pointers, grid=(heads,))
    return dx, *gradients
