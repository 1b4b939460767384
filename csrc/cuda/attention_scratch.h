// How much scratch attention_backward needs: of each query and head what both of its kernels for long
// sequences read, lse and delta. For host compilers too.
#pragma once
#include <cstdint>

namespace fastbert::cuda {

// Floats.
constexpr int64_t attention_scratch(int64_t tokens, int64_t heads, int64_t /* head_size */) {
  return 2 * tokens * heads;
}

}  // namespace fastbert::cuda
