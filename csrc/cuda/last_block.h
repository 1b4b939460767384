// How the last block of a launch to be done finds out that it is: a block adds one to a counter of which it
// is told how many blocks there are. A result that all blocks have a part in is so finished by the kernel
// that made the parts, without a second launch.
//
// Counters are 0 before a launch and, set back by the last block itself, after it. Those of a launch are a
// set of its own stream, or where a graph is captured of that graph and stream: so kernels that may run at
// the same time never share one, and no kernel is spent on zeros. A launch that needs more counters than a
// set has, and any stream beyond the number of sets, has counters in its scratch, which a kernel zeroes
// before.
#pragma once
#include "launch.h"

namespace fastbert::cuda {

constexpr int kCounterSets = 1024, kCountersOfSet = 64, kZeroThreads = 256;

// The set of a stream as it is now; kCounterSets where none is left.
int counter_set(void* stream);

namespace {

__device__ uint32_t kept_counters[kCounterSets][kCountersOfSet];

// Of one launch; what a kernel takes.
struct Counters {
  uint32_t* own;  // in scratch; null: those of the set
  int set;

  DEVICE uint32_t* at(int i) const { return own ? own + i : &kept_counters[set][i]; }
};

template <class T>
__global__ void __launch_bounds__(kZeroThreads) zero_kernel(T* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kZeroThreads + threadIdx.x;
  if (i < count) values[i] = T(0.f);
}

template <class T>
int zero(const char* name, T* values, int64_t count, void* stream) {
  if (count == 0) return 0;
  const int64_t blocks = (count + kZeroThreads - 1) / kZeroThreads;
  return launch(name, zero_kernel<T>, blocks, kZeroThreads, 0, stream, values, count);
}

// Counters for a launch; `scratch` has room for so many.
inline int take_counters(const char* name, int64_t count, float* scratch, void* stream, Counters* counters) {
  const int set = count <= kCountersOfSet ? counter_set(stream) : kCounterSets;
  if (set < kCounterSets) {
    *counters = {nullptr, set};
    return 0;
  }
  *counters = {reinterpret_cast<uint32_t*>(scratch), 0};
  return zero(name, counters->own, count, stream);
}

// Called by all threads of a block. Whether it is the last of so many at this counter: then its threads see
// what the others wrote before.
DEVICE bool is_last_block(uint32_t* counter, uint32_t blocks) {
  __syncthreads();
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(counter, blocks - 1) == blocks - 1;  // which makes it 0
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

}  // namespace
}  // namespace fastbert::cuda
