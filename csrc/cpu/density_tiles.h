// From tensors of any strides and type to groups that lie packed, and back.
#pragma once

#include "density_fours.h"

namespace {

// body(l) of the first `count` lanes, all of them without a loop.
template <int N, class Body>
DAAM_INLINE void each_lane(int count, Body body) {
  if (count == N) {
#pragma GCC unroll 16
    for (int l = 0; l < N; l++) body(l);
  } else {
    for (int l = 0; l < count; l++) body(l);
  }
}

// body(j, at, count) of groups of slices from number j on: where each begins, and how many there are.
template <class T, class S, class Body>
DAAM_INLINE void each_group_from(int64_t j, const Lanes& lanes, const daam_strides& s, S* base, Body body) {
  constexpr int N = Vector<T>::N;
  for (; j * N < lanes.count; j++) {
    S* at[N];
    const int count = (int)(lanes.count - j * N < N ? lanes.count - j * N : N);
    for (int l = 0; l < count; l++) at[l] = base + lanes.offset(j * N + l, s);
    body(j, at, count);
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
#pragma GCC unroll 4
      for (int64_t j = 0; j < whole; j++) store<T>(tile.at + j * tile.group + r * N, load_as(row + j * N));
      for (int64_t l = whole * N; l < lanes.count; l++) tile.at[whole * tile.group + r * N + l % N] = number(row[l]);
    }
  } else {
    const Fours way = way_by_fours<T>(tile.n, s, lanes);
    if constexpr (kHasFours<T>) pack_by_fours(way, from, s, lanes, tile);
    each_group_from<T>(way == Fours::kNone ? 0 : whole, lanes, s, from, [&](int64_t j, const S* const* at, int count) {
      T* to = tile.at + j * tile.group;
      for (int64_t r = 0; r < tile.n; r++, to += N)
        each_lane<N>(count, [&](int l) __attribute__((always_inline)) { to[l] = number(at[l][r * s.row]); });
    });
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
    const Fours way = way_by_fours<T>(tile.n, s, lanes);
    if constexpr (kHasFours<T>) unpack_by_fours(way, tile, factors, to, s, lanes, stream);
    each_group_from<T>(way == Fours::kNone ? 0 : whole, lanes, s, to, [&](int64_t j, S* const* at, int count) {
      const V<T> factor = factors ? factors[j] : splat<T>(1);
      for (int64_t r = 0; r < tile.n; r++) {
        const V<T> v = load(tile.at + j * tile.group + r * N) * factor;
        T some[N];
        store<T>(some, v);
        each_lane<N>(count, [&](int l) __attribute__((always_inline)) { put(at[l] + r * s.row, some[l]); });
      }
    });
    return;
  }
  S* row = to + lanes.offset(0, s);
  const size_t line = 64 / sizeof(S);  // past the caches whole lines are written, or it would be slow
  stream = stream && (size_t)row % 64 == 0 && s.row % line == 0 && lanes.count % line == 0;
  const auto rows = [&](auto value) __attribute__((always_inline)) {
    for (int64_t r = 0; r < tile.n; r++, row += s.row) {
      const T* const from = tile.at + r * N;
      if (stream)
#pragma GCC unroll 4
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
