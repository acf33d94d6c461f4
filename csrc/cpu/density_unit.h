// A unit of work, packed: rows of slices one by one, or columns side by side in groups.
#pragma once

#include "density_job.h"

namespace {

// Up to N rows, which are slices or runs of them.
template <class T, bool BACKWARD, Padding P>
class Rows {
  static constexpr int64_t N = Vector<T>::N;

 public:
  static constexpr bool kRows = true;

  static int64_t scratch_bytes(const Job<T>& job, int64_t n) {
    return 8 * job.width * Arrays<T>::bytes(divide_up(n, N) * N);
  }

  // Elements [start, start + run) of the slices of a unit, as far as they reach.
  Rows(const Job<T>& job, int64_t unit, int64_t start, int64_t run, void* scratch) : job(job), start(start) {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t first = unit * job.width, all = p.outer * p.inner * p.num_heads;
    Place place = {first / p.num_heads / p.inner, first / p.num_heads % p.inner, first % p.num_heads};
    packed.count = (int)least(job.width, all - first);
    packed.heads = job.heads[place.head];
    Arrays<T> arrays = {static_cast<char*>(scratch)};
    for (int r = 0; r < packed.count; r++, place.step(p)) {
      places[r] = place;
      Row<T>& row = packed.row[r];
      row = {};
      row.n = least(run, job.length(place.head) - start);
      const int64_t padded = divide_up(row.n, N) * N;
      row.density = arrays.take(padded);
      if (BACKWARD) row.z = arrays.take(padded), row.q = arrays.take(padded);
      row.x = pack(t.x, p.x, place, row.n, arrays);
      if (BACKWARD) row.grad = pack(t.grad, p.grad, place, row.n, arrays);
      const bool in_place = whole(p.out, row.n) && !job.stream;
      row.out = in_place ? at<T>(t.out, p.out, place) : arrays.take(padded);
      if (t.weights) row.weights = in_place ? at<T>(t.weights, p.out, place) : arrays.take(padded);
      if constexpr (P != Padding::kNone) {
        auto* const valid = reinterpret_cast<typename Vector<T>::integer*>(arrays.take(padded));
        find_valid_row<T>(row.x, t.mask ? t.mask + offset(p.mask, place) : nullptr, p, row.n, valid);
        row.valid = valid;
      }
    }
    for (int r = 0; r < packed.count; r++, place.step(p)) {  // the next unit, or the next run
      const bool cut = run < job.longest, more = start + run < job.length(places[r].head);
      const Place& next = !cut && first + job.width + r < all ? place : places[r];
      const int64_t size = (int64_t)job.storage.size, step = cut && more ? run * size : 0;
      Ahead& ahead = packed.ahead[r];
      ahead.x = at<const char>(t.x, p.x, next) + step * p.x.row;
      ahead.grad = BACKWARD ? at<const char>(t.grad, p.grad, next) + step * p.grad.row : ahead.x;
      ahead.step = N * size;
    }
  }

  int64_t groups() const { return 1; }
  const Group<T>& group(int64_t) const { return packed; }

  void write_back() const {
    const daam_density& p = job.problem;
    for (int r = 0; r < packed.count; r++) {
      const Row<T>& row = packed.row[r];
      if (whole(p.out, row.n) && !job.stream) continue;
      job.storage.unpack_row(row.out, row.n, at<char>(job.tensors.out, p.out, places[r]), p.out.row, job.stream);
      if (row.weights)
        job.storage.unpack_row(row.weights, row.n, at<char>(job.tensors.weights, p.out, places[r]), p.out.row, job.stream);
    }
  }

  void add(const SliceSums<T>& from, int64_t, double* to) const {
    for (int r = 0; r < packed.count; r++) {
      double* const head = to + places[r].head * 4;
      head[0] += from.t0[r], head[1] += from.t0_v[r], head[2] += from.u1_v[r], head[3] += from.u2_v[r];
    }
  }

 private:
  struct Place {
    int64_t outer, inner, head;
    DAAM_INLINE void step(const daam_density& p) {
      if (++head < p.num_heads) return;
      head = 0;
      if (++inner < p.inner) return;
      inner = 0;
      outer++;
    }
  };

  DAAM_INLINE int64_t offset(const daam_strides& s, const Place& place) const {
    return place.outer * s.outer + place.inner * s.inner + (place.head * job.chunk + start) * s.row;
  }
  template <class U, class Base>
  DAAM_INLINE U* at(Base* base, const daam_strides& s, const Place& place) const {
    const int64_t bytes = offset(s, place) * (int64_t)job.storage.size;
    return reinterpret_cast<U*>(const_cast<char*>(static_cast<const char*>(base)) + bytes);
  }
  // Whether rows are worked on where they lie: of the arithmetic type, and whole vectors.
  DAAM_INLINE bool whole(const daam_strides& s, int64_t n) const {
    return job.storage.size == sizeof(T) && s.row == 1 && n % N == 0;
  }
  DAAM_INLINE const T* pack(
      const void* base, const daam_strides& s, const Place& place, int64_t n, Arrays<T>& arrays) const {
    if (whole(s, n)) return at<const T>(base, s, place);
    T* const row = arrays.take(divide_up(n, N) * N);
    job.storage.pack_row(at<const char>(base, s, place), s.row, n, row);
    return row;
  }

  const Job<T>& job;
  const int64_t start;
  Place places[N];
  Group<T> packed;
};

// Columns of one head, or runs of them: groups of N.
template <class T, bool BACKWARD, Padding P>
class Columns {
  static constexpr int64_t N = Vector<T>::N;

 public:
  static constexpr bool kRows = false;

  static int64_t scratch_bytes(const Job<T>& job, int64_t n) {
    const int64_t group = group_numbers(n);
    return 5 * Arrays<T>::bytes(divide_up(job.width, N) * group) + 3 * Arrays<T>::bytes(group);
  }

  Columns(const Job<T>& job, int64_t unit, int64_t start, int64_t run, void* scratch)
      : job(job), head(job.column_head(unit)), first_row(head * job.chunk + start), lanes(job.column_lanes(unit)) {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t n = least(run, job.length(head) - start), one = group_numbers(n), all = groups() * one;
    Arrays<T> arrays = {static_cast<char*>(scratch)};
    T* const density = arrays.take(one);
    T* const z = BACKWARD ? arrays.take(one) : nullptr;
    T* const q = BACKWARD ? arrays.take(one) : nullptr;
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
    packed.heads = job.heads[head];
    packed.row[0] = {n, nullptr, nullptr, nullptr, density, z, q, nullptr, nullptr};
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

  const Group<T>& group(int64_t j) {
    const daam_density& p = job.problem;
    const int64_t from = j * x.group, size = (int64_t)job.storage.size;
    packed.count = (int)least(N, lanes.count - j * N);
    Row<T>& row = packed.row[0];
    row.x = row.out = x.at + from;  // an element's result takes its place
    if (BACKWARD) row.grad = grad.at + from;
    if (P != Padding::kNone) row.valid = valid + from;
    if (weights.at) row.weights = weights.at + from;
    packed.ahead[0] = {next_x + j * N * size, next_grad + (BACKWARD ? j * N * size : 0), p.x.row * size};
    return packed;
  }

  void write_back() const {
    const daam_strides& s = job.problem.out;
    job.storage.unpack_tile(x, at(job.tensors.out, s), s, lanes, job.stream);
    if (weights.at) job.storage.unpack_tile(weights, at(job.tensors.weights, s), s, lanes, job.stream);
  }

  void add(const SliceSums<T>& from, int64_t j, double* to) const {
    const int64_t count = least(N, lanes.count - j * N);
    double* const sums = to + head * 4;
    for (int64_t l = 0; l < count; l++)
      sums[0] += from.t0[l], sums[1] += from.t0_v[l], sums[2] += from.u1_v[l], sums[3] += from.u2_v[l];
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
  Group<T> packed;
};

}  // namespace
