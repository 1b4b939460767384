// The launchers of csrc/cuda/attention_plain.cu by themselves, for whatever dtype and head size: the package
// calls them through attention.cu, which prefers tensor cores.
#include <stdexcept>

#include "../../csrc/bindings.h"
#include "../../csrc/cuda/kernels.h"

namespace {

int64_t checked(int error) {
  if (error != 0) throw std::runtime_error(fastbert::launch_error());
  return -1;
}

int64_t forward(const fastbert::AttentionForward& a) {
  return checked(fastbert::cuda::attention_plain_forward(a));
}
int64_t backward(const fastbert::AttentionBackward& a) {
  return checked(fastbert::cuda::attention_plain_backward(a));
}

}  // namespace

PYBIND11_MODULE(attention_plain, m) {
  fastbert::define<forward>(m, "attention_forward");
  fastbert::define<backward>(m, "attention_backward");
}
