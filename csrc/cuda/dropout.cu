// Dropout of [T, H]: y = x * scale where an element is kept, 0 where it is dropped. Which are kept follows
// from the seed and from where they stand, so that the gradient is this very function of dy.
//
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
#include "launch.h"
//
#include "dropout.h"
#include "kernels.h"
#include "vectors.h"

namespace fastbert::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a thread, which reads them all before it draws

// Both directions. Rows are whole vectors of kVector elements, and lie one after the other.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const Dropout a, float scale, int64_t vectors, uint32_t vectors_of_row) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors);
  const int64_t first_row = first / vectors_of_row;
  const uint32_t first_place = static_cast<uint32_t>(first - first_row * vectors_of_row) + threadIdx.x;
  const T* x = static_cast<const T*>(a.x) + (first + threadIdx.x) * kVector;
  T* y = static_cast<T*>(a.y) + (first + threadIdx.x) * kVector;
  const int64_t left = vectors - first - threadIdx.x;
  const uint64_t seed = a.t ? static_cast<uint64_t>(__ldg(a.seed)) : 0;

  Packed<T, kVector> packed[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (i * kThreads < left) packed[i] = load_packed<kVector>(x + i * kThreads * kVector);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i * kThreads >= left) break;
    const uint32_t place = first_place + i * kThreads, column = place % vectors_of_row * kVector;
    const uint32_t kept =
        a.t ? kept_of_row(seed, first_row + place / vectors_of_row, column / kPerCall, a.t) : ~0u;
    float values[kVector];
    unpack<T, kVector>(packed[i], values);
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      values[j] = kept >> (column % kPerCall + j) & 1 ? values[j] * scale : 0.f;
    store<kVector>(y + i * kThreads * kVector, values);
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class T, int kVector>
int start(const Dropout& a) {
  const int64_t vectors = a.rows * a.columns / kVector, of_block = kThreads * kVectors;
  return launch("dropout", dropout_kernel<T, kVector>, (vectors + of_block - 1) / of_block, kThreads, 0,
                reinterpret_cast<void*>(a.launch), a, dropout_scale(a.t, kLaneBits), vectors,
                a.columns / kVector);
}

template <class T>
int rows(const Dropout& a) {
  constexpr int kVector = kAccessBytes / sizeof(T);
  const bool aligned = a.columns % kVector == 0 && are_aligned(kAccessBytes, a.x, a.y);
  return aligned ? start<T, kVector>(a) : start<T, 1>(a);
}

}  // namespace

int dropout(const Dropout& a) {
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_type(a.dtype, [&](auto x) { return rows<decltype(x)>(a); });
}

}  // namespace fastbert::cuda
