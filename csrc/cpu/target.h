// DAAM_TARGET_BEGIN("avx2,...") ... DAAM_TARGET_END: what lies between is compiled for these instructions. The headers
// of the system come first: their functions stay as they are.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DAAM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DAAM_TARGET_BEGIN(names) \
  DAAM_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define DAAM_TARGET_END DAAM_PRAGMA(clang attribute pop)
#else  // to the end of the file: templates are compiled there
#define DAAM_TARGET_BEGIN(names) DAAM_PRAGMA(GCC target(names))
#define DAAM_TARGET_END
#endif

// What the files of AVX-512 are compiled for, and whether they may use its intrinsics. Emulated, for tests on machines
// without, it is the same vectors in two halves.
#ifdef DAAM_EMULATE_AVX512
#define DAAM_AVX512_TARGET "avx2,fma,f16c"
#define DAAM_AVX512_INTRINSICS 0
#else
#define DAAM_AVX512_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define DAAM_AVX512_INTRINSICS 1
#endif
