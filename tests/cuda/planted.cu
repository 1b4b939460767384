// Kernels with one bug each, on the line marked PLANTED. test_emulator.py knows which check should name
// which. All read x and write y, n floats each.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.h"

namespace fastbert {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

DEVICE float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// ---- synchronisation ----

__global__ void missing_syncthreads_kernel(const float* x, float* y, int n) {  // y = x backwards
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[n - 1 - threadIdx.x];  // PLANTED missing_syncthreads
}

// The shuffles happen to keep the lanes together, but order no memory.
__global__ void missing_syncwarp_kernel(const float* x, float* y, int) {  // y[0] += sum of 32
  const float before = y[0];
  const float sum = warp_sum(x[threadIdx.x]);
  if (threadIdx.x == 0) y[0] = before + sum;  // PLANTED missing_syncwarp
}

__global__ void missing_atomic_kernel(const float* x, float* y,
                                      int) {  // y[0] += sum of a number from each block
  y[0] += x[blockIdx.x];                      // PLANTED missing_atomic
}

// Every block leaves a number, the last to arrive adds them up.
template <bool kFence>
__global__ void handoff_kernel(const float* x, float* y, int) {
  unsigned* arrived = reinterpret_cast<unsigned*>(y + 63);
  y[1 + blockIdx.x] = x[blockIdx.x];
  if (kFence) __threadfence();
  if (atomicAdd(arrived, 1u) + 1 < gridDim.x) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += y[1 + i];  // PLANTED missing_fence
  y[0] = sum;
}

// The same between the warps of a block, whose lanes each leave a number: lane 0 speaks for its warp.
template <bool kSyncwarp>
__global__ void warp_handoff_kernel(const float* x, float* y, int) {  // y[0] = sum of 64
  unsigned* arrived = reinterpret_cast<unsigned*>(y + 63);
  const int lane = threadIdx.x % 32;
  float* partial = y + 1;  // one half of the numbers for each warp; the last is in x alone
  if (threadIdx.x < 62) partial[threadIdx.x] = x[threadIdx.x];
  __threadfence();
  __syncwarp();
  unsigned before = 0;
  if (lane == 0) before = atomicAdd(arrived, 1u);
  before = __shfl_sync(kAllLanes, before, 0);
  if (before == 0) return;
  if (kSyncwarp) __syncwarp();  // what lane 0 has seen, the others have not yet
  const float two =
      partial[lane] + (lane < 30 ? partial[lane + 32] : x[lane + 32]);  // PLANTED missing_acquire
  const float sum = warp_sum(two);
  if (lane == 0) y[0] = sum;
}

__global__ void divergent_barrier_kernel(const float* x, float* y, int n) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 32)
    __syncthreads();  // PLANTED divergent_barrier
  else
    __syncthreads();
  y[threadIdx.x] = s[n - 1 - threadIdx.x];
}

__global__ void early_return_kernel(const float* x, float* y, int n) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x >= 48) return;
  __syncthreads();  // PLANTED early_return
  y[threadIdx.x] = s[n - 1 - threadIdx.x];
}

__global__ void lane_outside_mask_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);  // PLANTED lane_outside_mask
}

__global__ void half_a_warp_kernel(const float* x, float* y, int) {
  if (threadIdx.x < 16) y[threadIdx.x] = warp_sum(x[threadIdx.x]);  // PLANTED half_a_warp
}

__global__ void shuffle_from_outside_kernel(const float* x, float* y,
                                            int) {  // y = x of the lane below, in half a warp
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, x[threadIdx.x], threadIdx.x + 1);
}

// On a GPU both blocks run at once, mostly.
__global__ void waiting_block_kernel(const float*, float* y, int) {
  if (blockIdx.x == 1) store_relaxed(y, 1.f);
  while (load_relaxed(y) == 0) {  // PLANTED waiting_block
  }
}

// ---- asynchronous copies ----

template <int kGroupsLeft>
__global__ void copy_kernel(const float* x, float* y, int) {  // y = x, in two groups
  __shared__ float s[64];
  copy_async<4>(shared_address(&s[threadIdx.x]), &x[threadIdx.x], true);
  commit_copies();
  copy_async<4>(shared_address(&s[threadIdx.x + 32]), &x[threadIdx.x + 32], true);
  commit_copies();
  wait_for_copies<kGroupsLeft>();
  y[threadIdx.x] = s[threadIdx.x];
  y[threadIdx.x + 32] = s[threadIdx.x + 32];  // PLANTED weak_wait
  wait_for_copies<0>();
}

__global__ void copy_without_wait_kernel(const float* x, float*, int) {
  __shared__ float s[64];
  copy_async<4>(shared_address(&s[threadIdx.x]), &x[threadIdx.x], true);
  commit_copies();
}

// ---- addresses ----

__global__ void off_by_one_kernel(const float* x, float* y, int n) {
  if (static_cast<int>(threadIdx.x) <= n)
    y[threadIdx.x] = x[min(static_cast<int>(threadIdx.x), n - 1)];  // PLANTED off_by_one
}

__global__ void misaligned_vector_kernel(const float* x, float* y, int) {  // y = sums of four of x[1:]
  const float4 v = reinterpret_cast<const float4*>(x + 1)[threadIdx.x];    // PLANTED misaligned_vector
  y[threadIdx.x] = (v.x + v.y) + (v.z + v.w);
}

__global__ void misaligned_copy_kernel(const float* x, float* y, int) {
  __shared__ __align__(16) float s[64];
  const float* source = &x[threadIdx.x * 4 + 1];
  copy_async<16>(shared_address(&s[threadIdx.x * 4]), source, true);  // PLANTED misaligned_copy
  commit_copies();
  wait_for_copies<0>();
  y[threadIdx.x] = s[threadIdx.x * 4];
}

__global__ void write_to_input_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  const_cast<float*>(x)[threadIdx.x] = y[threadIdx.x];  // PLANTED write_to_input
}

__global__ void index_outside_array_kernel(const float* x, float* y,
                                           int) {  // y = x, by way of the next place
  __shared__ float s[64];
  s[threadIdx.x + 1] = x[threadIdx.x];  // PLANTED index_outside_array
  y[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void dynamic_overrun_kernel(const float* x, float* y, int) {
  DYNAMIC_SHARED(float, s);
  s[threadIdx.x + 1] = x[threadIdx.x];  // PLANTED dynamic_overrun
  y[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void null_address_kernel(const float*, float*, int) {
  *reinterpret_cast<volatile float*>(threadIdx.x) = 1;  // PLANTED null_address
}

__global__ void failed_assertion_kernel(const float*, float*, int n) {
  assert(static_cast<int>(threadIdx.x) != n - 1);  // PLANTED failed_assertion
}

// ---- what was never written ----

__global__ void uninitialised_shared_kernel(const float* x, float* y, int n) {  // y = x
  __shared__ float s[64];
  if (static_cast<int>(threadIdx.x) < n - 1) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];  // PLANTED uninitialised_shared
}

__global__ void accumulates_into_output_kernel(const float* x, float* y, int) {
  y[threadIdx.x] += x[threadIdx.x];  // PLANTED accumulates_into_output
}

// ---- speed ----

__global__ void bank_conflict_kernel(const float* x, float* y, int) {
  __shared__ float s[32][32];
  for (int i = 0; i < 32; ++i) s[i][threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x][0];  // PLANTED bank_conflict
}

__global__ void uncoalesced_kernel(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x * 8];  // PLANTED uncoalesced
}

}  // namespace
}  // namespace fastbert

using namespace fastbert;

#define LAUNCHER(name, kernel, blocks, threads, shared_bytes)                     \
  extern "C" int name(const float* x, float* y, int64_t n, void* stream) {        \
    return launch(#name, kernel, blocks, threads, shared_bytes, stream, x, y, n); \
  }

LAUNCHER(missing_syncthreads, missing_syncthreads_kernel, 1, 64, 0)
LAUNCHER(missing_syncwarp, missing_syncwarp_kernel, 1, 32, 0)
LAUNCHER(missing_atomic, missing_atomic_kernel, 4, 1, 0)
LAUNCHER(missing_fence, handoff_kernel<false>, 4, 1, 0)
LAUNCHER(handoff, handoff_kernel<true>, 4, 1, 0)
LAUNCHER(missing_acquire, warp_handoff_kernel<false>, 1, 64, 0)
LAUNCHER(warp_handoff, warp_handoff_kernel<true>, 1, 64, 0)
LAUNCHER(divergent_barrier, divergent_barrier_kernel, 1, 64, 0)
LAUNCHER(early_return, early_return_kernel, 1, 64, 0)
LAUNCHER(lane_outside_mask, lane_outside_mask_kernel, 1, 32, 0)
LAUNCHER(half_a_warp, half_a_warp_kernel, 1, 32, 0)
LAUNCHER(waiting_block, waiting_block_kernel, 2, 1, 0)
LAUNCHER(shuffle_from_outside, shuffle_from_outside_kernel, 1, 32, 0)
LAUNCHER(weak_wait, copy_kernel<1>, 1, 32, 0)
LAUNCHER(strong_wait, copy_kernel<0>, 1, 32, 0)
LAUNCHER(copy_without_wait, copy_without_wait_kernel, 1, 32, 0)
LAUNCHER(off_by_one, off_by_one_kernel, 1, 96, 0)
LAUNCHER(misaligned_vector, misaligned_vector_kernel, 1, 15, 0)
LAUNCHER(misaligned_copy, misaligned_copy_kernel, 1, 15, 0)
LAUNCHER(write_to_input, write_to_input_kernel, 1, 64, 0)
LAUNCHER(index_outside_array, index_outside_array_kernel, 1, 64, 0)
LAUNCHER(dynamic_overrun, dynamic_overrun_kernel, 1, 64, 64 * 4)
LAUNCHER(null_address, null_address_kernel, 1, 32, 0)
LAUNCHER(failed_assertion, failed_assertion_kernel, 1, 64, 0)
LAUNCHER(uninitialised_shared, uninitialised_shared_kernel, 1, 64, 0)
LAUNCHER(accumulates_into_output, accumulates_into_output_kernel, 1, 64, 0)
LAUNCHER(bank_conflict, bank_conflict_kernel, 1, 32, 0)
LAUNCHER(uncoalesced, uncoalesced_kernel, 1, 8, 0)
LAUNCHER(too_many_threads, write_to_input_kernel, 1, 2048, 0)
LAUNCHER(too_much_shared_memory, dynamic_overrun_kernel, 1, 64, 228 * 1024)
