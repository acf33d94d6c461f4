// Additive attention: sums over hidden units of tanh(query + key), which are in registers alone.
#pragma once

#include "storage.h"
#include "work.h"

#define DAAM_LAMBDA __attribute__((always_inline))

namespace {

using daam::AdditiveTensors;

constexpr int kKeys = 4;                       // scores of a query that are worked on together
constexpr int64_t kKeyNumbers = 1 << 12;       // of the keys of a task: they stay in the first cache
constexpr int64_t kTaskActivations = 1 << 16;  // what a task should have, if there are so many
constexpr int64_t kMostParts = 8;              // of all batches, where there are no more batches than that
constexpr int64_t kWeightSums = 64;            // of d_weight that are apart: tasks of the backward

constexpr float kWhole = 12582912.0f + 127;  // what is added to it is rounded; with the exponent's bias in the last bits
constexpr float kMostTanh = 20.0f;           // from 9.1 on it is 1

// tanh to about three units in the last place, near 0 too: by e^-2|x| - 1, which keeps its digits there.
DAAM_INLINE V<float> tanh_of(V<float> x) {
  const V<float> a = 2.885390081777927f * minimum(splat<float>(kMostTanh), absolute<float>(x));  // e^-2|x| = 2^-a
  const V<float> t = kWhole - a, r = (kWhole - t) - a;
  // 2^r - 1 over r for |r| <= 1/2, interpolated at Chebyshev's nodes: relative error 1.2e-8.
  V<float> p = splat<float>(1.5453163e-4f);
  p = p * r + 1.3390863e-3f;
  p = p * r + 9.618083e-3f;
  p = p * r + 5.550357e-2f;
  p = p * r + 2.402265e-1f;
  p = p * r + 6.931472e-1f;
  p *= r;
  const V<float> power = (V<float>)((Mask<float>)t << 23);
  const V<float> less = p * power + (power - 1.0f);  // e^-2|x| - 1
  const V<float> result = (0.0f - less) / (2.0f + less);
  return (V<float>)((Mask<float>)result | ((Mask<float>)x & INT32_MIN));
}

// body(c, load) for vector after vector of hidden units, which begin at c; the last one is filled up with zeros.
template <class Body>
DAAM_INLINE void over_hidden(int64_t hidden, const Body& body) {
  constexpr int N = Vector<float>::N;
  int64_t c = 0;
  for (; c + N <= hidden; c += N) body(c, [](const float* at) DAAM_LAMBDA { return load(at); });
  const int64_t rest = hidden - c;
  if (rest) body(c, [rest](const float* at) DAAM_LAMBDA { return load_part<float>(at, rest); });
}

// The scores of one query with KEYS keys.
template <int KEYS>
DAAM_INLINE void score(
    const daam_additive& p, const float* query, const float* key, const float* weight, float* scores) {
  V<float> sums[KEYS] = {};
  over_hidden(p.hidden, [&](int64_t c, auto load_units) DAAM_LAMBDA {
    const V<float> of_query = load_units(query + c), factor = load_units(weight + c);
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; j++) sums[j] += factor * tanh_of(of_query + load_units(key + j * p.key[1] + c));
  });
  for (int j = 0; j < KEYS; j++) scores[j] = (float)p.scale * sum_of_lanes(sums[j]);
}

// Blocks of queries and keys, as tasks: the keys stay in the cache while every query of the block meets them.
struct Grid {
  int64_t queries, keys;  // of a block
  int64_t query_blocks, key_blocks;

  explicit Grid(const daam_additive& p) {
    const int64_t units = most(1, p.hidden);
    keys = least(p.keys, most(kKeys, kKeyNumbers / units));
    queries = least(p.queries, divide_up(kTaskActivations, units * most(1, keys)));
    query_blocks = divide_up(p.queries, most(1, queries)), key_blocks = divide_up(p.keys, most(1, keys));
  }
};

void write_scores(const daam_additive& p, const AdditiveTensors& t, const Grid& grid, int64_t task) {
  const int64_t b = task / (grid.query_blocks * grid.key_blocks);
  const int64_t i0 = task / grid.key_blocks % grid.query_blocks * grid.queries, j0 = task % grid.key_blocks * grid.keys;
  const int64_t queries = least(p.queries, i0 + grid.queries), keys = least(p.keys, j0 + grid.keys);
  for (int64_t i = i0; i < queries; i++) {
    const float* const query = t.query + b * p.query[0] + i * p.query[1];
    const float* const key = t.key + b * p.key[0];
    float* const scores = t.scores + (b * p.queries + i) * p.keys;
    int64_t j = j0;
    for (; j + kKeys <= keys; j += kKeys) score<kKeys>(p, query, key + j * p.key[1], t.weight, scores + j);
    for (; j < keys; j++) score<1>(p, query, key + j * p.key[1], t.weight, scores + j);
  }
}

// The queries of a batch in parts, and parts in tasks. A part has sums of its own for d_key, and a task for d_weight,
// which are added one after the other; what they are does not depend on the threads.
struct Parts {
  int64_t queries, of_batch;  // queries of a part; parts of a batch
  int64_t count, of_task;
  int64_t units, chunks;  // hidden units whose sums are in registers at a time; how often that is

  explicit Parts(const daam_additive& p) {
    constexpr int64_t N = Vector<float>::N;
    const int64_t wanted = divide_up(kMostParts, most(1, p.batch));
    const int64_t worth = p.queries * p.keys * p.hidden / kTaskActivations;
    queries = divide_up(p.queries, most(1, least(wanted, worth)));
    of_batch = divide_up(p.queries, most(1, queries)), count = p.batch * of_batch;
    of_task = divide_up(count, kWeightSums);
    units = p.hidden > N ? 2 * N : N, chunks = divide_up(p.hidden, units);
  }
  int64_t tasks() const { return divide_up(count, most(1, of_task)); }
};

// Up to N numbers, zeros beyond them; and added to memory.
DAAM_INLINE V<float> load_at_most(const float* at, int64_t count) {
  return count >= Vector<float>::N ? load(at) : count > 0 ? load_part<float>(at, count) : V<float>{};
}
DAAM_INLINE void add_at_most(float* at, V<float> v, int64_t count) {
  if (count >= Vector<float>::N)
    store<float>(at, load(at) + v);
  else if (count > 0)
    store_part<float>(at, load_part<float>(at, count) + v, count);
}

// One query and VECTORS vectors of hidden units from c on, of which the keys and their gradients are in scratch memory.
template <int VECTORS>
DAAM_INLINE void add_query(
    const daam_additive& p, const AdditiveTensors& t, int64_t b, int64_t i, int64_t c, const float* keys,
    float* d_keys, double* d_weight) {
  constexpr int N = Vector<float>::N, UNITS = VECTORS * N;
  const float* const from = t.query + b * p.query[0] + i * p.query[1] + c;
  const float* const d_scores = t.d_scores + (b * p.queries + i) * p.keys;
  V<float> query[VECTORS], of_query[VECTORS] = {}, of_weight[VECTORS] = {};
  for (int v = 0; v < VECTORS; v++) query[v] = load_at_most(from + v * N, p.hidden - c - v * N);
  for (int64_t j = 0; j < p.keys; j++) {
    const V<float> d_score = splat(d_scores[j]);
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      const int64_t at = j * UNITS + v * N;
      const V<float> y = tanh_of(query[v] + load(keys + at)), part = d_score * y, slope = d_score - part * y;
      of_weight[v] += part;
      of_query[v] += slope;
      store<float>(d_keys + at, load(d_keys + at) + slope);
    }
  }
  float* const d_query = t.d_query + b * p.d_query[0] + i * p.d_query[1] + c;
  for (int v = 0; v < VECTORS; v++) {
    const int64_t at = c + v * N, rest = p.hidden - at;
    add_at_most(d_query + v * N, of_query[v] * load_at_most(t.weight + at, rest), rest);
    for (int64_t lane = 0; lane < least(N, rest); lane++) d_weight[at + lane] += of_weight[v][lane];
  }
}

// Part after part of a task. d_keys: a part's sums, [keys, hidden], where a batch has several; d_weight: the task's.
bool add_parts(
    const daam_additive& p, const AdditiveTensors& t, const Parts& parts, int64_t task, float* d_keys,
    double* d_weight) {
  constexpr int N = Vector<float>::N;
  const int64_t numbers = parts.chunks * p.keys * parts.units;
  float* const keys = static_cast<float*>(daam::thread_scratch(2 * numbers * sizeof(float)));
  if (!keys) return false;
  float* const key_sums = keys + numbers;
  const auto place = [&](int64_t j, int64_t c) { return (c / parts.units * p.keys + j) * parts.units + c % parts.units; };
  const int64_t end = least(parts.count, (task + 1) * parts.of_task);
  for (int64_t part = task * parts.of_task; part < end; part++) {
    const int64_t b = part / parts.of_batch, first = part % parts.of_batch * parts.queries;
    memset(keys, 0, 2 * numbers * sizeof(float));
    for (int64_t j = 0; j < p.keys; j++) {
      const float* const key = t.key + b * p.key[0] + j * p.key[1];
      for (int64_t c = 0; c < p.hidden; c += N) store<float>(keys + place(j, c), load_at_most(key + c, p.hidden - c));
    }
    for (int64_t chunk = 0; chunk < parts.chunks; chunk++)
      for (int64_t i = first; i < least(p.queries, first + parts.queries); i++) {
        const int64_t c = chunk * parts.units, at = c * p.keys;
        parts.units > N ? add_query<2>(p, t, b, i, c, keys + at, key_sums + at, d_weight)
                        : add_query<1>(p, t, b, i, c, keys + at, key_sums + at, d_weight);
      }
    for (int64_t j = 0; j < p.keys; j++) {
      float* const d_key =
          d_keys ? d_keys + (part * p.keys + j) * p.hidden : t.d_key + b * p.d_key[0] + j * p.d_key[1];
      for (int64_t c = 0; c < p.hidden; c += N) {
        const int64_t rest = p.hidden - c;
        add_at_most(d_key + c, load(key_sums + place(j, c)) * load_at_most(t.weight + c, rest), rest);
      }
    }
  }
  return true;
}

int add_gradients(const daam_additive& p, const AdditiveTensors& t, daam_parallel_for parallel_for) {
  const Parts parts(p);
  const int64_t key_numbers = parts.of_batch > 1 ? parts.count * p.keys * p.hidden : 0;
  const int64_t weight_numbers = parts.tasks() * p.hidden;
  const Memory memory(weight_numbers * sizeof(double) + key_numbers * sizeof(float));
  if (!memory.at) return DAAM_OUT_OF_MEMORY;
  memset(memory.at, 0, weight_numbers * sizeof(double) + key_numbers * sizeof(float));
  double* const d_weights = static_cast<double*>(memory.at);
  float* const d_keys = key_numbers ? reinterpret_cast<float*>(d_weights + weight_numbers) : nullptr;
  int status = DAAM_OK;
  auto work = [&](int64_t task) {
    if (!add_parts(p, t, parts, task, d_keys, d_weights + task * p.hidden))
      __atomic_store_n(&status, (int)DAAM_OUT_OF_MEMORY, __ATOMIC_RELAXED);
  };
  run_parallel(parallel_for, parts.tasks(), work);
  if (status != DAAM_OK) return status;
  auto join = [&](int64_t row) {  // a key of a batch
    const int64_t b = row / p.keys, j = row % p.keys;
    for (int64_t part = b * parts.of_batch; part < (b + 1) * parts.of_batch; part++)
      for (int64_t c = 0; c < p.hidden; c += Vector<float>::N) {
        const int64_t rest = p.hidden - c;
        const V<float> sums = load_at_most(d_keys + (part * p.keys + j) * p.hidden + c, rest);
        add_at_most(t.d_key + b * p.d_key[0] + j * p.d_key[1] + c, sums, rest);
      }
  };
  if (d_keys) run_parallel(parallel_for, p.batch * p.keys, join);
  for (int64_t task = 1; task < parts.tasks(); task++)
    for (int64_t c = 0; c < p.hidden; c++) d_weights[c] += d_weights[task * p.hidden + c];
  for (int64_t c = 0; c < p.hidden && weight_numbers; c++) t.d_weight[c] += (float)d_weights[c];
  return DAAM_OK;
}

int run_additive(const daam_additive& p, const AdditiveTensors& t, daam_parallel_for parallel_for) {
  if (p.batch * p.queries * p.keys * p.hidden < kTaskActivations) parallel_for = nullptr;
  if (t.d_scores) return add_gradients(p, t, parallel_for);
  const Grid grid(p);
  auto block = [&](int64_t task) { write_scores(p, t, grid, task); };
  run_parallel(parallel_for, p.batch * grid.query_blocks * grid.key_blocks, block);
  return DAAM_OK;
}

}  // namespace
