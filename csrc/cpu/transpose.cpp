// target [H, T] = source [T, H] transposed, float32: what a product that sums over rows wants its operand to
// be.
//
// Blocks of whole cache lines both ways, each through squares in registers.
#include "transpose.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kBlock = 64;  // rows and columns of a block: 16 KB read and 16 KB written, which L1 holds

// m rows and n columns, up to kLanes of either.
static void transpose_part(const uint32_t* source, int64_t from, uint32_t* target, int64_t to, int64_t m,
                           int64_t n) {
  if (m == kLanes && n == kLanes) return transpose(source, from, target, to);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) target[j * to + i] = source[i * from + j];
}

void transpose(const Transpose& p) {
  const int64_t downwards = ceil_div(p.rows, kBlock), across = ceil_div(p.columns, kBlock);
#pragma omp parallel for num_threads(p.launch) schedule(static)
  for (int64_t block = 0; block < downwards * across; ++block) {
    const int64_t top = block % downwards * kBlock, left = block / downwards * kBlock;
    const int64_t bottom = min(p.rows, top + kBlock), right = min(p.columns, left + kBlock);
    for (int64_t i = top; i < bottom; i += kLanes)
      for (int64_t j = left; j < right; j += kLanes)
        transpose_part(p.source + i * p.row + j, p.row, p.target + j * p.rows + i, p.rows,
                       min(kLanes, bottom - i), min(kLanes, right - j));
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
