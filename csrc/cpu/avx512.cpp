// The kernels for AVX-512.
#if defined(__x86_64__) || defined(_M_X64)
#include "target.h"
DAAM_TARGET_BEGIN(DAAM_AVX512_TARGET)
#define DAAM_AVX512 DAAM_AVX512_INTRINSICS
#define DAAM_VECTOR_BYTES 64
#include "additive_kernel.h"
#include "density_kernel.h"

int daam::density_avx512(const daam_density& p, const Tensors& t, daam_parallel_for parallel_for) {
  return p.type == DAAM_FLOAT64 ? density_avx512_double(p, t, parallel_for) : run_float(p, t, parallel_for);
}

int daam::additive_avx512(const daam_additive& p, const AdditiveTensors& t, daam_parallel_for parallel_for) {
  return run_additive(p, t, parallel_for);
}
DAAM_TARGET_END
#endif
