// The product over slices too long for the cache.
#pragma once

#include "density_runs.h"

namespace {

// Sums of densities, and of densities times q, times z and z (z + twice). In long slices no few elements have all the
// weight, so the sums of p may be put together from them without a sweep of their own.
template <class T>
struct WeightedSums {
  V<T> z, zz, qz, qzz;
};

template <class T>
struct Found : RunStatistics<T> {
  Totals<T> totals;
  WeightedSums<T> sums;
  Nearest<T> nearest;
};

// What is known of a group of slices.
template <class T>
struct Known {
  Statistics<T> statistics;
  Origin<T> origin;
  Mask<T> moved;
  Totals<T> totals;
  Normaliser<T> normaliser;
  V<T> mean_q;
  Through<T> through;
};

template <class T, class Unit, bool BACKWARD, Padding P>
class Split : Runs<T, Unit, BACKWARD, P, Found<T>, Known<T>> {
  typedef Runs<T, Unit, BACKWARD, P, Found<T>, Known<T>> Base;
  typedef typename Base::L L;
  using Base::N, Base::kLanes, Base::job, Base::first, Base::units, Base::sweep_runs, Base::merge_units;
  using Base::known_of, Base::found_of, Base::head, Base::heads, Base::runs_of, Base::add_runs, Base::any_moved;

 public:
  Split(Job<T>& job, daam_parallel_for parallel_for) : Base(job, parallel_for) {}

  void run() {
    Base::run_batches([&] { run_batch(); });
  }

 private:
  void run_batch() {
    sweep_runs(false, [&](const Group<T>& g, Found<T>& f, Known<T>&) { Base::find_run_statistics(g, f); });
    merge_units([&](int64_t unit, int64_t j) { begin(unit, j); });
    sweep_runs(false, [&](const Group<T>& g, Found<T>& f, Known<T>& k) { find_run_sums(g, k, ~k.moved, f); });
    merge_units([&](int64_t unit, int64_t j) { merge_totals(unit, j); });
    if (any_moved()) {
      sweep_runs(false, [&](const Group<T>& g, Found<T>& f, Known<T>& k) {
        if (any(k.moved)) find_nearest<T, L, P, BACKWARD>(g, k.moved, k.statistics, job.run, f.nearest);
      });
      merge_units([&](int64_t unit, int64_t j) { merge_nearest(unit, j); });
      sweep_runs(false, [&](const Group<T>& g, Found<T>& f, Known<T>& k) { find_run_sums(g, k, k.moved, f); });
    }
    merge_units([&](int64_t unit, int64_t j) { finish(unit, j); });
    if constexpr (BACKWARD)
      for (int64_t unit = first; unit < first + units; unit++) merge_slopes(unit);
    sweep_runs(true, [&](const Group<T>& g, Found<T>& f, Known<T>& k) { write(g, f, k); });
  }

  void begin(int64_t unit, int64_t j) {
    Known<T>& k = known_of(unit, j);
    const V<T> first_grads = Base::merge_statistics(unit, j);
    origin_at_center<T>(k.origin, k.statistics, heads(unit).center, heads(unit).root);
    if constexpr (BACKWARD) {
      k.origin.grad = first_grads;
      start_at<T>(k.origin, Base::merge_near(unit, j, k.origin.low));
    }
    k.moved = heads(unit).narrow & first_lanes<T>(kLanes);
  }

  void find_run_densities(const Group<T>& g, const Known<T>& k, Mask<T> asked, Totals<T>& totals) {
    if (any(k.moved))
      find_densities<T, L, P, BACKWARD, true>(g, asked, k.origin, totals);
    else
      find_densities<T, L, P, BACKWARD, false>(g, asked, k.origin, totals);
  }

  void find_run_sums(const Group<T>& g, const Known<T>& k, Mask<T> asked, Found<T>& f) {
    if (!any(asked & g.lanes())) return;
    find_run_densities(g, k, asked, f.totals);
    if constexpr (BACKWARD)
      each_row<T, L>(g, asked, [&](int r) __attribute__((always_inline)) {
        const Row<T> row = g.row[r];
        const V<T> twice = of_row<T, L>(k.origin.twice, r);
        Ahead ahead = g.ahead_grad[r];
        Sum<T> z, zz, qz, qzz;
        const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
          if (!L::kRows || i % kLine == 0) ahead.touch<L>(i);
          const V<T> from = load(row.z + i * N), mz = load(row.density + i * N) * from, mzz = mz * (from + twice);
          const V<T> q = load(row.q + i * N);
          z += mz;
          zz += mzz;
          qz.block += mz * q;
          qzz.block += mzz * q;
        };
        sweep<T, L>(row.n, body, [&]() __attribute__((always_inline)) { z.flush(), zz.flush(), qz.flush(), qzz.flush(); });
        set_sum<T, L>(f.sums.z, r, z.total);
        set_sum<T, L>(f.sums.zz, r, zz.total);
        set_sum<T, L>(f.sums.qz, r, qz.total);
        set_sum<T, L>(f.sums.qzz, r, qzz.total);
      });
  }

  void add_totals(int64_t unit, int64_t j) {
    Totals<T>& totals = known_of(unit, j).totals;
    totals.density = add_runs(unit, j, [](const Found<T>& f) { return f.totals.density; });
    if (BACKWARD) totals.q = add_runs(unit, j, [](const Found<T>& f) { return f.totals.q; });
  }

  void merge_totals(int64_t unit, int64_t j) {
    Known<T>& k = known_of(unit, j);
    if (any(k.moved)) return;
    add_totals(unit, j);
    k.moved = too_far<T>(k.totals.density, k.statistics.count.n) & first_lanes<T>(kLanes);
  }

  void merge_nearest(int64_t unit, int64_t j) {
    Known<T>& k = known_of(unit, j);
    if (!any(k.moved)) return;
    const Nearest<T> best = Base::nearest_of_runs(unit, j, [](const Found<T>& f) { return f.nearest; });
    move_origin<T>(k.origin, k.moved, best, k.statistics, heads(unit).center);
  }

  void finish(int64_t unit, int64_t j) {
    Known<T>& k = known_of(unit, j);
    if (any(k.moved)) add_totals(unit, j);
    find_normaliser<T>(k.totals.density, k.origin, k.statistics, heads(unit), job.rules.softmax, k.normaliser);
    if (BACKWARD) k.mean_q = mean_of_q<T>(k.totals, k.normaliser, k.origin);
  }

  void merge_slopes(int64_t unit) {
    double* const to = job.sums + (unit / job.units_per_task * job.problem.num_heads + head(unit)) * 4;
    const int64_t count = L::kRows ? 1 : job.column_lanes(unit).count;
    for (int64_t j = 0; j < divide_up(count, N); j++) {
      Known<T>& k = known_of(unit, j);
      const auto sum_p = [&](V<T> of_densities, V<T> of_q) { return sum_of_slopes(of_densities, of_q, k.mean_q); };
      const Slopes<T> raw = {
          sum_p(k.totals.density, k.totals.q),
          sum_p(add_runs(unit, j, [](const Found<T>& f) { return f.sums.z; }),
                add_runs(unit, j, [](const Found<T>& f) { return f.sums.qz; })),
          sum_p(add_runs(unit, j, [](const Found<T>& f) { return f.sums.zz; }),
                add_runs(unit, j, [](const Found<T>& f) { return f.sums.qzz; }))};
      SliceSums<T> sums;
      find_through<T, P>(
          raw, k.normaliser, k.origin, k.statistics, heads(unit), job.rules.residual, sums, k.through);
      for (int64_t l = 0; l < least(N, count - j * N); l++)
        to[0] += sums.t0[l], to[1] += sums.t0_v[l], to[2] += sums.u1_v[l], to[3] += sums.u2_v[l];
    }
  }

  void write(const Group<T>& g, Found<T>& f, const Known<T>& k) {
    find_run_densities(g, k, ~Mask<T>{}, f.totals);
    if constexpr (BACKWARD) {
      Slopes<T> again{};
      find_slopes<T, L>(g, k.origin, k.mean_q, again);
      write_gradient<T, L, P>(g, k.through, k.origin, job.rules.residual);
    } else {
      write_output<T, L, P>(g, k.normaliser, k.statistics.count.n, job.rules.residual);
    }
  }
};

}  // namespace
