// The densities of a group's elements, what makes weights of them, and y.
#pragma once

#include "density_statistics.h"
#include "power.h"

namespace {

// Where densities are taken relative to: the centre of the Gaussians, or the slice's element of largest density, d =
// (x - high) scale - shift being the distance from there. In the backward z = d - start is relative to an element even
// if densities are not: what has all the weight is then at 0, and of many equal elements there nothing is left to
// cancel. Seen from the centre z is 0 at peak, and log2 of the density falls by z (z + twice) from there, twice being
// 2 peak.
template <class T>
struct Origin {
  V<T> high, low, scale, shift, start, peak, twice;
  V<T> grad;  // y's gradient at some element, or at that of largest density
};

template <class T>
DAAM_INLINE void set_peak(Origin<T>& o, V<T> peak) {
  constexpr T far = sizeof(T) == 4 ? (T)1e30 : (T)1e150;  // farther than any; finite, so that 0 times it is 0
  peak = peak > far ? splat<T>(far) : peak;
  peak = peak < -far ? splat<T>(-far) : peak;
  o.peak = peak;
  o.twice = 2 * peak;
}

template <class T>
DAAM_INLINE void set_origin(Origin<T>& o, V<T> high, V<T> low) {
  o.high = high;
  o.low = low;
  o.shift = rounded(low * o.scale);
  o.start = V<T>{};
}

// The centre of Gaussians. Good enough where elements are near it.
template <class T>
DAAM_INLINE void origin_at_center(Origin<T>& o, const Statistics<T>& s, V<T> center, V<T> root) {
  o.scale = root * s.rstd;
  o.grad = V<T>{};
  set_origin<T>(o, s.high, s.low + center);
  set_peak<T>(o, V<T>{});
}

// z relative to an element near the centre, densities still to the centre. Where the element's density is below 2^-16 z
// stays relative to the centre: it has none of the weight, and seen from far away, where padding may lie, the sums over
// those that have it would cancel.
template <class T>
DAAM_INLINE void start_at(Origin<T>& o, V<T> x) {
  const V<T> z = (x - o.high) * o.scale - o.shift;
  o.start = keep<T>((Mask<T>)(absolute<T>(z) < 4), z);
  set_peak<T>(o, o.start);
}

// The slice's element of largest density, which is the one nearest to the centre.
template <class T>
struct Nearest {
  V<T> distance, x, grad;
};

// Among the first `most` elements.
template <class T, class L, Padding P, bool BACKWARD>
void find_nearest(
    const Group<T>& g, const Mask<T>& asked, const Statistics<T>& s, int64_t most, Nearest<T>& found) {
  constexpr int N = Vector<T>::N;
  const V<T> centers = s.low + g.heads->center;
  each_row<T, L>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const V<T> high = of_row<T, L>(s.high, r), center = of_row<T, L>(centers, r);
    Nearest<T> best = {splat<T>((T)INFINITY), high, V<T>{}};
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      const V<T> x = within.load(row.x + i * N), distance = absolute<T>((x - high) - center);
      Mask<T> closer = within((Mask<T>)(distance < best.distance));
      if constexpr (P == Padding::kExcluded) closer &= load_mask<T>(row.valid + i * N);
      best.distance = closer ? distance : best.distance;
      best.x = closer ? x : best.x;
      if constexpr (BACKWARD) {
        V<T> grad = within.load(row.grad + i * N);
        if constexpr (P == Padding::kZeros) grad = keep<T>(load_mask<T>(row.valid + i * N), grad);
        best.grad = closer ? grad : best.grad;
      }
    };
    sweep<T, L>(row.n < most ? row.n : most, body, [] {});
    if constexpr (L::kRows) {
      const int lane = smallest_lane(best.distance);
      found.distance[r] = best.distance[lane], found.x[r] = best.x[lane], found.grad[r] = best.grad[lane];
    } else {  // one by one: copied as a whole they would be copied in halves
      found.distance = best.distance;
      found.x = best.x;
      found.grad = best.grad;
    }
  });
}

// The nearest of the first few: where the elements take few values, there is one of those with all the weight.
template <class T, class L, Padding P>
DAAM_INLINE V<T> find_near(const Group<T>& g, const Statistics<T>& s) {
  Nearest<T> near;
  near.distance = near.x = near.grad = V<T>{};
  find_nearest<T, L, P, false>(g, g.lanes(), s, L::kRows ? 4 * Vector<T>::N : 8, near);
  return near.x;
}

template <class T>
DAAM_INLINE void move_origin(
    Origin<T>& o, Mask<T> moved, const Nearest<T>& to, const Statistics<T>& s, V<T> center) {
  const V<T> peak = ((to.x - s.high) - (s.low + center)) * o.scale;
  o.grad = moved ? to.grad : o.grad;
  const V<T> start = o.start, before = o.peak;
  set_origin<T>(o, moved ? to.x : o.high, moved ? V<T>{} : o.low);
  o.start = moved ? V<T>{} : start;
  set_peak<T>(o, moved ? peak : before);
}

// Rounding may hide which of two elements is nearer: no density is above 1.
template <class T, bool EXACT>
DAAM_INLINE V<T> density(V<T> z, V<T> twice) {
  if constexpr (!EXACT) return exp2_minus<T>(z * z);
  return exp2_minus_product<T>(z, z + twice);
}

// Sums over slices of the densities over the one at the origin, and in the backward of those times q, the gradient of
// the weights less its value at the origin. q is written so that neither a constant gradient nor an offset of x cancels.
template <class T>
struct Totals {
  V<T> density, q;
};

template <class T, Padding P>
DAAM_INLINE V<T> relative_q(
    const Row<T>& row, int64_t i, V<T> grad, V<T> from_high, V<T> high, V<T> origin_grad) {
  if constexpr (P == Padding::kNone) return (grad - origin_grad) * high + grad * from_high;
  const Mask<T> valid = load_mask<T>(row.valid + i * Vector<T>::N);
  grad = keep<T>(valid, grad);
  const V<T> q = (grad - origin_grad) * high + keep<T>(valid, grad * from_high);  // what is padding may be infinite
  return P == Padding::kExcluded ? keep<T>(valid, q) : q;
}

// Keeps the densities, under PRODUCT times x in the place of x, and in the backward z and q.
template <class T, class L, Padding P, bool BACKWARD, bool EXACT, bool PRODUCT = false>
void find_densities(const Group<T>& g, const Mask<T>& asked, const Origin<T>& o, Totals<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, L>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    T* const to = PRODUCT ? const_cast<T*>(row.x) : row.density;
    Ahead ahead = g.ahead_x[r];
    const V<T> high = of_row<T, L>(o.high, r), scale = of_row<T, L>(o.scale, r);
    const V<T> shift = of_row<T, L>(o.shift, r), start = of_row<T, L>(o.start, r);
    const V<T> twice = of_row<T, L>(o.peak - o.start, r) * 2;  // 0 where densities are relative to the centre
    const V<T> origin_grad = of_row<T, L>(o.grad, r);
    Sum<T> sum, sum_q;
    const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
      if (!L::kRows || i % kLine == 0) ahead.touch<L>(i);
      const V<T> x = within.load(row.x + i * N), from_high = x - high;
      V<T> d = from_high * scale - shift, m = within(density<T, EXACT>(d, twice));
      if constexpr (P == Padding::kExcluded) m = keep<T>(load_mask<T>(row.valid + i * N), m);
      store<T>(to + i * N, PRODUCT ? m * x : m);
      sum += m;
      if constexpr (BACKWARD) {
        const V<T> q = relative_q<T, P>(row, i, within.load(row.grad + i * N), from_high, high, origin_grad);
        if constexpr (P != Padding::kNone) d = keep<T>(load_mask<T>(row.valid + i * N) | (Mask<T>)(m > 0), d);
        store<T>(row.z + i * N, d - start);
        store<T>(row.q + i * N, q);
        sum_q.block += m * q;
      }
    };
    sweep<T, L, L::kRows ? 4 : 1>(row.n, body, [&]() __attribute__((always_inline)) { sum.flush(), sum_q.flush(); });
    set_sum<T, L>(found.density, r, sum.total);
    if (BACKWARD) set_sum<T, L>(found.q, r, sum_q.total);
  });
}

// Slices whose densities relative to the centre's are too small to be exact: their sum is below that, and where there are
// more than 256 elements, below 2^-10 of each.
template <class T>
constexpr T kLeastTotal = (T)0.25;

template <class T>
DAAM_INLINE Mask<T> too_far(V<T> total, V<T> count) {
  const V<T> least = count * (T)0x1p-10;
  return total < (least > kLeastTotal<T> ? least : splat<T>(kLeastTotal<T>));
}

// What an array of a group's elements has for the first one of each slice that is not padding; 0 where all of it is.
// array_of(row) is where a row has it.
template <class T, class L, Padding P, class Get>
DAAM_INLINE V<T> first_of(const Group<T>& g, Get array_of) {
  constexpr int N = Vector<T>::N;
  V<T> first{};
  if constexpr (L::kRows) {
    for (int r = 0; r < g.count; r++) {
      const Row<T>& row = g.row[r];
      int64_t i = 0;
      if constexpr (P != Padding::kNone)
        while (i < row.n && !row.valid[i]) i++;
      first[r] = i < row.n ? array_of(row)[i] : 0;
    }
    return first;
  }
  const Row<T>& row = g.row[0];
  const T* const from = array_of(row);
  first = load(from);
  if constexpr (P != Padding::kNone) {
    Mask<T> found = load_mask<T>(row.valid);
    first = keep<T>(found, first);
    for (int64_t i = 1; i < row.n && any(~found); i++) {
      const Mask<T> valid = load_mask<T>(row.valid + i * N);
      first = valid & ~found ? load(from + i * N) : first;
      found |= valid;
    }
  }
  return first;
}

template <class T, class L, Padding P>
DAAM_INLINE V<T> first_gradients(const Group<T>& g) {
  return first_of<T, L, P>(g, [](const Row<T>& row) { return row.grad; });
}

template <class T>
struct Normaliser {
  V<T> factor;  // of a density, to be a weight
  Mask<T> clamped;
};

// log2 of the sum of densities over eps and the height where total is 1; below 1 where the height is.
template <class T>
DAAM_INLINE V<T> largest_sum(const Origin<T>& o, V<T> rstd, const Heads<T>& heads) {
  const V<T> from_center = o.peak - o.start;
  return -(from_center * from_center + heads.spread * rstd * rstd * (T)(0.5 * kLog2E) + heads.level);
}

template <class T>
DAAM_INLINE void find_normaliser(
    V<T> total, const Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads, bool softmax, Normaliser<T>& f) {
  f.factor = 1 / total;
  f.clamped = Mask<T>{};
  if (softmax) return;
  const V<T> largest = largest_sum<T>(o, s.rstd, heads);
  if (!any_below<T>(largest, 2) && !any_below<T>(total, kLeastTotal<T>)) return;
  const V<T> power = exp2_minus<T>(absolute<T>(largest)) * heads.height;
  f.clamped = largest <= 0 ? (Mask<T>)(total * power < 1) : (Mask<T>)(total < power);
  f.factor = f.clamped ? (largest <= 0 ? power : 1 / power) : f.factor;
}

// Slices of fewer than two valid elements stay as they are.
template <class T, Padding P>
DAAM_INLINE Mask<T> skipped_slices(V<T> count) {
  if constexpr (P == Padding::kExcluded) return count < 2;
  return Mask<T>{};
}

// y = x w, and the weights where asked for.
template <class T, class L, Padding P, class S, bool STREAM>
void write_output_as(const Group<T>& g, const Normaliser<T>& f, const V<T>& count, bool residual) {
  constexpr int N = Vector<T>::N;
  const Mask<T> skipped = skipped_slices<T, P>(count);
  const V<T> factors = keep<T>(~skipped, f.factor), more = splat<T>(residual);
  const V<T> addends = more + keep<T>(skipped, splat<T>(1));
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> factor = of_row<T, L>(factors, r), added = of_row<T, L>(addends, r);
    if (row.weights) {
      const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
        V<T> w = load(row.density + i * N) * factor;
        if constexpr (P == Padding::kExcluded) w += keep<T>(load_mask<T>(row.valid + i * N), added - more);
        within.template store<false>(row.weights + i * N, w);
      };
      sweep<T, L>(row.n, body, [] {});
    }
    S* const out = static_cast<S*>(row.out);
    Store<T, S, STREAM> store_at;
    const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
      const V<T> x = within.load(row.x + i * N);
      V<T> w = load(row.density + i * N) * factor + added;
      if constexpr (P != Padding::kNone) w = load_mask<T>(row.valid + i * N) ? w : more + 1;
      store_at(within, slot, out + i * N, x * w);
    };
    sweep<T, L, 4>(row.n, body, [] {});
  });
}

template <class T, class L, Padding P>
DAAM_INLINE void write_output(const Group<T>& g, const Normaliser<T>& f, const V<T>& count, bool residual) {
  with_target<T, L, P>(g, [&](auto s, auto stream) __attribute__((always_inline)) {
    write_output_as<T, L, P, decltype(s), decltype(stream)::value>(g, f, count, residual);
  });
}

}  // namespace
