// Vectors of the instruction set that a file is compiled for, their arithmetic, and some of whole numbers.
//
// Everything here is inlined and lives in the instruction set's own namespace: a function that the linker
// could share between instruction sets would crash older processors, so kernels use no templates or inline
// functions of the standard library that have linkage (a test looks for weak symbols).
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>  // maskz forms with a full mask: the plain ones make GCC 12 warn of uninitialised values
#endif

#ifndef FASTBERT_ISA
#error "FASTBERT_ISA names the instruction set's namespace: compile through setup.py"
#endif

#define FASTBERT_INLINE static inline __attribute__((always_inline))
#define FASTBERT_MEMBER inline __attribute__((always_inline))
#define FASTBERT_LAMBDA __attribute__((always_inline))

namespace fastbert {
namespace FASTBERT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));

template <int n>
struct Count {  // a number that a lambda can take as a constant
  static constexpr int value = n;
};

FASTBERT_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTBERT_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FASTBERT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTBERT_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

FASTBERT_INLINE vfloat splat(float x) { return x - vfloat{}; }
FASTBERT_INLINE vint splat(int32_t x) { return x - vint{}; }
FASTBERT_INLINE vuint splat(uint32_t x) { return x - vuint{}; }
FASTBERT_INLINE vfloat as_float(vuint x) { return (vfloat)x; }
FASTBERT_INLINE vuint as_uint(vfloat x) { return (vuint)x; }

// b where either is NaN; one instruction, which GCC does not make of the comparison.
FASTBERT_INLINE vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

FASTBERT_INLINE vfloat min(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vfloat)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

FASTBERT_INLINE vfloat square_root(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vfloat)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
