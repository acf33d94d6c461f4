// Vectors of one width, and the few operations that the kernels need of them. Included once for each instruction set,
// by a source file that has chosen DAAM_VECTOR_BYTES and told the compiler what it may use. Everything is internal to
// that file: a function that two instruction sets shared would run with either one's instructions.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#define DAAM_X86 1
#include <immintrin.h>
#else
#define DAAM_X86 0
#endif

#ifndef DAAM_AVX512  // the compiler's own macros say what a whole file is compiled for, and not what a part of it is
#define DAAM_AVX512 0
#endif

#define DAAM_INLINE inline __attribute__((always_inline))

namespace {

// Of T, float or double: the vector of N numbers, its integers and masks, and wider ones of N doubles.
template <class T>
struct Vector;

template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(DAAM_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(DAAM_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer;
  typedef int32_t mask __attribute__((vector_size(DAAM_VECTOR_BYTES)));
  typedef int32_t loose_mask __attribute__((vector_size(DAAM_VECTOR_BYTES), aligned(4), may_alias));
  typedef double wide __attribute__((vector_size(2 * DAAM_VECTOR_BYTES)));
  typedef uint16_t half __attribute__((vector_size(DAAM_VECTOR_BYTES / 2)));
  typedef uint16_t loose_half __attribute__((vector_size(DAAM_VECTOR_BYTES / 2), aligned(2), may_alias));
  static constexpr int N = DAAM_VECTOR_BYTES / 4;
};

template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(DAAM_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(DAAM_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer;
  typedef int64_t mask __attribute__((vector_size(DAAM_VECTOR_BYTES)));
  typedef int64_t loose_mask __attribute__((vector_size(DAAM_VECTOR_BYTES), aligned(8), may_alias));
  typedef double wide __attribute__((vector_size(DAAM_VECTOR_BYTES)));
  static constexpr int N = DAAM_VECTOR_BYTES / 8;
};

template <class T>
using V = typename Vector<T>::type;
template <class T>
using Mask = typename Vector<T>::mask;

template <class T>
DAAM_INLINE V<T> splat(T value) {
  return value - V<T>{};
}

template <class T>
DAAM_INLINE V<T> load(const T* at) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(at);
}

template <class T>
DAAM_INLINE void store(T* at, V<T> v) {
  *reinterpret_cast<typename Vector<T>::loose*>(at) = v;
}

// v as a number of its own: a product that becomes part of a fused multiply-add in one place, and not in another, would
// not be the same number in both.
template <class Lanes>
DAAM_INLINE Lanes rounded(Lanes v) {
#if DAAM_X86 && DAAM_VECTOR_BYTES <= 32
  asm("" : "+x"(v));
#elif DAAM_X86 && DAAM_AVX512
  asm("" : "+v"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

template <class T>
DAAM_INLINE Mask<T> load_mask(const typename Vector<T>::integer* at) {
  return *reinterpret_cast<const typename Vector<T>::loose_mask*>(at);
}

// v where the mask is set, 0 elsewhere, whatever v is there.
template <class T>
DAAM_INLINE V<T> keep(Mask<T> mask, V<T> v) {
  return (V<T>)((Mask<T>)v & mask);
}

// What there is an instruction for that plain C++ does not lead to: the smaller and the larger of two, b where either is
// no number; whether any lane of a mask is set; the square root.
#if DAAM_X86 && DAAM_VECTOR_BYTES == 32
DAAM_INLINE V<float> minimum(V<float> a, V<float> b) { return (V<float>)_mm256_min_ps((__m256)a, (__m256)b); }
DAAM_INLINE V<float> maximum(V<float> a, V<float> b) { return (V<float>)_mm256_max_ps((__m256)a, (__m256)b); }
DAAM_INLINE V<double> minimum(V<double> a, V<double> b) { return (V<double>)_mm256_min_pd((__m256d)a, (__m256d)b); }
DAAM_INLINE V<double> maximum(V<double> a, V<double> b) { return (V<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
DAAM_INLINE V<float> square_root(V<float> v) { return (V<float>)_mm256_sqrt_ps((__m256)v); }
DAAM_INLINE V<double> square_root(V<double> v) { return (V<double>)_mm256_sqrt_pd((__m256d)v); }
template <class M>
DAAM_INLINE bool any(M mask) {
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
}
#elif DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
DAAM_INLINE V<float> minimum(V<float> a, V<float> b) { return (V<float>)_mm512_min_ps((__m512)a, (__m512)b); }
DAAM_INLINE V<float> maximum(V<float> a, V<float> b) { return (V<float>)_mm512_max_ps((__m512)a, (__m512)b); }
DAAM_INLINE V<double> minimum(V<double> a, V<double> b) { return (V<double>)_mm512_min_pd((__m512d)a, (__m512d)b); }
DAAM_INLINE V<double> maximum(V<double> a, V<double> b) { return (V<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
DAAM_INLINE V<float> square_root(V<float> v) { return (V<float>)_mm512_sqrt_ps((__m512)v); }
DAAM_INLINE V<double> square_root(V<double> v) { return (V<double>)_mm512_sqrt_pd((__m512d)v); }
template <class M>
DAAM_INLINE bool any(M mask) {
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
}
#else
template <class Lanes>
DAAM_INLINE Lanes minimum(Lanes a, Lanes b) {
  return a < b ? a : b;
}
template <class Lanes>
DAAM_INLINE Lanes maximum(Lanes a, Lanes b) {
  return a > b ? a : b;
}

template <class Lanes>
DAAM_INLINE Lanes square_root(Lanes v) {
  for (unsigned i = 0; i < sizeof v / sizeof v[0]; i++) v[i] = sizeof v[0] == 4 ? sqrtf((float)v[i]) : sqrt(v[i]);
  return v;
}

template <class M>
DAAM_INLINE bool any(M mask) {
  bool found = false;
  for (unsigned i = 0; i < sizeof mask / sizeof mask[0]; i++) found |= mask[i] != 0;
  return found;
}
#endif

// Without a vector of the comparison's results, which a compiler makes of any().
template <class T>
DAAM_INLINE bool any_below(V<T> v, V<T> bound) {
#if DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_LT_OQ);
#endif
  return any((Mask<T>)(v < bound));
}
template <class T>
DAAM_INLINE bool any_below(V<T> v, T bound) {
  return any_below<T>(v, splat<T>(bound));
}

template <class T>
DAAM_INLINE V<T> absolute(V<T> v) {
  constexpr typename Vector<T>::integer sign = sizeof(T) == 4 ? INT32_MIN : INT64_MIN;
  return (V<T>)((Mask<T>)v & ~(sign - Mask<T>{}));
}

// The one of two numbers that is nearer to 0; b where a is NaN.
template <class T>
DAAM_INLINE V<T> nearer_to_zero(V<T> a, V<T> b) {
#if DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
  constexpr int smaller_magnitude = 2, with_its_sign = 1 << 2;
  if constexpr (sizeof(T) == 4) return (V<T>)_mm512_range_ps((__m512)a, (__m512)b, smaller_magnitude | with_its_sign);
#endif
  return absolute<T>(a) < absolute<T>(b) ? a : b;
}

#if DAAM_X86 && DAAM_VECTOR_BYTES == 32
DAAM_INLINE float sum_of_lanes(V<float> v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
DAAM_INLINE double sum_of_lanes(V<double> v) {
  const __m128d sum = _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(sum, _mm_unpackhi_pd(sum, sum)));
}
#elif DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
DAAM_INLINE float sum_of_lanes(V<float> v) { return _mm512_reduce_add_ps((__m512)v); }
DAAM_INLINE double sum_of_lanes(V<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
template <class Lanes>
DAAM_INLINE auto sum_of_lanes(Lanes v) {
  for (int width = sizeof v / sizeof v[0] / 2; width; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}
#endif

// The first of the lanes that hold the smallest number; there is none that is NaN.
#if DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
DAAM_INLINE int smallest_lane(V<float> v) {
  const __m512 least = _mm512_set1_ps(_mm512_reduce_min_ps((__m512)v));
  return __builtin_ctz(_mm512_cmp_ps_mask((__m512)v, least, _CMP_EQ_OQ));
}
#elif DAAM_X86 && DAAM_VECTOR_BYTES == 32
DAAM_INLINE int smallest_lane(V<float> v) {
  __m256 least = _mm256_min_ps((__m256)v, _mm256_permute2f128_ps((__m256)v, (__m256)v, 1));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0x4e));
  least = _mm256_min_ps(least, _mm256_permute_ps(least, 0xb1));
  return __builtin_ctz(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, least, _CMP_EQ_OQ)));
}
#endif
template <class Lanes>
DAAM_INLINE int smallest_lane(Lanes v) {
  int lane = 0;
  for (int i = 1; i < (int)(sizeof v / sizeof v[0]); i++) lane = v[i] < v[lane] ? i : lane;
  return lane;
}

DAAM_INLINE double sum_in_double(V<double> v) { return sum_of_lanes(v); }
DAAM_INLINE double sum_in_double(V<float> v) {
  const Vector<float>::wide lanes = __builtin_convertvector(v, Vector<float>::wide);
  V<double> halves[2];
  memcpy(halves, &lanes, sizeof lanes);
  return sum_of_lanes(halves[0] + halves[1]);
}

// Lanes [0, count) of a vector.
template <class T>
DAAM_INLINE Mask<T> first_lanes(int64_t count) {
  constexpr typename Vector<T>::integer lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_mask<T>(lanes) < (typename Vector<T>::integer)(count < 16 ? count : 16);
}

}  // namespace
