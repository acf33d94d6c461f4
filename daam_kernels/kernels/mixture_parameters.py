"""Gradients of the parameters of mixture, gate and per-feature Gaussian from partial sums, in functions of Triton."""

import triton
import triton.language as tl

from .host import SIZES
from .tiles import store_rounded


@triton.jit
def add_partials(at, num_partials, BLOCK_P: tl.constexpr):
    """The sum of a row of partial sums, in float64 and a fixed order."""
    lane = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P], tl.float64)
    for first in range(0, num_partials, BLOCK_P):
        total += tl.load(at + first + lane, mask=first + lane < num_partials, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=SIZES)
def mixture_parameter_gradients(
    partials_ptr, c_ptr, d_mean_offsets_ptr, d_c_ptr, d_log_shares_ptr, num_gaussians, num_partials,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums [heads, gaussians, 3, partials] of one Gaussian of one head."""
    number = tl.program_id(0).to(tl.int64) * num_gaussians + tl.program_id(1)
    at = partials_ptr + number * 3 * num_partials
    width = tl.load(c_ptr + number).to(tl.float64)
    store_rounded(d_log_shares_ptr + number, add_partials(at, num_partials, BLOCK_P), None)
    store_rounded(d_mean_offsets_ptr + number, add_partials(at + num_partials, num_partials, BLOCK_P), None)
    store_rounded(d_c_ptr + number, add_partials(at + 2 * num_partials, num_partials, BLOCK_P) / width, None)


@triton.jit
def add_rows(at, rows, features, inside, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """The sums over rows of partial sums [rows, features], in float64 and a fixed order; ``at`` is the first row."""
    lane = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float64)
    for first in range(0, rows, BLOCK_N):
        row = first + lane
        there = (row < rows)[:, None] & inside[None, :]
        pointers = at[None, :] + row.to(tl.int64)[:, None] * features
        total += tl.load(pointers, mask=there, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=SIZES)
def feature_parameter_gradients(
    partials_ptr, c_ptr, d_mean_offsets_ptr, d_c_ptr, inner, num_partials,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums [heads, 2, rows, features] of some features of one head."""
    features = inner * (VEC if COLUMNS else 1)
    head = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = feature < features
    at = partials_ptr + head * 2 * num_partials + feature
    number = head * features + feature
    width = tl.load(c_ptr + number, mask=inside, other=1.0).to(tl.float64)
    rows = num_partials // features
    d_offset = add_rows(at, rows, features, inside, BLOCK_N, BLOCK_F)
    d_width = 0.5 * add_rows(at + num_partials, rows, features, inside, BLOCK_N, BLOCK_F) / width
    store_rounded(d_mean_offsets_ptr + number, d_offset, inside)
    store_rounded(d_c_ptr + number, d_width, inside)
