// Memory that a kernel works in, a piece of its own for each thread.
#pragma once
#include <stdio.h>
#include <stdlib.h>

#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

template <int owner>
static thread_local uint32_t* scratch_memory = nullptr;
template <int owner>
static thread_local int64_t scratch_words = 0;

// Memory of this thread, kept for its next call: taking it anew would cost page faults at every layer.
template <int owner>
class ScratchOf {
 public:
  explicit ScratchOf(int64_t words) {
    if (words <= scratch_words<owner>) return;
    free(scratch_memory<owner>);
    scratch_memory<owner> = static_cast<uint32_t*>(aligned_alloc(4096, ceil_div(words, 1024) * 4096));
    if (!scratch_memory<owner>) {
      fprintf(stderr, "fastbert: a kernel could not allocate %lld bytes\n",
              static_cast<long long>(words * 4));
      abort();
    }
    scratch_words<owner> = words;
  }

  uint32_t* words(int64_t n) {
    uint32_t* place = scratch_memory<owner> + used_;
    used_ += ceil_div(n, 16) * 16;
    return place;
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(words(n)); }

 private:
  int64_t used_ = 0;
};

using Scratch = ScratchOf<0>;      // for one task
using CallScratch = ScratchOf<1>;  // for a call, seen by all of its threads

}  // namespace FASTBERT_ISA
}  // namespace fastbert
