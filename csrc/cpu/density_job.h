// A call cut into units, and units into tasks that threads take. What a unit computes, and the order in which sums are
// added, is the same for any number of threads.
#pragma once

#include "density_mixture.h"
#include "density_tiles.h"
#include "work.h"

namespace {

using daam::Tensors;

constexpr int64_t kLongestRow = 16384;  // elements of a slice that is worked on whole: it stays in the L2 cache
constexpr int64_t kLongestOfMany = 131072;  // the same where there are kManyRows or more: threads need no runs of them
constexpr int64_t kManyRows = 32;
constexpr int64_t kLongestColumn = 4096;
constexpr int64_t kRowRun = 8192;  // elements that longer ones are cut into; columns at least that many
constexpr int64_t kColumnRun = 512;
constexpr int64_t kBatchNumbers = 1 << 22;  // elements of longer ones that all sweeps go through before the next
constexpr int64_t kRowNumbers = 2048;      // elements of rows that are worked on together
constexpr int64_t kTileNumbers = 16384;    // of x in a tile of columns
constexpr int64_t kNarrowestTile = 64;     // slices: narrower pieces of memory are slow to come by
constexpr int64_t kWidestTile = 1024;
constexpr int64_t kBesideEachOther = 32;   // elements of a column up to which groups are worked on together
constexpr int64_t kTaskNumbers = 4096;     // elements that are worth a task
constexpr int64_t kMostTasks = 1024;
constexpr int64_t kMostSums = 1 << 22;     // of all tasks
constexpr int64_t kSerialNumbers = 32768;  // below that, threads cost more than they save
constexpr int64_t kStreamedBytes = 16 << 20;  // results from that size on go past the caches

// Slices shorter than that lie side by side even where R is contiguous. Those of several heads are apart in memory, and
// their results go past the caches from rows alone.
template <class T>
constexpr int64_t shortest_row(int64_t heads) {
  return !kHasFours<T> ? 16 : heads == 1 ? 97 : DAAM_VECTOR_BYTES == 64 ? 33 : 25;
}

template <class T>
struct Job {
  const daam_density& problem;
  const Tensors& tensors;
  Storage<T> storage;
  const Mixture<T>* mixture;  // null: the product
  const Heads<T>* heads;      // by the head of the first lane: of N rows that follow each other, or of columns of one head
  Rules rules;
  bool rows, stream;
  int64_t chunk, longest;      // elements of a slice, and of the longest
  int64_t width;               // slices of a unit: rows, or columns of one head
  bool whole;                  // whether slices are worked on whole
  int64_t run;                 // elements that a slice too long for the cache is cut into
  int64_t span, tiles;         // columns: slices are cut into spans, those into units
  int64_t units;               // rows: counted through slices, then heads; columns: spans, heads, units of a span
  int64_t units_per_task, tasks;
  int64_t head_sums;           // 4, or of a mixture 3 of each Gaussian
  double* sums;                // [tasks][heads][head_sums], the backward's
  int status = DAAM_OK;

  void run_out_of_memory() { __atomic_store_n(&status, DAAM_OUT_OF_MEMORY, __ATOMIC_RELAXED); }  // from any thread
  DAAM_INLINE int64_t length(int64_t head) const {
    return head == problem.num_heads - 1 ? problem.length - head * chunk : chunk;
  }
  DAAM_INLINE int64_t column_head(int64_t unit) const { return unit / tiles % problem.num_heads; }
  DAAM_INLINE Lanes column_lanes(int64_t unit) const {
    const int64_t start = unit / tiles / problem.num_heads * span, first = start + unit % tiles * width;
    const int64_t end = least(start + span, problem.outer * problem.inner);
    return {first, least(width, end - first), problem.inner};
  }
};

// Scratch memory handed out: each array begins at a cache line, and neighbours are no multiple of 4096 bytes apart.
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

}  // namespace
