// The backward kernel: reads x and the incoming gradient once (what shared memory does not hold, x five and the gradient
// three times), writes dx, and four sums per block.
//
// With q the gradient of the weights w, D = sum w q (0 where the clamp is active) and p = w (q - D), everything follows
// from T0 = sum p, U1 = sum p z and U2 = sum p z^2. So that nothing large cancels, q is taken relative to a constant,
//   q = (g - g0) x' + g (x - x'),   x' the x of the largest density, g0 the weighted mean of g,
// which is g x - g0 x', and the sums are those of powers of gap = z - peak.
#pragma once

#include "density.cuh"

namespace daam {
namespace cuda {

// Everything about a slice that its dx needs.
template <int S>
struct Gradients {
  float factor[S], g0[S], q_mean[S], t0[S], u1[S], u2[S];
  bool clamped[S];
};

template <class T, int V, int S, bool PADDED>
__device__ Gradients<S> find_gradients(
    const Task& task, const Slices<T, V, S, PADDED>& slices, Block& block, const Head& head, const Numbers<S>& n) {
  Gradients<S> r;
  float s0[S], g_sum[S];  // sums of densities, and of those times g
#pragma unroll
  for (int s = 0; s < S; s++) s0[s] = g_sum[s] = 0;
  slices.sweep_with_grad([&](const float(&x)[V], const float(&g)[V], unsigned valid, int) {
    const unsigned domain = domain_of<PADDED>(task, valid);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const int s = e % S;
      const float m = density((x[e] - n.x0[s] - n.nearest[s]) * n.rstd[s], n.peak[s], head.a);
      if (!PADDED || has(domain, e)) s0[s] += m;
      if (!PADDED || has(valid, e)) g_sum[s] += m * g[e];
    }
  });
  block.template reduce<Sum>(s0);
  block.template reduce<Sum>(g_sum);

  float q0[S], q1[S], q2[S], s1[S], s2[S];  // sums of m q gap^k and of m gap^k
#pragma unroll
  for (int s = 0; s < S; s++) {
    r.g0[s] = g_sum[s] / s0[s];
    q0[s] = q1[s] = q2[s] = s1[s] = s2[s] = 0;
  }
  slices.sweep_with_grad([&](const float(&x)[V], const float(&g)[V], unsigned valid, int) {
    const unsigned domain = domain_of<PADDED>(task, valid);
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (PADDED && !has(domain, e)) continue;
      const int s = e % S;
      const float apart = x[e] - n.x0[s] - n.nearest[s], gap = apart * n.rstd[s];
      const float g_valid = !PADDED || has(valid, e) ? g[e] : 0;
      const float q = (g_valid - r.g0[s]) * (n.x0[s] + n.nearest[s]) + g_valid * apart;
      const float m = density(gap, n.peak[s], head.a), m1 = m * gap, m2 = m1 * gap;
      s1[s] += m1;
      s2[s] += m2;
      q0[s] += m * q;
      q1[s] += m1 * q;
      q2[s] += m2 * q;
    }
  });
  block.template reduce<Sum>(q0);
  block.template reduce<Sum>(q1);
  block.template reduce<Sum>(q2);
  block.template reduce<Sum>(s1);
  block.template reduce<Sum>(s2);

#pragma unroll
  for (int s = 0; s < S; s++) {
    const Scale scale = Scale::of(task, head, n.peak[s], n.rstd[s], s0[s]);
    const float peak = n.peak[s], offset = r.g0[s] * (n.x0[s] + n.nearest[s]);  // g x - q
    r.factor[s] = scale.factor;
    r.clamped[s] = scale.clamped;
    r.q_mean[s] = q0[s] / s0[s];
    const float taken = scale.clamped ? -offset : r.q_mean[s];  // off q, to have p
    r.t0[s] = scale.clamped ? (q0[s] - taken * s0[s]) * scale.factor : 0;
    float u1 = (q1[s] - taken * s1[s]) * scale.factor, u2 = (q2[s] - taken * s2[s]) * scale.factor;
    if (is_skipped<PADDED>(n.count[s])) r.t0[s] = u1 = u2 = 0;
    r.u1[s] = u1 + peak * r.t0[s];
    r.u2[s] = u2 + peak * (2 * u1 + peak * r.t0[s]);
  }
  return r;
}

template <class T, int V, int S, bool PADDED>
__device__ void write_dx(
    const Task& task, const Slices<T, V, S, PADDED>& slices, const Head& head, const Numbers<S>& n,
    const Gradients<S>& r) {
  float through_var[S], mean_pz[S];
#pragma unroll
  for (int s = 0; s < S; s++) {
    const float members = fmaxf(n.count[s], 2), rstd = n.rstd[s];
    through_var[s] = (head.a * r.u2[s] + head.spread * rstd * rstd * r.t0[s]) * rstd / (members - 1);
    mean_pz[s] = r.u1[s] / members;
  }
  const bool residual = task.flags & DAAM_RESIDUAL;
  slices.sweep_with_grad([&](const float(&x)[V], const float(&g)[V], unsigned valid, int j) {
    const unsigned domain = domain_of<PADDED>(task, valid);
    float dx[V];
#pragma unroll
    for (int e = 0; e < V; e++) {
      const int s = e % S;
      const bool is_valid = !PADDED || has(valid, e), skipped = is_skipped<PADDED>(n.count[s]);
      const float shifted = x[e] - n.x0[s], apart = shifted - n.nearest[s], gap = apart * n.rstd[s];
      const float g_valid = is_valid ? g[e] : 0;
      float w = density(gap, n.peak[s], head.a) * r.factor[s];
      float q = (g_valid - r.g0[s]) * (n.x0[s] + n.nearest[s]) + g_valid * apart - r.q_mean[s];
      if (r.clamped[s]) q = g_valid * x[e];
      float p = w * q;
      if (PADDED && (skipped || !has(domain, e))) p = 0;
      if (skipped) w = 1;
      // Through z and the slice's mean: -p z and its mean, which nearly cancel where most of a slice is one value.
      float pz = p * (gap + n.peak[s]) - mean_pz[s];
      dx[e] = g[e] * w + through_var[s] * ((shifted - n.mean[s]) * n.rstd[s]);
      if (!is_valid) {
        dx[e] = g[e];
        pz += mean_pz[s];
        if (!has(domain, e)) pz = 0;
      }
      dx[e] -= pz * (head.a * n.rstd[s]);
      if (residual) dx[e] += g[e];
    }
    slices.store(task.out, j, dx);
  });
}

template <class T, int V, int S, bool PADDED>
__device__ void backward(const Task& task) {
  Block block(task);
  const int64_t head_number = blockIdx.x % task.num_heads, block_number = blockIdx.x / task.num_heads;
  Slices<T, V, S, PADDED> slices(task, block, head_number);
  slices.start(block_number);
  const Head head = Head::of_block(task, head_number);

  float t0 = 0, t0_v = 0, u1_v = 0, u2_v = 0;  // HeadSums of the slices that this thread is the first of
  for (int64_t tile = block_number; tile < task.tiles; tile += task.blocks) {
    slices.finish();
    const Numbers<S> n = find_numbers(task, slices, block, head);
    const Gradients<S> r = find_gradients(task, slices, block, head, n);
    write_dx(task, slices, head, n, r);
    if (slices.inside && block.along == 0) {
#pragma unroll
      for (int s = 0; s < S; s++) {
        t0 += r.t0[s];
        t0_v += r.t0[s] * n.rstd[s] * n.rstd[s];
        u1_v += r.u1[s] * n.rstd[s];
        u2_v += r.u2[s];
      }
    }
    slices.start(tile + task.blocks);
  }
  float* partials = task.partials + head_number * 4 * task.blocks + block_number;
  t0 = block.reduce_all<Sum>(t0);
  t0_v = block.reduce_all<Sum>(t0_v);
  u1_v = block.reduce_all<Sum>(u1_v);
  u2_v = block.reduce_all<Sum>(u2_v);
  if (threadIdx.x == 0) {
    partials[0] = t0;
    partials[task.blocks] = t0_v;
    partials[2 * task.blocks] = u1_v;
    partials[3 * task.blocks] = u2_v;
  }
}

}  // namespace cuda
}  // namespace daam
