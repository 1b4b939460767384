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
// Forward: a block a row, of one warp for each 1,024 columns. Backward: a fixed number of blocks of four
// warps walk over the rows; each warp fetches its next rows by cp.async while it works on one, and keeps its
// sums of dweight and dbias in registers. Longer rows, and rows off boundaries of 16 bytes:
// layer_norm_long.h.
//
// A warp's accesses are whole sectors. So a lane takes as many neighbours as fill 16 bytes of the wider one
// of x and weight: with bf16 rows and float32 weights four, and rows move by 8 bytes a lane; by 16 they would
// leave every second half of a sector of weight and bias to another instruction, twice the work for L1.
#include "launch.h"
//
#include "kernels.h"
#include "layer_norm_long.h"
#include "layer_norm_row.h"
#include "layer_norm_scratch.h"
#include "ptx.h"

namespace fastbert::cuda {
namespace {

constexpr int kForwardThreads = 256;  // of a row, at most
constexpr int kForwardGroups = 4;     // of a warp, at most
constexpr int kBackwardWarps = 4;
constexpr int kBackwardThreads = kBackwardWarps * kWarp;
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

// ---- backward ----------------------------------------------------------------------------------------

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
