// The mixture of K Gaussians over a group: one Gaussian after the other, each from its own centre. What follows from
// the sum of their densities is the product's.
#pragma once

#include "density_gradient.h"
#include "work.h"

namespace {

// A Gaussian of a head. Its share, and log2 of it, are relative to the head's largest.
template <class T>
struct Component {
  T center, root, share;
  double log_share;
};

// The least that a sum of densities is divided by: eps over the head's largest share.
template <class T>
struct Floor {
  T value;
  double log;  // log2
};

// The Gaussians of all heads.
template <class T>
struct Mixture {
  int64_t num_heads, num_gaussians;
  const Component<T>* components;  // [heads][gaussians]
  const Floor<T>* floors;          // [heads]
};

// What heads have in the lanes of a group: in rows those that follow each other from the first one on.
template <class T, class L, class Get>
DAAM_INLINE V<T> of_heads(const Mixture<T>& m, int64_t first, Get get) {
  V<T> lanes = splat<T>(get(first));
  if constexpr (L::kRows) {
    for (int lane = 1; lane < Vector<T>::N; lane++) {
      first = first + 1 == m.num_heads ? 0 : first + 1;
      lanes[lane] = get(first);
    }
  }
  return lanes;
}

// A Gaussian among the slices of a group, and its share of their densities.
template <class T>
struct Gaussian {
  Origin<T> origin;
  V<T> center, root, share;
};

// What a Gaussian has of sums over slices: of its densities, and of p times 1, z and z (z + twice). See Slopes.
template <class T>
struct GaussianSums {
  V<T> density, t0, p1, p2;
};

// What is found of the slices of a group, one after the other.
template <class T>
struct MixtureDensity {
  Statistics<T> statistics;
  Origin<T> origin;  // of q alone
  Mask<T> moved;     // slices whose Gaussians are relative to the elements nearest to their centres
  V<T> floor;        // of the sum of densities
  Totals<T> totals;
  Normaliser<T> normaliser;
  V<T> mean_q;
};

// All Gaussians from their centres. near: an element near each slice's mean; grad: what q's origin has of y's gradient.
template <class T, class L>
void place_gaussians(
    const Mixture<T>& m, int64_t head, V<T> near, V<T> grad, Gaussian<T>* gaussians, MixtureDensity<T>& d) {
  for (int64_t k = 0; k < m.num_gaussians; k++) {
    const auto component = [&](int64_t h) -> const Component<T>& { return m.components[h * m.num_gaussians + k]; };
    Gaussian<T>& to = gaussians[k];
    to.center = of_heads<T, L>(m, head, [&](int64_t h) { return component(h).center; });
    to.root = of_heads<T, L>(m, head, [&](int64_t h) { return component(h).root; });
    to.share = of_heads<T, L>(m, head, [&](int64_t h) { return component(h).share; });
    origin_at_center<T>(to.origin, d.statistics, to.center, to.root);
    start_at<T>(to.origin, near);
  }
  d.origin.high = d.statistics.high;
  d.origin.grad = grad;
  d.moved = Mask<T>{};
  d.floor = of_heads<T, L>(m, head, [&](int64_t h) { return m.floors[h].value; });
  d.totals.density = d.totals.q = V<T>{};
}

// The element of each slice that is nearest to a Gaussian's centre.
template <class T, class L, Padding P, bool BACKWARD>
DAAM_INLINE void find_nearest_to(
    const Group<T>& g, const Gaussian<T>& gaussian, const Mask<T>& asked, const Statistics<T>& s, Nearest<T>& found) {
  Statistics<T> from = s;  // the heads of a mixture have their centre at 0
  from.low += gaussian.center;
  found.distance = found.x = found.grad = V<T>{};
  find_nearest<T, L, P, BACKWARD>(g, asked, from, INT64_MAX, found);
}

// Takes the Gaussians of those slices relative to their elements nearest to the centres, and the densities of these
// relative to the largest of them: however narrow or far they are, the sum is 1 to K somewhere. Heights are in double:
// their differences decide about the shares, and each may be huge.
template <class T, class L>
void move_gaussians(
    const Mixture<T>& m, int64_t head, const Nearest<T>* nearest, Gaussian<T>* gaussians, MixtureDensity<T>& d) {
  for (int64_t k = 0; k < m.num_gaussians; k++)
    move_origin<T>(gaussians[k].origin, d.moved, nearest[k], d.statistics, gaussians[k].center);
  for (int lane = 0; lane < Vector<T>::N; lane++) {
    if (!d.moved[lane]) continue;
    const int64_t h = L::kRows ? (head + lane) % m.num_heads : head;
    const auto height = [&](int64_t k) {
      const double peak = (double)gaussians[k].origin.peak[lane];
      return m.components[h * m.num_gaussians + k].log_share - peak * peak;
    };
    int64_t highest = 0;
    for (int64_t k = 1; k < m.num_gaussians; k++)
      if (height(k) > height(highest)) highest = k;
    const double top = height(highest);
    for (int64_t k = 0; k < m.num_gaussians; k++) gaussians[k].share[lane] = (T)exp2(height(k) - top);
    d.floor[lane] = (T)exp2(m.floors[h].log - top);
    d.origin.high[lane] = nearest[highest].x[lane];
    d.origin.grad[lane] = nearest[highest].grad[lane];
  }
}

// body(i, m, d) with the densities of one Gaussian and their distances from its origin.
template <class T, class L, Padding P, class Body, class AfterBlock>
DAAM_INLINE void sweep_gaussian(
    const Row<T>& row, int r, const Gaussian<T>& gaussian, Body body, AfterBlock after_block) {
  constexpr int N = Vector<T>::N;
  const Origin<T>& o = gaussian.origin;
  const V<T> high = of_row<T, L>(o.high, r), scale = of_row<T, L>(o.scale, r), shift = of_row<T, L>(o.shift, r);
  const V<T> twice = of_row<T, L>(o.peak - o.start, r) * 2, share = of_row<T, L>(gaussian.share, r);
  const auto element = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
    const V<T> d = (within.load(row.x + i * N) - high) * scale - shift;
    V<T> m = within(density<T, true>(d, twice) * share);
    if constexpr (P == Padding::kExcluded) m = keep<T>(load_mask<T>(row.valid + i * N), m);
    body(i, m, d);
  };
  sweep<T, L>(row.n, element, after_block);
}

// The sum of the Gaussians' densities, element by element.
template <class T, class L, Padding P>
void add_densities(const Group<T>& g, const Gaussian<T>* gaussians, int64_t count) {
  constexpr int N = Vector<T>::N;
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    T* const to = g.row[r].density;
    for (int64_t k = 0; k < count; k++) {
      const Mask<T> added = Mask<T>{} - (k > 0);
      const auto body = [&](int64_t i, V<T> m, V<T>) __attribute__((always_inline)) {
        store<T>(to + i * N, keep<T>(added, load(to + i * N)) + m);
      };
      sweep_gaussian<T, L, P>(g.row[r], r, gaussians[k], body, [] {});
    }
  });
}

// Keeps q: see Totals.
template <class T, class L, Padding P>
void find_q(const Group<T>& g, const Origin<T>& o) {
  constexpr int N = Vector<T>::N;
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> high = of_row<T, L>(o.high, r), origin_grad = of_row<T, L>(o.grad, r);
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      const V<T> from_high = within.load(row.x + i * N) - high, grad = within.load(row.grad + i * N);
      store<T>(row.q + i * N, relative_q<T, P>(row, i, grad, from_high, high, origin_grad));
    };
    sweep<T, L>(row.n, body, [] {});
  });
}

// Sums over slices of the densities, and of them times q.
template <class T, class L, bool BACKWARD>
void add_up_densities(const Group<T>& g, Totals<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    Sum<T> sum, sum_q;
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      const V<T> m = within(load(row.density + i * N));
      sum += m;
      if constexpr (BACKWARD) sum_q.block += m * load(row.q + i * N);
    };
    sweep<T, L>(row.n, body, [&]() __attribute__((always_inline)) { sum.flush(), sum_q.flush(); });
    set_sum<T, L>(found.density, r, sum.total);
    if (BACKWARD) set_sum<T, L>(found.q, r, sum_q.total);
  });
}

template <class T, class L, Padding P, bool BACKWARD>
DAAM_INLINE void find_mixture(
    const Group<T>& g, const Gaussian<T>* gaussians, int64_t count, const Origin<T>& o, Totals<T>& totals) {
  add_densities<T, L, P>(g, gaussians, count);
  if constexpr (BACKWARD) find_q<T, L, P>(g, o);
  add_up_densities<T, L, BACKWARD>(g, totals);
}

template <class T>
DAAM_INLINE void find_normaliser(MixtureDensity<T>& d, bool softmax) {
  const V<T> total = d.totals.density;
  d.normaliser.clamped = softmax ? Mask<T>{} : (Mask<T>)(total < d.floor);
  d.normaliser.factor = 1 / (d.normaliser.clamped ? d.floor : total);
  d.mean_q = mean_of_q<T>(d.totals, d.normaliser, d.origin);
}

// Leaves in z what the Gaussians' densities fall by along x, times p, but for the normaliser's factor and a constant.
template <class T, class L, Padding P>
void find_slopes(
    const Group<T>& g, const Gaussian<T>* gaussians, int64_t count, const V<T>& mean_q, GaussianSums<T>* found) {
  constexpr int N = Vector<T>::N;
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> mean = of_row<T, L>(mean_q, r);
    for (int64_t k = 0; k < count; k++) {
      const Origin<T>& o = gaussians[k].origin;
      const V<T> scale = of_row<T, L>(o.scale, r), start = of_row<T, L>(o.start, r), peak = of_row<T, L>(o.peak, r);
      const Mask<T> added = Mask<T>{} - (k > 0);
      Sum<T> density, t0, p1, p2;
      const auto body = [&](int64_t i, V<T> m, V<T> z) __attribute__((always_inline)) {
        if constexpr (P != Padding::kNone)  // what is padding may be infinite
          z = keep<T>(load_mask<T>(row.valid + i * N) | (Mask<T>)(m > 0), z);
        z -= start;
        const V<T> p = m * (load(row.q + i * N) - mean), pz = p * z;
        store<T>(row.z + i * N, keep<T>(added, load(row.z + i * N)) + p * (z + peak) * scale);
        density += m;
        t0 += p;
        p1 += pz;
        p2.block += pz * z;
      };
      sweep_gaussian<T, L, P>(row, r, gaussians[k], body, [&]() __attribute__((always_inline)) {
        density.flush(), t0.flush(), p1.flush(), p2.flush();
      });
      set_sum<T, L>(found[k].density, r, density.total);
      set_sum<T, L>(found[k].t0, r, t0.total);
      set_sum<T, L>(found[k].p1, r, p1.total);
      set_sum<T, L>(found[k].p2, r, p2.total + 2 * peak * p1.total);
    }
  });
}

// The sum over a slice of what is in z, relative to an element that is not padding: in a constant slice it is the same
// everywhere, and what reaches x through the mean takes it away again.
template <class T>
struct SlopeSum {
  V<T> first, rest;
};

template <class T, class L, Padding P>
void add_up_slopes(const Group<T>& g, SlopeSum<T>& found) {
  constexpr int N = Vector<T>::N;
  found.first = first_of<T, L, P>(g, [](const Row<T>& row) { return row.z; });
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> first = of_row<T, L>(found.first, r);
    Sum<T> rest;
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      V<T> z = within(load(row.z + i * N) - first);
      if constexpr (P == Padding::kExcluded) z = keep<T>(load_mask<T>(row.valid + i * N), z);
      rest += z;
    };
    sweep<T, L>(row.n, body, [&]() __attribute__((always_inline)) { rest.flush(); });
    set_sum<T, L>(found.rest, r, rest.total);
  });
}

// How y's gradient reaches x, and in the place of each Gaussian's sums those of p times 1, e / sqrt(var) and e^2 / var,
// e being the distance from its centre.
template <class T, Padding P>
void find_through(
    const Gaussian<T>* gaussians, int64_t count, const MixtureDensity<T>& d, const SlopeSum<T>& slopes, bool residual,
    GaussianSums<T>* sums, Through<T>& t) {
  constexpr T inverse = (T)(2 / kLog2E);
  const Statistics<T>& s = d.statistics;
  const Mask<T> live = ~skipped_slices<T, P>(s.count.n);
  const V<T> factor = keep<T>(live, d.normaliser.factor);
  // Over all Gaussians t0 sums to 0 without the clamp: what rounding left is taken back from each by its share, before
  // a far Gaussian enlarges it.
  V<T> excess{};
  for (int64_t k = 0; k < count; k++) excess += sums[k].t0;
  excess = keep<T>(~d.normaliser.clamped, excess * d.normaliser.factor);
  V<T> of_variance{};
  for (int64_t k = 0; k < count; k++) {
    const Gaussian<T>& gaussian = gaussians[k];
    GaussianSums<T>& sum = sums[k];
    const V<T> peak = gaussian.origin.peak, inverse_root = 1 / gaussian.root;
    const V<T> t0 = keep<T>(live, (sum.t0 - sum.density * excess) * factor);
    const V<T> p1 = keep<T>(live, sum.p1 * factor) + peak * t0;
    const V<T> p2 = keep<T>(live, sum.p2 * factor) + peak * (peak * t0);  // the square of the peak may be infinite
    of_variance += p2;
    sum.t0 = t0;
    sum.p1 = p1 * inverse_root * s.rstd;
    sum.p2 = p2 * inverse_root * inverse_root;
  }
  t.factor = factor;
  t.added = splat<T>(residual) + keep<T>(~live, splat<T>(1));
  t.slope = -factor * inverse;
  t.linear = of_variance * inverse * s.rstd * (s.rstd * s.count.free_share);
  t.constant = t.linear * ((d.origin.high - s.high) - s.low) - t.slope * (slopes.rest * s.count.share);
}

template <class T, class L, Padding P, class S, bool STREAM>
void write_mixture_gradient_as(
    const Group<T>& g, const Through<T>& t, const Origin<T>& o, const V<T>& first_slope, bool residual) {
  constexpr int N = Vector<T>::N;
  const V<T> more = splat<T>(residual);
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> factor = of_row<T, L>(t.factor, r), added = of_row<T, L>(t.added, r);
    const V<T> slope = of_row<T, L>(t.slope, r), high = of_row<T, L>(o.high, r);
    const V<T> constant = of_row<T, L>(t.constant, r), linear = of_row<T, L>(t.linear, r);
    const V<T> first = of_row<T, L>(first_slope, r);
    S* const out = static_cast<S*>(row.out);
    Store<T, S, STREAM> store_at;
    const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
      const V<T> grad = within.load(row.grad + i * N), z = load(row.z + i * N);
      V<T> d = grad * (load(row.density + i * N) * factor + added) + (z - first) * slope;
      d += linear * (within.load(row.x + i * N) - high) + constant;
      if constexpr (P != Padding::kNone) {
        const V<T> of_padding = grad * (more + 1) + (P == Padding::kZeros ? z * slope : V<T>{});
        d = load_mask<T>(row.valid + i * N) ? d : of_padding;
      }
      store_at(within, slot, out + i * N, d);
    };
    sweep<T, L, L::kRows ? 4 : 1>(row.n, body, [] {});
  });
}

template <class T, class L, Padding P>
DAAM_INLINE void write_mixture_gradient(
    const Group<T>& g, const Through<T>& t, const Origin<T>& o, const V<T>& first_slope, bool residual) {
  with_target<T, L, P>(g, [&](auto s, auto stream) __attribute__((always_inline)) {
    write_mixture_gradient_as<T, L, P, decltype(s), decltype(stream)::value>(g, t, o, first_slope, residual);
  });
}

// Adds what the first `slices` lanes of a group give to their heads' Gaussians: [heads][gaussians][3].
template <class T, class L>
void add_gaussian_sums(const Mixture<T>& m, int64_t head, int64_t slices, const GaussianSums<T>* from, double* to) {
  const Mask<T> lanes = first_lanes<T>(slices);
  for (int64_t k = 0; k < m.num_gaussians; k++) {
    if constexpr (L::kRows) {
      for (int64_t r = 0; r < slices; r++) {
        double* const sums = to + ((head + r) % m.num_heads * m.num_gaussians + k) * 3;
        sums[0] += from[k].t0[r], sums[1] += from[k].p1[r], sums[2] += from[k].p2[r];
      }
    } else {
      double* const sums = to + (head * m.num_gaussians + k) * 3;
      sums[0] += sum_in_double(keep<T>(lanes, from[k].t0));
      sums[1] += sum_in_double(keep<T>(lanes, from[k].p1));
      sums[2] += sum_in_double(keep<T>(lanes, from[k].p2));
    }
  }
}

// What a group has of each Gaussian.
template <class T>
struct OfGaussians {
  Gaussian<T>* gaussians;
  Nearest<T>* nearest;
  GaussianSums<T>* sums;
};

// The memory of that for a number of groups.
template <class T>
class GaussianScratch {
 public:
  GaussianScratch(int64_t groups, int64_t count)
      : count(count), gaussians(sizeof(Gaussian<T>) * groups * count), nearest(sizeof(Nearest<T>) * groups * count),
        sums(sizeof(GaussianSums<T>) * groups * count) {}
  bool there() const { return gaussians.at && nearest.at && sums.at; }
  OfGaussians<T> of(int64_t group) const {
    const int64_t from = group * count;
    return {static_cast<Gaussian<T>*>(gaussians.at) + from, static_cast<Nearest<T>*>(nearest.at) + from,
            static_cast<GaussianSums<T>*>(sums.at) + from};
  }

 private:
  const int64_t count;
  const Memory gaussians, nearest, sums;
};

// Forward or backward of a group of whole slices. sums: of its heads' Gaussians, to which it adds its own.
template <class T, class L, Padding P, bool BACKWARD>
void work_on_mixture(
    const Group<T>& g, const Mixture<T>& m, int64_t head, const Rules& rules, const OfGaussians<T>& of, double* sums) {
  const int64_t count = m.num_gaussians;
  MixtureDensity<T> d;
  find_statistics<T, L, P>(g, rules.eps, d.statistics);
  V<T> near = d.statistics.high, grad{};
  if constexpr (BACKWARD) near = find_near<T, L, P>(g, d.statistics), grad = first_gradients<T, L, P>(g);
  place_gaussians<T, L>(m, head, near, grad, of.gaussians, d);
  find_mixture<T, L, P, BACKWARD>(g, of.gaussians, count, d.origin, d.totals);
  d.moved = too_far<T>(d.totals.density, d.statistics.count.n) & g.lanes();
  if (any(d.moved)) {
    for (int64_t k = 0; k < count; k++)
      find_nearest_to<T, L, P, BACKWARD>(g, of.gaussians[k], d.moved, d.statistics, of.nearest[k]);
    move_gaussians<T, L>(m, head, of.nearest, of.gaussians, d);
    find_mixture<T, L, P, BACKWARD>(g, of.gaussians, count, d.origin, d.totals);
  }
  find_normaliser<T>(d, rules.softmax);
  if constexpr (BACKWARD) {
    find_slopes<T, L, P>(g, of.gaussians, count, d.mean_q, of.sums);
    SlopeSum<T> slopes;
    add_up_slopes<T, L, P>(g, slopes);
    Through<T> through;
    find_through<T, P>(of.gaussians, count, d, slopes, rules.residual, of.sums, through);
    add_gaussian_sums<T, L>(m, head, g.count, of.sums, sums);
    write_mixture_gradient<T, L, P>(g, through, d.origin, slopes.first, rules.residual);
  } else {
    write_output<T, L, P>(g, d.normaliser, d.statistics.count.n, rules.residual);
  }
}

}  // namespace
