// Softmax cross entropy of logits [T, V] with one label a row:
//
//   m = max_j x_j,   s = sum_j exp(x_j - m),   loss = log(s) + (m - x_label)
//   dx_j = (exp(x_j - m) / s - [j = label]) * dloss
//
// m and s are saved. A row whose label is `ignore_index` is not read: its loss and its dx are 0. A label
// outside of [0, V) is reported, and loss and dx of its row are NaN. Rows lie `stride` >= V elements apart;
// dx is 0 between them. Arithmetic is float32.
//
// Where a mean or a sum of the losses is wanted, the last block of forward adds them up, and backward takes
// one dloss for all rows, for a mean with the number that it was divided by. It counts rows that are right
// beside it: no logit exceeds their label's, so that loss = log(s).
//
// Each direction moves its bytes once. Forward gives a row to a block, or a short row to a warp; a thread's
// running maximum moves once for all the elements that it has loaded, so that an element costs one exp
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Backward gives a piece of a
// row to a warp.
//
// A row of 30,522 16-bit logits begins at any multiple of 4 bytes. So its elements are counted from the last
// multiple of 128 bytes before it, in groups of 16 bytes, which are read and written at once; of the groups
// at its two ends only the elements that belong to it are. Sizes up to 2^31 elements a row.
#include "launch.h"
//
#include "faults.h"
#include "kernels.h"
#include "last_block.h"
#include "ptx.h"
#include "reduce.h"
#include "vectors.h"

namespace fastbert::cuda {
namespace {

constexpr int kLineBytes = 128;       // of a cache
constexpr int kForwardThreads = 256;  // of a block
constexpr int kForwardGroups = 2;     // that a thread loads side by side
constexpr int kWarpRowBytes = 8192;   // a row up to here is one warp's
constexpr int kBackwardThreads = 128;
constexpr int kBackwardGroups = 4;
constexpr float kLog2e = 1.44269504f;

template <class T>
constexpr int kGroup = kAccessBytes / static_cast<int>(sizeof(T));  // elements of 16 bytes

// exp(x) for x <= 0; the difference was rounded before, as it must be where logits are large.
DEVICE float exp_of(float x) { return exp2_approximate(x * kLog2e); }

// ---- rows in groups of 16 bytes ----------------------------------------------------------------------

// Elements [first, last) of `base`, which is a multiple of kLineBytes and may lie before the tensor.
template <class T>
struct Row {
  T* base;
  uint32_t first, last;
};

template <class T>
DEVICE uint32_t elements_past_a_line(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % kLineBytes / sizeof(T);
}

// -inf, which adds nothing, in places outside of the row. `as_groups`: groups of the row are aligned.
template <class T>
DEVICE Packed<T, kGroup<T>> load_group(const Row<const T>& row, uint32_t place, bool as_groups) {
  if (as_groups && place >= row.first && place + kGroup<T> <= row.last)
    return load_packed<kGroup<T>>(row.base + place);
  float values[kGroup<T>];
#pragma unroll
  for (int k = 0; k < kGroup<T>; ++k)
    values[k] = place + k >= row.first && place + k < row.last ? to_float(row.base[place + k]) : -INFINITY;
  return pack<T, kGroup<T>>(values);
}

template <class T>
DEVICE void store_group(const Row<T>& row, uint32_t place, const float* values) {
  if (place >= row.first && place + kGroup<T> <= row.last) {
    // Else nvcc makes single stores of both branches for sm_75 to sm_90.
    store<kGroup<T>, Cache::whole>(row.base + place, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < kGroup<T>; ++k)
    if (place + k >= row.first && place + k < row.last) row.base[place + k] = from_float<T>(values[k]);
}

// ---- forward -----------------------------------------------------------------------------------------

// The maximum m of numbers, and their sum of exp(x - m). NaN among them shows in the sum.
struct Softmax {
  float maximum, total;
};

constexpr Softmax kNothing = {-INFINITY, 0.f};

// What is subtracted before exp: -inf - -inf would be NaN where no number has come yet.
DEVICE float shift_of(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }

template <int kCount>
DEVICE Softmax with_numbers(Softmax softmax, const float (&x)[kCount]) {
  float maximum = softmax.maximum;
#pragma unroll
  for (int k = 0; k < kCount; ++k) maximum = fmaxf(maximum, x[k]);
  const float shift = shift_of(maximum);
  float total = softmax.total * exp_of(softmax.maximum - shift);
#pragma unroll
  for (int k = 0; k < kCount; ++k) total += exp_of(x[k] - shift);
  return {maximum, total};
}

DEVICE Softmax of_warp(Softmax softmax) {
  const float maximum = warp_max(softmax.maximum);
  return {maximum, warp_sum(softmax.total * exp_of(softmax.maximum - shift_of(maximum)))};
}

template <class T, bool kBlockPerRow>
DEVICE void loss_of_row(const CrossEntropyForward& p, int64_t row, int32_t* faults) {
  constexpr int kWarps = kForwardThreads / kWarp, kGroups = kForwardGroups, kSize = kGroup<T>;
  constexpr int kTeam = kBlockPerRow ? kForwardThreads : kWarp;  // threads of a row
  const int member = kBlockPerRow ? threadIdx.x : lane_of_warp();

  // label
  const int64_t label = p.labels[row];
  if (label < 0 || label >= p.columns || label == p.ignore_index) {
    if (member != 0) return;
    const bool ignored = label == p.ignore_index;
    if (!ignored) raise_fault(faults, kFaultLabel, row);
    p.maximum[row] = 0.f;
    p.losses[row] = p.total[row] = ignored ? 0.f : NAN;
    return;
  }
  const T* x = static_cast<const T*>(p.logits) + row * p.stride;
  const float picked = to_float(x[label]);

  // statistics
  const uint32_t first = elements_past_a_line(x);
  const Row<const T> logits = {x - first, first, first + static_cast<uint32_t>(p.columns)};
  Softmax softmax = kNothing;
  for (uint32_t place = member * kSize; place < logits.last; place += kGroups * kTeam * kSize) {
    Packed<T, kSize> groups[kGroups];
    float numbers[kGroups * kSize];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) groups[g] = load_group(logits, place + g * kTeam * kSize, true);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) unpack<T, kSize>(groups[g], numbers + g * kSize);
    softmax = with_numbers(softmax, numbers);
  }
  softmax = of_warp(softmax);
  if constexpr (kBlockPerRow) {
    __shared__ float maxima[kWarps], totals[kWarps];
    const int lane = lane_of_warp(), warp = warp_of_block();
    if (lane == 0) maxima[warp] = softmax.maximum, totals[warp] = softmax.total;
    __syncthreads();
    if (warp != 0) return;
    softmax = of_warp(lane < kWarps ? Softmax{maxima[lane], totals[lane]} : kNothing);
  }

  // loss
  if (member != 0) return;
  p.losses[row] = logf(softmax.total) + (softmax.maximum - picked);
  p.maximum[row] = softmax.maximum;
  p.total[row] = softmax.total;
}

// The sum of all losses, or their mean over the rows that count, and how many are right, by one block.
DEVICE void reduce_losses(const CrossEntropyForward& p) {
  __shared__ float partial[3][kWarpsPerBlock];
  float sums[3] = {};  // of losses, rows that count and rows that are right, exact up to 2^24
#pragma unroll 2
  for (int64_t row = threadIdx.x; row < p.rows; row += kForwardThreads) {
    sums[0] += p.losses[row];
    sums[1] += p.labels[row] != p.ignore_index;
    sums[2] += p.losses[row] <= logf(p.total[row]);  // not of an ignored one: log(0) is -inf
  }
  block_sum(sums, partial);
  if (threadIdx.x != 0) return;
  *p.count = fmaxf(sums[1], 1.f);
  *p.result = p.mean ? sums[0] / fmaxf(sums[1], 1.f) : sums[0];
  p.hits[0] = sums[2], p.hits[1] = sums[1];
}

template <class T, bool kBlockPerRow>
__global__ void __launch_bounds__(kForwardThreads)
    cross_entropy_forward_kernel(CrossEntropyForward p, int32_t* faults, Counters counters) {
  constexpr int64_t kWarps = kForwardThreads / kWarp;
  const int64_t row = kBlockPerRow ? blockIdx.x : blockIdx.x * kWarps + warp_of_block();
  if (row < p.rows) loss_of_row<T, kBlockPerRow>(p, row, faults);
  if (p.result && is_last_block(counters.at(0), gridDim.x)) reduce_losses(p);
}

// ---- backward ----------------------------------------------------------------------------------------

template <class T>
constexpr int kPiece = kBackwardGroups * kWarp * kGroup<T>;  // elements of a row that are a warp's: 2 KB

template <class T>
__global__ void __launch_bounds__(kBackwardThreads)
    cross_entropy_backward_kernel(CrossEntropyBackward p, uint32_t pieces) {
  constexpr int kGroups = kBackwardGroups, kSize = kGroup<T>;
  const uint32_t warp = blockIdx.x * (kBackwardThreads / kWarp) + warp_of_block();
  const uint32_t row = warp / pieces;
  if (row >= p.rows) return;

  // label
  const int64_t label = p.labels[row];
  const bool counts = label != p.ignore_index;
  const float divisor = p.count ? *p.count : 1.f;
  const float dloss = counts ? p.dlosses[p.one_dloss ? 0 : row] / divisor : 0.f;
  const float maximum = counts ? p.maximum[row] : 0.f;
  const float scale = counts ? dloss / p.total[row] : 0.f;
  const uint32_t columns = counts ? p.columns : 0;

  // logits
  T* dx = static_cast<T*>(p.dlogits) + row * p.stride;
  const T* x = static_cast<const T*>(p.logits) + row * p.stride;
  const uint32_t first = elements_past_a_line(dx);
  const Row<T> dlogits = {dx - first, first, first + static_cast<uint32_t>(p.stride)};
  const Row<const T> logits = {x - first, first, first + columns};
  const bool as_groups = (reinterpret_cast<uintptr_t>(logits.base) & (kAccessBytes - 1)) == 0;
  const uint32_t place = warp % pieces * kPiece<T> + lane_of_warp() * kSize;
  Packed<T, kSize> groups[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) groups[g] = load_group(logits, place + g * kWarp * kSize, as_groups);

  // gradient
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const uint32_t column =
        place + g * kWarp * kSize - first;  // wraps around before the row, and is no column
    float numbers[kSize];
    unpack<T, kSize>(groups[g], numbers);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const float share = exp_of(numbers[k] - maximum) * scale;
      const float gradient = column + k == label ? share - dloss : share;
      numbers[k] = column + k < columns ? gradient : 0.f;
    }
    store_group(dlogits, place + g * kWarp * kSize, numbers);
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class T>
int forward(const CrossEntropyForward& p) {
  constexpr int kWarps = kForwardThreads / kWarp;
  void* stream = reinterpret_cast<void*>(p.launch);
  const bool long_rows = p.columns * static_cast<int64_t>(sizeof(T)) > kWarpRowBytes;
  const int64_t blocks = long_rows ? p.rows : max((p.rows + kWarps - 1) / kWarps, int64_t{1});
  Counters counters = {};
  if (p.result)  // where there is no set, the counter is where `count` will be
    if (const int error = take_counters("cross_entropy_forward", 1, p.count, stream, &counters)) return error;
  return long_rows ? launch("cross_entropy_forward", cross_entropy_forward_kernel<T, true>, blocks,
                            kForwardThreads, 0, stream, p, fault_words(), counters)
                   : launch("cross_entropy_forward", cross_entropy_forward_kernel<T, false>, blocks,
                            kForwardThreads, 0, stream, p, fault_words(), counters);
}

template <class T>
int backward(const CrossEntropyBackward& p) {
  constexpr int kWarps = kBackwardThreads / kWarp, kMostBefore = kLineBytes / sizeof(T) - 1;
  const int64_t pieces = (kMostBefore + p.stride + kPiece<T> - 1) / kPiece<T>;
  return launch("cross_entropy_backward", cross_entropy_backward_kernel<T>,
                (p.rows * pieces + kWarps - 1) / kWarps, kBackwardThreads, 0,
                reinterpret_cast<void*>(p.launch), p, static_cast<uint32_t>(pieces));
}

}  // namespace

int cross_entropy_forward(const CrossEntropyForward& p) {
  if (p.rows > 0) return with_type(p.dtype, [&](auto x) { return forward<decltype(x)>(p); });
  CrossEntropyForward none = p;
  none.columns = 0;  // one block, which finds no row and reduces nothing to 0
  return p.result ? forward<float>(none) : 0;
}

int cross_entropy_backward(const CrossEntropyBackward& p) {
  if (p.rows == 0) return 0;
  return with_type(p.dtype, [&](auto x) { return backward<decltype(x)>(p); });
}

}  // namespace fastbert::cuda
