// Backward of LayerNorm where registers hold a row: a fixed number of blocks of four warps walk over the
// rows. Each warp fetches its next rows by cp.async while it works on one, and keeps its sums of dweight,
// dbias and dx_bias in registers.
#pragma once
#include "column_sums.h"
#include "layer_norm_row.h"
#include "ptx.h"

namespace fastbert::cuda {
namespace {

constexpr int kBackwardWarps = 4;
constexpr int kBackwardThreads = kBackwardWarps * kWarp;
constexpr int kQuad = 4;  // columns that a lane takes at a time in backward, whatever the types

// Rows that a warp has in shared memory, the one at work and those that it fetches ahead: so many stages of
// dy and z, or of dy, z and dy2. sm_75 has 64 KiB in all.
template <class T, bool kHasDy2>
constexpr int kStages = sizeof(T) == 2 && !kHasDy2 ? 3 : 2;

// Bytes of them in a block; at the end the warps' sums take their place.
template <class T, int kGroups, bool kHasDy2>
constexpr int kRowsBytes =
    kBackwardWarps * kStages<T, kHasDy2> * (kHasDy2 ? 3 : 2) * kGroups * kGroup * static_cast<int>(sizeof(T));

// What the warps of a row add up, in turn of two. It is dynamic memory too: beside 48 KiB of that a static
// array would be more than a launch has without asking.
using RowSums = float[2][2][kBackwardWarps];

// A warp's ring of rows of dy, z and, where there is one, dy2, of each its own columns.
template <class T, int kGroups>
class RowsAhead {
 public:
  DEVICE RowsAhead(const LayerNormBackward& a, T* ring, int first)
      : a_(a), ring_(ring), first_(first), stage_(kColumns * (a.dy2 ? 3 : 2)) {}

  // Begins to copy a row, or nothing where the row is past the end.
  DEVICE void fetch(int64_t row, int stage) {
    constexpr int kChunk = kAccessBytes / static_cast<int>(sizeof(T));
    T* target = ring_ + stage * stage_;
#pragma unroll
    for (int i = 0; i < kColumns / (kWarp * kChunk); ++i) {
      const int place = (i * kWarp + lane_of_warp()) * kChunk;
      const bool valid = row < a_.rows && first_ + place < a_.columns;
      const int64_t at = valid ? row * a_.columns + first_ + place : 0;
      const auto copy = [&](T* to, const void* from) {
        copy_async<kAccessBytes>(shared_address(to + place), static_cast<const T*>(from) + at, valid);
      };
      copy(target, a_.dy);
      copy(target + kColumns, a_.z);
      if (a_.dy2) copy(target + 2 * kColumns, a_.dy2);
    }
    commit_copies();
  }

  // Waits for the oldest of `stages` stages; lanes see each other's copies after __syncwarp.
  DEVICE static void wait(int stages) {
    if (stages == 3)
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
  }

  DEVICE const T* dy(int stage) const { return ring_ + stage * stage_; }
  DEVICE const T* z(int stage) const { return dy(stage) + kColumns; }
  DEVICE const T* dy2(int stage) const { return dy(stage) + 2 * kColumns; }

 private:
  static constexpr int kColumns = kGroups * kGroup;

  const LayerNormBackward& a_;
  T* ring_;
  int first_, stage_;  // elements of a stage
};

// Both sums over the neighbouring warps that share a row; `partial` as in block_sum.
DEVICE void sum_over_row(float (&sums)[2], float (&partial)[2][kBackwardWarps], int warps_per_row) {
  sums[0] = warp_sum(sums[0]), sums[1] = warp_sum(sums[1]);
  if (warps_per_row == 1) return;
  const int warp = warp_of_block(), first = warp / warps_per_row * warps_per_row;
  if (lane_of_warp() == 0) partial[0][warp] = sums[0], partial[1][warp] = sums[1];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums[i] = 0;
#pragma unroll
    for (int other = 0; other < kBackwardWarps; ++other)
      if (other < warps_per_row) sums[i] += partial[i][first + other];
  }
}

// Each warp takes kGroups groups of a row, and warps_per_row (1, 2 or 4) warps a row. scratch [2 or 3,
// blocks, stride].
template <class T, int kGroups>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    layer_norm_backward_kernel(const LayerNormBackward a, float scale, float per_column, int warps_per_row,
                               int stride, const Counters counters) {
  constexpr int kColumns = kGroups * kGroup, kQuads = kColumns / (kWarp * kQuad);
  DYNAMIC_SHARED(unsigned char, memory);
  RowSums& partial = *reinterpret_cast<RowSums*>(memory);
  T* rows = reinterpret_cast<T*>(memory + sizeof(RowSums));
  const Drop drop(a.t, scale, a.seed);
  const int columns = a.columns, warp = warp_of_block(), lane = lane_of_warp();
  const int rows_at_once = kBackwardWarps / warps_per_row, first = warp % warps_per_row * kColumns;
  const auto column_of_quad = [&](int i) { return first + (i * kWarp + lane) * kQuad; };

  float weight[kQuads][kQuad] = {}, dweight[kQuads][kQuad] = {}, dbias[kQuads][kQuad] = {},
        dx_bias[kQuads][kQuad] = {};
  // Beside many columns and their sums there are no registers for the weight, which is read for each row
  // then.
  constexpr bool kHoldsAll = kGroups < (sizeof(T) == 2 ? 4 : 3);
  const auto load_weight = [&](int i) {
    if (column_of_quad(i) < columns)
      load_parameter<T, kQuad, kHoldsAll ? Cache::read_only : Cache::plain>(
          a.weight, a.weight_dtype == DType::f32, column_of_quad(i), weight[i]);
  };
  if constexpr (kHoldsAll)
#pragma unroll
    for (int i = 0; i < kQuads; ++i) load_weight(i);

  const int stages = a.dy2 ? kStages<T, true> : kStages<T, false>;
  RowsAhead<T, kGroups> ahead(a, rows + warp * stages * (a.dy2 ? 3 : 2) * kColumns, first);
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows_at_once;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * rows_at_once;
  int64_t row = block_row + warp / warps_per_row;
  for (int i = 0; i + 1 < stages; ++i) ahead.fetch(row + i * step, i);
  float next_mean = row < a.rows ? __ldg(a.mean + row) : 0,
        next_rstd = row < a.rows ? __ldg(a.rstd + row) : 0;
  int stage = 0, turn = 0;
  // All warps of a block go round as often, since those of a row meet at a barrier.
  for (int64_t left = a.rows - block_row; left > 0; left -= step, row += step, turn ^= 1) {
    const float mean = next_mean, rstd = next_rstd;
    ahead.wait(stages);
    __syncwarp();
    const int free_stage = stage == 0 ? stages - 1 : stage - 1;
    ahead.fetch(row + (stages - 1) * step, free_stage);
    if (row + step < a.rows) next_mean = __ldg(a.mean + row + step), next_rstd = __ldg(a.rstd + row + step);
    uint32_t kept[kGroups];
    drop.draw(row, first, kept);
    // statistics
    float g[kQuads][kQuad], h[kQuads][kQuad], sums[2] = {};
    const auto load_h = [&](int i) {
      load<kQuad, Cache::plain>(ahead.z(stage) + (i * kWarp + lane) * kQuad, h[i]);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) h[i][j] = (h[i][j] - mean) * rstd;
    };
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      float dy[kQuad];
      const int place = (i * kWarp + lane) * kQuad;
      if constexpr (!kHoldsAll) load_weight(i);
      load<kQuad, Cache::plain>(ahead.dy(stage) + place, dy);
      load_h(i);
      if (a.dy2) {
        float dy2[kQuad];
        load<kQuad, Cache::plain>(ahead.dy2(stage) + place, dy2);
#pragma unroll
        for (int j = 0; j < kQuad; ++j) dy[j] += dy2[j];
      }
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        g[i][j] = dy[j] * weight[i][j];
        sums[0] += g[i][j];
        sums[1] += g[i][j] * h[i][j];
        dweight[i][j] += dy[j] * h[i][j];
        dbias[i][j] += dy[j];
      }
    }
    sum_over_row(sums, partial[turn], warps_per_row);
    const float mean_g = sums[0] * per_column, mean_gh = sums[1] * per_column;
    // normalize
    const int64_t at = row * columns;
    const int columns_there = row < a.rows ? columns : 0, columns_dropped = drop.t ? columns_there : 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      float* dz = g[i];
      if constexpr (!kHoldsAll) load_h(i);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) dz[j] = rstd * (g[i][j] - mean_g - h[i][j] * mean_gh);
      const int column = column_of_quad(i);
      if (column < columns_there) store<kQuad>(static_cast<T*>(a.dz) + at + column, dz);
      drop.apply<kQuad>(kept[i / kSteps<kQuad>], i % kSteps<kQuad>, dz);
      if (column < columns_dropped) store<kQuad>(static_cast<T*>(a.dx) + at + column, dz);
      if (column < columns_there)
#pragma unroll
        for (int j = 0; j < kQuad; ++j) dx_bias[i][j] += dz[j];
    }
    stage = stage + 1 == stages ? 0 : stage + 1;
  }

  // affine: the sums of the block's rows side by side
  constexpr int kSums = 3;
  const int outputs = a.dx_bias ? 3 : 2;
  static_assert(
      kRowsBytes<T, kGroups, false> >= kBackwardWarps * kSums * kColumns * static_cast<int>(sizeof(float)),
      "the warps' sums fit where their rows were");
  wait_for_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(rows);  // [warps, kSums, kColumns]
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    float* own = sums + warp * kSums * kColumns + (i * kWarp + lane) * kQuad;
    store<kQuad>(own, dweight[i]);
    store<kQuad>(own + kColumns, dbias[i]);
    store<kQuad>(own + 2 * kColumns, dx_bias[i]);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs * stride / kQuad; i += kBackwardThreads) {
    const int which = i * kQuad / stride, column = i * kQuad % stride;
    const float* from = sums + (column / kColumns * kSums + which) * kColumns + column % kColumns;
    float total[kQuad] = {};
#pragma unroll
    for (int r = 0; r < kBackwardWarps; ++r) {
      if (r >= rows_at_once) break;
      float values[kQuad];
      load<kQuad, Cache::plain>(from + r * warps_per_row * kSums * kColumns, values);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) total[j] += values[j];
    }
    store<kQuad>(a.scratch + (static_cast<int64_t>(which) * gridDim.x + blockIdx.x) * stride + column, total);
  }
  finish_column_sums<kBackwardThreads>(
      a.scratch, outputs, stride, counters, [&](int which, int column, const float (&total)[kQuad]) {
        if (column < columns)
          store_sums<T>(gradient_of(a, which), a.weight_dtype == DType::f32, column, total);
      });
}

}  // namespace
}  // namespace fastbert::cuda
