// dx of a group, and what its slices add to the gradients of the parameters.
#pragma once

#include "density_weights.h"

namespace {

template <class T>
DAAM_INLINE V<T> mean_of_q(const Totals<T>& totals, const Normaliser<T>& f, const Origin<T>& o) {
  return f.clamped ? -(o.grad * o.high) : totals.q * f.factor;  // where clamped, p = w q, and not w (q - mean)
}

// Sums over slices of p, the gradient of the logarithm of the density, times 1, z and z (z + twice).
template <class T>
struct Slopes {
  V<T> t0, p1, p2;
};

// The first of them: p is w (q - mean), but for the normaliser's factor.
template <class Lanes>
DAAM_INLINE Lanes sum_of_slopes(const Lanes& of_densities, const Lanes& of_q, const Lanes& mean_q) {
  return of_q - mean_q * of_densities;
}

// Finds the other two, of the last row first: what rows keep is more than the L1 cache has room for, so the newest is read
// before it is gone. Writes p, still without the normaliser's factor, over q. Columns ask for the next gradients here,
// rows for every other line of them, and for the next x in the sweep before: a processor can wait for some twenty lines
// at a time, and those of both at once would be more.
template <class T, class L>
void find_slopes(const Group<T>& g, const Origin<T>& o, const V<T>& mean_q, Slopes<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, L, true>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> mean = of_row<T, L>(mean_q, r);
    Ahead ahead = g.ahead_grad[r];
    Sum<T> p1, p2;
    const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
      if (!L::kRows || i % (2 * kLine) == 0) ahead.touch<L>(i);
      const V<T> z = load(row.z + i * N), p = load(row.density + i * N) * (load(row.q + i * N) - mean), pz = p * z;
      store<T>(row.q + i * N, p);
      p1 += pz;
      p2.block += pz * z;
    };
    sweep<T, L>(row.n, body, [&]() __attribute__((always_inline)) { p1.flush(), p2.flush(); });
    set_sum<T, L>(found.p1, r, p1.total);
    set_sum<T, L>(found.p2, r, p2.total);
  });
  found.p2 += o.twice * found.p1;
}

// What each slice adds to its head's sums: see HeadSums.
template <class T>
struct SliceSums {
  V<T> t0, t0_v, u1_v, u2_v;
};

// How y's gradient reaches x: directly, by p, and through the mean and the variance.
template <class T>
struct Through {
  V<T> factor, added;     // of the gradient itself: the weight, and what is added to it
  V<T> slope;             // of p (z + peak)
  V<T> constant, linear;  // linear: of z
};

template <class T, Padding P>
DAAM_INLINE void find_through(
    const Slopes<T>& raw, const Normaliser<T>& f, const Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads,
    bool residual, SliceSums<T>& sums, Through<T>& t) {
  constexpr T inverse = (T)(2 / kLog2E);
  const Mask<T> live = ~skipped_slices<T, P>(s.count.n);
  const V<T> factor = keep<T>(live, f.factor), scale = o.scale * inverse;
  const V<T> from_mean = ((o.high - s.high) + (o.low - s.low)) * o.scale + o.start;
  V<T> p1 = keep<T>(live, raw.p1 * factor), p2 = keep<T>(live, raw.p2 * factor), of_variance = p2 * inverse;
  V<T> t0{}, t0_v{};
  // Without the clamp the p of a slice sum to 0: rounding must not say otherwise.
  const Mask<T> clamped = f.clamped & live;
  if (any(clamped)) {
    t0 = keep<T>(clamped, raw.t0 * factor);
    t0_v = t0 * s.rstd * s.rstd;
    p1 += o.peak * t0;
    p2 += o.peak * (o.peak * t0);  // far away t0 is 0, and the square of the peak may be infinite
    of_variance = p2 * inverse + heads.spread * t0_v;
  }
  sums.t0 = t0;
  sums.t0_v = t0_v;
  sums.u1_v = p1 * s.rstd * heads.inverse_root;
  sums.u2_v = p2 * heads.inverse_root * heads.inverse_root;
  t.factor = factor;
  t.added = splat<T>(residual) + keep<T>(~live, splat<T>(1));
  t.slope = -factor * scale;
  t.linear = of_variance * (s.rstd * heads.inverse_root * s.count.free_share);
  t.constant = p1 * (scale * s.count.share) + t.linear * from_mean;
}

template <class T, class L, Padding P, class S, bool STREAM>
void write_gradient_as(const Group<T>& g, const Through<T>& t, const Origin<T>& o, bool residual) {
  constexpr int N = Vector<T>::N;
  const V<T> more = splat<T>(residual);
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> factor = of_row<T, L>(t.factor, r), added = of_row<T, L>(t.added, r);
    const V<T> slope = of_row<T, L>(t.slope, r), peak = of_row<T, L>(o.peak, r);
    const V<T> constant = of_row<T, L>(t.constant, r), linear = of_row<T, L>(t.linear, r);
    S* const out = static_cast<S*>(row.out);
    Ahead ahead = g.ahead_grad[r];
    Store<T, S, STREAM> store_at;
    const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
      if (L::kRows && i % (2 * kLine) == kLine) ahead.touch<L>(i);  // the other lines
      const V<T> grad = within.load(row.grad + i * N), z = load(row.z + i * N), p = load(row.q + i * N) * slope;
      V<T> d = grad * (load(row.density + i * N) * factor + added) + (linear * z + constant);
      if constexpr (P == Padding::kExcluded) {
        d += p * (z + peak);
        d = load_mask<T>(row.valid + i * N) ? d : grad * (more + 1);
      } else {
        if constexpr (P == Padding::kZeros) d = load_mask<T>(row.valid + i * N) ? d : grad * (more + 1);
        d += p * (z + peak);
      }
      store_at(within, slot, out + i * N, d);
    };
    sweep<T, L, L::kRows ? 4 : 1>(row.n, body, [] {});
  });
}

template <class T, class L, Padding P>
DAAM_INLINE void write_gradient(const Group<T>& g, const Through<T>& t, const Origin<T>& o, bool residual) {
  with_target<T, L, P>(g, [&](auto s, auto stream) __attribute__((always_inline)) {
    write_gradient_as<T, L, P, decltype(s), decltype(stream)::value>(g, t, o, residual);
  });
}

}  // namespace
