// Memory that a kernel works in: each source file with this header has a piece of its own for each thread,
// which is freed with the thread.
#pragma once
#include <stdio.h>
#include <stdlib.h>

#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

struct KeptMemory {
  uint32_t* memory;
  int64_t words;
  ~KeptMemory() { free(memory); }
};

}  // namespace

// In a function: of a variable template GCC 12 would not call the destructor.
template <int owner>
static KeptMemory& kept_memory() {
  static thread_local KeptMemory kept = {nullptr, 0};
  return kept;
}

// Memory of this thread, kept for its next call: taking it anew would cost page faults at every layer.
template <int owner>
class ScratchOf {
 public:
  explicit ScratchOf(int64_t words) {
    KeptMemory& kept = kept_memory<owner>();
    if (words > kept.words) {
      free(kept.memory);
      kept.words = 0;
      kept.memory = static_cast<uint32_t*>(aligned_alloc(4096, ceil_div(words, 1024) * 4096));
      if (!kept.memory) {
        fprintf(stderr, "fastbert: a kernel could not allocate %lld bytes\n",
                static_cast<long long>(words * 4));
        abort();
      }
      kept.words = words;
    }
    memory_ = kept.memory;
  }

  uint32_t* words(int64_t n) {
    uint32_t* place = memory_ + used_;
    used_ += ceil_div(n, 16) * 16;
    return place;
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(words(n)); }

 private:
  uint32_t* memory_;
  int64_t used_ = 0;
};

using Scratch = ScratchOf<0>;      // for one task
using CallScratch = ScratchOf<1>;  // for a call, seen by all of its threads

}  // namespace FASTBERT_ISA
}  // namespace fastbert
