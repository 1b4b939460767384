// The launchers of csrc/cuda: one for each function of the contract, defined in <stem>.cu. Bindings, which a
// host compiler reads, include this and nothing of CUDA.
//
// The sizes of scratch, <stem>_scratch, come from the headers of that name.
//
// A launcher starts its kernels on the stream `a.launch` of the current device, waits for nothing, allocates
// nothing, and returns launch()'s number: 0, or an error that launch_error() describes.
#pragma once
#include "../contract.h"
#include "attention_scratch.h"
#include "gelu_scratch.h"
#include "layer_norm_scratch.h"
#include "lazy_adam_scratch.h"

namespace fastbert {

char* launch_error();  // launch.h's

namespace cuda {

// ---- gelu --------------------------------------------------------------------------------------------

int gelu_forward(const GeluForward& a);
int gelu_backward(const GeluBackward& a);

// ---- layer_norm and dropout --------------------------------------------------------------------------

int layer_norm_forward(const LayerNormForward& a);
int layer_norm_backward(const LayerNormBackward& a);
int dropout(const Dropout& a);

// ---- embedding and embedding_norm --------------------------------------------------------------------

int embedding_backward(const EmbeddingBackward& a);
int embedding_norm_forward(const EmbeddingNormForward& a);
int embedding_norm_recompute(const EmbeddingNormRecompute& a);

// ---- cross_entropy -----------------------------------------------------------------------------------

int cross_entropy_forward(const CrossEntropyForward& a);
int cross_entropy_backward(const CrossEntropyBackward& a);

// ---- attention ---------------------------------------------------------------------------------------

int attention_forward(const AttentionForward& a);
int attention_backward(const AttentionBackward& a);
int attention_plain_forward(const AttentionForward& a);  // without tensor cores, for any dtype and head size
int attention_plain_backward(const AttentionBackward& a);

// ---- hard_attention ----------------------------------------------------------------------------------

int hard_attention_forward(const HardAttentionForward& a);
int hard_attention_backward(const HardAttentionBackward& a);

// ---- attention_distillation --------------------------------------------------------------------------

int attention_distillation(const AttentionDistillation& a);

// ---- lazy_adam ---------------------------------------------------------------------------------------

int lazy_adam_steps(const LazyAdamStep* steps, int64_t count, int64_t launch);

// The same where `step` points to the number of the last step: it is raised, unless nothing is changed.
int lazy_adam_next_steps(const LazyAdamStep* steps, int64_t count, int64_t launch);

int lazy_adam_replay(const LazyAdamReplay& a);

// ---- norm of gradients -------------------------------------------------------------------------------

struct Gradient {
  const void* grad;           // [V, D] dtype, or any shape
  const uint8_t* named;       // [V]: rows where it is 0 do not count; null: all count
  int64_t elements, columns;  // V * D, D
  DType dtype;
};

// Doubles of scratch.
int64_t gradient_norm_scratch(const Gradient* gradients, int64_t count);

// norm [2]: the L2 norm of all gradients together, and what they are to be multiplied by so that it is at
// most max_norm.
int gradient_norm(const Gradient* gradients, int64_t count, double max_norm, double* scratch, float* norm,
                  int64_t launch);

// ---- what kernels find wrong in ids and bounds, which no host has looked at --------------------------

// A kernel that meets such an id neither reads nor writes by it, calls raise_fault() of faults.h, and goes
// on: the result that belongs to it is NaN, and a step by it changes nothing. Nobody waits for the
// answer: the words lie in memory of the host that the device can write, so every later call can look at
// them, also after replays of a captured graph. The next call of any op raises, before it starts anything,
// and so does fastbert.check_device_errors(), which waits for the device first.
enum Fault : int {
  kFaultLabel,      // a label of cross_entropy outside [0, V); its row
  kFaultSequence,   // cu_seqlens of attention that decrease, do not go from 0 to T or hold more than
                    // max_seqlen; its sequence
  kFaultRow,        // a row id of lazy_adam outside [0, V); its place in `rows`
  kFaultMissed,     // a row of lazy_adam_replay that stands before the recorded steps; its place in `rows`
  kFaultEmbedding,  // an id of embedding_norm outside its table; its token
  kFaults,
};

// [kFaults], each 0 or 1 + the place of one that was found, at most 2^31 - 1. Launchers hand the address to
// their kernels; null before anybody has asked for reports.
int32_t* fault_words();
void report_faults_to(int32_t* words);

// Reports go to memory of the host that is allocated here, once, and that every device can write. launch()'s
// number.
int report_faults();

// 13000: CUDA 13.0, which the module brings along.
int cuda_version();

}  // namespace cuda
}  // namespace fastbert
