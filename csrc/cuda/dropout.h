// What dropout keeps, by the contract that all devices share (fastbert/ops/philox.py): one call of Philox
// serves eight neighbours by 16-bit lanes, or sixteen by bytes, and an element is kept where its lane >= t.
//
// What is kept comes as bits, of which the compiler makes predicates again.
#pragma once
#include "../philox.h"
#include "reduce.h"

namespace fastbert {

// Bit i: whether the i-th of the neighbours that share a counter is kept; kBits are a lane's, kLaneBits or
// kAttentionLaneBits.
// 1 <= t <= 2^kBits, and the greatest keeps nothing.
template <int kBits>
DEVICE uint32_t kept_bits(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t t) {
  constexpr int kPerWord = 32 / kBits;
  const uint32_t counter[4] = {c0, c1, c2, c3};
  uint32_t words[4], kept = 0;
  philox4x32(seed, counter, words);
  // Lanes are compared at the top of a word, where whatever lies below them does not matter: lane > t - 1.
  const uint32_t dropped = ((t - 1) << (32 - kBits)) | ((1u << (32 - kBits)) - 1);
#pragma unroll
  for (int i = 0; i < 4 * kPerWord; ++i) {
    const uint32_t lane_on_top = words[i / kPerWord] << (kBits * (kPerWord - 1 - i % kPerWord));
    kept |= static_cast<uint32_t>(lane_on_top > dropped) << i;
  }
  return kept;
}

// ---- of a row: layer_norm's and dropout's contract ----------------------------------------------------

constexpr int kPerCall = 8;  // columns of a row that one call serves

// Bit i: whether column 8 * group + i of the row is kept.
DEVICE uint32_t kept_of_row(uint64_t seed, int64_t row, int group, uint32_t t) {
  return kept_bits<kLaneBits>(seed, static_cast<uint32_t>(group), static_cast<uint32_t>(row), 0, 0, t);
}

// What a warp keeps of 256 neighbours, of which `kept_of_row` gave lane l the l-th eight: a lane's own, when
// it takes kVector neighbours in each of 8 / kVector steps. Bit j is its j-th of step i. All lanes call it.
template <int kVector>
DEVICE uint32_t kept_in_step(uint32_t kept, int i) {
  static_assert(kVector <= kPerCall, "a lane takes at most the eight of one call");
  if constexpr (kVector == kPerCall) return kept;
  const int place = (i * kWarp + lane_of_warp()) * kVector;
  return __shfl_sync(kAllLanes, kept, place / kPerCall) >> (place % kPerCall);
}

}  // namespace fastbert
