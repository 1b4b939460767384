// What the module has once: the version of CUDA in it, where its kernels report ids and bounds that they
// cannot use (kernels.h), and which counters are whose (last_block.h).
#include <string.h>

#include <map>
#include <mutex>

#include "launch.h"
//
#include "kernels.h"
#include "last_block.h"

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

// Streams go by their ids, which are never given again, and graphs by those of their captures: a graph may be
// replayed beside whatever its stream does later.
int counter_set([[maybe_unused]] void* stream) {
#if defined(__CUDACC__)
  static std::mutex mutex;
  static std::map<std::pair<unsigned long long, unsigned long long>, int> sets;
  unsigned long long id = 0, capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamGetId(static_cast<cudaStream_t>(stream), &id) != cudaSuccess ||
      cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture) != cudaSuccess) {
    cudaGetLastError();  // the launch will say it
    return kCounterSets;
  }
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = sets.find({id, capture});
  if (found != sets.end()) return found->second;
  const int count = static_cast<int>(sets.size());
  if (count < kCounterSets) sets[{id, capture}] = count;
  return count;
#else
  return 0;
#endif
}

int cuda_version() { return CUDART_VERSION; }

}  // namespace fastbert::cuda
