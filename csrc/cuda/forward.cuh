// The forward kernel: reads x once (four times more what shared memory does not hold), writes y, and the weights where
// asked for.
#pragma once

#include "density.cuh"

namespace daam {
namespace cuda {

template <class T, int V, int S, bool PADDED>
__device__ void forward(const Task& task) {
  Block block(task);
  const int64_t head_number = blockIdx.x % task.num_heads;
  Slices<T, V, S, PADDED> slices(task, block, head_number);
  int64_t tile = blockIdx.x / task.num_heads;
  slices.start(tile);
  const Head head = Head::of_block(task, head_number);

  for (; tile < task.tiles; tile += task.blocks) {
    slices.finish();
    const Numbers<S> n = find_numbers(task, slices, block, head);
    float total[S], factor[S];
#pragma unroll
    for (int s = 0; s < S; s++) total[s] = 0;
    slices.sweep([&](const float(&x)[V], unsigned valid, int) {
      const unsigned domain = domain_of<PADDED>(task, valid);
#pragma unroll
      for (int e = 0; e < V; e++) {
        const int s = e % S;
        const float m = density((x[e] - n.x0[s] - n.nearest[s]) * n.rstd[s], n.peak[s], head.a);
        if (!PADDED || has(domain, e)) total[s] += m;
      }
    });
    block.template reduce<Sum>(total);
#pragma unroll
    for (int s = 0; s < S; s++) factor[s] = Scale::of(task, head, n.peak[s], n.rstd[s], total[s]).factor;

    const bool residual = task.flags & DAAM_RESIDUAL;
    slices.sweep([&](const float(&x)[V], unsigned valid, int j) {
      const unsigned domain = domain_of<PADDED>(task, valid);
      float y[V], weights[V];
#pragma unroll
      for (int e = 0; e < V; e++) {
        const int s = e % S;
        float w = density((x[e] - n.x0[s] - n.nearest[s]) * n.rstd[s], n.peak[s], head.a) * factor[s];
        if (PADDED && !has(domain, e)) w = 0;
        if (is_skipped<PADDED>(n.count[s])) w = has(valid, e) ? 1 : 0;
        weights[e] = w;
        y[e] = !PADDED || has(valid, e) ? x[e] * w : x[e];
        if (residual) y[e] += x[e];
      }
      slices.store(task.out, j, y);
      if (task.weights) slices.store(task.weights, j, weights);
    });
    slices.start(tile + task.blocks);
  }
}

}  // namespace cuda
}  // namespace daam
