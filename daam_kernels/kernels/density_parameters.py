"""Gradients of the parameters of a product of Gaussians from partial sums, in functions of Triton."""

import triton
import triton.language as tl

from .density_math import LOG2_E, load_gaussians
from .host import SIZES
from .tiles import store_rounded


@triton.jit
def save_partials(partials_ptr, head, block, num_partials, t0, u1, u2, rstd, inside):
    """The four sums that the parameter gradients need, over the slices of a block, at [head, 4, block]."""
    at = partials_ptr + head.to(tl.int64) * 4 * num_partials + block
    tl.store(at, tl.sum(tl.where(inside, t0, 0.0), axis=0))
    tl.store(at + num_partials, tl.sum(tl.where(inside, t0 * rstd * rstd, 0.0), axis=0))
    tl.store(at + 2 * num_partials, tl.sum(tl.where(inside, u1 * rstd, 0.0), axis=0))
    tl.store(at + 3 * num_partials, tl.sum(tl.where(inside, u2, 0.0), axis=0))


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
    total = tl.sum(inverse, axis=0)
    center = tl.sum(offset * inverse, axis=0) / total
    slope_squared = total * (0.5 * LOG2_E)  # u1 and u2 are of z, which has the slope in it
    sum_t0 = tl.sum(t0, axis=0)
    sum_t0_var = tl.sum(t0_var, axis=0)
    sum_u1 = tl.sum(u1_std, axis=0) / tl.sqrt(slope_squared)
    d_a = -0.5 * (tl.sum(u2, axis=0) / slope_squared + 2.0 * center * sum_u1 + center * center * sum_t0_var)
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
