"""The backward pass of density attention with a mixture of Gaussians.

With m_jk the density of element j under Gaussian k times its share, w_j = sum_k m_jk / S the weights, q_j = valid_j g_j
x_j the gradient of w_j, D = sum w q (0 where the clamp is active) and h_j = (q_j - D) / S, everything follows from the
products m_jk h_j: their sums, times e_jk / c_k^2 and times e_jk^2 / c_k^2, e_jk being the distance from Gaussian k in
standard deviations. As for the product (see density_backward.py) x is seen from an element of its slice, so that q - D
does not cancel where g is nearly constant and x has an offset.

``mixture_backward_resident`` reads x and the incoming gradient once and writes dx once, for slices that fit one block.
So does ``mixture_backward_looped`` (mixture_looped.py) for a mixture where the cache holds the slices: it takes fewer
instructions. Longer ones, of which the forward pass saved their statistics, are swept twice, by ``mixture_split_sums``
and ``mixture_split_gradient`` (mixture_backward_split.py). Every tile writes three sums per Gaussian for the parameter
gradients, or every program those of all its tiles, which ``mixture_parameter_gradients`` adds in a fixed order: the
same bits from run to run.

The gate and the per-feature Gaussian, which are not normalised, take the same way with less on it: S = 1 and h = q,
there is no peak, and ``mixture_split_slopes`` sweeps split slices in the place of ``mixture_split_sums``. Parameters of
each feature have two sums of each slice, which ``feature_parameter_gradients`` adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import DensityOptions
from .density_forward import density_forward
from .density_math import (
    FAR,
    counted_members,
    finish_weights,
    input_gradient,
    normaliser,
    reciprocal_sqrt,
    relative_gradient,
    through_variance_of,
    tile_statistics,
)
from .host import SIZES, arithmetic_type, device_of, prepare, run, viewable
from .mixture_backward_split import mixture_split_gradient, mixture_split_slopes, mixture_split_sums
from .mixture_looped import mixture_backward_looped
from .mixture_math import (
    centred_gradient,
    gate_density,
    gate_gradient,
    mixture_least,
    mixture_over_peak,
    partial_number,
    slopes,
)
from .mixture_parameters import feature_parameter_gradients, mixture_parameter_gradients
from .tiles import (
    find_valid,
    first_valid,
    load_tile,
    parameter_number,
    program_slices,
    rows_within,
    slice_offsets,
    tile_offsets,
)


@triton.jit(do_not_specialize=SIZES)
def mixture_backward_resident(
    x_ptr, g_ptr, dx_ptr, mask_ptr, cu_seqlens_ptr, partials_ptr, mean_offsets_ptr, c_ptr, log_shares_ptr,
    outer, chunk, length, inner, num_heads, num_gaussians, num_chunks, num_partials, tiles,
    dx_stride_o, dx_stride_r, dx_stride_i, x_stride_o, x_stride_r, x_stride_i, g_stride_o, g_stride_r, g_stride_i,
    mask_stride_o, mask_stride_r, mask_stride_i,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    CLAMP: tl.constexpr, EPS: tl.constexpr, NORMALISED: tl.constexpr, PER_FEATURE: tl.constexpr,
    MULTIPLY: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads x and g, writes dx, and three sums per Gaussian and block. One sweep."""
    head, block, start, n, o, i, inside = program_slices(
        cu_seqlens_ptr, num_heads, chunk, length, outer, inner, COLUMNS, VEC, BLOCK_S
    )
    r = tl.arange(0, BLOCK_R)
    within = rows_within(r, n, inside, WHOLE)
    x_base = slice_offsets(o, i, start, x_stride_o, x_stride_r, x_stride_i, COLUMNS, VEC)
    g_base = slice_offsets(o, i, start, g_stride_o, g_stride_r, g_stride_i, COLUMNS, VEC)
    dx_base = slice_offsets(o, i, start, dx_stride_o, dx_stride_r, dx_stride_i, COLUMNS, VEC)
    x = load_tile(x_ptr, x_base, r, x_stride_r, within, COLUMNS, VEC, ACC)
    g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
    valid = within
    g_valid = g
    if PADDED:
        mask_base = slice_offsets(o, i, start, mask_stride_o, mask_stride_r, mask_stride_i, COLUMNS, 1)
        valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
        g_valid = tl.where(valid, g, 0.0)
        x0 = first_valid(x_ptr, x_base, valid, r, x_stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
    else:
        x0 = tl.load(x_ptr + x_base, mask=inside, other=0.0).to(ACC)
    domain = valid if EXCLUDE else within
    shifted = x - x0[None, :]
    count, mean, var = tile_statistics(shifted, x0, valid, domain, n, EPS, PADDED, EXCLUDE, NORMALISED, PER_FEATURE)
    rstd = reciprocal_sqrt(var)
    d = shifted - mean[None, :]
    if EXCLUDE:
        d = tl.where(valid, d, 0.0)
    feature = parameter_number(head, i, inner, COLUMNS, VEC)
    if NORMALISED:
        asked = inside & (count > 0.0)
        weights, total, top = mixture_over_peak(
            d, rstd, domain, asked, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, 0, False,
            CLAMP, ACC,
        )  # fmt: skip
        # Seen from the element of largest density, and from the weighted mean of g: q is 0 where all the weight may be.
        largest = domain & (weights == tl.max(weights, axis=0)[None, :])
        scale, clamped = normaliser(mixture_least(top, EPS), total, CLAMP)
        weights = finish_weights(weights, scale, valid, count, EXCLUDE)
        x_largest = tl.max(tl.where(largest, x, -FAR), axis=0)
        from_largest = tl.where(domain, x - x_largest[None, :], 0.0)
        g0 = tl.sum(weights * g_valid, axis=0)
        q = relative_gradient(g_valid, from_largest, x_largest, g0, tl.zeros_like(g0))
        q_mean = tl.sum(weights * q, axis=0)
        h = centred_gradient(q, q_mean, g_valid, x, scale, domain, count, clamped, CLAMP, EXCLUDE)
    else:
        top = rstd  # of no use there
        weights = gate_density(
            d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, feature, inside, num_gaussians,
            EPS, PER_FEATURE, ACC,
        )  # fmt: skip
        h = gate_gradient(g, g_valid, x, domain, MULTIPLY)
    slope, first, second = slopes(
        d, rstd, h, domain, top, mean_offsets_ptr, c_ptr, log_shares_ptr, partials_ptr,
        head, feature, inside, partial_number(block, o, i, inner, 0, tiles, num_chunks, PER_FEATURE, COLUMNS, VEC),
        num_gaussians, num_partials, EPS, CLAMP, NORMALISED, PER_FEATURE, ACC,
    )  # fmt: skip

    members = counted_members(count, NORMALISED)
    mean_slope = first / members
    left = tl.where(domain, slope - mean_slope[None, :], 0.0)
    mean_slope += tl.sum(left, axis=0) / members  # what rounding left
    through_var = through_variance_of(second, rstd, var, members, NORMALISED, PER_FEATURE)
    if not MULTIPLY:  # y is not made of x itself
        g = tl.zeros_like(g)
    through = through_var[None, :] * (d * rstd[None, :])
    dx = input_gradient(g, weights, through, slope - mean_slope[None, :], mean_slope, rstd, valid, PADDED, RESIDUAL)
    at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)


def mixture_backward(
    grad: Tensor,
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    log_shares: Tensor | None,
    mask: Tensor | None,
    stats: Tensor | None,
    options: DensityOptions,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dmean_offsets, dc), and dlog_shares where these are. ``stats`` is what the forward pass saved, or None."""
    parameters = [t.contiguous() for t in (mean_offsets, c, log_shares) if t is not None]
    dx = torch.empty_like(x)
    gradients = tuple(torch.empty_like(p) for p in parameters)
    if x.numel() == 0:
        return dx, *(t.zero_() for t in gradients)
    out = viewable(dx, options)
    launch, (x, g), mask = prepare(x, mean_offsets, mask, cu_seqlens, options, ("dx", "x", "g"), out, grad)
    heads, gaussians = mean_offsets.shape
    per_feature = options.density == "gaussian"
    sums_per_head = (2,) if per_feature else (gaussians, 3)
    partials = x.new_empty((heads, *sums_per_head, launch.values["num_partials"]), dtype=arithmetic_type(x))
    pointers = dict(
        x_ptr=x, g_ptr=g, dx_ptr=out, mask_ptr=mask, cu_seqlens_ptr=cu_seqlens, partials_ptr=partials,
        stats_ptr=stats, log_shares_ptr=None,
    )  # fmt: skip
    pointers.update(zip(("mean_offsets_ptr", "c_ptr", "log_shares_ptr"), parameters))
    with device_of(x):
        chunks = launch.tile.num_chunks
        if not chunks:
            run(mixture_backward_looped if launch.tile.looped else mixture_backward_resident, launch, pointers)
        else:
            if stats is None:  # only where the operator is called by hand: the forward pass saves them
                stats = partials.new_empty((3, launch.num_slices))
                density_forward(x, *parameters[:2], mask, options, dx, None, stats, log_shares, cu_seqlens)
            fields = 9 if options.normalised else 3
            pointers.update(stats_ptr=stats, sums_ptr=partials.new_empty((fields, chunks, launch.num_slices)))
            run(mixture_split_sums if options.normalised else mixture_split_slopes, launch, pointers)
            run(mixture_split_gradient, launch, pointers)
        names = "d_mean_offsets_ptr", "d_c_ptr", "d_log_shares_ptr"
        pointers.update(zip(names, gradients))
        if per_feature:
            grid = heads, -(-gaussians // launch.values["BLOCK_F"])
            run(feature_parameter_gradients, launch.parameters, pointers, grid=grid)
        else:
            run(mixture_parameter_gradients, launch.parameters, pointers, grid=(heads, gaussians))
    return dx if out is dx else dx.copy_(out), *gradients
