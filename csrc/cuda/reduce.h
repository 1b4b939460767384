// Sums over a warp and over a block, in an order that depends on nothing but the number of threads. Every
// thread gets the same bits.
#pragma once
#include "launch.h"

namespace fastbert {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 32;  // at most
constexpr unsigned kAllLanes = 0xffffffffu;

// Of blocks with one dimension.
DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
DEVICE int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }
DEVICE int warps_of_block() { return static_cast<int>(blockDim.x) / kWarp; }

DEVICE float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

DEVICE float warp_max(float value) {  // NaN is no number here: what else there is wins
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// kValues sums over all threads of a block of whole warps. `partial` is shared memory that nobody reads any
// more: a kernel that sums again and again takes two of them in turn, and needs no other barrier.
template <int kValues>
DEVICE void block_sum(float (&values)[kValues], float (&partial)[kValues][kWarpsPerBlock]) {
  const int lane = lane_of_warp(), warps = warps_of_block();
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(values[i]);
  if (warps == 1) return;
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < kValues; ++i) partial[i][warp_of_block()] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(lane < warps ? partial[i][lane] : 0.f);
}

}  // namespace fastbert
