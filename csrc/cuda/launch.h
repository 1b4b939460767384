// The first include of every kernel source: CUDA under nvcc, csrc/emulator under a host compiler. Both know
//   DEVICE                    a function that kernels inline
//   DYNAMIC_SHARED(T, name)   T* name: the dynamic shared memory, aligned to 128 bytes
//   launch(name, kernel, grid, block, shared bytes, stream, arguments...)
//   CALLED_FROM               at the end of a function's parameters: the emulator reports the place where it
//   is
//                             called, `from`, instead of one in the function; nothing under nvcc
#pragma once
#include <stdio.h>

#if defined(__CUDACC__)
#include <assert.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define CALLED_FROM
#define DYNAMIC_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char dynamic_shared_raw[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_raw)
#else
#include "../emulator/emulator.h"

#define CALLED_FROM , emulator::Location from = emulator::Location::here()
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emulator::dynamic_shared_memory())
#endif

#define DEVICE __device__ __forceinline__

namespace fastbert {

constexpr size_t kErrorBytes = 1024;

// Why the last launch that failed did, of this host thread: the kernel, the error, and what was asked for.
// Bindings, which g++ compiles, declare it and leave this header out; so it is there even where all calls are
// inlined.
__attribute__((used)) inline char* launch_error() {
#if defined(__CUDACC__)
  static thread_local char text[kErrorBytes] = "";
#else
  static char text[kErrorBytes] = "";  // here what is thread-local is shared memory
#endif
  return text;
}

#if defined(__CUDACC__)

// Runs `kernel` on `stream` (a cudaStream_t). 0, or CUDA's error number with launch_error() set; then nothing
// runs. Of errors while the kernel runs only those of earlier launches can be known here.
template <class... Parameters, class... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           void* stream, Arguments... arguments) {
  constexpr size_t kGrantedBytes = 32 * 1024;  // without asking: 48 KiB, the kernel's own arrays in them
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kGrantedBytes)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        static_cast<Parameters>(arguments)...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    snprintf(launch_error(), kErrorBytes,
             "%s: %s (%s), grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory", name,
             cudaGetErrorString(error), cudaGetErrorName(error), grid.x, grid.y, grid.z, block.x, block.y,
             block.z, shared_bytes);
  return error;
}

#else

template <class... Parameters, class... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           Arguments... arguments) {
  const auto thread = [&]() __attribute__((no_sanitize("thread"))) {
    kernel(static_cast<Parameters>(arguments)...);
  };
  const auto call = [](const void* body)
                        __attribute__((no_sanitize("thread"))) { (*static_cast<decltype(&thread)>(body))(); };
  if (emulator::run_kernel(name, grid, block, shared_bytes, {call, &thread}) == 0) return 0;
  snprintf(launch_error(), kErrorBytes, "%s: %s", name, emulator_error());
  return cudaErrorLaunchFailure;
}

#endif

}  // namespace fastbert
