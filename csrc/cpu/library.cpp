// The CPU's part of the C interface: checks, and the choice of an instruction set.
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#include "internal.h"

namespace daam {

namespace {

struct InstructionSet {
  const char* name;
  Kernel density;
  AdditiveKernel additive;
};

#if defined(__x86_64__) || defined(_M_X64)
const char kGeneric[] = "sse2";
bool have_f16c() {  // not every compiler's __builtin_cpu_supports knows it
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool have_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && have_f16c(); }
bool have_avx512() {
#ifdef DAAM_EMULATE_AVX512
  return have_avx2();
#else
  return have_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}
#elif defined(__aarch64__)
const char kGeneric[] = "neon";
#else
const char kGeneric[] = "generic";
#endif

struct Choice {
  InstructionSet sets[3];
  int count = 0, chosen = 0;
  char names[64] = "";

  Choice() {
#if defined(__x86_64__) || defined(_M_X64)
    if (have_avx512()) sets[count++] = {"avx512", density_avx512, additive_avx512};
    if (have_avx2()) sets[count++] = {"avx2", density_avx2, additive_avx2};
#endif
    sets[count++] = {kGeneric, density_generic, additive_generic};
    const char* const asked = getenv("DAAM_KERNELS_INSTRUCTION_SET");
    for (int i = 0; i < count; i++) {
      if (i) strcat(names, " ");
      strcat(names, sets[i].name);
      if (asked && !strcmp(asked, sets[i].name)) chosen = i;
    }
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

// Memory of one thread.
struct ThreadScratch {
  void* at = nullptr;
  size_t bytes = 0;
  ~ThreadScratch() { free(at); }
};

bool served(const daam_density& p) {
  const auto known = [](int type) { return type >= DAAM_FLOAT32 && type <= DAAM_FLOAT16; };
  return known(p.type) && known(p.offsets_type) && known(p.widths_type) && p.outer >= 0 && p.inner >= 0 &&
         p.num_gaussians >= 1 && p.num_heads >= 1 && p.length / p.num_heads >= 2;
}

int run(const daam_density* problem, Tensors tensors, daam_parallel_for parallel_for) {
  if (!problem || !served(*problem) || !tensors.mean_offsets || !tensors.c) return DAAM_BAD_ARGUMENT;
  if (!(problem->flags & DAAM_HAS_MASK)) tensors.mask = nullptr;
  return choice().sets[choice().chosen].density(*problem, tensors, parallel_for);
}

int run_additive(const daam_additive* problem, const AdditiveTensors& tensors, daam_parallel_for parallel_for) {
  if (!problem || problem->batch < 0 || problem->queries < 0 || problem->keys < 0 || problem->hidden < 0)
    return DAAM_BAD_ARGUMENT;
  return choice().sets[choice().chosen].additive(*problem, tensors, parallel_for);
}

}  // namespace

void* thread_scratch(size_t bytes) {
  static thread_local ThreadScratch scratch;
  if (bytes > scratch.bytes) {
    free(scratch.at);
    const size_t whole = (bytes + 63) / 64 * 64;
    scratch.at = aligned_alloc(64, whole);
    scratch.bytes = scratch.at ? whole : 0;
  }
  return scratch.at;
}

void advise_huge_pages(void* start, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const size_t page = 2 << 20;
  const size_t begin = ((size_t)start + page - 1) / page * page, end = ((size_t)start + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace daam

extern "C" {

int daam_abi_version(void) { return DAAM_ABI_VERSION; }

const char* daam_instruction_set(void) { return daam::choice().sets[daam::choice().chosen].name; }

const char* daam_instruction_sets(void) { return daam::choice().names; }

int daam_density_forward(
    const daam_density* problem, const void* x, const void* mean_offsets, const void* c, const uint8_t* mask, void* y,
    void* weights, daam_parallel_for parallel_for) {
  return daam::run(problem, {x, nullptr, mean_offsets, c, mask, y, weights}, parallel_for);
}

int daam_density_backward(
    const daam_density* problem, const void* grad, const void* x, const void* mean_offsets, const void* c,
    const uint8_t* mask, void* dx, void* d_mean_offsets, void* d_c, daam_parallel_for parallel_for) {
  return daam::run(problem, {x, grad, mean_offsets, c, mask, dx, nullptr, d_mean_offsets, d_c}, parallel_for);
}

int daam_mixture_forward(
    const daam_density* problem, const void* x, const void* mean_offsets, const void* c, const double* log_shares,
    const uint8_t* mask, void* y, void* weights, daam_parallel_for parallel_for) {
  if (!log_shares) return DAAM_BAD_ARGUMENT;
  const daam::Tensors tensors = {x, nullptr, mean_offsets, c, mask, y, weights, nullptr, nullptr, log_shares};
  return daam::run(problem, tensors, parallel_for);
}

int daam_mixture_backward(
    const daam_density* problem, const void* grad, const void* x, const void* mean_offsets, const void* c,
    const double* log_shares, const uint8_t* mask, void* dx, void* d_mean_offsets, void* d_c, double* d_log_shares,
    daam_parallel_for parallel_for) {
  if (!log_shares) return DAAM_BAD_ARGUMENT;
  const daam::Tensors tensors = {x, grad, mean_offsets, c, mask, dx, nullptr, d_mean_offsets, d_c, log_shares,
                                 d_log_shares};
  return daam::run(problem, tensors, parallel_for);
}

int daam_additive_scores(
    const daam_additive* problem, const float* query, const float* key, const float* weight, float* scores,
    daam_parallel_for parallel_for) {
  return daam::run_additive(problem, {query, key, weight, nullptr, scores, nullptr, nullptr, nullptr}, parallel_for);
}

int daam_additive_gradients(
    const daam_additive* problem, const float* d_scores, const float* query, const float* key, const float* weight,
    float* d_query, float* d_key, float* d_weight, daam_parallel_for parallel_for) {
  return daam::run_additive(problem, {query, key, weight, d_scores, nullptr, d_query, d_key, d_weight}, parallel_for);
}
}
