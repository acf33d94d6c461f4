// Powers of two.
#pragma once

#include "vector.h"

namespace {

// x is rounded to a multiple of 1 / steps by adding a number in whose last bits the result then is, with the bias of
// the exponent; what is left of x goes to a polynomial. Eight floats are looked up where one instruction does that: a
// shorter polynomial is left, and less to wait for.
#if DAAM_X86 && DAAM_VECTOR_BYTES == 32
constexpr int kFloatSteps = 8;

// The bits of 2^(k / 8), less those that k and the bias are in when the rounded number is moved to the exponent.
constexpr int32_t kEighths[8] = {
    0x3f800000 - (0 << 20) - (127 << 23), 0x3f8b95c2 - (1 << 20) - (127 << 23),
    0x3f9837f0 - (2 << 20) - (127 << 23), 0x3fa5fed7 - (3 << 20) - (127 << 23),
    0x3fb504f3 - (4 << 20) - (127 << 23), 0x3fc5672a - (5 << 20) - (127 << 23),
    0x3fd744fd - (6 << 20) - (127 << 23), 0x3feac0c7 - (7 << 20) - (127 << 23)};

DAAM_INLINE V<float> scaled_power(V<float> r, V<float> t) {
  const Mask<float> steps = (Mask<float>)t, table = load_mask<float>(kEighths);
  const Mask<float> eighth = (Mask<float>)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)steps);
  V<float> p = splat<float>(5.5496221796366485e-2f);
  p = p * r + 2.4025762991637656e-1f;
  p = p * r + 6.93147214260506e-1f;
  p = p * r + 1.0f;
  return p * (V<float>)(eighth + (steps << 20));
}
#else
constexpr int kFloatSteps = 1;

DAAM_INLINE V<float> scaled_power(V<float> r, V<float> t) {
  V<float> p = splat<float>(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return p * (V<float>)((Mask<float>)t << 23);
}
#endif

DAAM_INLINE V<double> scaled_power(V<double> r, V<double> t) {
  r *= 0.6931471805599453;
  V<double> p = splat<double>(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * (V<double>)((Mask<double>)t << 52);
}

template <class T>
constexpr T kShift = sizeof(T) == 4 ? (T)(12582912.0 / kFloatSteps + 127) : (T)(6755399441055744.0 + 1023);
// The x from which on 2^-x is 0.
template <class T>
constexpr T kMostHalvings = sizeof(T) == 4 ? (T)127 : (T)1023;

// 2^-x for x >= 0, to less than two units in the last place: 0 where it is below the normal numbers, and NaN stays NaN.
template <class T>
DAAM_INLINE V<T> exp2_minus(V<T> x) {
  x = minimum(splat<T>(kMostHalvings<T>), x);
  const V<T> t = kShift<T> - x;
  return scaled_power((kShift<T> - t) - x, t);
}

// The same of a b, 1 where that is below 0; the product is not rounded where there is a fused multiply-add.
template <class T>
DAAM_INLINE V<T> exp2_minus_product(V<T> a, V<T> b) {
  const V<T> x = a * b, t = kShift<T> - a * b, power = scaled_power((kShift<T> - t) - a * b, t);
  return keep<T>(~(x > kMostHalvings<T>), x < 0 ? splat<T>(1) : power);
}

#if DAAM_X86 && DAAM_VECTOR_BYTES == 64 && DAAM_AVX512
// AVX-512 looks up 32 floats, rounds downwards, says what is left beyond a multiple of 1 / 32, of infinities too, and
// scales by a power of two: with a quadratic it has the fewest steps. 2^(k / 32) here, times the quadratic's constant.
constexpr float kThirtySeconds[32] = {
    1.0f, 1.0218972f, 1.04427385f, 1.06714046f, 1.09050775f, 1.1143868f, 1.1387887f, 1.1637249f,
    1.1892072f, 1.21524739f, 1.24185789f, 1.26905107f, 1.29683959f, 1.32523668f, 1.35425568f, 1.38390994f,
    1.41421366f, 1.44518089f, 1.47682619f, 1.50916445f, 1.54221094f, 1.5759809f, 1.61049044f, 1.64575553f,
    1.68179297f, 1.71861935f, 1.75625229f, 1.79470921f, 1.83400822f, 1.87416768f, 1.91520667f, 1.95714426f};

constexpr float kToThirtySeconds = 12582912.0f / 32;

// e, whose whole part alone counts, is that of what is rounded downwards in t; r of [0, 1 / 32] is left of it.
DAAM_INLINE V<float> scaled_power(V<float> e, V<float> t, V<float> r) {
  const __m512 low = (__m512)load(kThirtySeconds), high = (__m512)load(kThirtySeconds + 16);
  const V<float> step = (V<float>)_mm512_permutex2var_ps(low, (__m512i)t, high);
  const V<float> p = step + step * r * (0.24284062f * r + 0.69311656f);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)e, (__m512)splat(-126.0f), _CMP_NLT_UQ);
  return (V<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)e);
}

DAAM_INLINE V<float> to_thirty_seconds(V<float> e) {
  constexpr int downwards = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return (V<float>)_mm512_add_round_ps((__m512)e, (__m512)splat(kToThirtySeconds), downwards);
}

template <>
DAAM_INLINE V<float> exp2_minus<float>(V<float> x) {
  constexpr int down_to_thirty_seconds = 5 << 4 | _MM_FROUND_TO_NEG_INF;
  const V<float> e = V<float>{} - x;
  return scaled_power(e, to_thirty_seconds(e), (V<float>)_mm512_reduce_ps((__m512)e, down_to_thirty_seconds));
}

template <>
DAAM_INLINE V<float> exp2_minus_product<float>(V<float> a, V<float> b) {
  const V<float> x = a * b, t = to_thirty_seconds(-x);
  return x < 0 ? splat(1.0f) : scaled_power(-x, t, (kToThirtySeconds - t) - a * b);
}
#endif

}  // namespace
