// Groups of columns of few elements, from where they lie and back: what there is of a slice is in registers and on the
// stack. The same steps as in density_slices.h.
#pragma once

#include "density_slices.h"

namespace {

constexpr int kLongestShort = 24;  // elements; of longer columns what is packed is sooner found again

// Vector r of group b is at + r * row + b * group.
template <class S>
struct Field {
  S* at;
  int64_t row, group;
  DAAM_INLINE S* operator()(int64_t r, int b) const { return at + r * row + b * group; }
};

// Of elements that are S in memory.
template <class T, class S>
struct ShortGroups {
  int count;
  int64_t n;  // elements of a slice, two at least
  const Heads<T>& heads;
  const Rules& rules;
  bool stream;  // write past the caches: groups are neighbours, and rows are aligned to lines of the cache
  Field<const S> x, grad;
  Field<S> out, weights;  // weights: where they are asked for
  Field<const char> next_x, next_grad;  // where the next groups lie: brought to the L2 cache meanwhile
};

// What a group's steps leave for those that follow.
template <class T, int MOST>
struct Standardised {
  V<T> x[MOST];
  Statistics<T> statistics;
  Nearest<T> nearest;  // where densities are relative to the largest
};

template <class T, int MOST, bool BACKWARD>
struct Weighed {
  V<T> density[MOST], z[BACKWARD ? MOST : 1], q[BACKWARD ? MOST : 1];  // q is p in the end: see density_gradient.h
  Origin<T> origin;
  Totals<T> totals;
  Normaliser<T> normaliser;
  Through<T> through;
};

// What the densities of groups are relative to.
enum class Relative {
  kToCenter,   // which is expected to be near enough to all slices, none of them clamped: others are done again
  kToLargest,  // each slice's
  kToEither    // as the slices of a group need it
};

// LENGTH: of the slices, or 0 where the compiler is not told.
template <class T, class S, bool BACKWARD, int LENGTH>
class Short {
  static constexpr int kMost = LENGTH ? LENGTH : kLongestShort;
  // Whether there are registers for a group and the statistics of the next.
  static constexpr bool kAhead = LENGTH > 0 && (DAAM_VECTOR_BYTES == 64 || LENGTH <= (BACKWARD ? 4 : 5));
  typedef ::Standardised<T, kMost> Standardised;
  typedef ::Weighed<T, kMost, BACKWARD> Weighed;

 public:
  explicit Short(const ShortGroups<T, S>& groups)
      : g(groups), eps((T)groups.rules.eps), residual(groups.rules.residual),
        narrow(kAhead ? !may_be_plain(groups.heads) : any(groups.heads.narrow)) {}

  // sums: those of kSummedTogether groups each are added to, by the backward.
  static void run(const ShortGroups<T, S>& groups, SliceSums<T>* sums) {
    if constexpr (!kAhead)
      run_together(groups, sums);
    else if (groups.weights.at)
      run_ahead<Relative::kToEither>(groups, 0, groups.count, sums);
    else if (may_be_plain(groups.heads))
      run_ahead<Relative::kToCenter>(groups, 0, groups.count, sums);
    else
      run_ahead<Relative::kToLargest>(groups, 0, groups.count, sums);
  }

 private:
  static DAAM_INLINE bool may_be_plain(const Heads<T>& heads) { return heads.plain_var[0] < (T)INFINITY; }

  // Groups [from, end). The next one's root and quotient take longer than a processor looks ahead, so they are asked for
  // before this one is done: in the forward before its densities, in the backward, which has no registers for both,
  // after them.
  template <Relative TO>
  static __attribute__((noinline)) void run_ahead(
      const ShortGroups<T, S>& groups, int from, int end, SliceSums<T>* sums) {
    const Short all(groups);
    Standardised next;
    all.template standardise<TO>(from, next);
    for (int b = from; b < end; b++) {
      const Standardised s = next;
      Weighed w;
      if (!BACKWARD && b + 1 < end) all.template standardise<TO>(b + 1, next);
      const bool as_expected = all.template weigh<TO>(b, s, w);
      if (BACKWARD && b + 1 < end) all.template standardise<TO>(b + 1, next);
      if (TO == Relative::kToCenter && !as_expected) {
        run_ahead<Relative::kToEither>(groups, b, b + 1, sums);
        continue;
      }
      all.template normalise<TO>(b, s, w, sums);
      all.template write<TO>(b, 1, &s, &w);
    }
  }

  // Step by step, where a group and the next one's statistics would not fit: what a step leaves is in memory.
  static __attribute__((noinline)) void run_together(const ShortGroups<T, S>& groups, SliceSums<T>* sums) {
    constexpr Relative either = Relative::kToEither;
    const Short all(groups);
    Standardised s[kTogether];
    Weighed w[kTogether];
    for (int from = 0; from < groups.count; from += kTogether) {
      const int count = least(kTogether, groups.count - from);
      for (int b = 0; b < count; b++) all.template standardise<either>(from + b, s[b]);
      for (int b = 0; b < count; b++) all.template weigh<either>(from + b, s[b], w[b]);
      for (int b = 0; b < count; b++) all.template normalise<either>(from + b, s[b], w[b], sums);
      all.template write<either>(from, count, s, w);
    }
  }

  template <class Body>
  DAAM_INLINE void each_element(Body body) const {
    const int64_t n = g.n;
    if constexpr (LENGTH > 0) {
#pragma GCC unroll 8
      for (int64_t r = 0; r < LENGTH; r++) body(r);
    } else {
#pragma GCC unroll 2
      for (int64_t r = 0; r < n; r++) body(r);
    }
  }

  // A sum begins with the first element: a compiler may not leave out the addition of 0.
  static DAAM_INLINE void add(V<T>& sum, int64_t r, V<T> v) { sum = LENGTH > 0 && r == 0 ? v : sum + v; }

  DAAM_INLINE void find_moments(const V<T>* x, V<T> shift, Moments<T>& m) const {
    V<T> first{}, second{};
    each_element([&](int64_t r) __attribute__((always_inline)) {
      const V<T> s = x[r] - shift;
      add(first, r, s);
      add(second, r, s * s);
    });
    m.shift = shift, m.first = first, m.second = second;
  }

  template <Relative TO>
  DAAM_INLINE void standardise(int b, Standardised& to) const {
    constexpr int guessed = LENGTH ? LENGTH : kGuessed;
    const Field<const S> from = g.x;
    const Field<const char> next_x = g.next_x, next_grad = g.next_grad;
    each_element([&](int64_t r) __attribute__((always_inline)) {
      __builtin_prefetch(next_x(r, b), 0, 2);
      if constexpr (BACKWARD) __builtin_prefetch(next_grad(r, b), 0, 2);
      to.x[r] = load_as(from(r, b));
    });
    V<T> sum = to.x[0];
#pragma GCC unroll 8
    for (int r = 1; r < guessed; r++) sum += to.x[r];
    Moments<T> m;
    find_moments(to.x, rounded(sum * (T)(1.0 / guessed)), m);
    Statistics<T>& s = to.statistics;
    // One by one: copied as a whole they would be copied in halves.
    s.count.n = g.heads.count.n;
    s.count.share = g.heads.count.share;
    s.count.free_share = g.heads.count.free_share;
    if constexpr (LENGTH == 0) {
      const Mask<T> far = is_far<T>(m, s.count);
      if (any(far)) find_moments(to.x, far ? m.shift + m.first * s.count.share : m.shift, m);
      finish_statistics<T>(m, eps, s);
    } else {  // the guess is the mean, but for rounding, and the square of what is left never infinite
      s.high = m.shift;
      s.low = m.first * s.count.share;
      finish_deviation<T>(maximum(V<T>{}, m.second - m.first * s.low), eps, s);
    }
    if constexpr (TO == Relative::kToLargest) find_nearest(b, to, to.nearest);
  }

  // Whether all slices are as expected of those relative TO that.
  template <Relative TO>
  DAAM_INLINE bool weigh(int b, const Standardised& s, Weighed& w) const {
    if constexpr (TO == Relative::kToLargest) {
      start_at_nearest(s, w.origin);
      find_densities<true>(b, s, w);
      return true;
    }
    origin_at_center<T>(w.origin, s.statistics, g.heads.center, g.heads.root);
    if constexpr (BACKWARD) w.origin.grad = load_as(g.grad(0, b));
    const bool try_center = TO == Relative::kToCenter || !narrow;
    if (try_center) find_densities<false>(b, s, w);
    const bool near = try_center && !any_below<T>(w.totals.density, kLeastTotal<T>);
    if constexpr (TO == Relative::kToCenter) return near && !any_below<T>(s.statistics.var, g.heads.plain_var);
    if (near) return true;
    const Mask<T> moved = narrow ? ~Mask<T>{} : (Mask<T>)(w.totals.density < kLeastTotal<T>);
    Nearest<T> to;
    find_nearest(b, s, to);
    if (BACKWARD) start_at<T>(w.origin, to.x);
    move_origin<T>(w.origin, moved, to, s.statistics, g.heads.center);
    find_densities<true>(b, s, w);
    return true;
  }

  DAAM_INLINE void start_at_nearest(const Standardised& s, Origin<T>& o) const {
    o.scale = g.heads.root * s.statistics.rstd;
    o.high = s.nearest.x, o.grad = s.nearest.grad;
    o.low = o.shift = o.start = V<T>{};
    set_peak<T>(o, s.nearest.distance * o.scale);
  }

  // distance: with its sign.
  DAAM_INLINE void find_nearest(int b, const Standardised& s, Nearest<T>& found) const {
    const V<T> center = s.statistics.low + g.heads.center, high = s.statistics.high;
    const auto distance = [&](int64_t r) __attribute__((always_inline)) { return (s.x[r] - high) - center; };
    found.distance = distance(0), found.x = s.x[0], found.grad = BACKWARD ? load_as(g.grad(0, b)) : V<T>{};
    each_element([&](int64_t r) __attribute__((always_inline)) {
      if (r > 0) found.distance = nearer_to_zero<T>(distance(r), found.distance);
    });
    each_element([&](int64_t r) __attribute__((always_inline)) {
      if (r == 0) return;
      const Mask<T> this_one = distance(r) == found.distance;
      found.x = this_one ? s.x[r] : found.x;
      if constexpr (BACKWARD) found.grad = this_one ? load_as(g.grad(r, b)) : found.grad;
    });
  }

  // Of densities relative to the centre, the element nearest to it is where z starts.
  template <bool EXACT>
  DAAM_INLINE void find_densities(int b, const Standardised& s, Weighed& w) const {
    const Origin<T>& o = w.origin;
    const V<T> twice = EXACT ? (o.peak - o.start) * 2 : V<T>{};
    const Field<const S> from = g.grad;
    V<T> sum{}, sum_q{}, nearest = splat<T>((T)INFINITY);
    each_element([&](int64_t r) __attribute__((always_inline)) {
      const V<T> from_high = s.x[r] - o.high, d = from_high * o.scale - o.shift, m = ::density<T, EXACT>(d, twice);
      w.density[r] = m;
      add(sum, r, m);
      if constexpr (BACKWARD) {
        const V<T> grad = load_as(from(r, b));
        if constexpr (!EXACT) nearest = nearer_to_zero<T>(d, nearest);
        w.z[r] = d;
        w.q[r] = (grad - o.grad) * o.high + grad * from_high;
        add(sum_q, r, m * w.q[r]);
      }
    });
    w.totals.density = sum;
    if constexpr (BACKWARD) w.totals.q = sum_q;
    if constexpr (BACKWARD && !EXACT) {
      w.origin.start = nearest;
      set_peak<T>(w.origin, nearest);
    }
  }

  template <Relative TO>
  DAAM_INLINE void normalise(int b, const Standardised& s, Weighed& w, SliceSums<T>* sums) const {
    if constexpr (TO == Relative::kToCenter)
      w.normaliser.factor = 1 / w.totals.density, w.normaliser.clamped = Mask<T>{};
    else
      find_normaliser<T>(w.totals.density, w.origin, s.statistics, g.heads, g.rules.softmax, w.normaliser);
    if constexpr (BACKWARD) {
      SliceSums<T> of_group, &to = sums[b / kSummedTogether];
      differentiate(s, w, of_group);
      to.t0 += of_group.t0, to.t0_v += of_group.t0_v, to.u1_v += of_group.u1_v, to.u2_v += of_group.u2_v;
    }
  }

  DAAM_INLINE void differentiate(const Standardised& s, Weighed& w, SliceSums<T>& sums) const {
    const Origin<T>& o = w.origin;
    const V<T> mean = mean_of_q<T>(w.totals, w.normaliser, o);
    V<T> p1{}, p2{};
    each_element([&](int64_t r) __attribute__((always_inline)) {
      const V<T> from_start = w.z[r] - o.start, p = w.density[r] * (w.q[r] - mean), pz = p * from_start;
      w.q[r] = p;
      add(p1, r, pz);
      add(p2, r, pz * from_start);
    });
    const Slopes<T> raw = {sum_of_slopes(w.totals.density, w.totals.q, mean), p1, p2 + o.twice * p1};
    find_through<T, Padding::kNone>(
        raw, w.normaliser, o, s.statistics, g.heads, g.rules.residual, sums, w.through);
  }

  // Of groups from number `from` on.
  template <Relative TO>
  DAAM_INLINE void write(int from, int count, const Standardised* s, const Weighed* w) const {
    if constexpr (BACKWARD) {
      write_to(g.out, from, count, [&](int64_t r, int b) __attribute__((always_inline)) {
        const Through<T>& t = w[b].through;
        const V<T> grad = load_as(g.grad(r, from + b)), from_start = w[b].z[r] - w[b].origin.start;
        return grad * (w[b].density[r] * t.factor + t.added) + (t.linear * from_start + t.constant) +
               w[b].q[r] * t.slope * (from_start + w[b].origin.peak);
      });
    } else {
      const V<T> added = splat<T>(residual);
      if (TO == Relative::kToEither && g.weights.at)
        write_to(g.weights, from, count, [&](int64_t r, int b) __attribute__((always_inline)) {
          return w[b].density[r] * rounded(w[b].normaliser.factor);  // a product of its own: y's may be a part of a sum
        });
      write_to(g.out, from, count, [&](int64_t r, int b) __attribute__((always_inline)) {
        return s[b].x[r] * (w[b].density[r] * w[b].normaliser.factor + added);
      });
    }
  }

  // Row by row, so that whole lines of the cache are written at a time.
  template <class Value>
  DAAM_INLINE void write_to(const Field<S> out, int from, int count, Value value) const {
    const bool stream = g.stream;
    each_element([&](int64_t r) __attribute__((always_inline)) {
      if (stream)
        for (int b = 0; b < count; b++) stream_as<T>(out(r, from + b), value(r, b));
      else
        for (int b = 0; b < count; b++) store_as<T>(out(r, from + b), value(r, b));
    });
  }

  const ShortGroups<T, S> g;
  const T eps, residual;
  const bool narrow;
};

template <class T, bool BACKWARD, int LENGTH, class S>
DAAM_INLINE void work_on_told(const ShortGroups<T, S>& groups, SliceSums<T>* sums) {
  Short<T, S, BACKWARD, LENGTH>::run(groups, sums);
}

template <class T, bool BACKWARD, class S>
void work_on_short(const ShortGroups<T, S>& groups, SliceSums<T>* sums) {
  switch (groups.n) {
    case 2: return work_on_told<T, BACKWARD, 2>(groups, sums);
    case 3: return work_on_told<T, BACKWARD, 3>(groups, sums);
    case 4: return work_on_told<T, BACKWARD, 4>(groups, sums);
    case 5: return work_on_told<T, BACKWARD, 5>(groups, sums);
    case 6: return work_on_told<T, BACKWARD, 6>(groups, sums);
    case 7: return work_on_told<T, BACKWARD, 7>(groups, sums);
    case 8: return work_on_told<T, BACKWARD, 8>(groups, sums);
  }
  work_on_told<T, BACKWARD, 0>(groups, sums);
}

}  // namespace
