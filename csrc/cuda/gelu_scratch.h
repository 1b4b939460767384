// How the backward pass of gelu is cut, which the size of its scratch follows from; for host compilers too.
#pragma once
#include "column_parts.h"

namespace fastbert::cuda {

constexpr int kGeluBackwardWarps = 8;         // of a block; each takes rows of its own
constexpr int64_t kGeluBackwardBlocks = 396;  // three on each multiprocessor of an H100 or H200

// Into how many parts the rows are cut where dbias is wanted: enough for all multiprocessors, and each warp
// at least eight rows. It follows from the shape alone, so that dbias is the same on every GPU.
constexpr int64_t gelu_parts(int64_t rows, int64_t columns) {
  const int64_t column_blocks = (columns + 255) / 256, rows_of_part = 8 * kGeluBackwardWarps;
  const int64_t wanted = (kGeluBackwardBlocks + column_blocks - 1) / column_blocks;
  const int64_t most = (rows + rows_of_part - 1) / rows_of_part;
  return most < wanted ? most : wanted;
}

// Floats, with counters of blocks that are done: one for each block of columns, of 32 or more.
constexpr int64_t gelu_scratch(int64_t rows, int64_t columns) {
  return gelu_parts(rows, columns) * part_stride(columns) + (columns + 31) / 32;
}

}  // namespace fastbert::cuda
