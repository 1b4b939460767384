// How much scratch layer_norm_backward needs: blocks leave their sums of dweight, dbias and, where there was
// an x_bias, of its gradient there. The number of blocks follows from the shape alone, so that the bits of a
// result are the same on every GPU.
#pragma once
#include "../contract.h"
#include "column_parts.h"

namespace fastbert::cuda {

constexpr int kLayerNormBlocks = 264;      // two on each multiprocessor of an H100 or H200
constexpr int kLayerNormRegisters = 4096;  // columns of a row that the registers of a block hold, at most

// Of rows that registers do not hold.
constexpr int64_t layer_norm_long_parts(int64_t rows) {
  const int64_t parts = (rows + 31) / 32;
  return parts < 64 ? parts : 64;
}

// Of blocks that are done, at most: of groups of parts, or of columns side by side where rows are long.
constexpr int64_t layer_norm_counters(int64_t columns) {
  const int64_t groups = 1 + sum_groups(kLayerNormBlocks), across = (columns + 31) / 32;
  return across < groups ? groups : across;
}

// Floats.
constexpr int64_t layer_norm_scratch(int64_t rows, int64_t columns, bool with_x_bias) {
  const int64_t blocks = rows < kLayerNormBlocks ? rows : kLayerNormBlocks;
  const int64_t parts = columns <= kLayerNormRegisters ? blocks : layer_norm_long_parts(rows);
  return (with_x_bias ? 3 : 2) * parts * part_stride(columns) + layer_norm_counters(columns);
}

}  // namespace fastbert::cuda
