// A unit of work in columns, packed side by side in groups, or where they lie.
#pragma once

#include "density_job.h"
#include "density_short.h"

namespace {

// Columns of one head, or runs of them: groups of N.
template <class T, bool BACKWARD, Padding P>
class Columns {
  static constexpr int64_t N = Vector<T>::N;
  static constexpr bool kMayBeShort = sizeof(T) == 4 && P == Padding::kNone;

 public:
  typedef InColumns Layout;

  static int64_t scratch_bytes(const Job<T>& job, int64_t n) {
    const int64_t group = group_numbers(n);
    const int64_t groups = divide_up(job.width, N), moments = groups * (int64_t)(sizeof(Moments<T>) / sizeof(T));
    return 4 * Arrays<T>::bytes(groups * group) + 3 * kTogether * Arrays<T>::bytes(group) + Arrays<T>::bytes(moments) +
           Arrays<T>::bytes(groups * N);
  }

  // Of slices, or of runs of them if that is shorter.
  Columns(const Job<T>& job, int64_t run, void* scratch) : job(job), run(run), scratch(scratch) {}

  // Elements [start, start + run) of the slices of a unit, as far as they reach. If those are runs, the next one begins
  // at next_start.
  void pack(int64_t unit, int64_t start, int64_t next_start) {
    head = job.column_head(unit);
    first_row = head * job.chunk + start;
    lanes = job.column_lanes(unit);
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t n = least(run, job.length(head) - start), one = group_numbers(n), all = groups() * one;
    Arrays<T> arrays = {static_cast<char*>(scratch)};
    count = n <= kBesideEachOther ? kTogether : 1;
    for (int b = 0; b < count; b++) {
      Row<T>& row = packed[b].row[0];
      row = {};
      row.n = n;
      row.density = arrays.take(one);
      if (BACKWARD) row.z = arrays.take(one), row.q = arrays.take(one);
      packed[b].heads = &job.heads[head];
    }
    const bool cut = run < job.longest;  // the next run, or the next unit
    const int64_t next = !cut && unit + 1 < job.units ? unit + 1 : unit;
    const int64_t row = job.column_head(next) * job.chunk + next_start;
    const Lanes there = job.column_lanes(next);
    const auto next_at = [&](const void* base, const daam_strides& s) {
      return static_cast<const char*>(base) + (row * s.row + there.offset(0, s)) * (int64_t)job.storage.size;
    };
    next_x = next_at(t.x, p.x);
    if (BACKWARD) next_grad = next_at(t.grad, p.grad);
    x = {arrays.take(all), n, one};
    first_packed = 0;
    const bool whole = P == Padding::kNone && run == job.longest;
    is_short = kMayBeShort && whole && !job.mixture && n >= 2 && n <= kLongestShort;
    const bool adjacent = lanes.adjacent(p.x) && lanes.adjacent(p.out) && (!BACKWARD || lanes.adjacent(p.grad));
    in_place = is_short && adjacent && job.storage.format != Format::kFloat16;
    factors = nullptr;
    moments = nullptr;
    if (BACKWARD) grad = {arrays.take(all), n, one};
    if (t.weights) weights = {arrays.take(all), n, one};
    if (is_short) return;
    const bool products = whole && !job.mixture && n > kLongestShort && !BACKWARD && !job.rules.residual && !t.weights;
    if (products) factors = reinterpret_cast<V<T>*>(arrays.take(groups() * N));
    if (whole && n > kBesideEachOther && lanes.count % N == 0 && lanes.adjacent(p.x)) {
      moments = reinterpret_cast<Moments<T>*>(arrays.take(groups() * (int64_t)(sizeof(Moments<T>) / sizeof(T))));
      job.storage.pack_with_moments(at(t.x, p.x), p.x, lanes, x, moments);
    } else {
      job.storage.pack_tile(at(t.x, p.x), p.x, lanes, x);
    }
    if (BACKWARD) job.storage.pack_tile(at(t.grad, p.grad), p.grad, lanes, grad);
    if constexpr (P != Padding::kNone) {
      valid = reinterpret_cast<typename Vector<T>::integer*>(arrays.take(all));
      find_valid_tile<T>(x, t.mask ? t.mask + first_row * p.mask.row : nullptr, p, lanes, valid);
    }
  }

  int64_t groups() const { return divide_up(lanes.count, N); }

  // Forward or backward. to: of each head four sums, to which the backward adds.
  void work_on_all(double* to) {
    if constexpr (kMayBeShort) {
      if (is_short) return work_on_shorts(to);
    }
    for (int64_t j = 0; j < groups(); j += count) work_on(j, (int)least(count, groups() - j), to);
  }

  // The same groups, packed, as density_slices.h takes them.
  const Group<T>* take(int64_t j, int groups) {
    for (int b = 0; b < groups; b++, j++) {
      const int64_t from = (j - first_packed) * x.group;
      packed[b].count = (int)least(N, lanes.count - j * N);
      packed[b].moments = moments ? moments + j : nullptr;
      Row<T>& row = packed[b].row[0];
      packed[b].factor = factors ? factors + j : nullptr;
      packed[b].pack_again = pack_again;
      packed[b].unit = this;
      packed[b].number = j;
      row.out = x.at + from;  // an element's result takes its place
      row.x = x.at + from;
      if (BACKWARD) row.grad = grad.at + from;
      if (P != Padding::kNone) row.valid = valid + from;
      if (weights.at) row.weights = weights.at + from;
      packed[b].ahead_x[0] = share_of_next(next_x, job.problem.x, j);
      if (BACKWARD) packed[b].ahead_grad[0] = share_of_next(next_grad, job.problem.grad, j);
    }
    return packed;
  }

  void write_back() const {
    if (!is_short) write(factors, lanes);
  }

  // Sums of groups from number j on.
  void add(const SliceSums<T>* from, int groups, int64_t j, double* to) const {
    SliceSums<T> sum;
    sum.t0 = sum.t0_v = sum.u1_v = sum.u2_v = V<T>{};
    for (int b = 0; b < groups; b++) {  // some in T, all of them in double
      const Mask<T> exist = first_lanes<T>(lanes.count - (j + b) * N);
      sum.t0 += keep<T>(exist, from[b].t0), sum.t0_v += keep<T>(exist, from[b].t0_v);
      sum.u1_v += keep<T>(exist, from[b].u1_v), sum.u2_v += keep<T>(exist, from[b].u2_v);
    }
    double* const sums = to + head * 4;
    sums[0] += sum_in_double(sum.t0), sums[1] += sum_in_double(sum.t0_v);
    sums[2] += sum_in_double(sum.u1_v), sums[3] += sum_in_double(sum.u2_v);
  }

 private:
  // Packed groups from number j on.
  void work_on(int64_t j, int groups, double* to) {
    SliceSums<T> sums[kTogether];
    work_on_groups<T, Layout, P, BACKWARD>(take(j, groups), groups, job.rules, sums);
    if (BACKWARD) add(sums, groups, j, to);
  }

  // Whole groups where they lie, if they can be read and written there; what is left is packed.
  void work_on_shorts(double* to) {
    const int64_t whole = lanes.count / N, here = in_place ? whole : 0;
    for (int64_t j = 0; j < here; j += kMostTogether) {
      const int some = (int)least(kMostTogether, here - j);
      if (job.storage.format == Format::kBFloat16)
        work_on_short_groups(short_groups<BFloat16>(j, some), j, to);
      else
        work_on_short_groups(short_groups<T>(j, some), j, to);
    }
    for (int64_t j = here; j < groups(); j += kTogether) {
      const int some = (int)least(kTogether, groups() - j);
      const daam_density& p = job.problem;
      const Tensors& t = job.tensors;
      const Lanes these = {lanes.first + j * N, least(some * N, lanes.count - j * N), lanes.inner};
      first_packed = j;
      job.storage.pack_tile(at(t.x, p.x), p.x, these, x);
      if (BACKWARD) job.storage.pack_tile(at(t.grad, p.grad), p.grad, these, grad);
      if (j + some <= whole)
        work_on_short_groups(short_groups<T>(j, some), j, to);
      else
        work_on(j, some, to);
      write(nullptr, these);
    }
  }

  template <class S>
  void work_on_short_groups(const ShortGroups<T, S>& shorts, int64_t j, double* to) {
    SliceSums<T> sums[kMostTogether / kSummedTogether];
    if (BACKWARD) memset(sums, 0, sizeof sums);
    work_on_short<T, BACKWARD>(shorts, sums);
    if (BACKWARD) add(sums, (int)divide_up(shorts.count, kSummedTogether), j, to);
  }

  static int64_t group_numbers(int64_t n) { return n * N + 16; }
  // The first row, before the columns.
  DAAM_INLINE char* at(const void* base, const daam_strides& s) const {
    return const_cast<char*>(static_cast<const char*>(base)) + first_row * s.row * (int64_t)job.storage.size;
  }

  void write(const V<T>* factors, const Lanes& packed_lanes) const {
    const daam_strides& s = job.problem.out;
    job.storage.unpack_tile(x, factors, at(job.tensors.out, s), s, packed_lanes, job.stream);
    if (weights.at) job.storage.unpack_tile(weights, nullptr, at(job.tensors.weights, s), s, packed_lanes, job.stream);
  }

  template <class S>
  ShortGroups<T, S> short_groups(int64_t j, int groups) const {
    const auto find = [&](const Tile<T>& tile, const void* base, const daam_strides& s) {
      if (in_place) return Field<S>{reinterpret_cast<S*>(at(base, s)) + lanes.offset(0, s) + j * N, s.row, N};
      return Field<S>{reinterpret_cast<S*>(tile.at + (j - first_packed) * tile.group), N, tile.group};  // S is T
    };
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t line = 64 / sizeof(S);
    ShortGroups<T, S> g = {groups, x.n, job.heads[head], job.rules, false, {}, {}, {}, {}, {}, {}};
    g.out = find(x, t.out, p.out);
    if (weights.at) g.weights = find(weights, t.weights, p.out);
    g.x = as_const(find(x, t.x, p.x));
    g.next_x = look_ahead(next_x, p.x, j);
    if (BACKWARD) {
      g.grad = as_const(find(grad, t.grad, p.grad));
      g.next_grad = look_ahead(next_grad, p.grad, j);
    }
    const size_t places = (size_t)g.out.at | (size_t)g.weights.at;
    g.stream = in_place && job.stream && places % 64 == 0 && p.out.row % line == 0 && groups * N % line == 0;
    return g;
  }
  // What to ask for of the next groups while an element of these from number j on is worked on: that element of theirs;
  // but of the memory of a group that is in one piece one part after the other.
  DAAM_INLINE Field<const char> look_ahead(const char* next, const daam_strides& s, int64_t j) const {
    const int64_t size = (int64_t)job.storage.size, same = lanes.distance(s);
    const int64_t apart = same ? same : s.outer / lanes.inner;  // on average
    const bool in_rows = same && s.row > same;
    return {next + j * N * apart * size, (in_rows ? s.row : N * apart / x.n) * size, N * apart * size};
  }
  // Where rows are in one piece: as many vectors as a group has, of the next tile in the order of its memory.
  DAAM_INLINE Ahead share_of_next(const char* next, const daam_strides& s, int64_t j) const {
    const int64_t size = (int64_t)job.storage.size, step = N * size;
    if (lanes.distance(s) != 1 || s.row == 1) {
      const Field<const char> there = look_ahead(next, s, j);
      return {there.at, there.row, 0, INT64_MAX, 0};
    }
    const int64_t first = j * x.n, row = s.row * size;
    return {next + first / groups() * row, step, first % groups() * step, groups() * step, row};
  }
  template <class S>
  static Field<const S> as_const(const Field<S>& f) {
    return {f.at, f.row, f.group};
  }

  static void pack_again(const void* unit, int64_t j) {
    const Columns& c = *static_cast<const Columns*>(unit);
    const daam_strides& s = c.job.problem.x;
    const Lanes of_group = {c.lanes.first + j * N, least(N, c.lanes.count - j * N), c.lanes.inner};
    c.job.storage.pack_tile(c.at(c.job.tensors.x, s), s, of_group, {c.x.at + j * c.x.group, c.x.n, c.x.group});
  }

  const Job<T>& job;
  const int64_t run;
  void* const scratch;
  int64_t head, first_row;
  Lanes lanes;
  bool is_short;  // packed, where at all, a few groups at a time
  bool in_place;  // worked on as they lie, but for a last group that is not whole
  int64_t first_packed;     // number of the group that is first in the tiles
  Tile<T> x{}, grad{}, weights{};
  typename Vector<T>::integer* valid = nullptr;
  Moments<T>* moments;
  V<T>* factors;
  const char *next_x, *next_grad = nullptr;
  int count;
  Group<T> packed[kTogether];
};

}  // namespace
