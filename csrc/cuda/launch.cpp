#include "launch.h"

#include <stdio.h>

namespace daam {
namespace cuda {
namespace {

constexpr int64_t kMostBlocks = 4096;     // that write partial sums, over all heads: what one block adds up later
constexpr int64_t kEnoughBlocks = 264;    // two for each of some 132 processors
constexpr int64_t kSharedBytes = 49152;   // of a block: small enough for several of them on a processor
constexpr int64_t kSectorBytes = 32;      // the least that memory is read by
constexpr int64_t kLineBytes = 128;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int log2_up(int64_t n) {
  int log = 0;
  while ((int64_t(1) << log) < n) log++;
  return log;
}

int64_t item_bytes(int type) { return type == DAAM_FLOAT32 ? 4 : 2; }

int64_t longest_slice(const daam_density& p) {
  return p.length - (p.num_heads - 1) * (p.length / p.num_heads);
}

struct Tensor {
  const void* data;
  daam_strides strides;
};

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kPackBytes == 0; }

bool divides(int64_t pack, int64_t size, int64_t stride) { return size == 1 || stride % pack == 0; }

// Whether every tensor can be accessed in packs along R, or across it.
Kind find_kind(const daam_density& p, const Tensor* tensors, int count) {
  const int64_t pack = kPackBytes / item_bytes(p.type);
  bool rows = p.length % pack == 0 && (p.num_heads == 1 || p.length / p.num_heads % pack == 0);
  bool columns = p.inner % pack == 0;
  for (int t = 0; t < count; t++) {
    const daam_strides& s = tensors[t].strides;
    const bool aligned = is_aligned(tensors[t].data) && divides(pack, p.outer, s.outer);
    rows = rows && aligned && s.row == 1 && divides(pack, p.inner, s.inner);
    columns = columns && aligned && s.inner == 1 && divides(pack, p.length, s.row);
  }
  return rows ? ROWS : columns ? COLUMNS : STRIDED;
}

// How many threads share a slice of so many packs, and how many slices (or packs of them) are side by side.
struct Shape {
  int along_log, across_log;
};

Shape along_memory(int64_t packs, int64_t slices, int64_t pack_bytes, int64_t tensors, int64_t num_heads) {
  int along = log2_up(divide_up(packs, 4));  // a few packs a thread
  if (along > 5) along = packs <= 32 * 16 ? 5 : log2_up(divide_up(packs, 8));  // within a warp it takes no barrier
  if (along > 9) along = 9;
  const int64_t bytes = (divide_up(packs, int64_t(1) << along) << along) * pack_bytes * tensors;
  int across = along < 8 ? 8 - along : 0;
  const int fewest = along < 5 ? 5 - along : 0;
  while (across > fewest && ((bytes << across) > kSharedBytes ||
                             divide_up(slices, int64_t(1) << across) * num_heads < kEnoughBlocks)) {
    across--;
  }
  return {along, across};
}

Shape across_memory(
    int64_t packs, int64_t slices, int64_t neighbours, int64_t pack_bytes, int64_t tensors, int64_t num_heads,
    int64_t max_shared_bytes) {
  int along = log2_up(divide_up(packs, 4));
  if (along > 5) along = 5;
  int across = 8 - along;
  const int least = log2_up(kSectorBytes / pack_bytes);
  while (across > least && (int64_t(1) << (across - 1)) >= neighbours) across--;
  while (across + along > 5 && across > least &&
         divide_up(slices, int64_t(1) << across) * num_heads < kEnoughBlocks) {
    across--;
  }
  // Slices too long for that many side by side: fewer of them, and more threads for each. Those that do not fit at all
  // are read again, by whole lines.
  const int64_t bytes = packs * pack_bytes * tensors;
  const int fewest = (bytes << least) < max_shared_bytes ? least : log2_up(kLineBytes / pack_bytes);
  while (across > fewest && (bytes << across) > kSharedBytes) across--;
  along = log2_up(divide_up(packs, 4));
  if (along > 8 - across) along = 8 - across;
  if (along + across < 5) across = 5 - along;
  return {along, across};
}

int64_t num_blocks(const daam_density& p, int64_t tiles) {
  const int64_t most = p.num_heads < kMostBlocks ? kMostBlocks / p.num_heads : 1;
  return tiles < most ? tiles : most;
}

int64_t num_slices(const daam_density& p) { return p.outer * p.inner; }

int64_t magnitude(int64_t n) { return n < 0 ? -n : n; }

}  // namespace

void kernel_name(int kernel, char* name, size_t size) {
  static const char* const directions[] = {"forward", "backward"};
  static const char* const kinds[] = {"rows", "columns", "strided"};
  static const char* const types[] = {"float32", "bfloat16", "float16"};
  const int variant = kernel % 5, type = kernel / 5 % 3, direction = kernel / 15;
  snprintf(
      name, size, "daam_%s_%s_%s%s", directions[direction], kinds[variant / 2], types[type],
      variant % 2 ? "_padded" : "");
}

bool is_served(const daam_density& p) {
  const auto is_number = [](int type) { return type >= DAAM_FLOAT32 && type <= DAAM_FLOAT16; };
  return is_number(p.type) && p.type != DAAM_FLOAT64 && is_number(p.offsets_type) && is_number(p.widths_type) &&
         p.outer >= 0 && p.inner >= 0 && p.num_heads >= 1 && p.num_heads <= INT32_MAX && p.num_gaussians >= 1 &&
         p.length / p.num_heads >= 2;
}

int64_t workspace_bytes(const daam_density& p) {
  return p.num_heads * 4 * num_blocks(p, num_slices(p)) * int64_t(sizeof(float));
}

Launch plan(const daam_density& p, const Tensors& tensors, int64_t max_shared_bytes) {
  const bool backward = tensors.backward;
  const bool padded = p.flags & (DAAM_HAS_MASK | DAAM_HAS_PADDING_VALUE);
  Tensor all[4] = {{tensors.x, p.x}, {tensors.out, p.out}};
  int count = 2;
  if (backward) all[count++] = {tensors.grad, p.grad};
  if (tensors.weights) all[count++] = {tensors.weights, p.out};
  const Kind kind = find_kind(p, all, count);

  const int64_t pack_bytes = kind == STRIDED ? item_bytes(p.type) : kPackBytes;
  const int64_t pack = pack_bytes / item_bytes(p.type);
  const int64_t slices_per_pack = kind == COLUMNS ? pack : 1;
  const int64_t slices = num_slices(p) / slices_per_pack;
  const int64_t packs = longest_slice(p) / (kind == ROWS ? pack : 1);
  const int64_t held_tensors = backward ? 2 : 1;
  const bool along =
      kind == ROWS || (kind == STRIDED && (p.inner == 1 || magnitude(p.x.row) <= magnitude(p.x.inner)));
  const Shape shape = along ? along_memory(packs, slices, pack_bytes, held_tensors, p.num_heads)
                            : across_memory(
                                  packs, slices, p.inner / slices_per_pack, pack_bytes, held_tensors, p.num_heads,
                                  max_shared_bytes);

  Launch launch = {};
  launch.threads = 1u << (shape.along_log + shape.across_log);
  const int type = p.type == DAAM_FLOAT32 ? 0 : p.type - 1;
  launch.kernel = (backward * 3 + type) * 5 + 2 * kind + (kind != STRIDED && padded);

  Task& task = launch.task;
  task.x = tensors.x;
  task.grad = tensors.grad;
  task.mean_offsets = tensors.mean_offsets;
  task.c = tensors.c;
  task.mask = tensors.mask;
  task.out = tensors.out;
  task.weights = tensors.weights;
  task.d_mean_offsets = tensors.d_mean_offsets;
  task.d_c = tensors.d_c;
  task.partials = static_cast<float*>(tensors.workspace);
  task.outer = p.outer;
  task.length = p.length;
  task.inner = p.inner;
  task.chunk = p.length / p.num_heads;
  task.num_heads = p.num_heads;
  task.num_gaussians = p.num_gaussians;
  task.x_strides = p.x;
  task.out_strides = p.out;
  task.grad_strides = p.grad;
  task.mask_strides = p.mask;
  for (int i = 0; i < 2; i++) {
    task.offsets_strides[i] = p.offsets_strides[i];
    task.widths_strides[i] = p.widths_strides[i];
  }
  task.tiles = divide_up(slices, int64_t(1) << shape.across_log);
  task.blocks = num_blocks(p, task.tiles);
  task.eps = p.eps;
  task.padding_value = float(p.padding_value);
  task.offsets_type = p.offsets_type;
  task.widths_type = p.widths_type;
  task.flags = p.flags;
  task.grid.along_log = shape.along_log;
  task.grid.across_log = shape.across_log;
  task.grid.along_shift = along ? 0 : shape.across_log;
  task.grid.across_shift = along ? shape.along_log : 0;

  // Two buffers of one float for each warp, each of its lanes that stand for other slices, and each slice of a pack.
  const int64_t lanes = along ? 1 : (shape.across_log < 5 ? int64_t(1) << shape.across_log : 32);
  task.scratch_bytes = int32_t(divide_up(2 * (launch.threads / 32) * lanes * slices_per_pack * 4, 16) * 16);

  const int64_t needed = divide_up(packs, int64_t(1) << shape.along_log);
  const int64_t each = launch.threads * (held_tensors * pack_bytes + (padded || kind == STRIDED));  // and marks
  const int64_t room = (max_shared_bytes - kHeadBytes - task.scratch_bytes) / each;
  task.held = int32_t(needed < room ? needed : room);
  launch.shared_bytes = uint32_t(kHeadBytes + task.scratch_bytes + task.held * each);
  launch.blocks = uint32_t(task.blocks * p.num_heads);
  return launch;
}

}  // namespace cuda
}  // namespace daam
