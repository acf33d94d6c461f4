// A unit of work in rows, packed: slices one by one.
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

  // Of slices, or of runs of them if that is shorter.
  Rows(const Job<T>& job, int64_t run, void* scratch) : job(job), run(run), scratch(scratch) {}

  // Elements [start, start + run) of the slices of a unit, as far as they reach. If those are runs, the next one begins
  // at next_start.
  void pack(int64_t unit, int64_t start, int64_t next_start) {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    if (unit == next_unit)
      flipped = !flipped;
    else
      find_places(unit, start, places[flipped]);
    const Places& here = places[flipped];
    packed.count = here.count;
    packed.heads = &job.heads[here.head[0]];
    choose_formats(here);
    Arrays<T> arrays = {static_cast<char*>(scratch)};
    for (int r = 0; r < packed.count; r++) {
      Row<T>& row = packed.row[r];
      row.n = least(run, job.length(here.head[r]) - start);
      const int64_t padded = divide_up(row.n, N) * N;
      row.density = arrays.take(padded);
      if (BACKWARD) row.z = arrays.take(padded), row.q = arrays.take(padded);
      row.x = find_row(here.x[r], p.x.row, row.n, arrays, row.packed_x);
      row.packed_grad = nullptr;
      if (BACKWARD) row.grad = find_row(here.grad[r], p.grad.row, row.n, arrays, row.packed_grad);
      row.out = write_here ? (void*)here.out[r] : arrays.take(padded);
      row.weights = !t.weights ? nullptr : in_place(p.out.row) ? (T*)here.weights[r] : arrays.take(padded);
      if constexpr (P != Padding::kNone) {
        auto* const valid = reinterpret_cast<typename Vector<T>::integer*>(arrays.take(padded));
        find_valid_row<T>(row.x, t.mask ? here.mask[r] : nullptr, p, row.n, valid);
        row.valid = valid;
      }
    }
    look_ahead(unit, next_start - start, here, places[!flipped]);
  }

  int64_t groups() const { return 1; }
  int together() const { return 1; }
  const Group<T>* take(int64_t, int) const { return &packed; }
  // Forward or backward. to: of each head four sums, to which the backward adds.
  void work_on_all(double* to) const {
    SliceSums<T> sums;
    work_on_groups<T, Layout, P, BACKWARD>(&packed, 1, job.rules, &sums);
    if (BACKWARD) add(&sums, 1, 0, to);
  }

  void write_back() const {
    const Places& here = places[flipped];
    const int64_t stride = job.problem.out.row;
    const bool weights_wait = job.tensors.weights && !in_place(stride);
    for (int r = 0; r < packed.count && (!write_here || weights_wait); r++) {
      const Row<T>& row = packed.row[r];
      if (!write_here)
        job.storage.unpack_row(static_cast<const T*>(row.out), row.n, here.out[r], stride, job.stream);
      if (weights_wait) job.storage.unpack_row(row.weights, row.n, here.weights[r], stride, job.stream);
    }
  }

  void add(const SliceSums<T>* from, int, int64_t, double* to) const {
    for (int r = 0; r < packed.count; r++) {
      double* const sums = to + places[flipped].head[r] * 4;
      sums[0] += from->t0[r], sums[1] += from->t0_v[r], sums[2] += from->u1_v[r], sums[3] += from->u2_v[r];
    }
  }

 private:
  // Where the rows of a unit lie in the tensors.
  struct Places {
    int count;
    int64_t head[N];
    char *x[N], *grad[N], *out[N], *weights[N];
    const uint8_t* mask[N];
  };

  DAAM_INLINE void find_places(int64_t unit, int64_t start, Places& to) const {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t first = unit * job.width, slice = first / p.num_heads;
    int64_t head = first % p.num_heads, inner = slice % p.inner, outer = slice / p.inner;
    to.count = (int)least(job.width, p.outer * p.inner * p.num_heads - first);
    for (int r = 0; r < to.count; r++) {
      const auto place = [&](const void* base, const daam_strides& s, int64_t size) __attribute__((always_inline)) {
        const int64_t offset = outer * s.outer + inner * s.inner + (head * job.chunk + start) * s.row;
        return const_cast<char*>(static_cast<const char*>(base)) + offset * size;
      };
      const int64_t size = (int64_t)job.storage.size;
      to.head[r] = head;
      to.x[r] = place(t.x, p.x, size);
      to.out[r] = place(t.out, p.out, size);
      if (BACKWARD) to.grad[r] = place(t.grad, p.grad, size);
      if (t.weights) to.weights[r] = place(t.weights, p.out, size);
      if (P != Padding::kNone && t.mask) to.mask[r] = reinterpret_cast<const uint8_t*>(place(t.mask, p.mask, 1));
      if (++head == p.num_heads) {
        head = 0;
        if (++inner == p.inner) inner = 0, outer++;
      }
    }
  }

  // The next unit, or the next run, which is that many elements on.
  DAAM_INLINE void look_ahead(int64_t unit, int64_t on, const Places& here, Places& next) {
    const bool cut = run < job.longest;
    next_unit = cut ? -1 : least(unit + 1, job.units - 1);
    if (!cut) find_places(next_unit, 0, next);
    for (int r = 0; r < packed.count; r++) {
      const Places& to = !cut && r < next.count ? next : here;
      const int64_t past = on * (int64_t)job.storage.size;
      const int64_t step = N * (int64_t)job.storage.size;
      packed.ahead_x[r].at = to.x[r] + past * job.problem.x.row, packed.ahead_x[r].step = step;
      if (!BACKWARD) continue;
      packed.ahead_grad[r].at = to.grad[r] + past * job.problem.grad.row, packed.ahead_grad[r].step = step;
    }
  }

  DAAM_INLINE void choose_formats(const Places& here) {
    const daam_density& p = job.problem;
    const bool cut = run < job.longest;  // a run is swept several times, and unpacked every time
    const bool unpack_later = P == Padding::kNone && !cut && p.x.row == 1 && (!BACKWARD || p.grad.row == 1);
    const size_t vector = N * job.storage.size;
    size_t odd = 0;  // results go past the caches to whole vectors
    for (int r = 0; job.stream && r < here.count; r++) odd |= reinterpret_cast<size_t>(here.out[r]);
    write_here = p.out.row == 1 && odd % vector == 0 && (P == Padding::kNone || job.storage.format == Format::kSame);
    // Sums of pairs are added in another order. Whether a row's are must not depend on where the row happens to lie.
    const bool even = (p.out.outer | p.out.inner | job.chunk) % (2 * N) == 0;
    const bool pairs = job.storage.format == Format::kBFloat16 && unpack_later && write_here && even &&
                       odd % (2 * vector) == 0 && !job.tensors.weights;
    const Format format = pairs ? Format::kPairedBFloat16 : job.storage.format;
    packed.in_format = unpack_later ? format : Format::kSame;
    packed.out_format = write_here ? format : Format::kSame;
    packed.stream = write_here && job.stream;
  }

  // Whether rows can be worked on where they lie.
  DAAM_INLINE bool in_place(int64_t stride) const { return job.storage.format == Format::kSame && stride == 1; }
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
  const int64_t run;
  void* const scratch;
  int64_t next_unit = -1;
  bool write_here;  // in the last sweep
  bool flipped = false;
  Places places[2];  // of this unit and the next: [flipped] is this one's
  Group<T> packed;
};

}  // namespace
