// Sums and maxima over the lanes of a vector.
#pragma once
#include "load_store.h"

namespace fastbert {
namespace FASTBERT_ISA {

// Halves added pairwise: the same order on every run.
FASTBERT_INLINE float reduce_add(vfloat v) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __m256 eight = (__m256)_mm512_maskz_extracti64x4_epi64(0xF, bits, 0) +
                       (__m256)_mm512_maskz_extracti64x4_epi64(0xF, bits, 1);
#elif defined(__AVX2__)
  const __m256 eight = (__m256)v;
#endif
#if defined(__AVX2__)
  __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#elif defined(__x86_64__)
  __m128 four = (__m128)v;
#endif
#if defined(__x86_64__)
  four += _mm_movehl_ps(four, four);
  return four[0] + four[1];
#else
  float x[kLanes];
  store(x, v);
  for (int width = kLanes / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
#endif
}

FASTBERT_INLINE float reduce_max(vfloat v) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __m256 eight = _mm256_max_ps((__m256)_mm512_maskz_extracti64x4_epi64(0xF, bits, 0),
                                     (__m256)_mm512_maskz_extracti64x4_epi64(0xF, bits, 1));
#elif defined(__AVX2__)
  const __m256 eight = (__m256)v;
#endif
#if defined(__AVX2__)
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__x86_64__)
  __m128 four = (__m128)v;
#endif
#if defined(__x86_64__)
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return four[0] > four[1] ? four[0] : four[1];
#else
  float x[kLanes];
  store(x, v);
  for (int width = kLanes / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
#endif
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
