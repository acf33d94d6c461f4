// The arithmetic of density attention that the CPU and the CUDA kernels share, one head or one slice at a time.
// The operator in full: daam_kernels/reference/density_attention.py, whose names these are.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define DAAM_HD static __host__ __device__ inline
#else
#define DAAM_HD static inline
#endif

namespace daam {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kTwoPi = 6.283185307179586;

// The K Gaussians of a head as one quadratic: with e = x - mean - center their product is
//   2^-(L (a e^2 / var + spread / var)) * 2^-level * height * eps,   L = log2(e) / 2.
// Many wide Gaussians have a level so high that its rounding would show in all weights: height, a power of two, takes
// the whole part of one above 0.
struct Quadratic {
  double a = 0, center = 0, spread = 0, level = 0, height = 1;
};

DAAM_HD void set_level(Quadratic& q, double level) {
  const double whole = level > 126 ? 126 : level > 0 ? floor(level) : 0;  // 2^-126 is a normal number
  q.level = level - whole;
  q.height = exp2(-whole);
}

// offset(k) and width(k) return the k-th mean offset and c in double.
template <class Offset, class Width>
DAAM_HD Quadratic quadratic(int64_t num_gaussians, double eps, Offset offset, Width width) {
  Quadratic q;
  double moment = 0, product = 1, log_scale = 0;
  for (int64_t k = 0; k < num_gaussians; k++) {
    const double w = width(k), square = w * w, inverse = 1 / square;
    q.a += inverse;
    moment += offset(k) * inverse;
    product *= kTwoPi * square;  // one logarithm for many Gaussians
    if (!(product > 1e-200 && product < 1e200)) {
      log_scale += log2(product);
      product = 1;
    }
  }
  q.center = moment / q.a;
  for (int64_t k = 0; k < num_gaussians; k++) {
    const double w = width(k), from_center = offset(k) - q.center;
    q.spread += from_center * from_center / (w * w);
  }
  set_level(q, 0.5 * (log_scale + log2(product)) + log2(eps));
  return q;
}

// Sums over the slices of a head: of p, p / var, p e / var, p e^2 / var, where p is the gradient of log density.
struct HeadSums {
  double t0 = 0, t0_v = 0, u1_v = 0, u2_v = 0;
};

// The gradients of one Gaussian's mean offset and c.
DAAM_HD void gaussian_gradients(
    const HeadSums& s, double center, double offset, double width, double* d_offset, double* d_width) {
  const double da = -0.5 * (s.u2_v + 2 * center * s.u1_v + center * center * s.t0_v);
  const double db = s.u1_v + center * s.t0_v;
  const double dc = -0.5 * s.t0_v;
  const double square = width * width;
  *d_offset = (db + 2 * offset * dc) / square;
  *d_width = -2 * (da + offset * db + offset * offset * dc) / (square * width) - s.t0 / width;
}

}  // namespace daam
