// The kernels for x86-64-v3: AVX2, FMA and F16C.
#if defined(__x86_64__) || defined(_M_X64)
#include "target.h"
DAAM_TARGET_BEGIN("avx2,fma,f16c")
#define DAAM_VECTOR_BYTES 32
#include "additive_kernel.h"
#include "density_kernel.h"

int daam::density_avx2(const daam_density& p, const Tensors& t, daam_parallel_for parallel_for) {
  return p.type == DAAM_FLOAT64 ? density_avx2_double(p, t, parallel_for) : run_float(p, t, parallel_for);
}

int daam::additive_avx2(const daam_additive& p, const AdditiveTensors& t, daam_parallel_for parallel_for) {
  return run_additive(p, t, parallel_for);
}
DAAM_TARGET_END
#endif
