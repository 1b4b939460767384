// Rows [n, size] of any type become 32-bit words, in the order in which a matrix product reads them, and sums
// become rows again. `source` has rows `stride` elements apart. Words is Floats or Pairs, see matmul.h.
#pragma once
#include "load_store.h"
#include "transpose.h"

namespace fastbert {
namespace FASTBERT_ISA {

// Rows of packed blocks are not a power of two apart, where they would share a few sets of the cache.
FASTBERT_INLINE constexpr int64_t row_of(int64_t n) { return round_up(n, kLanes) + 16; }

// n rows of `width` words with `size` elements in order, the rest 0; width is a multiple of kLanes.
template <typename Words, typename T>
FASTBERT_INLINE void pack_rows(const T* source, int64_t stride, int64_t n, int64_t size, uint32_t* target,
                               int64_t width) {
  for (int64_t i = 0; i < n; ++i, source += stride, target += width) {
    if constexpr (Words::kDepth == 2) {
      const int64_t words = size / 2, whole = words - words % kLanes;
      for (int64_t d = 0; d < whole; d += kLanes) memcpy(target + d, source + 2 * d, sizeof(vuint));
      if (whole < width) {
        memset(target + whole, 0, (width - whole) * 4);
        memcpy(target + whole, source + 2 * whole, (size - 2 * whole) * sizeof(T));
      }
    } else {
      float* row = reinterpret_cast<float*>(target);
      int64_t d = 0;
      for (; d + kLanes <= size; d += kLanes) store(row + d, load(source + d));
      if (d < size) store(row + d, load_n(source + d, size - d));
    }
  }
}

// Words of rows with the row in the lanes: [width, round_up(n, kLanes)], `row` words apart; 0 behind the last
// row. `part` is room for kLanes rows. Where rows are less than n rounded up apart, the last lanes are
// written first and what they cover of the next row is written after them.
template <typename Words, typename T>
FASTBERT_INLINE void pack_columns(const T* source, int64_t stride, int64_t n, int64_t size, uint32_t* target,
                                  int64_t row, int64_t width, uint32_t* part) {
  for (int64_t i = round_up(n, kLanes) - kLanes; i >= 0; i -= kLanes) {
    const int64_t rows = min(kLanes, n - i);
    const bool as_they_are = sizeof(T) == sizeof(uint32_t) && rows == kLanes && size == width;
    const uint32_t* words = as_they_are ? reinterpret_cast<const uint32_t*>(source + i * stride) : part;
    if (!as_they_are) {
      pack_rows<Words>(source + i * stride, stride, rows, size, part, width);
      memset(part + rows * width, 0, (kLanes - rows) * width * 4);
    }
    const int64_t between = as_they_are ? stride : width;
    for (int64_t d = 0; d < width; d += kLanes) transpose(words + d, between, target + d * row + i, row);
  }
}

// Rows as the right operand of a sum over rows: words [ceil(n / depth), columns], columns = size rounded
// up to lanes.
template <typename Words, typename T>
FASTBERT_INLINE void pack_summed(const T* source, int64_t stride, int64_t n, int64_t size, uint32_t* target,
                                 int64_t columns) {
  if constexpr (Words::kDepth == 1) {
    pack_rows<Words>(source, stride, n, size, target, columns);
  } else {
    for (int64_t i = 0; i < n; i += 2, source += 2 * stride, target += columns)
      for (int64_t d = 0; d < columns; d += kLanes) {
        const int64_t left = size - d;
        const auto bits = [&](const T* p) { return as_uint(left >= kLanes ? load(p) : load_n(p, left)); };
        const vuint pair = bits(source + d) >> 16 | (i + 1 < n ? bits(source + stride + d) : vuint{});
        memcpy(target + d, &pair, sizeof pair);
      }
  }
}

// `size` elements, times scale, as others.
template <typename T, typename From>
FASTBERT_INLINE void store_row(T* target, const From* row, int64_t size, float scale) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(target + d, load(row + d) * scale);
  if (d < size) store_n(target + d, load(row + d) * scale, size - d);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
