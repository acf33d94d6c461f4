// From tensors of any strides and type to groups that lie packed, and back.
#pragma once

#include "density_slices.h"
#include "fours.h"
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

// Whether slices go to the lanes, and back, by fours of their own elements; those that do not fill a group do not.
template <class T>
DAAM_INLINE bool by_fours(const Tile<T>& tile, const daam_strides& s, const Lanes& lanes) {
  return kHasFours<T> && s.row == 1 && tile.n >= 4 && lanes.distance(s);
}

// body(r) of the first of every four elements; the last four may overlap those before.
template <class Body>
DAAM_INLINE void each_four(int64_t n, Body body) {
  for (int64_t r = 0; r < n - 4; r += 4) body(r);
  body(n - 4);
}

// distance: from each slice to the next.
template <class T, class S>
void pack_fours(const S* from, int64_t distance, int64_t groups, const Tile<T>& tile) {
  constexpr int N = Vector<T>::N;
  for (int64_t j = 0; j < groups; j++, from += N * distance)
    each_four(tile.n, [&](int64_t r) __attribute__((always_inline)) {
      V<T> v[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++)
        v[q] = load_fours(from, [&](int i) __attribute__((always_inline)) { return from + (4 * i + q) * distance + r; });
      transpose_fours(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) store<T>(tile.at + j * tile.group + (r + i) * N, v[i]);
    });
}

template <class T, class S>
DAAM_INLINE void unpack_group_by_fours(const T* group, int64_t n, V<T> factor, S* to, int64_t distance) {
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
void unpack_fours(
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
      unpack_group_by_fours<T>(
          tile.at + (j + b) * tile.group, tile.n, factors ? factors[j + b] : splat<T>(1), here + b * N * distance,
          distance);
    if (here == lines) stream_bytes(there, lines, numbers * sizeof(S));
  }
}

// x, grad: the tensor's base moved to the head's first row.
template <class T, class S>
void pack_tile(const void* base, const daam_strides& s, const Lanes& lanes, const Tile<T>& tile) {
  constexpr int N = Vector<T>::N;
  const S* const from = static_cast<const S*>(base);
  const int64_t whole = lanes.count / N;
  if (lanes.adjacent(s)) {
    const S* row = from + lanes.offset(0, s);
    for (int64_t r = 0; r < tile.n; r++, row += s.row) {
      for (int64_t j = 0; j < whole; j++) store<T>(tile.at + j * tile.group + r * N, load_as(row + j * N));
      for (int64_t l = whole * N; l < lanes.count; l++) tile.at[whole * tile.group + r * N + l % N] = number(row[l]);
    }
  } else {
    const bool fours = by_fours(tile, s, lanes);
    if constexpr (kHasFours<T>)
      if (fours) pack_fours(from + lanes.offset(0, s), lanes.distance(s), whole, tile);
    for (int64_t l = fours ? whole * N : 0; l < lanes.count; l++) {
      const S* const column = from + lanes.offset(l, s);
      T* const to = tile.at + l / N * tile.group + l % N;
      for (int64_t r = 0; r < tile.n; r++) to[r * N] = number(column[r * s.row]);
    }
  }
  for (int64_t l = lanes.count; l < (lanes.count + N - 1) / N * N; l++)
    for (int64_t r = 0; r < tile.n; r++) tile.at[l / N * tile.group + r * N + l % N] = 0;
}

// COUNT neighbouring groups of columns, and the moments of each.
template <int COUNT, class T, class S>
DAAM_INLINE void pack_groups(const S* row, int64_t stride, const Tile<T>& tile, Moments<T>* moments) {
  constexpr int N = Vector<T>::N;
  V<T> shift[COUNT];
  for (int j = 0; j < COUNT; j++) {
    V<T> sum{};
    for (int64_t r = 0; r < kGuessed; r++) sum += load_as(row + r * stride + j * N);
    shift[j] = rounded(sum * (T)(1.0 / kGuessed));
    moments[j].shift = shift[j];
    moments[j].first = moments[j].second = V<T>{};
  }
  for (int64_t begin = 0; begin < tile.n; begin += kBlock) {
    const int64_t end = begin + kBlock < tile.n ? begin + kBlock : tile.n;
    V<T> first[COUNT] = {}, second[COUNT] = {};
    for (int64_t r = begin; r < end; r++, row += stride) {
#pragma GCC unroll 4
      for (int j = 0; j < COUNT; j++) {
        const V<T> x = load_as(row + j * N), s = x - shift[j];
        store<T>(tile.at + j * tile.group + r * N, x);
        first[j] += s;
        second[j] += s * s;
      }
    }
    for (int j = 0; j < COUNT; j++) moments[j].first += first[j], moments[j].second += second[j];
  }
}

// The same as pack_tile, of whole groups of columns that are neighbours in memory and of at least kGuessed elements.
template <class T, class S>
void pack_with_moments(
    const void* base, const daam_strides& s, const Lanes& lanes, const Tile<T>& tile, Moments<T>* moments) {
  constexpr int N = Vector<T>::N;
  const S* const row = static_cast<const S*>(base) + lanes.offset(0, s);
  const auto from = [&](int64_t j) { return Tile<T>{tile.at + j * tile.group, tile.n, tile.group}; };
  int64_t j = 0;
  for (; j + 4 <= lanes.count / N; j += 4) pack_groups<4, T>(row + j * N, s.row, from(j), moments + j);
  for (; j < lanes.count / N; j++) pack_groups<1, T>(row + j * N, s.row, from(j), moments + j);
}

// factors: of each group, what its elements are multiplied by; or none.
template <class T, class S>
void unpack_tile(
    const Tile<T>& tile, const V<T>* factors, void* base, const daam_strides& s, const Lanes& lanes, bool stream) {
  constexpr int N = Vector<T>::N;
  S* const to = static_cast<S*>(base);
  const int64_t whole = lanes.count / N;
  if (!lanes.adjacent(s)) {
    const bool fours = by_fours(tile, s, lanes);
    if constexpr (kHasFours<T>)
      if (fours) unpack_fours(tile, factors, to + lanes.offset(0, s), lanes.distance(s), whole, stream);
    for (int64_t l = fours ? whole * N : 0; l < lanes.count; l++) {
      S* const column = to + lanes.offset(l, s);
      const T* const from = tile.at + l / N * tile.group + l % N;
      const T factor = factors ? factors[l / N][l % N] : 1;
      for (int64_t r = 0; r < tile.n; r++) put(column + r * s.row, from[r * N] * factor);
    }
    return;
  }
  S* row = to + lanes.offset(0, s);
  const size_t line = 64 / sizeof(S);  // past the caches whole lines are written, or it would be slow
  stream = stream && (size_t)row % 64 == 0 && s.row % line == 0 && lanes.count % line == 0;
  const auto rows = [&](auto value) __attribute__((always_inline)) {
    for (int64_t r = 0; r < tile.n; r++, row += s.row) {
      const T* const from = tile.at + r * N;
      if (stream)
        for (int64_t j = 0; j < whole; j++) stream_as<T>(row + j * N, value(from, j));
      else
        for (int64_t j = 0; j < whole; j++) store_as<T>(row + j * N, value(from, j));
      for (int64_t l = whole * N; l < lanes.count; l++) put(row + l, value(from, whole)[l % N]);
    }
  };
  const auto plain = [&](const T* from, int64_t j) __attribute__((always_inline)) { return load(from + j * tile.group); };
  if (factors)
    rows([&](const T* from, int64_t j) __attribute__((always_inline)) { return plain(from, j) * factors[j]; });
  else
    rows(plain);
}

// A row: one slice. Scratch memory beyond its end is filled with zeros to a whole vector.
template <class T, class S>
void pack_row(const void* at, int64_t stride, int64_t n, T* row) {
  constexpr int N = Vector<T>::N;
  const S* const from = static_cast<const S*>(at);
  int64_t i = 0;
  if (stride == 1)
    for (; i + N <= n; i += N) store<T>(row + i, load_as(from + i));
  for (; i < n; i++) row[i] = number(from[i * stride]);
  for (; i % N; i++) row[i] = 0;
}

template <class T, class S>
void unpack_row(const T* row, int64_t n, void* at, int64_t stride, bool stream) {
  constexpr int N = Vector<T>::N;
  S* const to = static_cast<S*>(at);
  int64_t i = 0;
  if (stride == 1) {
    if (stream) {
      for (; i < n && (size_t)(to + i) % (N * sizeof(S)); i++) put(to + i, row[i]);
      for (; i + N <= n; i += N) stream_as<T>(to + i, load(row + i));
    }
    for (; i + N <= n; i += N) store_as<T>(to + i, load(row + i));
  }
  for (; i < n; i++) put(to + i * stride, row[i]);
}

DAAM_INLINE constexpr Format format_named(BFloat16) { return Format::kBFloat16; }
DAAM_INLINE constexpr Format format_named(Float16) { return Format::kFloat16; }
DAAM_INLINE constexpr Format format_named(float) { return Format::kSame; }
DAAM_INLINE constexpr Format format_named(double) { return Format::kSame; }

// What depends on the storage type alone.
template <class T>
struct Storage {
  size_t size;
  Format format;
  void (*pack_tile)(const void*, const daam_strides&, const Lanes&, const Tile<T>&);
  void (*pack_with_moments)(const void*, const daam_strides&, const Lanes&, const Tile<T>&, Moments<T>*);
  void (*unpack_tile)(const Tile<T>&, const V<T>*, void*, const daam_strides&, const Lanes&, bool);
  void (*pack_row)(const void*, int64_t, int64_t, T*);
  void (*unpack_row)(const T*, int64_t, void*, int64_t, bool);

  template <class S>
  static Storage of() {
    constexpr Format format = sizeof(S) == sizeof(T) ? Format::kSame : format_named(S());
    return {sizeof(S), format, ::pack_tile<T, S>, ::pack_with_moments<T, S>, ::unpack_tile<T, S>, ::pack_row<T, S>,
            ::unpack_row<T, S>};
  }
};

// Which numbers of packed x are not padding: all ones, or 0. mask is moved to the head's first row.
template <class T>
DAAM_INLINE void find_valid(
    const T* x, const uint8_t* mask, int64_t stride, int64_t n, int64_t step, bool has_padding, T padding,
    typename Vector<T>::integer* valid) {
  for (int64_t r = 0; r < n; r++) {
    const bool kept = (!mask || mask[r * stride]) && !(has_padding && x[r * step] == padding);
    valid[r * step] = kept ? -1 : 0;
  }
}

template <class T>
void find_valid_row(
    const T* x, const uint8_t* mask, const daam_density& p, int64_t n, typename Vector<T>::integer* valid) {
  find_valid<T>(x, mask, p.mask.row, n, 1, p.flags & DAAM_HAS_PADDING_VALUE, (T)p.padding_value, valid);
  for (int64_t r = n; r % Vector<T>::N; r++) valid[r] = 0;
}

template <class T>
void find_valid_tile(
    const Tile<T>& x, const uint8_t* mask, const daam_density& p, const Lanes& lanes,
    typename Vector<T>::integer* valid) {
  constexpr int N = Vector<T>::N;
  for (int64_t l = 0; l < (lanes.count + N - 1) / N * N; l++) {
    const int64_t at = l / N * x.group + l % N;
    const bool exists = l < lanes.count;
    const uint8_t* const column = mask && exists ? mask + lanes.offset(l, p.mask) : nullptr;
    find_valid<T>(
        x.at + at, column, p.mask.row, x.n, N, exists && p.flags & DAAM_HAS_PADDING_VALUE, (T)p.padding_value,
        valid + at);
  }
}

}  // namespace
