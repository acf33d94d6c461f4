// The float64 kernels for any machine: with what every processor of its kind has (SSE2 on x86-64, NEON on aarch64).
#define DAAM_VECTOR_BYTES 16
#include "density_kernel.h"

int daam::density_generic_double(const daam_density& p, const Tensors& t, daam_parallel_for parallel_for) {
  return run_double(p, t, parallel_for);
}
