// What the module has once: the version of CUDA in it, and where its kernels report ids and bounds that they
// cannot use; see kernels.h.
#include "launch.h"
//
#include "kernels.h"

namespace fastbert::cuda {

static int32_t* reported_to = nullptr;

int32_t* fault_words() { return reported_to; }
void report_faults_to(int32_t* words) { reported_to = words; }

int cuda_version() { return CUDART_VERSION; }

}  // namespace fastbert::cuda
