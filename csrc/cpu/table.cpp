// The addresses of one instruction set's kernels.
#include "dropout.h"

namespace fastbert {
namespace FASTBERT_ISA {

#define FASTBERT_DECLARE(Result, name, Arguments) Result name(const Arguments&);
FASTBERT_FOR_EACH_KERNEL(FASTBERT_DECLARE)
#undef FASTBERT_DECLARE
int64_t linear_packed(int64_t depth, int64_t columns);
int64_t lazy_adam_steps(const LazyAdamStep* steps, int64_t count, int64_t launch);

// One counter through the same vectors that dropout uses, for the known-answer test.
static void philox(uint64_t seed, const uint32_t counter[4], uint32_t words[4]) {
  uint16_t lanes[kDropoutBlock<uint16_t>];
  dropout_lanes(seed, counter[0], counter[1], counter[2], counter[3], 1, lanes);
  memcpy(words, lanes, 16);
}

extern const Kernels kernels;
#define FASTBERT_ADDRESS(Result, name, Arguments) name,
const Kernels kernels = {FASTBERT_FOR_EACH_KERNEL(FASTBERT_ADDRESS) linear_packed, lazy_adam_steps, philox};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
