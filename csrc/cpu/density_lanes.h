// Which slices go to the lanes of columns, and the tile that they are packed in.
#pragma once

#include "density_slices.h"
#include "internal.h"

namespace {

// Neighbouring slices, counted through outer and inner, whose elements are the rows of a tile.
struct Lanes {
  int64_t first, count, inner;

  // Elements from the first element of x to slice number `lane`, at R = 0.
  DAAM_INLINE int64_t offset(int64_t lane, const daam_strides& s) const {
    const int64_t number = first + lane;
    if (inner == 1) return number * s.outer;
    return number / inner * s.outer + number % inner * s.inner;
  }
  // Elements from each slice to the next, where that is the same for all; else 0.
  DAAM_INLINE int64_t distance(const daam_strides& s) const {
    if (inner == 1) return s.outer;
    return first % inner + count <= inner || s.outer == inner * s.inner ? s.inner : 0;
  }
  // Whether the slices are neighbours in memory too.
  DAAM_INLINE bool adjacent(const daam_strides& s) const { return count == 1 || distance(s) == 1; }
};

// A tile in scratch memory: [groups][n][N], groups `group` numbers apart.
template <class T>
struct Tile {
  T* at;
  int64_t n, group;
};

}  // namespace
