// Attention of packed sequences with dropout: for a query i and the keys j it sees, head by head,
//
//   s_ij = scale * q_i . k_j,  lse_i = log(sum_j exp(s_ij)),  P_ij = exp(s_ij - lse_i),  out_i = sum_j
//   drop(P_ij) v_j
//
// and backward, where P and the dropout mask are computed again from q, k and lse:
//
//   delta_i = dout_i . out_i,   dS_ij = P_ij * (drop'(dout_i . v_j) - delta_i)
//   dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i,   dv_j = sum_i drop(P_ij) dout_i
//
// A (sequence, head) is cut into blocks of keys and queries that stay in L2; keys stand in the lanes, so a
// row of scores is a few vectors. Forward goes through the blocks of keys with a running maximum and sum
// (online softmax). Products run on packed words: float32, or pairs of bf16 where the processor has their dot
// product; then P and dS are rounded to bf16. Sums are float32. A (sequence, head, block) is computed alike
// whatever the number of threads. Dao, "FlashAttention-2" (2023).
#include <stdio.h>
#include <stdlib.h>

#include "matmul.h"

namespace fastbert {
namespace FASTBERT_ISA {

void attention_forward(const Attention&);
void attention_backward(const Attention&);

namespace {

constexpr int64_t kKeys =
    256;  // keys of a forward block; a multiple of 8, as kBackwardKeys, for dropout's counters
constexpr int64_t kChunk = 256;   // queries of a forward task, for which a block of keys is packed once
constexpr int64_t kQueries = 48;  // of them at a time
constexpr int64_t kBackwardKeys = 128;
constexpr int64_t kBackwardQueries = 64;

static thread_local uint32_t* scratch_memory = nullptr;
static thread_local int64_t scratch_words = 0;

// Memory of this thread, kept for its next call: taking it anew would cost page faults at every layer.
class Scratch {
 public:
  explicit Scratch(int64_t words) {
    if (words <= scratch_words) return;
    free(scratch_memory);
    scratch_memory = static_cast<uint32_t*>(aligned_alloc(4096, round_up(words * 4, 4096)));
    if (!scratch_memory) {
      fprintf(stderr, "fastbert: attention could not allocate %lld bytes\n",
              static_cast<long long>(words * 4));
      abort();
    }
    scratch_words = words;
  }

  uint32_t* words(int64_t n) {
    uint32_t* place = scratch_memory + used_;
    used_ += round_up(n, 16);
    return place;
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(words(n)); }

 private:
  int64_t used_ = 0;
};

// ---- tasks, the longest first
// ------------------------------------------------------------------------------------

struct Task {
  int64_t sequence, head, first, work;  // first query
};

static int by_work(const void* a, const void* b) {
  const int64_t x = static_cast<const Task*>(a)->work, y = static_cast<const Task*>(b)->work;
  return x < y ? 1 : x > y ? -1 : 0;
}

// One for every (sequence, head) and every `chunk` of its queries; to be freed.
static Task* make_tasks(const Attention& p, int64_t chunk, int64_t* count) {
  *count = 0;
  for (int64_t b = 0; b < p.sequences; ++b)
    *count += ceil_div(p.cu_seqlens[b + 1] - p.cu_seqlens[b], chunk) * p.heads;
  Task* tasks = static_cast<Task*>(malloc(max(1, *count) * sizeof(Task)));
  if (!tasks) {
    fprintf(stderr, "fastbert: attention could not allocate its list of %lld tasks\n",
            static_cast<long long>(*count));
    abort();
  }
  Task* next = tasks;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    for (int64_t head = 0; head < p.heads; ++head)
      for (int64_t first = 0; first < length; first += chunk)
        *next++ = {b, head, first, length * min(chunk, length - first)};
  }
  qsort(tasks, *count, sizeof(Task), by_work);
  return tasks;
}

// ---- what a query sees of a block of keys: lanes first to last of it, none where last < first
// --------------------

struct Sight {
  int64_t first, last;
};

FASTBERT_INLINE Sight sight(const Attention& p, int64_t query, int64_t key0, int64_t keys) {
  return {max(0, query - p.window_left - key0), min(keys - 1, query + p.window_right - key0)};
}

FASTBERT_INLINE vint seen(Sight s, int64_t j) {
  vint key;
  for (int i = 0; i < kLanes; ++i) key[i] = i;
  key += static_cast<int32_t>(j);
  return (key >= static_cast<int32_t>(s.first)) & (key <= static_cast<int32_t>(s.last));
}

// ---- forward
// -----------------------------------------------------------------------------------------------------

// Scores of one query against a block become dropped, unnormalised weights, in place (as bf16 in the row's
// first half where words are pairs). `highest` and `sum` run over the blocks; returns what earlier sums must
// be multiplied by.
template <typename Words>
FASTBERT_INLINE float soften(const Attention& p, float* scores, Sight s, int64_t width, const uint16_t* lanes,
                             float* highest, float* sum) {
  if (s.last < s.first) {
    memset(scores, 0, width * sizeof(float));
    return 1.f;
  }
  vfloat most = splat(-__builtin_inff());
  for (int64_t j = 0; j < width; j += kLanes) {
    const vfloat x = seen(s, j) ? load(scores + j) * p.scale : splat(-__builtin_inff());
    most = max(x, most);
    store(scores + j, x);
  }
  const float before = *highest, block = reduce_max(most);
  *highest = before > block ? before : block;
  const float base = *highest == -__builtin_inff() ? 0.f : *highest;  // where all seen scores are -inf
  vfloat total = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    vfloat e = exp(load(scores + j) - base);
    total += e;
    if (p.drop_below) e = kept(lanes + j, p.drop_below) ? e : vfloat{};
    if constexpr (Words::kDepth == 2)
      store(reinterpret_cast<bf16*>(scores) + j, e);
    else
      store(scores + j, e);
  }
  const float shrink = before == *highest ? 1.f : exp(splat(before - base))[0];
  *sum = *sum * shrink + reduce_add(total);
  return shrink;
}

template <typename Words, typename T>
void forward_task(const Attention& p, Task task) {
  const int64_t token0 = p.cu_seqlens[task.sequence], length = p.cu_seqlens[task.sequence + 1] - token0;
  const int64_t size = p.head_dim, columns = round_up(size, kLanes);
  const int64_t depth = ceil_div(size, Words::kDepth), width = round_up(depth, kLanes);
  const int64_t queries = min(kChunk, length - task.first), row = row_of(kKeys);
  Scratch scratch(width * (row + kLanes) + kKeys * columns + kChunk * (width + columns + 2) + kQueries * row +
                  256);
  uint32_t* part = scratch.words(kLanes * width);
  uint32_t* kt = scratch.words(width * row);
  uint32_t* v = scratch.words(kKeys * columns);
  uint32_t* q = scratch.words(kChunk * width);
  float* out = scratch.floats(kChunk * columns);
  float* highest = scratch.floats(kChunk);
  float* sum = scratch.floats(kChunk);
  float* scores = scratch.floats(kQueries * row);
  uint16_t lanes[kKeys];

  const auto at = [&](const void* x, int64_t stride, int64_t token) {
    return static_cast<const T*>(x) + (token0 + token) * stride + task.head * size;
  };
  pack_rows<Words>(at(p.q, p.q_stride, task.first), p.q_stride, queries, size, q, width);
  memset(out, 0, queries * columns * sizeof(float));
  for (int64_t i = 0; i < queries; ++i) highest[i] = -__builtin_inff(), sum[i] = 0.f;

  const int64_t first_seen = max(0, task.first - p.window_left);
  const int64_t last_seen = min(length - 1, task.first + queries - 1 + p.window_right);
  for (int64_t key0 = first_seen / kKeys * kKeys; key0 <= last_seen; key0 += kKeys) {
    const int64_t keys = min(kKeys, length - key0), padded = round_up(keys, kLanes);
    pack_columns<Words>(at(p.k, p.k_stride, key0), p.k_stride, keys, size, kt, row, width, part);
    pack_summed<Words>(at(p.v, p.v_stride, key0), p.v_stride, keys, size, v, columns);
    for (int64_t i0 = 0; i0 < queries; i0 += kQueries) {
      const int64_t n = min(kQueries, queries - i0);
      multiply<Words>(n, padded, depth, {q + i0 * width, width, 1}, {kt, row}, {scores, row}, false);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t query = task.first + i0 + i;
        if (p.drop_below)
          dropout_lanes(p.seed, static_cast<uint32_t>(key0 / 8), static_cast<uint32_t>(token0 + query),
                        static_cast<uint32_t>(task.head), 1, ceil_div(keys, 8), lanes);
        const float shrink = soften<Words>(p, scores + i * row, sight(p, query, key0, keys), padded, lanes,
                                           highest + i0 + i, sum + i0 + i);
        if (shrink != 1.f) {
          float* earlier = out + (i0 + i) * columns;
          for (int64_t d = 0; d < columns; d += kLanes) store(earlier + d, load(earlier + d) * shrink);
        }
      }
      const Left weights{reinterpret_cast<uint32_t*>(scores), row, 1};
      multiply<Words>(n, columns, ceil_div(keys, Words::kDepth), weights, {v, columns},
                      {out + i0 * columns, columns}, true);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t place = (token0 + task.first + i) * p.heads + task.head;
    const Sight s = sight(p, task.first + i, 0, length);
    const bool blind = s.last < s.first;
    p.lse[place] = blind ? -__builtin_inff() : highest[i] + __builtin_logf(sum[i]);
    store_row(static_cast<T*>(p.result) + place * size, out + i * columns, size,
              blind ? 0.f : dropout_scale(p.drop_below) / sum[i]);
  }
}

// ---- backward
// ----------------------------------------------------------------------------------------------------

// One query against a block: scores become drop(P), the products dout . v become dS, both in place.
FASTBERT_INLINE void gradients(const Attention& p, float* scores, float* products, Sight s, int64_t width,
                               const uint16_t* lanes, float lse, float delta) {
  if (s.last < s.first) {
    memset(scores, 0, width * sizeof(float));
    memset(products, 0, width * sizeof(float));
    return;
  }
  const float scale = dropout_scale(p.drop_below);
  for (int64_t j = 0; j < width; j += kLanes) {
    vfloat weight = exp(load(scores + j) * p.scale - lse);
    weight = seen(s, j) ? weight : vfloat{};
    vfloat dropped = weight, dweight = load(products + j);
    if (p.drop_below) {
      const vint keep = kept(lanes + j, p.drop_below);
      dropped = keep ? weight * scale : vfloat{};
      dweight = keep ? dweight * scale : vfloat{};
    }
    store(scores + j, dropped);
    store(products + j, seen(s, j) ? weight * (dweight - delta) : vfloat{});
  }
}

// Two rows as one row of bf16 pairs, to be summed over rows.
FASTBERT_INLINE void join(const float* low, const float* high, int64_t width, uint32_t* target) {
  for (int64_t j = 0; j < width; j += kLanes) {
    bf16 a[kLanes], b[kLanes];
    store(a, load(low + j));
    store(b, high ? load(high + j) : vfloat{});
    const vuint pair = widen(a) | widen(b) << 16;
    memcpy(target + j, &pair, sizeof pair);
  }
}

FASTBERT_INLINE void round_in_place(float* row, int64_t width) {  // to bf16, in the first half of the row
  for (int64_t j = 0; j < width; j += kLanes) store(reinterpret_cast<bf16*>(row) + j, load(row + j));
}

template <typename Words, typename T>
void backward_task(const Attention& p, Task task) {
  const int64_t token0 = p.cu_seqlens[task.sequence], length = p.cu_seqlens[task.sequence + 1] - token0;
  const int64_t size = p.head_dim, columns = round_up(size, kLanes), row = row_of(kBackwardKeys);
  const int64_t depth = ceil_div(size, Words::kDepth), width = round_up(depth, kLanes);
  constexpr bool kPaired = Words::kDepth == 2;
  Scratch scratch(width * (2 * row + kLanes + 2 * kBackwardQueries) + 3 * kBackwardKeys * columns +
                  2 * kBackwardQueries * columns + 3 * kBackwardQueries * row + length * (columns + 1) + 512);
  uint32_t* part = scratch.words(kLanes * width);
  uint32_t* kt = scratch.words(width * row);
  uint32_t* vt = scratch.words(width * row);
  uint32_t* k = scratch.words(kBackwardKeys * columns);
  float* dk = scratch.floats(kBackwardKeys * columns);
  float* dv = scratch.floats(kBackwardKeys * columns);
  uint32_t* q = scratch.words(kBackwardQueries * width);
  uint32_t* dout = scratch.words(kBackwardQueries * width);
  uint32_t* q_summed = kPaired ? scratch.words(kBackwardQueries * columns) : q;
  uint32_t* dout_summed = kPaired ? scratch.words(kBackwardQueries * columns) : dout;
  float* scores = scratch.floats(kBackwardQueries * row);
  float* products = scratch.floats(kBackwardQueries * row);
  uint32_t* paired = scratch.words(kPaired ? kBackwardQueries * row : 0);  // drop(P), and behind it dS
  float* dq = scratch.floats(length * columns);
  float* delta = scratch.floats(length);
  uint16_t lanes[kBackwardKeys];

  const auto at = [&](const void* x, int64_t stride, int64_t token) {
    return static_cast<const T*>(x) + (token0 + token) * stride + task.head * size;
  };
  const int64_t packed = p.heads * size;  // between the tokens of out and of every gradient
  for (int64_t i = 0; i < length; ++i) {
    const T *a = at(p.dout, packed, i), *b = at(p.out, packed, i);
    vfloat sum = {};
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) sum += load(a + d) * load(b + d);
    if (d < size) sum += load_n(a + d, size - d) * load_n(b + d, size - d);
    delta[i] = reduce_add(sum);
  }
  memset(dq, 0, length * columns * sizeof(float));

  for (int64_t key0 = 0; key0 < length; key0 += kBackwardKeys) {
    const int64_t keys = min(kBackwardKeys, length - key0), padded = round_up(keys, kLanes);
    pack_columns<Words>(at(p.k, p.k_stride, key0), p.k_stride, keys, size, kt, row, width, part);
    pack_columns<Words>(at(p.v, p.v_stride, key0), p.v_stride, keys, size, vt, row, width, part);
    pack_summed<Words>(at(p.k, p.k_stride, key0), p.k_stride, keys, size, k, columns);
    memset(dk, 0, keys * columns * sizeof(float));
    memset(dv, 0, keys * columns * sizeof(float));

    for (int64_t i0 = 0; i0 < length; i0 += kBackwardQueries) {
      const int64_t n = min(kBackwardQueries, length - i0);
      if (i0 - p.window_left >= key0 + keys || i0 + n - 1 + p.window_right < key0)
        continue;  // sees none of them
      pack_rows<Words>(at(p.q, p.q_stride, i0), p.q_stride, n, size, q, width);
      pack_rows<Words>(at(p.dout, packed, i0), packed, n, size, dout, width);
      if constexpr (kPaired) {
        pack_summed<Words>(at(p.q, p.q_stride, i0), p.q_stride, n, size, q_summed, columns);
        pack_summed<Words>(at(p.dout, packed, i0), packed, n, size, dout_summed, columns);
      }
      multiply<Words>(n, padded, depth, {q, width, 1}, {kt, row}, {scores, row}, false);
      multiply<Words>(n, padded, depth, {dout, width, 1}, {vt, row}, {products, row}, false);

      for (int64_t i = 0; i < n; ++i) {
        const int64_t query = i0 + i;
        const float lse = p.lse[(token0 + query) * p.heads + task.head];
        if (p.drop_below)
          dropout_lanes(p.seed, static_cast<uint32_t>(key0 / 8), static_cast<uint32_t>(token0 + query),
                        static_cast<uint32_t>(task.head), 1, ceil_div(keys, 8), lanes);
        gradients(p, scores + i * row, products + i * row, sight(p, query, key0, keys), padded, lanes, lse,
                  delta[query]);
      }

      // The left operands of the three sums: over queries drop(P) and dS by columns, over keys dS by rows.
      Left weights{reinterpret_cast<uint32_t*>(scores), 1, row},
          dscores{reinterpret_cast<uint32_t*>(products), 1, row};
      if constexpr (kPaired) {
        weights.words = paired;
        dscores.words = paired + kBackwardQueries / 2 * row;
        for (int64_t i = 0; i < n; i += 2) {
          const bool two = i + 1 < n;
          join(scores + i * row, two ? scores + (i + 1) * row : nullptr, padded, paired + i / 2 * row);
          join(products + i * row, two ? products + (i + 1) * row : nullptr, padded,
               paired + (kBackwardQueries + i) / 2 * row);
        }
        for (int64_t i = 0; i < n; ++i) round_in_place(products + i * row, padded);
      }
      const int64_t over_queries = ceil_div(n, Words::kDepth), over_keys = ceil_div(keys, Words::kDepth);
      multiply<Words>(keys, columns, over_queries, weights, {dout_summed, columns}, {dv, columns}, true);
      multiply<Words>(keys, columns, over_queries, dscores, {q_summed, columns}, {dk, columns}, true);
      multiply<Words>(n, columns, over_keys, {reinterpret_cast<uint32_t*>(products), row, 1}, {k, columns},
                      {dq + i0 * columns, columns}, true);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t place = (token0 + key0 + j) * packed + task.head * size;
      store_row(static_cast<T*>(p.dk) + place, dk + j * columns, size, p.scale);
      store_row(static_cast<T*>(p.dv) + place, dv + j * columns, size, 1.f);
    }
  }
  for (int64_t i = 0; i < length; ++i)
    store_row(static_cast<T*>(p.dq) + (token0 + i) * packed + task.head * size, dq + i * columns, size,
              p.scale);
}

// ---- launchers
// ---------------------------------------------------------------------------------------------------

static void run(const Attention& p, int64_t chunk, void (*run_task)(const Attention&, Task)) {
  int64_t count;
  Task* tasks = make_tasks(p, chunk, &count);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
  for (int64_t i = 0; i < count; ++i) run_task(p, tasks[i]);
  free(tasks);
}

#if defined(__AVX512BF16__)
using Bf16Words = Pairs;
#else
using Bf16Words = Floats;
#endif

}  // namespace

void attention_forward(const Attention& p) {
  switch (p.dtype) {
    case DType::f32:
      return run(p, kChunk, forward_task<Floats, float>);
    case DType::bf16:
      return run(p, kChunk, forward_task<Bf16Words, bf16>);
    case DType::f16:
      return run(p, kChunk, forward_task<Floats, f16>);
  }
}

// A task is a whole (sequence, head): dq is summed over its blocks of keys, dk and dv over its blocks of
// queries.
void attention_backward(const Attention& p) {
  const int64_t chunk = p.tokens + 1;
  switch (p.dtype) {
    case DType::f32:
      return run(p, chunk, backward_task<Floats, float>);
    case DType::bf16:
      return run(p, chunk, backward_task<Bf16Words, bf16>);
    case DType::f16:
      return run(p, chunk, backward_task<Floats, f16>);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
