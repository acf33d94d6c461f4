"""Sweeps of the mixture over slices that a tile does not hold whole, a tile at a time, in functions of Triton.

As in density_sweeps.py a thread keeps numbers of its own, which are exchanged between threads once, however many tiles
there are. ``tiles`` start at row ``first`` of the slices.
"""

import triton
import triton.language as tl

from .density_math import (
    FAR,
    LN_2,
    counted_members,
    counted_values,
    finish_weights,
    input_gradient,
    normaliser,
    relative_gradient,
    unless_clamped,
    variance,
)
from .density_sweeps import sweep_mean
from .mixture_math import (
    LOWEST,
    fall_by,
    load_gaussian,
    mixture_least,
    narrowness_of,
    spares_registers,
)
from .tiles import first_of_run, load_slices, load_tile, tile_offsets


@triton.jit
def deviations(x, x0, mean, valid, EXCLUDE: tl.constexpr):
    """(x - x0, x - mean) of a tile; of padding that is excluded x is taken to be x0."""
    from_x0 = x - x0[None, :]
    if EXCLUDE:
        from_x0 = tl.where(valid, from_x0, 0.0)
    return from_x0, from_x0 - mean[None, :]


@triton.jit
def sweep_mixture_statistics(
    x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside, EPS: tl.constexpr,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(x0, mean - x0, variance) of whole slices, in two sweeps; x0 is the first valid x."""
    count, x0, mean = sweep_mean(
        x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tiles, n, inside,
        PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC, BLOCK_R, BLOCK_S,
    )  # fmt: skip
    squares = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    for tile in range(tiles):
        x, _, valid, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, tile * BLOCK_R + tl.arange(0, BLOCK_R),
            n, inside, PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        counted = counted_values(x - x0[None, :], x0, valid, PADDED, EXCLUDE)
        deviation = tl.where(domain, counted - mean[None, :], 0.0)
        squares += deviation * deviation
    return x0, mean, variance(tl.sum(squares, axis=0), counted_members(count, True), EPS, True, False)


@triton.jit
def load_narrow_gaussian(
    mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC: tl.constexpr
):  # fmt: skip
    """(offset, narrowness, log2 of the share) of Gaussian k."""
    offset, width, share = load_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
    return offset, narrowness_of(width), share


@triton.jit
def load_narrow_gaussians(
    mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, UNROLLED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Those of the first UNROLLED Gaussians."""
    gaussians = ()
    for k in tl.static_range(UNROLLED):
        gaussian = load_narrow_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
        gaussians = gaussians + (gaussian,)
    return gaussians


@triton.jit
def fall_of(z, rstd, top, gaussian, CLAMP: tl.constexpr):
    """(log2 of a Gaussian's part of the densities, less ``top``; u, whose square it falls by); z is (x - mean) rstd.

    What the elements of a slice have in common is one number of each slice and Gaussian, and not two: columns have
    several slices for each thread. Peaks must be of the same u to the last bit, see ``fall_by``.
    """
    offset, narrowness, share = gaussian
    u = z * narrowness - (offset * narrowness * rstd)[None, :]
    if spares_registers():
        fall = fall_by(u, share, top, not CLAMP)
    else:  # an instruction an element more, and no number of each slice and Gaussian
        fall = fall_by(u, share, tl.zeros_like(top), not CLAMP) - top[None, :]
    return fall, u


@triton.jit
def part_of(z, rstd, top, domain, gaussian, CLAMP: tl.constexpr):
    """(a Gaussian's part of the densities over 2^top, u)."""
    fall, u = fall_of(z, rstd, top, gaussian, CLAMP)
    return tl.where(domain, tl.exp2(fall), 0.0), u


@triton.jit
def sweep_peak(
    x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, first, tiles, n, inside, x0, mean, rstd,
    mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, EXCLUDE: tl.constexpr, CLAMP: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The largest term of each slice in ``tiles`` tiles from row ``first`` on, as log2: see ``mixture_peak``."""
    nothing = tl.zeros_like(rstd)
    peak = nothing + (LOWEST if CLAMP else -FAR)
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        x, _, _, domain = load_slices(
            x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
            PADDING, HAS_MASK, EXCLUDE, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        _from_x0, d = deviations(x, x0, mean, domain, EXCLUDE)
        for k in range(num_gaussians):
            gaussian = load_narrow_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
            fall, _u = fall_of(d * rstd[None, :], rstd, nothing, gaussian, CLAMP)
            peak = tl.maximum(peak, tl.max(tl.where(domain, fall, -FAR), axis=0))
    return peak


@triton.jit
def add_powers(by_one, by_e, by_ee, z, rstd, top, domain, gaussian, CLAMP: tl.constexpr):
    """Adds a Gaussian's part m, m u times its narrowness and m u^2."""
    part, u = part_of(z, rstd, top, domain, gaussian, CLAMP)
    by_u = part * u
    return by_one + part, by_e + by_u * gaussian[1], by_ee + by_u * u


@triton.jit
def sweep_mixture_sums(
    x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
    first, tiles, n, inside, x0, mean, rstd, top,
    gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr, CLAMP: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of ``tiles`` tiles from row ``first`` on: (elements counted, g0, sums of m, m e / c^2 and m e^2 / c^2 over all
    Gaussians, those of the same times q).

    m are over 2^top, g0 is the first valid g, and q is seen from it and x0.
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
        z = d * rstd[None, :]
        if EXCLUDE:
            count += domain.to(ACC)
        by_one = tl.zeros_like(d)
        by_e = tl.zeros_like(d)
        by_ee = tl.zeros_like(d)
        for k in tl.static_range(UNROLLED):
            by_one, by_e, by_ee = add_powers(by_one, by_e, by_ee, z, rstd, top, domain, gaussians[k], CLAMP)
        for k in range(0 if UNROLLED > 0 else num_gaussians):
            gaussian = load_narrow_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
            by_one, by_e, by_ee = add_powers(by_one, by_e, by_ee, z, rstd, top, domain, gaussian, CLAMP)
        q = relative_gradient(g, from_x0, x0, g0, tl.zeros_like(g0))
        s0 += by_one
        s1 += by_e
        s2 += by_ee
        q0 += by_one * q
        q1 += by_e * q
        q2 += by_ee * q
    rows = tl.zeros([BLOCK_S], ACC) + tl.minimum(tl.maximum(n - first, 0), tiles * BLOCK_R)
    if EXCLUDE:
        rows = tl.sum(count, axis=0)
    s0, q0 = tl.sum(s0, axis=0), tl.sum(q0, axis=0)
    # From u to e and the widths: u narrowness (2 ln 2) is e / c^2, and u^2 (2 ln 2) is e^2 / c^2.
    s1, q1 = tl.sum(s1, axis=0) * (2.0 * LN_2), tl.sum(q1, axis=0) * (2.0 * LN_2)
    s2, q2 = tl.sum(s2, axis=0) * (2.0 * LN_2), tl.sum(q2, axis=0) * (2.0 * LN_2)
    return rows, g0, s0, s1, s2, q0, q1, q2


@triton.jit
def finish_mixture_sums(
    count, top, g0, x0, s0, s1, s2, q0, q1, q2, CLAMP: tl.constexpr, EXCLUDE: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """Of whole slices: (factor from density to weight, clamped, weighted mean of q, and the sums of the slopes and of
    the slopes times e), from their sums of m and of m q, times e^0 to e^2 over the widths."""
    scale, clamped = normaliser(mixture_least(top, EPS), s0, CLAMP)
    q_mean = q0 / s0
    away = q_mean
    if CLAMP:
        away = tl.where(clamped, -g0 * x0, away)  # q itself, and not q from its mean
    first = (q1 - away * s1) * scale
    second = (q2 - away * s2) * scale
    if EXCLUDE:
        first = tl.where(count < 2.0, 0.0, first)
        second = tl.where(count < 2.0, 0.0, second)
    return scale, clamped, q_mean, first, second


@triton.jit
def add_neighbours(t, COLUMNS: tl.constexpr, LOADED: tl.constexpr):
    """A tile's sums over LOADED neighbours, which a thread loads at once: its own, so nothing is exchanged."""
    if COLUMNS:
        together: tl.constexpr = min(LOADED, t.shape[1])
        sums = tl.sum(tl.reshape(t, [t.shape[0], t.shape[1] // together, together]), axis=2)
    else:
        together: tl.constexpr = min(LOADED, t.shape[0])
        sums = tl.sum(tl.reshape(t, [t.shape[0] // together, together, t.shape[1]]), axis=1)
    return sums


@triton.jit
def no_sums(
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, LOADED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What ``add_neighbours`` gives for tiles of zeros, COUNT of them."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (add_neighbours(tl.zeros([BLOCK_R, BLOCK_S], ACC), COLUMNS, LOADED),)
    return sums


@triton.jit
def slopes_of(part, u, h, rstd, narrowness):
    """(m h, m h u over the deviation, m h u^2, m h e / c^2) of one Gaussian."""
    by_one = part * h
    by_u = by_one * u
    return by_one, by_u * rstd[None, :], by_u * u, by_u * (narrowness * (2.0 * LN_2))


@triton.jit
def save_slopes(
    partials_ptr, c_ptr, head, k, num_gaussians, num_partials, partial, by_one, by_u, by_uu, ACC: tl.constexpr
):  # fmt: skip
    """What the gradients of Gaussian k need of a tile or of a program's slices, at [head, k, 3, partial]."""
    number = head.to(tl.int64) * num_gaussians + k
    narrowness = narrowness_of(tl.load(c_ptr + number).to(ACC))
    at = partials_ptr + number * 3 * num_partials + partial
    tl.store(at, tl.sum(tl.sum(by_one, axis=1), axis=0))
    tl.store(at + num_partials, tl.sum(tl.sum(by_u, axis=1), axis=0) * (narrowness * (2.0 * LN_2)))
    tl.store(at + 2 * num_partials, tl.sum(tl.sum(by_uu, axis=1), axis=0) * (2.0 * LN_2))


@triton.jit
def seen_from_nowhere(count, g0, q_mean, scale, clamped, CLAMP: tl.constexpr, EXCLUDE: tl.constexpr):
    """(g0, mean of q, factor) for h: where the clamp is active it is g x, which q is if seen from nowhere."""
    if EXCLUDE:
        scale = tl.where(count < 2.0, 0.0, scale)
    return unless_clamped(g0, clamped, CLAMP), unless_clamped(q_mean, clamped, CLAMP), scale


@triton.jit
def load_gradient(
    x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
    r, n, inside, x0, mean, rstd, g0, q_mean, scale,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of rows r: (g, which elements are in their slice, valid, domain, (x - mean) rstd, h)."""
    x, within, valid, domain = load_slices(
        x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
        PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
    )  # fmt: skip
    g = load_tile(g_ptr, g_base, r, g_stride_r, within, COLUMNS, VEC, ACC)
    g_valid = g
    if PADDED:
        g_valid = tl.where(valid, g, 0.0)
    from_x0, d = deviations(x, x0, mean, valid, EXCLUDE)
    h = relative_gradient(g_valid, from_x0, x0, g0, q_mean) * scale[None, :]
    return g, within, valid, domain, d * rstd[None, :], tl.where(domain, h, 0.0)


@triton.jit
def sweep_slopes(
    x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
    tiles, n, inside, x0, mean, rstd, top, g0, q_mean, scale, mean_slope,
    gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sum of each slice's slopes less ``mean_slope``, which rounding left of it.

    Only where the clamp is active have slopes a sum, of which dx may be a millionth: that of constant slices.
    """
    sums = tl.zeros([BLOCK_R, BLOCK_S], ACC)
    for tile in range(tiles):
        _g, _within, _valid, domain, z, h = load_gradient(
            x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
            tile * BLOCK_R + tl.arange(0, BLOCK_R), n, inside, x0, mean, rstd, g0, q_mean, scale,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        by_e = tl.zeros_like(z)
        for k in tl.static_range(UNROLLED):
            part, u = part_of(z, rstd, top, domain, gaussians[k], True)
            _by_one, _by_u, _by_uu, slope = slopes_of(part, u, h, rstd, gaussians[k][1])
            by_e += slope
        for k in range(0 if UNROLLED > 0 else num_gaussians):
            gaussian = load_narrow_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
            part, u = part_of(z, rstd, top, domain, gaussian, True)
            _by_one, _by_u, _by_uu, slope = slopes_of(part, u, h, rstd, gaussian[1])
            by_e += slope
        sums += tl.where(domain, by_e - mean_slope[None, :], 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def sweep_mixture_gradient(
    x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, dx_ptr, dx_base, dx_stride_r,
    mask_ptr, mask_base, mask_stride_r, first, tiles, n, inside,
    count, g0, scale, q_mean, h_scale, mean_slope, through_var, x0, mean, rstd, top,
    gaussians, mean_offsets_ptr, c_ptr, log_shares_ptr, partials_ptr, head, partial, num_gaussians, num_partials,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr, CLAMP: tl.constexpr,
    RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    UNROLLED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes dx of ``tiles`` tiles from row ``first`` on, and three sums per Gaussian: of all tiles together at
    ``partial`` where the Gaussians are UNROLLED, else of each tile, from ``partial`` on."""
    loaded: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    sums = no_sums(3 * UNROLLED, COLUMNS, loaded, ACC, BLOCK_R, BLOCK_S)
    for tile in range(tiles):
        r = first + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        g, within, valid, domain, z, h = load_gradient(
            x_ptr, x_base, x_stride_r, g_ptr, g_base, g_stride_r, mask_ptr, mask_base, mask_stride_r,
            r, n, inside, x0, mean, rstd, g0, q_mean, h_scale,
            PADDING, HAS_MASK, PADDED, EXCLUDE, COLUMNS, VEC, WHOLE, ACC,
        )  # fmt: skip
        densities = tl.zeros_like(z)
        by_e = tl.zeros_like(z)
        if UNROLLED > 0:
            added = ()
            for k in tl.static_range(UNROLLED):
                gaussian = gaussians[k]
                part, u = part_of(z, rstd, top, domain, gaussian, CLAMP)
                densities += part
                by_one, by_u, by_uu, slope = slopes_of(part, u, h, rstd, gaussian[1])
                by_e += slope
                added = added + (
                    sums[3 * k] + add_neighbours(by_one, COLUMNS, loaded),
                    sums[3 * k + 1] + add_neighbours(by_u, COLUMNS, loaded),
                    sums[3 * k + 2] + add_neighbours(by_uu, COLUMNS, loaded),
                )
            sums = added
        else:
            for k in range(num_gaussians):
                gaussian = load_narrow_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
                part, u = part_of(z, rstd, top, domain, gaussian, CLAMP)
                densities += part
                by_one, by_u, by_uu, slope = slopes_of(part, u, h, rstd, gaussian[1])
                by_e += slope
                save_slopes(
                    partials_ptr, c_ptr, head, k, num_gaussians, num_partials, partial + tile,
                    add_neighbours(by_one, COLUMNS, loaded), add_neighbours(by_u, COLUMNS, loaded),
                    add_neighbours(by_uu, COLUMNS, loaded), ACC,
                )  # fmt: skip
        weights = finish_weights(densities, scale, valid, count, EXCLUDE)
        dx = input_gradient(
            g, weights, through_var[None, :] * z, by_e - mean_slope[None, :], mean_slope, rstd, valid, PADDED, RESIDUAL
        )
        at = tile_offsets(dx_base, r, dx_stride_r, COLUMNS, VEC)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=within)
    for k in tl.static_range(UNROLLED):
        save_slopes(
            partials_ptr, c_ptr, head, k, num_gaussians, num_partials, partial,
            sums[3 * k], sums[3 * k + 1], sums[3 * k + 2], ACC,
        )  # fmt: skip


@triton.jit
def clear_partials(partials_ptr, head, first, end, num_gaussians, num_partials):
    """The sums of tiles ``first`` to ``end``, which a shorter slice has not."""
    for k in range(num_gaussians):
        at = partials_ptr + (head.to(tl.int64) * num_gaussians + k) * 3 * num_partials
        for partial in range(first, end):
            tl.store(at + partial, 0.0)
            tl.store(at + num_partials + partial, 0.0)
            tl.store(at + 2 * num_partials + partial, 0.0)
