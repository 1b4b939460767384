// target[j, i] = source[i, j]: what a product that sums over rows wants its operand to be.
//
// Blocks of whole cache lines both ways, each through squares of words in registers. A word is an element of
// four bytes, or two of two bytes, one below the other.
#include "matmul.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kBlock = 64;  // rows and columns: at most 16 KB read and 16 KB written, which L1 holds

// A square of kLanes words; T's strides in elements, whole words in the target.
FASTBERT_INLINE void transpose_words(const uint32_t* source, int64_t row, uint32_t* target,
                                     int64_t target_row) {
  transpose(source, row, target, target_row);
}

FASTBERT_INLINE void transpose_words(const uint16_t* source, int64_t row, uint16_t* target,
                                     int64_t target_row) {
  uint32_t words[kLanes * kLanes];
  for (int i = 0; i < kLanes; ++i, source += 2 * row) {
    const vuint pair = widen(source) | widen(source + row) << 16;
    memcpy(words + i * kLanes, &pair, sizeof pair);
  }
  transpose(words, kLanes, reinterpret_cast<uint32_t*>(target), target_row / 2);
}

template <typename T>
static void transpose_all(const Transpose& p) {
  constexpr int64_t height = kLanes * 4 / static_cast<int64_t>(sizeof(T));  // rows of a square of words
  const int64_t downwards = ceil_div(p.rows, kBlock), across = ceil_div(p.columns, kBlock);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t block = 0; block < downwards * across; ++block) {
    const int64_t top = block % downwards * kBlock, left = block / downwards * kBlock;
    const int64_t bottom = min(p.rows, top + kBlock), right = min(p.columns, left + kBlock);
    for (int64_t i = top; i < bottom; i += height)
      for (int64_t j = left; j < right; j += kLanes) {
        const T* source = static_cast<const T*>(p.source) + i * p.row + j;
        T* target = static_cast<T*>(p.target) + j * p.target_row + i;
        const int64_t m = min(height, bottom - i), n = min(kLanes, right - j);
        if (m == height && n == kLanes) {
          transpose_words(source, p.row, target, p.target_row);
          continue;
        }
        for (int64_t b = 0; b < n; ++b)
          for (int64_t a = 0; a < m; ++a) target[b * p.target_row + a] = source[a * p.row + b];
      }
  }
}

void transpose(const Transpose& p) {
  if (p.dtype == DType::f32)
    transpose_all<uint32_t>(p);
  else
    transpose_all<uint16_t>(p);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
