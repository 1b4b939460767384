// How attention's work is cut into tasks for any number of threads, and the memory a task works in.
#pragma once
#include "amx.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kQueries = 48;         // queries of a block of a forward task,
constexpr int64_t kRun = 11 * kQueries;  // and of the task at most, for which a block of keys is packed once
constexpr int64_t kSpan = 2048;  // queries of a backward task that are packed once; scratch is for so many
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
static void run(const Arguments& p, Plan plan,
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

}  // namespace FASTBERT_ISA
}  // namespace fastbert
