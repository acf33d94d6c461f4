// Density attention of a group of N slices, N being the lanes of a vector: numbers per slice are vectors. The elements
// lie packed in one of two layouts. In rows each slice is a row of its own, and a sweep goes through one after the other,
// N neighbours of a slice at a time; in columns a vector holds one element of each slice, and a sweep goes through all.
#pragma once

#include "../density_math.h"
#include "storage.h"

namespace {

using daam::kLog2E;

enum class Padding { kNone, kZeros, kExcluded };

// Layouts.
struct InRows {
  static constexpr bool kRows = true;
};
struct InColumns {
  static constexpr bool kRows = false;
};

// How many elements the statistics count, and what they multiply by to divide by them, and by one less; of two at least.
template <class T>
struct Count {
  V<T> n, share, free_share;
};

// What the slices of a group have in common with those of other groups: their lengths, their heads' Gaussians.
template <class T>
struct Heads {
  Count<T> count;
  V<T> center, spread, level, height;
  V<T> root, inverse_root;  // sqrt(a log2(e) / 2)
  Mask<T> narrow;           // densities relative to the centre's would lose digits, or all of them
  // The variance from which on a slice is not clamped if its densities are exact relative to the centre's; infinite where
  // most groups have a slice whose densities are not, or that is clamped.
  V<T> plain_var;
};

// How elements lie in memory. Rows may be read from there and written to there in the types that tensors have.
enum class Format { kSame, kBFloat16, kFloat16, kPairedBFloat16 };

// Elements of a slice, or in columns of all slices of the group, and where results go.
template <class T>
struct Row {
  int64_t n;  // elements of a slice
  const T *x, *grad;
  const typename Vector<T>::integer* valid;  // all ones or 0, with padding only
  T *density, *z, *q;                        // scratch
  void* out;                                 // of Group::out_format; may be where x is
  T* weights;
  const void *packed_x, *packed_grad;        // of Group::in_format: the first sweep unpacks them to x and grad
};

constexpr int64_t kLine = DAAM_VECTOR_BYTES < 64 ? 64 / DAAM_VECTOR_BYTES : 1;  // vectors of a line of the cache

// Where what comes next lies: brought to the L2 cache while this group is worked on.
struct Ahead {
  const char* at;
  int64_t step;                // bytes from one vector to the next
  int64_t column, width, row;  // columns: bytes from a row's beginning, of all of it, and from it to the next row

  // In rows, vector i; in columns the next one, row by row, for neighbours in memory come sooner than lines of many pages.
  template <class L>
  DAAM_INLINE void touch(int64_t i) {
    if constexpr (L::kRows) return __builtin_prefetch(at + i * step, 0, 2);
    __builtin_prefetch(at + column, 0, 2);
    column += step;
    if (column == width) column = 0, at += row;
  }
};

// Sums of x - shift and of its square over what the statistics count.
template <class T>
struct Moments {
  V<T> shift, first, second;
};

template <class T>
struct Group {
  int count;  // slices
  Format in_format = Format::kSame, out_format = Format::kSame;
  bool stream = false;  // write past the caches; rows are aligned to vectors then
  Row<T> row[Vector<T>::N];
  Ahead ahead_x[Vector<T>::N], ahead_grad[Vector<T>::N];
  const Heads<T>* heads;
  const Moments<T>* moments = nullptr;  // where they were found as the group was packed
  // Columns may ask that x times the density takes the place of x: pack_again brings x back, and whoever writes y
  // multiplies by the factor that is left here.
  V<T>* factor = nullptr;
  void (*pack_again)(const void* unit, int64_t number) = nullptr;
  const void* unit = nullptr;
  int64_t number = 0;

  DAAM_INLINE Mask<T> lanes() const { return first_lanes<T>(count); }
};

struct Rules {
  double eps;
  bool softmax, residual;
};

// The rows of a group, one after the other, or from the last to the first: such a sweep still finds near it what the one
// before has left. Columns are all in one. Those that are not asked for are left out.
template <class T, class L, bool FROM_LAST = false, class Body>
DAAM_INLINE void each_row(const Group<T>& g, Mask<T> asked, Body body) {
  if constexpr (!L::kRows) return body(0);
  for (int i = 0; i < g.count; i++) {
    const int r = FROM_LAST ? g.count - 1 - i : i;
    if (asked[r]) body(r);
  }
}

// What a row needs of numbers per slice, and what it gives to them.
template <class T, class L>
DAAM_INLINE V<T> of_row(const V<T>& v, int r) {
  if constexpr (L::kRows) return splat<T>(v[r]);
  return v;
}
template <class T, class L>
DAAM_INLINE void set_sum(V<T>& to, int r, V<T> v) {
  if constexpr (L::kRows)
    to[r] = sum_of_lanes(v);
  else
    to = v;
}
template <class T, class L>
DAAM_INLINE void set_number(V<T>& to, int r, T number) {
  if constexpr (L::kRows)
    to[r] = number;
  else
    to = splat<T>(number);
}

constexpr int64_t kBlock = 64;  // vectors that are added up before their sum is added to the others'

// All lanes of a vector, or those of a row's last one that are not beyond its end.
template <class T>
struct Whole {
  template <class Lanes>
  DAAM_INLINE Lanes operator()(Lanes v) const {
    return v;
  }
  template <class S>
  DAAM_INLINE V<T> load(const S* at) const {
    return load_as(at);
  }
  template <bool STREAM, class S>
  DAAM_INLINE void store(S* at, V<T> v) const {
    STREAM ? stream_as<T>(at, v) : store_as<T>(at, v);
  }
};
template <class T>
struct Part {
  int64_t count;
  Mask<T> mask;
  DAAM_INLINE V<T> operator()(V<T> v) const { return keep<T>(mask, v); }
  DAAM_INLINE Mask<T> operator()(Mask<T> v) const { return v & mask; }
  template <class S>
  DAAM_INLINE V<T> load(const S* at) const {
    return load_part<T>(at, count);
  }
  template <bool STREAM, class S>
  DAAM_INLINE void store(S* at, V<T> v) const {
    store_part<T>(at, v, count);
  }
};

// Which of neighbouring vectors a sweep's body is given: -1 where there is no neighbour.
template <int INDEX>
struct Slot {
  static constexpr int index = INDEX < 0 ? 0 : INDEX;
  static constexpr bool first = INDEX % 2 == 0, second = INDEX % 2 == 1;  // of a pair
};

// body(i, within, slot) for every vector i, and after_block() where sums should be moved on. Neighbouring vectors get
// different slots, of which there are SLOTS: a sum for each does not wait for the one before.
template <class T, class L, int SLOTS = 1, class Body, class AfterBlock>
DAAM_INLINE void sweep(int64_t n, Body body, AfterBlock after_block) {
  constexpr int64_t N = L::kRows ? Vector<T>::N : 1;
  const int64_t whole = n / N;
  for (int64_t first = 0; first < whole; first += kBlock) {
    const int64_t end = first + kBlock < whole ? first + kBlock : whole;
    int64_t i = first;
    if constexpr (SLOTS == 4)
      for (; i + 4 <= end; i += 4) {
        body(i, Whole<T>(), Slot<0>());
        body(i + 1, Whole<T>(), Slot<1>());
        body(i + 2, Whole<T>(), Slot<2>());
        body(i + 3, Whole<T>(), Slot<3>());
      }
#pragma GCC unroll 2
    for (; i < end; i++) body(i, Whole<T>(), Slot<-1>());
    after_block();
  }
  if (L::kRows && whole * N < n) {
    body(whole, Part<T>{n - whole * N, first_lanes<T>(n - whole * N)}, Slot<-1>());
    after_block();
  }
}

// Where the elements of type S are: packed, or as T.
template <class T, class S>
DAAM_INLINE const S* elements_of(S, const void* packed, const T*) {
  return static_cast<const S*>(packed);
}
template <class T>
DAAM_INLINE const T* elements_of(T, const void*, const T* unpacked) {
  return unpacked;
}

// body(S()) of the type S that a format stands for. Where there is padding, and in columns, all is packed as T.
template <class T, class L, Padding P, class Body>
DAAM_INLINE void with_format(Format format, Body body) {
  if constexpr (L::kRows && P == Padding::kNone && sizeof(T) == 4) {
    if (format == Format::kPairedBFloat16) return body(PairedBFloat16());
    if (format == Format::kBFloat16) return body(BFloat16());
    if (format == Format::kFloat16) return body(Float16());
  }
  body(T());
}

// Loads of a vector whose slot the sweep has told, and stores.
template <class Within, class Place, class S>
DAAM_INLINE auto load_at(const Within& within, Place, const S* at) {
  return within.load(at);
}
template <class Within, class Place>
DAAM_INLINE V<float> load_at(const Within& within, Place, const PairedBFloat16* at) {
  if constexpr (Place::first) return load_even(at);
  if constexpr (Place::second) return load_odd(at - Vector<float>::N);
  return within.load(at);
}

template <class T, class S, bool STREAM>
struct Store {
  template <class Within, class Place>
  DAAM_INLINE void operator()(const Within& within, Place, S* at, V<T> v) {
    within.template store<STREAM>(at, v);
  }
};
template <bool STREAM>
struct Store<float, PairedBFloat16, STREAM> {
  V<float> even;
  template <class Within, class Place>
  DAAM_INLINE void operator()(const Within& within, Place, PairedBFloat16* at, V<float> v) {
    if constexpr (Place::first) {
      even = v;
    } else if constexpr (Place::second) {
      const V<float> pair = pack_pair(even, v);
      void* const to = at - Vector<float>::N;
      if constexpr (STREAM)
        stream_as<float>(static_cast<float*>(to), pair);
      else
        memcpy(to, &pair, sizeof pair);  // of a BFloat16's alignment
    } else {
      within.template store<STREAM>(at, v);
    }
  }
};

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// body(S(), Constant<STREAM>()) of how results of a group are written: as which type, and whether past the caches.
template <class T, class L, Padding P, class Body>
DAAM_INLINE void with_target(const Group<T>& g, Body body) {
  with_format<T, L, P>(g.out_format, [&](auto s) __attribute__((always_inline)) {
    if (L::kRows && g.stream)
      body(s, Constant<L::kRows>());
    else
      body(s, Constant<false>());
  });
}

template <class T>
struct Sum {
  V<T> block{}, total{};
  DAAM_INLINE void operator+=(V<T> v) { block += v; }
  DAAM_INLINE void flush() {
    total += block;
    block = V<T>{};
  }
};

}  // namespace
