// The parameters, in double: once a call, so one instruction set serves all.
#include "internal.h"

#include <string.h>

namespace daam {

namespace {

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? ldexpf((float)(1024 + mantissa), exponent - 25)
                                         : ldexpf((float)mantissa, -24);
  return h >> 15 ? -magnitude : magnitude;
}

// To the nearest, ties to even: of a number with `digits` binary digits whose smallest has the exponent `lowest`.
double round_to(double value, int digits, int lowest) {
  int exponent;
  frexp(value, &exponent);
  const int last = exponent - digits > lowest ? exponent - digits : lowest;
  return ldexp(nearbyint(ldexp(value, -last)), last);
}

uint16_t float_to_half(double value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  value = fabs(value);
  if (value != value) return sign | 0x7e00;
  if (value >= 65520) return sign | 0x7c00;
  const double rounded = round_to(value, 11, -24);
  if (rounded < 0x1p-14) return sign | (uint16_t)ldexp(rounded, 24);
  int exponent;
  const double mantissa = frexp(rounded, &exponent);
  return sign | (uint16_t)((exponent + 14) << 10 | ((int)ldexp(mantissa, 11) & 1023));
}

}  // namespace

static size_t size_of(int type) { return type == DAAM_FLOAT64 ? 8 : type == DAAM_FLOAT32 ? 4 : 2; }

double read_number(const void* base, int64_t index, int type) {
  const char* const at = static_cast<const char*>(base) + index * (int64_t)size_of(type);
  double wide;
  float single;
  uint16_t half;
  switch (type) {
    case DAAM_FLOAT64: memcpy(&wide, at, 8); return wide;
    case DAAM_FLOAT32: memcpy(&single, at, 4); return single;
    case DAAM_FLOAT16: memcpy(&half, at, 2); return half_to_float(half);
  }
  memcpy(&half, at, 2);
  const uint32_t bits = (uint32_t)half << 16;
  memcpy(&single, &bits, 4);
  return single;
}

void write_number(void* base, int64_t index, int type, double value) {
  char* const at = static_cast<char*>(base) + index * (int64_t)size_of(type);
  const float single = (float)value;
  uint16_t half = float_to_half(value);
  switch (type) {
    case DAAM_FLOAT64: memcpy(at, &value, 8); return;
    case DAAM_FLOAT32: memcpy(at, &single, 4); return;
    case DAAM_FLOAT16: memcpy(at, &half, 2); return;
  }
  uint32_t bits;
  const float rounded = value == value && fabs(value) <= 3.5e38 ? (float)round_to(value, 8, -133) : single;
  memcpy(&bits, &rounded, 4);
  half = value == value ? bits >> 16 : 0x7fc0;
  memcpy(at, &half, 2);
}

double read_offset(const daam_density& p, const Tensors& t, int64_t head, int64_t k) {
  return read_number(t.mean_offsets, head * p.offsets_strides[0] + k * p.offsets_strides[1], p.offsets_type);
}

double read_width(const daam_density& p, const Tensors& t, int64_t head, int64_t k) {
  return read_number(t.c, head * p.widths_strides[0] + k * p.widths_strides[1], p.widths_type);
}

Quadratic head_quadratic(const daam_density& p, const Tensors& t, int64_t head) {
  return quadratic(
      p.num_gaussians, p.eps, [&](int64_t k) { return read_offset(p, t, head, k); },
      [&](int64_t k) { return read_width(p, t, head, k); });
}

void write_parameter_gradients(const daam_density& p, const Tensors& t, const double* sums, int64_t tasks) {
  for (int64_t head = 0; head < p.num_heads; head++) {
    HeadSums total;
    for (int64_t task = 0; task < tasks; task++) {
      const double* const from = sums + (task * p.num_heads + head) * 4;
      total.t0 += from[0], total.t0_v += from[1], total.u1_v += from[2], total.u2_v += from[3];
    }
    const double center = head_quadratic(p, t, head).center;
    for (int64_t k = 0; k < p.num_gaussians; k++) {
      double d_offset, d_width;
      gaussian_gradients(total, center, read_offset(p, t, head, k), read_width(p, t, head, k), &d_offset, &d_width);
      write_number(t.d_mean_offsets, head * p.num_gaussians + k, p.offsets_type, d_offset);
      write_number(t.d_c, head * p.num_gaussians + k, p.widths_type, d_width);
    }
  }
}

void write_mixture_gradients(const daam_density& p, const Tensors& t, const double* sums, int64_t tasks) {
  const int64_t count = p.num_heads * p.num_gaussians;
  for (int64_t i = 0; i < count; i++) {
    double total[3] = {};
    for (int64_t task = 0; task < tasks; task++)
      for (int j = 0; j < 3; j++) total[j] += sums[(task * count + i) * 3 + j];
    const double width = read_width(p, t, i / p.num_gaussians, i % p.num_gaussians), square = width * width;
    t.d_log_shares[i] = total[0];
    write_number(t.d_mean_offsets, i, p.offsets_type, total[1] / square);
    write_number(t.d_c, i, p.widths_type, total[2] / (square * width));
  }
}

}  // namespace daam
