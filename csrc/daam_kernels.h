/* Density attention without Python, and what is long about additive attention: the C interface of the native library.
 * It needs no header but this one.
 *
 * x is seen as [outer, R, inner]. R is cut into num_heads chunks of R / num_heads elements, the last of which takes
 * the remainder; each chunk at each (outer, inner) is a slice, which is weighed by the product of its head's
 * num_gaussians Gaussians (Ioannides et al., arXiv 2401.11143, Algorithm 2). Arithmetic is in float, or in double for
 * double. Every stride is in elements and may be anything, 0 for expanded axes included; pointers need no alignment
 * but their type's. Nothing is read or written outside of the tensors. All functions may be called from many threads
 * at once.
 */
#ifndef DAAM_KERNELS_H
#define DAAM_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define DAAM_API __declspec(dllexport)
#else
#define DAAM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a structure or a signature below does. */
#define DAAM_ABI_VERSION 3

enum daam_type { DAAM_FLOAT32 = 0, DAAM_FLOAT64 = 1, DAAM_BFLOAT16 = 2, DAAM_FLOAT16 = 3 };

enum daam_flag {
  DAAM_HAS_PADDING_VALUE = 1, /* elements equal to padding_value are padding */
  DAAM_HAS_MASK = 2,          /* elements whose mask byte is 0 are padding */
  DAAM_EXCLUDE = 4,           /* padding is left out of the statistics; otherwise it counts as zeros */
  DAAM_SOFTMAX = 8,           /* divide by the sum of the densities; otherwise by max(sum, eps) */
  DAAM_RESIDUAL = 16,         /* add x to the result */
  DAAM_HUGE_PAGES = 32        /* CPU: ask for huge pages below large results before they are written */
};

enum daam_status {
  DAAM_OK = 0,
  DAAM_OUT_OF_MEMORY = 1,
  DAAM_BAD_ARGUMENT = 2, /* a type, a size or a head of fewer than two elements that is not served */
  DAAM_NO_DRIVER = 3,    /* CUDA: no driver, or one without what is needed */
  DAAM_NO_KERNELS = 4,   /* CUDA: the compiled kernels do not load on this device */
  DAAM_LAUNCH_FAILED = 5
};

typedef struct {
  int64_t outer, row, inner;
} daam_strides;

typedef struct {
  int64_t outer, length, inner; /* sizes of [outer, R, inner] */
  int64_t num_heads, num_gaussians;
  daam_strides x, out, grad, mask; /* out: of y, weights and dx alike; grad: of y's gradient */
  int64_t offsets_strides[2];      /* of mean_offsets [num_heads, num_gaussians] */
  int64_t widths_strides[2];       /* of c [num_heads, num_gaussians] */
  double eps;
  double padding_value; /* rounded to x's type by the caller */
  int32_t type;         /* of x, y, weights, g and dx: enum daam_type */
  int32_t offsets_type; /* of mean_offsets and its gradient */
  int32_t widths_type;  /* of c and its gradient */
  int32_t flags;        /* enum daam_flag */
} daam_density;

/* Calls work(begin, end, context) so that [begin, end) is covered once, by any number of threads; the signature of
 * torch_parallel_for. NULL runs everything in the calling thread. Results do not depend on it, to the bit. */
typedef int32_t (*daam_parallel_for)(
    int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*), void* context);

DAAM_API int daam_abi_version(void);

/* The instruction set that the CPU kernels run with: "avx512", "avx2", "sse2", "neon" or "generic". The environment
 * variable DAAM_KERNELS_INSTRUCTION_SET names a lesser one that this machine has too; it is read once. */
DAAM_API const char* daam_instruction_set(void);

/* Those of them that were compiled and that this machine has, the best one first, separated by spaces. */
DAAM_API const char* daam_instruction_sets(void);

/* y, and the weights where the pointer is not NULL. mask is NULL without DAAM_HAS_MASK. */
DAAM_API int daam_density_forward(
    const daam_density* problem, const void* x, const void* mean_offsets, const void* c, const uint8_t* mask, void* y,
    void* weights, daam_parallel_for parallel_for);

/* dx, and the gradients of the parameters, contiguous [num_heads, num_gaussians] in the parameters' own types. */
DAAM_API int daam_density_backward(
    const daam_density* problem, const void* grad, const void* x, const void* mean_offsets, const void* c,
    const uint8_t* mask, void* dx, void* d_mean_offsets, void* d_c, daam_parallel_for parallel_for);

/* The same of a mixture in the place of the product: the sum of the Gaussians, of height 1, each times its share.
 * log_shares and its gradient are contiguous [num_heads, num_gaussians]: the logarithms of the shares, -infinity for a
 * Gaussian that is not there. */
DAAM_API int daam_mixture_forward(
    const daam_density* problem, const void* x, const void* mean_offsets, const void* c, const double* log_shares,
    const uint8_t* mask, void* y, void* weights, daam_parallel_for parallel_for);

DAAM_API int daam_mixture_backward(
    const daam_density* problem, const void* grad, const void* x, const void* mean_offsets, const void* c,
    const double* log_shares, const uint8_t* mask, void* dx, void* d_mean_offsets, void* d_c, double* d_log_shares,
    daam_parallel_for parallel_for);

/* A block of additive attention: the sums over hidden units, which are all that is long about it. Numbers are floats;
 * strides are of batch and row, hidden units are contiguous. */
typedef struct {
  int64_t batch, queries, keys, hidden;
  int64_t query[2], key[2];     /* strides of [batch, queries, hidden] and [batch, keys, hidden] */
  int64_t d_query[2], d_key[2]; /* of their gradients */
  double scale;
} daam_additive;

/* scores [batch, queries, keys], contiguous: scale * sum_c weight[c] tanh(query[b, i, c] + key[b, j, c]). */
DAAM_API int daam_additive_scores(
    const daam_additive* problem, const float* query, const float* key, const float* weight, float* scores,
    daam_parallel_for parallel_for);

/* Adds, with t the activations anew: sum_j d_scores weight (1 - t^2) to d_query, sum_i of it to d_key, and
 * sum_bij d_scores t to d_weight [hidden]. d_scores is as scores, and holds scale already. */
DAAM_API int daam_additive_gradients(
    const daam_additive* problem, const float* d_scores, const float* query, const float* key, const float* weight,
    float* d_query, float* d_key, float* d_weight, daam_parallel_for parallel_for);

/* The same on a CUDA device. Pointers are the device's; stream is a CUstream, and the current context must be its
 * own. Everything is asynchronous on the stream. image is the fat binary of csrc/cuda in memory, which must stay
 * there; it is loaded once for each context. Not for DAAM_FLOAT64. */
DAAM_API int daam_cuda_density_forward(
    const daam_density* problem, const void* x, const void* mean_offsets, const void* c, const uint8_t* mask, void* y,
    void* weights, const void* image, void* stream);

/* workspace: device memory of daam_cuda_workspace(problem) bytes, for the partial sums of the parameter gradients. */
DAAM_API int64_t daam_cuda_workspace(const daam_density* problem);

DAAM_API int daam_cuda_density_backward(
    const daam_density* problem, const void* grad, const void* x, const void* mean_offsets, const void* c,
    const uint8_t* mask, void* dx, void* d_mean_offsets, void* d_c, void* workspace, const void* image, void* stream);

/* DAAM_OK where the driver is there and the image loads in the current context. */
DAAM_API int daam_cuda_load(const void* image);

#ifdef __cplusplus
}
#endif

#endif
