// target [H, T] = source [T, H] transposed, float32: what a product that sums over rows wants its operand to
// be.
//
// Blocks of whole cache lines both ways, each through squares in registers.
#include "transpose.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kBlock = 64;  // rows and columns of a block: 16 KB read and 16 KB written, which L1 holds

void transpose(const Transpose& p) {
  const int64_t downwards = ceil_div(p.rows, kBlock), across = ceil_div(p.columns, kBlock);
#pragma omp parallel for num_threads(p.launch) schedule(static)
  for (int64_t block = 0; block < downwards * across; ++block) {
    const int64_t top = block % downwards * kBlock, left = block / downwards * kBlock;
    const int64_t bottom = min(p.rows, top + kBlock), right = min(p.columns, left + kBlock);
    for (int64_t i = top; i < bottom; i += kLanes)
      for (int64_t j = left; j < right; j += kLanes) {
        const uint32_t* source = p.source + i * p.row + j;
        uint32_t* target = p.target + j * p.rows + i;
        const int64_t m = min(kLanes, bottom - i), n = min(kLanes, right - j);
        if (m == kLanes && n == kLanes) {
          transpose(source, p.row, target, p.rows);
          continue;
        }
        for (int64_t b = 0; b < n; ++b)
          for (int64_t a = 0; a < m; ++a) target[b * p.rows + a] = source[a * p.row + b];
      }
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
