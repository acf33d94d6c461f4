// Density attention of a group of N slices, N being the lanes of a vector: numbers per slice are vectors. The elements
// lie packed in one of two layouts. In rows each slice is a row of its own, and a sweep goes through one after the other,
// N neighbours of a slice at a time; in columns a vector holds one element of each slice, and a sweep goes through all.
#pragma once

#include "../density_math.h"
#include "vector.h"

namespace {

using daam::kLog2E;

enum class Padding { kNone, kZeros, kExcluded };

// Layouts. kLength: elements of a slice where the compiler is told, else 0.
struct InRows {
  static constexpr bool kRows = true;
  static constexpr int kLength = 0;
};
template <int LENGTH = 0>
struct InColumns {
  static constexpr bool kRows = false;
  static constexpr int kLength = LENGTH;
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
  V<T> center, spread, level;
  V<T> root, inverse_root;  // sqrt(a log2(e) / 2)
  Mask<T> narrow;           // densities relative to the centre's would lose digits, or all of them
};

// How elements lie in memory. Rows may be read from there and written to there in the types that tensors have.
enum class Format { kSame, kBFloat16, kFloat16 };

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

// Where the next group lies: brought to the L2 cache while this one is worked on.
struct Ahead {
  const char *x, *grad;
  int64_t step;  // bytes from one vector to the next

  template <bool BACKWARD>
  DAAM_INLINE void touch(int64_t i) const {
    __builtin_prefetch(x + i * step, 0, 2);
    if (BACKWARD) __builtin_prefetch(grad + i * step, 0, 2);
  }
};

template <class T>
struct Group {
  int count;  // slices
  Format in_format = Format::kSame, out_format = Format::kSame;
  bool stream = false;  // write past the caches; rows are aligned to vectors then
  Row<T> row[Vector<T>::N];
  Ahead ahead[Vector<T>::N];
  const Heads<T>* heads;

  DAAM_INLINE Mask<T> lanes() const { return first_lanes<T>(count); }
};

struct Rules {
  double eps;
  bool softmax, residual;
};

// The rows of a group, one after the other; columns are all in one. Those that are not asked for are left out.
template <class T, class L, class Body>
DAAM_INLINE void each_row(const Group<T>& g, Mask<T> asked, Body body) {
  if constexpr (!L::kRows) return body(0);
  for (int r = 0; r < g.count; r++)
    if (asked[r]) body(r);
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

template <int INDEX>
struct Slot {
  static constexpr int index = INDEX;
};

// body(i, within, slot) for every vector i, and after_block() where sums should be moved on. Neighbouring vectors get
// different slots, of which there are SLOTS: a sum for each does not wait for the one before.
template <class T, class L, int SLOTS = 1, class Body, class AfterBlock>
DAAM_INLINE void sweep(int64_t n, Body body, AfterBlock after_block) {
  constexpr int64_t N = L::kRows ? Vector<T>::N : 1;
  if constexpr (L::kLength > 0) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < L::kLength; i++) body(i, Whole<T>(), Slot<0>());
    return after_block();
  }
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
    for (; i < end; i++) body(i, Whole<T>(), Slot<0>());
    after_block();
  }
  if (L::kRows && whole * N < n) {
    body(whole, Part<T>{n - whole * N, first_lanes<T>(n - whole * N)}, Slot<0>());
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
    if (format == Format::kBFloat16) return body(BFloat16());
    if (format == Format::kFloat16) return body(Float16());
  }
  body(T());
}

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

// Statistics

// Sums of x - shift and of its square over what the statistics count.
template <class T>
struct Moments {
  V<T> first, second;
};

// What lies packed as another type S is unpacked on the way.
template <class T, class L, Padding P, class S = T>
void find_moments(const Group<T>& g, const Mask<T>& asked, const V<T>& shifts, Moments<T>& found) {
  constexpr int N = Vector<T>::N;
  constexpr bool packed = sizeof(S) != sizeof(T);
  each_row<T, L>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const V<T> shift = of_row<T, L>(shifts, r);
    const S* const packed_x = static_cast<const S*>(row.packed_x);
    const S* const packed_grad = static_cast<const S*>(row.packed_grad);
    T *const to_x = const_cast<T*>(row.x), *const to_grad = const_cast<T*>(row.grad);
    Sum<T> first[4], second[4];
    const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
      V<T> x;
      if constexpr (packed) {
        x = within.load(packed_x + i * N);
        store<T>(to_x + i * N, x);
        if (packed_grad) store<T>(to_grad + i * N, within.load(packed_grad + i * N));
      } else {
        x = within.load(row.x + i * N);
      }
      if constexpr (P == Padding::kZeros) x = keep<T>(load_mask<T>(row.valid + i * N), x);
      V<T> s = within(x - shift);
      if constexpr (P == Padding::kExcluded) s = keep<T>(load_mask<T>(row.valid + i * N), s);
      first[slot.index].block += s;
      second[slot.index].block += s * s;
    };
    sweep<T, L, 4>(row.n, body, [&]() __attribute__((always_inline)) {
      first[0].total += (first[0].block + first[1].block) + (first[2].block + first[3].block);
      second[0].total += (second[0].block + second[1].block) + (second[2].block + second[3].block);
      for (int j = 0; j < 4; j++) first[j].block = second[j].block = V<T>{};
    });
    set_sum<T, L>(found.first, r, first[0].total);
    set_sum<T, L>(found.second, r, second[0].total);
  });
}

template <class T>
DAAM_INLINE void set_count(Count<T>& count, V<T> n) {
  const V<T> at_least = n > 2 ? n : splat<T>(2);
  count.n = n;
  count.share = 1 / at_least;
  count.free_share = 1 / (at_least - 1);
}

template <class T, class L, Padding P>
DAAM_INLINE void count_elements(const Group<T>& g, Count<T>& found) {
  constexpr int N = Vector<T>::N;
  if constexpr (P != Padding::kExcluded) {
    found.n = g.heads->count.n;
    found.share = g.heads->count.share;
    found.free_share = g.heads->count.free_share;
    return;
  }
  V<T> counts{};
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    Mask<T> count{};
    const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
      count -= load_mask<T>(g.row[r].valid + i * N);
    };
    sweep<T, L>(g.row[r].n, body, [] {});
    set_sum<T, L>(counts, r, __builtin_convertvector(count, V<T>));
  });
  set_count<T>(found, counts);
}

// A number near the mean to begin with, from the first few elements.
constexpr int kGuessed = 8;

template <class T, class L, Padding P>
DAAM_INLINE V<T> guess_means(const Group<T>& g) {
  constexpr int N = Vector<T>::N, most = L::kRows ? N : kGuessed;
  V<T> sums{}, counts{}, shares{};
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const int64_t n = L::kLength ? L::kLength : row.n, some = n < most ? n : most;
    V<T> sum{}, count{};
#pragma GCC unroll 8
    for (int64_t i = 0; i < (L::kRows ? 1 : some); i++) {
      V<T> x;
      with_format<T, L, P>(g.in_format, [&](auto s) __attribute__((always_inline)) {
        const auto* const from = elements_of(s, row.packed_x, row.x) + i * N;
        x = some < N && L::kRows ? load_part<T>(from, some) : load_as(from);
      });
      if constexpr (P != Padding::kNone) {
        const Mask<T> valid = load_mask<T>(row.valid + i * N);
        x = keep<T>(valid, x);
        count -= __builtin_convertvector(valid, V<T>);
      }
      sum += x;
    }
    set_sum<T, L>(sums, r, sum);
    if constexpr (P == Padding::kExcluded)
      set_sum<T, L>(counts, r, count);
    else
      set_number<T, L>(shares, r, 1 / (T)some);
  });
  if constexpr (P == Padding::kExcluded) shares = 1 / (counts > 1 ? counts : splat<T>(1));
  return rounded(sums * shares);
}

// A mean as high + low: it is never held in one number, which would cost digits on data with an offset.
template <class T>
struct Statistics {
  Count<T> count;
  V<T> high, low, var, rstd;
};

// s.count is there already.
template <class T>
DAAM_INLINE void finish_statistics(V<T> shift, const Moments<T>& m, double eps, Statistics<T>& s) {
  const V<T> offset = m.first * s.count.share, squares = m.second - m.first * offset;
  s.high = shift + offset;
  const V<T> taken = s.high - shift;
  s.low = (shift - (s.high - taken)) + (offset - taken);
  s.var = (squares < 0 ? V<T>{} : squares) * s.count.free_share + (T)eps;
  s.rstd = 1 / square_root(s.var);
}

template <class T, class L, Padding P>
DAAM_INLINE void find_statistics(const Group<T>& g, double eps, Statistics<T>& s) {
  count_elements<T, L, P>(g, s.count);
  V<T> shift = guess_means<T, L, P>(g);
  Moments<T> m;
  m.first = m.second = V<T>{};
  with_format<T, L, P>(g.in_format, [&](auto s) __attribute__((always_inline)) {
    find_moments<T, L, P, decltype(s)>(g, g.lanes(), shift, m);
  });
  if constexpr (L::kLength == 0 || L::kLength > kGuessed) {
    const Mask<T> far = ~(m.first * s.count.share * m.first <= m.second * (T)0.5) & g.lanes();
    if (any(far)) {  // more than a deviation from the mean: the squares would cancel
      shift = far ? shift + m.first * s.count.share : shift;
      find_moments<T, L, P>(g, far, shift, m);
    }
  }
  finish_statistics<T>(shift, m, eps, s);
}

// Densities

// Where densities are taken relative to: the centre of the Gaussians, or the slice's element of largest density, d =
// (x - high) scale - shift being the distance from there. In the backward z = d - start is relative to an element even
// if densities are not: what has all the weight is then at 0, and of many equal elements there nothing is left to
// cancel. Seen from the centre z is 0 at peak, and log2 of the density falls by z (z + twice) from there, twice being
// 2 peak.
template <class T>
struct Origin {
  V<T> high, low, scale, shift, start, peak, twice;
  V<T> grad;  // y's gradient at some element, or at that of largest density
};

template <class T>
DAAM_INLINE void set_peak(Origin<T>& o, V<T> peak) {
  constexpr T far = sizeof(T) == 4 ? (T)1e30 : (T)1e150;  // farther than any; finite, so that 0 times it is 0
  peak = peak > far ? splat<T>(far) : peak;
  peak = peak < -far ? splat<T>(-far) : peak;
  o.peak = peak;
  o.twice = 2 * peak;
}

template <class T>
DAAM_INLINE void set_origin(Origin<T>& o, V<T> high, V<T> low) {
  o.high = high;
  o.low = low;
  o.shift = rounded(low * o.scale);
  o.start = V<T>{};
}

// The centre of the head's Gaussians. Good enough where elements are near it.
template <class T>
DAAM_INLINE void origin_at_center(Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads) {
  o.scale = heads.root * s.rstd;
  o.grad = V<T>{};
  set_origin<T>(o, s.high, s.low + heads.center);
  set_peak<T>(o, V<T>{});
}

// z relative to an element near the centre, densities still to the centre.
template <class T>
DAAM_INLINE void start_at(Origin<T>& o, V<T> x) {
  o.start = (x - o.high) * o.scale - o.shift;
  set_peak<T>(o, o.start);
}

// The slice's element of largest density, which is the one nearest to the centre.
template <class T>
struct Nearest {
  V<T> distance, x, grad;
};

// Among the first `most` elements.
template <class T, class L, Padding P, bool BACKWARD>
void find_nearest(
    const Group<T>& g, const Mask<T>& asked, const Statistics<T>& s, int64_t most, Nearest<T>& found) {
  constexpr int N = Vector<T>::N;
  const V<T> centers = s.low + g.heads->center;
  each_row<T, L>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const V<T> high = of_row<T, L>(s.high, r), center = of_row<T, L>(centers, r);
    Nearest<T> best = {splat<T>((T)INFINITY), high, V<T>{}};
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      const V<T> x = within.load(row.x + i * N), distance = absolute<T>((x - high) - center);
      Mask<T> closer = within((Mask<T>)(distance < best.distance));
      if constexpr (P == Padding::kExcluded) closer &= load_mask<T>(row.valid + i * N);
      best.distance = closer ? distance : best.distance;
      best.x = closer ? x : best.x;
      if constexpr (BACKWARD) {
        V<T> grad = within.load(row.grad + i * N);
        if constexpr (P == Padding::kZeros) grad = keep<T>(load_mask<T>(row.valid + i * N), grad);
        best.grad = closer ? grad : best.grad;
      }
    };
    sweep<T, L>(row.n < most ? row.n : most, body, [] {});
    if constexpr (L::kRows) {
      int lane = 0;
      for (int i = 1; i < N; i++) lane = best.distance[i] < best.distance[lane] ? i : lane;
      found.distance[r] = best.distance[lane], found.x[r] = best.x[lane], found.grad[r] = best.grad[lane];
    } else {  // one by one: copied as a whole they would be copied in halves
      found.distance = best.distance;
      found.x = best.x;
      found.grad = best.grad;
    }
  });
}

// The nearest of the first few: where the elements take few values, there is one of those with all the weight.
template <class T, class L, Padding P>
DAAM_INLINE V<T> find_near(const Group<T>& g, const Statistics<T>& s) {
  Nearest<T> near;
  near.distance = near.x = near.grad = V<T>{};
  find_nearest<T, L, P, false>(g, g.lanes(), s, L::kRows ? 4 * Vector<T>::N : 8, near);
  return near.x;
}

template <class T>
DAAM_INLINE void move_origin(
    Origin<T>& o, Mask<T> moved, const Nearest<T>& to, const Statistics<T>& s, const Heads<T>& heads) {
  const V<T> peak = ((to.x - s.high) - (s.low + heads.center)) * o.scale;
  o.grad = moved ? to.grad : o.grad;
  const V<T> start = o.start, before = o.peak;
  set_origin<T>(o, moved ? to.x : o.high, moved ? V<T>{} : o.low);
  o.start = moved ? V<T>{} : start;
  set_peak<T>(o, moved ? peak : before);
}

// Rounding may hide which of two elements is nearer: no density is above 1.
template <class T, bool EXACT>
DAAM_INLINE V<T> density(V<T> z, V<T> twice) {
  if constexpr (!EXACT) return exp2_minus_square<T>(z);
  return exp2_minus_product<T>(z, z + twice);
}

// Sums over slices of the densities over the one at the origin, and in the backward of those times q, the gradient of
// the weights less its value at the origin. q is written so that neither a constant gradient nor an offset of x cancels.
template <class T>
struct Totals {
  V<T> density, q;
};

// Keeps the densities, and in the backward z and q.
template <class T, class L, Padding P, bool BACKWARD, bool EXACT>
void find_densities(const Group<T>& g, const Mask<T>& asked, const Origin<T>& o, Totals<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, L>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const Ahead ahead = g.ahead[r];
    const V<T> high = of_row<T, L>(o.high, r), scale = of_row<T, L>(o.scale, r);
    const V<T> shift = of_row<T, L>(o.shift, r), start = of_row<T, L>(o.start, r);
    const V<T> twice = of_row<T, L>(o.peak - o.start, r) * 2;  // 0 where densities are relative to the centre
    const V<T> origin_grad = of_row<T, L>(o.grad, r);
    Sum<T> sum, sum_q;
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      ahead.touch<BACKWARD>(i);
      const V<T> from_high = within.load(row.x + i * N) - high;
      V<T> d = from_high * scale - shift, m = within(density<T, EXACT>(d, twice));
      if constexpr (P == Padding::kExcluded) m = keep<T>(load_mask<T>(row.valid + i * N), m);
      store<T>(row.density + i * N, m);
      sum += m;
      if constexpr (BACKWARD) {
        V<T> grad = within.load(row.grad + i * N), q;
        if constexpr (P == Padding::kNone) {
          q = (grad - origin_grad) * high + grad * from_high;
        } else {  // what is padding may be infinite
          const Mask<T> valid = load_mask<T>(row.valid + i * N);
          grad = keep<T>(valid, grad);
          q = (grad - origin_grad) * high + keep<T>(valid, grad * from_high);
          if constexpr (P == Padding::kExcluded) q = keep<T>(valid, q);
          d = keep<T>(valid | (Mask<T>)(m > 0), d);
        }
        store<T>(row.z + i * N, d - start);
        store<T>(row.q + i * N, q);
        sum_q.block += m * q;
      }
    };
    sweep<T, L>(row.n, body, [&]() __attribute__((always_inline)) { sum.flush(), sum_q.flush(); });
    set_sum<T, L>(found.density, r, sum.total);
    if (BACKWARD) set_sum<T, L>(found.q, r, sum_q.total);
  });
}

// Slices whose densities relative to the centre's are too small to be exact.
template <class T>
DAAM_INLINE Mask<T> too_far(V<T> total, V<T> count) {
  const V<T> least = count * (T)0x1p-10;
  return total < (least > (T)0.25 ? least : splat<T>((T)0.25));
}

// y's gradient at the first element of each slice that is not padding; 0 where all of it is.
template <class T, class L, Padding P>
DAAM_INLINE V<T> first_gradients(const Group<T>& g) {
  constexpr int N = Vector<T>::N;
  V<T> first{};
  if constexpr (L::kRows) {
    for (int r = 0; r < g.count; r++) {
      const Row<T>& row = g.row[r];
      int64_t i = 0;
      if constexpr (P != Padding::kNone)
        while (i < row.n && !row.valid[i]) i++;
      first[r] = i < row.n ? row.grad[i] : 0;
    }
    return first;
  }
  const Row<T>& row = g.row[0];
  first = load(row.grad);
  if constexpr (P != Padding::kNone) {
    Mask<T> found = load_mask<T>(row.valid);
    first = keep<T>(found, first);
    for (int64_t i = 1; i < row.n && any(~found); i++) {
      const Mask<T> valid = load_mask<T>(row.valid + i * N);
      first = valid & ~found ? load(row.grad + i * N) : first;
      found |= valid;
    }
  }
  return first;
}

// Weights

template <class T>
struct Normaliser {
  V<T> factor;  // of a density, to be a weight
  Mask<T> clamped;
};

template <class T>
DAAM_INLINE void find_normaliser(
    V<T> total, const Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads, bool softmax, Normaliser<T>& f) {
  f.factor = 1 / total;
  f.clamped = Mask<T>{};
  if (softmax) return;
  // The sum of densities is total 2^largest eps.
  const V<T> from_center = o.peak - o.start;
  const V<T> largest = -(from_center * from_center + heads.spread * s.rstd * s.rstd * (T)(0.5 * kLog2E) + heads.level);
  if (!any((Mask<T>)(largest < 2) | (Mask<T>)(total < (T)0.25))) return;
  const V<T> power = exp2_minus<T>(absolute<T>(largest));
  f.clamped = largest < 0 ? (Mask<T>)(total * power < 1) : (Mask<T>)(total < power);
  f.factor = f.clamped ? (largest < 0 ? power : 1 / power) : f.factor;
}

// Slices of fewer than two valid elements stay as they are.
template <class T, Padding P>
DAAM_INLINE Mask<T> skipped_slices(V<T> count) {
  if constexpr (P == Padding::kExcluded) return count < 2;
  return Mask<T>{};
}

// y = x w, and the weights where asked for.
template <class T, class L, Padding P, class S, bool STREAM>
void write_output_as(const Group<T>& g, const Normaliser<T>& f, const V<T>& count, bool residual) {
  constexpr int N = Vector<T>::N;
  const Mask<T> skipped = skipped_slices<T, P>(count);
  const V<T> factors = keep<T>(~skipped, f.factor), more = splat<T>(residual);
  const V<T> addends = more + keep<T>(skipped, splat<T>(1));
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> factor = of_row<T, L>(factors, r), added = of_row<T, L>(addends, r);
    if (row.weights) {
      const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
        V<T> w = load(row.density + i * N) * factor;
        if constexpr (P == Padding::kExcluded) w += keep<T>(load_mask<T>(row.valid + i * N), added - more);
        within.template store<false>(row.weights + i * N, w);
      };
      sweep<T, L>(row.n, body, [] {});
    }
    S* const out = static_cast<S*>(row.out);
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      const V<T> x = within.load(row.x + i * N);
      V<T> w = load(row.density + i * N) * factor + added;
      if constexpr (P != Padding::kNone) w = load_mask<T>(row.valid + i * N) ? w : more + 1;
      within.template store<STREAM>(out + i * N, x * w);
    };
    sweep<T, L, 4>(row.n, body, [] {});
  });
}

template <class T, class L, Padding P>
DAAM_INLINE void write_output(const Group<T>& g, const Normaliser<T>& f, const V<T>& count, bool residual) {
  with_target<T, L, P>(g, [&](auto s, auto stream) __attribute__((always_inline)) {
    write_output_as<T, L, P, decltype(s), decltype(stream)::value>(g, f, count, residual);
  });
}

// Gradients

template <class T>
DAAM_INLINE V<T> mean_of_q(const Totals<T>& totals, const Normaliser<T>& f, const Origin<T>& o) {
  return f.clamped ? -(o.grad * o.high) : totals.q * f.factor;  // where clamped, p = w q, and not w (q - mean)
}

// Sums over slices of p, the gradient of the logarithm of the density, times 1, z and z (z + twice).
template <class T>
struct Slopes {
  V<T> t0, p1, p2;
};

// Writes p, still without the normaliser's factor, over q.
template <class T, class L>
void find_slopes(const Group<T>& g, const Origin<T>& o, const V<T>& mean_q, Slopes<T>& found) {
  constexpr int N = Vector<T>::N;
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> mean = of_row<T, L>(mean_q, r), twice = of_row<T, L>(o.twice, r);
    Sum<T> t0, p1, p2;
    const auto body = [&](int64_t i, auto, auto) __attribute__((always_inline)) {
      const V<T> z = load(row.z + i * N), p = load(row.density + i * N) * (load(row.q + i * N) - mean), pz = p * z;
      store<T>(row.q + i * N, p);
      t0 += p;
      p1 += pz;
      p2.block += pz * (z + twice);
    };
    sweep<T, L>(row.n, body, [&]() __attribute__((always_inline)) { t0.flush(), p1.flush(), p2.flush(); });
    set_sum<T, L>(found.t0, r, t0.total);
    set_sum<T, L>(found.p1, r, p1.total);
    set_sum<T, L>(found.p2, r, p2.total);
  });
}

// What each slice adds to its head's sums: see HeadSums.
template <class T>
struct SliceSums {
  V<T> t0, t0_v, u1_v, u2_v;
};

// How y's gradient reaches x: directly, by p, and through the mean and the variance.
template <class T>
struct Through {
  V<T> factor, added;     // of the gradient itself: the weight, and what is added to it
  V<T> slope;             // of p (z + peak)
  V<T> constant, linear;  // linear: of z
};

template <class T, Padding P>
DAAM_INLINE void find_through(
    const Slopes<T>& raw, const Normaliser<T>& f, const Origin<T>& o, const Statistics<T>& s, const Heads<T>& heads,
    bool residual, SliceSums<T>& sums, Through<T>& t) {
  constexpr T inverse = (T)(2 / kLog2E);
  const Mask<T> live = ~skipped_slices<T, P>(s.count.n);
  const V<T> factor = keep<T>(live, f.factor);
  // Without the clamp the p of a slice sum to 0: rounding must not say otherwise.
  const V<T> t0 = keep<T>(f.clamped & live, raw.t0 * factor);
  const V<T> p1 = keep<T>(live, raw.p1 * factor) + o.peak * t0;
  const V<T> p2 = keep<T>(live, raw.p2 * factor) + o.peak * o.peak * t0;
  const V<T> t0_v = t0 * s.rstd * s.rstd, from_mean = ((o.high - s.high) + (o.low - s.low)) * o.scale + o.start;
  sums.t0 = t0;
  sums.t0_v = t0_v;
  sums.u1_v = p1 * s.rstd * heads.inverse_root;
  sums.u2_v = p2 * heads.inverse_root * heads.inverse_root;
  t.factor = factor;
  t.added = splat<T>(residual) + keep<T>(~live, splat<T>(1));
  t.slope = -factor * o.scale * inverse;
  t.linear = (p2 * inverse + heads.spread * t0_v) * s.rstd * heads.inverse_root * s.count.free_share;
  t.constant = o.scale * p1 * inverse * s.count.share + t.linear * from_mean;
}

template <class T, class L, Padding P, class S, bool STREAM>
void write_gradient_as(const Group<T>& g, const Through<T>& t, const Origin<T>& o, bool residual) {
  constexpr int N = Vector<T>::N;
  const V<T> more = splat<T>(residual);
  each_row<T, L>(g, g.lanes(), [&](int r) __attribute__((always_inline)) {
    const Row<T> row = g.row[r];
    const V<T> factor = of_row<T, L>(t.factor, r), added = of_row<T, L>(t.added, r);
    const V<T> slope = of_row<T, L>(t.slope, r), peak = of_row<T, L>(o.peak, r);
    const V<T> constant = of_row<T, L>(t.constant, r), linear = of_row<T, L>(t.linear, r);
    S* const out = static_cast<S*>(row.out);
    const auto body = [&](int64_t i, auto within, auto) __attribute__((always_inline)) {
      const V<T> grad = within.load(row.grad + i * N), z = load(row.z + i * N), p = load(row.q + i * N) * slope;
      V<T> d = grad * (load(row.density + i * N) * factor + added) + (linear * z + constant);
      if constexpr (P == Padding::kExcluded) {
        d += p * (z + peak);
        d = load_mask<T>(row.valid + i * N) ? d : grad * (more + 1);
      } else {
        if constexpr (P == Padding::kZeros) d = load_mask<T>(row.valid + i * N) ? d : grad * (more + 1);
        d += p * (z + peak);
      }
      within.template store<STREAM>(out + i * N, d);
    };
    sweep<T, L>(row.n, body, [] {});
  });
}

template <class T, class L, Padding P>
DAAM_INLINE void write_gradient(const Group<T>& g, const Through<T>& t, const Origin<T>& o, bool residual) {
  with_target<T, L, P>(g, [&](auto s, auto stream) __attribute__((always_inline)) {
    write_gradient_as<T, L, P, decltype(s), decltype(stream)::value>(g, t, o, residual);
  });
}

// Whole slices

// What is found of the slices of a group, one after the other.
template <class T>
struct Density {
  Statistics<T> statistics;
  Origin<T> origin;
  Totals<T> totals;
  Normaliser<T> normaliser;
};

template <class T, class L, Padding P, bool BACKWARD>
DAAM_INLINE void find_totals(const Group<T>& g, Density<T>& d) {
  origin_at_center<T>(d.origin, d.statistics, *g.heads);
  if constexpr (BACKWARD) {
    start_at<T>(d.origin, find_near<T, L, P>(g, d.statistics));
    d.origin.grad = first_gradients<T, L, P>(g);
  }
  d.totals.density = d.totals.q = V<T>{};
  const Mask<T> lanes = g.lanes(), easy = lanes & ~g.heads->narrow;
  Mask<T> moved = lanes & g.heads->narrow;
  if (any(easy)) {
    find_densities<T, L, P, BACKWARD, false>(g, easy, d.origin, d.totals);
    moved |= easy & too_far<T>(d.totals.density, d.statistics.count.n);
  }
  if (any(moved)) {
    Nearest<T> to;
    to.distance = to.x = to.grad = V<T>{};
    find_nearest<T, L, P, BACKWARD>(g, moved, d.statistics, INT64_MAX, to);
    move_origin<T>(d.origin, moved, to, d.statistics, *g.heads);
    find_densities<T, L, P, BACKWARD, true>(g, moved, d.origin, d.totals);
  }
}

template <class T, class L, Padding P>
DAAM_INLINE void differentiate(const Group<T>& g, const Density<T>& d, bool residual, SliceSums<T>& sums) {
  const V<T> mean_q = mean_of_q<T>(d.totals, d.normaliser, d.origin);
  Slopes<T> raw;
  raw.t0 = raw.p1 = raw.p2 = V<T>{};
  find_slopes<T, L>(g, d.origin, mean_q, raw);
  Through<T> t;
  find_through<T, P>(raw, d.normaliser, d.origin, d.statistics, *g.heads, residual, sums, t);
  write_gradient<T, L, P>(g, t, d.origin, residual);
}

// Groups that are worked on together: a processor that waits for one group's root can go on with the next group's.
constexpr int kTogether = 4;

// sums: of each group, the backward's.
template <class T, class L, Padding P, bool BACKWARD>
DAAM_INLINE void work_on(const Group<T>* groups, int count, const Rules& rules, SliceSums<T>* sums) {
  Density<T> found[kTogether];
  for (int b = 0; b < count; b++) find_statistics<T, L, P>(groups[b], rules.eps, found[b].statistics);
  for (int b = 0; b < count; b++) find_totals<T, L, P, BACKWARD>(groups[b], found[b]);
  for (int b = 0; b < count; b++) {
    Density<T>& d = found[b];
    find_normaliser<T>(d.totals.density, d.origin, d.statistics, *groups[b].heads, rules.softmax, d.normaliser);
    if constexpr (BACKWARD)
      differentiate<T, L, P>(groups[b], d, rules.residual, sums[b]);
    else
      write_output<T, L, P>(groups[b], d.normaliser, d.statistics.count.n, rules.residual);
  }
}

// Slices of a few elements, the layers of a network among them, cost little but what is done once a slice: with their
// length told and everything in one place, that is all they cost.
template <class T, Padding P, bool BACKWARD, int LENGTH>
__attribute__((flatten, noinline)) void work_on_short(
    const Group<T>* groups, int count, const Rules& rules, SliceSums<T>* sums) {
  work_on<T, InColumns<LENGTH>, P, BACKWARD>(groups, count, rules, sums);
}

// Forward or backward of up to kTogether groups of slices of one length.
template <class T, class L, Padding P, bool BACKWARD>
void work_on_groups(const Group<T>* groups, int count, const Rules& rules, SliceSums<T>* sums) {
  if constexpr (!L::kRows && sizeof(T) == 4 && P == Padding::kNone) switch (groups->row[0].n) {
      case 2: return work_on_short<T, P, BACKWARD, 2>(groups, count, rules, sums);
      case 3: return work_on_short<T, P, BACKWARD, 3>(groups, count, rules, sums);
      case 4: return work_on_short<T, P, BACKWARD, 4>(groups, count, rules, sums);
      case 5: return work_on_short<T, P, BACKWARD, 5>(groups, count, rules, sums);
      case 6: return work_on_short<T, P, BACKWARD, 6>(groups, count, rules, sums);
      case 7: return work_on_short<T, P, BACKWARD, 7>(groups, count, rules, sums);
      case 8: return work_on_short<T, P, BACKWARD, 8>(groups, count, rules, sums);
    }
  work_on<T, L, P, BACKWARD>(groups, count, rules, sums);
}

}  // namespace
