// Exponentials of vectors: float32's own, and one for results of 16 bits.
#pragma once
#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

// Adding it to a float of less than 2^22 rounds that to a whole number n, and the sum's low bits are n + 127.
constexpr float kWhole = 12582912.f + 127.f;  // 1.5 * 2^23

// 2^n for such a sum: 0 for n = -127, inf for 128.
FASTBERT_INLINE vfloat power_of_two(vfloat sum) { return as_float(as_uint(sum) << 23); }

// x = n ln 2 + r with a whole n, for -88 <= x <= 89; `sum` is what power_of_two takes for n.
struct Reduced {
  vfloat sum, r;
};

FASTBERT_INLINE Reduced reduce(vfloat x) {
  const vfloat sum = x * 1.44269504f + kWhole, n = sum - kWhole;
  return {sum, (x - n * 0.693359375f) + n * 2.12194440e-4f};
}

// e^x within 1 ULP or so. Below -87.7, where results would be subnormal, they are 0.
FASTBERT_INLINE vfloat exp(Reduced x) {
  vfloat p = splat(1.3814539e-3f);
  p = p * x.r + 8.3687454e-3f;
  p = p * x.r + 4.1668389e-2f;
  p = p * x.r + 0.16666521f;
  p = p * x.r + 0.49999994f;
  p = p * x.r + 1.f;
  p = p * x.r + 1.f;
  return p * power_of_two(x.sum);
}

// The same for x <= 89, and for all x: inf above 88.73. NaN stays NaN.
FASTBERT_INLINE vfloat exp_below(vfloat x) { return exp(reduce(max(splat(-88.f), x))); }
FASTBERT_INLINE vfloat exp(vfloat x) { return exp_below(min(splat(89.f), x)); }

// 2^x for x <= 0 to 3e-6, for numbers that are rounded to 16 bits; 0 below -126: 2^floor(x) times the minimax
// fit (Remez) of 2^r over 0 <= r <= 1.
FASTBERT_INLINE vfloat exp2_short(vfloat x) {
#if defined(__AVX512F__)
  const vfloat r = (vfloat)_mm512_maskz_reduce_ps(0xFFFF, (__m512)x, _MM_FROUND_TO_NEG_INF);  // 0 for -inf
#else
  x = max(splat(-126.9f), x);
  const vfloat sum = x - 0.5f + kWhole, r = x - (sum - kWhole);
#endif
  vfloat p = splat(0.0135341678f);
  p = p * r + 0.0520114601f;
  p = p * r + 0.241442755f;
  p = p * r + 0.693003833f;
  p = p * r + 1.00000262f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)x);  // which takes floor(x)
#else
  return p * power_of_two(sum);
#endif
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
