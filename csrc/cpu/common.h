// Vectors of the instruction set this file is compiled for: loads and stores of the three activation types,
// sweeps over rows, and sums over lanes. Everything is inlined and lives in the instruction set's own
// namespace: a function that the linker could share between instruction sets would crash older processors, so
// kernels use no templates or inline functions of the standard library that have linkage (a test looks for
// weak symbols).
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

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
typedef uint64_t vulong __attribute__((vector_size(kLanes * 4)));  // kLanes / 2 wide numbers
typedef uint16_t vushort __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <int n>
struct Count {  // a number that a lambda can take as a constant
  static constexpr int value = n;
};

FASTBERT_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTBERT_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FASTBERT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

FASTBERT_INLINE vfloat absolute(vfloat x) { return as_float(as_uint(x) & 0x7FFFFFFFu); }

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

// Elements of a and b in turn: of their first halves, or of their second. GCC 11 has one builtin, clang the
// other.
template <int half, int... i>
FASTBERT_INLINE vuint zip(vuint a, vuint b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (half * (kLanes / 2) + i / 2 + i % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, vint{(half * (kLanes / 2) + i / 2 + i % 2 * kLanes)...});
#endif
}

FASTBERT_INLINE vuint zip_first(vuint a, vuint b) {
  return zip<0>(a, b, std::make_integer_sequence<int, kLanes>{});
}

FASTBERT_INLINE vuint zip_second(vuint a, vuint b) {
  return zip<1>(a, b, std::make_integer_sequence<int, kLanes>{});
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

// ---- loads and stores: T is float, bf16 or f16; registers hold float32 -------------------

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

// What a vector covers: all of its lanes, or the first n, n < kLanes, at the end of a row. load gives 0 in
// the other lanes, store leaves their places alone.
struct AllLanes {
  template <typename T>
  FASTBERT_MEMBER vfloat load(const T* p) const {
    return FASTBERT_ISA::load(p);
  }
  template <typename T>
  FASTBERT_MEMBER void store(T* p, vfloat v) const {
    FASTBERT_ISA::store(p, v);
  }
  FASTBERT_MEMBER vfloat keep(vfloat v) const { return v; }  // 0 in the lanes not covered
};

struct FirstLanes {
  int64_t n;

  template <typename T>
  FASTBERT_MEMBER vfloat load(const T* p) const {
    return load_n(p, n);
  }
  template <typename T>
  FASTBERT_MEMBER void store(T* p, vfloat v) const {
    store_n(p, v, n);
  }
  FASTBERT_MEMBER vfloat keep(vfloat v) const {
    vint index;
    for (int i = 0; i < kLanes; ++i) index[i] = i;
    return index < static_cast<int32_t>(n) ? v : vfloat{};
  }
};

// body(j, i, lanes) for the vectors at j = 0, kLanes, ... of n elements; i < kUnroll numbers independent
// accumulators, without which a sum waits for one addition after another.
template <int kUnroll, typename Body>
FASTBERT_INLINE void sweep(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= n; j += kUnroll * kLanes)
    for (int i = 0; i < kUnroll; ++i) body(j + i * kLanes, i, AllLanes{});
  if (kUnroll > 1)
    for (; j + kLanes <= n; j += kLanes) body(j, 0, AllLanes{});
  if (j < n) body(j, 0, FirstLanes{n - j});
}

// ---- arithmetic --------------------------------------------------------------------------------------

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
