// The entry of one instruction set: chooses how a call is cut and runs it.
#pragma once

#include "density_mixture_split.h"
#include "density_split.h"

namespace {

template <bool FIRST, class A, class B>
struct Select {
  typedef A type;
};
template <class A, class B>
struct Select<false, A, B> {
  typedef B type;
};

// No other NaN: see pack_as of BFloat16.
template <class T>
T usual(double v) {
  return v == v ? (T)v : (T)NAN;
}

// The variance from which on slices are plain: see Heads. Of sixteen slices of up to eight normal numbers, Gaussians of
// at most that steepness leave none far from the centre in about three groups of four, or more.
template <class T>
double plain_var(const Job<T>& job, const daam::Quadratic& q, int64_t n) {
  const double room = log2((double)kLeastTotal<T>) - q.level;  // for what a small variance adds to the level
  if (!(q.a <= most(8, 2 * n) && room > 0)) return INFINITY;
  return job.rules.softmax ? 0 : q.spread * 0.5 * kLog2E / room;
}

// By the head of the first lane. Lanes are heads that follow each other in rows, and all of one head in columns.
template <class T>
void set_heads(const Job<T>& job, Heads<T>* heads) {
  const daam_density& p = job.problem;
  for (int64_t h = 0; h < p.num_heads; h++) {
    const daam::Quadratic q = job.mixture ? daam::Quadratic() : daam::head_quadratic(p, job.tensors, h);
    const double n = (double)job.length(h), root = sqrt(q.a * 0.5 * kLog2E);
    const bool narrow = !(q.a <= 4.0 * least(job.length(h), 16));
    const double plain = plain_var(job, q, job.length(h));
    for (int lane = 0; lane < Vector<T>::N; lane++) {
      Heads<T>& to = heads[job.rows ? (h + (p.num_heads - 1) * lane) % p.num_heads : h];
      to.center[lane] = usual<T>(q.center), to.spread[lane] = usual<T>(q.spread);
      to.level[lane] = usual<T>(q.level), to.height[lane] = (T)q.height, to.narrow[lane] = narrow ? -1 : 0;
      to.root[lane] = usual<T>(root), to.inverse_root[lane] = usual<T>(1 / root);
      to.count.n[lane] = (T)n, to.count.share[lane] = (T)(1 / n), to.count.free_share[lane] = (T)(1 / (n - 1));
      to.plain_var[lane] = (T)plain;
    }
  }
}

// The Gaussians of a mixture, whose shares are relative to the largest of their head.
template <class T>
void set_gaussians(const Job<T>& job, Component<T>* components, Floor<T>* floors) {
  const daam_density& p = job.problem;
  constexpr double absent = -1e300;  // finite: a head without any has no NaN
  for (int64_t h = 0; h < p.num_heads; h++) {
    const double* const log_shares = job.tensors.log_shares + h * p.num_gaussians;
    double highest = absent;
    for (int64_t k = 0; k < p.num_gaussians; k++) highest = log_shares[k] > highest ? log_shares[k] : highest;
    for (int64_t k = 0; k < p.num_gaussians; k++) {
      const double width = daam::read_width(p, job.tensors, h, k);
      const double log_share = ((log_shares[k] < absent ? absent : log_shares[k]) - highest) * kLog2E;
      Component<T>& to = components[h * p.num_gaussians + k];
      to.center = usual<T>(daam::read_offset(p, job.tensors, h, k));
      to.root = usual<T>(sqrt(0.5 * kLog2E) / fabs(width));
      to.share = usual<T>(exp2(log_share)), to.log_share = log_share;
    }
    floors[h].log = log2(p.eps) - highest * kLog2E;
    floors[h].value = (T)exp2(floors[h].log);
  }
}

// The units of a task where there is a mixture. Not a part of run_task, which is there for the product.
template <class T, class Unit, bool BACKWARD, Padding P>
__attribute__((noinline)) void run_mixture_task(
    Job<T>& job, int64_t task, int64_t begin, int64_t end, Unit& unit) {
  const Mixture<T>& mixture = *job.mixture;
  const GaussianScratch<T> scratch(1, mixture.num_gaussians);
  if (!scratch.there()) {
    return job.run_out_of_memory();
  }
  double* const sums = job.sums + task * job.head_sums * job.problem.num_heads;
  for (int64_t i = begin; i < end; i++) {
    unit.pack(i, 0, 0);
    for (int64_t j = 0; j < unit.groups(); j++) {
      const Group<T>& group = *unit.take(j, 1);
      const int64_t head = group.heads - job.heads;  // of the first lane
      work_on_mixture<T, typename Unit::Layout, P, BACKWARD>(group, mixture, head, job.rules, scratch.of(0), sums);
    }
    unit.write_back();
  }
  finish_streaming();
}

// A task: units one after the other, whose slices stay in the cache. They are read once and written once.
template <class T, class Unit, bool BACKWARD, Padding P>
void run_task(Job<T>& job, int64_t task) {
  const int64_t begin = task * job.units_per_task, end = least(begin + job.units_per_task, job.units);
  void* const memory = daam::thread_scratch(Unit::scratch_bytes(job, job.longest));
  if (!memory) {
    return job.run_out_of_memory();
  }
  Unit unit(job, job.longest, memory);
  if (job.mixture) return run_mixture_task<T, Unit, BACKWARD, P>(job, task, begin, end, unit);
  for (int64_t i = begin; i < end; i++) {
    unit.pack(i, 0, 0);
    unit.work_on_all(job.sums + task * job.problem.num_heads * job.head_sums);
    unit.write_back();
  }
  finish_streaming();
}

template <class T, bool ROWS, bool BACKWARD, Padding P>
void run_job(Job<T>& job, daam_parallel_for parallel_for) {
  using Unit = typename Select<ROWS, Rows<T, BACKWARD, P>, Columns<T, BACKWARD, P>>::type;
  const auto task = [&](int64_t i) { run_task<T, Unit, BACKWARD, P>(job, i); };
  if (job.whole)
    run_parallel(parallel_for, job.tasks, task);
  else if (job.mixture)
    MixtureSplit<T, Unit, BACKWARD, P>(job, parallel_for).run();
  else
    Split<T, Unit, BACKWARD, P>(job, parallel_for).run();
}

template <class T, bool ROWS>
void run_direction(Job<T>& job, daam_parallel_for parallel_for) {
  const int flags = job.problem.flags;
  const bool padded = flags & (DAAM_HAS_MASK | DAAM_HAS_PADDING_VALUE);
  const Padding padding = !padded ? Padding::kNone : flags & DAAM_EXCLUDE ? Padding::kExcluded : Padding::kZeros;
  const bool backward = job.tensors.grad;
  if (padding == Padding::kNone)
    backward ? run_job<T, ROWS, true, Padding::kNone>(job, parallel_for)
             : run_job<T, ROWS, false, Padding::kNone>(job, parallel_for);
  else if (padding == Padding::kZeros)
    backward ? run_job<T, ROWS, true, Padding::kZeros>(job, parallel_for)
             : run_job<T, ROWS, false, Padding::kZeros>(job, parallel_for);
  else
    backward ? run_job<T, ROWS, true, Padding::kExcluded>(job, parallel_for)
             : run_job<T, ROWS, false, Padding::kExcluded>(job, parallel_for);
}

template <class T>
int run_storage(
    const daam_density& p, const Tensors& t, const Storage<T>& storage, daam_parallel_for parallel_for) {
  constexpr int64_t N = Vector<T>::N;
  const int64_t slices = p.outer * p.inner, numbers = slices * p.length;
  const Memory heads(sizeof(Heads<T>) * p.num_heads), floors(sizeof(Floor<T>) * p.num_heads);
  const Memory components(t.log_shares ? sizeof(Component<T>) * p.num_heads * p.num_gaussians : 0);
  if (!heads.at || !floors.at || !components.at) return DAAM_OUT_OF_MEMORY;
  const Mixture<T> mixture = {
      p.num_heads, p.num_gaussians, static_cast<Component<T>*>(components.at), static_cast<Floor<T>*>(floors.at)};
  Job<T> job = {p, t, storage, t.log_shares ? &mixture : nullptr, static_cast<const Heads<T>*>(heads.at), {}};
  job.head_sums = job.mixture ? 3 * p.num_gaussians : 4;
  job.rules = {p.eps, bool(p.flags & DAAM_SOFTMAX), bool(p.flags & DAAM_RESIDUAL)};
  job.chunk = p.length / p.num_heads;
  job.longest = p.length - (p.num_heads - 1) * job.chunk;
  job.stream = numbers * (int64_t)storage.size >= kStreamedBytes;
  job.rows = p.out.row == 1 && (job.longest >= shortest_row<T>(p.num_heads) || slices < N);
  if (job.rows) {
    job.width = most(1, least(N, kRowNumbers / job.longest));
    job.units = divide_up(slices * p.num_heads, job.width);
  } else {
    const bool straight = p.inner >= N;
    // Where R is contiguous, one head's slices bring those of the others along.
    const int64_t numbers_apart = p.out.row == 1 ? p.length : job.longest;
    const int64_t narrowest = straight || p.out.row == 1 ? kNarrowestTile : N;
    const int64_t fitting = most(narrowest, kTileNumbers / numbers_apart / 16 * 16);
    job.width = least(least(fitting, kWidestTile), divide_up(straight ? p.inner : slices, N) * N);
    job.span = straight ? p.inner : job.width;
    job.tiles = divide_up(job.span, job.width);
    job.units = divide_up(slices, job.span) * p.num_heads * job.tiles;
  }
  const int64_t longest_row = slices * p.num_heads < kManyRows ? kLongestRow : kLongestOfMany * 4 / (int64_t)sizeof(T);
  job.whole = job.longest <= (job.rows ? longest_row : kLongestColumn);
  job.run = job.rows ? kRowRun : most(kColumnRun, kTileNumbers / job.width);
  set_heads(job, static_cast<Heads<T>*>(heads.at));
  if (job.mixture) set_gaussians(job, static_cast<Component<T>*>(components.at), static_cast<Floor<T>*>(floors.at));
  const int64_t each = job.mixture ? p.num_gaussians : 1;  // what an element takes, over what the product does
  const int64_t unit_numbers = most(1, job.width * job.chunk * each);
  const int64_t most_tasks = most(1, least(kMostTasks, kMostSums / (p.num_heads * job.head_sums)));
  job.units_per_task = most(divide_up(job.units, most_tasks), divide_up(kTaskNumbers, unit_numbers));
  job.tasks = divide_up(job.units, job.units_per_task);
  const size_t sums_bytes = t.grad ? sizeof(double) * job.tasks * p.num_heads * job.head_sums : 0;
  const Memory sums(sums_bytes);
  if (!sums.at) return DAAM_OUT_OF_MEMORY;
  job.sums = static_cast<double*>(sums.at);
  memset(sums.at, 0, sums_bytes);
  if (p.flags & DAAM_HUGE_PAGES) {
    daam::advise_huge_pages(t.out, numbers * storage.size);
    if (t.weights) daam::advise_huge_pages(t.weights, numbers * storage.size);
  }
  if (numbers * each < kSerialNumbers) parallel_for = nullptr;
  job.rows ? run_direction<T, true>(job, parallel_for) : run_direction<T, false>(job, parallel_for);
  if (t.grad && job.status == DAAM_OK)
    (job.mixture ? daam::write_mixture_gradients : daam::write_parameter_gradients)(p, t, job.sums, job.tasks);
  return job.status;
}

// Compiled by a file each, which takes a third less time with two processors.
DAAM_INLINE int run_float(const daam_density& p, const Tensors& t, daam_parallel_for parallel_for) {
  switch (p.type) {
    case DAAM_FLOAT32: return run_storage<float>(p, t, Storage<float>::of<float>(), parallel_for);
    case DAAM_BFLOAT16: return run_storage<float>(p, t, Storage<float>::of<BFloat16>(), parallel_for);
    case DAAM_FLOAT16: return run_storage<float>(p, t, Storage<float>::of<Float16>(), parallel_for);
  }
  return DAAM_BAD_ARGUMENT;
}

DAAM_INLINE int run_double(const daam_density& p, const Tensors& t, daam_parallel_for parallel_for) {
  return run_storage<double>(p, t, Storage<double>::of<double>(), parallel_for);
}

}  // namespace
