// A unit of work, packed: rows of slices one by one, or columns side by side in groups.
#pragma once

#include "density_job.h"

namespace {

// Up to N rows, which are slices or runs of them.
template <class T, bool BACKWARD, Padding P>
class Rows {
  static constexpr int64_t N = Vector<T>::N;

 public:
  typedef InRows Layout;

  static int64_t scratch_bytes(const Job<T>& job, int64_t n) {
    return 8 * job.width * Arrays<T>::bytes(divide_up(n, N) * N);
  }

  // Elements [start, start + run) of the slices of a unit, as far as they reach.
  Rows(const Job<T>& job, int64_t unit, int64_t start, int64_t run, void* scratch) : job(job), start(start) {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t first = unit * job.width, all = p.outer * p.inner * p.num_heads;
    packed.count = (int)least(job.width, all - first);
    Place place = {first / p.num_heads / p.inner, first / p.num_heads % p.inner, first % p.num_heads, 0, 0, 0};
    packed.heads = &job.heads[place.head];
    find(place);
    for (int r = 0; r < packed.count; r++, step(place)) places[r] = place;
    const bool cut = run < job.longest;  // a run is swept several times, and unpacked every time
    const bool unpack_later = P == Padding::kNone && !cut && p.x.row == 1 && (!BACKWARD || p.grad.row == 1);
    packed.in_format = unpack_later ? job.storage.format : Format::kSame;
    write_here = may_write_here();
    packed.out_format = write_here ? job.storage.format : Format::kSame;
    packed.stream = write_here && job.stream;
    Arrays<T> arrays = {static_cast<char*>(scratch)};
    for (int r = 0; r < packed.count; r++) {
      const Place& here = places[r];
      Row<T>& row = packed.row[r];
      row.n = least(run, job.length(here.head) - start);
      const int64_t padded = divide_up(row.n, N) * N;
      row.density = arrays.take(padded);
      if (BACKWARD) row.z = arrays.take(padded), row.q = arrays.take(padded);
      row.x = find_row(at(t.x, here.x), p.x.row, row.n, arrays, row.packed_x);
      row.packed_grad = nullptr;
      if (BACKWARD) row.grad = find_row(at(t.grad, here.grad), p.grad.row, row.n, arrays, row.packed_grad);
      row.out = write_here ? (void*)at(t.out, here.out) : arrays.take(padded);
      row.weights = !t.weights ? nullptr : in_place(p.out.row) ? (T*)at(t.weights, here.out) : arrays.take(padded);
      if constexpr (P != Padding::kNone) {
        auto* const valid = reinterpret_cast<typename Vector<T>::integer*>(arrays.take(padded));
        find_valid_row<T>(row.x, t.mask ? t.mask + offset(p.mask, here) : nullptr, p, row.n, valid);
        row.valid = valid;
      }
    }
    for (int r = 0; r < packed.count; r++, step(place)) {  // the next unit, or the next run
      const bool more = start + run < job.length(places[r].head);
      const Place& next = !cut && first + job.width + r < all ? place : places[r];
      const int64_t past = cut && more ? run : 0;
      Ahead& ahead = packed.ahead[r];
      ahead.x = at(t.x, next.x + past * p.x.row);
      ahead.grad = BACKWARD ? at(t.grad, next.grad + past * p.grad.row) : ahead.x;
      ahead.step = N * (int64_t)job.storage.size;
    }
  }

  int64_t groups() const { return 1; }
  int together() const { return 1; }
  const Group<T>* take(int64_t, int) const { return &packed; }

  void write_back() const {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const bool weights_wait = t.weights && !in_place(p.out.row);
    for (int r = 0; r < packed.count && (!write_here || weights_wait); r++) {
      const Row<T>& row = packed.row[r];
      const auto unpack = [&](const void* from, void* base) {
        job.storage.unpack_row(
            static_cast<const T*>(from), row.n, at(base, places[r].out), p.out.row, job.stream);
      };
      if (!write_here) unpack(row.out, t.out);
      if (weights_wait) unpack(row.weights, t.weights);
    }
  }

  void add(const SliceSums<T>* from, int, int64_t, double* to) const {
    for (int r = 0; r < packed.count; r++) {
      double* const sums = to + places[r].head * 4;
      sums[0] += from->t0[r], sums[1] += from->t0_v[r], sums[2] += from->u1_v[r], sums[3] += from->u2_v[r];
    }
  }

 private:
  // A slice, and its first element's distance from that of each tensor.
  struct Place {
    int64_t outer, inner, head;
    int64_t x, grad, out;
  };

  DAAM_INLINE int64_t offset(const daam_strides& s, const Place& place) const {
    return place.outer * s.outer + place.inner * s.inner + (place.head * job.chunk + start) * s.row;
  }
  DAAM_INLINE void find(Place& place) const {
    const daam_density& p = job.problem;
    place.x = offset(p.x, place);
    place.grad = offset(p.grad, place);
    place.out = offset(p.out, place);
  }
  DAAM_INLINE void step(Place& place) const {
    const daam_density& p = job.problem;
    if (++place.head < p.num_heads) {
      place.x += job.chunk * p.x.row;
      place.grad += job.chunk * p.grad.row;
      place.out += job.chunk * p.out.row;
      return;
    }
    place.head = 0;
    if (++place.inner == p.inner) {
      place.inner = 0;
      place.outer++;
    }
    find(place);
  }

  DAAM_INLINE char* at(const void* base, int64_t offset) const {
    return const_cast<char*>(static_cast<const char*>(base)) + offset * (int64_t)job.storage.size;
  }
  // Whether rows can be worked on where they lie.
  DAAM_INLINE bool in_place(int64_t stride) const { return job.storage.format == Format::kSame && stride == 1; }
  DAAM_INLINE bool may_write_here() const {
    bool may = job.problem.out.row == 1 && (P == Padding::kNone || job.storage.format == Format::kSame);
    for (int r = 0; may && job.stream && r < packed.count; r++)  // from a vector's own address on
      may = (size_t)at(job.tensors.out, places[r].out) % (N * job.storage.size) == 0;
    return may;
  }
  DAAM_INLINE const T* find_row(
      const char* from, int64_t stride, int64_t n, Arrays<T>& arrays, const void*& to_unpack) const {
    to_unpack = nullptr;
    if (in_place(stride)) return reinterpret_cast<const T*>(from);
    T* const row = arrays.take(divide_up(n, N) * N);
    if (packed.in_format == Format::kSame)
      job.storage.pack_row(from, stride, n, row);
    else
      to_unpack = from;
    return row;
  }

  const Job<T>& job;
  const int64_t start;
  bool write_here;  // in the last sweep
  Place places[N];
  Group<T> packed;
};

// Columns of one head, or runs of them: groups of N.
template <class T, bool BACKWARD, Padding P>
class Columns {
  static constexpr int64_t N = Vector<T>::N;

 public:
  typedef InColumns<> Layout;

  static int64_t scratch_bytes(const Job<T>& job, int64_t n) {
    const int64_t group = group_numbers(n);
    return 5 * Arrays<T>::bytes(divide_up(job.width, N) * group) + 3 * kTogether * Arrays<T>::bytes(group);
  }

  Columns(const Job<T>& job, int64_t unit, int64_t start, int64_t run, void* scratch)
      : job(job), head(job.column_head(unit)), first_row(head * job.chunk + start), lanes(job.column_lanes(unit)) {
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
    x = {arrays.take(all), n, one};
    job.storage.pack_tile(at(t.x, p.x), p.x, lanes, x);
    if constexpr (BACKWARD) {
      grad = {arrays.take(all), n, one};
      job.storage.pack_tile(at(t.grad, p.grad), p.grad, lanes, grad);
    }
    if (t.weights) weights = {arrays.take(all), n, one};
    if constexpr (P != Padding::kNone) {
      valid = reinterpret_cast<typename Vector<T>::integer*>(arrays.take(all));
      find_valid_tile<T>(x, t.mask ? t.mask + first_row * p.mask.row : nullptr, p, lanes, valid);
    }
    const bool cut = run < job.longest;  // the next run, or the next unit
    const int64_t next = !cut && unit + 1 < job.units ? unit + 1 : unit;
    const int64_t row = job.column_head(next) * job.chunk + (cut && start + run < job.length(head) ? start + run : 0);
    const Lanes there = job.column_lanes(next);
    const auto next_at = [&](const void* base, const daam_strides& s) {
      return static_cast<const char*>(base) + (row * s.row + there.offset(0, s)) * (int64_t)job.storage.size;
    };
    next_x = next_at(t.x, p.x);
    next_grad = BACKWARD ? next_at(t.grad, p.grad) : next_x;
  }

  int64_t groups() const { return divide_up(lanes.count, N); }

  int together() const { return count; }

  // Groups from number j on, as many as that and no more than together().
  const Group<T>* take(int64_t j, int groups) {
    const int64_t size = (int64_t)job.storage.size;
    for (int b = 0; b < groups; b++, j++) {
      const int64_t from = j * x.group;
      packed[b].count = (int)least(N, lanes.count - j * N);
      Row<T>& row = packed[b].row[0];
      row.out = x.at + from;  // an element's result takes its place
      row.x = x.at + from;
      if (BACKWARD) row.grad = grad.at + from;
      if (P != Padding::kNone) row.valid = valid + from;
      if (weights.at) row.weights = weights.at + from;
      packed[b].ahead[0] = {next_x + j * N * size, next_grad + (BACKWARD ? j * N * size : 0), job.problem.x.row * size};
    }
    return packed;
  }

  void write_back() const {
    const daam_strides& s = job.problem.out;
    job.storage.unpack_tile(x, at(job.tensors.out, s), s, lanes, job.stream);
    if (weights.at) job.storage.unpack_tile(weights, at(job.tensors.weights, s), s, lanes, job.stream);
  }

  // Sums of groups from number j on.
  void add(const SliceSums<T>* from, int groups, int64_t j, double* to) const {
    SliceSums<T> sum;
    sum.t0 = sum.t0_v = sum.u1_v = sum.u2_v = V<T>{};
    for (int b = 0; b < groups; b++) {  // a few in T, all of them in double
      const Mask<T> exist = first_lanes<T>(lanes.count - (j + b) * N);
      sum.t0 += keep<T>(exist, from[b].t0), sum.t0_v += keep<T>(exist, from[b].t0_v);
      sum.u1_v += keep<T>(exist, from[b].u1_v), sum.u2_v += keep<T>(exist, from[b].u2_v);
    }
    double* const sums = to + head * 4;
    for (int64_t l = 0; l < N; l++)
      sums[0] += sum.t0[l], sums[1] += sum.t0_v[l], sums[2] += sum.u1_v[l], sums[3] += sum.u2_v[l];
  }

 private:
  static int64_t group_numbers(int64_t n) { return n * N + 16; }
  // The first row, before the columns.
  DAAM_INLINE char* at(const void* base, const daam_strides& s) const {
    return const_cast<char*>(static_cast<const char*>(base)) + first_row * s.row * (int64_t)job.storage.size;
  }

  const Job<T>& job;
  const int64_t head, first_row;
  const Lanes lanes;
  Tile<T> x{}, grad{}, weights{};
  typename Vector<T>::integer* valid = nullptr;
  const char *next_x, *next_grad;
  int count;
  Group<T> packed[kTogether];
};

}  // namespace
