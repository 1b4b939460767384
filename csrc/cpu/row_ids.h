// Rows of a table named by id.
#pragma once
#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

// The position of the first id outside a table of so many rows, -1 if there is none.
FASTBERT_INLINE int64_t first_outside(const int64_t* ids, int64_t n, int64_t table_rows) {
  const auto rows = static_cast<uint64_t>(table_rows);
  int64_t many = 0;
  for (int64_t i = 0; i < n; ++i) many += static_cast<uint64_t>(ids[i]) >= rows;
  for (int64_t i = 0; many > 0; ++i)
    if (static_cast<uint64_t>(ids[i]) >= rows) return i;
  return -1;
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
