// A unit of work, packed: rows of slices one by one, or columns side by side in groups.
#pragma once

#include "density_job.h"
#include "density_short.h"

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

  // Elements [start, start + run) of the slices of a unit, as far as they reach.
  void pack(int64_t unit, int64_t start) {
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
    look_ahead(unit, start, here, places[!flipped]);
  }

  int64_t groups() const { return 1; }
  int together() const { return 1; }
  const Group<T>* take(int64_t, int) const { return &packed; }
  void work_on(int64_t, int, SliceSums<T>* sums) const {
    work_on_groups<T, Layout, P, BACKWARD>(&packed, 1, job.rules, sums);
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

  // The next unit, or the next run.
  DAAM_INLINE void look_ahead(int64_t unit, int64_t start, const Places& here, Places& next) {
    const bool cut = run < job.longest;
    next_unit = cut ? -1 : least(unit + 1, job.units - 1);
    if (!cut) find_places(next_unit, start, next);
    for (int r = 0; r < packed.count; r++) {
      const Places& to = !cut && r < next.count ? next : here;
      const int64_t past = cut && start + run < job.length(here.head[r]) ? run * (int64_t)job.storage.size : 0;
      packed.ahead[r].x = to.x[r] + past * job.problem.x.row;
      packed.ahead[r].grad = BACKWARD ? to.grad[r] + past * job.problem.grad.row : packed.ahead[r].x;
      packed.ahead[r].step = packed.ahead[r].grad_step = N * (int64_t)job.storage.size;
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

// Columns of one head, or runs of them: groups of N.
template <class T, bool BACKWARD, Padding P>
class Columns {
  static constexpr int64_t N = Vector<T>::N;

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

  // Elements [start, start + run) of the slices of a unit, as far as they reach.
  void pack(int64_t unit, int64_t start) {
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
    const int64_t row = job.column_head(next) * job.chunk + (cut && start + run < job.length(head) ? start + run : 0);
    const Lanes there = job.column_lanes(next);
    const auto next_at = [&](const void* base, const daam_strides& s) {
      return static_cast<const char*>(base) + (row * s.row + there.offset(0, s)) * (int64_t)job.storage.size;
    };
    next_x = next_at(t.x, p.x);
    if (BACKWARD) next_grad = next_at(t.grad, p.grad);
    x = {arrays.take(all), n, one};
    first_packed = 0;
    const bool whole = P == Padding::kNone && run == job.longest;
    is_short = whole && n >= 2 && n <= kLongestShort && sizeof(T) == 4 && !t.weights;
    in_place = is_short && job.storage.format == Format::kSame && lanes.adjacent(p.x) && lanes.adjacent(p.out) &&
               (!BACKWARD || lanes.adjacent(p.grad));
    factors = nullptr;
    moments = nullptr;
    if (in_place) {
      if (BACKWARD) grad = {arrays.take(all), n, one};
      return;
    }
    const bool products = whole && !is_short && !BACKWARD && !job.rules.residual && !t.weights;
    if (products) factors = reinterpret_cast<V<T>*>(arrays.take(groups() * N));
    if (whole && n > kBesideEachOther && lanes.count % N == 0 && lanes.adjacent(p.x)) {
      moments = reinterpret_cast<Moments<T>*>(arrays.take(groups() * (int64_t)(sizeof(Moments<T>) / sizeof(T))));
      job.storage.pack_with_moments(at(t.x, p.x), p.x, lanes, x, moments);
    } else {
      job.storage.pack_tile(at(t.x, p.x), p.x, lanes, x);
    }
    if constexpr (BACKWARD) {
      grad = {arrays.take(all), n, one};
      job.storage.pack_tile(at(t.grad, p.grad), p.grad, lanes, grad);
    }
    if (t.weights) weights = {arrays.take(all), n, one};
    if constexpr (P != Padding::kNone) {
      valid = reinterpret_cast<typename Vector<T>::integer*>(arrays.take(all));
      find_valid_tile<T>(x, t.mask ? t.mask + first_row * p.mask.row : nullptr, p, lanes, valid);
    }
  }

  int64_t groups() const { return divide_up(lanes.count, N); }

  int together() const { return count; }

  // Groups from number j on, as many as that and no more than together().
  void work_on(int64_t j, int groups, SliceSums<T>* sums) {
    if constexpr (sizeof(T) == 4 && P == Padding::kNone)
      if (is_short && (j + groups) * N <= lanes.count) return work_on_short<T, BACKWARD>(short_groups(j, groups), sums);
    if (!in_place) return work_on_groups<T, Layout, P, BACKWARD>(take(j, groups), groups, job.rules, sums);
    const daam_density& p = job.problem;
    const Lanes some = {lanes.first + j * N, least(groups * N, lanes.count - j * N), lanes.inner};
    first_packed = j;
    job.storage.pack_tile(at(job.tensors.x, p.x), p.x, some, x);
    if (BACKWARD) job.storage.pack_tile(at(job.tensors.grad, p.grad), p.grad, some, grad);
    work_on_groups<T, Layout, P, BACKWARD>(take(j, groups), groups, job.rules, sums);
    job.storage.unpack_tile(x, nullptr, at(job.tensors.out, p.out), p.out, some, false);
  }

  const Group<T>* take(int64_t j, int groups) {
    const int64_t size = (int64_t)job.storage.size;
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
      const int64_t right = j * N * size;
      packed[b].ahead[0] = {
          next_x + right, BACKWARD ? next_grad + right : nullptr, job.problem.x.row * size, job.problem.grad.row * size};
    }
    return packed;
  }

  void write_back() const {
    if (in_place) return;
    const daam_strides& s = job.problem.out;
    job.storage.unpack_tile(x, factors, at(job.tensors.out, s), s, lanes, job.stream);
    if (weights.at) job.storage.unpack_tile(weights, nullptr, at(job.tensors.weights, s), s, lanes, job.stream);
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

  ShortGroups<T> short_groups(int64_t j, int groups) const {
    const auto packed = [&](const Tile<T>& tile) { return Field<T>{tile.at + j * tile.group, N, tile.group}; };
    const auto there = [&](const void* base, const daam_strides& s) {
      return Field<T>{reinterpret_cast<T*>(at(base, s)) + lanes.offset(0, s) + j * N, s.row, N};
    };
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t size = (int64_t)job.storage.size, right = j * N * size;
    ShortGroups<T> g = {groups, x.n, job.heads[head], job.rules, false, {}, {}, {}, {}, {}};
    g.next_x = {next_x + right, p.x.row * size, N * size};
    if (BACKWARD) g.next_grad = {next_grad + right, p.grad.row * size, N * size};
    g.out = in_place ? there(t.out, p.out) : packed(x);
    g.x = as_const(in_place ? there(t.x, p.x) : packed(x));
    if (BACKWARD) g.grad = as_const(in_place ? there(t.grad, p.grad) : packed(grad));
    const int64_t line = 64 / sizeof(T);
    g.stream = in_place && job.stream && (size_t)g.out.at % 64 == 0 && p.out.row % line == 0 && groups * N % line == 0;
    return g;
  }
  static Field<const T> as_const(const Field<T>& f) { return {f.at, f.row, f.group}; }

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
  bool is_short, in_place;  // in_place: worked on where they lie, and only groups that ask for more care are packed
  int64_t first_packed;     // number of the group that is first in the tiles
  Tile<T> x{}, grad{}, weights{};
  typename Vector<T>::integer* valid = nullptr;
  Moments<T>* moments;
  V<T>* factors;
  const char *next_x, *next_grad;
  int count;
  Group<T> packed[kTogether];
};

}  // namespace
