// The mixture over slices too long for the cache.
#pragma once

#include "density_mixture.h"
#include "density_runs.h"

namespace {

// The nearest elements are those of a run, or of all.
template <class T>
struct MixtureFound : RunStatistics<T> {
  Totals<T> totals;
  SlopeSum<T> slopes;
};

template <class T>
struct MixtureKnown : MixtureDensity<T> {
  SlopeSum<T> slopes;
  Through<T> through;
};

template <class T, class Unit, bool BACKWARD, Padding P>
class MixtureSplit : Runs<T, Unit, BACKWARD, P, MixtureFound<T>, MixtureKnown<T>> {
  typedef MixtureFound<T> Found;
  typedef MixtureKnown<T> Known;
  typedef Runs<T, Unit, BACKWARD, P, Found, Known> Base;
  typedef typename Base::L L;
  using Base::kLanes, Base::job, Base::first, Base::units, Base::sweep_runs, Base::merge_units;
  using Base::known_of, Base::found_of, Base::head, Base::runs_of, Base::add_runs;

 public:
  MixtureSplit(Job<T>& job, daam_parallel_for parallel_for)
      : Base(job, parallel_for), mixture(*job.mixture), count(mixture.num_gaussians),
        of_runs(Base::batch * Base::runs * Base::groups, count), of_groups(Base::batch * Base::groups, count) {}

  void run() {
    if (!of_runs.there() || !of_groups.there()) {
      return job.run_out_of_memory();
    }
    Base::run_batches([&] { run_batch(); });
  }

 private:
  void run_batch() {
    sweep_runs(false, [&](const Group<T>& g, Found& f, Known&) { Base::find_run_statistics(g, f); });
    merge_units([&](int64_t unit, int64_t j) { begin(unit, j); });
    sweep_densities(false);
    if (Base::any_moved()) {
      sweep_runs(false, [&](const Group<T>& g, Found& f, Known& k) {
        for (int64_t i = 0; i < count && any(k.moved); i++)
          find_nearest_to<T, L, P, BACKWARD>(g, of(k).gaussians[i], k.moved, k.statistics, of(f).nearest[i]);
      });
      merge_units([&](int64_t unit, int64_t j) { move(unit, j); });
      sweep_densities(true);
    }
    merge_units([&](int64_t unit, int64_t j) { find_normaliser<T>(known_of(unit, j), job.rules.softmax); });
    if constexpr (BACKWARD) {
      sweep_runs(false, [&](const Group<T>& g, Found& f, Known& k) {
        find_q<T, L, P>(g, k.origin);
        find_slopes<T, L, P>(g, of(k).gaussians, count, k.mean_q, of(f).sums);
        add_up_slopes<T, L, P>(g, f.slopes);
      });
      for (int64_t unit = first; unit < first + units; unit++) merge_slopes(unit);
    }
    sweep_runs(true, [&](const Group<T>& g, Found& f, Known& k) { write(g, f, k); });
  }

  // again: of the groups alone that have moved slices.
  void sweep_densities(bool again) {
    sweep_runs(false, [&](const Group<T>& g, Found& f, Known& k) {
      if (!again || any(k.moved)) find_mixture<T, L, P, BACKWARD>(g, of(k).gaussians, count, k.origin, f.totals);
    });
    merge_units([&](int64_t unit, int64_t j) {
      Known& k = known_of(unit, j);
      k.totals.density = add_runs(unit, j, [](const Found& f) { return f.totals.density; });
      if (BACKWARD) k.totals.q = add_runs(unit, j, [](const Found& f) { return f.totals.q; });
      if (!again) k.moved = too_far<T>(k.totals.density, k.statistics.count.n) & first_lanes<T>(kLanes);
    });
  }

  OfGaussians<T> of(const Found& f) const { return of_runs.of(&f - Base::found); }
  OfGaussians<T> of(const Known& k) const { return of_groups.of(&k - Base::known); }

  void begin(int64_t unit, int64_t j) {
    Known& k = known_of(unit, j);
    const V<T> grads = Base::merge_statistics(unit, j);
    V<T> near = k.statistics.high;
    if constexpr (BACKWARD) near = Base::merge_near(unit, j, k.statistics.low);
    place_gaussians<T, L>(mixture, head(unit), near, grads, of(k).gaussians, k);
  }

  void move(int64_t unit, int64_t j) {
    Known& k = known_of(unit, j);
    if (!any(k.moved)) return;
    for (int64_t i = 0; i < count; i++)
      of(k).nearest[i] = Base::nearest_of_runs(unit, j, [&](const Found& f) { return of(f).nearest[i]; });
    move_gaussians<T, L>(mixture, head(unit), of(k).nearest, of(k).gaussians, k);
  }

  void merge_slopes(int64_t unit) {
    double* const to = job.sums + unit / job.units_per_task * mixture.num_heads * job.head_sums;
    const int64_t lanes = L::kRows ? 1 : job.column_lanes(unit).count;
    for (int64_t j = 0; j < divide_up(lanes, Base::N); j++) {
      Known& k = known_of(unit, j);
      for (int64_t i = 0; i < count; i++) {
        GaussianSums<T>& sums = of(k).sums[i];
        const auto add = [&](V<T> GaussianSums<T>::* part) {
          return add_runs(unit, j, [&](const Found& f) { return of(f).sums[i].*part; });
        };
        sums.density = add(&GaussianSums<T>::density);
        sums.t0 = add(&GaussianSums<T>::t0);
        sums.p1 = add(&GaussianSums<T>::p1);
        sums.p2 = add(&GaussianSums<T>::p2);
      }
      merge_slope_sums(unit, j);
      find_through<T, P>(of(k).gaussians, count, k, k.slopes, job.rules.residual, of(k).sums, k.through);
      add_gaussian_sums<T, L>(mixture, head(unit), least(Base::N, lanes - j * Base::N), of(k).sums, to);
    }
  }

  void merge_slope_sums(int64_t unit, int64_t j) {
    Known& k = known_of(unit, j);
    for (int lane = 0; lane < kLanes; lane++) {
      double first = 0, rest = 0;
      for (int64_t r = runs_of(unit) - 1; r >= 0; r--)
        if (found_of(unit, r, j).any_valid[lane]) first = (double)found_of(unit, r, j).slopes.first[lane];
      for (int64_t r = 0; r < runs_of(unit); r++) {
        const Found& f = found_of(unit, r, j);
        const double apart = (double)f.slopes.first[lane] - first;
        rest += (double)f.slopes.rest[lane] + (double)f.statistics.count.n[lane] * apart;
      }
      k.slopes.first[lane] = (T)first;
      k.slopes.rest[lane] = (T)rest;
    }
  }

  void write(const Group<T>& g, Found& f, const Known& k) {
    find_mixture<T, L, P, BACKWARD>(g, of(k).gaussians, count, k.origin, f.totals);
    if constexpr (BACKWARD) {
      find_slopes<T, L, P>(g, of(k).gaussians, count, k.mean_q, of(f).sums);
      write_mixture_gradient<T, L, P>(g, k.through, k.origin, k.slopes.first, job.rules.residual);
    } else {
      write_output<T, L, P>(g, k.normaliser, k.statistics.count.n, job.rules.residual);
    }
  }

  const Mixture<T>& mixture;
  const int64_t count;
  const GaussianScratch<T> of_runs, of_groups;
};

}  // namespace
