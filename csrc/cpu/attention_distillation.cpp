// How far a student's attention scores are from a teacher's, and the gradient of that: for queries i and keys
// j of one sequence and a head n, q and k [T, N, D], the teacher's [T, N, E],
//
//   e_ij = scale * q_i . k_j - teacher_scale * teacher_q_i . teacher_k_j
//   loss = share * sum of e_ij^2 over all i, j and n,   share = 1 / (N * sum over sequences of length^2)
//   dq_i = 2 * share * scale * sum_j e_ij k_j,   dk_j = 2 * share * scale * sum_i e_ij q_i
//
// A difference of two products is one product of longer rows, so that no score of either model is kept:
//
//   e_ij = [scale * q_i, -teacher_scale * teacher_q_i] . [k_j, teacher_k_j]
//
// for every task                         a head of a sequence, or a run of its queries or keys
//   for every block of keys              kBlockKeys of them, packed once
//     for every block of queries         kBlockQueries of them
//       e, then its squares into the loss of each query, dq += e k, dk += e^T q
//
// Tasks are those of attention's backward pass. Everything is float32, whatever the dtype of what is read,
// and in an order that depends on the shapes alone: squares are summed by query in scratch [T, N], and these
// by one thread in double.
#include "attention_tasks.h"
#include "reduce.h"
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

constexpr int64_t kBlockKeys = 128, kBlockQueries = 64;
static_assert(kPiece % kBlockKeys == 0 && kPiece % kBlockQueries == 0, "blocks are the same in any task");

struct Call : AttentionDistillation {
  float share;
};

// `row_at` of the teacher's tensors.
template <typename T>
FASTBERT_INLINE const T* teacher_row_at(const Call& p, const Task& task, const void* x, int64_t stride,
                                        int64_t token) {
  return static_cast<const T*>(x) + (p.cu_seqlens[task.sequence] + token) * stride +
         task.head * p.teacher_head_size;
}

// A run of queries against a run of keys, a block of either at a time.
template <typename T>
struct DistillationTask {
  static constexpr int64_t kRow = row_of(kBlockKeys);  // of differences, and of keys by columns

  const Call& p;
  const Task& task;
  const int64_t size, teacher_size;        // of heads
  const int64_t columns, teacher_columns;  // of heads in whole vectors
  const int64_t width;                     // of both models' rows end to end
  // Of a block of keys.
  uint32_t* part;       // room to pack in
  uint32_t* both_keys;  // [width, kRow]: both models' keys by columns
  uint32_t* keys;       // [kBlockKeys, columns]: the student's
  float* dk;            // [kBlockKeys, columns]
  // Of a block of queries.
  float* queries;     // [kBlockQueries, width]: both models', scaled
  float* difference;  // [kBlockQueries, kRow]
  float* dq;          // [the task's queries, columns]
  Ahead& ahead;

  DistillationTask(const Call& p, const Task& task, Ahead& ahead)
      : p(p),
        task(task),
        size(p.head_size),
        teacher_size(p.teacher_head_size),
        columns(round_up(size, kLanes)),
        teacher_columns(round_up(teacher_size, kLanes)),
        width(size + teacher_columns),
        ahead(ahead) {
    const int64_t own = task.for_queries ? task.queries : 0;
    Scratch scratch(width * (kLanes + kRow + kBlockQueries) + columns * (2 * kBlockKeys + own) +
                    kBlockQueries * kRow + 128);
    part = scratch.words(kLanes * width);
    both_keys = scratch.words(width * kRow);
    keys = scratch.words(kBlockKeys * columns);
    dk = scratch.floats(kBlockKeys * columns);
    queries = scratch.floats(kBlockQueries * width);
    difference = scratch.floats(kBlockQueries * kRow);
    dq = scratch.floats(own * columns);
  }

  void run() {
    const int64_t last_query = task.query + task.queries, last_key = task.key + task.keys;
    for (int64_t key = task.key; key < last_key; key += kBlockKeys) {
      const int64_t count = min(kBlockKeys, last_key - key);
      pack_keys(key, count);
      for (int64_t query = task.query; query < last_query; query += kBlockQueries)
        add_block(query, min(kBlockQueries, last_query - query), key, count);
      if (task.for_keys) store_gradient(p.dk, key, count, dk, 2 * p.share);  // the queries are scaled
    }
    if (task.for_queries) store_gradient(p.dq, task.query, task.queries, dq, 2 * p.share * p.scale);
  }

  void pack_keys(int64_t key, int64_t count) {
    const T* rows = row_at<T>(p, task, p.k, p.k_stride, key);
    pack_rows<Floats>(rows, p.k_stride, count, size, keys, columns);
    pack_columns<Floats>(rows, p.k_stride, count, size, both_keys, kRow, columns, part);
    pack_columns<Floats>(teacher_row_at<T>(p, task, p.teacher_k, p.teacher_k_stride, key), p.teacher_k_stride,
                         count, teacher_size, both_keys + size * kRow, kRow, teacher_columns, part);
  }

  void pack_queries(int64_t query, int64_t count) {
    const T* rows = row_at<T>(p, task, p.q, p.q_stride, query);
    const T* teacher_rows = teacher_row_at<T>(p, task, p.teacher_q, p.teacher_q_stride, query);
    for (int64_t i = 0; i < count; ++i) {
      float* target = queries + i * width;
      store_row(target, rows + i * p.q_stride, size, p.scale);
      store_row(target + size, teacher_rows + i * p.teacher_q_stride, teacher_size, -p.teacher_scale);
    }
  }

  // What the block adds to the loss, to dq and to dk.
  void add_block(int64_t query, int64_t its_queries, int64_t key, int64_t its_keys) {
    pack_queries(query, its_queries);
    const uint32_t* left = reinterpret_cast<const uint32_t*>(queries);
    const uint32_t* e = reinterpret_cast<const uint32_t*>(difference);
    multiply<Floats>(its_queries, round_up(its_keys, kLanes), size + teacher_size, {left, width, 1},
                     {both_keys, kRow}, {difference, kRow}, false, ahead);
    if (task.for_queries) {
      add_squares(query, its_queries, its_keys, key > task.key);
      multiply<Floats>(its_queries, columns, its_keys, {e, kRow, 1}, {keys, columns},
                       {dq + (query - task.query) * columns, columns}, key > task.key, ahead);
    }
    if (task.for_keys)  // columns behind the student's are of no account
      multiply<Floats>(its_keys, columns, its_queries, {e, 1, kRow}, {left, width}, {dk, columns},
                       query > task.query, ahead);
  }

  void add_squares(int64_t query, int64_t its_queries, int64_t its_keys, bool add) {
    float* sums = p.scratch + (p.cu_seqlens[task.sequence] + query) * p.heads + task.head;
    for (int64_t i = 0; i < its_queries; ++i) {
      const float* row = difference + i * kRow;
      vfloat parts[4] = {};
      sweep<4>(its_keys, [&](int64_t j, int n, auto lanes) FASTBERT_LAMBDA {
        const vfloat e = lanes.load(row + j);
        parts[n] += e * e;
      });
      const float sum = reduce_add(parts[0] + parts[1] + (parts[2] + parts[3]));
      sums[i * p.heads] = add ? sums[i * p.heads] + sum : sum;
    }
  }

  void store_gradient(float* target, int64_t token, int64_t count, const float* sums, float factor) {
    float* row = target + ((p.cu_seqlens[task.sequence] + token) * p.heads + task.head) * p.head_size;
    for (int64_t i = 0; i < count; ++i)
      store_row(row + i * p.heads * p.head_size, sums + i * columns, p.head_size, factor);
  }
};

template <typename T>
void run_task(const Call& p, const Task& task, const Task* next) {
  Ahead ahead;
  if (next) {
    ahead.begin(length_of(p, next->sequence), max(p.head_size, p.teacher_head_size) * sizeof(T));
    prefetch_rows<T>(p, *next, p.q, p.q_stride, false, ahead);
    prefetch_rows<T>(p, *next, p.k, p.k_stride, false, ahead);
    ahead.add(teacher_row_at<T>(p, *next, p.teacher_q, p.teacher_q_stride, 0), p.teacher_q_stride * sizeof(T),
              false);
    ahead.add(teacher_row_at<T>(p, *next, p.teacher_k, p.teacher_k_stride, 0), p.teacher_k_stride * sizeof(T),
              false);
  }
  DistillationTask<T>(p, task, ahead).run();
}

}  // namespace

// ---- launchers ---------------------------------------------------------------------------------------

int64_t attention_distillation(const AttentionDistillation& p) {
  const int64_t bad = check_sequences(p);
  if (bad >= 0) return bad;
  double pairs = 0, total = 0;
  for (int64_t b = 0; b < p.sequences; ++b)
    pairs += static_cast<double>(length_of(p, b)) * static_cast<double>(length_of(p, b));
  const double share = pairs > 0 ? 1 / (pairs * static_cast<double>(p.heads)) : 0;
  const Call call = {p, static_cast<float>(share)};
  const auto plan = [&](auto emit) { plan_backward(p, emit); };
  switch (p.dtype) {
    case DType::f32:
      run_tasks(call, plan, run_task<float>);
      break;
    case DType::bf16:
      run_tasks(call, plan, run_task<bf16>);
      break;
    case DType::f16:
      run_tasks(call, plan, run_task<f16>);
      break;
  }
  for (int64_t i = 0; i < p.tokens * p.heads; ++i) total += p.scratch[i];
  *p.loss = static_cast<float>(total * share);
  return -1;
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
