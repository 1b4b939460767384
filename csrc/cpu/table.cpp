// The addresses of one instruction set's kernels.
#include "dropout.h"

namespace fastbert {
namespace FASTBERT_ISA {

void gelu_forward(const Gelu&);
void gelu_backward(const Gelu&);
void layer_norm_forward(const LayerNorm&);
void layer_norm_backward(const LayerNorm&);
void cross_entropy_forward(const CrossEntropy&);
void cross_entropy_backward(const CrossEntropy&);
void attention_forward(const Attention&);
void attention_backward(const Attention&);
void linear_product(const LinearProduct&);
void linear_pack(const LinearProduct&);
int64_t linear_packed(int64_t depth, int64_t columns);
void transpose(const Transpose&);
int64_t lazy_adam_steps(const LazyAdam* steps, int64_t count, int threads);
int64_t lazy_adam_replay(const LazyAdamReplay&);

// One counter through the same vectors that dropout uses, for the known-answer test.
static void philox(uint64_t seed, const uint32_t counter[4], uint32_t words[4]) {
  uint16_t lanes[kDropoutBlock];
  dropout_lanes(seed, counter[0], counter[1], counter[2], counter[3], 1, lanes);
  memcpy(words, lanes, 16);
}

extern const Kernels kernels;
const Kernels kernels = {
    gelu_forward,           gelu_backward,     layer_norm_forward, layer_norm_backward, cross_entropy_forward,
    cross_entropy_backward, attention_forward, attention_backward, linear_product,      linear_pack,
    linear_packed,          transpose,         lazy_adam_steps,    lazy_adam_replay,    philox};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
