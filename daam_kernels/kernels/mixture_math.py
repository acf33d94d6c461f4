"""The densities that are sums of Gaussians, mixture, gate and per-feature, and their slopes, in functions of Triton.

Shapes and names are those of ``density_math``.
"""

import triton
import triton.language as tl

from .density_math import FAR, LN_2, LOG2_E, inverse_of, partial_offsets, reciprocal_sqrt

ROOT_HALF_LOG2_E = tl.constexpr(0.8493218002880191)
ROUNDING = tl.constexpr(1.5 * 2.0**23)  # a sum with it is rounded to a whole number, which its last bits are
FADED = tl.constexpr(2.0**-32)  # sums of densities below it, or above its inverse, lie far from their peak
LOWEST = tl.constexpr(-(2.0**20))  # log2 of a peak whose weights the clamp takes to 0 in any type


@triton.jit
def load_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC: tl.constexpr):
    """(offset, width, log2 of the share) of Gaussian k of the head's mixture."""
    at = head.to(tl.int64) * num_gaussians + k
    offset = tl.load(mean_offsets_ptr + at).to(ACC)
    width = tl.load(c_ptr + at).to(ACC)
    share = tl.load(log_shares_ptr + at).to(ACC) * LOG2_E
    return offset, width, share


@triton.jit
def distance_from(d, rstd, offset, narrowness):
    """u, whose square is what log2 of a Gaussian falls by; d is x - mean."""
    slope = rstd * narrowness
    return d * slope[None, :] - (offset * slope)[None, :]


@triton.jit
def narrowness_of(width):
    """What ``distance_from`` takes in the place of a width, of either sign."""
    return reciprocal_sqrt(width * width) * ROOT_HALF_LOG2_E


@triton.jit
def fall_by(u, share, top, EXACT: tl.constexpr):
    """log2 of a Gaussian's density times its share, less ``top``.

    A fused multiplication has digits of u^2 that a top found by one has not. Beyond 2^31 they are more than a float32's
    exponent, and a slice whose densities all are over such a top needs an EXACT difference, of the same rounded u^2.
    """
    log_share = tl.broadcast_to((share - top)[None, :], u.shape)
    if EXACT:
        fall = log_share - tl.fma(u, u, tl.zeros_like(u))
    else:
        fall = tl.fma(u * -1.0, u, log_share)  # not -u, which Triton takes from 0, an instruction by itself
    return fall


@triton.jit
def mixture_term(
    d, rstd, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians,
    EXACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """log2 of the density of Gaussian k times its share, less ``top``; d is x - mean.

    Two fused multiplications an element: all that the elements of a slice have in common is in three numbers.
    """
    offset, width, share = load_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
    return fall_by(distance_from(d, rstd, offset, narrowness_of(width)), share, top, EXACT)


@triton.jit
def exp2_polynomial(term, DEGREE: tl.constexpr):
    """2^term of a float32 from -126 to 127 by multiplications, of which a GPU does eight in the time of one tl.exp2.

    Exact to 1e-7 and rounding with DEGREE 5, to 1e-4 with 3; below -126 it stays where it is there.
    """
    term = tl.maximum(term, -126.0)
    shifted = term + ROUNDING
    f = term - (shifted - ROUNDING)
    if DEGREE == 5:
        power = 1.326472731e-3 * f + 9.671512991e-3
        power = power * f + 5.550733581e-2
        power = power * f + 2.402224243e-1
        power = power * f + 6.931470037e-1
        power = power * f + 1.0
    else:
        power = 5.517166201e-2 * f + 2.426111568e-1
        power = power * f + 6.932609861e-1
        power = power * f + 9.999280728e-1
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exp2_mixed(term):
    """2^term of one slice, three of eight rows by a polynomial of degree 3.

    The rows that a thread loads at once are its own, so that they come apart and together without moving.
    """
    half, other = tl.split(tl.reshape(term, [term.shape[0] // 8, 2, 2, 2]))
    quarter, rest = tl.split(half)
    eighth, last = tl.split(rest)
    rest = tl.join(exp2_polynomial(eighth, 3), tl.exp2(last))
    half = tl.join(exp2_polynomial(quarter, 3), rest)
    return tl.reshape(tl.join(half, tl.exp2(other)), term.shape)


@triton.constexpr_function
def spares_registers():
    """Whether the target's compiler needs fewer registers than that of capability 10, for the same without spills."""
    target = tl.target_info.current_target()
    return target is None or target.backend != "cuda" or target.arch < 100


@triton.jit
def mixture_density(
    d, rstd, domain, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
    UNROLLED: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The densities over 2^``top``: K exponentials an element. UNROLLED is K where it is known, or 0.

    One Gaussian of eight takes no exponentials, and one of four fewer where results are rounded to HALF a float32, so
    that a GPU computes no longer than it reads and writes.
    """
    if UNROLLED > 0:
        densities = tl.exp2(
            mixture_term(d, rstd, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, 0, num_gaussians, EXACT, ACC)
        )
        for k in tl.static_range(1, UNROLLED):
            term = mixture_term(
                d, rstd, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, EXACT, ACC
            )
            if k == 3 and HALF and d.shape[0] % 8 == 0 and spares_registers():
                densities += exp2_mixed(term)
            elif k == 7 and ACC == tl.float32:
                densities += exp2_polynomial(term, 5)
            else:
                densities += tl.exp2(term)
    else:
        densities = tl.zeros_like(d)
        for k in range(num_gaussians):
            densities += tl.exp2(
                mixture_term(d, rstd, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, EXACT, ACC)
            )
    return tl.where(domain, densities, 0.0)


@triton.jit
def mixture_peak(
    d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
    CLAMP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The largest term of each slice's mixture, as log2; -FAR where there is none. With CLAMP it is LOWEST at least."""
    nothing = tl.zeros_like(rstd)
    top = nothing + (LOWEST if CLAMP else -FAR)
    for k in range(num_gaussians):
        term = mixture_term(
            d, rstd, nothing, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, not CLAMP, ACC
        )
        top = tl.maximum(top, tl.max(tl.where(domain, term, -FAR), axis=0))
    return top


@triton.jit
def far_from_all(total, asked):
    """Which of the slices asked for have densities, of this sum, that must be over their peak."""
    near = (total >= FADED) & (total <= 1.0 / FADED)  # which a NaN is not
    return asked & (near == 0)


@triton.jit
def mixture_over_peak(
    d, rstd, domain, asked, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians,
    UNROLLED: tl.constexpr, HALF: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(densities over a peak of their slice, their sum, log2 of the peak).

    The peak is 1, which costs nothing to find. Only where the sum says that this will not do is it the slice's largest
    term: where all of the slice lies far from all Gaussians, or the shares are far from 1 as they are. ``asked`` marks
    the slices that count.
    """
    top = tl.zeros_like(rstd)
    densities = mixture_density(
        d, rstd, domain, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, UNROLLED, HALF, False, ACC
    )
    total = tl.sum(densities, axis=0)
    far = far_from_all(total, asked)
    if tl.max(far.to(tl.int32), axis=0) > 0:
        peak = mixture_peak(d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, CLAMP, ACC)
        top = tl.where(far, peak, top)
        densities = mixture_density(
            d, rstd, domain, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, num_gaussians, 0, HALF, not CLAMP, ACC
        )
        total = tl.sum(densities, axis=0)
    return densities, total, top


@triton.jit
def mark_far(var, top):
    """The variance to save for the backward pass, negative where it must find a peak itself, because 1 is not it."""
    return tl.where(top == 0.0, var, -var)


@triton.jit
def mixture_least(top, EPS: tl.constexpr):
    """eps over the peak, 2^top."""
    return tl.exp2(-top) * tl.full([], EPS, top.dtype)


@triton.jit
def gaussian_part(
    d, rstd, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, feature, inside, num_gaussians,
    EPS: tl.constexpr, CLAMP: tl.constexpr, NORMALISED: tl.constexpr, PER_FEATURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of Gaussian k: (its part of the densities, e, e / c^2, how much of its width grows with sqrt(var)).

    d is x - mean. The mixture's parts are over 2^top; others are as they are, and have no top. ``feature`` is what
    ``parameter_number`` gave. The gate's Gaussians have eps added to their width; the per-feature one has c in the
    place of c^2.
    """
    grows = 1.0
    if NORMALISED:
        offset, width, share = load_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
        narrowness = narrowness_of(width)
        u = distance_from(d, rstd, offset, narrowness)
        part = tl.exp2(fall_by(u, share, top, not CLAMP))
        e = u * (tl.abs(width) * (1.0 / ROOT_HALF_LOG2_E))
        over_width = u * (narrowness * (2.0 * LN_2))
    else:
        if PER_FEATURE:
            offset = tl.load(mean_offsets_ptr + feature, mask=inside, other=0.0).to(ACC)
            inverse = inverse_of(tl.load(c_ptr + feature, mask=inside, other=1.0).to(ACC))[None, :]
            share = tl.zeros_like(rstd)
        else:
            offset, width, share = load_gaussian(mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, num_gaussians, ACC)
            share += tl.zeros_like(rstd)
            whole = width + EPS * rstd
            inverse = inverse_of(whole * whole)[None, :]
            grows = width / whole
        e = d * rstd[None, :] - (offset * rstd)[None, :]
        # Not e^2: where it overflows, it may be 0 times infinity.
        part = tl.exp2(share[None, :] - e * (e * (inverse * (0.5 * LOG2_E))))
        over_width = e * inverse
    return part, e, over_width, grows


@triton.jit
def gate_density(
    d, rstd, domain, mean_offsets_ptr, c_ptr, log_shares_ptr, head, feature, inside, num_gaussians,
    EPS: tl.constexpr, PER_FEATURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The densities that are not normalised: K exponentials an element."""
    densities = tl.zeros_like(d)
    for k in range(num_gaussians):
        part, _e, _over_width, _grows = gaussian_part(
            d, rstd, rstd, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, feature, inside, num_gaussians,
            EPS, False, False, PER_FEATURE, ACC,
        )  # fmt: skip
        densities += part
    return tl.where(domain, densities, 0.0)


@triton.jit
def merge_mixture(partials_ptr, number, num_slices, num_chunks, inside, BLOCK_C: tl.constexpr):
    """(log2 of the peak, sum of densities over it) of whole slices from those of their runs."""
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    tops = tl.load(partials_ptr + at, mask=there, other=-FAR)
    totals = tl.load(partials_ptr + num_slices * num_chunks + at, mask=there, other=0.0)
    top = tl.max(tops, axis=0)
    top = tl.where(top > -FAR, top, 0.0)  # of slices that are padding alone
    return top, tl.sum(tl.where(totals != 0.0, totals * tl.exp2(tops - top[None, :]), 0.0), axis=0)


@triton.jit
def centred_gradient(
    q, q_mean, g_valid, x, scale, domain, count, clamped, CLAMP: tl.constexpr, EXCLUDE: tl.constexpr
):  # fmt: skip
    """h of a tile; ``q_mean`` is the weighted mean of q."""
    h = q - q_mean[None, :]
    if CLAMP:
        h = tl.where(clamped[None, :], g_valid * x, h)
    h = tl.where(domain, h * scale[None, :], 0.0)
    if EXCLUDE:
        h = tl.where((count < 2.0)[None, :], 0.0, h)
    return h


@triton.jit
def gate_gradient(g, g_valid, x, domain, MULTIPLY: tl.constexpr):
    """The gradient of the weights of a density that is not normalised: g x of what is valid, or g if y is they."""
    h = g_valid * x if MULTIPLY else g
    return tl.where(domain, h, 0.0)


@triton.jit
def slopes(
    d, rstd, h, domain, top, mean_offsets_ptr, c_ptr, log_shares_ptr, partials_ptr,
    head, feature, inside, partial, num_gaussians, num_partials,
    EPS: tl.constexpr, CLAMP: tl.constexpr, NORMALISED: tl.constexpr, PER_FEATURE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(sum_k m_jk h_j e_jk / c_k^2 of a tile, its sum over the tile, that of the same times e_jk).

    Saves the sums over the tile that the gradients of the Gaussians need, at [head, k, 3, partial]; of the per-feature
    one those of each slice, at [head, 2, partial of the slice]. Where there are no partials it saves nothing.
    """
    slope = tl.zeros_like(d)
    first = tl.zeros_like(rstd)
    second = tl.zeros_like(rstd)
    for k in range(num_gaussians):
        part, e, over_width, grows = gaussian_part(
            d, rstd, top, mean_offsets_ptr, c_ptr, log_shares_ptr, head, k, feature, inside, num_gaussians,
            EPS, CLAMP, NORMALISED, PER_FEATURE, ACC,
        )  # fmt: skip
        share = tl.where(domain, part, 0.0) * h
        by_e = share * over_width
        slope += by_e
        sum_e = tl.sum(by_e, axis=0)
        sum_ee = tl.sum(by_e * e, axis=0)
        if not NORMALISED:
            sum_ee *= grows
        first += sum_e
        second += sum_ee
        if partials_ptr is not None:
            if PER_FEATURE:
                at = partials_ptr + head.to(tl.int64) * 2 * num_partials + partial
                tl.store(at, sum_e * rstd, mask=inside)
                tl.store(at + num_partials, sum_ee, mask=inside)
            else:
                at = partials_ptr + (head.to(tl.int64) * num_gaussians + k) * 3 * num_partials + partial
                tl.store(at, tl.sum(tl.where(inside, tl.sum(share, axis=0), 0.0), axis=0))
                tl.store(at + num_partials, tl.sum(tl.where(inside, sum_e * rstd, 0.0), axis=0))
                tl.store(at + 2 * num_partials, tl.sum(tl.where(inside, sum_ee, 0.0), axis=0))
    return slope, first, second


@triton.jit
def partial_number(
    block, o, i, inner, tile, tiles, num_chunks, PER_FEATURE: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr
):
    """Where a tile's partial sums go: by its block, run and tile; or [outer, run, tile, inner] of each slice."""
    block = o if PER_FEATURE else block
    number = (block * tl.maximum(num_chunks, 1) + tl.program_id(1)) * tiles + tile
    if PER_FEATURE:
        number = number * inner * (VEC if COLUMNS else 1) + i
    return number
