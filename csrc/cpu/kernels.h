// The table of one instruction set's kernels. The sources of this folder are compiled once per instruction
// set, each time into a namespace of that name; `table.cpp` collects the addresses, and `bindings_cpu.cpp`
// picks one table when the module is loaded.
#pragma once
#include "../contract.h"

#if defined(__x86_64__)
#define FASTBERT_FOR_EACH_ISA(X) \
  X(sse2) X(avx2) X(avx512) X(avx512_bf16) X(amx_bf16)  // worst first, as in setup.py
#else
#define FASTBERT_FOR_EACH_ISA(X) X(baseline)
#endif

namespace fastbert {

// What the CPU's backend computes linear layers with, beside torch's libraries.

struct LinearProduct {  // c = a @ b + bias, M, N, K >= 1; see linear.cpp
  const void* a;        // [M, K] a_dtype
  const void* b;        // [K, N] b_dtype, or what linear_pack made of it
  const void* bias;     // [N] bias_dtype, or null
  void* c;              // [M, N] c_dtype contiguous; linear_pack: linear_packed(K, N) words
  int64_t a_row, a_column, b_row, b_column;     // elements between rows and columns, 1 for one of each pair
  int64_t rows, columns, depth;                 // M, N, K
  DType a_dtype, b_dtype, c_dtype, bias_dtype;  // float32 or bf16
  bool packed;                                  // b is
  int64_t launch;
};

struct LinearPack {  // b in the order in which linear_product reads it
  const void* b;     // [K, N] b_dtype
  void* packed;      // linear_packed(K, N) words
  int64_t b_row, b_column, columns, depth;
  DType b_dtype;
  int64_t launch;
};

struct Transpose {         // see transpose.cpp
  const uint32_t* source;  // [M, N] words of four bytes
  uint32_t* target;        // [N, M] contiguous
  int64_t rows, columns;
  int64_t row;  // words between the source's rows
  int64_t launch;
};

// Those with a result return -1, or the place of a label, sequence or row id that does not fit; then nothing
// was written.
#define FASTBERT_FOR_EACH_KERNEL(X)                         \
  X(void, gelu_forward, GeluForward)                        \
  X(void, gelu_backward, GeluBackward)                      \
  X(void, layer_norm_forward, LayerNormForward)             \
  X(void, layer_norm_backward, LayerNormBackward)           \
  X(void, dropout, Dropout)                                 \
  X(int64_t, embedding_norm_forward, EmbeddingNormForward)  \
  X(void, embedding_norm_recompute, EmbeddingNormRecompute) \
  X(int64_t, cross_entropy_forward, CrossEntropyForward)    \
  X(void, cross_entropy_backward, CrossEntropyBackward)     \
  X(int64_t, attention_forward, AttentionForward)           \
  X(void, attention_backward, AttentionBackward)            \
  X(int64_t, hard_attention_forward, HardAttentionForward)  \
  X(void, hard_attention_backward, HardAttentionBackward)   \
  X(int64_t, attention_distillation, AttentionDistillation) \
  X(void, linear_product, LinearProduct)                    \
  X(void, linear_pack, LinearPack)                          \
  X(void, transpose, Transpose)                             \
  X(int64_t, lazy_adam_replay, LazyAdamReplay)

struct Kernels {
#define FASTBERT_MEMBER_OF(Result, name, Arguments) Result (*name)(const Arguments&);
  FASTBERT_FOR_EACH_KERNEL(FASTBERT_MEMBER_OF)
#undef FASTBERT_MEMBER_OF
  int64_t (*linear_packed)(int64_t depth, int64_t columns);  // words of packed b
  // -1, or which of the steps names a row outside its table: then nothing was done
  int64_t (*lazy_adam_steps)(const LazyAdamStep* steps, int64_t count, int64_t launch);
  void (*philox)(uint64_t seed, const uint32_t counter[4], uint32_t words[4]);
};

}  // namespace fastbert
