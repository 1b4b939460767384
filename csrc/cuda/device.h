// What a launcher asks about the current device, once.
#pragma once
#include <atomic>

#include "launch.h"

namespace fastbert::cuda {

// Bytes of shared memory that a block may ask for: 64 KB on sm_75, 99 on sm_86, 89 and 120, 163 on sm_80, 227
// on sm_90 and 100. 0 where there is no device; the launch then says why.
inline int shared_memory_limit() {
#if defined(__CUDACC__)
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < kDevices) bytes = known[device].load(std::memory_order_relaxed);
  if (bytes != 0) return bytes;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  if (device < kDevices) known[device].store(bytes, std::memory_order_relaxed);
  return bytes;
#else
  return 227 * 1024;
#endif
}

}  // namespace fastbert::cuda
