// Compiles csrc/cpu's branches for AVX-512 and AVX-512-BF16 into AVX2, so that a processor without AVX-512
// can test them: FASTBERT_EMULATE=1 has setup.py include this ahead of a kernel's source, see `make emulate`.
// GCC splits operations on vectors of 64 bytes in two; here are the intrinsics that the kernels use, each
// with the results that Intel's "Software Developer's Manual" gives it. Any other stops the compilation with
// "target specific option mismatch".
//
// What this cannot show: the code that GCC makes for AVX-512, its contractions to FMA and its errors
// included; faults of 64-byte moves that GCC makes itself (those of intrinsics do end the process); that the
// flags and the check at load time fit the processor; speed. Masks must be full where only full ones are
// used. Results differ from a processor's where the manual leaves them open: rcp14's digits, NaN's payload.
#pragma once
#include <immintrin.h>  // while the macros below are not defined: it would leave out its `target` pragmas
#include <stdint.h>
#include <string.h>

#define __AVX512F__ 1
#if defined(FASTBERT_EMULATE_BF16)
#define __AVX512BF16__ 1
#endif

namespace avx512_emulator {

#define EMULATED static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

__attribute__((error("not emulated: a mask that is not full, or another constant"))) void refuse();
EMULATED void require(bool known) {
  if (!known) refuse();
}

struct FloatHalves {
  __m256 low, high;
};
struct IntHalves {
  __m256i low, high;
};
EMULATED FloatHalves halves(__m512 v) { return __builtin_bit_cast(FloatHalves, v); }
EMULATED IntHalves halves(__m512i v) { return __builtin_bit_cast(IntHalves, v); }
EMULATED __m512 whole(__m256 low, __m256 high) { return __builtin_bit_cast(__m512, FloatHalves{low, high}); }
EMULATED __m512i whole(__m256i low, __m256i high) {
  return __builtin_bit_cast(__m512i, IntHalves{low, high});
}

// ---- where AVX2 has the same for each half

#define EMULATED_BY_HALVES(name, Vector, all)                                 \
  EMULATED Vector name(uint32_t mask, Vector a, Vector b) {                   \
    require(mask == all);                                                     \
    const auto x = halves(a), y = halves(b);                                  \
    return whole(_mm256_##name(x.low, y.low), _mm256_##name(x.high, y.high)); \
  }
EMULATED_BY_HALVES(max_ps, __m512, 0xFFFF)
EMULATED_BY_HALVES(min_ps, __m512, 0xFFFF)
EMULATED_BY_HALVES(mul_epu32, __m512i, 0xFF)
EMULATED_BY_HALVES(unpacklo_epi64, __m512i, 0xFF)
EMULATED_BY_HALVES(unpackhi_epi64, __m512i, 0xFF)

EMULATED __m512 sqrt_ps(uint32_t mask, __m512 a) {
  require(mask == 0xFFFF);
  return whole(_mm256_sqrt_ps(halves(a).low), _mm256_sqrt_ps(halves(a).high));
}

EMULATED __m512 cvtph_ps(uint32_t mask, __m256i a) {
  require(mask == 0xFFFF);
  return whole(_mm256_cvtph_ps(_mm256_extracti128_si256(a, 0)),
               _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}

EMULATED __m256i cvtps_ph(uint32_t mask, __m512 a, const int rounding) {
  require(mask == 0xFFFF);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves(a).high, rounding),
                          _mm256_cvtps_ph(halves(a).low, rounding));
}

EMULATED __m512i cvtepu16_epi32(uint32_t mask, __m256i a) {
  require(mask == 0xFFFF);
  return whole(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 0)),
               _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}

// ---- moves

EMULATED __m512i set1_epi8(char x) { return whole(_mm256_set1_epi8(x), _mm256_set1_epi8(x)); }
EMULATED __m512i set1_epi16(int16_t x) { return whole(_mm256_set1_epi16(x), _mm256_set1_epi16(x)); }
EMULATED __m512i set1_epi32(int32_t x) { return whole(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
EMULATED __m512i set1_epi64(int64_t x) { return whole(_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)); }

EMULATED __m512i load_si512(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
  __m512i v;
  memcpy(&v, p, sizeof v);
  return v;
}

EMULATED __m256i extracti64x4_epi64(uint32_t mask, __m512i a, const int half) {
  require(mask == 0xF);
  return half ? halves(a).high : halves(a).low;
}

EMULATED __m256i cvtepi32_epi16(uint32_t mask, __m512i a) {
  require(mask == 0xFFFF);
  const __m256i low = _mm256_and_si256(halves(a).low, _mm256_set1_epi32(0xFFFF));
  const __m256i high = _mm256_and_si256(halves(a).high, _mm256_set1_epi32(0xFFFF));
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
}

EMULATED __m512i permutexvar_epi16(uint32_t mask, __m512i places, __m512i a) {
  require(mask == 0xFFFFFFFF);
  uint16_t from[32], to[32], place[32];
  memcpy(from, &a, sizeof from), memcpy(place, &places, sizeof place);
  for (int i = 0; i < 32; ++i) to[i] = from[place[i] % 32];
  __m512i v;
  memcpy(&v, to, sizeof v);
  return v;
}

// ---- masks

EMULATED __m512i ones_where(uint32_t mask) {  // in 16 lanes
  const Words low = {1, 2, 4, 8, 16, 32, 64, 128}, bits = mask - Words{};
  return whole((__m256i)((bits & low) != 0), (__m256i)((bits & low << 8) != 0));
}

EMULATED __m512 mov_ps(uint32_t mask, __m512 a) { return (__m512)((__m512i)a & ones_where(mask)); }

EMULATED __m512i ternarylogic_epi64(__m512i a, __m512i b, __m512i c, const int truth) {
  require(truth == 0x96);
  return a ^ b ^ c;
}

EMULATED __m512i ternarylogic_epi32(__m512i a, uint32_t mask, __m512i b, __m512i c, const int truth) {
  require(truth == 0x96);
  return a ^ ((b ^ c) & ones_where(mask));
}

EMULATED uint64_t greater_epu8(__m256i a, __m256i b) {
  return static_cast<uint32_t>(_mm256_movemask_epi8((__m256i)((Bytes)a > (Bytes)b)));
}

EMULATED uint64_t cmpgt_epu8_mask(__m512i a, __m512i b) {
  const auto x = halves(a), y = halves(b);
  return greater_epu8(x.low, y.low) | greater_epu8(x.high, y.high) << 32;
}

EMULATED uint32_t greater_epu16(__m256i a, __m256i b) {
  return _pext_u32(_mm256_movemask_epi8((__m256i)((Shorts)a > (Shorts)b)), 0x55555555);
}

EMULATED uint32_t cmpgt_epu16_mask(__m512i a, __m512i b) {
  const auto x = halves(a), y = halves(b);
  return greater_epu16(x.low, y.low) | greater_epu16(x.high, y.high) << 16;
}

// ---- arithmetic

// a * 2^floor(b), rounded once: exact in double, where an exponent beyond 400 is as good as 400.
EMULATED float scalef(float a, float b) {
  if (a != a) return b == __builtin_inff() ? b : b == -__builtin_inff() ? 0.f : a;  // quiet NaN, that is
  if (b != b) return b;
  if (a == 0.f && b == __builtin_inff()) return __builtin_nanf("");
  if (__builtin_isinf(a) && b == -__builtin_inff()) return __builtin_nanf("");
  const double n = __builtin_floor(b < -400.f ? -400.f : b > 400.f ? 400.f : b);
  return static_cast<float>(a * __builtin_bit_cast(double, (static_cast<int64_t>(n) + 1023) << 52));
}

EMULATED __m512 scalef_ps(uint32_t mask, __m512 a, __m512 b) {
  require(mask == 0xFFFF);
  for (int i = 0; i < 16; ++i) a[i] = scalef(a[i], b[i]);
  return a;
}

// a - floor(a) rounded downwards like the floor: below 1 for a small negative a, -0 for whole a, 0 for inf.
EMULATED __m256 reduce(__m256 a) {
  const Floats floor = _mm256_floor_ps(a), nearest = a - floor;
  const Floats down = (Floats)((Ints)nearest + (nearest + floor > a));
  const Floats result = down == 0.f ? -Floats{} : down;
  return (Ints)a << 1 == static_cast<int32_t>(0xFF000000) ? Floats{} : result;
}

EMULATED __m512 reduce_ps(uint32_t mask, __m512 a, const int rounding) {
  require(mask == 0xFFFF && rounding == _MM_FROUND_TO_NEG_INF);
  return whole(reduce(halves(a).low), reduce(halves(a).high));
}

// 1 / a with 13 bits behind the point: as far off as 2^-14 allows (and float32 rounds), on either side, and
// right for powers of 2.
EMULATED __m256 rcp14(__m256 a) {
  const Floats exact = 1.f / (Floats)a;
  const Words bits = (Words)exact, rounded = (bits + 0x1FF + (bits >> 10 & 1)) & ~0x3FFu;
  return exact == exact ? (Floats)rounded : exact;
}

EMULATED __m512 rcp14_ps(uint32_t mask, __m512 a) {
  require(mask == 0xFFFF);
  return whole(rcp14(halves(a).low), rcp14(halves(a).high));
}

// ---- bfloat16, where subnormal numbers count as 0, whatever MXCSR says

EMULATED Floats flushed(Floats a) {
  const Words magnitude = (Words)a & 0x7FFFFFFF;
  return magnitude < 0x00800000 ? (Floats)((Words)a & 0x80000000) : a;
}

// Of each word the upper half, rounded to nearest, ties to even, in the lower.
EMULATED __m256i upper(__m256 a) {
  const Floats finite = flushed(a);
  const Words bits = (Words)finite;
  const Words rounded = bits + 0x7FFF + (bits >> 16 & 1), quiet = bits | 0x00400000;
  return (__m256i)((finite == finite ? rounded : quiet) >> 16);
}

EMULATED __m256bh cvtneps_pbh(__m512 a) {
  return (__m256bh)cvtepi32_epi16(0xFFFF, whole(upper(halves(a).low), upper(halves(a).high)));
}

EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  return (__m512bh)whole((__m256i)cvtneps_pbh(low), (__m256i)cvtneps_pbh(high));
}

// The upper elements' product first. A product of two bfloat16 is exact in float32, so that it does not
// matter whether each addition is fused, except beyond the exponents.
EMULATED __m256 dpbf16(__m256 sum, __m256i a, __m256i b) {
  const auto high = [](__m256i pair) { return flushed((Floats)((Words)pair & 0xFFFF0000)); };
  const auto low = [](__m256i pair) { return flushed((Floats)((Words)pair << 16)); };
  const Floats once = flushed(_mm256_fmadd_ps(high(a), high(b), flushed(sum)));
  return flushed(_mm256_fmadd_ps(low(a), low(b), once));
}

EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = halves((__m512i)a), y = halves((__m512i)b);
  return whole(dpbf16(halves(sum).low, x.low, y.low), dpbf16(halves(sum).high, x.high, y.high));
}

#undef EMULATED
#undef EMULATED_BY_HALVES

}  // namespace avx512_emulator

#define _mm512_cmpgt_epu8_mask avx512_emulator::cmpgt_epu8_mask
#define _mm512_cmpgt_epu16_mask avx512_emulator::cmpgt_epu16_mask
#define _mm512_cvtne2ps_pbh avx512_emulator::cvtne2ps_pbh
#define _mm512_cvtneps_pbh avx512_emulator::cvtneps_pbh
#define _mm512_dpbf16_ps avx512_emulator::dpbf16_ps
#define _mm512_load_si512 avx512_emulator::load_si512
#define _mm512_mask_ternarylogic_epi32 avx512_emulator::ternarylogic_epi32
#define _mm512_maskz_cvtepi32_epi16 avx512_emulator::cvtepi32_epi16
#define _mm512_maskz_cvtepu16_epi32 avx512_emulator::cvtepu16_epi32
#define _mm512_maskz_cvtph_ps avx512_emulator::cvtph_ps
#define _mm512_maskz_cvtps_ph avx512_emulator::cvtps_ph
#define _mm512_maskz_extracti64x4_epi64 avx512_emulator::extracti64x4_epi64
#define _mm512_maskz_max_ps avx512_emulator::max_ps
#define _mm512_maskz_min_ps avx512_emulator::min_ps
#define _mm512_maskz_mov_ps avx512_emulator::mov_ps
#define _mm512_maskz_mul_epu32 avx512_emulator::mul_epu32
#define _mm512_maskz_permutexvar_epi16 avx512_emulator::permutexvar_epi16
#define _mm512_maskz_rcp14_ps avx512_emulator::rcp14_ps
#define _mm512_maskz_reduce_ps avx512_emulator::reduce_ps
#define _mm512_maskz_scalef_ps avx512_emulator::scalef_ps
#define _mm512_maskz_sqrt_ps avx512_emulator::sqrt_ps
#define _mm512_maskz_unpackhi_epi64 avx512_emulator::unpackhi_epi64
#define _mm512_maskz_unpacklo_epi64 avx512_emulator::unpacklo_epi64
#define _mm512_set1_epi8 avx512_emulator::set1_epi8
#define _mm512_set1_epi16 avx512_emulator::set1_epi16
#define _mm512_set1_epi32 avx512_emulator::set1_epi32
#define _mm512_set1_epi64 avx512_emulator::set1_epi64
#define _mm512_ternarylogic_epi64 avx512_emulator::ternarylogic_epi64
