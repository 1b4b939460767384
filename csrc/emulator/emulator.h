// CUDA C++ on a CPU. A kernel source that includes csrc/cuda/launch.h is compiled by g++ or clang++ and
// linked with the .cpp files of this folder; docs/emulator.md says how, what a pass proves and what it
// cannot.
//
// CUDA's own headers give the types (float4, __half, __nv_bfloat16); nothing of its libraries is linked.
#pragma once
#if defined(__CUDACC__)
#error "emulator.h is for host compilers; a kernel source includes csrc/cuda/launch.h"
#endif

// Before CUDA's headers, which leave alone what is defined already.
#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
// Blocks run one after another. Thread-local variables of a library lie side by side, so that the scheduler
// can find all shared memory, fill it with NaN before each block and watch it; nothing else may be
// thread_local there.
#define __shared__ static thread_local

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifndef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#endif

// The built-in variables; of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "device_math.h"
#include "intrinsics.h"
#include "tensor_cores.h"

#undef assert
#define assert(condition) \
  ((condition) ? (void)0 : ::emulator::fail("assertion failed: " #condition, ::emulator::Location::here()))
