// What both directions find out about a slice before they use it: statistics, the largest density, their sum.
//
// s is x - x0 with x0 the slice's first valid element, so that no mean is ever held in one float. Densities are relative
// to the slice's largest one: with gap = (s - nearest) / sqrt(var), where nearest is the s at which the density is
// largest, and peak its distance from the centre in units of sqrt(var), a density is 2^-(L a gap (gap + 2 peak)).
#pragma once

#include "slices.cuh"

namespace daam {
namespace cuda {

constexpr float kHalfLog2E = float(0.5 * kLog2E);
constexpr float kFar = Least::kNothing;

template <int S>
struct Numbers {
  float x0[S], mean[S], rstd[S], count[S];  // mean is from x0
  float nearest[S], peak[S];
};

// Bits of the elements that have a density: all, or under DAAM_EXCLUDE the valid ones.
template <bool PADDED>
__device__ __forceinline__ unsigned domain_of(const Task& task, unsigned valid) {
  if constexpr (!PADDED) return ~0u;
  return task.flags & DAAM_EXCLUDE ? valid : ~0u;
}

__device__ __forceinline__ bool has(unsigned bits, int e) { return bits >> e & 1; }

// The density of an element over the slice's largest one. Rounding may hide which of two elements is nearer, so the
// fall may come out negative; a NaN stays one.
__device__ __forceinline__ float density(float gap, float peak, float a) {
  float fall = gap * (gap + 2 * peak);
  fall = fall < 0 ? 0 : fall;
  return exp2f(fall * (-kHalfLog2E * a));
}

// x0: the first valid element that the first of the threads with one has; 0 where there is none.
template <class T, int V, int S, bool PADDED>
__device__ void find_first(const Slices<T, V, S, PADDED>& slices, Block& block, float (&x0)[S]) {
  if constexpr (!PADDED) {
    slices.first_elements(x0);
  } else {
    float who[S], first[S];
#pragma unroll
    for (int s = 0; s < S; s++) x0[s] = 0, who[s] = kFar;
    slices.sweep([&](const float(&x)[V], unsigned valid, int) {
#pragma unroll
      for (int e = 0; e < V; e++) {
        const int s = e % S;
        if (has(valid, e) && who[s] == kFar) x0[s] = x[e], who[s] = float(block.along);
      }
    });
#pragma unroll
    for (int s = 0; s < S; s++) first[s] = who[s];
    block.template reduce<Least>(first);
#pragma unroll
    for (int s = 0; s < S; s++) x0[s] = who[s] == first[s] ? x0[s] : 0;
    block.template reduce<Sum>(x0);
  }
}

template <class T, int V, int S, bool PADDED>
__device__ Numbers<S> find_numbers(
    const Task& task, const Slices<T, V, S, PADDED>& slices, Block& block, const Head& head) {
  Numbers<S> n;
  find_first(slices, block, n.x0);

  const bool exclude = PADDED && (task.flags & DAAM_EXCLUDE);
  // What the statistics see: padding counts as zeros, unless it is excluded.
  const auto counted = [&](float x, unsigned valid, int e) {
    const float s = x - n.x0[e % S];
    return !PADDED || has(valid, e) ? s : -n.x0[e % S];
  };
  float sum[S], members[S];
#pragma unroll
  for (int s = 0; s < S; s++) sum[s] = n.count[s] = 0;
  slices.sweep([&](const float(&x)[V], unsigned valid, int) {
    const unsigned domain = domain_of<PADDED>(task, valid);
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (!PADDED || has(domain, e)) {
        sum[e % S] += counted(x[e], valid, e);
        if constexpr (PADDED) n.count[e % S] += 1;
      }
    }
  });
  block.template reduce<Sum>(sum);
  if (exclude) block.template reduce<Sum>(n.count);
#pragma unroll
  for (int s = 0; s < S; s++) {
    if (!exclude) n.count[s] = slices.length;
    members[s] = fmaxf(n.count[s], 2);
    n.mean[s] = sum[s] / members[s];
  }

  // The deviations' own mean is what rounding left out of the mean. It stays apart: narrow densities multiply it.
  float rest[S], squares[S];
#pragma unroll
  for (int s = 0; s < S; s++) rest[s] = squares[s] = 0;
  slices.sweep([&](const float(&x)[V], unsigned valid, int) {
    const unsigned domain = domain_of<PADDED>(task, valid);
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (!PADDED || has(domain, e)) {
        const float deviation = counted(x[e], valid, e) - n.mean[e % S];
        rest[e % S] += deviation;
        squares[e % S] += deviation * deviation;
      }
    }
  });
  block.template reduce<Sum>(rest);
  block.template reduce<Sum>(squares);
#pragma unroll
  for (int s = 0; s < S; s++) {
    rest[s] /= members[s];
    const float var = squares[s] / (members[s] - 1) + float(task.eps);
    n.rstd[s] = 1 / sqrtf(var > kFar ? kFar : var);
  }

  // The nearest element from above, and from below with its sign changed.
  float above[S], below[S];
#pragma unroll
  for (int s = 0; s < S; s++) above[s] = below[s] = kFar;
  slices.sweep([&](const float(&x)[V], unsigned valid, int) {
    const unsigned domain = domain_of<PADDED>(task, valid);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float s = x[e] - n.x0[e % S], center = n.mean[e % S] + head.center;
      if (PADDED && !has(domain, e)) continue;
      if (s >= center) {
        above[e % S] = fminf(above[e % S], s);
      } else {
        below[e % S] = fminf(below[e % S], -s);
      }
    }
  });
  block.template reduce<Least>(above);
  block.template reduce<Least>(below);
#pragma unroll
  for (int s = 0; s < S; s++) {
    const float center = n.mean[s] + head.center;
    const float nearest = above[s] - center <= below[s] + center ? above[s] : -below[s];
    n.nearest[s] = fabsf(nearest) < kFar ? nearest : 0;
    n.peak[s] = ((n.nearest[s] - n.mean[s]) - head.center - rest[s]) * n.rstd[s];
  }
  return n;
}

// What a density is multiplied with to become a weight, and whether the slice's sum of densities is below eps.
struct Scale {
  float factor;
  bool clamped;

  __device__ static Scale of(const Task& task, const Head& head, float peak, float rstd, float total) {
    if (task.flags & DAAM_SOFTMAX) return {1 / total, false};
    const float least = kHalfLog2E * (peak * peak * head.a + head.spread * rstd * rstd) + head.level;
    const float factor = exp2f(-least) * head.height;
    const bool clamped = total * factor < 1;
    return {clamped ? factor : 1 / total, clamped};
  }
};

// Whether a slice is left as it is, for want of two valid elements.
template <bool PADDED>
__device__ __forceinline__ bool is_skipped(float count) {
  return PADDED && count < 2;
}

}  // namespace cuda
}  // namespace daam
