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

// LENGTH: of the slices, or 0 where the compiler is not told.
template <class T, class S, bool BACKWARD, int LENGTH>
class Short {
  static constexpr int kMost = LENGTH ? LENGTH : kLongestShort, kMostBackward = BACKWARD ? kMost : 1;

 public:
  explicit Short(const ShortGroups<T, S>& groups) : g(groups) {}

  // sums: of each group, the backward's.
  DAAM_INLINE void run(SliceSums<T>* sums) {
    for (int b = 0; b < g.count; b++) find_statistics(b);
    for (int b = 0; b < g.count; b++) find_totals(b);
    if constexpr (BACKWARD) {
      Through<T> through[kTogether];
      for (int b = 0; b < g.count; b++) differentiate(b, sums[b], through[b]);
      const Field<const S> from = g.grad;
      write(g.out, [&](int64_t r, int b) __attribute__((always_inline)) {
        const Through<T>& t = through[b];
        const V<T> grad = load_as(from(r, b)), from_start = z[b][r] - start[b];
        return grad * (density[b][r] * t.factor + t.added) + (t.linear * from_start + t.constant) +
               q[b][r] * t.slope * (from_start + peak[b]);
      });
    } else {
      V<T> factor[kTogether];
      const V<T> added = splat<T>(g.rules.residual);
      for (int b = 0; b < g.count; b++) factor[b] = normaliser(b).factor;
      if (g.weights.at)
        write(g.weights, [&](int64_t r, int b) __attribute__((always_inline)) { return density[b][r] * factor[b]; });
      write(g.out, [&](int64_t r, int b) __attribute__((always_inline)) {
        return x[b][r] * (density[b][r] * factor[b] + added);
      });
    }
  }

 private:
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

  DAAM_INLINE void find_moments(int b, V<T> shift, Moments<T>& m) {
    V<T> first{}, second{};
    each_element([&](int64_t r) __attribute__((always_inline)) {
      const V<T> s = x[b][r] - shift;
      first += s;
      second += s * s;
    });
    m.shift = shift, m.first = first, m.second = second;
  }

  DAAM_INLINE void find_statistics(int b) {
    constexpr int guessed = LENGTH ? LENGTH : kGuessed;
    const Field<const S> from = g.x;
    each_element([&](int64_t r) __attribute__((always_inline)) { x[b][r] = load_as(from(r, b)); });
    V<T> sum = x[b][0];
#pragma GCC unroll 8
    for (int r = 1; r < guessed; r++) sum += x[b][r];
    Moments<T> m;
    find_moments(b, rounded(sum * (T)(1.0 / guessed)), m);
    Statistics<T> s;
    set_count(s.count);
    if constexpr (LENGTH == 0) {
      const Mask<T> far = is_far<T>(m, s.count);
      if (any(far)) find_moments(b, far ? m.shift + m.first * s.count.share : m.shift, m);
    }
    finish_statistics<T>(m, g.rules.eps, s);
    high[b] = s.high, low[b] = s.low, rstd[b] = s.rstd;
  }

  // One by one, as in find_nearest: copied as a whole they would be copied in halves.
  DAAM_INLINE void set_count(Count<T>& count) const {
    count.n = g.heads.count.n;
    count.share = g.heads.count.share;
    count.free_share = g.heads.count.free_share;
  }

  DAAM_INLINE Statistics<T> statistics(int b) const {
    Statistics<T> s;
    set_count(s.count);
    s.high = high[b], s.low = low[b], s.rstd = rstd[b];
    return s;
  }

  DAAM_INLINE Origin<T> at_center(int b) const {
    Origin<T> o;
    origin_at_center<T>(o, statistics(b), g.heads.center, g.heads.root);
    if constexpr (BACKWARD) o.grad = load_as(g.grad(0, b));
    return o;
  }

  DAAM_INLINE Origin<T> origin(int b) const {
    Origin<T> o = at_center(b);
    if (is_moved[b]) {
      const Origin<T>& m = moved_to[b];
      o.high = m.high, o.low = m.low, o.start = m.start, o.peak = m.peak, o.twice = m.twice, o.grad = m.grad;
      return o;
    }
    if constexpr (BACKWARD) {
      o.start = start[b];
      set_peak<T>(o, start[b]);
    }
    return o;
  }

  DAAM_INLINE void find_totals(int b) {
    is_moved[b] = false;
    Mask<T> moved = g.heads.narrow;
    if (!any(moved)) {
      find_densities<false>(b, at_center(b));
      moved = too_far<T>(totals[b].density, g.heads.count.n);
    }
    if (any(moved)) move(b, moved);
  }

  // Seldom, but for narrow Gaussians: inline it would take registers and code from the way that most slices go.
  __attribute__((noinline, cold)) void move(int b, const Mask<T>& moved) {
    Origin<T> o = at_center(b);
    Nearest<T> to;
    find_nearest(b, to);
    if (BACKWARD) start_at<T>(o, to.x);
    move_origin<T>(o, moved, to, statistics(b), g.heads.center);
    find_densities<true>(b, o);
    is_moved[b] = true;
    moved_to[b] = o;
  }

  DAAM_INLINE void find_nearest(int b, Nearest<T>& found) const {
    const Statistics<T> s = statistics(b);
    const V<T> center = s.low + g.heads.center;
    found.distance = splat<T>((T)INFINITY), found.x = s.high, found.grad = V<T>{};
    each_element([&](int64_t r) __attribute__((always_inline)) {
      const V<T> distance = absolute<T>((x[b][r] - s.high) - center);
      const Mask<T> closer = distance < found.distance;
      found.distance = closer ? distance : found.distance;
      found.x = closer ? x[b][r] : found.x;
      if constexpr (BACKWARD) found.grad = closer ? load_as(g.grad(r, b)) : found.grad;
    });
  }

  // Of densities relative to the centre, the element nearest to it is where z starts.
  template <bool EXACT>
  DAAM_INLINE void find_densities(int b, const Origin<T>& o) {
    const V<T> twice = EXACT ? (o.peak - o.start) * 2 : V<T>{};
    const Field<const S> from = g.grad;
    const Field<const char> next_x = g.next_x, next_grad = g.next_grad;
    V<T> sum{}, sum_q{}, nearest = splat<T>((T)INFINITY);
    each_element([&](int64_t r) __attribute__((always_inline)) {
      if constexpr (!EXACT) {
        __builtin_prefetch(next_x(r, b), 0, 2);
        if constexpr (BACKWARD) __builtin_prefetch(next_grad(r, b), 0, 2);
      }
      const V<T> from_high = x[b][r] - o.high, d = from_high * o.scale - o.shift, m = ::density<T, EXACT>(d, twice);
      density[b][r] = m;
      sum += m;
      if constexpr (BACKWARD) {
        const V<T> grad = load_as(from(r, b));
        if constexpr (!EXACT) nearest = nearer_to_zero<T>(d, nearest);
        z[b][r] = d;
        q[b][r] = (grad - o.grad) * o.high + grad * from_high;
        sum_q += m * q[b][r];
      }
    });
    totals[b].density = sum;
    if constexpr (BACKWARD) totals[b].q = sum_q;
    if constexpr (BACKWARD && !EXACT) start[b] = nearest;
  }

  DAAM_INLINE Normaliser<T> normaliser(int b) const {
    Normaliser<T> f;
    find_normaliser<T>(totals[b].density, origin(b), statistics(b), g.heads, g.rules.softmax, f);
    return f;
  }

  DAAM_INLINE void differentiate(int b, SliceSums<T>& sums, Through<T>& through) {
    const Origin<T> o = origin(b);
    peak[b] = o.peak;
    const Normaliser<T> f = normaliser(b);
    const V<T> mean = mean_of_q<T>(totals[b], f, o);
    V<T> p1{}, p2{};
    each_element([&](int64_t r) __attribute__((always_inline)) {
      const V<T> from_start = z[b][r] - o.start, p = density[b][r] * (q[b][r] - mean), pz = p * from_start;
      q[b][r] = p;
      p1 += pz;
      p2 += pz * from_start;
    });
    start[b] = o.start;
    const Slopes<T> raw = {sum_of_slopes(totals[b].density, totals[b].q, mean), p1, p2 + o.twice * p1};
    find_through<T, Padding::kNone>(raw, f, o, statistics(b), g.heads, g.rules.residual, sums, through);
  }

  // Row by row, so that whole lines of the cache are written at a time.
  template <class Value>
  DAAM_INLINE void write(const Field<S> out, Value value) {
    const int count = g.count;
    const bool stream = g.stream;
    each_element([&](int64_t r) __attribute__((always_inline)) {
      if (stream)
        for (int b = 0; b < count; b++) stream_as<T>(out(r, b), value(r, b));
      else
        for (int b = 0; b < count; b++) store_as<T>(out(r, b), value(r, b));
    });
  }

  const ShortGroups<T, S>& g;
  V<T> high[kTogether], low[kTogether], rstd[kTogether];  // the statistics
  V<T> start[kTogether], peak[kTogether];                 // of origins, the backward's
  bool is_moved[kTogether];
  Origin<T> moved_to[kTogether];
  Totals<T> totals[kTogether];
  V<T> x[kTogether][kMost], density[kTogether][kMost];
  V<T> z[kTogether][kMostBackward], q[kTogether][kMostBackward];
};

template <class T, bool BACKWARD, int LENGTH, class S>
__attribute__((noinline)) void work_on_told(const ShortGroups<T, S>& groups, SliceSums<T>* sums) {
  Short<T, S, BACKWARD, LENGTH>(groups).run(sums);
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
