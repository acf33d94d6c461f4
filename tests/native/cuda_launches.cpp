// Checks the launches that plan() of csrc/cuda/launch.h makes, over thousands of problems: tests/native/test_cuda.py
// compiles and runs this program.
#include <stdio.h>

#include "../../csrc/cuda/launch.h"

using namespace daam::cuda;

static char message[512];

static bool check(const daam_density& p, bool backward, bool aligned, int64_t shared_bytes) {
  static char memory[64] __attribute__((aligned(16)));
  char* data = memory + (aligned ? 0 : 4);
  Tensors t = {};
  t.x = t.mean_offsets = t.c = data;
  t.out = t.workspace = data;
  t.grad = data;
  t.backward = backward;
  const Launch l = plan(p, t, shared_bytes);
  const Task& k = l.task;
  char name[64];
  kernel_name(l.kernel, name, sizeof(name));

  const int64_t pack = 16 / (p.type == DAAM_FLOAT32 ? 4 : 2);
  const int variant = l.kernel % 5;
  const bool rows = variant < 2, columns = variant == 2 || variant == 3, along = k.grid.along_shift == 0;
  const int64_t slices = p.outer * p.inner / (columns ? pack : 1);
  const int64_t longest = p.length - (p.num_heads - 1) * (p.length / p.num_heads);
  const int64_t packs = longest / (rows ? pack : 1), across = int64_t(1) << k.grid.across_log;
  const int64_t shares = (packs + (int64_t(1) << k.grid.along_log) - 1) >> k.grid.along_log;
  const int64_t pack_bytes = variant == 4 ? 16 / pack : 16;
  const char* wrong = NULL;
  if (l.threads != 1u << (k.grid.along_log + k.grid.across_log)) wrong = "the grid is not the block";
  if (l.threads < 32 || l.threads > (columns ? 256u : 512u)) wrong = "threads";
  if (k.grid.across_shift != (along ? k.grid.along_log : 0)) wrong = "shifts";
  if (!along && k.grid.along_shift != k.grid.across_log) wrong = "shifts";
  if ((rows && !along) || (columns && along)) wrong = "the grid lies across memory";
  if (l.shared_bytes > shared_bytes) wrong = "shared memory";
  const int64_t marks = variant == 1 || variant == 3 || variant == 4;
  if (l.shared_bytes < 16 + k.scratch_bytes + k.held * l.threads * (pack_bytes * (1 + backward) + marks)) {
    wrong = "too little shared memory for what is held";
  }
  const int64_t lanes = along ? 1 : across < 32 ? across : 32;
  if (k.scratch_bytes % 16 || k.scratch_bytes < 2 * (l.threads / 32) * lanes * (columns ? pack : 1) * 4) {
    wrong = "scratch";
  }
  if (k.held < 1 || k.held > shares) wrong = "what is held";
  if (k.held < shares && l.shared_bytes + l.threads * (pack_bytes * (1 + backward) + marks) <= shared_bytes) {
    wrong = "more could be held";
  }
  if (k.tiles * across < slices || (k.tiles - 1) * across >= slices) wrong = "tiles";
  if (k.blocks < 1 || k.blocks > k.tiles || l.blocks != uint64_t(k.blocks * p.num_heads)) wrong = "blocks";
  if (p.num_heads * 4 * k.blocks * 4 > workspace_bytes(p)) wrong = "workspace";
  if (!aligned && variant != 4) wrong = "packs at addresses that are not aligned";
  if (l.kernel < 0 || l.kernel >= kNumKernels || (l.kernel >= kNumKernels / 2) != backward) wrong = "kernel";
  if (!wrong) return true;
  snprintf(
      message, sizeof(message), "%s: %s for [%lld, %lld, %lld], %lld heads, %u blocks of %u (2^%d along), %u bytes", wrong,
      name, (long long)p.outer, (long long)p.length, (long long)p.inner, (long long)p.num_heads, l.blocks, l.threads,
      k.grid.along_log, l.shared_bytes);
  return false;
}

int main() {
  const int64_t sizes[] = {1, 2, 3, 5, 8, 31, 64, 500, 4096, 100000, int64_t(1) << 33};
  const int64_t lengths[] = {2, 3, 8, 24, 127, 128, 1000, 2048, 5120, 65536, 1000003, int64_t(1) << 32};
  const int64_t devices[] = {49152, 101376, 166912, 232448};
  const int64_t heads[] = {1, 3, 8, 1000};
  long checked = 0;
  const int types[] = {DAAM_FLOAT32, DAAM_BFLOAT16, DAAM_FLOAT16};
  for (int64_t outer : sizes) {
    for (int64_t inner : sizes) {
      for (int64_t length : lengths) {
        if (length > (int64_t(1) << 40) / outer / inner) continue;
        for (int64_t num_heads : heads) {
          if (length / num_heads < 2) continue;
          for (int variant = 0; variant < 24; variant++) {
            daam_density p = {};
            p.outer = outer;
            p.length = length;
            p.inner = inner;
            p.num_heads = num_heads;
            p.num_gaussians = 4;
            p.type = types[variant % 3];
            p.eps = 1e-8;
            p.flags = variant / 3 % 2 ? DAAM_HAS_PADDING_VALUE : 0;
            p.x.outer = length * inner;
            p.x.row = inner;
            p.x.inner = 1;
            p.out = p.grad = p.x;
            for (int64_t shared_bytes : devices) {
              if (!check(p, variant / 6 % 2, variant / 12 % 2, shared_bytes)) {
                puts(message);
                return 1;
              }
              checked++;
            }
          }
        }
      }
    }
  }
  printf("%ld launches\n", checked);
  return 0;
}
