// What every kernel needs to cut its work: sizes, memory, threads. Internal to each instruction set, as vector.h is.
#pragma once

#include <stdlib.h>

#include "internal.h"
#include "vector.h"

namespace {

DAAM_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
DAAM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DAAM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory that is given back; NULL where there is not so much.
struct Memory {
  void* at;
  explicit Memory(size_t bytes) : at(aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Memory() { free(at); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

// A function of these arguments, called where it is: what takes it is compiled once for all of them.
template <class... Arguments>
class Callback {
 public:
  template <class Body>
  Callback(const Body& body)
      : body(&body), call([](const void* at, Arguments... arguments) {
          (*static_cast<const Body*>(at))(arguments...);
        }) {}
  void operator()(Arguments... arguments) const { call(body, arguments...); }

 private:
  const void* body;
  void (*call)(const void*, Arguments...);
};

// Splits [0, count) over the threads; body(i) for each.
inline void run_parallel(daam_parallel_for parallel_for, int64_t count, Callback<int64_t> body) {
  const auto work = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; i++) (*static_cast<const Callback<int64_t>*>(context))(i);
  };
  if (parallel_for && count > 1)
    parallel_for(0, count, 1, work, &body);
  else
    work(0, count, &body);
}

}  // namespace
