// The gradients of mean_offsets and c: one block for each head adds the partial sums of all blocks, in double and in a
// fixed order, and applies the chain rule to every Gaussian.
#pragma once

#include "block.cuh"

namespace daam {
namespace cuda {

__device__ inline void parameter_gradients(const Task& task) {
  const int64_t head = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  double sums[4] = {0, 0, 0, 0};
  const float* partials = task.partials + head * 4 * task.blocks;
  for (int64_t b = threadIdx.x; b < task.blocks; b += blockDim.x) {
    for (int f = 0; f < 4; f++) sums[f] += partials[f * task.blocks + b];
  }
  double* shared = reinterpret_cast<double*>(daam_shared);
  for (int f = 0; f < 4; f++) {
    for (int distance = 1; distance < 32; distance *= 2) {
      sums[f] += __shfl_xor_sync(kWholeWarp, sums[f], distance);
    }
    if (lane == 0) shared[f * warps + warp] = sums[f];
  }
  __syncthreads();
  for (int f = 0; f < 4; f++) {
    sums[f] = 0;
    for (int w = 0; w < warps; w++) sums[f] += shared[f * warps + w];
  }
  HeadSums total;
  total.t0 = sums[0];
  total.t0_v = sums[1];
  total.u1_v = sums[2];
  total.u2_v = sums[3];

  const double center = quadratic_by_warp(task, head).center;
  for (int64_t k = threadIdx.x; k < task.num_gaussians; k += blockDim.x) {
    const double offset = read_number(
        task.mean_offsets, head * task.offsets_strides[0] + k * task.offsets_strides[1], task.offsets_type);
    const double width =
        read_number(task.c, head * task.widths_strides[0] + k * task.widths_strides[1], task.widths_type);
    double d_offset, d_width;
    gaussian_gradients(total, center, offset, width, &d_offset, &d_width);
    write_number(task.d_mean_offsets, head * task.num_gaussians + k, task.offsets_type, d_offset);
    write_number(task.d_c, head * task.num_gaussians + k, task.widths_type, d_width);
  }
}

}  // namespace cuda
}  // namespace daam
