// Density attention from C++, without Python: forward and backward of a small problem on the CPU, checked against the
// formula written out in double and against its finite differences.
//
// From the repository's root, with the library's sources:
//   g++ -O2 -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=fast -pthread -I csrc
//       csrc/example/density_attention.cpp csrc/cpu/*.cpp csrc/cuda/*.cpp -ldl -o density_attention && ./density_attention
// or with the library that pip built, LIBRARY being the file that `python -m daam_kernels.env` names:
//   g++ -O2 -std=c++17 -pthread -I csrc csrc/example/density_attention.cpp LIBRARY -o density_attention

#include "daam_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

namespace {

// x is [outer, length, inner], as in [batch, time, features] weighed along time; 103 = 34 + 34 + 35. Large enough to be
// worth threads.
constexpr int64_t kOuter = 8, kLength = 103, kInner = 48, kHeads = 3, kGaussians = 2;
constexpr int64_t kSize = kOuter * kLength * kInner, kParameters = kHeads * kGaussians;
constexpr double kEps = 1e-8;

// Any function of this signature will do, torch_parallel_for for one. This one starts its threads anew each time.
int32_t parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*), void* context) {
  const int64_t wanted = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t share = std::max({(end - begin + wanted - 1) / wanted, grain, int64_t{1}});
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    threads.emplace_back(work, first, std::min(first + share, end), context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// sum of g y, y being x times its weights: the formula as it stands in the paper, one Gaussian after the other.
double loss(const std::vector<double>& x, const std::vector<double>& offsets, const std::vector<double>& c,
            const std::vector<float>& g, std::vector<double>* y = nullptr) {
  double result = 0;
  for (int64_t slice = 0; slice < kOuter * kHeads * kInner; slice++) {
    const int64_t inner = slice % kInner, head = slice / kInner % kHeads, outer = slice / kInner / kHeads;
    const int64_t chunk = kLength / kHeads, first = head * chunk, last = head == kHeads - 1 ? kLength : first + chunk;
    const auto at = [&](int64_t row) { return (outer * kLength + row) * kInner + inner; };
    double mean = 0, var = 0, total = 0;
    for (int64_t row = first; row < last; row++) mean += x[at(row)] / (last - first);
    for (int64_t row = first; row < last; row++) var += std::pow(x[at(row)] - mean, 2) / (last - first - 1);
    var += kEps;
    std::vector<double> density(kLength, 1);
    for (int64_t row = first; row < last; row++) {
      for (int64_t k = head * kGaussians; k < (head + 1) * kGaussians; k++) {
        const double distance = x[at(row)] - mean - offsets[k];
        density[row] *= std::exp(-distance * distance / (2 * var * c[k] * c[k])) / std::sqrt(2 * M_PI * c[k] * c[k]);
      }
      total += density[row];
    }
    for (int64_t row = first; row < last; row++) {
      const double value = x[at(row)] * density[row] / std::max(total, kEps);
      if (y) (*y)[at(row)] = value;
      result += g[at(row)] * value;
    }
  }
  return result;
}

// The gradient of f with respect to every stride-th number of v.
std::vector<double> differences(std::vector<double>& v, size_t stride, const std::function<double()>& f) {
  std::vector<double> gradient;
  for (size_t i = 0; i < v.size(); i += stride) {
    const double kept = v[i], step = 1e-4;
    v[i] = kept + step;
    const double above = f();
    v[i] = kept - step;
    gradient.push_back((above - f()) / (2 * step));
    v[i] = kept;
  }
  return gradient;
}

// Whether every stride-th number of got is what is expected.
bool close(const char* what, const std::vector<float>& got, size_t stride, const std::vector<double>& expected,
           double tolerance) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    error += std::pow(got[i * stride] - expected[i], 2);
    norm += std::pow(expected[i], 2);
  }
  error = std::sqrt(error / norm);
  const bool right = error <= tolerance;  // false for NaN
  std::printf("%-14s relative error %.1e, allowed %.0e: %s\n", what, error, tolerance, right ? "right" : "WRONG");
  return right;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t count, float scale, float shift) {
    std::vector<float> numbers(count);
    for (float& number : numbers) number = scale * normal(random) + shift;
    return numbers;
  };
  const std::vector<float> x = draw(kSize, 1, 3), g = draw(kSize, 1, 0);
  const std::vector<float> offsets = draw(kParameters, 0.1f, 0), c = draw(kParameters, 0.2f, 1.5f);

  daam_density problem{};
  problem.outer = kOuter, problem.length = kLength, problem.inner = kInner;
  problem.num_heads = kHeads, problem.num_gaussians = kGaussians;
  problem.x = problem.out = problem.grad = {kLength * kInner, kInner, 1};
  problem.offsets_strides[0] = problem.widths_strides[0] = kGaussians;
  problem.offsets_strides[1] = problem.widths_strides[1] = 1;
  problem.eps = kEps;
  problem.type = problem.offsets_type = problem.widths_type = DAAM_FLOAT32;

  struct Results {
    std::vector<float> y, dx, d_offsets, d_c;
  };
  const auto run = [&](daam_parallel_for threads, Results& r) {
    r = {draw(kSize, NAN, 0), draw(kSize, NAN, 0), draw(kParameters, NAN, 0), draw(kParameters, NAN, 0)};
    int status = daam_density_forward(
        &problem, x.data(), offsets.data(), c.data(), nullptr, r.y.data(), nullptr, threads);
    if (status != DAAM_OK) return status;
    return daam_density_backward(
        &problem, g.data(), x.data(), offsets.data(), c.data(), nullptr, r.dx.data(), r.d_offsets.data(), r.d_c.data(),
        threads);
  };

  std::printf("interface %d, instruction set %s of %s\n", daam_abi_version(), daam_instruction_set(),
              daam_instruction_sets());
  Results threaded, serial;
  for (const int status : {run(parallel_for, threaded), run(nullptr, serial)}) {
    if (status != DAAM_OK) return std::printf("the library returned status %d\n", status), 1;
  }

  std::vector<double> x_d(x.begin(), x.end()), offsets_d(offsets.begin(), offsets.end()), c_d(c.begin(), c.end());
  std::vector<double> y(kSize);
  const auto f = [&] { return loss(x_d, offsets_d, c_d, g); };
  loss(x_d, offsets_d, c_d, g, &y);
  constexpr size_t kStride = 499;  // differences for all of dx would take minutes
  bool right = close("y", threaded.y, 1, y, 2e-6);
  right &= close("dx", threaded.dx, kStride, differences(x_d, kStride, f), 1e-5);
  right &= close("d_mean_offsets", threaded.d_offsets, 1, differences(offsets_d, 1, f), 1e-4);
  right &= close("d_c", threaded.d_c, 1, differences(c_d, 1, f), 1e-4);

  // A single Gaussian is a mixture too, of itself; without the clamp its height does not matter.
  problem.num_gaussians = 1;
  problem.flags = DAAM_SOFTMAX;
  const std::vector<double> log_shares(kHeads, std::log(0.3));
  std::vector<float> product(kSize), mixture(kSize);
  int status = daam_density_forward(
      &problem, x.data(), offsets.data(), c.data(), nullptr, product.data(), nullptr, parallel_for);
  if (status == DAAM_OK)
    status = daam_mixture_forward(
        &problem, x.data(), offsets.data(), c.data(), log_shares.data(), nullptr, mixture.data(), nullptr,
        parallel_for);
  if (status != DAAM_OK) return std::printf("the library returned status %d\n", status), 1;
  right &= close("mixture of one", mixture, 1, {product.begin(), product.end()}, 1e-6);

  const bool same = threaded.y == serial.y && threaded.dx == serial.dx && threaded.d_offsets == serial.d_offsets &&
                    threaded.d_c == serial.d_c;
  std::printf("threads and no threads: %s\n", same ? "the same numbers" : "DIFFERENT NUMBERS");
  return right && same ? 0 : 1;
}
