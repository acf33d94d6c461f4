// Slices that stay in the cache: read once, written once.
#pragma once

#include "density_job.h"

namespace {

template <class T, bool ROWS, bool BACKWARD, Padding P>
struct Resident {
  static constexpr int64_t N = Vector<T>::N;

  // Packs rows [start, start + n) of a unit's slices, or points to where they lie packed already.
  static Packed<T> pack(const Job<T>& job, const Lanes& lanes, int64_t start, int64_t n, void* scratch) {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t group = group_numbers(job, n), groups = divide_up(lanes.count, N), all = groups * group;
    Arrays<T> arrays = {static_cast<char*>(scratch)};
    Packed<T> packed = {};
    packed.groups = groups;
    packed.density = arrays.take(group);
    if (BACKWARD) packed.z = arrays.take(group), packed.q = arrays.take(group);
    packed.x = packed.grad = {nullptr, n, group};
    if constexpr (ROWS) {
      packed.x.at = pack_row(job, t.x, p.x, lanes, start, n, arrays);
      if (BACKWARD) packed.grad.at = pack_row(job, t.grad, p.grad, lanes, start, n, arrays);
      packed.out = in_place(job, t.out, n) ? row_of(job, t.out, lanes, start) : arrays.take(all);
      if (t.weights) packed.weights = in_place(job, t.weights, n) ? row_of(job, t.weights, lanes, start) : arrays.take(all);
    } else {
      packed.x.at = packed.out = arrays.take(all);
      job.storage.pack_tile(job.at_row(t.x, p.x, start), p.x, lanes, packed.x);
      if (BACKWARD) packed.grad.at = arrays.take(all), job.storage.pack_tile(job.at_row(t.grad, p.grad, start), p.grad, lanes, packed.grad);
      if (t.weights) packed.weights = arrays.take(all);
    }
    if constexpr (P != Padding::kNone) {
      packed.valid = reinterpret_cast<typename Vector<T>::integer*>(arrays.take(all));
      const uint8_t* const mask = job.mask_at_row(start);
      if constexpr (ROWS)
        find_valid_row<T>(packed.x.at, mask ? mask + lanes.offset(0, p.mask) : nullptr, p, n, packed.valid);
      else
        find_valid_tile<T>(packed.x, mask, p, lanes, packed.valid);
    }
    return packed;
  }

  static void unpack(const Job<T>& job, const Lanes& lanes, int64_t start, const Packed<T>& packed) {
    const daam_density& p = job.problem;
    const Tensors& t = job.tensors;
    const int64_t n = packed.x.n;
    void* const results[] = {t.out, t.weights};
    T* const from[] = {packed.out, packed.weights};
    for (int i = 0; i < 2; i++) {
      if (!results[i]) continue;
      if constexpr (ROWS) {
        if (!in_place(job, results[i], n))
          job.storage.unpack_row(from[i], n, row_of(job, results[i], lanes, start), p.out.row, job.stream);
      } else {
        job.storage.unpack_tile({from[i], n, packed.x.group}, job.at_row(results[i], p.out, start), p.out, lanes, job.stream);
      }
    }
  }

  static Group<T> group(const Packed<T>& packed, const Lanes& lanes, int64_t j) {
    const int64_t at = j * packed.x.group;
    return {
        packed.x.at + at, BACKWARD ? packed.grad.at + at : nullptr,
        P == Padding::kNone ? nullptr : packed.valid + at, packed.x.n, first_lanes<T>(lanes.count - j * N)};
  }

  static void run(Job<T>& job, int64_t task) {
    const int64_t begin = task * job.units_per_task, end = least(begin + job.units_per_task, job.units);
    void* const memory = daam::thread_scratch(scratch_bytes(job, job.longest));
    if (!memory) {
      job.status = DAAM_OUT_OF_MEMORY;
      return;
    }
    for (int64_t unit = begin; unit < end; unit++) {
      const Head<T>& head = job.heads[job.head(unit)];
      const Lanes lanes = job.lanes(unit);
      const Packed<T> packed = pack(job, lanes, head.start, head.n, memory);
      const Scratch<T> scratch = {packed.density, packed.z, packed.q};
      Accumulated<T, ROWS> sums;
      for (int64_t j = 0; j < packed.groups; j++) {
        const Group<T> g = group(packed, lanes, j);
        const Ahead ahead = look_ahead(job, unit + 1 < end ? unit + 1 : unit, j);
        const int64_t at = j * packed.x.group;
        if constexpr (BACKWARD)
          backward_group<T, ROWS, P>(g, head, job.rules, scratch, ahead, packed.out + at, sums);
        else
          forward_group<T, ROWS, P>(
              g, head, job.rules, scratch, ahead, packed.out + at, packed.weights ? packed.weights + at : nullptr);
      }
      unpack(job, lanes, head.start, packed);
      if constexpr (BACKWARD) add_sums(sums, job.sums + (task * job.problem.num_heads + job.head(unit)) * 4);
    }
    finish_streaming();
  }

 private:
  static Ahead look_ahead(const Job<T>& job, int64_t unit, int64_t j) {
    const int64_t bytes = N * (int64_t)job.storage.size;
    Ahead ahead;
    ahead.x = job.first_of(job.tensors.x, job.problem.x, unit) + j * bytes;
    if (BACKWARD) ahead.grad = job.first_of(job.tensors.grad, job.problem.grad, unit) + j * bytes;
    ahead.step = ROWS ? bytes : job.problem.x.row * (int64_t)job.storage.size;
    return ahead;
  }

  // Whether rows are worked on where they lie: of the arithmetic type, and whole vectors.
  static bool whole(const Job<T>& job, int64_t stride, int64_t n) {
    return job.storage.size == sizeof(T) && stride == 1 && n % N == 0;
  }
  static bool in_place(const Job<T>& job, const void*, int64_t n) {
    return !job.stream && whole(job, job.problem.out.row, n);
  }
  static T* row_of(const Job<T>& job, void* base, const Lanes& lanes, int64_t start) {
    const daam_strides& s = job.problem.out;
    return reinterpret_cast<T*>(job.at_row(base, s, start) + lanes.offset(0, s) * (int64_t)job.storage.size);
  }
  static T* pack_row(
      const Job<T>& job, const void* base, const daam_strides& s, const Lanes& lanes, int64_t start, int64_t n,
      Arrays<T>& arrays) {
    const char* const at = job.at_row(base, s, start) + lanes.offset(0, s) * (int64_t)job.storage.size;
    if (whole(job, s.row, n)) return reinterpret_cast<T*>(const_cast<char*>(at));
    T* const row = arrays.take(group_numbers(job, n));
    job.storage.pack_row(at, s.row, n, row);
    return row;
  }
};

}  // namespace
