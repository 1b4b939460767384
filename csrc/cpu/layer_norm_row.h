// What the kernels that normalize rows share: sums over a row in blocks, and the next row prefetched.
#pragma once
#include "reduce.h"
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kColumns = 256;  // of a block: summed by itself, its random numbers drawn before it is read
constexpr int kSums = 4;           // sums of a block side by side

// The next row is prefetched while this one is swept from L1. With AVX2 that takes 10 % off LayerNorm; with
// AVX-512 it cost time.
constexpr bool kPrefetch = kLanes < 16;

// Whether the i-th vector of a sweep is to prefetch a line of 64 bytes.
template <typename T>
FASTBERT_INLINE bool prefetches(int i) {
  constexpr int vectors = 64 / (kLanes * static_cast<int>(sizeof(T)));
  return kPrefetch && i % (vectors > 1 ? vectors : 1) == 0;
}

// What a row reads, of type E, and writes, of type T, from element `at` on; null where there is nothing.
template <typename T, typename E = T>
struct RowsAhead {
  const void *read, *also_read;
  void *written, *also_written;

  FASTBERT_MEMBER void prefetch(int64_t at) const {
    __builtin_prefetch(static_cast<const E*>(read) + at);
    if (also_read) __builtin_prefetch(static_cast<const E*>(also_read) + at);
    __builtin_prefetch(static_cast<T*>(written) + at, 1);
    if (also_written) __builtin_prefetch(static_cast<T*>(also_written) + at, 1);
  }
};

FASTBERT_INLINE vfloat add_up(const vfloat* sums) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// The sum of a block of at most kColumns.
template <typename T>
FASTBERT_INLINE vfloat sum_block(const T* z, int64_t n) {
  vfloat sums[kSums] = {};
  sweep<kSums>(n, [&](int64_t j, int i, auto lanes) FASTBERT_LAMBDA { sums[i] += lanes.load(z + j); });
  return add_up(sums);
}

// The sum of a row's squared deviations.
template <typename T, typename E>
FASTBERT_INLINE float sum_squares(const T* z, int64_t columns, float mean, const RowsAhead<T, E>& ahead,
                                  int64_t ahead_at) {
  vfloat total = {};
  for (int64_t first = 0; first < columns; first += kColumns) {
    vfloat sums[kSums] = {};
    sweep<kSums>(min(kColumns, columns - first), [&](int64_t j, int i, auto lanes) FASTBERT_LAMBDA {
      if (prefetches<E>(i)) ahead.prefetch(ahead_at + first + j);
      const vfloat d = lanes.keep(lanes.load(z + first + j) - mean);
      sums[i] += d * d;
    });
    total += add_up(sums);
  }
  return reduce_add(total);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
