"""The forward pass of density attention.

``forward_resident`` reads x once, writes y once: one launch, for slices that fit one block. Where the cache holds what
a block does not, ``forward_looped`` (density_looped.py) does it in one launch too. Longer slices are split
over blocks and swept three times: ``split_statistics``, ``split_normaliser`` and ``split_output``
(density_forward_split.py) read x three times and write y once; a density that is not normalised goes without the
second of them. Every block merges the partial results of its slices in the same fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import DensityOptions
from .density_forward_split import split_normaliser, split_output, split_statistics
from .density_looped import forward_looped
from .density_math import (
    density,
    find_peak,
    finish_weights,
    load_gaussians,
    normaliser,
    product_least,
    product_quadratic,
    reciprocal_sqrt,
    save_mean,
    save_statistics,
    save_variance,
    standardise,
    store_output,
    tile_statistics,
    value_at_peak,
)
from .host import SIZES, arithmetic_type, device_of, prepare, run, viewable
from .mixture_math import gate_density, mark_far, mixture_least, mixture_over_peak
from .tiles import (
    find_valid,
    first_valid,
    load_tile,
    parameter_number,
    program_slices,
    rows_within,
    slice_number,
    slice_offsets,
    tile_offsets,
)


@triton.jit(do_not_specialize=SIZES)
def forward_resident(
    x_ptr, y_ptr, weights_ptr, mask_ptr, cu_seqlens_ptr, stats_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_slices,
    y_stride_o, y_stride_r, y_stride_i, x_stride_o, x_stride_r, x_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, MIXTURE: tl.constexpr, NORMALISED: tl.constexpr,
    PER_FEATURE: tl.constexpr, MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr,
    UNROLLED: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x, writes y, the weights and 3 numbers per slice where asked for. One sweep."""
    head, _block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    y_base = slice_offsets(o, i, start, y_stride_o, y_stride_r, y_stride_i, COLUMNS, VEC)
    if WHOLE:
        n = BLOCK_R  # which is known to the compiler
    r = tl.arange(0, BLOCK_R)
    within = rows_within(r, n, inside, WHOLE)
    x = load_tile(x_ptr, x_base, r, x_stride_r, within, COLUMNS, VEC, ACC)

    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
        valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
        x0 = first_valid(x_ptr, x_base, valid, r, x_stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
    else:
        valid = within
        x0 = tl.load(x_ptr + x_base, mask=inside, other=0.0).to(ACC)
    domain = valid if EXCLUDE else within

    shifted = x - x0[None, :]
    count, mean, var = tile_statistics(shifted, x0, valid, domain, n, EPS, PADDED, EXCLUDE, NORMALISED, PER_FEATURE)
    rstd = reciprocal_sqrt(var)
    if MIXTURE:
        d = shifted - mean[None, :]
        number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
        if stats_ptr is not None:
            save_mean(stats_ptr, x0, mean, number, num_slices, inside)
        if NORMALISED:
            asked = inside & (count > 0.0)
            weights, total, top = mixture_over_peak(
                d, rstd, domain, asked, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
                UNROLLED, HALF, CLAMP, ACC,
            )  # fmt: skip
            least = mixture_least(top, EPS)
            if stats_ptr is not None:
                save_variance(stats_ptr, mark_far(var, top), number, num_slices, inside)
        else:
            if stats_ptr is not None:
                save_variance(stats_ptr, var, number, num_slices, inside)
            feature = parameter_number(head, i, inner, COLUMNS, VEC)
            weights = gate_density(
                d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, feature, inside, num_gaussians,
                EPS, PER_FEATURE, ACC,
            )  # fmt: skip
    else:
        offset, width, real = load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K)
        slope, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
        z = standardise(shifted, mean, rstd * slope, center)
        peak = find_peak(z, domain)
        if stats_ptr is not None:
            number = slice_number(o, i, head, outer, inner, COLUMNS, VEC)
            x_peak = value_at_peak(x, z, peak, domain, x0)
            save_statistics(stats_ptr, x_peak, mean - (x_peak - x0), var, number, num_slices, inside)
        weights = density(z - peak[None, :], peak, domain)
        total = tl.sum(weights, axis=0)
        least = product_least(peak, rstd, spread, level)
    if NORMALISED:
        scale, _ = normaliser(least, total, CLAMP)
        weights = finish_weights(weights, scale, valid, count, EXCLUDE)

    at = tile_offsets(y_base, r, y_stride_r, COLUMNS, VEC)
    store_output(y_ptr, weights_ptr, at, x, weights, valid, within, MULTIPLY, PADDED, RESIDUAL)


def density_forward(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    mask: Tensor | None,
    options: DensityOptions,
    y: Tensor,
    weights: Tensor | None,
    stats: Tensor | None,
    log_shares: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Fill y, and weights and stats where they are given; all of them as the operator allocates them.

    log_shares [heads, K]: natural logarithms of the shares of a mixture or a gate.
    stats: [3, slices].
    cu_seqlens [sequences + 1]: where the sequences of a packed x [total, features] begin, and the last one ends.
    """
    if x.numel() == 0:
        return
    out = viewable(y, options)
    details = weights if weights is None or out is y else torch.empty_like(out)
    launch, (x,), mask = prepare(x, mean_offsets, mask, cu_seqlens, options, ("y", "x"), out)
    pointers = dict(
        x_ptr=x, y_ptr=out, weights_ptr=details, mask_ptr=mask, cu_seqlens_ptr=cu_seqlens, stats_ptr=stats,
        mean_offsets_ptr=mean_offsets.contiguous(), c_ptr=c.contiguous(),
        log_shares_ptr=None if log_shares is None else log_shares.contiguous(),
    )  # fmt: skip
    with device_of(x):
        if not launch.tile.num_chunks:
            run(forward_looped if launch.tile.looped else forward_resident, launch, pointers)
        else:
            fields = x.new_empty((7, launch.tile.num_chunks, launch.num_slices), dtype=arithmetic_type(x))
            moments, partials = fields.split((4, 3))
            run(split_statistics, launch, dict(pointers, partials_ptr=moments))
            pointers.update(moments_ptr=moments, merged_ptr=None, partials_ptr=partials)
            if options.normalised:
                pointers["merged_ptr"] = fields.new_empty((3, launch.num_slices))
                run(split_normaliser, launch, pointers)
            run(split_output, launch, pointers)
    if out is not y:
        y.copy_(out)
        if weights is not None:
            weights.copy_(details)
