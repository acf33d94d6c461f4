// Density attention of one group of slices that lies packed in memory: vectors of N numbers, one after the other.
// With ROWS the group is one slice and a vector holds N neighbours of it; otherwise it is N slices, and a vector holds
// one element of each. Numbers per slice are vectors in both cases, so one body serves both.
#pragma once

#include "../density_math.h"
#include "vector.h"

namespace {

using daam::kLog2E;

enum class Padding { kNone, kZeros, kExcluded };

// One head's Gaussians, and what about them is the same for all of its slices.
template <class T>
struct Head {
  T a, center, spread, level;
  T root;            // sqrt(a log2(e) / 2)
  bool narrow;       // densities relative to the centre's would lose digits, or all of them
  int64_t start, n;  // its chunk of R
};

template <class T>
struct Group {
  const T* x;
  const T* grad;
  const typename Vector<T>::integer* valid;  // all ones or 0, with padding only
  int64_t n;                                 // elements of a slice
  Mask<T> lanes;                             // those that hold slices; only not with ROWS
};

struct Rules {
  double eps;
  bool softmax, residual;
};

// Where the next group lies: touched while this one is worked on.
struct Ahead {
  const char* x = nullptr;
  const char* grad = nullptr;
  int64_t step = 0;  // bytes from one vector to the next

  template <bool BACKWARD>
  DAAM_INLINE void touch(int64_t i) const {
    __builtin_prefetch(x + i * step);
    if (BACKWARD) __builtin_prefetch(grad + i * step);
  }
};

constexpr int64_t kBlock = 64;  // vectors that are added up before their sum is added to the others'

// The whole vectors of a group, and the last one of a row, of which some lanes are beyond the slice.
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

template <class T, bool ROWS>
DAAM_INLINE V<T> across(V<T> v) {
  if constexpr (ROWS) return splat<T>(sum_of_lanes<T>(v));
  return v;
}

// Sums of x - shift and of its square over what the statistics count.
template <class T>
struct Moments {
  V<T> first, second;
};

template <class T, bool ROWS, Padding P>
DAAM_INLINE Moments<T> moments(const Group<T>& g, V<T> shift) {
  constexpr int N = Vector<T>::N;
  Sum<T> first[4], second[4];
  const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
    V<T> x = load(g.x + i * N);
    if constexpr (P == Padding::kZeros) x = keep<T>(load_mask<T>(g.valid + i * N), x);
    V<T> s = within(x - shift);
    if constexpr (P == Padding::kExcluded) s = keep<T>(load_mask<T>(g.valid + i * N), s);
    first[slot.index] += s;
    second[slot.index].block += s * s;
  };
  sweep<T, ROWS, 4>(g.n, body, [&]() __attribute__((always_inline)) {
    first[0].total += (first[0].block + first[1].block) + (first[2].block + first[3].block);
    second[0].total += (second[0].block + second[1].block) + (second[2].block + second[3].block);
    for (int j = 0; j < 4; j++) first[j].block = second[j].block = V<T>{};
  });
  return {across<T, ROWS>(first[0].total), across<T, ROWS>(second[0].total)};
}

template <class T, bool ROWS, Padding P>
DAAM_INLINE V<T> count_elements(const Group<T>& g) {
  constexpr int N = Vector<T>::N;
  if constexpr (P != Padding::kExcluded) return splat<T>((T)g.n);
  Mask<T> count{};
  const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) { count -= load_mask<T>(g.valid + i * N); };
  sweep<T, ROWS>(g.n, body, [] {});
  return across<T, ROWS>(__builtin_convertvector(count, V<T>));
}

// A mean as high + low: it is never held in one number, which would cost digits on data with an offset.
template <class T>
struct Statistics {
  V<T> count, high, low, var;
};

// A number near the mean to begin with, from the first few elements.
template <class T, bool ROWS, Padding P>
DAAM_INLINE V<T> guess_mean(const Group<T>& g) {
  constexpr int N = Vector<T>::N;
  const int64_t some = ROWS ? (g.n < N ? g.n : N) : (g.n < 8 ? g.n : 8);
  V<T> sum{}, count{};
  for (int64_t i = 0; i < (ROWS ? 1 : some); i++) {
    V<T> x = load(g.x + i * N);
    if (ROWS) x = keep<T>(first_lanes<T>(some), x);
    if constexpr (P != Padding::kNone) {
      const Mask<T> valid = load_mask<T>(g.valid + i * N);
      x = keep<T>(valid, x);
      if constexpr (P == Padding::kExcluded) count -= __builtin_convertvector(valid, V<T>);
    }
    sum += x;
  }
  if constexpr (P != Padding::kExcluded) return across<T, ROWS>(sum) / (T)some;
  count = across<T, ROWS>(count);
  return across<T, ROWS>(sum) / (count > 1 ? count : splat<T>(1));
}

template <class T>
DAAM_INLINE Statistics<T> finish_statistics(V<T> shift, Moments<T> m, V<T> count, double eps) {
  const V<T> members = count > 2 ? count : splat<T>(2);
  const V<T> offset = m.first / members, squares = m.second - m.first * offset;
  Statistics<T> s;
  s.count = count;
  s.high = shift + offset;
  const V<T> taken = s.high - shift;
  s.low = (shift - (s.high - taken)) + (offset - taken);
  s.var = (squares < 0 ? V<T>{} : squares) / (members - 1) + (T)eps;
  return s;
}

template <class T, bool ROWS, Padding P>
DAAM_INLINE Statistics<T> statistics(const Group<T>& g, double eps) {
  const V<T> count = count_elements<T, ROWS, P>(g), members = count > 2 ? count : splat<T>(2);
  V<T> shift = guess_mean<T, ROWS, P>(g);
  Moments<T> m = moments<T, ROWS, P>(g, shift);
  const Mask<T> far = ~(m.first / members * m.first <= m.second * (T)0.5);
  if (any(far)) {  // more than a deviation from the mean: the squares would cancel
    shift = far ? shift + m.first / members : shift;
    m = moments<T, ROWS, P>(g, shift);
  }
  return finish_statistics<T>(shift, m, count, eps);
}

// Where densities are taken relative to: a point of the slice's range, or its element of largest density. With
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
DAAM_INLINE Origin<T> origin_at_center(const Statistics<T>& s, const Head<T>& head) {
  Origin<T> o;
  o.scale = head.root / square_root(s.var);
  set_origin<T>(o, s.high, s.low + head.center, V<T>{});
  return o;
}

// The slice's element of largest density, for the slices of a mask.
template <class T>
struct Nearest {
  V<T> distance, x, grad;
};

template <class T, bool ROWS, Padding P, bool BACKWARD>
DAAM_INLINE Nearest<T> nearest(const Group<T>& g, const Statistics<T>& s, const Head<T>& head) {
  constexpr int N = Vector<T>::N;
  const V<T> center = s.low + head.center;
  Nearest<T> best = {splat<T>((T)INFINITY), s.high, V<T>{}};
  const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
    const V<T> x = load(g.x + i * N), distance = absolute<T>((x - s.high) - center);
    Mask<T> closer = within((Mask<T>)(distance < best.distance));
    if constexpr (P == Padding::kExcluded) closer &= load_mask<T>(g.valid + i * N);
    best.distance = closer ? distance : best.distance;
    best.x = closer ? x : best.x;
    if constexpr (BACKWARD) {
      V<T> grad = load(g.grad + i * N);
      if constexpr (P == Padding::kZeros) grad = keep<T>(load_mask<T>(g.valid + i * N), grad);
      best.grad = closer ? grad : best.grad;
    }
  };
  sweep<T, ROWS>(g.n, body, [] {});
  if constexpr (ROWS) {
    int lane = 0;
    for (int i = 1; i < N; i++) lane = best.distance[i] < best.distance[lane] ? i : lane;
    best = {splat<T>(best.distance[lane]), splat<T>(best.x[lane]), splat<T>(best.grad[lane])};
  }
  return best;
}

template <class T>
DAAM_INLINE void move_origin(Origin<T>& o, Mask<T> moved, Nearest<T> to, const Statistics<T>& s, const Head<T>& head) {
  const V<T> peak = ((to.x - s.high) - (s.low + head.center)) * o.scale;
  o.grad = moved ? to.grad : o.grad;
  set_origin<T>(o, moved ? to.x : o.high, moved ? V<T>{} : o.low, moved ? peak : o.peak);
}

template <class T, bool EXACT>
DAAM_INLINE V<T> density(V<T> z, const Origin<T>& o) {
  if constexpr (!EXACT) return exp2_negative(-(z * z));
  const V<T> rise = -(z * (z + o.twice));
  return exp2_negative(rise > 0 ? V<T>{} : rise);  // rounding may hide which of two elements is nearer
}

// Densities over the one at the origin, stored; and their sum. In the backward also z, and q, the gradient of the
// weights less its value at the origin (written so that neither a constant gradient nor an offset of x cancels), whose
// weighted sum comes second.
template <class T>
struct Scratch {
  T *density, *z, *q;
};

template <class T>
struct Totals {
  V<T> density, q;
};

template <class T, bool ROWS, Padding P, bool BACKWARD, bool EXACT>
DAAM_INLINE Totals<T> densities(const Group<T>& g, const Origin<T>& o, const Scratch<T>& scratch, const Ahead& ahead) {
  constexpr int N = Vector<T>::N;
  Sum<T> sum, sum_q;
  const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
    ahead.touch<BACKWARD>(i);
    const V<T> from_high = load(g.x + i * N) - o.high;
    V<T> z = from_high * o.scale - o.shift;
    V<T> m = within(density<T, EXACT>(z, o));
    if constexpr (P == Padding::kExcluded) m = keep<T>(load_mask<T>(g.valid + i * N), m);
    store<T>(scratch.density + i * N, m);
    sum += m;
    if constexpr (BACKWARD) {
      V<T> grad = load(g.grad + i * N), q;
      if constexpr (P == Padding::kNone) {
        q = (grad - o.grad) * o.high + grad * from_high;
      } else {  // what is padding may be infinite
        const Mask<T> valid = load_mask<T>(g.valid + i * N);
        grad = keep<T>(valid, grad);
        q = (grad - o.grad) * o.high + keep<T>(valid, grad * from_high);
        if constexpr (P == Padding::kExcluded) q = keep<T>(valid, q);
        z = keep<T>(valid | (Mask<T>)(m > 0), z);
      }
      store<T>(scratch.z + i * N, z);
      store<T>(scratch.q + i * N, q);
      sum_q.block += m * q;
    }
  };
  sweep<T, ROWS>(g.n, body, [&]() __attribute__((always_inline)) { sum.flush(), sum_q.flush(); });
  return {across<T, ROWS>(sum.total), BACKWARD ? across<T, ROWS>(sum_q.total) : V<T>{}};
}

// Slices whose densities relative to the centre's are too small to be exact.
template <class T>
DAAM_INLINE Mask<T> too_far(V<T> total, V<T> count) {
  const V<T> least = count * (T)0x1p-10;
  return total < (least > (T)0.25 ? least : splat<T>((T)0.25));
}

template <class T>
struct Normaliser {
  V<T> factor;  // of a density, to be a weight
  Mask<T> clamped;
};

template <class T>
DAAM_INLINE Normaliser<T> normaliser(V<T> total, const Origin<T>& o, V<T> var, const Head<T>& head, bool softmax) {
  Normaliser<T> f = {1 / total, Mask<T>{}};
  if (softmax) return f;
  // The sum of densities is total 2^largest eps.
  const V<T> largest = -(o.peak * o.peak + head.spread / var * (T)(0.5 * kLog2E) + head.level);
  const V<T> power = exp2_negative(-absolute<T>(largest));
  f.clamped = largest < 0 ? (Mask<T>)(total * power < 1) : (Mask<T>)(total < power);
  f.factor = f.clamped ? (largest < 0 ? power : 1 / power) : f.factor;
  return f;
}

template <class T, Padding P>
DAAM_INLINE Mask<T> skipped_slices(V<T> count) {
  if constexpr (P == Padding::kExcluded) return count < 2;
  return Mask<T>{};
}

// y = x w, over x or elsewhere, and the weights where asked for.
template <class T, bool ROWS, Padding P>
DAAM_INLINE void weigh(
    const Group<T>& g, const Normaliser<T>& f, Mask<T> skipped, bool residual, const T* densities, T* y, T* weights) {
  constexpr int N = Vector<T>::N;
  const V<T> factor = keep<T>(~skipped, f.factor), more = splat<T>(residual);
  const V<T> added = skipped ? more + 1 : more;
  if (weights)
    sweep<T, ROWS>(
        g.n,
        [&](int64_t i, auto, auto) __attribute__((always_inline)) {
          V<T> w = load(densities + i * N) * factor;
          if constexpr (P == Padding::kExcluded) {
            const V<T> one = keep<T>(load_mask<T>(g.valid + i * N), splat<T>(1));
            w = skipped ? one : w;
          }
          store<T>(weights + i * N, w);
        },
        [] {});
  sweep<T, ROWS>(
      g.n,
      [&](int64_t i, auto, auto) __attribute__((always_inline)) {
        const V<T> x = load(g.x + i * N);
        V<T> w = load(densities + i * N) * factor + added;
        if constexpr (P != Padding::kNone) w = load_mask<T>(g.valid + i * N) ? w : more + 1;
        store<T>(y + i * N, x * w);
      },
      [] {});
}

// Sums over the slices of a head. Lanes are added at the end, in their order.
template <class T, bool ROWS>
struct Accumulated {
  typename Vector<T>::wide t0{}, t0_v{}, u1_v{}, u2_v{};
};

template <class T, bool ROWS>
DAAM_INLINE void accumulate(typename Vector<T>::wide& sum, V<T> v, Mask<T> live) {
  v = keep<T>(live, v);
  if constexpr (ROWS)
    sum[0] += v[0];
  else
    sum += __builtin_convertvector(v, typename Vector<T>::wide);
}

// p, the gradient of the logarithm of the density, over q in memory; its sums with 1, z and z (z + twice).
template <class T>
struct Slopes {
  V<T> t0, p1, p2;
};

template <class T, bool ROWS>
DAAM_INLINE Slopes<T> slopes(int64_t n, const Origin<T>& o, const Scratch<T>& scratch, V<T> mean_q) {
  constexpr int N = Vector<T>::N;
  Sum<T> t0, p1, p2;
  const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
    const V<T> z = load(scratch.z + i * N), p = load(scratch.density + i * N) * (load(scratch.q + i * N) - mean_q);
    const V<T> pz = p * z;
    store<T>(scratch.q + i * N, p);
    t0 += p;
    p1 += pz;
    p2.block += pz * (z + o.twice);
  };
  sweep<T, ROWS>(n, body, [&]() __attribute__((always_inline)) { t0.flush(), p1.flush(), p2.flush(); });
  return {across<T, ROWS>(t0.total), across<T, ROWS>(p1.total), across<T, ROWS>(p2.total)};
}

// What of the incoming gradient reaches x through the mean, the variance and the densities, per slice.
template <class T>
struct Through {
  V<T> factor, constant, linear, slope, added;  // slope: of p (z + peak); linear: of z
};

template <class T, bool ROWS, Padding P>
DAAM_INLINE Through<T> gradient_through(
    const Slopes<T>& raw, const Normaliser<T>& f, const Origin<T>& o, const Statistics<T>& s, const Head<T>& head,
    bool residual, Mask<T> lanes, Accumulated<T, ROWS>& sums) {
  constexpr T L = (T)(0.5 * kLog2E);
  const Mask<T> skipped = skipped_slices<T, P>(s.count), live = ~skipped & lanes;
  const V<T> members = s.count > 2 ? s.count : splat<T>(2), rstd = 1 / square_root(s.var);
  const V<T> factor = keep<T>(~skipped, f.factor);
  // Without the clamp the p of a slice sum to 0: rounding must not say otherwise.
  const V<T> t0 = keep<T>(f.clamped & ~skipped, raw.t0 * factor);
  const V<T> p1 = keep<T>(~skipped, raw.p1 * factor) + o.peak * t0;
  const V<T> p2 = keep<T>(~skipped, raw.p2 * factor) + o.peak * o.peak * t0;
  const V<T> t0_v = t0 * rstd * rstd;
  accumulate<T, ROWS>(sums.t0, t0, live);
  accumulate<T, ROWS>(sums.t0_v, t0_v, live);
  accumulate<T, ROWS>(sums.u1_v, p1 * rstd / head.root, live);
  accumulate<T, ROWS>(sums.u2_v, p2 / (head.root * head.root), live);
  Through<T> t;
  t.factor = factor;
  t.linear = (p2 / L + head.spread * t0_v) * rstd / (head.root * (members - 1));
  const V<T> from_mean = ((o.high - s.high) + (o.low - s.low)) * o.scale;
  t.constant = o.scale * p1 / (L * members) + t.linear * from_mean;
  t.slope = -factor * o.scale / L;
  const V<T> more = splat<T>(residual);
  t.added = skipped ? more + 1 : more;
  return t;
}

template <class T, bool ROWS, Padding P>
DAAM_INLINE void write_gradient(
    const Group<T>& g, const Through<T>& t, const Origin<T>& o, const Scratch<T>& scratch, bool residual, T* dx) {
  constexpr int N = Vector<T>::N;
  const V<T> more = splat<T>(residual);
  const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
    const V<T> grad = load(g.grad + i * N), z = load(scratch.z + i * N), p = load(scratch.q + i * N);
    V<T> d = grad * (load(scratch.density + i * N) * t.factor + t.added) + (t.linear * z + t.constant);
    if constexpr (P == Padding::kExcluded) {
      d += p * t.slope * (z + o.peak);
      d = load_mask<T>(g.valid + i * N) ? d : grad * (more + 1);
    } else {
      if constexpr (P == Padding::kZeros) d = load_mask<T>(g.valid + i * N) ? d : grad * (more + 1);
      d += p * t.slope * (z + o.peak);
    }
    store<T>(dx + i * N, d);
  };
  sweep<T, ROWS>(g.n, body, [] {});
}

// y's gradient at the first element of each slice that is not padding; 0 where all of it is.
template <class T, bool ROWS, Padding P>
DAAM_INLINE V<T> first_gradient(const Group<T>& g) {
  constexpr int N = Vector<T>::N;
  if constexpr (ROWS) {
    int64_t i = 0;
    if constexpr (P != Padding::kNone)
      while (i < g.n && !g.valid[i]) i++;
    return splat<T>(i < g.n ? g.grad[i] : 0);
  }
  V<T> first = load(g.grad);
  if constexpr (P != Padding::kNone) {
    Mask<T> found = load_mask<T>(g.valid);
    first = keep<T>(found, first);
    for (int64_t i = 1; i < g.n && any(~found); i++) {
      const Mask<T> valid = load_mask<T>(g.valid + i * N);
      first = valid & ~found ? load(g.grad + i * N) : first;
      found |= valid;
    }
  }
  return first;
}

// Statistics, origin, densities and their sums of a group that is whole.
template <class T>
struct Density {
  Statistics<T> statistics;
  Origin<T> origin;
  Totals<T> totals;
};

template <class T, bool ROWS, Padding P, bool BACKWARD>
DAAM_INLINE Density<T> evaluate(
    const Group<T>& g, const Head<T>& head, const Rules& rules, const Scratch<T>& scratch, const Ahead& ahead) {
  Density<T> d;
  d.statistics = statistics<T, ROWS, P>(g, rules.eps);
  d.origin = origin_at_center<T>(d.statistics, head);
  if constexpr (BACKWARD) d.origin.grad = first_gradient<T, ROWS, P>(g);
  Mask<T> moved = ~Mask<T>{};
  if (!head.narrow) {
    d.totals = densities<T, ROWS, P, BACKWARD, false>(g, d.origin, scratch, ahead);
    moved = too_far<T>(d.totals.density, d.statistics.count);
  }
  if (any(moved)) {
    const Nearest<T> to = nearest<T, ROWS, P, BACKWARD>(g, d.statistics, head);
    move_origin<T>(d.origin, moved, to, d.statistics, head);
    d.totals = densities<T, ROWS, P, BACKWARD, true>(g, d.origin, scratch, ahead);
  }
  return d;
}

template <class T, bool ROWS, Padding P>
void forward_group(
    const Group<T>& g, const Head<T>& head, const Rules& rules, const Scratch<T>& scratch, const Ahead& ahead, T* y,
    T* weights) {
  const Density<T> d = evaluate<T, ROWS, P, false>(g, head, rules, scratch, ahead);
  const Normaliser<T> f = normaliser<T>(d.totals.density, d.origin, d.statistics.var, head, rules.softmax);
  const Mask<T> skipped = skipped_slices<T, P>(d.statistics.count);
  weigh<T, ROWS, P>(g, f, skipped, rules.residual, scratch.density, y, weights);
}

template <class T>
DAAM_INLINE V<T> mean_of_q(const Totals<T>& totals, const Normaliser<T>& f, const Origin<T>& o) {
  return f.clamped ? -(o.grad * o.high) : totals.q * f.factor;  // where clamped, p = w q, and not w (q - mean)
}

template <class T, bool ROWS, Padding P>
void backward_group(
    const Group<T>& g, const Head<T>& head, const Rules& rules, const Scratch<T>& scratch, const Ahead& ahead, T* dx,
    Accumulated<T, ROWS>& sums) {
  const Density<T> d = evaluate<T, ROWS, P, true>(g, head, rules, scratch, ahead);
  const Normaliser<T> f = normaliser<T>(d.totals.density, d.origin, d.statistics.var, head, rules.softmax);
  const V<T> mean_q = mean_of_q<T>(d.totals, f, d.origin);
  const Slopes<T> raw = slopes<T, ROWS>(g.n, d.origin, scratch, mean_q);
  const Mask<T> lanes = ROWS ? ~Mask<T>{} : g.lanes;
  const Through<T> t =
      gradient_through<T, ROWS, P>(raw, f, d.origin, d.statistics, head, rules.residual, lanes, sums);
  write_gradient<T, ROWS, P>(g, t, d.origin, scratch, rules.residual, dx);
}

}  // namespace
