"""The arithmetic that the density kernels share, and that of the product of Gaussians, in functions of Triton.

A tile is [BLOCK_R, BLOCK_S]: elements of a slice along the first axis, slices of one head along the second; numbers
per slice are [BLOCK_S]. ACC is the arithmetic type. ``valid`` marks the elements that are not padding, ``domain``
those that have a weight: all of the slice, or under EXCLUDE the valid ones. PADDED is false where no element can be
padding.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VAR_ADDED = tl.constexpr(1e-8)  # to the variance of the per-feature Gaussian, beside eps
VAR_FLOOR = tl.constexpr(1e-6)  # the smallest variance of the gate
TWO_PI = tl.constexpr(6.283185307179586)
FAR = tl.constexpr(3e38)  # farther than any z^2, finite so that differences of it are numbers
NEARER = tl.constexpr(1e38)  # than FAR, which comparisons round to float32 and tensors of float64 do not
LEAST_NEAR = tl.constexpr(0.25)  # that densities of a slice which is near the center add up to
LEAST_EACH = tl.constexpr(2.0**-10)  # of them for each element
HIGHEST = tl.constexpr(126.0)  # power of two whose reciprocal is a normal number


@triton.jit
def load_gaussians(mean_offsets_ptr, c_ptr, head, num_gaussians, BLOCK_K: tl.constexpr):
    """The head's K offsets and widths in float64, [BLOCK_K], and which of them are real."""
    k = tl.arange(0, BLOCK_K)
    real = k < num_gaussians
    at = head.to(tl.int64) * num_gaussians + k
    offset = tl.load(mean_offsets_ptr + at, mask=real, other=0.0).to(tl.float64)
    width = tl.load(c_ptr + at, mask=real, other=1.0).to(tl.float64)
    return offset, width, real


@triton.jit
def product_quadratic(offset, width, real, EPS: tl.constexpr, ACC: tl.constexpr):
    """The K Gaussians as one quadratic: with z = (x - mean - center) * slope / sqrt(var) their product is
    2^-(z^2) * 2^-(spread / var) * 2^-level * eps. Returns (slope, center, spread, level), rounded from float64, the
    level as (level less its whole part where it is above 0, two to the power of that part): many wide Gaussians have
    one so high that its rounding would show in all weights.
    """
    inverse = tl.where(real, 1.0 / (width * width), 0.0)
    total = tl.sum(inverse, axis=0)
    center = tl.sum(offset * inverse, axis=0) / total
    from_center = offset - center
    spread = tl.sum(from_center * from_center * inverse, axis=0) * (0.5 * LOG2_E)
    log_scale = tl.sum(tl.where(real, tl.log(width * width * TWO_PI), 0.0), axis=0) * 0.5
    level = (log_scale + tl.log(tl.full([], EPS, tl.float64))) * LOG2_E
    whole = tl.floor(tl.minimum(tl.maximum(level.to(ACC), 0.0), HIGHEST))
    slope = (total * (0.5 * LOG2_E)).to(ACC)
    if ACC == tl.float32:
        slope = tl.sqrt_rn(slope)
    else:
        slope = tl.sqrt(slope)
    return slope, center.to(ACC), spread.to(ACC), ((level - whole).to(ACC), tl.exp2(whole))


@triton.jit
def inverse_of(count):
    """1 / count, rounded correctly: the mean takes over its error, and z^2 multiplies the mean's."""
    if count.dtype == tl.float32:
        inverse = tl.div_rn(tl.full(count.shape, 1.0, tl.float32), count)
    else:
        inverse = 1.0 / count
    return inverse


@triton.jit
def reciprocal_sqrt(v):
    """1 / sqrt(v), to a unit in the last place: the fast instruction and a Newton step, which has no slow path."""
    if v.dtype == tl.float32:
        v = tl.minimum(v, FAR, propagate_nan=tl.PropagateNan.ALL)  # NaN where an element is infinite, which must show
        root = tl.rsqrt(v)
        root = root * (1.5 - (0.5 * v * root) * root)
    else:
        root = 1.0 / tl.sqrt(v)
    return root


@triton.jit
def tile_statistics(
    shifted, x0, valid, domain, n, EPS: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    NORMALISED: tl.constexpr = True, PER_FEATURE: tl.constexpr = False,
):  # fmt: skip
    """(elements counted, mean - x0, the density's variance) of slices that the tile holds whole."""
    counted = counted_values(shifted, x0, valid, PADDED, EXCLUDE)
    count = count_elements(domain, x0, n, EXCLUDE)
    members = counted_members(count, NORMALISED)
    mean = tl.sum(tl.where(domain, counted, 0.0), axis=0) * inverse_of(members)
    deviation = tl.where(domain, counted - mean[None, :], 0.0)
    return count, mean, variance(tl.sum(deviation * deviation, axis=0), members, EPS, NORMALISED, PER_FEATURE)


@triton.jit
def counted_members(count, NORMALISED: tl.constexpr):
    """``count``, or the fewest elements that a slice must have for its variance."""
    return tl.maximum(count, 2.0 if NORMALISED else 1.0)


@triton.jit
def variance(squares, members, EPS: tl.constexpr, NORMALISED: tl.constexpr, PER_FEATURE: tl.constexpr):
    """A density's variance from the sum of the squared deviations: unbiased, or biased where it is not normalised."""
    if NORMALISED:
        var = squares / (members - 1.0) + EPS
    elif PER_FEATURE:
        var = squares / members + (EPS + VAR_ADDED)
    else:
        var = squares / members
        var = tl.maximum(var, variance_floor(var), propagate_nan=tl.PropagateNan.ALL)  # as in reciprocal_sqrt
    return var


@triton.jit
def variance_floor(var):
    """The smallest variance of the gate in the type of ``var``: a number alone would be rounded to float32."""
    return tl.zeros_like(var) + VAR_FLOOR


@triton.jit
def through_variance_of(second, rstd, var, members, NORMALISED: tl.constexpr, PER_FEATURE: tl.constexpr):
    """What (x - mean) / sqrt(var) is multiplied with in dx; ``second`` is the gradient of var, times 2 var."""
    if NORMALISED:
        through = second * rstd / (members - 1.0)
    else:
        through = second * rstd / members
        if not PER_FEATURE:
            through = tl.where(var > variance_floor(var), through, 0.0)
    return through


@triton.jit
def counted_values(shifted, x0, valid, PADDED: tl.constexpr, EXCLUDE: tl.constexpr):
    """What the statistics see, from x0: padding as zeros, unless it is excluded."""
    if PADDED and not EXCLUDE:
        shifted = tl.where(valid, shifted, -x0[None, :])
    return shifted


@triton.jit
def count_elements(domain, x0, n, EXCLUDE: tl.constexpr):
    """Elements that the statistics count, per slice, in x0's type."""
    count = tl.zeros_like(x0) + n
    if EXCLUDE:
        count = tl.sum(domain.to(x0.dtype), axis=0)
    return count


@triton.jit
def standardise(shifted, mean, rate, center):
    """z = (x - mean - center) * rate, rate = slope / sqrt(var); mean and shifted are from x0."""
    return (shifted - mean[None, :]) * rate[None, :] - (center * rate)[None, :]


@triton.jit
def find_peak(z, domain):
    """The z of each column that is nearest to 0, where the density is largest; 0 for columns without a domain.

    With its bits rotated, the sign last, |z| is compared before the sign is, as a whole number: two instructions an
    element and one reduction, where the smallest above 0 and the largest below it are six and two.
    """
    unsigned: tl.constexpr = tl.uint64 if z.dtype == tl.float64 else tl.uint32
    last: tl.constexpr = z.dtype.primitive_bitwidth - 1
    bits = tl.where(domain, z, FAR).to(unsigned, bitcast=True)
    nearest = tl.min((bits << 1) | (bits >> last), axis=0)
    peak = ((nearest >> 1) | (nearest << last)).to(z.dtype, bitcast=True)
    return tl.where(tl.abs(peak) < NEARER, peak, 0.0)  # 0 where it is NaN, too


@triton.jit
def nearer_of(e, x, nearest, x_nearest, domain):
    """Of two elements at each place of a tile, (e, x) of the one whose e is nearer to 0."""
    nearer = domain & (tl.abs(e) < tl.abs(nearest))
    return tl.where(nearer, e, nearest), tl.where(nearer, x, x_nearest)


@triton.jit
def distance_to(x, x0, valid, EXCLUDE: tl.constexpr):
    """x - x0 of a tile; 0 at padding that has no weight, whatever lies there."""
    distance = x - x0[None, :]
    if EXCLUDE:
        distance = tl.where(valid, distance, 0.0)
    return distance


@triton.jit
def density(gap, peak, domain):
    """The slice's densities over its largest one; gap = z - peak, so that what all z have in common cancels."""
    rise = gap * ((-2.0 * peak)[None, :] - gap)  # peak^2 - z^2
    rise = tl.minimum(rise, 0.0, propagate_nan=tl.PropagateNan.ALL)  # rounding may hide which element is nearest
    return tl.where(domain, tl.exp2(rise), 0.0)


@triton.jit
def centred_density(z, domain):
    """The densities over that at the center of the Gaussians, where z is 0: near it, two instructions fewer."""
    return tl.where(domain, tl.exp2((z * -1.0) * z), 0.0)  # not -z, which Triton takes from 0


@triton.jit
def far_from_center(total, count):
    """Slices whose densities over that at the center are too small to be exact; those with a NaN are not."""
    return total < tl.maximum(count * LEAST_EACH, LEAST_NEAR)


@triton.jit
def rescale(before, after):
    """What densities over the one at z = ``before`` are multiplied with to be over that at ``after``, nearer to 0."""
    rise = (after - before) * (before + after)
    return tl.exp2(tl.minimum(rise, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def product_least(peak, rstd, spread, level):
    """eps over the largest density."""
    return tl.exp2(peak * peak + spread * rstd * rstd + level[0]) * level[1]


@triton.jit
def normaliser(least, total, CLAMP: tl.constexpr):
    """(what a density is multiplied with to become a weight, whether the sum of the slice is below eps).

    Densities and their sum are over a peak, and ``least`` is eps over it.
    """
    clamped = total < 0.0
    if CLAMP:
        clamped = total < least
        total = tl.maximum(total, least)
    return 1.0 / total, clamped


@triton.jit
def finish_weights(densities, scale, valid, count, EXCLUDE: tl.constexpr):
    """Densities times scale; a slice with fewer than two valid elements keeps its x, so its weights are 1."""
    weights = densities * scale[None, :]
    if EXCLUDE:
        weights = tl.where((count < 2.0)[None, :], valid.to(weights.dtype), weights)
    return weights


@triton.jit
def product_weights(
    gap, peak, rstd, valid, domain, count, spread, level, CLAMP: tl.constexpr, EXCLUDE: tl.constexpr
):  # fmt: skip
    """(weights of slices that the tile holds whole, whether each slice's sum is below eps), for gap = z - peak."""
    densities = density(gap, peak, domain)
    least = product_least(peak, rstd, spread, level)
    scale, clamped = normaliser(least, tl.sum(densities, axis=0), CLAMP)
    return finish_weights(densities, scale, valid, count, EXCLUDE), clamped


@triton.jit
def weighted_output(x, weights, valid, PADDED: tl.constexpr, RESIDUAL: tl.constexpr):
    """x * weights where valid, x where padded, plus x with RESIDUAL."""
    y = x * weights
    if PADDED:
        y = tl.where(valid, y, x)
    if RESIDUAL:
        y = y + x
    return y


@triton.jit
def store_output(
    y_ptr, weights_ptr, at, x, weights, valid, within,
    MULTIPLY: tl.constexpr, PADDED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Writes y of a tile, without MULTIPLY the weights themselves, and these where asked for; ``at`` are offsets."""
    y = weights
    if MULTIPLY:
        y = weighted_output(x, weights, valid, PADDED, RESIDUAL)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=within)
    if weights_ptr is not None:
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=within)


@triton.jit
def save_statistics(stats_ptr, x0, mean, var, number, num_slices, inside):
    """Rows of [3, slices]: x0, mean - x0, variance."""
    save_mean(stats_ptr, x0, mean, number, num_slices, inside)
    save_variance(stats_ptr, var, number, num_slices, inside)


@triton.jit
def save_mean(stats_ptr, x0, mean, number, num_slices, inside):
    """The first two rows: apart, where the third is known later, and these would wait in registers."""
    tl.store(stats_ptr + number, x0, mask=inside)
    tl.store(stats_ptr + num_slices + number, mean, mask=inside)


@triton.jit
def save_variance(stats_ptr, var, number, num_slices, inside):
    """The third row."""
    tl.store(stats_ptr + 2 * num_slices + number, var, mask=inside)


@triton.jit
def load_statistics(stats_ptr, number, num_slices, inside):
    """What ``save_statistics`` stored; slices that are not inside get a variance of 1."""
    at = stats_ptr + number
    x0 = tl.load(at, mask=inside, other=0.0)
    mean = tl.load(at + num_slices, mask=inside, other=0.0)
    return x0, mean, tl.load(at + 2 * num_slices, mask=inside, other=1.0)


@triton.jit
def from_statistics(x, x0, mean, var, slope, center):
    """(1 / sqrt(variance), peak, z - peak) where x0 is x at the peak, and mean is from it."""
    rstd = reciprocal_sqrt(var)
    rate = rstd * slope
    return rstd, -(mean + center) * rate, (x - x0[None, :]) * rate[None, :]


@triton.jit
def value_at_peak(x, z, peak, domain, x0):
    """x where z is at its peak, exactly: a later gap from it is 0 there. x0 for columns without a domain."""
    found = tl.max(tl.where(domain & (z == peak[None, :]), x, -FAR), axis=0)
    return tl.where(found > -NEARER, found, x0)


@triton.jit
def partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_S] of one field of the partial results [fields, chunks, slices], and which exist."""
    c = tl.arange(0, BLOCK_C)
    return c[:, None] * num_slices + number[None, :], (c < num_chunks)[:, None] & inside[None, :]


@triton.jit
def pick_first(values, present, BLOCK_C: tl.constexpr):
    """Of values [BLOCK_C, BLOCK_S], the first present one of each column; 0 where there is none."""
    c = tl.arange(0, BLOCK_C)[:, None]
    first = tl.min(tl.where(present, c, BLOCK_C), axis=0)
    return tl.sum(tl.where(c == first[None, :], values, 0.0), axis=0)


@triton.jit
def merge_counts(partials_ptr, number, num_slices, num_chunks, inside, BLOCK_C: tl.constexpr):
    """Elements that the statistics counted, per slice: field 0 of the partial statistics."""
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    return tl.sum(tl.load(partials_ptr + at, mask=there, other=0.0), axis=0)


@triton.jit
def merge_statistics(
    partials_ptr, number, num_slices, num_chunks, inside,
    EPS: tl.constexpr, NORMALISED: tl.constexpr, PER_FEATURE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(x0, mean - x0, density's variance) of whole slices from the (count, x0, mean - x0, squares) of their runs."""
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    field = num_slices * num_chunks
    counts = tl.load(partials_ptr + at, mask=there, other=0.0)
    x0s = tl.load(partials_ptr + field + at, mask=there, other=0.0)
    means = tl.load(partials_ptr + 2 * field + at, mask=there, other=0.0)
    squares = tl.load(partials_ptr + 3 * field + at, mask=there, other=0.0)
    present = counts > 0.0
    x0 = pick_first(x0s, present, BLOCK_C)
    members = counted_members(tl.sum(counts, axis=0), NORMALISED)
    offsets = tl.where(present, (x0s - x0[None, :]) + means, 0.0)
    mean = tl.sum(counts * offsets, axis=0) * inverse_of(members)
    deviation = offsets - mean[None, :]
    total = tl.sum(squares + counts * deviation * deviation, axis=0)
    return x0, mean, variance(total, members, EPS, NORMALISED, PER_FEATURE)


@triton.jit
def merge_normaliser(partials_ptr, number, num_slices, num_chunks, inside, BLOCK_C: tl.constexpr):
    """(peak, x there, sum of densities over the one there) of whole slices from those of their runs."""
    at, there = partial_offsets(number, num_slices, num_chunks, inside, BLOCK_C)
    field = num_slices * num_chunks
    peaks = tl.load(partials_ptr + at, mask=there, other=0.0)
    x_peaks = tl.load(partials_ptr + field + at, mask=there, other=0.0)
    totals = tl.load(partials_ptr + 2 * field + at, mask=there, other=0.0)
    present = totals != 0.0
    peak = find_peak(peaks, present)
    x_peak = pick_first(x_peaks, present & (peaks == peak[None, :]), BLOCK_C)
    return peak, x_peak, tl.sum(tl.where(present, totals * rescale(peaks, peak[None, :]), 0.0), axis=0)


@triton.jit
def relative_gradient(g_valid, from_x0, x0, g0, q_mean):
    """q - q_mean of a tile, q = x0 (g - g0) + g (x - x0); that is g x where ``g0`` and ``q_mean`` are 0."""
    return (g_valid - g0[None, :]) * x0[None, :] + (g_valid * from_x0 - q_mean[None, :])


@triton.jit
def unless_clamped(value, clamped, CLAMP: tl.constexpr):
    """What gradients of weights are relative to; 0 where the slice's sum is below eps, which no weight then changes."""
    if CLAMP:
        value = tl.where(clamped, 0.0, value)
    return value


@triton.jit
def slice_gradient(q, weights, domain, count, PADDED: tl.constexpr, EXCLUDE: tl.constexpr):
    """p of a tile; q is relative to its weighted mean."""
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
def through_variance(t0, u2, rstd, count, slope, spread):
    """What dx gets through the variance, over (x - mean) * slope / sqrt(var)."""
    return (u2 + spread * rstd * rstd * t0) * (2.0 * LN_2) * rstd / (slope * (tl.maximum(count, 2.0) - 1.0))


@triton.jit
def input_gradient(
    g, weights, through_var, through_z, through_z_mean, slope, valid, PADDED: tl.constexpr, RESIDUAL: tl.constexpr
):
    """dx of a tile: through x itself, through the slice's variance, through z and through the slice's mean.

    The last two are -p z and its mean, times ``slope``. They nearly cancel where most of a slice is one value, so
    ``through_z`` comes without its mean where valid.
    """
    dx = g * weights + through_var
    if PADDED:
        dx = tl.where(valid, dx, g)
        through_z = tl.where(valid, through_z, through_z + through_z_mean[None, :])
    dx -= through_z * slope[None, :]
    if RESIDUAL:
        dx += g
    return dx
