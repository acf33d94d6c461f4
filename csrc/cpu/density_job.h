// A call cut into units, and units into tasks that threads take. What a unit computes, and the order in which sums are
// added, is the same for any number of threads.
#pragma once

#include <stdlib.h>

#include "density_tiles.h"

namespace {

using daam::Tensors;

constexpr int64_t kLongestRow = 16384;   // elements of a slice that is worked on whole: it stays in the L2 cache
constexpr int64_t kLongestColumn = 4096;
constexpr int64_t kShortestRow = 32;     // slices shorter than that are worked on side by side even where R is contiguous
constexpr int64_t kTileNumbers = 16384;  // of x in a tile
constexpr int64_t kWidestTile = 1024;
constexpr int64_t kNarrowestTile = 16;   // slices: a cache line of floats
constexpr int64_t kTaskNumbers = 16384;  // elements that are worth a task
constexpr int64_t kMostTasks = 1024;
constexpr int64_t kSerialNumbers = 32768;  // below that, threads cost more than they save
constexpr int64_t kStreamedBytes = 16 << 20;  // results from that size on go past the caches

DAAM_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
DAAM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DAAM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory that is given back; NULL where there is not so much.
struct Memory {
  void* at;
  explicit Memory(size_t bytes) : at(aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {}
  ~Memory() { free(at); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

template <class T>
struct Job {
  const daam_density& problem;
  const Tensors& tensors;
  Storage<T> storage;
  const Head<T>* heads;
  Rules rules;
  bool rows, stream;
  int64_t longest;             // elements of the longest slice
  int64_t width, span, tiles;  // slices are cut into spans, those into tiles; a row is a tile of one slice
  int64_t units;               // counted through spans, heads, tiles: neighbours in memory follow each other
  int64_t units_per_task, tasks;
  double* sums;  // [tasks][heads][4], the backward's
  int status = DAAM_OK;

  DAAM_INLINE int64_t head(int64_t unit) const { return unit / tiles % problem.num_heads; }
  DAAM_INLINE Lanes lanes(int64_t unit) const {
    const int64_t start = unit / tiles / problem.num_heads * span, first = start + unit % tiles * width;
    const int64_t end = least(start + span, problem.outer * problem.inner);
    return {first, least(width, end - first), problem.inner};
  }
  // A tensor at row `row` of R.
  DAAM_INLINE const char* at_row(const void* base, const daam_strides& s, int64_t row) const {
    return static_cast<const char*>(base) + row * s.row * (int64_t)storage.size;
  }
  DAAM_INLINE char* at_row(void* base, const daam_strides& s, int64_t row) const {
    return static_cast<char*>(base) + row * s.row * (int64_t)storage.size;
  }
  DAAM_INLINE const uint8_t* mask_at_row(int64_t row) const {
    return tensors.mask ? tensors.mask + row * problem.mask.row : nullptr;
  }
  // The first element of a unit.
  DAAM_INLINE const char* first_of(const void* base, const daam_strides& s, int64_t unit) const {
    return at_row(base, s, heads[head(unit)].start) + lanes(unit).offset(0, s) * (int64_t)storage.size;
  }
};

// The scratch memory of one unit: each array begins at a cache line, and no two of them a multiple of 4096 bytes apart.
template <class T>
struct Arrays {
  char* at;
  DAAM_INLINE T* take(int64_t numbers) {
    T* const taken = reinterpret_cast<T*>(at);
    at += bytes(numbers);
    return taken;
  }
  static DAAM_INLINE int64_t bytes(int64_t numbers) { return (numbers * (int64_t)sizeof(T) + 63) / 64 * 64 + 192; }
};

// A unit, or a run of rows of it, packed.
template <class T>
struct Packed {
  Tile<T> x, grad;
  typename Vector<T>::integer* valid;
  T *density, *z, *q;  // of one group
  T *out, *weights;    // out may be where x was
  int64_t groups;
};

template <class T>
DAAM_INLINE int64_t group_numbers(const Job<T>& job, int64_t n) {
  constexpr int64_t N = Vector<T>::N;
  return job.rows ? divide_up(n, N) * N : n * N + N;
}

// Bytes of scratch memory for units or runs of at most n rows.
template <class T>
int64_t scratch_bytes(const Job<T>& job, int64_t n) {
  constexpr int64_t N = Vector<T>::N;
  const int64_t group = group_numbers(job, n);
  return 5 * Arrays<T>::bytes(divide_up(job.width, N) * group) + 3 * Arrays<T>::bytes(group);
}

// Adds the lanes of a unit's sums to its task's.
template <class T, bool ROWS>
void add_sums(const Accumulated<T, ROWS>& from, double* to) {
  const typename Vector<T>::wide* const fields[] = {&from.t0, &from.t0_v, &from.u1_v, &from.u2_v};
  for (int field = 0; field < 4; field++)
    for (int i = 0; i < (ROWS ? 1 : Vector<T>::N); i++) to[field] += (*fields[field])[i];
}

}  // namespace
