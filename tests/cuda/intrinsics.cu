// What a warp's intrinsics and ptx.h's instructions give, lane by lane, for test_intrinsics.py. One warp
// each.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.h"

namespace fastbert {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// y[i, lane]: the i-th intrinsic of x[lane].
__global__ void warp_kernel(const int* x, int* y) {
  const int lane = threadIdx.x, value = x[lane];
  int i = 0;
  const auto put = [&](int result) { y[i++ * 32 + lane] = result; };
  put(__shfl_sync(kAllLanes, value, 5));
  put(__shfl_sync(kAllLanes, value, 9, 8));  // lane 1 of each segment of eight
  put(__shfl_up_sync(kAllLanes, value, 3));
  put(__shfl_down_sync(kAllLanes, value, 2, 16));
  put(__shfl_xor_sync(kAllLanes, value, 4));
  put(static_cast<int>(__ballot_sync(kAllLanes, value > 0)));
  put(__any_sync(kAllLanes, value == 7));
  put(__all_sync(kAllLanes, value >= 0));
  put(static_cast<int>(__match_any_sync(kAllLanes, value)));
  put(__reduce_add_sync(kAllLanes, value));
  put(__reduce_min_sync(kAllLanes, value));
  put(__reduce_max_sync(kAllLanes, value));
  put(static_cast<int>(__reduce_xor_sync(kAllLanes, static_cast<unsigned>(value))));
  put(__syncthreads_count(value > 0));
  put(__syncthreads_or(value == 7));
  put(__syncthreads_and(value >= 0));
  put(static_cast<int>(__byte_perm(0x33221100u, 0x77665544u, 0x6530u)));
  put(static_cast<int>(__umulhi(0xdeadbeefu, 0x12345678u)));
  put(static_cast<int>(halves_at_least(0x64056404u, 0x64056405u)));  // 1029 and 1028 against 1029, in fp16
}

// Atomics on y, all lanes on one place each.
__global__ void atomics_kernel(const int* x, int* y) {
  const int value = x[threadIdx.x];
  atomicAdd(&y[0], value);
  atomicSub(&y[1], value);
  atomicMin(&y[2], value);
  atomicMax(&y[3], value);
  atomicOr(reinterpret_cast<unsigned*>(&y[4]), 1u << threadIdx.x);
  atomicInc(reinterpret_cast<unsigned*>(&y[5]), 9u);
  for (int seen = load_relaxed(&y[6]), old = seen + 1; old != seen;) {  // y[6] += value, by compare and swap
    old = seen;
    seen = atomicCAS(&y[6], old, old + value);
  }
  if (threadIdx.x == 0) atomicExch(&y[7], value);
  store_relaxed(&y[8], 12);  // all the same
}

// c[16, 8] = a[16, 8] b[8, 8]
__global__ void tf32_kernel(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, i = threadIdx.x % 4;
  const auto word = [](float x) { return __float_as_uint(x); };
  const uint32_t rows[4] = {word(a[g * 8 + i]), word(a[(g + 8) * 8 + i]), word(a[g * 8 + i + 4]),
                            word(a[(g + 8) * 8 + i + 4])};
  const uint32_t columns[2] = {word(b[i * 8 + g]), word(b[(i + 4) * 8 + g])};
  float sums[4] = {};
  mma_m16n8k8_tf32(sums, rows, columns);
  for (int j = 0; j < 4; ++j) c[(g + j / 2 * 8) * 8 + 2 * i + j % 2] = sums[j];
}

// c[16, 16] = a[16, 16] b[16, 16], both by rows: b's fragments come transposed.
template <class T>
__global__ void transposed_kernel(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T rows_a[16][16];
  __shared__ __align__(16) T rows_b[16][16];
  const int lane = threadIdx.x;
  for (int j = lane; j < 256; j += 32) {
    rows_a[j / 16][j % 16] = a[j];
    rows_b[j / 16][j % 16] = b[j];
  }
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[4];
  ldmatrix_x4(fragment_a, shared_address(&rows_a[lane % 16][lane / 16 * 8]));
  ldmatrix_x4<true>(fragment_b, shared_address(&rows_b[lane % 16][lane / 16 * 8]));
  for (int n = 0; n < 2; ++n) {
    float sums[4] = {};
    mma_m16n8k16<T>(sums, fragment_a, {fragment_b[2 * n], fragment_b[2 * n + 1]});
    for (int j = 0; j < 4; ++j) c[(lane / 4 + j / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + j % 2] = sums[j];
  }
}

}  // namespace
}  // namespace fastbert

using namespace fastbert;

extern "C" {

int warp_intrinsics(const int* x, int* y, void* stream) {
  return launch("warp_intrinsics", warp_kernel, 1, 32, 0, stream, x, y);
}
int atomics(const int* x, int* y, void* stream) {
  return launch("atomics", atomics_kernel, 1, 32, 0, stream, x, y);
}
int tf32_product(const float* a, const float* b, float* c, void* stream) {
  return launch("tf32_product", tf32_kernel, 1, 32, 0, stream, a, b, c);
}
int transposed_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, void* stream) {
  return launch("transposed_bf16", transposed_kernel<__nv_bfloat16>, 1, 32, 0, stream, a, b, c);
}
int transposed_fp16(const __half* a, const __half* b, float* c, void* stream) {
  return launch("transposed_fp16", transposed_kernel<__half>, 1, 32, 0, stream, a, b, c);
}
}
