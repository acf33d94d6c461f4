"""The backward pass of density attention.

With w the weights, q_j = valid_j g_j x_j the gradient of w_j, D = sum w q (0 where the clamp is active) and
p_j = w_j (q_j - D), everything follows from T0 = sum p, U1 = sum p z and U2 = sum p z^2 of each slice. Both steps
cancel: q - D where g is nearly constant and x has an offset, the sums where a few elements hold nearly all the weight.
So x is seen from x0, the element of the largest density, and z from its peak: with gap = (x - x0) / sqrt(var),
q is x0 (g - g0) + g (x - x0), which differs from g x by a constant, and the sums are those of p gap and p gap^2.

``backward_resident`` reads x and the incoming gradient once and writes dx once, for slices that fit one block, and so
does ``backward_looped`` (density_looped.py) where the cache holds what a block does not; ``split_sums`` and
``split_gradient`` (density_backward_split.py) read both twice. The parameter gradients need four
sums per head, which every block writes and ``parameter_gradients`` adds in a fixed order: no atomics, the same bits
from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import DensityOptions
from .density_backward_split import split_gradient, split_sums
from .density_forward import density_forward
from .density_looped import backward_looped
from .density_math import (
    LN_2,
    count_elements,
    distance_to,
    find_peak,
    from_mean,
    from_statistics,
    input_gradient,
    load_gaussians,
    load_statistics,
    product_quadratic,
    product_weights,
    reciprocal_sqrt,
    relative_gradient,
    slice_gradient,
    standardise,
    through_variance,
    tile_statistics,
    unless_clamped,
)
from .density_parameters import parameter_gradients, save_partials
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
    tile_offsets,
)


@triton.jit
def resident_gradient(
    x, g, weights, gap, peak, x0, var, rstd, count, clamped, valid, domain, slope, center, spread,
    CLAMP: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """(dx, T0, U1, U2) of slices that the tile holds whole; x0 is x at the peak, from which gap is."""
    g_valid = g
    if PADDED:
        g_valid = tl.where(valid, g, 0.0)
    # g0 is the weighted mean of g, so what q holds of x0 is what g varies by.
    g0 = unless_clamped(tl.sum(weights * g_valid, axis=0), clamped, CLAMP)
    q = relative_gradient(g_valid, distance_to(x, x0, valid, EXCLUDE), x0, g0, tl.zeros_like(x0))
    q -= unless_clamped(tl.sum(weights * q, axis=0), clamped, CLAMP)[None, :]
    p = slice_gradient(q, weights, domain, count, PADDED, EXCLUDE)
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
    through_var = through_variance(t0, u2, rstd, count, slope, spread)
    rate = rstd * slope
    through = through_var[None, :] * gap + (through_var * (peak + center * rate))[None, :]
    dx = input_gradient(g, weights, through, pz, mean_pz, rate * (2.0 * LN_2), valid, PADDED, RESIDUAL)
    return dx, t0, u1, u2


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
    slope, center, spread, level = product_quadratic(offset, width, real, EPS, ACC)
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
        rstd, peak, gap = from_statistics(x, x0, mean, var, slope, center)
    else:
        if PADDED:
            first = first_valid(x_ptr, x_base, valid, r, x_stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
        else:
            first = tl.load(x_ptr + x_base, mask=inside, other=0.0).to(ACC)
        shifted = x - first[None, :]
        count, mean, var = tile_statistics(shifted, first, valid, domain, n, EPS, PADDED, EXCLUDE)
        rstd = reciprocal_sqrt(var)
        z = standardise(shifted, mean, rstd * slope, center)
        peak = find_peak(z, domain)
        gap = z - peak[None, :]
        x0 = first + (mean + center + peak * (var * (rstd * (1.0 / slope))))
    if EXCLUDE:
        gap = tl.where(valid, gap, 0.0)
    weights, clamped = product_weights(gap, peak, rstd, valid, domain, count, spread, level, CLAMP, EXCLUDE)
    dx, t0, u1, u2 = resident_gradient(
        x, g, weights, gap, peak, x0, var, rstd, count, clamped, valid, domain, slope, center, spread,
        CLAMP, PADDED, EXCLUDE, RESIDUAL,
    )  # fmt: skip
    at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
    save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside)


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
        if stats is None and launch.tile.num_chunks:  # the operator called by hand: the forward pass saves them
            stats = pointers["stats_ptr"] = partials.new_empty((3, launch.num_slices))
            density_forward(x, mean_offsets, c, mask, options, dx, None, stats, cu_seqlens=cu_seqlens)
        if not launch.tile.num_chunks:
            run(backward_looped if launch.tile.looped else backward_resident, launch, pointers)
        else:
            pointers["sums_ptr"] = partials.new_empty((8, launch.tile.num_chunks, launch.num_slices))
            run(split_sums, launch, pointers)
            run(split_gradient, launch, pointers)
        run(parameter_gradients, launch.parameters, pointers, grid=(heads,))
    return dx, *gradients
