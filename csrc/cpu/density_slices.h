// Density attention of groups of slices, forward and backward: the sweeps one after the other.
#pragma once

#include "density_gradient.h"

namespace {

// What is found of the slices of a group, one after the other.
template <class T>
struct Density {
  Statistics<T> statistics;
  Origin<T> origin;
  Totals<T> totals;
  Normaliser<T> normaliser;
};

// Whether a group may ask for products.
template <class L, Padding P, bool BACKWARD>
constexpr bool kProducts = !L::kRows && !BACKWARD && P == Padding::kNone;

template <class T, class L, Padding P, bool BACKWARD, bool EXACT>
DAAM_INLINE void sweep_densities(const Group<T>& g, const Mask<T>& asked, const Origin<T>& o, Totals<T>& found) {
  if constexpr (kProducts<L, P, BACKWARD>)
    if (g.factor) return find_densities<T, L, P, BACKWARD, EXACT, true>(g, asked, o, found);
  find_densities<T, L, P, BACKWARD, EXACT>(g, asked, o, found);
}

template <class T, class L, Padding P, bool BACKWARD>
DAAM_INLINE void find_totals(const Group<T>& g, Density<T>& d) {
  origin_at_center<T>(d.origin, d.statistics, g.heads->center, g.heads->root);
  if constexpr (BACKWARD) {
    start_at<T>(d.origin, find_near<T, L, P>(g, d.statistics));
    d.origin.grad = first_gradients<T, L, P>(g);
  }
  d.totals.density = d.totals.q = V<T>{};
  const Mask<T> lanes = g.lanes(), easy = lanes & ~g.heads->narrow;
  Mask<T> moved = lanes & g.heads->narrow;
  if (any(easy)) {
    sweep_densities<T, L, P, BACKWARD, false>(g, easy, d.origin, d.totals);
    moved |= easy & too_far<T>(d.totals.density, d.statistics.count.n);
  }
  if (any(moved)) {
    if (any(easy) && g.factor) g.pack_again(g.unit, g.number);
    Nearest<T> to;
    to.distance = to.x = to.grad = V<T>{};
    find_nearest<T, L, P, BACKWARD>(g, moved, d.statistics, INT64_MAX, to);
    move_origin<T>(d.origin, moved, to, d.statistics, g.heads->center);
    sweep_densities<T, L, P, BACKWARD, true>(g, moved, d.origin, d.totals);
  }
}

template <class T, class L, Padding P>
DAAM_INLINE void differentiate(const Group<T>& g, const Density<T>& d, bool residual, SliceSums<T>& sums) {
  const V<T> mean_q = mean_of_q<T>(d.totals, d.normaliser, d.origin);
  Slopes<T> raw;
  raw.t0 = sum_of_slopes(d.totals.density, d.totals.q, mean_q);
  raw.p1 = raw.p2 = V<T>{};
  find_slopes<T, L>(g, d.origin, mean_q, raw);
  Through<T> t;
  find_through<T, P>(raw, d.normaliser, d.origin, d.statistics, *g.heads, residual, sums, t);
  write_gradient<T, L, P>(g, t, d.origin, residual);
}

// Groups that are worked on together: a processor that waits for one group's root can go on with the next group's.
constexpr int kTogether = 4;
constexpr int kMostTogether = 64;  // short ones, where they lie: each call begins with a root that nothing hides
constexpr int kSummedTogether = 16;  // of those, in T: sums of sums round less

// Forward or backward of up to kTogether groups of slices of one length. sums: of each group, the backward's.
template <class T, class L, Padding P, bool BACKWARD>
void work_on_groups(const Group<T>* groups, int count, const Rules& rules, SliceSums<T>* sums) {
  Density<T> found[kTogether];
  for (int b = 0; b < count; b++) find_statistics<T, L, P>(groups[b], rules.eps, found[b].statistics);
  for (int b = 0; b < count; b++) find_totals<T, L, P, BACKWARD>(groups[b], found[b]);
  for (int b = 0; b < count; b++) {
    Density<T>& d = found[b];
    find_normaliser<T>(d.totals.density, d.origin, d.statistics, *groups[b].heads, rules.softmax, d.normaliser);
    if constexpr (BACKWARD)
      differentiate<T, L, P>(groups[b], d, rules.residual, sums[b]);
    else if (kProducts<L, P, BACKWARD> && groups[b].factor)
      *groups[b].factor = d.normaliser.factor;
    else
      write_output<T, L, P>(groups[b], d.normaliser, d.statistics.count.n, rules.residual);
  }
}

}  // namespace
