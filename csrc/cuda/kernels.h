// The launchers of csrc/cuda/<stem>.cu: each returns launch()'s number.
#pragma once
#include "../contract.h"

namespace fastbert {
namespace cuda {

int cross_entropy_forward(const CrossEntropyForward& a);
int cross_entropy_backward(const CrossEntropyBackward& a);

int attention_plain_forward(const AttentionForward& a);
int attention_plain_backward(const AttentionBackward& a);

}  // namespace cuda
}  // namespace fastbert
