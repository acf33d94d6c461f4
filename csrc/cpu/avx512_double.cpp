// The float64 kernels for AVX-512.
#if defined(__x86_64__) || defined(_M_X64)
#include "target.h"
DAAM_TARGET_BEGIN(DAAM_AVX512_TARGET)
#define DAAM_AVX512 DAAM_AVX512_INTRINSICS
#define DAAM_VECTOR_BYTES 64
#include "density_kernel.h"

int daam::density_avx512_double(const daam_density& p, const Tensors& t, daam_parallel_for parallel_for) {
  return run_double(p, t, parallel_for);
}
DAAM_TARGET_END
#endif
