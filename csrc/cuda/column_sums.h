// Column sums over rows are made in two steps: blocks leave the sums of their rows, parts, in scratch
// [outputs, parts, stride], and a second kernel adds the parts up, always in the same order.
#pragma once
#include "column_parts.h"
#include "reduce.h"
#include "vectors.h"

namespace fastbert::cuda {

constexpr int kSumThreads = 256;

namespace {

// Output blockIdx.y [columns] of at most three: a thread adds four columns of every 64th part, then the 64
// are added up.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const float* __restrict__ scratch, int parts, int64_t stride, int64_t columns,
                     T* __restrict__ first, T* __restrict__ second, T* __restrict__ third) {
  constexpr int kQuads = kSumColumns / 4, kRows = kSumThreads / kQuads, kWarps = kSumThreads / kWarp;
  __shared__ __align__(16) float sums[kWarps][kSumColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns;
  const int quad = threadIdx.x % kQuads * 4;
  const float* own = scratch + static_cast<int64_t>(blockIdx.y) * parts * stride + column + quad;

  float sum[4] = {};
#pragma unroll 4
  for (int part = threadIdx.x / kQuads; part < parts; part += kRows) {
    float values[4];
    load<4>(own + part * stride, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += values[i];
  }
#pragma unroll
  for (int offset = kWarp / 2; offset >= kQuads; offset /= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
  if (lane_of_warp() < kQuads) store<4>(&sums[warp_of_block()][quad], sum);
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= kSumColumns || column + i >= columns) return;
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][i];
  (blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third)[column + i] = from_float<T>(total);
}

// scratch [1 to 3, parts, part_stride(columns)] -> first [columns], second and third where they are not null.
template <class T>
int sum_parts(const char* name, const float* scratch, int parts, int64_t columns, void* first, void* second,
              void* third, void* stream) {
  const dim3 grid(part_stride(columns) / kSumColumns, third ? 3 : second ? 2 : 1);
  return launch(name, sum_parts_kernel<T>, grid, kSumThreads, 0, stream, scratch, parts, part_stride(columns),
                columns, static_cast<T*>(first), static_cast<T*>(second), static_cast<T*>(third));
}

}  // namespace
}  // namespace fastbert::cuda
