// How attention's work is cut into tasks for any number of threads, and where a task's rows stand.
//
//   for every task, the longest first      a head of a sequence: all of it, or a run of queries or keys
//     for every block of keys              packed once; kKeys of them, in backward kBackwardKeys
//       for every block of queries         kQueries of them, in backward kBackwardQueries
//         a few products out of L2 and the softmax between them
//
// Forward takes runs of up to kRun queries, or of fewer blocks where there would not be four tasks for each
// thread: 16 sequences of 128 tokens with 12 heads are 192 tasks of one run each, but one head of one
// sequence of 1000 tokens is 21 runs of 48 queries on 8 threads.
//
// Backward takes a head of a sequence whole, for 5 products a block, unless it is more than a thread's share
// of the work or longer than kSpan: 12 heads of 1000 tokens are 12 tasks on 8 threads. On 16 threads that
// would leave some idle: 8 runs of 128 queries, for dq alone by 3 products, and 8 runs of keys, for dk and dv
// by 4, are 16 tasks a head.
#pragma once
#include "amx.h"
#include "matmul.h"
#include "packing.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kQueries = 48;         // queries of a block in forward
constexpr int64_t kRun = 11 * kQueries;  // queries of a forward task at most
constexpr int64_t kSpan = 2048;  // queries that a backward task packs at a time: scratch is for so many
constexpr int64_t kPiece = 128;  // queries, or keys, of a backward task where a sequence takes several

// ---- tasks -------------------------------------------------------------------------------------------

// Forward: a run of queries against all keys. Backward: gradients of a run of queries, of a run of keys, or,
// where both runs are the whole sequence, of all at once for 5 products instead of 3 and 4.
struct Task {
  int64_t sequence, head, query, queries, key, keys;
  bool for_queries, for_keys;
  int64_t work;
};

static int by_work(const void* a, const void* b) {
  const int64_t x = static_cast<const Task*>(a)->work, y = static_cast<const Task*>(b)->work;
  return x < y ? 1 : x > y ? -1 : 0;
}

FASTBERT_INLINE int64_t length_of(const Attention& p, int64_t sequence) {
  return p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence];
}

// -1, or the sequence at which cu_seqlens does not make up the tokens.
FASTBERT_INLINE int64_t check_sequences(const Attention& p) {
  if (p.max_seqlen < 0 || p.max_seqlen > INT32_MAX || p.cu_seqlens[0] != 0) return 0;
  for (int64_t b = 0; b < p.sequences; ++b)
    if (length_of(p, b) < 0 || length_of(p, b) > p.max_seqlen) return b;
  return p.cu_seqlens[p.sequences] == p.tokens ? -1 : p.sequences;
}

// body(head) for every head, neighbours far apart: threads that write neighbours at the same time would take
// turns with their cache lines.
template <typename Body>
FASTBERT_INLINE void over_heads(const Attention& p, Body body) {
  const int64_t stride = ceil_div(p.heads, p.launch);
  for (int64_t first = 0; first < stride; ++first)
    for (int64_t head = first; head < p.heads; head += stride) body(head);
}

template <typename Emit>
static void plan_forward(const Attention& p, Emit emit) {
  const auto count = [&](int64_t run) {
    int64_t tasks = 0;
    for (int64_t b = 0; b < p.sequences; ++b) tasks += ceil_div(length_of(p, b), run) * p.heads;
    return tasks;
  };
  int64_t run = kRun;  // whole blocks: a NaN of an unseen key spoils the block, in any task
  while (run > kQueries && count(run) < 4 * p.launch) run = run / kQueries / 2 * kQueries;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t length = length_of(p, b);
    over_heads(p, [&](int64_t head) {
      for (int64_t first = 0; first < length; first += run) {
        const int64_t queries = min(run, length - first);
        emit(Task{b, head, first, queries, 0, length, true, false, queries * length});
      }
    });
  }
}

template <typename Emit>
static void plan_backward(const Attention& p, Emit emit) {
  int64_t total = 0;
  for (int64_t b = 0; b < p.sequences; ++b) total += length_of(p, b) * length_of(p, b) * p.heads;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t length = length_of(p, b);
    const bool whole = length <= kSpan && length * length <= total / p.launch;
    const int64_t run = whole ? kSpan : kPiece;
    over_heads(p, [&](int64_t head) {
      for (int64_t first = 0; first < length; first += run) {
        const int64_t n = min(run, length - first);
        if (whole) {
          emit(Task{b, head, 0, length, 0, length, true, true, 5 * length * length});
        } else {
          emit(Task{b, head, first, n, 0, length, true, false, 3 * n * length});
          emit(Task{b, head, 0, length, first, n, false, true, 4 * n * length});
        }
      }
    });
  }
}

// The longest tasks first; a task also learns which one will probably be next.
template <typename Arguments, typename Plan>
static void run_tasks(const Arguments& p, Plan plan,
                      void (*run_task)(const Arguments&, const Task&, const Task* next)) {
  int64_t count = 0;
  plan([&](const Task&) { ++count; });
  Task* tasks = static_cast<Task*>(malloc(max(1, count) * sizeof(Task)));
  if (!tasks) {
    fprintf(stderr, "fastbert: attention could not allocate its list of %lld tasks\n",
            static_cast<long long>(count));
    abort();
  }
  Task* next = tasks;
  plan([&](const Task& task) { *next++ = task; });
  qsort(tasks, count, sizeof(Task), by_work);
#pragma omp parallel num_threads(p.launch)
  {
    tiles_begin();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i)
      run_task(p, tasks[i], i + p.launch < count ? tasks + i + p.launch : nullptr);
    tiles_end();
  }
  free(tasks);
}

// ---- what a task reads and writes ----------------------------------------------------------------------

// How a row of D elements is packed: in `depth` words, padded to `width`, where D is summed over, and in
// `columns` lanes where it is not.
template <typename Words>
struct HeadSizes {
  int64_t head_size, columns, depth, width;

  FASTBERT_MEMBER explicit HeadSizes(int64_t head_size)
      : head_size(head_size),
        columns(round_up(head_size, kLanes)),
        depth(ceil_div(head_size, Words::kDepth)),
        width(round_up(depth, kLanes)) {}
};

// The task's head of a token of its sequence, in x [T, N, D] with tokens `stride` apart.
template <typename T>
FASTBERT_INLINE const T* row_at(const Attention& p, const Task& task, const void* x, int64_t stride,
                                int64_t token) {
  return static_cast<const T*>(x) + (p.cu_seqlens[task.sequence] + token) * stride + task.head * p.head_size;
}

// Rows that a later task reads, or writes, are to be prefetched.
template <typename T>
FASTBERT_INLINE void prefetch_rows(const Attention& p, const Task& task, const void* x, int64_t stride,
                                   bool written, Ahead& ahead) {
  ahead.add(row_at<T>(p, task, x, stride, 0), stride * sizeof(T), written);
}

template <typename T>
FASTBERT_INLINE void prefetch_inputs(const Attention& p, const Task& task, Ahead& ahead) {
  ahead.begin(length_of(p, task.sequence), p.head_size * sizeof(T));
  prefetch_rows<T>(p, task, p.q, p.q_stride, false, ahead);
  prefetch_rows<T>(p, task, p.k, p.k_stride, false, ahead);
  prefetch_rows<T>(p, task, p.v, p.v_stride, false, ahead);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
