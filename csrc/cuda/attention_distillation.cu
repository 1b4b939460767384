// How far a student's attention scores are from a teacher's, and the gradient of that: for queries i and keys
// j of one sequence and a head n, q and k [T, N, D], the teacher's [T, N, E],
//
//   e_ij = scale * q_i . k_j - teacher_scale * teacher_q_i . teacher_k_j
//   loss = share * sum of e_ij^2 over all i, j and n,   share = 1 / (N * sum over sequences of length^2)
//   dq_i = 2 * share * scale * sum_j e_ij k_j,   dk_j = 2 * share * scale * sum_i e_ij q_i
//
// It is built as attention_plain.cu is, from the same tiles: no tensor cores, for any dtype, head size and
// GPU. Everything is float32, whatever the dtype of what is read, and in a fixed order.
//
// The gradients of queries and of keys are one computation with the two exchanged. A block takes 64 rows of
// one sequence and head, of queries or of keys, and goes through the rows of the other kind by 64:
//
//   for each 64 of the others:
//     theirs = teacher's rows others^T, e = rows others^T     64 columns of the heads at a time
//     e = scale * e - teacher_scale * theirs, in registers
//     result += e others
//
// Blocks of queries also leave the sum of each query's e^2 in scratch [T, N]; a second kernel adds these.
#include "launch.h"
//
#include "attention_plain_work.h"
#include "kernels.h"

namespace fastbert::cuda {
namespace {

constexpr int kBytes = 4 * (3 * kTileFloats + kStripFloats);
static_assert(kBytes + 4 * kWarpsPerBlock <= 64 << 10, "sm_75 gives a block 64 KB");
constexpr int kLossThreads = 1024;

// 1 / (heads * pairs of tokens): each thread of a block gets it.
DEVICE float share_of(const AttentionDistillation& p, float (&partial)[1][kWarpsPerBlock]) {
  float pairs[1] = {};
#pragma unroll 1
  for (int64_t b = threadIdx.x; b < p.sequences; b += blockDim.x) {
    const float length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    pairs[0] += length * length;
  }
  block_sum(pairs, partial);
  return pairs[0] > 0 ? 1 / (pairs[0] * p.heads) : 0.f;
}

// The queries of both models, or the keys.
struct Side {
  const void *student, *teacher;
  int64_t stride, teacher_stride;
};

// `rows_of` the teacher's tensors.
template <class T>
DEVICE Rows<T> teacher_rows_of(const void* tensor, int64_t stride, const AttentionDistillation& p,
                               const Work& work, int row) {
  const T* head = static_cast<const T*>(tensor) + work.head * p.teacher_head_size;
  return {head + (work.begin + row) * stride, stride, min(kTile, work.length - row)};
}

// ---- loss and gradients ------------------------------------------------------------------------------

// Blocks of z 0 are of queries, those of z 1 of keys.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_distillation_kernel(AttentionDistillation p, Plan plan, bool teacher_vectors) {
  DYNAMIC_SHARED(float, memory);
  __shared__ float partial[1][kWarpsPerBlock];
  float *own_tile = memory, *teacher_tile = own_tile + kTileFloats, *tile = teacher_tile + kTileFloats;
  float* strip = tile + kTileFloats;
  const Work work = work_of_block(p, plan);
  if (work.row >= work.length) return;
  const bool of_queries = blockIdx.z == 0;
  const int head_size = p.head_size, teacher_size = p.teacher_head_size;
  const bool narrow = head_size <= kTile, teacher_narrow = teacher_size <= kTile;
  const Side queries = {p.q, p.teacher_q, p.q_stride, p.teacher_q_stride};
  const Side keys = {p.k, p.teacher_k, p.k_stride, p.teacher_k_stride};
  const Side its = of_queries ? queries : keys, others = of_queries ? keys : queries;
  const Rows<T> own = rows_of<T>(its.student, its.stride, p, work, work.row);
  const Rows<T> teacher_own = teacher_rows_of<T>(its.teacher, its.teacher_stride, p, work, work.row);

  Results gradient = {};
  float squares[kRows] = {};  // of this thread's columns
#pragma unroll 1
  for (int first = 0; first < work.length; first += kTile) {
    // products
    const Rows<T> other = rows_of<T>(others.student, others.stride, p, work, first);
    const Rows<T> teacher_other = teacher_rows_of<T>(others.teacher, others.teacher_stride, p, work, first);
    Products e, theirs;
    multiply_rows(theirs, teacher_tile, teacher_own, teacher_narrow && first > 0, tile, teacher_other,
                  teacher_size, teacher_vectors);
    multiply_rows(e, own_tile, own, narrow && first > 0, tile, other, head_size, plan.vectors);

    // difference; 0 behind the last row, where infinite numbers would have made it NaN
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const bool there = column() + j * kHalfWarp < other.count;
        e[i][j] = there ? p.scale * e[i][j] - p.teacher_scale * theirs[i][j] : 0.f;
        squares[i] += e[i][j] * e[i][j];
      }

    // gradient
    if (!narrow) {
      __syncthreads();
      copy_tile(tile, other, work.slice * kTile, head_size, plan.vectors);
      __syncthreads();
    }
    if (has_rows(own.count)) add_products(gradient, e, strip, tile, other.count);
  }

  const float factor = 2 * p.scale * share_of(p, partial);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row() + 2 * i;
    const float sum = half_warp_sum(squares[i]);
    if (row >= own.count) continue;
    const int64_t place = (work.begin + work.row + row) * p.heads + work.head;
    store_row((of_queries ? p.dq : p.dk) + place * head_size, gradient[i], factor, work.slice, head_size,
              plan.results);
    if (of_queries && column() == 0 && work.slice == 0) p.scratch[place] = sum;
  }
}

// The sum of all squares, by one block. With a sequence that cannot be used some were not written: NaN.
__global__ void __launch_bounds__(kLossThreads) attention_distillation_loss_kernel(AttentionDistillation p) {
  __shared__ float partial[2][1][kWarpsPerBlock];
  bool is_bad = false;
#pragma unroll 1
  for (int64_t b = threadIdx.x; b < p.sequences; b += kLossThreads) is_bad |= !is_usable(p, b);
  if (__syncthreads_or(is_bad)) {
    if (threadIdx.x == 0) *p.loss = NAN;
    return;
  }
  float squares[1] = {};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < p.tokens * p.heads; i += kLossThreads) squares[0] += p.scratch[i];
  const float share = share_of(p, partial[0]);
  block_sum(squares, partial[1]);
  if (threadIdx.x == 0) *p.loss = squares[0] * share;
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class T>
int differentiate(const AttentionDistillation& p) {
  constexpr int64_t kVector = kAccessBytes / static_cast<int64_t>(sizeof(T));
  Plan plan = plan_of<T>(p, true, p.dq);
  plan.results = plan.results && are_aligned(kAccessBytes, p.dk);
  const bool teacher_vectors =
      (p.teacher_q_stride | p.teacher_k_stride | p.teacher_head_size) % kVector == 0 &&
      are_aligned(kAccessBytes, p.teacher_q, p.teacher_k);
  dim3 grid = grid_of(p, plan);
  grid.z = 2;
  return launch("attention_distillation", attention_distillation_kernel<T>, grid, kThreads, kBytes,
                reinterpret_cast<void*>(p.launch), p, plan, teacher_vectors);
}

}  // namespace

int attention_distillation(const AttentionDistillation& p) {
  if (!is_empty(p))
    if (const int error = with_type(p.dtype, [&](auto x) { return differentiate<decltype(x)>(p); }))
      return error;
  return launch("attention_distillation", attention_distillation_loss_kernel, 1, kLossThreads, 0,
                reinterpret_cast<void*>(p.launch), p);
}

}  // namespace fastbert::cuda
