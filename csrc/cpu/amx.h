// AMX: eight registers per thread, tiles of 16 rows x 64 bytes, and a product of tiles of bf16 pairs. Intel,
// "Architecture Instruction Set Extensions Programming Reference", chapter 3. Written as instructions: the
// intrinsics of GCC take a tile's number as a literal only, which rules out templates over it.
#pragma once
#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

#if defined(__AMX_BF16__)

constexpr int kTile = 16;  // rows of a tile, and 32-bit words of a row

// Tiles belong to a thread: between these two calls it may use them. Afterwards the system need not keep
// their 8 KiB when it switches threads.
FASTBERT_INLINE void tiles_begin() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
  } config;
  static_assert(sizeof config == 64);
  asm volatile("ldtilecfg %0" ::"m"(config));
}

FASTBERT_INLINE void tiles_end() { asm volatile("tilerelease"); }

template <int tile>
FASTBERT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// Rows of 16 words, `row` words apart.
template <int tile>
FASTBERT_INLINE void tile_load(const void* words, int64_t row) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(words), "r"(row * 4) : "memory");
}

template <int tile>
FASTBERT_INLINE void tile_store(float* values, int64_t row) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(values), "r"(row * 4) : "memory");
}

// c[m, n] += a[m, k] . b[k, n], where words of a and b are pairs of bf16.
template <int c, int a, int b>
FASTBERT_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

FASTBERT_INLINE void tiles_begin() {}
FASTBERT_INLINE void tiles_end() {}

#endif

}  // namespace FASTBERT_ISA
}  // namespace fastbert
