// The kernels of csrc/cuda/density.cu compiled as ordinary C++, behind the driver's interface that csrc/cuda/driver.cpp
// calls: the tests load this library in the driver's place, and so run launches and kernels from end to end on a CPU.
//
// Threads of a block are fibers, switched at every barrier and shuffle; what they compute between two of those they
// compute alone. EMULATION_REVERSED=1 runs them the other way round: a race would show as other bits. Shared memory is
// NaN before every block, and with AddressSanitizer poisoned beyond what was asked for. Not emulated: rounding of the
// GPU's own exp2, log2 and sqrt, and anything about speed.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <deque>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
static uint3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kMaxSharedBytes = 232448;  // of an H100's block
alignas(16) uint4 daam_shared[kMaxSharedBytes / 16];

// Fibers.

namespace emulation {

[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "emulation: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  abort();
}

constexpr size_t kStackBytes = 256 << 10;

struct Barrier {
  unsigned size = 0, arrived = 0, round = 0;
};

// Where a fiber, or what switches them, goes on. swapcontext() asks the system for the signal mask, and with
// AddressSanitizer clears what is known of the whole stack, each time: that would be most of the time that this takes.
struct Place {
  void* state[5];
};

// Who jumps leaves nothing behind that AddressSanitizer would have to be told of.
#define DAAM_JUMPS __attribute__((noinline, no_sanitize("address")))

// Alone, because a function may not jump to a place of its own.
[[noreturn]] DAAM_JUMPS void go_on(Place& place) {
  __builtin_longjmp(place.state, 1);
}

struct Fiber {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Place place;
  bool started = false;
  bool done;
  unsigned shuffles;
  void* fake_stack;
};

struct Warp {
  Barrier barrier;
  double slots[2][32];  // a shuffle writes one while slower threads still read the other
};

std::deque<Fiber> fibers;  // where more are added, those that have started stay
std::vector<Warp> warps;
Barrier block_barrier;
Place scheduler;
void* scheduler_stack;
const void* scheduler_bottom;
size_t scheduler_size;
unsigned current;
uint64_t progress;
void (*kernel)(const void*);
const void* kernel_argument;

void before_switch(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}

void after_switch(void* saved, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#else
  (void)saved, (void)bottom, (void)size;
#endif
}

DAAM_JUMPS void yield() {
  Fiber& fiber = fibers[current];
  before_switch(&fiber.fake_stack, scheduler_bottom, scheduler_size);
  if (!__builtin_setjmp(fiber.place.state)) go_on(scheduler);
  after_switch(fiber.fake_stack, &scheduler_bottom, &scheduler_size);
}

void wait(Barrier& barrier) {
  const unsigned round = barrier.round;
  progress++;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.round++;
  }
  while (barrier.round == round) yield();
}

// Threads of one block after the other.
void fiber_main() {
  after_switch(NULL, &scheduler_bottom, &scheduler_size);
  for (;;) {
    kernel(kernel_argument);
    fibers[current].done = true;
    progress++;
    yield();
  }
}

DAAM_JUMPS void start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = NULL;
  makecontext(&context, fiber_main, 0);
  fiber.started = true;
  setcontext(&context);
}

// Until it yields.
DAAM_JUMPS void run(Fiber& fiber) {
  before_switch(&scheduler_stack, fiber.stack.data(), kStackBytes);
  if (!__builtin_setjmp(scheduler.state)) fiber.started ? go_on(fiber.place) : start(fiber);
  after_switch(scheduler_stack, NULL, NULL);
}

void run_block(unsigned threads, bool reversed) {
  if (fibers.size() < threads) fibers.resize(threads);
  warps.assign(threads / 32, Warp());
  for (Warp& warp : warps) warp.barrier.size = 32;
  block_barrier = Barrier();
  block_barrier.size = threads;
  for (unsigned t = 0; t < threads; t++) {
    Fiber& fiber = fibers[t];
    fiber.done = false;
    fiber.shuffles = 0;
  }
  for (unsigned done = 0; done < threads;) {
    const uint64_t before = progress;
    for (unsigned i = 0; i < threads; i++) {
      current = reversed ? threads - 1 - i : i;
      Fiber& fiber = fibers[current];
      if (fiber.done) continue;
      threadIdx.x = current;
      run(fiber);
      done += fiber.done;
    }
    if (progress == before) fail("threads of block %u wait for others that will not come", blockIdx.x);
  }
}

}  // namespace emulation

// What the kernels call.

static void __syncthreads() { emulation::wait(emulation::block_barrier); }

template <class Value>
static Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  if (mask != 0xffffffffu) emulation::fail("a shuffle of part of a warp");
  emulation::Warp& warp = emulation::warps[threadIdx.x / 32];
  double* slots = warp.slots[emulation::fibers[threadIdx.x].shuffles++ % 2];
  const unsigned lane = threadIdx.x % 32;
  slots[lane] = value;
  emulation::wait(warp.barrier);
  return Value(slots[lane ^ distance]);
}

template <class Value>
static Value __ldg(const Value* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Value)) emulation::fail("a misaligned load of %zu", sizeof(Value));
  return *address;
}

static void __pipeline_memcpy_async(void* shared, const void* global, size_t size) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % size) {
    emulation::fail("a misaligned copy");
  }
  memcpy(shared, global, size);
}
static void __pipeline_commit() {}
static void __pipeline_wait_prior(size_t) {}

static float __uint_as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
static uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
static __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t bits = bits_of(f);
  if (std::isnan(f)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
static __half __ushort_as_half(uint16_t bits) { return {bits}; }
static uint16_t __half_as_ushort(__half h) { return h.bits; }
static float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float f = exponent == 31  ? (fraction ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(float(fraction), -24)
                            : std::ldexp(float(fraction + 1024), exponent - 25);
  return h.bits >> 15 ? -f : f;
}
static __half __float2half_rn(float f) {
  const uint16_t sign = bits_of(f) >> 16 & 0x8000;
  const float size = std::fabs(f);
  if (std::isnan(f)) return {0x7fff};
  if (size >= 65520) return {uint16_t(sign | 0x7c00)};
  if (size < std::ldexp(1.0f, -14)) return {uint16_t(sign | int(std::nearbyint(std::ldexp(size, 24))))};
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [1/2, 1)
  const int units = int(std::nearbyint(std::ldexp(fraction, 11)));
  return {uint16_t(sign | (((exponent + 13) << 10) + units))};
}

#include "../../csrc/cuda/density.cu"

// The driver's interface.

extern "C" {

// For the tests.
int emulated_launches = 0;  // of all kernels
int emulated_loads = 0;     // of modules

// One device with its primary context, which no thread has before it is set.
static thread_local void* current_context = NULL;
constexpr int kInvalidContext = 201;

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) {
  *device = 0;
  return ordinal || getenv("EMULATION_NO_DEVICE") ? 101 : 0;  // CUDA_ERROR_INVALID_DEVICE
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  static int primary;
  *context = &primary;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current_context = context;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = current_context;
  return 0;
}
int cuCtxGetId(void* context, unsigned long long* id) {
  const char* given = getenv("EMULATION_CONTEXT");
  *id = given ? strtoull(given, NULL, 10) : 0;
  return context ? 0 : kInvalidContext;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return current_context ? 0 : kInvalidContext;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* limit = getenv("EMULATION_SHARED_BYTES");
  if (attribute != 97) emulation::fail("attribute %d of a device", attribute);
  *value = limit ? atoi(limit) : int(kMaxSharedBytes);
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  if (!current_context) return kInvalidContext;
  emulated_loads++;
  *module = const_cast<void*>(image);
  return memcmp(image, "emulated", 8) == 0 ? 0 : 209;  // CUDA_ERROR_NO_BINARY_FOR_GPU
}
int cuModuleUnload(void*) { return 0; }

struct NamedKernel {
  const char* name;
  void (*call)(const void*);
  unsigned max_threads;
};
static void call_kernel(void (*kernel)(const Task), const void* task) { kernel(*static_cast<const Task*>(task)); }

#define NAMED(kernel, threads) \
  {#kernel, [](const void* task) { call_kernel(kernel, task); }, threads},
#define NAMED_TYPE(direction, type)                                                                              \
  NAMED(daam_##direction##_rows_##type, 512)                                                                     \
  NAMED(daam_##direction##_rows_##type##_padded, 512) NAMED(daam_##direction##_columns_##type, 256)              \
      NAMED(daam_##direction##_columns_##type##_padded, 256) NAMED(daam_##direction##_strided_##type, 512)
static const NamedKernel kKernels[] = {
    NAMED_TYPE(forward, float32) NAMED_TYPE(forward, bfloat16) NAMED_TYPE(forward, float16)
        NAMED_TYPE(backward, float32) NAMED_TYPE(backward, bfloat16) NAMED_TYPE(backward, float16)
            NAMED(daam_parameter_gradients, 256)};

int cuModuleGetFunction(void** function, void*, const char* name) {
  for (const NamedKernel& kernel : kKernels) {
    if (strcmp(kernel.name, name) == 0) {
      *function = const_cast<NamedKernel*>(&kernel);
      return 0;
    }
  }
  return 500;  // CUDA_ERROR_NOT_FOUND
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  return attribute == 8 && value <= int(kMaxSharedBytes) ? 0 : 1;
}

int cuLaunchKernel(
    void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared_bytes, void*, void** arguments, void** extra) {
  const NamedKernel& kernel = *static_cast<NamedKernel*>(function);
  if (!current_context) return kInvalidContext;
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra) return 1;
  if (!grid_x || !block_x || block_x % 32 || block_x > kernel.max_threads || shared_bytes > kMaxSharedBytes) return 1;
  emulated_launches++;
  if (getenv("EMULATION_TRACE")) fprintf(stderr, "%s %u x %u, %u\n", kernel.name, grid_x, block_x, shared_bytes);
  const bool reversed = getenv("EMULATION_REVERSED") != NULL;
  emulation::kernel = kernel.call;
  emulation::kernel_argument = arguments[0];
  gridDim = {grid_x, 1, 1};
  blockDim = {block_x, 1, 1};
  for (unsigned b = 0; b < grid_x; b++) {
    blockIdx = {reversed ? grid_x - 1 - b : b, 0, 0};
    memset(daam_shared, 0xff, shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(daam_shared) + shared_bytes, sizeof(daam_shared) - shared_bytes);
#endif
    emulation::run_block(block_x, reversed);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(daam_shared, sizeof(daam_shared));
#endif
  }
  return 0;
}

}  // extern "C"
