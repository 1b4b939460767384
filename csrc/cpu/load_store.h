// Loads and stores of the three types of activations, float, bf16 and f16; registers hold float32.
#pragma once
#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef uint16_t vushort __attribute__((vector_size(kLanes * 2)));

// Between 16 and 32 bits; GCC makes several instructions of the conversions where there is one.
FASTBERT_INLINE vuint widen(const void* p) {
#if defined(__AVX512F__)
  return (vuint)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vuint)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  vushort half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, vuint);
#endif
}

FASTBERT_INLINE void narrow(void* p, vuint v) {  // v < 65536
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)v));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
  const vushort half = __builtin_convertvector(v, vushort);
  memcpy(p, &half, sizeof half);
#endif
}

#if !defined(__F16C__)
// IEEE 754's binary16, in the lower half of a word, where the processor has no instruction for it. No step
// makes or takes a subnormal float32, which a process may have told its processor to take for 0.
FASTBERT_INLINE vfloat half_to_float(vuint half) {
  const vint magnitude = (vint)(half & 0x7FFFu);
  const vuint normal = ((vuint)magnitude << 13) + (112u << 23);  // the exponent's bias goes from 15 to 127
  const vuint special = normal + (112u << 23);                   // and inf's exponent from 31 to 255
  const vfloat small = __builtin_convertvector(magnitude, vfloat) * 0x1p-24f;  // subnormal numbers and 0
  const vuint bits = magnitude < 0x0400 ? as_uint(small) : magnitude < 0x7C00 ? normal : special;
  return as_float(bits | (half & 0x8000u) << 16);
}

// To nearest, ties to even.
FASTBERT_INLINE vuint float_to_half(vfloat v) {
  const vuint bits = as_uint(v) & 0x7FFFFFFFu, sign = as_uint(v) >> 16 & 0x8000u;
  const vint magnitude = (vint)bits;
  const vuint normal = (bits + 0xFFFu + (bits >> 13 & 1u) - (112u << 23)) >> 13;
  const vuint small = as_uint(as_float(bits) + 0.5f) - as_uint(splat(0.5f));  // whose last place is 2^-24
  vuint half = magnitude < 0x38800000 ? small : normal;                       // below 2^-14: subnormal
  half = magnitude < 0x477FF000 ? half : splat(0x7C00u);                      // 65520, between 65504 and inf
  half = magnitude > 0x7F800000 ? splat(0x7E00u) : half;                      // NaN
  return half | sign;
}
#endif

// ---- whole vectors -----------------------------------------------------------------------------------

FASTBERT_INLINE vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Eight words of 16 bits -> eight of 32, made of the bytes that `bytes` names, -1 for one of 0: one
// instruction where widening them and what follows it would take two.
FASTBERT_INLINE __m256i spread(const void* p, __m256i bytes) {
  const __m128i words = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(words), bytes);
}
#endif

FASTBERT_INLINE vfloat load(const bf16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  constexpr char z = -1;
  return (vfloat)spread(p, _mm256_setr_epi8(z, z, 0, 1, z, z, 2, 3, z, z, 4, 5, z, z, 6, 7,  //
                                            z, z, 8, 9, z, z, 10, 11, z, z, 12, 13, z, z, 14, 15));
#else
  return as_float(widen(p) << 16);
#endif
}

FASTBERT_INLINE vfloat load(const f16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return half_to_float(widen(p));
#endif
}

FASTBERT_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

// Upper half after rounding to nearest, ties to even. A NaN keeps its sign and its upper half, which is one
// too: `v` is a result, and arithmetic makes quiet ones.
FASTBERT_INLINE void store(bf16* p, vfloat v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &half, sizeof half);
#else
  const vuint bits = as_uint(v);
  const vuint rounded = bits + ((0x7FFF + ((bits >> 16) & 1)) & (vuint)(v == v));
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i upper = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         2, 3, 6, 7, 10, 11, 14, 15, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i halves = _mm256_shuffle_epi8((__m256i)rounded, upper);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 8)));
#else
  narrow(p, rounded >> 16);
#endif
#endif
}

FASTBERT_INLINE void store(f16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  narrow(p, float_to_half(v));
#endif
}

// ---- parts of vectors --------------------------------------------------------------------------------

// The first n < kLanes elements; the other lanes read as `fill`.
template <typename T>
FASTBERT_INLINE vfloat load_n(const T* p, int64_t n, float fill = 0.f) {
  T part[kLanes];
  memset(part, 0, sizeof part);
  memcpy(part, p, n * sizeof(T));
  vfloat v = load(part);
  for (int64_t i = n; i < kLanes; ++i) v[i] = fill;
  return v;
}

template <typename T>
FASTBERT_INLINE void store_n(T* p, vfloat v, int64_t n) {
  T part[kLanes];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
