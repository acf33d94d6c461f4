// Fours of neighbouring elements that lie apart: brought together in a vector, transposed, and taken apart again. So
// slices whose own elements are neighbours in memory reach the lanes of columns.
#pragma once

#include "storage.h"

namespace {

// Where there are the instructions for it, and it is faster than one element at a time.
template <class T>
constexpr bool kHasFours = sizeof(T) == 4 && DAAM_X86 && (DAAM_VECTOR_BYTES == 32 || DAAM_AVX512);

#if DAAM_X86 && (DAAM_VECTOR_BYTES == 32 || (DAAM_VECTOR_BYTES == 64 && DAAM_AVX512))

// Two fours, and all that fill a vector, as they are in memory.
DAAM_INLINE __m256 load_two(const float* a, const float* b) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
}
template <class Half>
DAAM_INLINE __m128i load_two(const Half* a, const Half* b) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<const __m64*>(b)));
}
DAAM_INLINE void store_two(float* a, float* b, __m256 v) {
  _mm_storeu_ps(a, _mm256_castps256_ps128(v));
  _mm_storeu_ps(b, _mm256_extractf128_ps(v, 1));
}
template <class Half>
DAAM_INLINE void store_two(Half* a, Half* b, __m128i v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(a), v);
  _mm_storeh_pi(reinterpret_cast<__m64*>(b), _mm_castsi128_ps(v));
}

#if DAAM_VECTOR_BYTES == 32

DAAM_INLINE V<float> as_numbers(__m256 v, const float*) { return (V<float>)v; }
DAAM_INLINE V<float> as_numbers(__m128i v, const BFloat16*) {
  return (V<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
}
DAAM_INLINE V<float> as_numbers(__m128i v, const Float16*) { return (V<float>)_mm256_cvtph_ps(v); }

template <class S, class At>
DAAM_INLINE V<float> load_fours(const S* typed, At at) {
  return as_numbers(load_two(at(0), at(1)), typed);
}

template <class S, class At>
DAAM_INLINE void store_fours(S* typed, V<float> v, At at) {
  const auto packed = pack_as(v, typed);
  typedef decltype(load_two(typed, typed)) Two;
  store_two(at(0), at(1), (Two)packed);
}

DAAM_INLINE V<float> low_pairs(V<float> a, V<float> b) { return (V<float>)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
DAAM_INLINE V<float> high_pairs(V<float> a, V<float> b) { return (V<float>)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
DAAM_INLINE V<float> low_halves(V<float> a, V<float> b) {
  return (V<float>)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x44);
}
DAAM_INLINE V<float> high_halves(V<float> a, V<float> b) {
  return (V<float>)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xee);
}

#else

DAAM_INLINE V<float> join(__m256 a, __m256 b, const float*) {
  return (V<float>)_mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
}
DAAM_INLINE V<float> join(__m128i a, __m128i b, const BFloat16*) {
  const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
  return (V<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16);
}
DAAM_INLINE V<float> join(__m128i a, __m128i b, const Float16*) {
  return (V<float>)_mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1));
}

template <class S, class At>
DAAM_INLINE V<float> load_fours(const S* typed, At at) {
  return join(load_two(at(0), at(1)), load_two(at(2), at(3)), typed);
}

DAAM_INLINE __m256 first_two(V<float> v) { return _mm512_castps512_ps256((__m512)v); }
DAAM_INLINE __m256 last_two(V<float> v) { return _mm512_extractf32x8_ps((__m512)v, 1); }
DAAM_INLINE __m128i first_two(Vector<float>::half v) { return _mm256_castsi256_si128((__m256i)v); }
DAAM_INLINE __m128i last_two(Vector<float>::half v) { return _mm256_extracti128_si256((__m256i)v, 1); }

template <class S, class At>
DAAM_INLINE void store_fours(S* typed, V<float> v, At at) {
  const auto packed = pack_as(v, typed);
  store_two(at(0), at(1), first_two(packed));
  store_two(at(2), at(3), last_two(packed));
}

DAAM_INLINE V<float> low_pairs(V<float> a, V<float> b) { return (V<float>)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
DAAM_INLINE V<float> high_pairs(V<float> a, V<float> b) { return (V<float>)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
DAAM_INLINE V<float> low_halves(V<float> a, V<float> b) {
  return (V<float>)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x44);
}
DAAM_INLINE V<float> high_halves(V<float> a, V<float> b) {
  return (V<float>)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xee);
}

#endif

// In every four of lanes, lane j of v[i] and lane i of v[j] change places.
DAAM_INLINE void transpose_fours(V<float> (&v)[4]) {
  const V<float> a = low_pairs(v[0], v[1]), b = high_pairs(v[0], v[1]);
  const V<float> c = low_pairs(v[2], v[3]), d = high_pairs(v[2], v[3]);
  v[0] = low_halves(a, c), v[1] = high_halves(a, c), v[2] = low_halves(b, d), v[3] = high_halves(b, d);
}

#endif

}  // namespace
