// Squares of 32-bit words, transposed in registers.
#pragma once
#include <utility>

#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

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

// A square of kLanes x kLanes words: source[i * from + j] -> target[j * to + i]. Halves are zipped
// log2(kLanes) times.
FASTBERT_INLINE void transpose(const uint32_t* source, int64_t from, uint32_t* target, int64_t to) {
  vuint rows[kLanes], zipped[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) memcpy(&rows[i], source + i * from, sizeof(vuint));
#pragma GCC unroll 4
  for (int width = 1; width < kLanes; width *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip_first(rows[i], rows[i + kLanes / 2]);
      zipped[2 * i + 1] = zip_second(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) memcpy(target + i * to, &rows[i], sizeof(vuint));
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
