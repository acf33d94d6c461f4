"""The forward pass of density attention over slices that are split over blocks: see density_forward.py.

``split_statistics``, ``split_normaliser`` and ``split_output`` read x once each; the last writes y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .density_math import (
    FAR,
    counted_values,
    density,
    find_peak,
    finish_weights,
    inverse_of,
    load_gaussians,
    load_statistics,
    merge_counts,
    merge_normaliser,
    merge_statistics,
    normaliser,
    product_least,
    product_quadratic,
    reciprocal_sqrt,
    rescale,
    save_statistics,
    standardise,
    store_output,
    value_at_peak,
)
from .host import SIZES
from .mixture_math import gate_density, mark_far, merge_mixture, mixture_density, mixture_least, mixture_over_peak
from .tiles import (
    first_valid,
    load_slices,
    parameter_number,
    program_slices,
    slice_number,
    slice_offsets,
    tile_offsets,
)


@triton.jit(do_not_specialize=SIZES)
def split_statistics(
    x_ptr, mask_ptr, cu_seqlens_ptr, partials_ptr,
    outer, chunk, length, inner, num_heads, num_slices, num_chunks, tiles,
    x_stride_o, x_stride_r, x_stride_i, mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads x; writes (count, x0, mean - x0, sum of squared deviations) of each run of a slice."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    count = tl.zeros([BLOCK_S], ACC)
    mean = tl.zeros([BLOCK_S], ACC)
    squares = tl.zeros([BLOCK_S], ACC)
    x0 = tl.zeros([BLOCK_S], ACC)
    if not PADDED:
        at = x_base + tl.minimum(first, n - 1) * x_stride_r * (VEC if COLUMNS else 1)
        x0 = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
    for t in range(tiles):
        r = first + t * BLOCK_R + tl.arange(0, BLOCK_R)
        x, _, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        if PADDED:
            found = first_valid(x_ptr, x_base, valid, r, x_stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
            x0 = tl.where(count == 0.0, found, x0)
        counted = counted_values(x - x0[None, :], x0, valid, PADDED, EXCLUDE)
        tile_count = tl.sum(domain.to(ACC), axis=0)
        tile_mean = tl.sum(tl.where(domain, counted, 0.0), axis=0) * inverse_of(tl.maximum(tile_count, 1.0))
        deviation = tl.where(domain, counted - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = tile_count * inverse_of(tl.maximum(count + tile_count, 1.0))
        mean += delta * share
        squares += tl.sum(deviation * deviation, axis=0) + delta * delta * count * share
        count += tile_count
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    field = num_slices.to(tl.int64) * num_chunks
    at = partials_ptr + number + tl.program_id(1) * num_slices
    tl.store(at, count, mask=inside)
    tl.store(at + field, x0, mask=inside)
    tl.store(at + 2 * field, mean, mask=inside)
    tl.store(at + 3 * field, squares, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def split_normaliser(
    x_ptr, mask_ptr, cu_seqlens_ptr, moments_ptr, merged_ptr, partials_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, tiles,
    x_stride_o, x_stride_r, x_stride_i, mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, MIXTURE: tl.constexpr, UNROLLED: tl.constexpr, HALF: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads x; writes the merged statistics, and of each run (peak, x there, sum of densities over that one's), or of a
    mixture (log2 of the largest term, sum of densities over it)."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    if not MIXTURE:
        offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
        slope, center, _spread, _level = product_quadratic(offset, width, real, EPS, ACC)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    x0, mean, var = merge_statistics(moments_ptr, number, slices, num_chunks, inside, EPS, True, False, BLOCK_C)
    rstd = reciprocal_sqrt(var)
    if tl.program_id(1) == 0:
        save_statistics(merged_ptr, x0, mean, var, number, slices, inside)

    peak = tl.zeros([BLOCK_S], ACC)
    if MIXTURE:
        peak -= FAR
    x_peak = x0
    total = tl.zeros([BLOCK_S], ACC)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    for t in range(tiles):
        r = first + t * BLOCK_R + tl.arange(0, BLOCK_R)
        x, _, _, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, EXCLUDE, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        before = peak
        if MIXTURE:
            d = (x - x0[None, :]) - mean[None, :]
            asked = tl.max(domain.to(tl.int32), axis=0) > 0
            _densities, added, found = mixture_over_peak(
                d, rstd, domain, asked, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
                UNROLLED, HALF, CLAMP, ACC,
            )  # fmt: skip
            found = tl.where(asked, found, before)  # a tile of padding alone has no peak
            peak = tl.maximum(before, found)
            kept = total * tl.exp2(before - peak)
            added *= tl.exp2(found - peak)
        else:
            z = standardise(x - x0[None, :], mean, rstd * slope, center)
            found = find_peak(z, domain)
            present = tl.max(domain.to(tl.int32), axis=0) > 0
            nearer = present & ((total == 0.0) | (tl.abs(found) < tl.abs(before)))
            peak = tl.where(nearer, found, before)
            x_peak = tl.where(nearer, value_at_peak(x, z, found, domain, x0), x_peak)
            added = tl.sum(density(z - peak[None, :], peak, domain), axis=0)
            kept = total * rescale(before, peak)
        total = tl.where(total == 0.0, 0.0, kept) + added
    at = partials_ptr + number + tl.program_id(1) * slices
    field = slices * num_chunks
    tl.store(at, peak, mask=inside)
    if MIXTURE:
        tl.store(at + field, total, mask=inside)
    else:
        tl.store(at + field, x_peak, mask=inside)
        tl.store(at + 2 * field, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def split_output(
    x_ptr, y_ptr, weights_ptr, mask_ptr, cu_seqlens_ptr, moments_ptr, merged_ptr, partials_ptr, stats_ptr,
    mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices, num_chunks, tiles,
    y_stride_o, y_stride_r, y_stride_i, x_stride_o, x_stride_r, x_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, MIXTURE: tl.constexpr, NORMALISED: tl.constexpr,
    PER_FEATURE: tl.constexpr, MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr,
    UNROLLED: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads x, writes y, the weights and 3 numbers per slice where asked for."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    y_base = slice_offsets(o, i, start, y_stride_o, y_stride_r, y_stride_i, COLUMNS, VEC)
    mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
    number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
    slices = num_slices.to(tl.int64)
    if NORMALISED:
        x0, mean, var = load_statistics(merged_ptr, number, slices, inside)
    else:
        x0, mean, var = merge_statistics(
            moments_ptr, number, slices, num_chunks, inside, EPS, NORMALISED, PER_FEATURE, BLOCK_C
        )
    rstd = reciprocal_sqrt(var)
    count = tl.zeros_like(x0)
    if EXCLUDE:
        count = merge_counts(moments_ptr, number, slices, num_chunks, inside, BLOCK_C)
    if not NORMALISED:
        feature = parameter_number(head, i, inner, COLUMNS, VEC)
        if stats_ptr is not None:
            if tl.program_id(1) == 0:
                save_statistics(stats_ptr, x0, mean, var, number, slices, inside)
    elif MIXTURE:
        peak, total = merge_mixture(partials_ptr, number, slices, num_chunks, inside, BLOCK_C)
        least = mixture_least(peak, EPS)
        if stats_ptr is not None:
            if tl.program_id(1) == 0:
                save_statistics(stats_ptr, x0, mean, mark_far(var, peak), number, slices, inside)
    else:
        offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
        slope, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
        peak, x_peak, total = merge_normaliser(partials_ptr, number, slices, num_chunks, inside, BLOCK_C)
        least = product_least(peak, rstd, spread, level)
        if stats_ptr is not None:
            if tl.program_id(1) == 0:
                save_statistics(stats_ptr, x_peak, mean - (x_peak - x0), var, number, slices, inside)
    if NORMALISED:
        scale, _ = normaliser(least, total, CLAMP)

    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_R
    for t in range(tiles):
        r = first + t * BLOCK_R + tl.arange(0, BLOCK_R)
        x, within, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        if not NORMALISED:
            densities = gate_density(
                (x - x0[None, :]) - mean[None, :], rstd, domain,
                mean_offsets_ptr, c_ptr, log_shares_ptr, head, feature, inside, num_gaussians, EPS, PER_FEATURE, ACC,
            )  # fmt: skip
        elif MIXTURE:
            densities = mixture_density(
                (x - x0[None, :]) - mean[None, :], rstd, domain, peak,
                mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, UNROLLED, HALF, not CLAMP, ACC,
            )  # fmt: skip
        else:
            gap = standardise(x - x0[None, :], mean, rstd * slope, center) - peak[None, :]
            densities = density(gap, peak, domain)
        weights = densities
        if NORMALISED:
            weights = finish_weights(densities, scale, valid, count, EXCLUDE)
        at = tile_offsets(y_base, r, y_stride_r, COLUMNS, VEC)
        store_output(y_ptr, weights_ptr, at, x, weights, valid, within, MULTIPLY, PADDED, RESIDUAL)
