// Slices too long for the cache: cut into runs, which are swept several times, with a merge of what the runs found after
// each sweep. All runs of all slices are spread over the threads.
#pragma once

#include "density_columns.h"
#include "density_rows.h"

namespace {

// Sums of densities, and of densities times q, times z and z (z + twice). In long slices no few elements have all the
// weight, so the sums of p may be put together from them without a sweep of their own.
template <class T>
struct WeightedSums {
  V<T> z, zz, qz, qzz;
};

// What a run found of a group of slices.
template <class T>
struct Found {
  Statistics<T> statistics;
  V<T> squares, near, first_grad;
  Mask<T> any_valid;
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
class Split {
  typedef typename Unit::Layout L;
  static constexpr int N = Vector<T>::N, kLanes = L::kRows ? 1 : N;  // in rows a unit is one slice

 public:
  explicit Split(Job<T>& job)
      : job(job), runs(divide_up(job.longest, job.run)), groups(L::kRows ? 1 : divide_up(job.width, N)),
        batch(least(job.units, most(1, kBatchNumbers / (job.width * job.longest)))),
        found_memory(sizeof(Found<T>) * batch * runs * groups), known_memory(sizeof(Known<T>) * batch * groups),
        found(static_cast<Found<T>*>(found_memory.at)), known(static_cast<Known<T>*>(known_memory.at)) {}

  // parallel(count, body) calls body(i) for every i below count.
  template <class Parallel>
  void run(Parallel parallel) {
    if (!found || !known) {
      return job.run_out_of_memory();
    }
    for (first = 0; first < job.units; first += batch) run_batch(parallel, least(batch, job.units - first));
  }

 private:
  // Units from `first` on.
  template <class Parallel>
  void run_batch(Parallel parallel, int64_t units) {
    bool backwards = true;  // every sweep begins with what the one before left in the caches
    const auto sweep_runs = [&](bool write, auto body) {
      const int64_t count = units * runs;
      backwards = !backwards;
      parallel(count, [&](int64_t i) {
        const int64_t number = backwards ? count - 1 - i : i;
        each_group(first + number / runs, number % runs, backwards ? -1 : 1, write, body);
      });
    };
    const auto merge_units = [&](auto body) {
      const auto merge = [&](int64_t i) { body(first + i / groups, i % groups); };
      if constexpr (L::kRows)  // sooner done than threads are woken
        for (int64_t i = 0; i < units; i++) merge(i);
      else
        parallel(units * groups, merge);
    };
    sweep_runs(false, [&](const Group<T>& g, Found<T>& f, Known<T>&) { find_run_statistics(g, f); });
    merge_units([&](int64_t unit, int64_t j) { merge_statistics(unit, j); });
    sweep_runs(false, [&](const Group<T>& g, Found<T>& f, Known<T>& k) { find_run_sums(g, k, ~k.moved, f); });
    merge_units([&](int64_t unit, int64_t j) { merge_totals(unit, j); });
    if (any_moved(units)) {
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

  template <class Body>
  void each_group(int64_t unit, int64_t run, int64_t step, bool write, Body& body) {
    if (run >= runs_of(unit)) return;
    void* const memory = daam::thread_scratch(Unit::scratch_bytes(job, job.run));
    if (!memory) {
      return job.run_out_of_memory();
    }
    Unit packed(job, job.run, memory);
    const int64_t next = run + step >= 0 && run + step < runs_of(unit) ? run + step : run;
    packed.pack(unit, run * job.run, next * job.run);
    for (int64_t j = 0; j < packed.groups(); j++) body(*packed.take(j, 1), found_of(unit, run, j), known_of(unit, j));
    if (write) {
      packed.write_back();
      finish_streaming();
    }
  }

  Known<T>& known_of(int64_t unit, int64_t j) { return known[(unit - first) * groups + j]; }
  Found<T>& found_of(int64_t unit, int64_t run, int64_t j) {
    return found[((unit - first) * runs + run) * groups + j];
  }
  int64_t head(int64_t unit) const { return L::kRows ? unit % job.problem.num_heads : job.column_head(unit); }
  int64_t runs_of(int64_t unit) const { return divide_up(job.length(head(unit)), job.run); }
  const Heads<T>& heads(int64_t unit) const { return job.heads[head(unit)]; }

  void find_run_statistics(const Group<T>& whole, Found<T>& f) {
    Group<T> g = whole;  // of the run's own length
    Heads<T> of_run = *g.heads;
    set_count<T>(of_run.count, splat<T>((T)g.row[0].n));
    g.heads = &of_run;
    Count<T>& count = f.statistics.count;
    count_elements<T, L, P>(g, count);
    count.share = 1 / (count.n > 1 ? count.n : splat<T>(1));  // a run may have fewer than two
    Moments<T> m{};
    m.shift = guess_means<T, L, P>(g);
    find_moments<T, L, P>(g, g.lanes(), m);
    const Mask<T> far = is_far<T>(m, count) & g.lanes();
    if (any(far)) {
      m.shift = far ? m.shift + m.first * count.share : m.shift;
      find_moments<T, L, P>(g, far, m);
    }
    finish_statistics<T>(m, 0, f.statistics);
    const V<T> squares = m.second - m.first * count.share * m.first;
    f.squares = squares < 0 ? V<T>{} : squares;
    if constexpr (BACKWARD) {
      f.near = find_near<T, L, P>(g, f.statistics);
      f.first_grad = first_gradients<T, L, P>(g);
      f.any_valid = has_valid(g);
    }
  }

  static Mask<T> has_valid(const Group<T>& g) {
    if constexpr (P == Padding::kNone) return ~Mask<T>{};
    Mask<T> valid{};
    for (int64_t i = 0; i < (L::kRows ? divide_up(g.row[0].n, N) : g.row[0].n); i++)
      valid |= load_mask<T>(g.row[0].valid + i * N);
    if constexpr (L::kRows) return any(valid) ? ~Mask<T>{} : Mask<T>{};
    return valid;
  }

  // In double, relative to the first run's mean, so that an offset of all runs costs no digits.
  void merge_statistics(int64_t unit, int64_t j) {
    Known<T>& k = known_of(unit, j);
    V<T> counts{};
    for (int lane = 0; lane < kLanes; lane++) {
      const T base = found_of(unit, 0, j).statistics.high[lane];
      double count = 0, first = 0, second = 0;
      bool have_grad = false;
      T grad = 0;
      for (int64_t r = 0; r < runs_of(unit); r++) {
        const Found<T>& f = found_of(unit, r, j);
        const double c = (double)f.statistics.count.n[lane];
        if (BACKWARD && !have_grad && f.any_valid[lane]) grad = f.first_grad[lane], have_grad = true;
        if (c == 0) continue;
        const double from_base = ((double)f.statistics.high[lane] - base) + (double)f.statistics.low[lane];
        const double mean = count ? first / count : 0, apart = from_base - mean;
        second += (double)f.squares[lane] + (count ? apart * apart * (count * c / (count + c)) : 0);
        first += from_base * c;
        count += c;
      }
      const double offset = first / (count > 1 ? count : 1);
      const T high = (T)(base + offset);
      counts[lane] = (T)count;
      k.statistics.high[lane] = high;
      k.statistics.low[lane] = (T)(offset - ((double)high - base));
      k.statistics.var[lane] = (T)(second / ((count > 2 ? count : 2) - 1)) + (T)job.rules.eps;
      k.origin.grad[lane] = grad;
    }
    set_count<T>(k.statistics.count, counts);
    k.statistics.rstd = 1 / square_root(k.statistics.var);
    origin_at_center<T>(k.origin, k.statistics, heads(unit));
    if constexpr (BACKWARD) start_at<T>(k.origin, merge_near(unit, j));
    k.moved = heads(unit).narrow & first_lanes<T>(kLanes);
  }

  V<T> merge_near(int64_t unit, int64_t j) {
    const Known<T>& k = known_of(unit, j);
    const auto distance = [&](V<T> x) { return absolute<T>((x - k.origin.high) - k.origin.low); };
    V<T> best = found_of(unit, 0, j).near;
    for (int64_t r = 1; r < runs_of(unit); r++) {
      const V<T> other = found_of(unit, r, j).near;
      best = distance(other) < distance(best) ? other : best;
    }
    return best;
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
        const Ahead ahead = g.ahead[r];
        Sum<T> z, zz, qz, qzz;
        const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
          if (!L::kRows || i % kLine == 0) ahead.touch_grad(i);
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

  template <class Field>
  V<T> add_runs(int64_t unit, int64_t j, Field field) {
    V<T> sum{};
    for (int lane = 0; lane < kLanes; lane++) {
      double total = 0;
      for (int64_t r = 0; r < runs_of(unit); r++) total += (double)field(found_of(unit, r, j))[lane];
      sum[lane] = (T)total;
    }
    return sum;
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

  bool any_moved(int64_t units) const {
    for (int64_t i = 0; i < units * groups; i++)
      if (any(known[i].moved)) return true;
    return false;
  }

  void merge_nearest(int64_t unit, int64_t j) {
    Known<T>& k = known_of(unit, j);
    if (!any(k.moved)) return;
    Nearest<T> best = found_of(unit, 0, j).nearest;
    for (int64_t r = 1; r < runs_of(unit); r++) {
      const Nearest<T>& other = found_of(unit, r, j).nearest;
      const Mask<T> closer = other.distance < best.distance;
      best.distance = closer ? other.distance : best.distance;
      best.x = closer ? other.x : best.x;
      best.grad = closer ? other.grad : best.grad;
    }
    move_origin<T>(k.origin, k.moved, best, k.statistics, heads(unit));
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

  Job<T>& job;
  const int64_t runs, groups, batch;
  int64_t first = 0;  // unit of the batch
  const Memory found_memory, known_memory;
  Found<T>* const found;
  Known<T>* const known;
};

}  // namespace
