// The size of the scratch of column_sums.h, for host compilers too.
#pragma once
#include <cstdint>

namespace fastbert::cuda {

constexpr int kSumColumns = 16;    // of which parts are multiples: 64 bytes, two sectors
constexpr int kPartsOfGroup = 16;  // that a block adds up: the root of 264, of as many blocks as a GPU has

// Floats of one part.
constexpr int64_t part_stride(int64_t columns) {
  return (columns + kSumColumns - 1) / kSumColumns * kSumColumns;
}

constexpr int sum_groups(int64_t parts) {
  return static_cast<int>((parts + kPartsOfGroup - 1) / kPartsOfGroup);
}

}  // namespace fastbert::cuda
