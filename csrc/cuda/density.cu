// The CUDA kernels of density attention, one for each direction, way through memory, type of x, and whether elements
// can be padding (strided ones always expect it). Their names are kernel_name()'s of launch.h, by which the driver finds
// them.
#include "backward.cuh"
#include "forward.cuh"
#include "parameters.cuh"

using namespace daam::cuda;

// At most as many threads as launch.cpp gives a block. The second 1 lets the compiler use all of a thread's registers.
#define DAAM_KERNEL(direction, name, threads, T, V, S, PADDED)                                                      \
  extern "C" __global__ void __launch_bounds__(threads, 1) daam_##direction##_##name(const __grid_constant__ Task task) { \
    direction<T, V, S, PADDED>(task);                                                                               \
  }

#define DAAM_TYPE(direction, type, T)                                                                      \
  DAAM_KERNEL(direction, rows_##type, 512, T, kPackBytes / sizeof(T), 1, false)                            \
  DAAM_KERNEL(direction, rows_##type##_padded, 512, T, kPackBytes / sizeof(T), 1, true)                    \
  DAAM_KERNEL(direction, columns_##type, 256, T, kPackBytes / sizeof(T), kPackBytes / sizeof(T), false)    \
  DAAM_KERNEL(direction, columns_##type##_padded, 256, T, kPackBytes / sizeof(T), kPackBytes / sizeof(T), true) \
  DAAM_KERNEL(direction, strided_##type, 512, T, 1, 1, true)

DAAM_TYPE(forward, float32, Float32)
DAAM_TYPE(forward, bfloat16, BFloat16)
DAAM_TYPE(forward, float16, Float16)
DAAM_TYPE(backward, float32, Float32)
DAAM_TYPE(backward, bfloat16, BFloat16)
DAAM_TYPE(backward, float16, Float16)

extern "C" __global__ void __launch_bounds__(256) daam_parameter_gradients(const __grid_constant__ Task task) {
  parameter_gradients(task);
}
