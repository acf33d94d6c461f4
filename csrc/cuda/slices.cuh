// The slices that a thread works on, and sweeps over its share of their elements.
//
// A thread takes packs along, along + num_along, ... of a group of S slices: of one slice, V elements at a time (S = 1),
// or of V neighbouring slices, one element each (S = V). What fits is copied to shared memory once, the rest is read
// again by each sweep. A thread reads only what it copied itself, so that takes no barriers.
#pragma once

#include "block.cuh"

namespace daam {
namespace cuda {

template <class T, int V, int S, bool PADDED>
class Slices {
 public:
  using PackT = Pack<T, V>;

  bool inside;   // whether there are slices for this thread in this tile; if not, all sweeps are empty
  float length;  // elements of a slice

  __device__ Slices(const Task& task, const Block& block, int64_t head) : task_(task), block_(block), head_(head) {
    start_ = head * task.chunk;
    const int64_t elements = head == task.num_heads - 1 ? task.length - start_ : task.chunk;
    packs_ = elements / kAlong;
    length = float(elements);
    const bool backward = task.grad != nullptr;
    char* after_scratch = after_head() + task.scratch_bytes;
    x_held_ = reinterpret_cast<PackT*>(after_scratch);
    grad_held_ = x_held_ + (backward ? task.held * blockDim.x : 0);
    marks_held_ = reinterpret_cast<uint8_t*>(grad_held_ + task.held * blockDim.x);
  }

  // Moves to a tile of the head and starts to copy what shared memory holds of it.
  __device__ void start(int64_t tile) {
    const int64_t groups = task_.inner / S;
    const int64_t number = (tile << task_.grid.across_log) + block_.across;
    const int64_t o = number / groups, i = number % groups * S;
    inside = tile < task_.tiles && o < task_.outer;
    count_ = inside ? int((packs_ - block_.along + block_.num_along - 1) >> task_.grid.along_log) : 0;
    held_ = count_ < task_.held ? count_ : task_.held;
    x_ = offset_of(o, i, task_.x_strides);
    grad_ = offset_of(o, i, task_.grad_strides);
    out_ = offset_of(o, i, task_.out_strides);
    mask_ = offset_of(o, i, task_.mask_strides);
    const bool backward = task_.grad != nullptr;
#pragma unroll(V == 1 ? 4 : 1)
    for (int j = 0; j < held_; j++) {
      copy(x_held_ + slot(j), x_pack(j));
      if (backward) copy(grad_held_ + slot(j), grad_pack(j));
    }
  }

  // Waits for the copies; finds out which elements are not padding.
  __device__ void finish() {
    wait_for_copies();
    if constexpr (PADDED) {
#pragma unroll 1
      for (int j = 0; j < held_; j++) {
        float x[V];
        x_held_[slot(j)].widen(x);
        marks_held_[slot(j)] = uint8_t(find_valid(x, j));
      }
    }
  }

  // visit(x, valid, j): the elements of a pack, its bits of validity, and its number among this thread's.
  template <class Visit>
  __device__ void sweep(Visit visit) const {
#pragma unroll 1
    for (int j = 0; j < count_; j++) {
      float x[V];
      (j < held_ ? x_held_[slot(j)] : fetch(x_pack(j))).widen(x);
      visit(x, valid(x, j), j);
    }
  }

  // The same with the incoming gradient: visit(x, g, valid, j).
  template <class Visit>
  __device__ void sweep_with_grad(Visit visit) const {
#pragma unroll 1
    for (int j = 0; j < count_; j++) {
      float x[V], g[V];
      (j < held_ ? x_held_[slot(j)] : fetch(x_pack(j))).widen(x);
      (j < held_ ? grad_held_[slot(j)] : fetch(grad_pack(j))).widen(g);
      visit(x, g, valid(x, j), j);
    }
  }

  // The first element of each slice; 0 for slices outside.
  __device__ void first_elements(float (&x)[S]) const {
    const T* first = static_cast<const T*>(task_.x) + x_;
#pragma unroll
    for (int s = 0; s < S; s++) x[s] = inside ? T::widen(first[s]) : 0;
  }

  __device__ void store(void* out, int j, const float (&values)[V]) const {
    *reinterpret_cast<PackT*>(static_cast<T*>(out) + out_ + step(j, task_.out_strides)) = PackT::round(values);
  }

 private:
  static constexpr int kAlong = V / S;  // elements of one slice in a pack

  __device__ int64_t offset_of(int64_t o, int64_t i, const daam_strides& s) const {
    return o * s.outer + start_ * s.row + i * s.inner;
  }

  // From the first element of the slices to pack j of this thread.
  __device__ int64_t step(int j, const daam_strides& s) const { return row(j) * s.row; }

  __device__ int64_t row(int j) const { return (int64_t(j) * block_.num_along + block_.along) * kAlong; }

  __device__ int slot(int j) const { return j * blockDim.x + threadIdx.x; }

  __device__ const PackT* x_pack(int j) const {
    return reinterpret_cast<const PackT*>(static_cast<const T*>(task_.x) + x_ + step(j, task_.x_strides));
  }

  __device__ const PackT* grad_pack(int j) const {
    return reinterpret_cast<const PackT*>(static_cast<const T*>(task_.grad) + grad_ + step(j, task_.grad_strides));
  }

  __device__ unsigned valid(const float (&x)[V], int j) const {
    if constexpr (!PADDED) return ~0u;
    return j < held_ ? marks_held_[slot(j)] : find_valid(x, j);
  }

  __device__ unsigned find_valid(const float (&x)[V], int j) const {
    unsigned valid = ~0u;
    if (task_.flags & DAAM_HAS_PADDING_VALUE) {
#pragma unroll
      for (int e = 0; e < V; e++) {
        if (x[e] == task_.padding_value) valid &= ~(1u << e);
      }
    }
    if (task_.flags & DAAM_HAS_MASK) {
      const uint8_t* mask = task_.mask + mask_ + row(j) * task_.mask_strides.row;
      const int64_t stride = S == 1 ? task_.mask_strides.row : task_.mask_strides.inner;
#pragma unroll
      for (int e = 0; e < V; e++) {
        if (!mask[e * stride]) valid &= ~(1u << e);
      }
    }
    return valid;
  }

  const Task& task_;
  const Block& block_;
  int64_t head_, start_, packs_;
  PackT *x_held_, *grad_held_;
  uint8_t* marks_held_;
  int64_t x_, grad_, out_, mask_;  // offsets of the slices' first elements
  int count_, held_;              // packs of this thread, and those of them that shared memory holds
};

}  // namespace cuda
}  // namespace daam
