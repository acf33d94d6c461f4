// Vectors of numbers from memory of any type and alignment, and back; past the caches too.
#pragma once

#include "vector.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// The same as BFloat16, of which two neighbouring vectors are loaded as those with even and with odd places, and stored
// again from there: that takes a shift or a mask instead of moves between lanes.
struct PairedBFloat16 : BFloat16 {};

DAAM_INLINE V<float> load_as(const float* at) { return load<float>(at); }
DAAM_INLINE V<double> load_as(const double* at) { return load<double>(at); }

DAAM_INLINE Mask<float> load_half(const uint16_t* at) {
  const typename Vector<float>::half h = *reinterpret_cast<const typename Vector<float>::loose_half*>(at);
  return __builtin_convertvector(h, Mask<float>);
}

DAAM_INLINE V<float> load_as(const BFloat16* at) { return (V<float>)(load_half(&at->bits) << 16); }

DAAM_INLINE V<float> load_as(const Float16* at) {
#if DAAM_X86 && DAAM_VECTOR_BYTES == 32
  return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
  return (V<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#else
  const Mask<float> h = load_half(&at->bits), magnitude = h & 0x7fff;
  const V<float> finite = (V<float>)(magnitude << 13) * 0x1p112f;  // subnormal numbers included
  const Mask<float> bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : (Mask<float>)finite;
  return (V<float>)(bits | ((h & 0x8000) << 16));
#endif
}

// What a vector is in memory, as a vector of that type.
DAAM_INLINE V<float> pack_as(V<float> v, const float*) { return v; }
DAAM_INLINE V<double> pack_as(V<double> v, const double*) { return v; }

// BFloat16 in the upper half. A NaN stays one: those that arithmetic makes, or passes on from BFloat16, have zeros where
// it could overflow.
DAAM_INLINE Mask<float> round_to_upper_half(V<float> v) {
  const Mask<float> bits = (Mask<float>)v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

DAAM_INLINE typename Vector<float>::half pack_as(V<float> v, const BFloat16*) {
  return __builtin_convertvector(round_to_upper_half(v) >> 16, typename Vector<float>::half);
}

DAAM_INLINE Mask<float> load_pair(const PairedBFloat16* at) {
  Mask<float> pair;
  memcpy(&pair, at, sizeof pair);  // of a BFloat16's alignment
  return pair;
}
DAAM_INLINE V<float> load_even(const PairedBFloat16* at) { return (V<float>)(load_pair(at) << 16); }
DAAM_INLINE V<float> load_odd(const PairedBFloat16* at) { return (V<float>)(load_pair(at) & (int32_t)0xffff0000); }

// Vectors of even and odd places, as a vector in memory.
DAAM_INLINE V<float> pack_pair(V<float> even, V<float> odd) {
  const Mask<float> low = (Mask<float>)((round_to_upper_half(even) >> 16) & 0xffff);
  return (V<float>)(low | (round_to_upper_half(odd) & (int32_t)0xffff0000));
}

DAAM_INLINE typename Vector<float>::half pack_as(V<float> v, const Float16*) {
#if DAAM_X86 && DAAM_VECTOR_BYTES == 32
  return (typename Vector<float>::half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
  return (typename Vector<float>::half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Mask<float> bits = (Mask<float>)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Adding 1/2 leaves in the last bits what a subnormal half holds, rounded.
  const Mask<float> small = (Mask<float>)((V<float>)magnitude + 0.5f) - 0x3f000000;
  const Mask<float> normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Mask<float> stored = magnitude < 0x38800000 ? small : normal;
  stored = magnitude >= 0x47800000 ? 0x7c00 - Mask<float>{} : stored;
  stored = magnitude > 0x7f800000 ? 0x7e00 - Mask<float>{} : stored;
  return __builtin_convertvector(stored | sign, typename Vector<float>::half);
#endif
}

// One number.
DAAM_INLINE float number(float v) { return v; }
DAAM_INLINE double number(double v) { return v; }
DAAM_INLINE float number(BFloat16 v) {
  const uint32_t bits = (uint32_t)v.bits << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
DAAM_INLINE float number(Float16 v) {
#if DAAM_X86 && (DAAM_VECTOR_BYTES == 32 || DAAM_AVX512)
  return _cvtsh_ss(v.bits);
#else
  Float16 some[Vector<float>::N] = {v};
  return load_as(some)[0];
#endif
}

DAAM_INLINE void put(float* at, float value) { *at = value; }
DAAM_INLINE void put(double* at, double value) { *at = value; }
DAAM_INLINE void put(BFloat16* at, float value) {  // as round_to_upper_half
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  at->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
DAAM_INLINE void put(Float16* at, float value) {
#if DAAM_X86 && (DAAM_VECTOR_BYTES == 32 || DAAM_AVX512)
  at->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const auto packed = pack_as(splat(value), at);
  memcpy(at, &packed, sizeof *at);
#endif
}

template <class T, class S>
DAAM_INLINE void store_as(S* at, V<T> v) {
  const auto packed = pack_as(v, at);
  memcpy(at, &packed, sizeof packed);
}

// Copies fewer bytes than SIZE, a power of two, of which UNIT is a divisor.
template <size_t SIZE, size_t UNIT>
DAAM_INLINE void copy_part(void* to, const void* from, size_t bytes) {
  size_t done = 0;
#pragma GCC unroll 6
  for (size_t piece = SIZE / 2; piece >= UNIT; piece /= 2)
    if (bytes & piece) {
      memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, piece);
      done += piece;
    }
}

// The first `count` numbers, fewer than N; zeros beyond.
template <class T, class S>
DAAM_INLINE V<T> load_part(const S* at, int64_t count) {
#if DAAM_X86 && DAAM_VECTOR_BYTES == 32
  if constexpr (sizeof(S) == 4) return (V<T>)_mm256_maskload_ps((const float*)at, (__m256i)first_lanes<T>(count));
  if constexpr (sizeof(S) == 8) return (V<T>)_mm256_maskload_pd((const double*)at, (__m256i)first_lanes<T>(count));
#elif DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
  if constexpr (sizeof(S) == 4) return (V<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), at);
  if constexpr (sizeof(S) == 8) return (V<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), at);
  if constexpr (sizeof(S) == 2) {
    const __m256i halves = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), at);
    S some[Vector<T>::N];
    memcpy(some, &halves, sizeof some);
    return load_as(some);
  }
#endif
  S some[Vector<T>::N] = {};
  copy_part<sizeof some, sizeof(S)>(some, at, count * sizeof(S));
  return load_as(some);
}

template <class T, class S>
DAAM_INLINE void store_part(S* at, V<T> v, int64_t count) {
  const auto packed = pack_as(v, at);
#if DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(at, (__mmask16)((1u << count) - 1), (__m512)packed);
  if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(at, (__mmask8)((1u << count) - 1), (__m512d)packed);
  if constexpr (sizeof(S) == 2) return _mm256_mask_storeu_epi16(at, (__mmask16)((1u << count) - 1), (__m256i)packed);
#endif
  copy_part<sizeof packed, sizeof(S)>(at, &packed, count * sizeof(S));
}

// The same past the caches, to an address that is a multiple of its own size; an ordinary store where there is none.
template <class T, class S>
DAAM_INLINE void stream_as(S* at, V<T> v) {
  const auto packed = pack_as(v, at);
#if DAAM_X86
  if constexpr (sizeof packed == 64) {
#if DAAM_AVX512
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), (__m512i)packed);
    return;
#endif
  } else if constexpr (sizeof packed == 32) {
#if DAAM_VECTOR_BYTES >= 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), (__m256i)packed);
    return;
#endif
  } else if constexpr (sizeof packed == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(at), (__m128i)packed);
    return;
  }
#endif
  memcpy(at, &packed, sizeof packed);
}

// Bytes that fill vectors past the caches, from scratch memory that is aligned to them, as `to` is.
DAAM_INLINE void stream_bytes(void* to, const void* from, size_t bytes) {
#if DAAM_X86 && (DAAM_VECTOR_BYTES == 32 || DAAM_AVX512)
  for (size_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(
        reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
        _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i)));
#else
  memcpy(to, from, bytes);
#endif
}

DAAM_INLINE void finish_streaming() {
#if DAAM_X86
  _mm_sfence();
#endif
}

}  // namespace
