// The launch of a problem, worked out by plain host code that runs and can be checked without a GPU.
#pragma once

#include <stddef.h>

#include "task.h"

namespace daam {
namespace cuda {

struct Tensors {
  const void *x, *grad, *mean_offsets, *c;
  const uint8_t* mask;
  void *out, *weights;
  void *d_mean_offsets, *d_c;
  void* workspace;
  bool backward;
};

struct Launch {
  Task task;
  int kernel;  // of kernel_name()
  uint32_t blocks, threads, shared_bytes;
};

constexpr int kNumKernels = 2 * 3 * 5;  // directions, types, and rows, padded rows, columns, padded columns, strided
constexpr const char* kParameterKernel = "daam_parameter_gradients";
constexpr uint32_t kParameterThreads = 256;
constexpr uint32_t kParameterSharedBytes = 4 * (kParameterThreads / 32) * sizeof(double);

// "daam_" direction "_" kind "_" type, and "_padded" where elements can be padding.
void kernel_name(int kernel, char* name, size_t size);

// Whether a problem is served at all.
bool is_served(const daam_density& problem);

// Bytes of partial sums that the backward pass may need.
int64_t workspace_bytes(const daam_density& problem);

// The launch of one direction, for a device whose blocks may have so much shared memory; no blocks where there are no
// slices.
Launch plan(const daam_density& problem, const Tensors& tensors, int64_t max_shared_bytes);

}  // namespace cuda
}  // namespace daam
