// The daam_cuda_* functions: launches of the compiled kernels through the CUDA driver, which is looked for when it is
// first needed. Neither CUDA's headers nor its runtime are. What the driver offers is declared here as cuda.h does.
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "launch.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace daam {
namespace cuda {
namespace {

typedef int CUresult;  // 0 is success
typedef int CUdevice;
typedef void *CUcontext, *CUmodule, *CUfunction, *CUstream;

constexpr int kMaxSharedBytesOfDevice = 97;    // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr int kMaxSharedBytesOfFunction = 8;   // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

void* open_library() {
#if defined(_WIN32)
  return reinterpret_cast<void*>(LoadLibraryA("nvcuda.dll"));
#else
  const char* path = getenv("DAAM_KERNELS_CUDA_DRIVER");  // another library with the driver's interface
  return dlopen(path && *path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
#endif
}

void* find_symbol(void* library, const char* name) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

struct Driver {
  CUresult (*init)(unsigned flags);
  CUresult (*device)(CUdevice*, int ordinal);
  CUresult (*retain_primary_context)(CUcontext*, CUdevice);
  CUresult (*set_current_context)(CUcontext);
  CUresult (*current_context)(CUcontext*);
  CUresult (*context_id)(CUcontext, unsigned long long*);
  CUresult (*current_device)(CUdevice*);
  CUresult (*device_attribute)(int* value, int attribute, CUdevice);
  CUresult (*load_module)(CUmodule*, const void* image);
  CUresult (*unload_module)(CUmodule);
  CUresult (*find_function)(CUfunction*, CUmodule, const char* name);
  CUresult (*set_function_attribute)(CUfunction, int attribute, int value);
  CUresult (*launch)(
      CUfunction, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
      unsigned block_z, unsigned shared_bytes, CUstream, void** arguments, void** extra);
  bool complete;

  Driver() : complete(false) {
    void* library = open_library();
    if (!library) return;
    complete = find(library, "cuInit", init) && find(library, "cuDeviceGet", device) &&
               find(library, "cuDevicePrimaryCtxRetain", retain_primary_context) &&
               find(library, "cuCtxSetCurrent", set_current_context) &&
               find(library, "cuCtxGetCurrent", current_context) && find(library, "cuCtxGetId", context_id) &&
               find(library, "cuCtxGetDevice", current_device) &&
               find(library, "cuDeviceGetAttribute", device_attribute) &&
               find(library, "cuModuleLoadData", load_module) && find(library, "cuModuleUnload", unload_module) &&
               find(library, "cuModuleGetFunction", find_function) &&
               find(library, "cuFuncSetAttribute", set_function_attribute) &&
               find(library, "cuLaunchKernel", launch) && init(0) == 0;
  }

  template <class Function>
  static bool find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(find_symbol(library, name));
    return function != NULL;
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// An image in a context: its functions are looked up once.
struct Kernels {
  CUfunction functions[kNumKernels], parameter_gradients;
  int max_shared_bytes;

  bool load(const void* image) {
    const Driver& d = driver();
    CUmodule module;
    CUdevice device;
    if (d.current_device(&device) != 0) return false;
    if (d.device_attribute(&max_shared_bytes, kMaxSharedBytesOfDevice, device) != 0) return false;
    if (d.load_module(&module, image) != 0) return false;
    if (find_functions(module)) return true;
    d.unload_module(module);
    return false;
  }

 private:
  bool find_functions(CUmodule module) {
    const Driver& d = driver();
    for (int kernel = 0; kernel < kNumKernels; kernel++) {
      char name[64];
      kernel_name(kernel, name, sizeof(name));
      CUfunction& function = functions[kernel];
      if (d.find_function(&function, module, name) != 0) return false;
      if (d.set_function_attribute(function, kMaxSharedBytesOfFunction, max_shared_bytes) != 0) return false;
    }
    return d.find_function(&parameter_gradients, module, kParameterKernel) == 0;
  }
};

// Of the calling thread. One that has none, as torch's threads of the backward pass may, gets what the CUDA runtime would
// give it: the first device's primary context.
CUcontext find_context() {
  const Driver& d = driver();
  CUcontext context = NULL;
  CUdevice device;
  if (d.current_context(&context) != 0) return NULL;
  if (context) return context;
  if (d.device(&device, 0) != 0 || d.retain_primary_context(&context, device) != 0) return NULL;
  return d.set_current_context(context) == 0 ? context : NULL;
}

// Those of the current context. What failed to load is tried again: it may have been for want of memory.
int find_kernels(const void* image, const Kernels** kernels) {
  if (!driver().complete) return DAAM_NO_DRIVER;
  const CUcontext context = find_context();
  unsigned long long id;  // a context's address may be that of an earlier one
  if (!context || driver().context_id(context, &id) != 0) return DAAM_NO_DRIVER;
  static std::mutex mutex;
  static std::map<std::pair<unsigned long long, const void*>, Kernels> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(id, image);
  auto found = all.find(key);
  if (found == all.end()) {
    Kernels loaded;
    if (!loaded.load(image)) return DAAM_NO_KERNELS;
    found = all.emplace(key, loaded).first;
  }
  *kernels = &found->second;
  return DAAM_OK;
}

int launch(CUfunction function, Task& task, uint32_t blocks, uint32_t threads, uint32_t shared_bytes, void* stream) {
  void* arguments[] = {&task};
  const CUresult result =
      driver().launch(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, arguments, NULL);
  return result == 0 ? DAAM_OK : DAAM_LAUNCH_FAILED;
}

int run(const daam_density* problem, const Tensors& tensors, const void* image, void* stream) {
  if (!problem || !is_served(*problem)) return DAAM_BAD_ARGUMENT;
  const Kernels* kernels;
  const int status = find_kernels(image, &kernels);
  if (status != DAAM_OK) return status;
  Launch l = plan(*problem, tensors, kernels->max_shared_bytes);
  if (l.blocks > 0) {
    const int launched = launch(kernels->functions[l.kernel], l.task, l.blocks, l.threads, l.shared_bytes, stream);
    if (launched != DAAM_OK) return launched;
  }
  if (!tensors.backward) return DAAM_OK;
  return launch(
      kernels->parameter_gradients, l.task, uint32_t(problem->num_heads), kParameterThreads, kParameterSharedBytes,
      stream);
}

// No exception may reach a caller that is not C++.
template <class Function>
int guarded(Function function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return DAAM_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace daam

using namespace daam::cuda;

int daam_cuda_density_forward(
    const daam_density* problem, const void* x, const void* mean_offsets, const void* c, const uint8_t* mask, void* y,
    void* weights, const void* image, void* stream) {
  Tensors t = {};
  t.x = x;
  t.mean_offsets = mean_offsets;
  t.c = c;
  t.mask = mask;
  t.out = y;
  t.weights = weights;
  return guarded([&] { return run(problem, t, image, stream); });
}

int64_t daam_cuda_workspace(const daam_density* problem) {
  return problem && is_served(*problem) ? workspace_bytes(*problem) : 0;
}

int daam_cuda_density_backward(
    const daam_density* problem, const void* grad, const void* x, const void* mean_offsets, const void* c,
    const uint8_t* mask, void* dx, void* d_mean_offsets, void* d_c, void* workspace, const void* image, void* stream) {
  Tensors t = {};
  t.x = x;
  t.backward = true;
  t.grad = grad;
  t.mean_offsets = mean_offsets;
  t.c = c;
  t.mask = mask;
  t.out = dx;
  t.d_mean_offsets = d_mean_offsets;
  t.d_c = d_c;
  t.workspace = workspace;
  return guarded([&] { return run(problem, t, image, stream); });
}

int daam_cuda_load(const void* image) {
  return guarded([&] {
    const Kernels* kernels;
    return find_kernels(image, &kernels);
  });
}
