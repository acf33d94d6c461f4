// The kernels for any machine: with what every processor of its kind has (SSE2 on x86-64, NEON on aarch64).
#define DAAM_VECTOR_BYTES 16
#include "additive_kernel.h"
#include "density_kernel.h"

int daam::density_generic(const daam_density& p, const Tensors& t, daam_parallel_for parallel_for) {
  return p.type == DAAM_FLOAT64 ? density_generic_double(p, t, parallel_for) : run_float(p, t, parallel_for);
}

int daam::additive_generic(const daam_additive& p, const AdditiveTensors& t, daam_parallel_for parallel_for) {
  return run_additive(p, t, parallel_for);
}
