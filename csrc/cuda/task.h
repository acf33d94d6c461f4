// What a launch hands to a kernel: one structure, worked out on the host (launch.h) and read by every thread.
#pragma once

#include <stdint.h>

#include "../daam_kernels.h"

namespace daam {
namespace cuda {

// A thread holds pieces of a slice: packs of neighbouring elements that it loads and stores at once.
enum Kind {
  ROWS = 0,     // 16-byte packs along R, which is contiguous
  COLUMNS = 1,  // 16-byte packs across R, of neighbouring slices
  STRIDED = 2   // single elements, any strides
};
constexpr int kPackBytes = 16;
constexpr int kHeadBytes = 32;  // of shared memory, for the head's quadratic; what follows is as aligned

// The threads of a block form a grid: `along` of them share a slice, `across` of them are side by side. Both are powers
// of two, given by their logarithms. One of the two has its shift at 0: the one along which memory is contiguous.
struct ThreadGrid {
  int32_t along_log, along_shift;
  int32_t across_log, across_shift;
};

struct Task {
  const void *x, *grad, *mean_offsets, *c;
  const uint8_t* mask;
  void *out, *weights;  // out: y or dx
  void *d_mean_offsets, *d_c;
  float* partials;  // [num_heads, 4, blocks]: what every block adds to the sums of its head

  int64_t outer, length, inner, chunk;
  int64_t num_heads, num_gaussians;
  daam_strides x_strides, out_strides, grad_strides, mask_strides;
  int64_t offsets_strides[2], widths_strides[2];
  int64_t tiles;   // of each head: groups of slices that a block takes at a time
  int64_t blocks;  // of each head; block b takes tiles b, b + blocks, ...
  double eps;
  float padding_value;
  int32_t offsets_type, widths_type, flags;
  ThreadGrid grid;
  int32_t held;           // packs of each tensor that a thread keeps in shared memory; the rest is read again
  int32_t scratch_bytes;  // of shared memory, for the reductions
};

}  // namespace cuda
}  // namespace daam
