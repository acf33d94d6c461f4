// Whole groups of columns by fours of elements that are neighbours in memory: of a slice, or of slices side by side.
#pragma once

#include "density_lanes.h"
#include "fours.h"

namespace {

// The four are elements of a slice; or neighbouring slices' of one row; or of two rows of two slices each, where there
// are no more.
enum class Fours { kNone, kAlong, kAcross, kPairs };

template <class T>
DAAM_INLINE Fours way_by_fours(int64_t n, const daam_strides& s, const Lanes& lanes) {
  if (!kHasFours<T>) return Fours::kNone;
  if (s.row == 1 && n >= 4 && lanes.distance(s)) return Fours::kAlong;
  if (s.inner == 1 && lanes.inner % 4 == 0 && lanes.first % 4 == 0) return Fours::kAcross;
  return s.inner == 1 && lanes.inner == 2 && s.row == 2 && lanes.first % 2 == 0 ? Fours::kPairs : Fours::kNone;
}

// body(r) of the first of every four elements; the last four may overlap those before.
template <class Body>
DAAM_INLINE void each_four(int64_t n, Body body) {
  for (int64_t r = 0; r < n - 4; r += 4) body(r);
  body(n - 4);
}

// distance: from each slice to the next.
template <class T, class S>
void pack_along(const S* from, int64_t distance, int64_t groups, const Tile<T>& tile) {
  constexpr int N = Vector<T>::N;
  for (int64_t j = 0; j < groups; j++, from += N * distance)
    each_four(tile.n, [&](int64_t r) __attribute__((always_inline)) {
      V<T> v[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++)
        v[q] = load_fours(
            from, [&](int i) __attribute__((always_inline)) { return from + (4 * i + q) * distance + r; });
      transpose_fours(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) store<T>(tile.at + j * tile.group + (r + i) * N, v[i]);
    });
}

template <class T, class S>
DAAM_INLINE void unpack_group_along(const T* group, int64_t n, V<T> factor, S* to, int64_t distance) {
  constexpr int N = Vector<T>::N;
  each_four(n, [&](int64_t r) __attribute__((always_inline)) {
    V<T> v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = load(group + (r + i) * N) * factor;
    transpose_fours(v);
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++)
      store_fours(to, v[q], [&](int i) __attribute__((always_inline)) { return to + (4 * i + q) * distance + r; });
  });
}

template <class T, class S>
void unpack_along(
    const Tile<T>& tile, const V<T>* factors, S* to, int64_t distance, int64_t groups, bool stream) {
  constexpr int N = Vector<T>::N;
  constexpr int64_t longest = 96, together = 4;
  const bool whole_lines = distance == tile.n && tile.n <= longest && (size_t)to % 64 == 0;
  alignas(64) S lines[together * N * longest];  // past the caches neighbours go together
  for (int64_t j = 0; j < groups; j += together) {
    const int64_t some = groups - j < together ? groups - j : together, numbers = some * N * tile.n;
    S* const there = to + j * N * distance;
    S* const here = stream && whole_lines ? lines : there;
    for (int64_t b = 0; b < some; b++)
      unpack_group_along<T>(
          tile.at + (j + b) * tile.group, tile.n, factors ? factors[j + b] : splat<T>(1), here + b * N * distance,
          distance);
    if (here == lines) stream_bytes(there, lines, numbers * sizeof(S));
  }
}

// Where every fourth slice of a group begins, or every second one.
template <int STEP, class T, class S>
struct Places {
  S* at[Vector<T>::N / STEP];
  DAAM_INLINE Places(S* base, const daam_strides& s, const Lanes& lanes, int64_t j) {
    for (int i = 0; i < Vector<T>::N / STEP; i++) at[i] = base + lanes.offset(j * Vector<T>::N + i * STEP, s);
  }
};

template <class T, class S>
void pack_across(const S* base, const daam_strides& s, const Lanes& lanes, const Tile<T>& tile) {
  constexpr int N = Vector<T>::N;
  for (int64_t j = 0; j < lanes.count / N; j++) {
    const Places<4, T, const S> places(base, s, lanes, j);
    for (int64_t r = 0; r < tile.n; r++) {
      const auto at = [&](int i) __attribute__((always_inline)) { return places.at[i] + r * s.row; };
      store<T>(tile.at + j * tile.group + r * N, load_fours(base, at));
    }
  }
}

template <class T, class S>
void unpack_across(const Tile<T>& tile, const V<T>* factors, S* base, const daam_strides& s, const Lanes& lanes) {
  constexpr int N = Vector<T>::N;
  for (int64_t j = 0; j < lanes.count / N; j++) {
    const Places<4, T, S> places(base, s, lanes, j);
    const V<T> factor = factors ? factors[j] : splat<T>(1);
    for (int64_t r = 0; r < tile.n; r++) {
      const auto at = [&](int i) __attribute__((always_inline)) { return places.at[i] + r * s.row; };
      store_fours(base, load(tile.at + j * tile.group + r * N) * factor, at);
    }
  }
}

// body(r) of the first of every two rows; the last two may overlap those before.
template <class Body>
DAAM_INLINE void each_two(int64_t n, Body body) {
  for (int64_t r = 0; r < n - 2; r += 2) body(r);
  body(n - 2);
}

template <class T, class S>
void pack_pairs(const S* base, const daam_strides& s, const Lanes& lanes, const Tile<T>& tile) {
  constexpr int N = Vector<T>::N;
  for (int64_t j = 0; j < lanes.count / N; j++) {
    const Places<2, T, const S> places(base, s, lanes, j);
    each_two(tile.n, [&](int64_t r) __attribute__((always_inline)) {
      const auto even = [&](int i) __attribute__((always_inline)) { return places.at[2 * i] + r * 2; };
      const auto odd = [&](int i) __attribute__((always_inline)) { return places.at[2 * i + 1] + r * 2; };
      const V<T> a = load_fours(base, even), b = load_fours(base, odd);
      T* const to = tile.at + j * tile.group + r * N;
      store<T>(to, low_halves(a, b));
      store<T>(to + N, high_halves(a, b));
    });
  }
}

template <class T, class S>
void unpack_pairs(const Tile<T>& tile, const V<T>* factors, S* base, const daam_strides& s, const Lanes& lanes) {
  constexpr int N = Vector<T>::N;
  for (int64_t j = 0; j < lanes.count / N; j++) {
    const Places<2, T, S> places(base, s, lanes, j);
    const V<T> factor = factors ? factors[j] : splat<T>(1);
    each_two(tile.n, [&](int64_t r) __attribute__((always_inline)) {
      const auto even = [&](int i) __attribute__((always_inline)) { return places.at[2 * i] + r * 2; };
      const auto odd = [&](int i) __attribute__((always_inline)) { return places.at[2 * i + 1] + r * 2; };
      const T* const from = tile.at + j * tile.group + r * N;
      const V<T> a = load(from) * factor, b = load(from + N) * factor;
      store_fours(base, low_halves(a, b), even);
      store_fours(base, high_halves(a, b), odd);
    });
  }
}

template <class T, class S>
DAAM_INLINE void pack_by_fours(
    Fours way, const S* base, const daam_strides& s, const Lanes& lanes, const Tile<T>& tile) {
  if (way == Fours::kAlong)
    pack_along(base + lanes.offset(0, s), lanes.distance(s), lanes.count / Vector<T>::N, tile);
  else if (way == Fours::kAcross)
    pack_across(base, s, lanes, tile);
  else if (way == Fours::kPairs)
    pack_pairs(base, s, lanes, tile);
}

template <class T, class S>
DAAM_INLINE void unpack_by_fours(
    Fours way, const Tile<T>& tile, const V<T>* factors, S* base, const daam_strides& s, const Lanes& lanes,
    bool stream) {
  if (way == Fours::kAlong)
    unpack_along(tile, factors, base + lanes.offset(0, s), lanes.distance(s), lanes.count / Vector<T>::N, stream);
  else if (way == Fours::kAcross)
    unpack_across(tile, factors, base, s, lanes);
  else if (way == Fours::kPairs)
    unpack_pairs(tile, factors, base, s, lanes);
}

}  // namespace
