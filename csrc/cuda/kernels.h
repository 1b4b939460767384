// The launchers of csrc/cuda: one for each function of the contract, defined in <stem>.cu. Bindings, which a
// host compiler reads, include this and nothing of CUDA.
#pragma once
#include "../contract.h"

namespace fastbert::cuda {

// ---- layer_norm and dropout --------------------------------------------------------------------------

int layer_norm_forward(const LayerNormForward& a);
int layer_norm_backward(const LayerNormBackward& a);
int dropout(const Dropout& a);

}  // namespace fastbert::cuda
