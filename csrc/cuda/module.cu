// What the module has once: the version of CUDA in it, and where its kernels report ids and bounds that they
// cannot use; see kernels.h.
#include <string.h>

#include "launch.h"
//
#include "kernels.h"

namespace fastbert::cuda {

static int32_t* reported_to = nullptr;

int32_t* fault_words() { return reported_to; }
void report_faults_to(int32_t* words) { reported_to = words; }

int report_faults() {
  void* words = nullptr;
#if defined(__CUDACC__)
  // The first call may be one that a graph captures, where an allocation is refused unless the mode is
  // relaxed.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error =
      cudaHostAlloc(&words, kFaults * sizeof(int32_t), cudaHostAllocPortable | cudaHostAllocMapped);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) {
    snprintf(launch_error(), kErrorBytes, "memory for reports: %s (%s)", cudaGetErrorString(error),
             cudaGetErrorName(error));
    return error;
  }
#else
  static int32_t own[kFaults];
  words = own;
#endif
  memset(words, 0, kFaults * sizeof(int32_t));
  reported_to = static_cast<int32_t*>(words);
  return 0;
}

int cuda_version() { return CUDART_VERSION; }

}  // namespace fastbert::cuda
