// Density attention of a group of N slices, N being the lanes of a vector: numbers per slice are vectors. The elements
// lie packed in one of two ways. With ROWS each slice is a row of its own, and a sweep goes through one after the other,
// N neighbours of a slice at a time; otherwise a vector holds one element of each slice, and a sweep goes through all.
#pragma once

#include "../density_math.h"
#include "vector.h"

namespace {

using daam::kLog2E;

enum class Padding { kNone, kZeros, kExcluded };

// What the slices of a group have in common with those of other groups: their heads' Gaussians.
template <class T>
struct Heads {
  V<T> center, spread, level;
  V<T> root;       // sqrt(a log2(e) / 2)
  V<T> n;          // elements of a slice
  Mask<T> narrow;  // densities relative to the centre's would lose digits, or all of them
};

// Elements of a slice, or without ROWS of all slices of the group, and where results go.
template <class T>
struct Row {
  int64_t n;  // elements of a slice
  const T *x, *grad;
  const typename Vector<T>::integer* valid;  // all ones or 0, with padding only
  T *density, *z, *q;                        // scratch
  T *out, *weights;                          // out may be where x is
};

// Where the next group lies: touched while this one is worked on.
struct Ahead {
  const char *x, *grad;
  int64_t step;  // bytes from one vector to the next

  template <bool BACKWARD>
  DAAM_INLINE void touch(int64_t i) const {
    __builtin_prefetch(x + i * step);
    if (BACKWARD) __builtin_prefetch(grad + i * step);
  }
};

template <class T>
struct Group {
  int count;  // slices
  Row<T> row[Vector<T>::N];
  Ahead ahead[Vector<T>::N];
  Heads<T> heads;

  DAAM_INLINE Mask<T> lanes() const { return first_lanes<T>(count); }
};

struct Rules {
  double eps;
  bool softmax, residual;
};

// The rows of a group, one after the other; without ROWS all slices are one. Those that are not asked for are left out.
template <class T, bool ROWS, class Body>
DAAM_INLINE void each_row(const Group<T>& g, Mask<T> asked, Body body) {
  if constexpr (!ROWS) return body(0);
  for (int r = 0; r < g.count; r++)
    if (asked[r]) body(r);
}

// What a row needs of numbers per slice, and what it gives to them.
template <class T, bool ROWS>
DAAM_INLINE V<T> of_row(const V<T>& v, int r) {
  if constexpr (ROWS) return splat<T>(v[r]);
  return v;
}
template <class T, bool ROWS>
DAAM_INLINE void set_sum(V<T>& to, int r, V<T> v) {
  if constexpr (ROWS)
    to[r] = sum_of_lanes(v);
  else
    to = v;
}

constexpr int64_t kBlock = 64;  // vectors that are added up before their sum is added to the others'

// All lanes of a vector, or those of a row's last one that are not beyond its end.
struct Whole {
  template <class Lanes>
  DAAM_INLINE Lanes operator()(Lanes v) const {
    return v;
  }
};
template <class T>
struct Part {
  Mask<T> mask;
  DAAM_INLINE V<T> operator()(V<T> v) const { return keep<T>(mask, v); }
  DAAM_INLINE Mask<T> operator()(Mask<T> v) const { return v & mask; }
};

template <int INDEX>
struct Slot {
  static constexpr int index = INDEX;
};

// body(i, within, slot) for every vector i, and after_block() where sums should be moved on. Neighbouring vectors get
// different slots, of which there are SLOTS: a sum for each does not wait for the one before.
template <class T, bool ROWS, int SLOTS = 1, class Body, class AfterBlock>
DAAM_INLINE void sweep(int64_t n, Body body, AfterBlock after_block) {
  constexpr int64_t N = ROWS ? Vector<T>::N : 1;
  const int64_t whole = n / N;
  for (int64_t first = 0; first < whole; first += kBlock) {
    const int64_t end = first + kBlock < whole ? first + kBlock : whole;
    int64_t i = first;
    if constexpr (SLOTS == 4)
      for (; i + 4 <= end; i += 4) {
        body(i, Whole(), Slot<0>());
        body(i + 1, Whole(), Slot<1>());
        body(i + 2, Whole(), Slot<2>());
        body(i + 3, Whole(), Slot<3>());
      }
#pragma GCC unroll 2
    for (; i < end; i++) body(i, Whole(), Slot<0>());
    after_block();
  }
  if (ROWS && whole * N < n) {
    body(whole, Part<T>{first_lanes<T>(n - whole * N)}, Slot<0>());
    after_block();
  }
}

template <class T>
struct Sum {
  V<T> block{}, total{};
  DAAM_INLINE void operator+=(V<T> v) { block += v; }
  DAAM_INLINE void flush() {
    total += block;
    block = V<T>{};
  }
};

// Statistics

// Sums of x - shift and of its square over what the statistics count.
template <class T>
struct Moments {
  V<T> first, second;
};

template <class T, bool ROWS, Padding P>
DAAM_INLINE void find_moments(const Group<T>& g, Mask<T> asked, const V<T>& shifts, Moments<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, ROWS>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const V<T> shift = of_row<T, ROWS>(shifts, r);
    Sum<T> first[4], second[4];
    const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
      V<T> x = load(row.x + i * N);
      if constexpr (P == Padding::kZeros) x = keep<T>(load_mask<T>(row.valid + i * N), x);
      V<T> s = within(x - shift);
      if constexpr (P == Padding::kExcluded) s = keep<T>(load_mask<T>(row.valid + i * N), s);
      first[slot.index].block += s;
      second[slot.index].block += s * s;
    };
    sweep<T, ROWS, 4>(row.n, body, [&]() __attribute__((always_inline)) {
      first[0].total += (first[0].block + first[1].block) + (first[2].block + first[3].block);
      second[0].total += (second[0].block + second[1].block) + (second[2].block + second[3].block);
      for (int j = 0; j < 4; j++) first[j].block = second[j].block = V<T>{};
    });
    set_sum<T, ROWS>(found.first, r, first[0].total);
    set_sum<T, ROWS>(found.second, r, second[0].total);
  });
}

template <class T, bool ROWS, Padding P>
DAAM_INLINE V<T> count_elements(const Group<T>& g) {
  constexpr int N = Vector<T>::N;
  if constexpr (P != Padding::kExcluded) return g.heads.n;
  V<T> counts{};
  each_row<T, ROWS>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    Mask<T> count{};
    const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
      count -= load_mask<T>(g.row[r].valid + i * N);
    };
    sweep<T, ROWS>(g.row[r].n, body, [] {});
    set_sum<T, ROWS>(counts, r, __builtin_convertvector(count, V<T>));
  });
  return counts;
}

// A number near the mean to begin with, from the first few elements.
template <class T, bool ROWS, Padding P>
DAAM_INLINE V<T> guess_means(const Group<T>& g) {
  constexpr int N = Vector<T>::N, most = ROWS ? N : 8;
  V<T> sums{}, counts = splat<T>(1);
  each_row<T, ROWS>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const int64_t some = row.n < most ? row.n : most;
    V<T> sum{}, count{};
    for (int64_t i = 0; i < (ROWS ? 1 : some); i++) {
      V<T> x = load(row.x + i * N);
      if (ROWS) x = keep<T>(first_lanes<T>(some), x);
      if constexpr (P != Padding::kNone) {
        const Mask<T> valid = load_mask<T>(row.valid + i * N);
        x = keep<T>(valid, x);
        count -= __builtin_convertvector(valid, V<T>);
      }
      sum += x;
    }
    set_sum<T, ROWS>(sums, r, sum);
    if constexpr (P == Padding::kExcluded)
      set_sum<T, ROWS>(counts, r, count);
    else if constexpr (ROWS)
      counts[r] = (T)some;
    else
      counts = splat<T>((T)some);
  });
  return sums / (counts > 1 ? counts : splat<T>(1));
}

// A mean as high + low: it is never held in one number, which would cost digits on data with an offset.
template <class T>
struct Statistics {
  V<T> count, high, low, var, rstd;
};

template <class T>
DAAM_INLINE V<T> members_of(V<T> count) {
  return count > 2 ? count : splat<T>(2);
}

template <class T>
DAAM_INLINE Statistics<T> finish_statistics(V<T> shift, const Moments<T>& m, V<T> count, double eps) {
  const V<T> members = members_of<T>(count), offset = m.first / members, squares = m.second - m.first * offset;
  Statistics<T> s;
  s.count = count;
  s.high = shift + offset;
  const V<T> taken = s.high - shift;
  s.low = (shift - (s.high - taken)) + (offset - taken);
  s.var = (squares < 0 ? V<T>{} : squares) / (members - 1) + (T)eps;
  s.rstd = 1 / square_root(s.var);
  return s;
}

template <class T, bool ROWS, Padding P>
DAAM_INLINE Statistics<T> find_statistics(const Group<T>& g, double eps) {
  const V<T> count = count_elements<T, ROWS, P>(g), members = members_of<T>(count);
  V<T> shift = guess_means<T, ROWS, P>(g);
  Moments<T> m{};
  find_moments<T, ROWS, P>(g, g.lanes(), shift, m);
  const Mask<T> far = ~(m.first / members * m.first <= m.second * (T)0.5) & g.lanes();
  if (any(far)) {  // more than a deviation from the mean: the squares would cancel
    shift = far ? shift + m.first / members : shift;
    find_moments<T, ROWS, P>(g, far, shift, m);
  }
  return finish_statistics<T>(shift, m, count, eps);
}

// Densities

// Where densities are taken relative to: a point in the slice's range, or its element of largest density. With
// z = (x - high) scale - shift, log2 of the density falls by z (z + twice) from there, twice being 2 peak.
template <class T>
struct Origin {
  V<T> high, low, scale, shift, peak, twice;
  V<T> grad;  // y's gradient at some element, or at that one
};

template <class T>
DAAM_INLINE void set_origin(Origin<T>& o, V<T> high, V<T> low, V<T> peak) {
  constexpr T far = sizeof(T) == 4 ? (T)1e30 : (T)1e150;  // farther than any; finite, so that 0 times it is 0
  peak = peak > far ? splat<T>(far) : peak;
  peak = peak < -far ? splat<T>(-far) : peak;
  o.high = high;
  o.low = low;
  o.shift = low * o.scale;
  o.peak = peak;
  o.twice = 2 * peak;
}

// The centre of the head's Gaussians. Good enough where elements are near it.
template <class T>
DAAM_INLINE void origin_at_center(Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads) {
  o.scale = heads.root * s.rstd;
  set_origin<T>(o, s.high, s.low + heads.center, V<T>{});
}

// The slice's element of largest density.
template <class T>
struct Nearest {
  V<T> distance, x, grad;
};

template <class T, bool ROWS, Padding P, bool BACKWARD>
DAAM_INLINE void find_nearest(const Group<T>& g, Mask<T> asked, const Statistics<T>& s, Nearest<T>& found) {
  constexpr int N = Vector<T>::N;
  const V<T> centers = s.low + g.heads.center;
  each_row<T, ROWS>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const V<T> high = of_row<T, ROWS>(s.high, r), center = of_row<T, ROWS>(centers, r);
    Nearest<T> best = {splat<T>((T)INFINITY), high, V<T>{}};
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      const V<T> x = load(row.x + i * N), distance = absolute<T>((x - high) - center);
      Mask<T> closer = within((Mask<T>)(distance < best.distance));
      if constexpr (P == Padding::kExcluded) closer &= load_mask<T>(row.valid + i * N);
      best.distance = closer ? distance : best.distance;
      best.x = closer ? x : best.x;
      if constexpr (BACKWARD) {
        V<T> grad = load(row.grad + i * N);
        if constexpr (P == Padding::kZeros) grad = keep<T>(load_mask<T>(row.valid + i * N), grad);
        best.grad = closer ? grad : best.grad;
      }
    };
    sweep<T, ROWS>(row.n, body, [] {});
    if constexpr (ROWS) {
      int lane = 0;
      for (int i = 1; i < N; i++) lane = best.distance[i] < best.distance[lane] ? i : lane;
      found.distance[r] = best.distance[lane], found.x[r] = best.x[lane], found.grad[r] = best.grad[lane];
    } else {
      found = best;
    }
  });
}

template <class T>
DAAM_INLINE void move_origin(
    Origin<T>& o, Mask<T> moved, const Nearest<T>& to, const Statistics<T>& s, const Heads<T>& heads) {
  const V<T> peak = ((to.x - s.high) - (s.low + heads.center)) * o.scale;
  o.grad = moved ? to.grad : o.grad;
  set_origin<T>(o, moved ? to.x : o.high, moved ? V<T>{} : o.low, moved ? peak : o.peak);
}

template <bool EXACT, class Lanes>
DAAM_INLINE Lanes density(Lanes z, Lanes twice) {
  if constexpr (!EXACT) return exp2_minus(z * z);
  const Lanes fall = z * (z + twice);
  return exp2_minus(fall < 0 ? Lanes{} : fall);  // rounding may hide which of two elements is nearer
}

// Sums over slices of the densities over the one at the origin, and in the backward of those times q, the gradient of
// the weights less its value at the origin. q is written so that neither a constant gradient nor an offset of x cancels.
template <class T>
struct Totals {
  V<T> density, q;
};

// Keeps the densities, and in the backward z and q.
template <class T, bool ROWS, Padding P, bool BACKWARD, bool EXACT>
DAAM_INLINE void find_densities(const Group<T>& g, Mask<T> asked, const Origin<T>& o, Totals<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, ROWS>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const Ahead ahead = g.ahead[r];
    const V<T> high = of_row<T, ROWS>(o.high, r), scale = of_row<T, ROWS>(o.scale, r);
    const V<T> shift = of_row<T, ROWS>(o.shift, r), twice = of_row<T, ROWS>(o.twice, r);
    const V<T> origin_grad = of_row<T, ROWS>(o.grad, r);
    Sum<T> sum, sum_q;
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      ahead.touch<BACKWARD>(i);
      const V<T> from_high = load(row.x + i * N) - high;
      V<T> z = from_high * scale - shift, m = within(density<EXACT>(z, twice));
      if constexpr (P == Padding::kExcluded) m = keep<T>(load_mask<T>(row.valid + i * N), m);
      store<T>(row.density + i * N, m);
      sum += m;
      if constexpr (BACKWARD) {
        V<T> grad = load(row.grad + i * N), q;
        if constexpr (P == Padding::kNone) {
          q = (grad - origin_grad) * high + grad * from_high;
        } else {  // what is padding may be infinite
          const Mask<T> valid = load_mask<T>(row.valid + i * N);
          grad = keep<T>(valid, grad);
          q = (grad - origin_grad) * high + keep<T>(valid, grad * from_high);
          if constexpr (P == Padding::kExcluded) q = keep<T>(valid, q);
          z = keep<T>(valid | (Mask<T>)(m > 0), z);
        }
        store<T>(row.z + i * N, z);
        store<T>(row.q + i * N, q);
        sum_q.block += m * q;
      }
    };
    sweep<T, ROWS>(row.n, body, [&]() __attribute__((always_inline)) { sum.flush(), sum_q.flush(); });
    set_sum<T, ROWS>(found.density, r, sum.total);
    if (BACKWARD) set_sum<T, ROWS>(found.q, r, sum_q.total);
  });
}

// Slices whose densities relative to the centre's are too small to be exact.
template <class T>
DAAM_INLINE Mask<T> too_far(V<T> total, V<T> count) {
  const V<T> least = count * (T)0x1p-10;
  return total < (least > (T)0.25 ? least : splat<T>((T)0.25));
}

// y's gradient at the first element of each slice that is not padding; 0 where all of it is.
template <class T, bool ROWS, Padding P>
DAAM_INLINE V<T> first_gradients(const Group<T>& g) {
  constexpr int N = Vector<T>::N;
  V<T> first{};
  if constexpr (ROWS) {
    for (int r = 0; r < g.count; r++) {
      const Row<T>& row = g.row[r];
      int64_t i = 0;
      if constexpr (P != Padding::kNone)
        while (i < row.n && !row.valid[i]) i++;
      first[r] = i < row.n ? row.grad[i] : 0;
    }
    return first;
  }
  const Row<T>& row = g.row[0];
  first = load(row.grad);
  if constexpr (P != Padding::kNone) {
    Mask<T> found = load_mask<T>(row.valid);
    first = keep<T>(found, first);
    for (int64_t i = 1; i < row.n && any(~found); i++) {
      const Mask<T> valid = load_mask<T>(row.valid + i * N);
      first = valid & ~found ? load(row.grad + i * N) : first;
      found |= valid;
    }
  }
  return first;
}

// Weights

template <class T>
struct Normaliser {
  V<T> factor;  // of a density, to be a weight
  Mask<T> clamped;
};

template <class T>
DAAM_INLINE Normaliser<T> find_normaliser(
    V<T> total, const Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads, bool softmax) {
  Normaliser<T> f = {1 / total, Mask<T>{}};
  if (softmax) return f;
  // The sum of densities is total 2^largest eps.
  const V<T> largest = -(o.peak * o.peak + heads.spread * s.rstd * s.rstd * (T)(0.5 * kLog2E) + heads.level);
  if (!any((Mask<T>)(largest < 2) | (Mask<T>)(total < (T)0.25))) return f;
  const V<T> power = exp2_minus(absolute<T>(largest));
  f.clamped = largest < 0 ? (Mask<T>)(total * power < 1) : (Mask<T>)(total < power);
  f.factor = f.clamped ? (largest < 0 ? power : 1 / power) : f.factor;
  return f;
}

// Slices of fewer than two valid elements stay as they are.
template <class T, Padding P>
DAAM_INLINE Mask<T> skipped_slices(V<T> count) {
  if constexpr (P == Padding::kExcluded) return count < 2;
  return Mask<T>{};
}

// y = x w, and the weights where asked for.
template <class T, bool ROWS, Padding P>
DAAM_INLINE void write_output(const Group<T>& g, const Normaliser<T>& f, V<T> count, bool residual) {
  constexpr int N = Vector<T>::N;
  const Mask<T> skipped = skipped_slices<T, P>(count);
  const V<T> factors = keep<T>(~skipped, f.factor), more = splat<T>(residual);
  const V<T> addends = more + keep<T>(skipped, splat<T>(1));
  each_row<T, ROWS>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> factor = of_row<T, ROWS>(factors, r), added = of_row<T, ROWS>(addends, r);
    if (row.weights) {
      const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
        V<T> w = load(row.density + i * N) * factor;
        if constexpr (P == Padding::kExcluded) w += keep<T>(load_mask<T>(row.valid + i * N), added - more);
        store<T>(row.weights + i * N, w);
      };
      sweep<T, ROWS>(row.n, body, [] {});
    }
    const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
      const V<T> x = load(row.x + i * N);
      V<T> w = load(row.density + i * N) * factor + added;
      if constexpr (P != Padding::kNone) w = load_mask<T>(row.valid + i * N) ? w : more + 1;
      store<T>(row.out + i * N, x * w);
    };
    sweep<T, ROWS, 4>(row.n, body, [] {});
  });
}

// Gradients

template <class T>
DAAM_INLINE V<T> mean_of_q(const Totals<T>& totals, const Normaliser<T>& f, const Origin<T>& o) {
  return f.clamped ? -(o.grad * o.high) : totals.q * f.factor;  // where clamped, p = w q, and not w (q - mean)
}

// Sums over slices of p, the gradient of the logarithm of the density, times 1, z and z (z + twice).
template <class T>
struct Slopes {
  V<T> t0, p1, p2;
};

// Writes p, still without the normaliser's factor, over q.
template <class T, bool ROWS>
DAAM_INLINE void find_slopes(const Group<T>& g, const Origin<T>& o, const V<T>& mean_q, Slopes<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, ROWS>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> mean = of_row<T, ROWS>(mean_q, r), twice = of_row<T, ROWS>(o.twice, r);
    Sum<T> t0, p1, p2;
    const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
      const V<T> z = load(row.z + i * N), p = load(row.density + i * N) * (load(row.q + i * N) - mean), pz = p * z;
      store<T>(row.q + i * N, p);
      t0 += p;
      p1 += pz;
      p2.block += pz * (z + twice);
    };
    sweep<T, ROWS>(row.n, body, [&]() __attribute__((always_inline)) { t0.flush(), p1.flush(), p2.flush(); });
    set_sum<T, ROWS>(found.t0, r, t0.total);
    set_sum<T, ROWS>(found.p1, r, p1.total);
    set_sum<T, ROWS>(found.p2, r, p2.total);
  });
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
DAAM_INLINE Through<T> gradient_through(
    const Slopes<T>& raw, const Normaliser<T>& f, const Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads,
    bool residual, SliceSums<T>& sums) {
  constexpr T L = (T)(0.5 * kLog2E);
  const Mask<T> live = ~skipped_slices<T, P>(s.count);
  const V<T> members = members_of<T>(s.count), factor = keep<T>(live, f.factor);
  // Without the clamp the p of a slice sum to 0: rounding must not say otherwise.
  const V<T> t0 = keep<T>(f.clamped & live, raw.t0 * factor);
  const V<T> p1 = keep<T>(live, raw.p1 * factor) + o.peak * t0;
  const V<T> p2 = keep<T>(live, raw.p2 * factor) + o.peak * o.peak * t0;
  const V<T> t0_v = t0 * s.rstd * s.rstd, from_mean = ((o.high - s.high) + (o.low - s.low)) * o.scale;
  sums = {t0, t0_v, p1 * s.rstd / heads.root, p2 / (heads.root * heads.root)};
  Through<T> t;
  t.factor = factor;
  t.added = splat<T>(residual) + keep<T>(~live, splat<T>(1));
  t.slope = -factor * o.scale / L;
  t.linear = (p2 / L + heads.spread * t0_v) * s.rstd / (heads.root * (members - 1));
  t.constant = o.scale * p1 / (L * members) + t.linear * from_mean;
  return t;
}

template <class T, bool ROWS, Padding P>
DAAM_INLINE void write_gradient(const Group<T>& g, const Through<T>& t, const Origin<T>& o, bool residual) {
  constexpr int N = Vector<T>::N;
  const V<T> more = splat<T>(residual);
  each_row<T, ROWS>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> factor = of_row<T, ROWS>(t.factor, r), added = of_row<T, ROWS>(t.added, r);
    const V<T> slope = of_row<T, ROWS>(t.slope, r), peak = of_row<T, ROWS>(o.peak, r);
    const V<T> constant = of_row<T, ROWS>(t.constant, r), linear = of_row<T, ROWS>(t.linear, r);
    const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
      const V<T> grad = load(row.grad + i * N), z = load(row.z + i * N), p = load(row.q + i * N) * slope;
      V<T> d = grad * (load(row.density + i * N) * factor + added) + (linear * z + constant);
      if constexpr (P == Padding::kExcluded) {
        d += p * (z + peak);
        d = load_mask<T>(row.valid + i * N) ? d : grad * (more + 1);
      } else {
        if constexpr (P == Padding::kZeros) d = load_mask<T>(row.valid + i * N) ? d : grad * (more + 1);
        d += p * (z + peak);
      }
      store<T>(row.out + i * N, d);
    };
    sweep<T, ROWS>(row.n, body, [] {});
  });
}

// Whole slices

template <class T>
struct Density {
  Statistics<T> statistics;
  Origin<T> origin;
  Totals<T> totals;
};

template <class T, bool ROWS, Padding P, bool BACKWARD>
DAAM_INLINE Density<T> evaluate(const Group<T>& g, double eps) {
  Density<T> d{};
  d.statistics = find_statistics<T, ROWS, P>(g, eps);
  origin_at_center<T>(d.origin, d.statistics, g.heads);
  if constexpr (BACKWARD) d.origin.grad = first_gradients<T, ROWS, P>(g);
  const Mask<T> lanes = g.lanes(), easy = lanes & ~g.heads.narrow;
  Mask<T> moved = lanes & g.heads.narrow;
  if (any(easy)) {
    find_densities<T, ROWS, P, BACKWARD, false>(g, easy, d.origin, d.totals);
    moved |= easy & too_far<T>(d.totals.density, d.statistics.count);
  }
  if (any(moved)) {
    Nearest<T> to{};
    find_nearest<T, ROWS, P, BACKWARD>(g, moved, d.statistics, to);
    move_origin<T>(d.origin, moved, to, d.statistics, g.heads);
    find_densities<T, ROWS, P, BACKWARD, true>(g, moved, d.origin, d.totals);
  }
  return d;
}

template <class T, bool ROWS, Padding P>
void forward_group(const Group<T>& g, const Rules& rules) {
  const Density<T> d = evaluate<T, ROWS, P, false>(g, rules.eps);
  const Normaliser<T> f = find_normaliser<T>(d.totals.density, d.origin, d.statistics, g.heads, rules.softmax);
  write_output<T, ROWS, P>(g, f, d.statistics.count, rules.residual);
}

template <class T, bool ROWS, Padding P>
void backward_group(const Group<T>& g, const Rules& rules, SliceSums<T>& sums) {
  const Density<T> d = evaluate<T, ROWS, P, true>(g, rules.eps);
  const Normaliser<T> f = find_normaliser<T>(d.totals.density, d.origin, d.statistics, g.heads, rules.softmax);
  const V<T> mean_q = mean_of_q<T>(d.totals, f, d.origin);
  Slopes<T> raw{};
  find_slopes<T, ROWS>(g, d.origin, mean_q, raw);
  const Through<T> t = gradient_through<T, P>(raw, f, d.origin, d.statistics, g.heads, rules.residual, sums);
  write_gradient<T, ROWS, P>(g, t, d.origin, rules.residual);
}

}  // namespace
