// Gumbel noise for hard attention's scores, in the tiles of attention_plain_tiles.h; csrc/cpu/gumbel.h has
// the contract. One call of Philox serves four neighbouring keys of a query.
#pragma once
#include "launch.h"
//
#include "../philox.h"
#include "attention_plain_work.h"

namespace fastbert::cuda {
namespace {

struct GumbelWords {
  uint32_t words[4];
};

// Of the keys 4 * group to 4 * group + 3.
DEVICE GumbelWords gumbel_words(uint64_t seed, int group, int token, int head) {
  const uint32_t counter[4] = {static_cast<uint32_t>(group), static_cast<uint32_t>(token),
                               static_cast<uint32_t>(head), 3};
  GumbelWords drawn;
  philox4x32(seed, counter, drawn.words);
  return drawn;
}

DEVICE float gumbel(uint32_t word) {
  const float u = (static_cast<float>(word >> 9) + 0.5f) * (1.f / (1 << 23));
  return -logf(-logf(u));
}

// Added to a thread's scores where rows are queries and columns the keys from `key` on. A lane draws four
// neighbours of its row, of which the lanes of its half warp take one each.
DEVICE void add_noise(Products& scores, const Work& work, uint64_t seed, int key) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int token = work.begin + work.row + first_row() + 2 * i;
    const GumbelWords drawn = gumbel_words(seed, key / 4 + column(), token, work.head);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      uint32_t own = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t word = __shfl_sync(kAllLanes, drawn.words[n], 4 * j + column() / 4, kHalfWarp);
        own = column() % 4 == n ? word : own;
      }
      scores[i][j] += gumbel(own);
    }
  }
}

// The same where rows are keys and columns the queries from `query` on: of a query a thread has every other
// of 16 keys, so it draws four calls and takes two words of each.
DEVICE void add_noise_transposed(Products& scores, const Work& work, uint64_t seed, int query) {
  const int half = lane_of_warp() / kHalfWarp, group = work.row / 4 + warp_of_block() * (kWarpRows / 4);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int token = work.begin + query + column() + j * kHalfWarp;
#pragma unroll
    for (int i = 0; i < kRows; i += 2) {
      const GumbelWords drawn = gumbel_words(seed, group + i / 2, token, work.head);
      scores[i][j] += gumbel(half ? drawn.words[1] : drawn.words[0]);
      scores[i + 1][j] += gumbel(half ? drawn.words[3] : drawn.words[2]);
    }
  }
}

}  // namespace
}  // namespace fastbert::cuda
