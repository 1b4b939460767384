// LayerNorm of rows that registers do not hold, and of rows whose elements lie on no common boundary of 16
// bytes (kVector = 1). A block takes a row; what it reads again comes from the caches, if the row fits there.
#pragma once
#include "column_sums.h"
#include "layer_norm_row.h"

namespace fastbert::cuda {
namespace {

constexpr int kLongThreads = 512;     // of a row, at most
constexpr int kColumnsThreads = 256;  // of the kernel for dweight, dbias and dx_bias
constexpr int kColumnsWarps = kColumnsThreads / kWarp;

// ---- forward -----------------------------------------------------------------------------------------

// z is made anew in each of three sweeps.
template <class T, int kVector>
__global__ void __launch_bounds__(kLongThreads, 1)
    layer_norm_long_forward_kernel(const LayerNormForward a, float scale, float per_column) {
  __shared__ float partial[2][1][kWarpsPerBlock];
  const Drop drop(a.t, scale, a.seed);
  const int columns = a.columns, first = warp_of_block() * kGroup, stride = blockDim.x * kEach;
  const int64_t row = blockIdx.x, at = row * columns;
  const auto z_of_group = [&](int group, int columns_written, float (&z)[kEach]) {
    Held<T, kVector> x, residual;
    x.read(static_cast<const T*>(a.x) + at, group, columns);
    residual.read(static_cast<const T*>(a.residual) + at, group, a.residual ? columns : 0);
    uint32_t kept[1];
    drop.draw(row, group, kept);
    add_dropped(a, a.weight_dtype == DType::f32, drop, kept[0], x, residual, group, static_cast<T*>(a.z) + at,
                columns_written, z);
  };
  // statistics
  float z[kEach], sum[1] = {}, squares[1] = {};
  for (int group = first; group < columns; group += stride) {
    z_of_group(group, a.z ? columns : 0, z);
    sum[0] += sum_of(z);
  }
  block_sum(sum, partial[0]);
  const float mean = sum[0] * per_column;
  for (int group = first; group < columns; group += stride) {
    z_of_group(group, 0, z);
    squares[0] += sum_of_squares<kVector>(z, mean, group, columns);
  }
  block_sum(squares, partial[1]);
  const float rstd = rsqrtf(squares[0] * per_column + a.eps);
  if (a.mean && threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  // normalize, affine
  for (int group = first; group < columns; group += stride) {
    z_of_group(group, 0, z);
    normalize<T, kVector>(a, a.weight_dtype == DType::f32, z, mean, rstd, row, group);
  }
}

// ---- backward ----------------------------------------------------------------------------------------

// The sum of one or two gradients of y.
template <int kVector, class T>
DEVICE void load_sum(const T* dy, const T* dy2, float (&values)[kVector]) {
  load<kVector>(dy, values);
  if (!dy2) return;
  float others[kVector];
  load<kVector>(dy2, others);
#pragma unroll
  for (int j = 0; j < kVector; ++j) values[j] += others[j];
}

// dz and dx.
template <class T, int kVector>
__global__ void __launch_bounds__(kLongThreads, 1)
    layer_norm_long_backward_kernel(const LayerNormBackward a, float scale, float per_column) {
  __shared__ float partial[2][kWarpsPerBlock];
  const Drop drop(a.t, scale, a.seed);
  const int columns = a.columns, first = warp_of_block() * kGroup, stride = blockDim.x * kEach;
  const int columns_dropped = drop.t ? columns : 0;
  const int64_t row = blockIdx.x;
  const float mean = __ldg(a.mean + row), rstd = __ldg(a.rstd + row);
  const T *dy_row = static_cast<const T*>(a.dy) + row * columns,
          *dy2_row = a.dy2 ? static_cast<const T*>(a.dy2) + row * columns : nullptr,
          *z_row = static_cast<const T*>(a.z) + row * columns;
  // Of a step's columns, which lie within the row.
  const auto read_step = [&](int column, float (&g)[kVector], float (&h)[kVector]) {
    float weight[kVector];
    load_sum<kVector>(dy_row + column, dy2_row ? dy2_row + column : nullptr, g);
    load<kVector>(z_row + column, h);
    load_parameter<T, kVector>(a.weight, a.weight_dtype == DType::f32, column, weight);
#pragma unroll
    for (int j = 0; j < kVector; ++j) h[j] = (h[j] - mean) * rstd, g[j] *= weight[j];
  };
  // statistics
  float sums[2] = {};  // of g and of g * h
  for (int group = first; group < columns; group += stride)
#pragma unroll
    for (int i = 0; i < kSteps<kVector>; ++i) {
      const int column = column_of<kVector>(group, i);
      if (column >= columns) continue;
      float g[kVector], h[kVector];
      read_step(column, g, h);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[0] += g[j], sums[1] += g[j] * h[j];
    }
  block_sum(sums, partial);
  const float mean_g = sums[0] * per_column, mean_gh = sums[1] * per_column;
  // normalize
  for (int group = first; group < columns; group += stride) {
    uint32_t kept[1];
    drop.draw(row, group, kept);
#pragma unroll
    for (int i = 0; i < kSteps<kVector>; ++i) {
      const int column = column_of<kVector>(group, i);
      float dz[kVector] = {};
      if (column < columns) {
        float g[kVector], h[kVector];
        read_step(column, g, h);
#pragma unroll
        for (int j = 0; j < kVector; ++j) dz[j] = rstd * (g[j] - mean_g - h[j] * mean_gh);
        store<kVector>(static_cast<T*>(a.dz) + row * columns + column, dz);
      }
      drop.apply<kVector>(kept[0], i, dz);
      if (column < columns_dropped) store<kVector>(static_cast<T*>(a.dx) + row * columns + column, dz);
    }
  }
}

// dweight, dbias and dx_bias: block (i, part) sums columns 32 * kVector * i and after over the part's rows, a
// row a warp, and the last of the parts adds them up. dx has been written.
template <class T, int kVector>
__global__ void __launch_bounds__(kColumnsThreads)
    layer_norm_columns_kernel(const LayerNormBackward a, int64_t stride, const Counters counters) {
  constexpr int kColumns = kWarp * kVector;
  __shared__ __align__(16) float sums[3][kColumnsWarps][kColumns];
  const T *dy2 = static_cast<const T*>(a.dy2), *dx = static_cast<const T*>(a.t ? a.dx : a.dz);
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int64_t part = blockIdx.y, parts = gridDim.y, columns = a.columns;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kColumns, column = first + lane * kVector;

  float dweight[kVector] = {}, dbias[kVector] = {}, dx_bias[kVector] = {};
  if (column < columns)
    for (int64_t row = part * a.rows / parts + warp; row < (part + 1) * a.rows / parts;
         row += kColumnsWarps) {
      const float mean = __ldg(a.mean + row), rstd = __ldg(a.rstd + row);
      float dy[kVector], z[kVector];
      const int64_t at = row * columns + column;
      load_sum<kVector>(static_cast<const T*>(a.dy) + at, dy2 ? dy2 + at : nullptr, dy);
      load<kVector>(static_cast<const T*>(a.z) + at, z);
#pragma unroll
      for (int j = 0; j < kVector; ++j) dweight[j] += dy[j] * ((z[j] - mean) * rstd), dbias[j] += dy[j];
      if (!a.dx_bias) continue;
      load<kVector>(dx + at, dy);
#pragma unroll
      for (int j = 0; j < kVector; ++j) dx_bias[j] += dy[j];
    }
  store<kVector>(&sums[0][warp][lane * kVector], dweight);
  store<kVector>(&sums[1][warp][lane * kVector], dbias);
  store<kVector>(&sums[2][warp][lane * kVector], dx_bias);
  __syncthreads();
  const int outputs = a.dx_bias ? 3 : 2;
  for (int i = threadIdx.x; i < outputs * kColumns; i += kColumnsThreads) {
    const int which = i / kColumns, within = i % kColumns;
    float total = 0;
#pragma unroll
    for (int from = 0; from < kColumnsWarps; ++from) total += sums[which][from][within];
    if (first + within < stride) a.scratch[(which * parts + part) * stride + first + within] = total;
  }
  if (!is_last_block(counters.at(blockIdx.x), parts)) return;
  for (int i = threadIdx.x; i < outputs * kColumns; i += kColumnsThreads) {
    const int which = i / kColumns, within = i % kColumns;
    if (first + within >= columns) continue;
    float total[1] = {};
    add_parts(a.scratch + which * parts * stride + first + within, 0, parts, 1, stride, total);
    store_sums<T>(gradient_of(a, which), a.weight_dtype == DType::f32, first + within, total);
  }
}

}  // namespace
}  // namespace fastbert::cuda
