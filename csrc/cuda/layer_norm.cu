// LayerNorm with the dropout and the residual that come before it in a transformer, [T, H]:
//
//   z = residual + dropout(x + x_bias)             rounded to x's dtype; z = x when there is nothing of it
//   y = (z - mean) * rstd * weight + bias          mean and variance over a row, of the rounded z
//
// Backward takes z, mean [T], rstd [T] and one or two gradients of y, dy being their sum; with
// h = (z - mean) * rstd and g = dy * weight:
//
//   dz = rstd * (g - mean(g) - h * mean(g * h)),  dx = dropout'(dz),
//   dweight = sum(dy * h),  dbias = sum(dy),  dx_bias = sum(dx)
//
// Arithmetic is float32 for every dtype, and the variance is the mean of squared deviations. Memory is read
// once and written once: a row stays in registers. The dropout mask is drawn again in backward, not stored.
// Sums are in an order that follows from the shape alone. Ba, Kiros and Hinton, "Layer normalization" (2016).
//
// Forward: a block a row, of one warp for each 1,024 columns. Backward: layer_norm_backward.h. Longer rows,
// and rows off boundaries of 16 bytes: layer_norm_long.h.
//
// A warp's accesses are whole sectors. So a lane takes as many neighbours as fill 16 bytes of the wider one
// of x and weight: with bf16 rows and float32 weights four, and rows move by 8 bytes a lane; by 16 they would
// leave every second half of a sector of weight and bias to another instruction, twice the work for L1.
#include "launch.h"
//
#include "kernels.h"
#include "layer_norm_backward.h"
#include "layer_norm_long.h"
#include "layer_norm_row.h"
#include "layer_norm_scratch.h"

namespace fastbert::cuda {
namespace {

constexpr int kForwardThreads = 256;  // of a row, at most
constexpr int kForwardGroups = 4;     // of a warp, at most
constexpr int64_t kMostRows = 0x7fffffff, kMostColumns = 1 << 28;

// ---- forward -----------------------------------------------------------------------------------------

template <class T, class W, int kGroups>
__global__ void __launch_bounds__(kForwardThreads, 1)
    layer_norm_forward_kernel(const LayerNormForward a, float scale, float per_column) {
  constexpr int kVector = kAccessBytes / static_cast<int>(sizeof(T) < sizeof(W) ? sizeof(W) : sizeof(T));
  __shared__ float partial[2][1][kWarpsPerBlock];
  const Drop drop(a.t, scale, a.seed);
  const int columns = a.columns, first = warp_of_block() * kGroups * kGroup;
  const int64_t row = blockIdx.x, at = row * columns;
  Held<T, kVector> x[kGroups], residual[kGroups];
#pragma unroll
  for (int k = 0; k < kGroups; ++k) x[k].read(static_cast<const T*>(a.x) + at, first + k * kGroup, columns);
#pragma unroll
  for (int k = 0; k < kGroups; ++k)
    residual[k].read(static_cast<const T*>(a.residual) + at, first + k * kGroup, a.residual ? columns : 0);
  // dropout, residual
  uint32_t kept[kGroups];
  drop.draw(row, first, kept);
  float z[kGroups][kEach], sum[1] = {}, squares[1] = {};
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    add_dropped(a, std::is_same_v<W, float>, drop, kept[k], x[k], residual[k], first + k * kGroup,
                static_cast<T*>(a.z) + at, a.z ? columns : 0, z[k]);
    sum[0] += sum_of(z[k]);
  }
  // statistics
  block_sum(sum, partial[0]);
  const float mean = sum[0] * per_column;
#pragma unroll
  for (int k = 0; k < kGroups; ++k)
    squares[0] += sum_of_squares<kVector>(z[k], mean, first + k * kGroup, columns);
  block_sum(squares, partial[1]);
  const float rstd = rsqrtf(squares[0] * per_column + a.eps);
  if (a.mean && threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  // normalize, affine
#pragma unroll
  for (int k = 0; k < kGroups; ++k)
    normalize<T, kVector>(a, std::is_same_v<W, float>, z[k], mean, rstd, row, first + k * kGroup);
}

// ---- launchers ---------------------------------------------------------------------------------------

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether there are more rows or columns than can be counted; that is an error.
bool too_large(const char* name, int64_t rows, int64_t columns) {
  if (rows <= kMostRows && columns <= kMostColumns) return false;
  snprintf(launch_error(), kErrorBytes,
           "%s: at most %lld rows of %lld columns can be normalized, got [%lld, %lld]", name,
           static_cast<long long>(kMostRows), static_cast<long long>(kMostColumns),
           static_cast<long long>(rows), static_cast<long long>(columns));
  return true;
}

// What makes a mean of a row's sum.
float one_over(int64_t columns) { return 1.f / static_cast<float>(columns); }

// Threads for a row whose groups pass through registers one by one.
int long_threads(int64_t columns) {
  const int64_t threads = ceil_div(columns, kGroup) * kWarp;
  return threads < kLongThreads ? static_cast<int>(threads) : kLongThreads;
}

template <class T, class W>
int forward_in_registers(const LayerNormForward& a, int64_t warps) {
  const auto start = [&](auto kernel) {
    return launch("layer_norm_forward", kernel, a.rows, warps * kWarp, 0, reinterpret_cast<void*>(a.launch),
                  a, dropout_scale(a.t, kLaneBits), one_over(a.columns));
  };
  const int64_t groups = ceil_div(a.columns, warps * kGroup);
  if (groups == 1) return start(layer_norm_forward_kernel<T, W, 1>);
  if (groups <= 3) return start(layer_norm_forward_kernel<T, W, 3>);
  return start(layer_norm_forward_kernel<T, W, kForwardGroups>);
}

template <class T, int kVector>
int forward_of_long_rows(const LayerNormForward& a) {
  return launch("layer_norm_forward", layer_norm_long_forward_kernel<T, kVector>, a.rows,
                long_threads(a.columns), 0, reinterpret_cast<void*>(a.launch), a,
                dropout_scale(a.t, kLaneBits), one_over(a.columns));
}

template <class T>
int forward(const LayerNormForward& a) {
  const bool aligned = a.columns * sizeof(T) % kAccessBytes == 0 &&
                       are_aligned(kAccessBytes, a.x, a.x_bias, a.residual, a.weight, a.bias, a.y, a.z);
  if (!aligned) return forward_of_long_rows<T, 1>(a);
  const int64_t warps = ceil_div(a.columns, kForwardGroups * kGroup);
  if (warps * kWarp > kForwardThreads) return forward_of_long_rows<T, kQuad>(a);
  return a.weight_dtype == a.dtype ? forward_in_registers<T, T>(a, warps)
                                   : forward_in_registers<T, float>(a, warps);
}

template <class T, int kGroups>
int backward_in_registers(const LayerNormBackward& a, int warps_per_row) {
  void* stream = reinterpret_cast<void*>(a.launch);
  const int64_t most = ceil_div(a.rows, kBackwardWarps / warps_per_row), stride = part_stride(a.columns);
  const int blocks = static_cast<int>(most < kLayerNormBlocks ? most : kLayerNormBlocks);
  Counters counters;
  if (const int error = take_counters("layer_norm_backward", 1 + sum_groups(blocks),
                                      a.scratch + (a.dx_bias ? 3 : 2) * blocks * stride, stream, &counters))
    return error;
  return launch("layer_norm_backward", layer_norm_backward_kernel<T, kGroups>, blocks, kBackwardThreads,
                sizeof(RowSums) + (a.dy2 ? kRowsBytes<T, kGroups, true> : kRowsBytes<T, kGroups, false>),
                stream, a, dropout_scale(a.t, kLaneBits), one_over(a.columns), warps_per_row, stride,
                counters);
}

template <class T, int kVector>
int backward_of_long_rows(const LayerNormBackward& a) {
  void* stream = reinterpret_cast<void*>(a.launch);
  const int64_t parts = layer_norm_long_parts(a.rows), stride = part_stride(a.columns);
  const dim3 grid(ceil_div(a.columns, kWarp * kVector), parts);
  Counters counters;
  if (const int error = take_counters("layer_norm_backward", grid.x,
                                      a.scratch + (a.dx_bias ? 3 : 2) * parts * stride, stream, &counters))
    return error;
  if (const int error =
          launch("layer_norm_backward", layer_norm_long_backward_kernel<T, kVector>, a.rows,
                 long_threads(a.columns), 0, stream, a, dropout_scale(a.t, kLaneBits), one_over(a.columns)))
    return error;
  return launch("layer_norm_backward", layer_norm_columns_kernel<T, kVector>, grid, kColumnsThreads, 0,
                stream, a, stride, counters);
}

template <class T>
int backward(const LayerNormBackward& a) {
  const int64_t columns = a.columns;
  const bool aligned =
      columns * sizeof(T) % kAccessBytes == 0 &&
      are_aligned(kAccessBytes, a.dy, a.dy2, a.z, a.weight, a.dz, a.dx, a.dweight, a.dbias, a.dx_bias);
  if (!aligned) return backward_of_long_rows<T, 1>(a);
  // Three groups of three float32 tensors, or four of two, take more shared memory than sm_75 has.
  const bool is_wide = sizeof(T) == 4 && a.dy2;
  if (columns <= 512) return backward_in_registers<T, 2>(a, 1);
  if (columns <= 768 && !is_wide) return backward_in_registers<T, 3>(a, 1);
  if (columns <= 1024) return backward_in_registers<T, 2>(a, 2);
  if (columns <= 1536 && !is_wide) return backward_in_registers<T, 3>(a, 2);
  if (columns <= 2048) return backward_in_registers<T, 2>(a, 4);
  if (columns <= 3072 && !is_wide) return backward_in_registers<T, 3>(a, 4);
  if constexpr (sizeof(T) == 2)
    if (columns <= kLayerNormRegisters) return backward_in_registers<T, 4>(a, 4);
  return backward_of_long_rows<T, kQuad>(a);
}

}  // namespace

int layer_norm_forward(const LayerNormForward& a) {
  if (too_large("layer_norm_forward", a.rows, a.columns)) return cudaErrorInvalidValue;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_type(a.dtype, [&](auto x) { return forward<decltype(x)>(a); });
}

int layer_norm_backward(const LayerNormBackward& a) {
  if (too_large("layer_norm_backward", a.rows, a.columns)) return cudaErrorInvalidValue;
  if (a.columns == 0) return 0;
  if (a.rows > 0) return with_type(a.dtype, [&](auto x) { return backward<decltype(x)>(a); });
  return with_type(a.weight_dtype, [&](auto weight) {
    using W = decltype(weight);
    for (void* gradient : {a.dweight, a.dbias, a.dx_bias})
      if (gradient)
        if (const int error = zero("layer_norm_backward", static_cast<W*>(gradient), a.columns,
                                   reinterpret_cast<void*>(a.launch)))
          return error;
    return 0;
  });
}

}  // namespace fastbert::cuda
