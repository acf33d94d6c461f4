// Slices too long for the cache: cut into runs of rows, which are swept several times, with a merge of what the runs
// found after each sweep. All runs of all slices are spread over the threads.
#pragma once

#include "density_resident.h"

namespace {

// What a run found of a group of slices.
template <class T>
struct Found {
  Statistics<T> statistics;  // var: the squares' sum
  V<T> first_grad;
  Mask<T> any_valid;
  Totals<T> totals;
  Nearest<T> nearest;
  Slopes<T> slopes;
};

// What is known of a group of slices.
template <class T>
struct Known {
  Statistics<T> statistics;
  Origin<T> origin;
  Totals<T> totals;
  Mask<T> moved;
  Normaliser<T> normaliser;
  V<T> mean_q;
  Through<T> through;
};

template <class T, bool ROWS, bool BACKWARD, Padding P>
class Split {
  using Whole = Resident<T, ROWS, BACKWARD, P>;
  static constexpr int N = Vector<T>::N;
  static constexpr int64_t kRun = ROWS ? 8192 : 512;

 public:
  explicit Split(Job<T>& job)
      : job(job), runs(divide_up(job.longest, kRun)), groups(divide_up(job.width, N)),
        found_memory(sizeof(Found<T>) * job.units * runs * groups), known_memory(sizeof(Known<T>) * job.units * groups),
        found(static_cast<Found<T>*>(found_memory.at)), known(static_cast<Known<T>*>(known_memory.at)) {}

  // parallel(count, body) calls body(i) for every i below count.
  template <class Parallel>
  void run(Parallel parallel) {
    if (!found || !known) {
      job.status = DAAM_OUT_OF_MEMORY;
      return;
    }
    const auto sweep_runs = [&](auto body) {
      parallel(job.units * runs, [&](int64_t i) {
        const int64_t unit = i / runs, start = i % runs * kRun, n = job.heads[job.head(unit)].n;
        if (start < n) each_group(unit, start, least(kRun, n - start), body);
      });
    };
    const auto merge_units = [&](auto body) {
      parallel(job.units, [&](int64_t unit) {
        for (int64_t j = 0; j < divide_up(job.lanes(unit).count, N); j++) body(unit, j);
      });
    };
    sweep_runs([&](Run& run) { find_statistics(run); });
    merge_units([&](int64_t unit, int64_t j) { merge_statistics(unit, j); });
    sweep_runs([&](Run& run) {
      if (!run.head.narrow) run.found.totals = find_densities(run);
    });
    merge_units([&](int64_t unit, int64_t j) { merge_totals(unit, j); });
    sweep_runs([&](Run& run) {
      if (any(run.known.moved)) run.found.nearest = nearest<T, ROWS, P, BACKWARD>(run.group, run.known.statistics, run.head);
    });
    merge_units([&](int64_t unit, int64_t j) { merge_nearest(unit, j); });
    sweep_runs([&](Run& run) {
      if (any(run.known.moved)) run.found.totals = find_densities(run);
    });
    merge_units([&](int64_t unit, int64_t j) { finish(unit, j); });
    if constexpr (BACKWARD) {
      sweep_runs([&](Run& run) { run.found.slopes = find_slopes(run); });
      for (int64_t unit = 0; unit < job.units; unit++) merge_slopes(unit);
    }
    sweep_runs([&](Run& run) { write(run); });
  }

 private:
  // A group's rows [start, start + n).
  struct Run {
    const Head<T>& head;
    const Group<T> group;
    const Packed<T>& packed;
    const Scratch<T> scratch;
    const Ahead ahead;
    const int64_t at;  // of the group in the packed arrays
    Found<T>& found;
    Known<T>& known;
    bool writes;
  };

  template <class Body>
  void each_group(int64_t unit, int64_t start, int64_t n, Body& body) {
    const Head<T>& head = job.heads[job.head(unit)];
    const Lanes lanes = job.lanes(unit);
    void* const memory = daam::thread_scratch(scratch_bytes(job, kRun));
    if (!memory) {
      job.status = DAAM_OUT_OF_MEMORY;
      return;
    }
    const Packed<T> packed = Whole::pack(job, lanes, head.start + start, n, memory);
    const Scratch<T> scratch = {packed.density, packed.z, packed.q};
    bool written = false;
    for (int64_t j = 0; j < packed.groups; j++) {
      const Ahead here = {reinterpret_cast<const char*>(packed.x.at), reinterpret_cast<const char*>(packed.x.at), 0};
      Run run = {head, Whole::group(packed, lanes, j), packed, scratch, here, j * packed.x.group,
                 found_of(unit, start / kRun, j), known[unit * groups + j], false};
      body(run);
      written |= run.writes;
    }
    if (written) {
      Whole::unpack(job, lanes, head.start + start, packed);
      finish_streaming();
    }
  }

  Found<T>& found_of(int64_t unit, int64_t run, int64_t j) { return found[(unit * runs + run) * groups + j]; }
  int64_t runs_of(int64_t unit) const { return divide_up(job.heads[job.head(unit)].n, kRun); }

  void find_statistics(Run& run) {
    const Group<T>& g = run.group;
    const V<T> count = count_elements<T, ROWS, P>(g), members = count > 1 ? count : splat<T>(1);
    V<T> shift = guess_mean<T, ROWS, P>(g);
    Moments<T> m = moments<T, ROWS, P>(g, shift);
    shift += m.first / members;
    m = moments<T, ROWS, P>(g, shift);
    const V<T> offset = m.first / members, squares = m.second - m.first * offset;
    Statistics<T>& s = run.found.statistics;
    s = finish_statistics<T>(shift, m, count, 0);
    s.var = squares < 0 ? V<T>{} : squares;
    if constexpr (BACKWARD) {
      run.found.first_grad = first_gradient<T, ROWS, P>(g);
      run.found.any_valid = has_valid(g);
    }
  }

  static Mask<T> has_valid(const Group<T>& g) {
    if constexpr (P == Padding::kNone) return ~Mask<T>{};
    Mask<T> found{};
    for (int64_t i = 0; i < (ROWS ? divide_up(g.n, N) : g.n); i++) found |= load_mask<T>(g.valid + i * N);
    if constexpr (ROWS) return any(found) ? ~Mask<T>{} : Mask<T>{};
    return found;
  }

  // In double, relative to the first run's mean, so that an offset of all runs costs no digits.
  void merge_statistics(int64_t unit, int64_t j) {
    Known<T>& k = known[unit * groups + j];
    for (int lane = 0; lane < N; lane++) {
      const T base = found_of(unit, 0, j).statistics.high[lane];
      double count = 0, first = 0, second = 0;
      bool have_grad = false;
      T grad = 0;
      for (int64_t r = 0; r < runs_of(unit); r++) {
        const Found<T>& f = found_of(unit, r, j);
        const double c = (double)f.statistics.count[lane];
        if (BACKWARD && !have_grad && f.any_valid[lane]) grad = f.first_grad[lane], have_grad = true;
        if (c == 0) continue;
        const double from_base = ((double)f.statistics.high[lane] - base) + (double)f.statistics.low[lane];
        const double mean = count ? first / count : 0, apart = from_base - mean;
        second += (double)f.statistics.var[lane] + (count ? apart * apart * (count * c / (count + c)) : 0);
        first += from_base * c;
        count += c;
      }
      const double offset = first / (count > 1 ? count : 1);
      const T high = (T)(base + offset);
      k.statistics.count[lane] = (T)count;
      k.statistics.high[lane] = high;
      k.statistics.low[lane] = (T)(offset - ((double)high - base));
      k.statistics.var[lane] = (T)(second / ((count > 2 ? count : 2) - 1)) + (T)job.rules.eps;
      k.origin.grad[lane] = grad;
    }
    const Head<T>& head = job.heads[job.head(unit)];
    const V<T> grad = k.origin.grad;
    k.origin = origin_at_center<T>(k.statistics, head);
    k.origin.grad = grad;
    k.moved = head.narrow ? ~Mask<T>{} : Mask<T>{};
  }

  Totals<T> find_densities(const Run& run) {
    const Origin<T>& o = run.known.origin;
    if (any(run.known.moved)) return densities<T, ROWS, P, BACKWARD, true>(run.group, o, run.scratch, run.ahead);
    return densities<T, ROWS, P, BACKWARD, false>(run.group, o, run.scratch, run.ahead);
  }

  template <class Field>
  V<T> add_runs(int64_t unit, int64_t j, Field field) {
    V<T> sum{};
    for (int lane = 0; lane < N; lane++) {
      double total = 0;
      for (int64_t r = 0; r < runs_of(unit); r++) total += (double)field(found_of(unit, r, j))[lane];
      sum[lane] = (T)total;
    }
    return sum;
  }

  void add_totals(int64_t unit, int64_t j) {
    Totals<T>& totals = known[unit * groups + j].totals;
    totals.density = add_runs(unit, j, [](const Found<T>& f) { return f.totals.density; });
    if (BACKWARD) totals.q = add_runs(unit, j, [](const Found<T>& f) { return f.totals.q; });
  }

  void merge_totals(int64_t unit, int64_t j) {
    if (job.heads[job.head(unit)].narrow) return;
    Known<T>& k = known[unit * groups + j];
    add_totals(unit, j);
    k.moved = too_far<T>(k.totals.density, k.statistics.count);
  }

  void merge_nearest(int64_t unit, int64_t j) {
    Known<T>& k = known[unit * groups + j];
    if (!any(k.moved)) return;
    Nearest<T> best = found_of(unit, 0, j).nearest;
    for (int64_t r = 1; r < runs_of(unit); r++) {
      const Nearest<T>& other = found_of(unit, r, j).nearest;
      const Mask<T> closer = other.distance < best.distance;
      best.distance = closer ? other.distance : best.distance;
      best.x = closer ? other.x : best.x;
      best.grad = closer ? other.grad : best.grad;
    }
    move_origin<T>(k.origin, k.moved, best, k.statistics, job.heads[job.head(unit)]);
  }

  void finish(int64_t unit, int64_t j) {
    Known<T>& k = known[unit * groups + j];
    if (any(k.moved)) add_totals(unit, j);
    k.normaliser =
        normaliser<T>(k.totals.density, k.origin, k.statistics.var, job.heads[job.head(unit)], job.rules.softmax);
    if (BACKWARD) k.mean_q = mean_of_q<T>(k.totals, k.normaliser, k.origin);
  }

  Slopes<T> find_slopes(const Run& run) {
    find_densities(run);
    return slopes<T, ROWS>(run.group.n, run.known.origin, run.scratch, run.known.mean_q);
  }

  void merge_slopes(int64_t unit) {
    const Lanes lanes = job.lanes(unit);
    Accumulated<T, ROWS> sums;
    for (int64_t j = 0; j < divide_up(lanes.count, N); j++) {
      Known<T>& k = known[unit * groups + j];
      const Slopes<T> raw = {
          add_runs(unit, j, [](const Found<T>& f) { return f.slopes.t0; }),
          add_runs(unit, j, [](const Found<T>& f) { return f.slopes.p1; }),
          add_runs(unit, j, [](const Found<T>& f) { return f.slopes.p2; })};
      k.through = gradient_through<T, ROWS, P>(
          raw, k.normaliser, k.origin, k.statistics, job.heads[job.head(unit)], job.rules.residual,
          ROWS ? ~Mask<T>{} : first_lanes<T>(lanes.count - j * N), sums);
    }
    add_sums(sums, job.sums + (unit / job.units_per_task * job.problem.num_heads + job.head(unit)) * 4);
  }

  void write(Run& run) {
    const Known<T>& k = run.known;
    T* const out = run.packed.out + run.at;
    run.writes = true;
    if constexpr (BACKWARD) {
      find_slopes(run);
      write_gradient<T, ROWS, P>(run.group, k.through, k.origin, run.scratch, job.rules.residual, out);
    } else {
      find_densities(run);
      T* const weights = run.packed.weights ? run.packed.weights + run.at : nullptr;
      const Mask<T> skipped = skipped_slices<T, P>(k.statistics.count);
      weigh<T, ROWS, P>(run.group, k.normaliser, skipped, job.rules.residual, run.scratch.density, out, weights);
    }
  }

  Job<T>& job;
  const int64_t runs, groups;
  const Memory found_memory, known_memory;
  Found<T>* const found;
  Known<T>* const known;
};

}  // namespace
