// How a kernel reports an id or a bound that it cannot use; see kernels.h.
#pragma once
#include "launch.h"
//
#include "kernels.h"
#include "ptx.h"

namespace fastbert::cuda {

// `place` is the id's own, from 0. Any thread may call it, and of several one remains.
DEVICE void raise_fault(int32_t* words, Fault fault, int64_t place CALLED_FROM) {
  constexpr int64_t kLargest = 0x7FFFFFFF;
  const int32_t word = static_cast<int32_t>(place < kLargest ? place + 1 : kLargest);
#if defined(__CUDACC__)
  if (words) store_relaxed(words + fault, word);
#else
  if (words) fastbert::store_relaxed(words + fault, word, from);
#endif
}

}  // namespace fastbert::cuda
