// What every kernel takes, on every device: one struct per op and direction, of addresses and sizes, nothing
// of torch. Fields come in the order of the op's contract (fastbert/ops/<stem>.py), then results, sizes,
// types.
//
// One alphabet in every language: B sequences, S their longest, T tokens, H hidden size, N heads, D size
// of a head or columns of a table, V vocabulary or rows of a table, R touched rows. Ops of plain rows call T
// and H rows and columns.
//
// What lives on a device comes as an address: a kernel reads seed, learning rate and step count itself, so
// that nobody waits for the device, and a captured graph takes new ones. An address is null where there is
// nothing. `launch` says how to run: on the CPU the number of threads, which no result depends on; on a GPU
// the stream. How much `scratch` a kernel needs its module says, by functions called <stem>_scratch.
#pragma once
#include <cstdint>

namespace fastbert {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// On the CPU column sums over T rows are added up in so many chunks, whatever the number of threads, and the
// chunks in order: the rows of scratch that the backward kernels of gelu and layer_norm need there.
static inline int64_t reduction_chunks(int64_t rows) {
  const int64_t chunks = (rows + 31) / 32;
  return chunks < 64 ? chunks : 64;
}

// ---- gelu --------------------------------------------------------------------------------------------

struct GeluForward {  // y = gelu(x + bias)
  const void* x;      // [T, H] dtype
  const void* bias;   // [H] bias_dtype
  bool tanh_form;
  void* y;  // [T, H] dtype
  int64_t rows, columns;
  DType dtype, bias_dtype;
  int64_t launch;
};

struct GeluBackward {
  const void* dy;    // [T, H] dtype
  const void* x;     // [T, H] dtype
  const void* bias;  // [H] bias_dtype
  bool tanh_form;
  void* dx;        // [T, H] dtype
  void* dbias;     // [H] bias_dtype
  float* scratch;  // [gelu_scratch(T, H)] where there is a bias
  int64_t rows, columns;
  DType dtype, bias_dtype;
  int64_t launch;
};

// ---- layer_norm and dropout --------------------------------------------------------------------------

// t of the dropout contract: an element is kept where its lane >= t (see philox.h); 0 drops nothing. Then
// there is no seed.

struct LayerNormForward {  // z = residual + dropout(x + x_bias); y = (z - mean) * rstd * weight + bias
  const void* x;           // [T, H] dtype
  const void* x_bias;      // [H] weight_dtype
  const void* residual;    // [T, H] dtype
  const void* weight;      // [H] weight_dtype
  const void* bias;        // [H] weight_dtype
  float eps;
  uint32_t t;
  const int64_t* seed;  // [1]
  void* y;              // [T, H] dtype
  void* z;              // [T, H] dtype; null where it is x: nothing added, nothing dropped
  float *mean, *rstd;   // [T]; null, and z with them, where y alone is wanted
  int64_t rows, columns;
  DType dtype, weight_dtype;
  int64_t launch;
};

struct LayerNormBackward {
  const void *dy, *dy2;      // [T, H] dtype, of y's two uses; dy2 is null where it has one
  const void* z;             // [T, H] dtype
  const void* weight;        // [H] weight_dtype
  const float *mean, *rstd;  // [T]
  uint32_t t;
  const int64_t* seed;    // [1]
  void* dz;               // [T, H] dtype
  void* dx;               // [T, H] dtype; null where nothing was dropped: it is dz
  void *dweight, *dbias;  // [H] weight_dtype
  void* dx_bias;          // [H] weight_dtype; null where there was no x_bias
  float* scratch;         // [layer_norm_scratch(T, H, whether there was)]
  int64_t rows, columns;
  DType dtype, weight_dtype;
  int64_t launch;
};

struct Dropout {  // y = dropout(x); its gradient is the same of dy, so one struct serves both directions
  const void* x;  // [T, H] dtype
  uint32_t t;
  const int64_t* seed;  // [1]
  void* y;              // [T, H] dtype
  int64_t rows, columns;
  DType dtype;
  int64_t launch;
};

// ---- embedding --------------------------------------------------------------------------------------

struct EmbeddingBackward {  // dtable[id] += sum of dx over the tokens of that id; on GPUs alone
  const void* dx;           // [T, H] dtype
  const int64_t* ids;       // [T] in [0, V)
  int64_t padding_idx;      // nothing is added to this row; -1: none is left out
  bool fills;               // dtable holds nothing yet
  void* dtable;             // [V, H] dtype, changed in place
  int64_t rows, columns, table_rows;
  DType dtype;
  int64_t launch;
};

// ---- embedding_norm ----------------------------------------------------------------------------------

struct EmbeddingSum {  // z = words[word_id] + positions[position_id] + types[type_id] + tasks[task_id]
  const void *words, *positions, *types, *tasks;                 // [V, H] table_dtype; tasks: or null
  const int64_t *word_ids, *position_ids, *type_ids, *task_ids;  // [T]; types and tasks: null is all 0
  int64_t word_rows, position_rows, type_rows, task_rows, rows, columns;  // V of each, T, H
  DType dtype, table_dtype;  // of z and all that is [T, H]; of the tables: dtype or float32
  int64_t launch;
};

struct EmbeddingNormForward : EmbeddingSum {  // y = dropout((z - mean) * rstd * weight + bias)
  const void *weight, *bias;                  // [H] weight_dtype
  float eps;
  uint32_t t;
  const int64_t* seed;  // [1]
  void* y;              // [T, H] dtype
  float *mean, *rstd;   // [T]
  DType weight_dtype;
};

struct EmbeddingNormRecompute : EmbeddingSum {  // what layer_norm's backward pass takes
  const void* dy;  // [T, H] dtype; null where nothing was dropped: it stays as it is
  uint32_t t;
  const int64_t* seed;  // [1]
  void *z, *dropped;    // [T, H] dtype: z made anew, and dropout's gradient of dy; null with dy
};

// ---- cross_entropy -----------------------------------------------------------------------------------

struct CrossEntropyForward {  // loss = log(sum_j exp(x_j)) - x_label
  const void* logits;         // [T, V] dtype, rows `stride` elements apart
  const int64_t* labels;      // [T] in [0, V), or ignore_index: the row does not count
  int64_t ignore_index;
  bool mean;               // what becomes of the losses: their mean over rows that count, or their sum
  float* losses;           // [T]
  float *maximum, *total;  // [T]: max_j x_j and sum_j exp(x_j - maximum)
  float *result, *count;   // [1]: mean or sum, and how many rows count, at least 1; null: losses alone
  float* hits;             // [2]: how many rows are right, and how many count; null where `result` is
  int64_t rows, columns, stride;
  DType dtype;
  int64_t launch;
};

struct CrossEntropyBackward {
  const float* dlosses;  // [T], or [1] for all rows
  bool one_dloss;
  const void* logits;            // [T, V] dtype, rows `stride` elements apart
  const int64_t* labels;         // [T]
  const float *maximum, *total;  // [T]
  const float* count;            // [1], which dlosses are divided by; null: by 1
  int64_t ignore_index;
  void* dlogits;  // [T, stride] dtype: 0 in columns from V on
  int64_t rows, columns, stride;
  DType dtype;
  int64_t launch;
};

// ---- attention ---------------------------------------------------------------------------------------

struct Attention {            // what both directions take
  const void *q, *k, *v;      // [T, N, D] dtype, heads D apart
  const int32_t* cu_seqlens;  // [B + 1]
  int64_t max_seqlen;         // S
  float scale;
  uint32_t t;                              // of lanes of 8 bits
  const int64_t* seed;                     // [1]
  int64_t window_left, window_right;       // key j is visible to query i where i - left <= j <= i + right
  const uint8_t* global_tokens;            // [T]: 1 where it sees all and all see it; null: none
  const int32_t *query_ranks, *key_ranks;  // [T]: visible where key's <= query's; null: no ranks
  int64_t q_stride, k_stride, v_stride;    // elements between tokens
  int64_t tokens, sequences, heads, head_size;
  DType dtype;
  int64_t launch;
};

struct AttentionForward : Attention {
  void* out;   // [T, N, D] dtype
  float* lse;  // [T, N]: log of the sum of exp(scores), -inf where no key is visible
};

struct AttentionBackward : Attention {
  const void *dout, *out;  // [T, N, D] dtype
  const float* lse;        // [T, N]
  void* dqkv;              // [T, 3, N, D] dtype
  float* scratch;          // [attention_scratch(T, N, D)]; null where that is 0
};

// ---- hard_attention ----------------------------------------------------------------------------------

// Of `Attention` t is 0, and the seed that of Gumbel noise; null: there is none.

struct HardAttentionForward : Attention {
  float temperature;
  void* out;      // [T, N, D] dtype
  int32_t* best;  // [T, N]: a place in the query's sequence; -1: no score, or a NaN among them
  float* lse;     // [T, N]: log of the sum of exp(scores / temperature)
};

struct HardAttentionBackward : Attention {
  float temperature;
  const void* dout;     // [T, N, D] dtype
  const int32_t* best;  // [T, N]
  const float* lse;     // [T, N]
  void* dqkv;           // [T, 3, N, D] dtype
  float* scratch;       // [hard_attention_scratch(T, N)]; null where that is 0
};

// ---- attention_distillation --------------------------------------------------------------------------

// Of `Attention` q and k are the student's, v is k, nothing is dropped and a query sees all of its sequence.
// A head of either model may be several of its own, end to end.
struct AttentionDistillation : Attention {
  const void *teacher_q, *teacher_k;  // [T, N, E] dtype, heads E apart
  float teacher_scale;
  int64_t teacher_q_stride, teacher_k_stride, teacher_head_size;  // E
  float* loss;                                                    // [1]
  float *dq, *dk;                                                 // [T, N, D]
  float* scratch;                                                 // [attention_distillation_scratch(T, N)]
};

// ---- lazy_adam ---------------------------------------------------------------------------------------

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

// Numbers of scratch that a step over so many gradient rows needs on the CPU.
static inline int64_t lazy_adam_scratch(int64_t touched) {
  return 2 * (touched + 1) + (kLazyAdamSorters << kLazyAdamDigit);
}

struct LazyAdamStep {     // one parameter's; see fastbert/ops/lazy_adam.py for the formula
  void* param;            // [V, D] dtype
  void* exp_avg;          // [V, D] float, or bf16 where exp_avg_dtype says so
  float* exp_avg_sq;      // [V, D], or [V] where row_wise
  float* max_exp_avg_sq;  // likewise; null: no amsgrad
  int32_t* row_steps;     // [V]; null: bias correction counts this parameter's steps
  const int64_t* rows;    // [R], duplicates allowed; null: every row once
  const void* grad;       // [V, D] grad_dtype where rows is null or kLazyAdamGradByRow, else [R, D]
  const double* lr;       // [1]
  const float* step;      // [1]: the number of this step, from 1
  const int64_t* seed;    // [1]: a bf16 param is rounded stochastically; null: to nearest
  double beta1, beta2, eps, weight_decay;
  int64_t flags;
  int64_t padding_idx;                   // a row to leave alone; -1 for none
  uint32_t number;                       // tells parameters of one seed apart
  const float* grad_factor;              // [1]: gradients are multiplied by it; null: they are not
  const float* found_inf;                // [1]: not 0, and the step changes nothing; null: 0
  void* bf16_copy;                       // [V, D] bf16 of a float32 param: its new rows, rounded; null: none
  int32_t* scratch;                      // [lazy_adam_scratch(R, D)]; null without rows
  int64_t table_rows, touched, columns;  // V, R < 2^31, D
  DType dtype, exp_avg_dtype, grad_dtype;
  bool row_wise;
};

// Whether its gradient came with ids, of which there are none: the address of no ids is null.
static inline bool is_empty(const LazyAdamStep& p) { return p.scratch && p.touched == 0; }

constexpr int kReplayMoments = 9;  // of the missed steps' weights; the last bounds the error

// Doubles of scratch that a catch-up over so many recorded steps needs.
static inline int64_t lazy_adam_replay_scratch(int64_t steps) { return (steps + 1) * (kReplayMoments + 5); }

struct LazyAdamReplay {                 // see fastbert/ops/lazy_adam_replay.py for the formula
  float *param, *exp_avg, *exp_avg_sq;  // [V, D]
  int32_t* last_step;                   // [V]: the step to which each row has been brought
  const int64_t* rows;                  // [R], duplicates allowed; null: every row
  const double *lr, *decay;  // [steps]: learning rate and weight decay of the steps that may have been missed
  int64_t step;              // the recorded steps end with this number, to which rows are brought
  double beta1, beta2, eps;
  int64_t flags;                              // kLazyAdamEpsUncorrected, kLazyAdamNoBiasCorrection
  int64_t padding_idx;                        // a row to leave alone; -1 for none
  double* scratch;                            // [lazy_adam_replay_scratch(steps)]
  int64_t table_rows, named, columns, steps;  // V, R, D
  int64_t launch;
};

}  // namespace fastbert
