// How much scratch attention_backward needs: of each query and head what both of its kernels for long
// sequences read, lse and delta. For host compilers too.
#pragma once
#include <cstdint>

namespace fastbert::cuda {

// Floats.
constexpr int64_t attention_scratch(int64_t tokens, int64_t heads, int64_t /* head_size */) {
  return 2 * tokens * heads;
}

// Of hard_attention_backward: what one of its kernels leaves for the other, delta of each query and head.
constexpr int64_t hard_attention_scratch(int64_t tokens, int64_t heads) { return tokens * heads; }

// Of attention_distillation: the sum of squares of each query and head.
constexpr int64_t attention_distillation_scratch(int64_t tokens, int64_t heads) { return tokens * heads; }

}  // namespace fastbert::cuda
