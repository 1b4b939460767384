// The L2 norm of many gradients together, and what they are to be multiplied by so that it is at most
// max_norm:
//
//   norm = sqrt(sum of g * g),   factor = min(1, max_norm / (norm + 1e-6))     NaN stays in both
//
// A block adds up the squares of kChunk elements: each thread in float32, threads by a tree in double. Then
// one block adds up the chunks, in double. All in an order that follows from the sizes alone, so the bits are
// the same every time. Gradients are of any mixture of dtypes. Of one with `named` rows those alone count,
// and the others are not read.
#include "launch.h"
//
#include "kernels.h"
#include "reduce.h"
#include "tensor_list.h"
#include "vectors.h"

namespace fastbert::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4, kTotalThreads = 1024;
constexpr int64_t kChunk = 16384;

// ---- what the kernels take -------------------------------------------------------------------------------

struct Squared {
  const void* grad;
  const uint8_t* named;
  int64_t elements, columns;
  uint32_t first_chunk;
  uint8_t dtype;
  bool takes_vectors;
};

struct SquaresRest {
  double* partial;  // [chunks] of this launch
};

constexpr int kMostSquared = kMostTensors<Squared, SquaresRest>;
template <int kMost>
using SquaredList = TensorList<Squared, SquaresRest, kMost>;

// ---- squares ---------------------------------------------------------------------------------------------

DEVICE bool counts(const Squared& x, int64_t at) { return !x.named || x.named[at / x.columns]; }

// This thread's part of a chunk.
template <class T>
DEVICE double squares_of_thread(const Squared& x, int64_t begin, int64_t end) {
  constexpr int kWidth = kAccessBytes / static_cast<int>(sizeof(T)), kRound = kThreads * kWidth;
  const T* grad = static_cast<const T*>(x.grad);
  const int64_t whole = x.takes_vectors ? begin + (end - begin) / kWidth * kWidth : begin;
  float sum[kWidth] = {};
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x * kWidth; at < whole; at += kUnroll * kRound) {
    Packed<T, kWidth> packed[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      packed[u] = at + u * kRound < whole && counts(x, at + u * kRound)
                      ? load_packed<kWidth, Cache::streaming>(grad + at + u * kRound)
                      : Packed<T, kWidth>{};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float g[kWidth];
      unpack<T, kWidth>(packed[u], g);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(g[i], g[i], sum[i]);
    }
  }
  double total = 0.;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) total += sum[i];
#pragma unroll 1
  for (int64_t at = whole + threadIdx.x; at < end; at += kThreads) {
    const double g = counts(x, at) ? to_float(grad[at]) : 0.f;
    total += g * g;
  }
  return total;
}

// The sum over all threads of a block, for thread 0.
DEVICE double sum_over_block(double value) {
  __shared__ double partial[kWarpsPerBlock];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  if (lane_of_warp() == 0) partial[warp_of_block()] = value;
  __syncthreads();
  double total = 0.;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < warps_of_block(); ++warp) total += partial[warp];
  return total;
}

template <int kMost>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ SquaredList<kMost> list) {
  const Squared& x = list.tensors[tensor_of(list, blockIdx.x)];
  const int64_t begin = int64_t{blockIdx.x - x.first_chunk} * kChunk;
  const int64_t end = min(x.elements, begin + kChunk);
  const DType dtype = static_cast<DType>(x.dtype);
  double own;
  if (dtype == DType::f32)
    own = squares_of_thread<float>(x, begin, end);
  else if (dtype == DType::bf16)
    own = squares_of_thread<__nv_bfloat16>(x, begin, end);
  else
    own = squares_of_thread<__half>(x, begin, end);
  const double total = sum_over_block(own);
  if (threadIdx.x == 0) list.rest.partial[blockIdx.x] = total;
}

// ---- norm ------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kTotalThreads)
    norm_kernel(const double* __restrict__ partial, int64_t count, double max_norm, float* norm) {
  double own = 0.;
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) own += partial[i];
  const double squares = sum_over_block(own);
  if (threadIdx.x != 0) return;
  const float total = static_cast<float>(sqrt(squares));
  const double factor = max_norm / (total + 1e-6);
  norm[0] = total;
  norm[1] = factor >= 1. ? 1.f : static_cast<float>(factor);
}

int64_t chunks_of(const Gradient& g) { return (g.elements + kChunk - 1) / kChunk; }

template <int kMost>
int start(const SquaredList<kMost>& list, void* stream) {
  return launch("gradient_norm squares", squares_kernel<kMost>, list.chunks, kThreads, 0, stream, list);
}

int squares(const Gradient* gradients, int64_t count, double* partial, void* stream) {
  SquaredList<kMostSquared> list = {};
  list.rest.partial = partial;
  for (int64_t i = 0; i < count; ++i) {
    const Gradient& g = gradients[i];
    const int width = g.dtype == DType::f32 ? 4 : 8;
    const bool takes_vectors = are_aligned(kAccessBytes, g.grad) && (!g.named || g.columns % width == 0);
    list.tensors[list.count++] = {
        g.grad, g.named, g.elements, g.columns, list.chunks, static_cast<uint8_t>(g.dtype), takes_vectors};
    list.chunks += static_cast<uint32_t>(chunks_of(g));
  }
  if (list.chunks == 0) return 0;
  return list.count <= kFewTensors ? start(shortened<kFewTensors>(list), stream) : start(list, stream);
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------------

int64_t gradient_norm_scratch(const Gradient* gradients, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(gradients[i]);
  return chunks;
}

int gradient_norm(const Gradient* gradients, int64_t count, double max_norm, double* scratch, float* norm,
                  int64_t launch_on) {
  void* stream = reinterpret_cast<void*>(launch_on);
  int64_t chunks = 0;
  for (int64_t first = 0; first < count; first += kMostSquared) {
    const int64_t its = min(count - first, int64_t{kMostSquared});
    if (const int error = squares(gradients + first, its, scratch + chunks, stream); error != 0) return error;
    chunks += gradient_norm_scratch(gradients + first, its);
  }
  return launch("gradient_norm", norm_kernel, 1, kTotalThreads, 0, stream, scratch, chunks, max_norm, norm);
}

}  // namespace fastbert::cuda
