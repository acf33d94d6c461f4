// A block's threads: where each of them stands, and what they find out together.
//
// Every reduction has a fixed order, and every thread that takes part gets the same bits.
#pragma once

#include "../density_math.h"
#include "elements.cuh"

extern __shared__ uint4 daam_shared[];

namespace daam {
namespace cuda {

// What shared memory has behind the head's quadratic.
__device__ inline char* after_head() { return reinterpret_cast<char*>(daam_shared) + kHeadBytes; }

constexpr unsigned kWholeWarp = 0xffffffffu;

struct Sum {
  static constexpr float kNothing = 0;
  __device__ static float of(float a, float b) { return a + b; }
};

struct Least {
  static constexpr float kNothing = 3e38f;  // finite, so that differences of it are numbers
  __device__ static float of(float a, float b) { return fminf(a, b); }
};

class Block {
 public:
  int along, across;  // this thread's place in the grid
  int num_along;

  __device__ explicit Block(const Task& task) {
    const ThreadGrid& grid = task.grid;
    thread_ = threadIdx.x;
    num_along = 1 << grid.along_log;
    along = (thread_ >> grid.along_shift) & (num_along - 1);
    across = (thread_ >> grid.across_shift) & ((1 << grid.across_log) - 1);
    step_ = 1 << grid.along_shift;
    scratch_ = reinterpret_cast<float*>(after_head());
    half_scratch_ = task.scratch_bytes / 8;
  }

  // Over the threads that share slices: values[s] of each of S slices.
  template <class Operation, int S>
  __device__ void reduce(float (&values)[S]) {
    reduce<Operation>(values, step_, step_ * num_along);
  }

  // Over all threads.
  template <class Operation>
  __device__ float reduce_all(float value) {
    float values[1] = {value};
    reduce<Operation>(values, 1, blockDim.x);
    return values[0];
  }

 private:
  // Over threads whose numbers differ in the bits of [low, high), both powers of two.
  template <class Operation, int S>
  __device__ void reduce(float (&values)[S], int low, int high) {
#pragma unroll 1
    for (int distance = low; distance < high && distance < 32; distance *= 2) {
#pragma unroll
      for (int s = 0; s < S; s++) {
        values[s] = Operation::of(values[s], __shfl_xor_sync(kWholeWarp, values[s], distance));
      }
    }
    if (high <= 32 || high == low) return;

    // Warps leave what they have in one of two buffers in turn: whoever still reads one is not disturbed by a thread
    // that is one reduction ahead, and nobody is two ahead.
    const int warp = thread_ / 32, warps = blockDim.x / 32, lane = thread_ % 32;
    const int lanes = low < 32 ? low : 32, first_bit = low < 32 ? 1 : low / 32, end = high / 32;
    float* buffer = scratch_ + (odd_ ? half_scratch_ : 0);
    odd_ = !odd_;
    if (lane < lanes) {
#pragma unroll
      for (int s = 0; s < S; s++) buffer[(s * warps + warp) * lanes + lane] = values[s];
    }
    __syncthreads();
    const int first = warp & ~(end - first_bit);
#pragma unroll
    for (int s = 0; s < S; s++) {
      const float* from = buffer + s * warps * lanes + lane % lanes;
      float value = from[first * lanes];
#pragma unroll 1
      for (int w = first + first_bit; w < first + end; w += first_bit) value = Operation::of(value, from[w * lanes]);
      values[s] = value;
    }
  }

  int thread_, step_;
  float* scratch_;
  int half_scratch_;  // in floats
  bool odd_ = false;
};

// The same as quadratic() of density_math.h, by the 32 threads of a warp at once, all of which get it.
__device__ __noinline__ Quadratic quadratic_by_warp(const Task& task, int64_t head) {
  const int lane = threadIdx.x % 32;
  double a = 0, moment = 0, log_scale = 0;
#pragma unroll 1
  for (int64_t k = lane; k < task.num_gaussians; k += 32) {
    const double offset = read_number(
        task.mean_offsets, head * task.offsets_strides[0] + k * task.offsets_strides[1], task.offsets_type);
    const double width =
        read_number(task.c, head * task.widths_strides[0] + k * task.widths_strides[1], task.widths_type);
    const double square = width * width;
    a += 1 / square;
    moment += offset / square;
    log_scale += log2(kTwoPi * square);
  }
#pragma unroll 1
  for (int distance = 1; distance < 32; distance *= 2) {
    a += __shfl_xor_sync(kWholeWarp, a, distance);
    moment += __shfl_xor_sync(kWholeWarp, moment, distance);
    log_scale += __shfl_xor_sync(kWholeWarp, log_scale, distance);
  }
  const double center = moment / a;
  double spread = 0;
#pragma unroll 1
  for (int64_t k = lane; k < task.num_gaussians; k += 32) {
    const double from_center =
        read_number(
            task.mean_offsets, head * task.offsets_strides[0] + k * task.offsets_strides[1], task.offsets_type) -
        center;
    const double width =
        read_number(task.c, head * task.widths_strides[0] + k * task.widths_strides[1], task.widths_type);
    spread += from_center * from_center / (width * width);
  }
#pragma unroll 1
  for (int distance = 1; distance < 32; distance *= 2) spread += __shfl_xor_sync(kWholeWarp, spread, distance);
  Quadratic q;
  q.a = a;
  q.center = center;
  q.spread = spread;
  set_level(q, 0.5 * log_scale + log2(task.eps));
  return q;
}

// A head's quadratic, rounded from double.
struct Head {
  float a, center, spread, level, height;

  // Worked out by one warp; the first bytes of shared memory pass it on.
  __device__ static Head of_block(const Task& task, int64_t head) {
    static_assert(sizeof(Head) <= kHeadBytes, "shared memory has room for it");
    Head* shared = reinterpret_cast<Head*>(daam_shared);
    if (threadIdx.x < 32) {
      const Quadratic q = quadratic_by_warp(task, head);
      if (threadIdx.x == 0)
        *shared = {float(q.a), float(q.center), float(q.spread), float(q.level), float(q.height)};
    }
    __syncthreads();
    return *shared;
  }
};

}  // namespace cuda
}  // namespace daam
