// The mean and the variance of each slice of a group.
#pragma once

#include "density_group.h"

namespace {

// m.shift is there already. What lies packed as another type S is unpacked on the way.
template <class T, class L, Padding P, class S = T>
void find_moments(const Group<T>& g, const Mask<T>& asked, Moments<T>& m) {
  constexpr int N = Vector<T>::N;
  constexpr bool packed = sizeof(S) != sizeof(T);
  each_row<T, L>(g, asked, [&](int r) __attribute__((always_inline)) {
    const Row<T>& row = g.row[r];
    const V<T> shift = of_row<T, L>(m.shift, r);
    const S* const packed_x = static_cast<const S*>(row.packed_x);
    const S* const packed_grad = static_cast<const S*>(row.packed_grad);
    T *const to_x = const_cast<T*>(row.x), *const to_grad = const_cast<T*>(row.grad);
    Sum<T> first[4], second[4];
    const auto body = [&](int64_t i, auto within, auto slot) __attribute__((always_inline)) {
      V<T> x;
      if constexpr (packed) {
        x = load_at(within, slot, packed_x + i * N);
        store<T>(to_x + i * N, x);
        if (packed_grad) store<T>(to_grad + i * N, load_at(within, slot, packed_grad + i * N));
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
    set_sum<T, L>(m.first, r, first[0].total);
    set_sum<T, L>(m.second, r, second[0].total);
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
    const int64_t some = row.n < most ? row.n : most;
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

// The sum of squares of distances from the mean, which is shift + offset; infinite where that of those from shift is.
template <class T>
DAAM_INLINE V<T> squares_from_mean(const Moments<T>& m, V<T> offset) {
  const V<T> squares = m.second - m.first * offset, positive = squares < 0 ? V<T>{} : squares;
  return positive == positive ? positive : m.second;
}

template <class T>
DAAM_INLINE void finish_deviation(V<T> squares, T eps, Statistics<T>& s) {
  s.var = squares * s.count.free_share + eps;
  s.rstd = 1 / square_root(s.var);
}

// s.count is there already.
template <class T>
DAAM_INLINE void finish_statistics(const Moments<T>& m, double eps, Statistics<T>& s) {
  const V<T> offset = m.first * s.count.share;
  s.high = m.shift + offset;
  const V<T> taken = s.high - m.shift;
  s.low = (m.shift - (s.high - taken)) + (offset - taken);
  finish_deviation<T>(squares_from_mean<T>(m, offset), (T)eps, s);
}

// Slices whose first guess is more than a deviation from the mean: the squares would cancel.
template <class T>
DAAM_INLINE Mask<T> is_far(const Moments<T>& m, const Count<T>& count) {
  return ~(m.first * count.share * m.first <= m.second * (T)0.5);
}

template <class T, class L, Padding P>
DAAM_INLINE void find_statistics(const Group<T>& g, double eps, Statistics<T>& s) {
  count_elements<T, L, P>(g, s.count);
  Moments<T> m;
  if (!L::kRows && P == Padding::kNone && g.moments) {
    m.shift = g.moments->shift;
    m.first = g.moments->first;
    m.second = g.moments->second;
  } else {
    m.shift = guess_means<T, L, P>(g);
    m.first = m.second = V<T>{};
    with_format<T, L, P>(g.in_format, [&](auto s) __attribute__((always_inline)) {
      find_moments<T, L, P, decltype(s)>(g, g.lanes(), m);
    });
  }
  const Mask<T> far = is_far<T>(m, s.count) & g.lanes();
  if (any(far)) {
    m.shift = far ? m.shift + m.first * s.count.share : m.shift;
    find_moments<T, L, P>(g, far, m);
  }
  finish_statistics<T>(m, eps, s);
}

}  // namespace
