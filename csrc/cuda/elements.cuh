// Elements in memory, packs of them, and their way through shared memory.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#endif

#include "task.h"

namespace daam {
namespace cuda {

struct Float32 {
  float value;
  __device__ static float widen(Float32 t) { return t.value; }
  __device__ static Float32 round(float f) { return {f}; }
};

struct BFloat16 {
  uint16_t bits;
  __device__ static float widen(BFloat16 t) { return __uint_as_float(uint32_t(t.bits) << 16); }
  __device__ static BFloat16 round(float f) { return {__bfloat16_as_ushort(__float2bfloat16_rn(f))}; }
};

struct Float16 {
  uint16_t bits;
  __device__ static float widen(Float16 t) { return __half2float(__ushort_as_half(t.bits)); }
  __device__ static Float16 round(float f) { return {__half_as_ushort(__float2half_rn(f))}; }
};

// V elements that are loaded and stored at once.
template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T element[V];

  __device__ void widen(float (&values)[V]) const {
#pragma unroll
    for (int e = 0; e < V; e++) values[e] = T::widen(element[e]);
  }

  __device__ static Pack round(const float (&values)[V]) {
    Pack pack;
#pragma unroll
    for (int e = 0; e < V; e++) pack.element[e] = T::round(values[e]);
    return pack;
  }
};

// A pack from global memory, through the cache for what no kernel writes.
template <class P>
__device__ __forceinline__ P fetch(const P* global) {
  using Word = std::conditional_t<
      sizeof(P) == kPackBytes, uint4, std::conditional_t<sizeof(P) == 4, unsigned, unsigned short>>;
  static_assert(sizeof(P) == sizeof(Word), "a pack is 16 bytes or one element");
  const Word word = __ldg(reinterpret_cast<const Word*>(global));
  P pack;
  memcpy(&pack, &word, sizeof(P));
  return pack;
}

// Starts to copy a pack from global to shared memory. The thread that copied it may read it after wait_for_copies().
template <class P>
__device__ __forceinline__ void copy(P* shared, const P* global) {
  if constexpr (sizeof(P) == kPackBytes) {
    __pipeline_memcpy_async(shared, global, kPackBytes);
  } else {
    *shared = fetch(global);
  }
}

__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// A number of a daam_type at an index, as double; and the other way round.
__device__ inline double read_number(const void* base, int64_t index, int type) {
  switch (type) {
    case DAAM_FLOAT32: return static_cast<const float*>(base)[index];
    case DAAM_FLOAT64: return static_cast<const double*>(base)[index];
    case DAAM_BFLOAT16: return BFloat16::widen(static_cast<const BFloat16*>(base)[index]);
    default: return Float16::widen(static_cast<const Float16*>(base)[index]);
  }
}

__device__ inline void write_number(void* base, int64_t index, int type, double value) {
  switch (type) {
    case DAAM_FLOAT32: static_cast<float*>(base)[index] = float(value); break;
    case DAAM_FLOAT64: static_cast<double*>(base)[index] = value; break;
    case DAAM_BFLOAT16: static_cast<BFloat16*>(base)[index] = BFloat16::round(float(value)); break;
    default: static_cast<Float16*>(base)[index] = Float16::round(float(value));
  }
}

}  // namespace cuda
}  // namespace daam
