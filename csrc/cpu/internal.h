// What the source files of the CPU library know of each other.
#pragma once

#include <stddef.h>

#include "../daam_kernels.h"
#include "../density_math.h"

namespace daam {

// The pointers of one call; those of the other direction are NULL.
struct Tensors {
  const void *x, *grad, *mean_offsets, *c;
  const uint8_t* mask;
  void *out, *weights;  // out: y or dx
  void *d_mean_offsets, *d_c;
  const double* log_shares;  // of a mixture; NULL: the product
  double* d_log_shares;
};

// One direction with one instruction set: daam_status. backward is whether tensors.grad is there. Each hands float64 on.
typedef int (*Kernel)(const daam_density&, const Tensors&, daam_parallel_for);

int density_generic(const daam_density&, const Tensors&, daam_parallel_for);
int density_avx2(const daam_density&, const Tensors&, daam_parallel_for);
int density_avx512(const daam_density&, const Tensors&, daam_parallel_for);
int density_generic_double(const daam_density&, const Tensors&, daam_parallel_for);
int density_avx2_double(const daam_density&, const Tensors&, daam_parallel_for);
int density_avx512_double(const daam_density&, const Tensors&, daam_parallel_for);

// The same of additive attention; those of the other direction are NULL.
struct AdditiveTensors {
  const float *query, *key, *weight, *d_scores;
  float* scores;
  float *d_query, *d_key, *d_weight;
};

typedef int (*AdditiveKernel)(const daam_additive&, const AdditiveTensors&, daam_parallel_for);

int additive_generic(const daam_additive&, const AdditiveTensors&, daam_parallel_for);
int additive_avx2(const daam_additive&, const AdditiveTensors&, daam_parallel_for);
int additive_avx512(const daam_additive&, const AdditiveTensors&, daam_parallel_for);

// Memory of the calling thread that stays until the thread ends, aligned to 64 bytes; what was there before is lost.
// NULL where there is not so much.
void* thread_scratch(size_t bytes);

// Asks for huge pages below memory that is about to be written for the first time; nothing where there are none.
void advise_huge_pages(void* start, size_t bytes);

// A number of a daam_type at an index, as double; and the other way round.
double read_number(const void* base, int64_t index, int type);
void write_number(void* base, int64_t index, int type, double value);

double read_offset(const daam_density&, const Tensors&, int64_t head, int64_t k);
double read_width(const daam_density&, const Tensors&, int64_t head, int64_t k);

// The Gaussians of a head as one quadratic.
Quadratic head_quadratic(const daam_density&, const Tensors&, int64_t head);

// The gradients of the parameters, from sums [tasks][heads][4] (HeadSums) that are added in the order of the tasks.
void write_parameter_gradients(const daam_density&, const Tensors&, const double* sums, int64_t tasks);

// The same of a mixture, from sums [tasks][heads][gaussians][3] of p times 1, e / sqrt(var) and e^2 / var.
void write_mixture_gradients(const daam_density&, const Tensors&, const double* sums, int64_t tasks);

}  // namespace daam
