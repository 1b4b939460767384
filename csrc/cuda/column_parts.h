// The size of the scratch of column_sums.h, for host compilers too.
#pragma once
#include <cstdint>

namespace fastbert::cuda {

constexpr int kSumColumns = 16;  // that a block adds up: 64 bytes of each part, two sectors

// Floats of one part, so that all of a block's columns are there.
constexpr int64_t part_stride(int64_t columns) {
  return (columns + kSumColumns - 1) / kSumColumns * kSumColumns;
}

}  // namespace fastbert::cuda
