// What every CPU kernel takes: raw addresses and sizes, nothing of torch. The sources of this folder are
// compiled once per instruction set, each time into a namespace of that name; `table.cpp` collects the
// addresses, and `bindings_cpu.cpp` picks one table when the module is loaded.
//
// Letters: M rows, N columns, T packed tokens, B sequences, H heads, D head size, V table rows, R touched
// rows. `threads` is the number of threads to use; results never depend on it.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#define FASTBERT_FOR_EACH_ISA(X) \
  X(sse2) X(avx2) X(avx512) X(avx512_bf16) X(amx_bf16)  // worst first, as in setup.py
#else
#define FASTBERT_FOR_EACH_ISA(X) X(baseline)
#endif

namespace fastbert {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Column sums over M rows are added up in so many chunks, whatever the number of threads, and the chunks in
// order: the rows of scratch that the backward kernels of gelu and layer_norm need.
static inline int64_t reduction_chunks(int64_t rows) {
  const int64_t chunks = (rows + 31) / 32;
  return chunks < 64 ? chunks : 64;
}

struct Gelu {        // y = gelu(x + bias); backward: dx and dbias
  const void* x;     // [M, N] dtype
  const void* bias;  // [N] bias_dtype, or null
  const void* dy;    // [M, N] dtype; backward only
  void* out;         // [M, N] dtype: y forward, dx backward
  void* dbias;       // [N] bias_dtype; backward only, null without bias
  float* scratch;    // [reduction_chunks(M), N]; backward with bias only
  int64_t rows, columns;
  DType dtype, bias_dtype;
  bool tanh_form;
  int threads;
};

struct LayerNorm {        // z = residual + dropout(x); y = (z - mean) * rstd * weight + bias
  const void* x;          // [M, N] dtype; backward: z (or x, when nothing was added or dropped)
  const void* residual;   // [M, N] dtype, or null; forward only
  const void* weight;     // [N] weight_dtype
  const void* bias;       // [N] weight_dtype; forward only
  const void* dy;         // [M, N] dtype; backward only
  void* y;                // [M, N] dtype: y forward, dz backward
  void* z;                // [M, N] dtype: z forward, dx backward; null when not wanted
  float *mean, *rstd;     // [M]
  void *dweight, *dbias;  // [N] weight_dtype; backward only
  float* scratch;         // [2, reduction_chunks(M), N]; backward only
  int64_t rows, columns;
  float eps;
  uint32_t drop_below;  // t of the dropout contract: an element is kept where its lane >= t; 0 drops nothing
  uint64_t seed;
  DType dtype, weight_dtype;
  int threads;
};

struct CrossEntropy {     // loss = log(sum_j exp(x_j)) - x_label, a row each; see cross_entropy.cpp
  const void* logits;     // [M, V] dtype
  const int64_t* labels;  // [M] in [0, V), or ignore_index: the row does not count
  const float* dlosses;   // [M]; backward only
  float* losses;          // [M]; forward only
  float *maximum, *sum;   // [M]: max_j x_j and sum_j exp(x_j - maximum)
  void* dlogits;          // [M, V] dtype; backward only
  int64_t rows, columns, ignore_index;
  DType dtype;
  int threads;
};

struct Attention {            // packed sequences; element strides of the token dimension, heads D apart
  const void *q, *k, *v;      // [T, H, D] dtype
  const void *out, *dout;     // [T, H, D] dtype contiguous; backward only
  void* result;               // [T, H, D] dtype contiguous: out; forward only
  float* lse;                 // [T, H]: log of the sum of exp(scores), -inf where no key is visible
  void* dqkv;                 // [T, 3, H, D] dtype contiguous; backward only
  const int32_t* cu_seqlens;  // [B + 1]
  int64_t q_stride, k_stride, v_stride;  // elements between tokens
  int64_t tokens, sequences, heads, head_dim;
  int64_t window_left, window_right;  // key j is visible to query i where i - left <= j <= i + right
  float scale;
  uint32_t drop_below;
  uint64_t seed;
  DType dtype;
  int threads;
};

struct LinearProduct {  // c = a @ b + bias, M, N, K >= 1; see linear.cpp
  const void* a;        // [M, K] a_dtype
  const void* b;        // [K, N] b_dtype, or what linear_pack made of it
  const void* bias;     // [N] bias_dtype, or null
  void* c;              // [M, N] c_dtype contiguous; linear_pack: linear_packed(K, N) words
  int64_t a_row, a_column, b_row, b_column;     // elements between rows and columns, 1 for one of each pair
  int64_t rows, columns, depth;                 // M, N, K
  DType a_dtype, b_dtype, c_dtype, bias_dtype;  // float32 or bf16
  bool packed;                                  // b is
  int threads;
};

struct Transpose {         // see transpose.cpp
  const uint32_t* source;  // [M, N] words of four bytes
  uint32_t* target;        // [N, M] contiguous
  int64_t rows, columns;
  int64_t row;  // words between the source's rows
  int threads;
};

enum LazyAdamFlags : int64_t {    // as in fastbert/ops/lazy_adam.py
  kLazyAdamGradByRow = 1,         // grad is [V, D], indexed by row
  kLazyAdamMaximize = 2,          // steps uphill
  kLazyAdamEpsUncorrected = 4,    // eps stands beside sqrt(v), before bias correction
  kLazyAdamNoBiasCorrection = 8,  // t is infinite
  kLazyAdamCoupledDecay = 16,     // weight decay joins the gradient
  kLazyAdamSkipZero = 32,         // a row whose gradient is all zero is left alone
};
constexpr int kLazyAdamDigit = 11;    // bits of a row id sorted at a time, at most
constexpr int kLazyAdamSorters = 16;  // threads that sort, at most

// Numbers of scratch that a step over so many gradient rows needs.
static inline int64_t lazy_adam_scratch(int64_t touched) {
  return 2 * (touched + 1) + (kLazyAdamSorters << kLazyAdamDigit);
}

struct LazyAdam {         // see lazy_adam.cpp for the formula
  void* param;            // [V, D] dtype
  void* exp_avg;          // [V, D] float, or bf16 where exp_avg_dtype says so
  float* exp_avg_sq;      // [V, D], or [V] where row_wise
  float* max_exp_avg_sq;  // likewise, or null: no amsgrad
  int32_t* row_steps;     // [V], or null: bias correction counts this parameter's steps
  const int64_t* rows;    // [R], duplicates allowed; null: every row once
  const void* grad;       // [V, D] grad_dtype where rows is null or kLazyAdamGradByRow, else [R, D]
  int32_t* scratch;       // [lazy_adam_scratch(R)]; null without rows
  int64_t table_rows, touched, columns;  // V, R < 2^31, D
  DType dtype, exp_avg_dtype, grad_dtype;
  bool row_wise;
  bool stochastic;  // a bf16 param is rounded with the random numbers of seed, number and step
  uint64_t seed;
  uint32_t number;
  int64_t padding_idx;  // a row to leave alone; -1 for none
  double lr, step, beta1, beta2, eps, weight_decay;
  int64_t flags;
};

constexpr int kReplayMoments = 9;  // of the missed steps' weights; the last bounds the error

// Doubles of scratch that a catch-up over so many recorded steps needs.
static inline int64_t lazy_adam_replay_scratch(int64_t steps) { return (steps + 1) * (kReplayMoments + 5); }

struct LazyAdamReplay {                 // see lazy_adam_replay.cpp for the formula
  float *param, *exp_avg, *exp_avg_sq;  // [V, D]
  int32_t* last_step;                   // [V]: the step to which each row has been brought
  const int64_t* rows;                  // [R], duplicates allowed; null: every row
  const double *lr, *decay;  // [steps]: learning rate and weight decay of the steps that may have been missed
  double* scratch;           // [lazy_adam_replay_scratch(steps)]
  int64_t table_rows, named, columns;  // V, R, D
  int64_t steps, step;                 // the recorded steps end with number `step`, to which rows are brought
  int64_t padding_idx;                 // a row to leave alone; -1 for none
  double beta1, beta2, eps;
  int64_t flags;  // kLazyAdamEpsUncorrected, kLazyAdamNoBiasCorrection
  int threads;
};

struct Kernels {
  void (*gelu_forward)(const Gelu&);
  void (*gelu_backward)(const Gelu&);
  void (*layer_norm_forward)(const LayerNorm&);
  void (*layer_norm_backward)(const LayerNorm&);
  void (*cross_entropy_forward)(const CrossEntropy&);
  void (*cross_entropy_backward)(const CrossEntropy&);
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);
  void (*linear_product)(const LinearProduct&);
  void (*linear_pack)(const LinearProduct&);
  int64_t (*linear_packed)(int64_t depth, int64_t columns);  // words of packed b
  void (*transpose)(const Transpose&);
  // -1, or which of the steps names a row outside its table: then nothing was done
  int64_t (*lazy_adam_steps)(const LazyAdam* steps, int64_t count, int threads);
  int64_t (*lazy_adam_replay)(const LazyAdamReplay&);  // -1, or the position of such a row id
  void (*philox)(uint64_t seed, const uint32_t counter[4], uint32_t words[4]);
};

}  // namespace fastbert
