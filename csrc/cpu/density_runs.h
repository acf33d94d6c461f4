// Slices too long for the cache: cut into runs, which are swept several times, with a merge of what the runs found
// after each sweep. All runs of all slices are spread over the threads. Here are the sweeps, and the statistics.
#pragma once

#include "density_columns.h"
#include "density_rows.h"

namespace {

// What a run found of a group of slices.
template <class T>
struct RunStatistics {
  Statistics<T> statistics;
  V<T> squares, near, first_grad;
  Mask<T> any_valid;
};

// Found, of a run, is a RunStatistics; Known, of a group of slices, has statistics and moved.
template <class T, class Unit, bool BACKWARD, Padding P, class Found, class Known>
class Runs {
 protected:
  typedef typename Unit::Layout L;
  static constexpr int N = Vector<T>::N, kLanes = L::kRows ? 1 : N;  // in rows a unit is one slice

  Runs(Job<T>& job, daam_parallel_for parallel_for)
      : job(job), runs(divide_up(job.longest, job.run)), groups(L::kRows ? 1 : divide_up(job.width, N)),
        batch(least(job.units, most(1, kBatchNumbers / (job.width * job.longest)))), parallel_for(parallel_for),
        found_memory(sizeof(Found) * batch * runs * groups), known_memory(sizeof(Known) * batch * groups),
        found(static_cast<Found*>(found_memory.at)), known(static_cast<Known*>(known_memory.at)) {}

  // run_batch() for as many units at a time as stay in the caches.
  void run_batches(Callback<> run_batch) {
    if (!found || !known) {
      return job.run_out_of_memory();
    }
    for (first = 0; first < job.units; first += batch) {
      units = least(batch, job.units - first);
      backwards = true;
      run_batch();
    }
  }

  // body for every run of the batch, and what it writes is written back.
  void sweep_runs(bool write, Callback<const Group<T>&, Found&, Known&> body) {
    const int64_t count = units * runs;
    backwards = !backwards;
    const auto run = [&](int64_t i) {
      const int64_t number = backwards ? count - 1 - i : i;
      each_group(first + number / runs, number % runs, backwards ? -1 : 1, write, body);
    };
    run_parallel(parallel_for, count, run);
  }

  // body(unit, number of the group) for every group of the batch.
  void merge_units(Callback<int64_t, int64_t> body) {
    const auto merge = [&](int64_t i) { body(first + i / groups, i % groups); };
    run_parallel(L::kRows ? nullptr : parallel_for, units * groups, merge);  // rows are done before threads are woken
  }

  void each_group(
      int64_t unit, int64_t run, int64_t step, bool write, const Callback<const Group<T>&, Found&, Known&>& body) {
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

  Known& known_of(int64_t unit, int64_t j) { return known[(unit - first) * groups + j]; }
  Found& found_of(int64_t unit, int64_t run, int64_t j) {
    return found[((unit - first) * runs + run) * groups + j];
  }
  int64_t head(int64_t unit) const { return L::kRows ? unit % job.problem.num_heads : job.column_head(unit); }
  int64_t runs_of(int64_t unit) const { return divide_up(job.length(head(unit)), job.run); }
  const Heads<T>& heads(int64_t unit) const { return job.heads[head(unit)]; }

  void find_run_statistics(const Group<T>& whole, RunStatistics<T>& f) {
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
    f.squares = squares_from_mean<T>(m, m.first * count.share);
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

  // In double, relative to the first run's mean, so that an offset of all runs costs no digits. Returns y's gradients at
  // the first elements that are not padding.
  V<T> merge_statistics(int64_t unit, int64_t j) {
    Known& k = known_of(unit, j);
    V<T> counts{}, grads{};
    for (int lane = 0; lane < kLanes; lane++) {
      const T base = found_of(unit, 0, j).statistics.high[lane];
      double count = 0, first = 0, second = 0;
      bool have_grad = false;
      T grad = 0;
      for (int64_t r = 0; r < runs_of(unit); r++) {
        const Found& f = found_of(unit, r, j);
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
      grads[lane] = grad;
    }
    set_count<T>(k.statistics.count, counts);
    k.statistics.rstd = 1 / square_root(k.statistics.var);
    return grads;
  }

  // The element near each slice's centers, from low on beyond the mean's high part, among those near the runs' own.
  V<T> merge_near(int64_t unit, int64_t j, V<T> low) {
    const V<T> high = known_of(unit, j).statistics.high;
    const auto distance = [&](V<T> x) { return absolute<T>((x - high) - low); };
    V<T> best = found_of(unit, 0, j).near;
    for (int64_t r = 1; r < runs_of(unit); r++) {
      const V<T> other = found_of(unit, r, j).near;
      best = distance(other) < distance(best) ? other : best;
    }
    return best;
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

  // The nearest of those that the runs found; nearest(found) of a run.
  template <class Field>
  Nearest<T> nearest_of_runs(int64_t unit, int64_t j, Field nearest) {
    Nearest<T> best = nearest(found_of(unit, 0, j));
    for (int64_t r = 1; r < runs_of(unit); r++) {
      const Nearest<T> other = nearest(found_of(unit, r, j));
      const Mask<T> closer = other.distance < best.distance;
      best.distance = closer ? other.distance : best.distance;
      best.x = closer ? other.x : best.x;
      best.grad = closer ? other.grad : best.grad;
    }
    return best;
  }

  bool any_moved() const {
    for (int64_t i = 0; i < units * groups; i++)
      if (any(known[i].moved)) return true;
    return false;
  }

  Job<T>& job;
  const int64_t runs, groups, batch;
  int64_t first, units;    // of the batch
  bool backwards;          // every sweep begins with what the one before left in the caches
  const daam_parallel_for parallel_for;
  const Memory found_memory, known_memory;
  Found* const found;
  Known* const known;
};

}  // namespace
