// Attention of packed sequences with dropout, q, k, v and out [T, N, D], lse [T, N]: for a query i and the
// keys j it sees, head by head,
//
//   s_ij = scale * q_i . k_j,   lse_i = log(sum_j exp(s_ij)),   P_ij = exp(s_ij - lse_i)
//   out_i = sum_j drop(P_ij) v_j
//
// Backward takes q, k, v, out and lse and computes P and the dropout mask again:
//
//   delta_i = dout_i . out_i,   dS_ij = P_ij * (drop'(dout_i . v_j) - delta_i)
//   dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i,   dv_j = sum_i drop(P_ij) dout_i
//
// A (sequence, head) is cut into blocks of keys and queries that stay in L2; keys stand in the lanes, so a
// row of scores is a few vectors. Forward goes through the blocks of keys with a running maximum and sum
// (online softmax). Products run on packed words: float32, or pairs of bf16 where the processor has their dot
// product; then P and dS are rounded to bf16. Sums are float32. How the work is cut into tasks depends on the
// number of threads, what a query or a key gets does not: its blocks are summed in the same order in any
// task. Dao, "FlashAttention-2" (2023).
#include "attention_softmax.h"
#include "attention_tasks.h"
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

constexpr int64_t kKeys = 512;  // keys of a block in forward, where queries come by kQueries
constexpr int64_t kBackwardKeys = 128, kBackwardQueries = 64;  // keys and queries of a block in backward
constexpr int kCounterKeys = kCounterLanes<uint8_t>;           // for which one counter of dropout is drawn
static_assert(kKeys % kCounterKeys == 0 && kBackwardKeys % kCounterKeys == 0, "a block begins a counter");
static_assert(kQueries % kDrawn == 0 && kBackwardQueries % kDrawn == 0, "dropout draws for kDrawn queries");

// Draws for kDrawn queries from `query` on, and `keys` keys from the j0-th of those that are packed on.
template <int kPacked>
FASTBERT_INLINE void draw(WeightDropout<kPacked>& dropout, const Attention& p, const Task& task,
                          int64_t query, int64_t j0, int64_t keys) {
  const int64_t from = j0 / kDropoutBlock<uint8_t> * kDropoutBlock<uint8_t>;
  dropout.draw(static_cast<uint32_t>(p.cu_seqlens[task.sequence] + query), from, j0 + keys - from);
}

// ---- forward -----------------------------------------------------------------------------------------

// A run of queries against all keys, a block of either at a time, and the memory it works in.
template <typename Words, typename T>
struct ForwardTask {
  static constexpr int64_t kRow = row_of(kKeys);  // of scores, and of k by columns

  const AttentionForward& p;
  const Task& task;
  const HeadSizes<Words> sizes;
  uint32_t* part;        // room to pack in
  uint32_t* k_columns;   // [width, kRow]
  uint32_t* v;           // [kKeys, columns]
  uint32_t* q;           // [kRun, width]
  float* out;            // [kRun, columns]: of the keys so far,
  float *highest, *sum;  // [kRun]: and the running maximum and sum of their softmax
  float* scores;         // [kQueries, kRow]: q k^T, then drop(P) times sum
  TokenMask<kKeys> mask;
  int64_t packed;  // the first key of those that are
  WeightDropout<kKeys>& dropout;
  Ahead& ahead;

  ForwardTask(const AttentionForward& p, const Task& task, WeightDropout<kKeys>& dropout, Ahead& ahead)
      : p(p),
        task(task),
        sizes(p.head_size),
        mask(p, task.sequence),
        packed(-1),
        dropout(dropout),
        ahead(ahead) {
    const int64_t columns = sizes.columns, width = sizes.width;
    Scratch scratch(width * (kRow + kLanes) + kKeys * columns + kRun * (width + columns + 2) +
                    kQueries * kRow + 256);
    part = scratch.words(kLanes * width);
    k_columns = scratch.words(width * kRow);
    v = scratch.words(kKeys * columns);
    q = scratch.words(kRun * width);
    out = scratch.floats(kRun * columns);
    highest = scratch.floats(kRun);
    sum = scratch.floats(kRun);
    scores = scratch.floats(kQueries * kRow);
  }

  void run() {
    pack_queries();
    const int64_t first_seen = mask.is_given() ? 0 : max(0, task.query - p.window_left);
    const int64_t last_query = task.query + task.queries - 1;
    const int64_t last_seen =
        mask.is_given() ? task.keys - 1 : min(task.keys - 1, last_query + p.window_right);
    for (int64_t key = first_seen / kKeys * kKeys; key <= last_seen; key += kKeys) {
      const int64_t keys = min(kKeys, task.keys - key);
      mask.at(key, keys);
      for (int64_t i = 0; i < task.queries; i += kQueries) {
        const Block block =
            mask.visible_part(p, {task.query + i, min(kQueries, task.queries - i), key, keys});
        if (block.queries == 0) continue;
        if (packed != key) pack_keys(key, keys);
        attend(block);
      }
    }
    store_out();
  }

  void pack_queries() {
    pack_rows<Words>(row_at<T>(p, task, p.q, p.q_stride, task.query), p.q_stride, task.queries,
                     sizes.head_size, q, sizes.width);
    for (int64_t i = 0; i < task.queries; ++i) highest[i] = -__builtin_inff(), sum[i] = 0.f;
    if (mask.is_given()) memset(out, 0, task.queries * sizes.columns * sizeof(float));
  }

  void pack_keys(int64_t key, int64_t keys) {
    packed = key;
    if (p.t) dropout.at(static_cast<uint32_t>(key / kCounterKeys), keys, static_cast<uint32_t>(task.head));
    pack_columns<Words>(row_at<T>(p, task, p.k, p.k_stride, key), p.k_stride, keys, sizes.head_size,
                        k_columns, kRow, sizes.width, part);
    pack_summed<Words>(row_at<T>(p, task, p.v, p.v_stride, key), p.v_stride, keys, sizes.head_size, v,
                       sizes.columns);
  }

  // out (+)= softmax(q k^T) v of the block.
  void attend(const Block& block) {
    const int64_t i0 = block.query - task.query, j0 = block.key - packed;
    multiply<Words>(block.queries, round_up(block.keys, kLanes), sizes.depth,
                    {q + i0 * sizes.width, sizes.width, 1}, {k_columns + j0, kRow}, {scores, kRow}, false,
                    ahead);
    softmax_rows(block);
    const bool add =  // to earlier keys'
        mask.is_given() || block.key > max(0, block.query - p.window_left) / kKeys * kKeys;
    multiply<Words>(block.queries, sizes.columns, ceil_div(block.keys, Words::kDepth),
                    {reinterpret_cast<uint32_t*>(scores), kRow, 1},
                    {v + j0 / Words::kDepth * sizes.columns, sizes.columns},
                    {out + i0 * sizes.columns, sizes.columns}, add, ahead);
  }

  // Scores become weights, and what earlier keys have given is scaled where the maximum has moved.
  void softmax_rows(const Block& block) {
    const int64_t padded = round_up(block.keys, kLanes), j0 = block.key - packed;
    for (int64_t i = 0; i < block.queries; ++i) {
      const int64_t query = block.query + i, place = query - task.query;
      if (p.t && i % kDrawn == 0) draw(dropout, p, task, query, j0, block.keys);
      const float shrink =
          softmax_block<Words>(p, scores + i * kRow, mask.visible(p, block, query), padded,
                               p.t ? dropout.kept(i % kDrawn, j0) : nullptr, highest + place, sum + place);
      if (shrink == 1.f) continue;
      float* earlier = out + place * sizes.columns;
      for (int64_t d = 0; d < sizes.columns; d += kLanes) store(earlier + d, load(earlier + d) * shrink);
    }
  }

  void store_out() {
    for (int64_t i = 0; i < task.queries; ++i) {
      const int64_t at = (p.cu_seqlens[task.sequence] + task.query + i) * p.heads + task.head;
      const bool sees_nothing = sum[i] == 0.f;  // no key, or scores of -inf alone
      if (sees_nothing) memset(out + i * sizes.columns, 0, sizes.head_size * sizeof(float));
      p.lse[at] = sees_nothing ? -__builtin_inff() : highest[i] + __builtin_logf(sum[i]);
      store_row(static_cast<T*>(p.out) + at * sizes.head_size, out + i * sizes.columns, sizes.head_size,
                sees_nothing ? 0.f : dropout_scale(p.t, kAttentionLaneBits) / sum[i]);
    }
  }
};

template <typename Words, typename T>
void forward_task(const AttentionForward& p, const Task& task, const Task* next) {
  Ahead ahead;
  if (next) {
    prefetch_inputs<T>(p, *next, ahead);
    prefetch_rows<T>(p, *next, p.out, p.heads * p.head_size, true, ahead);
  }
  WeightDropout<kKeys> dropout(p.seed, p.t, 1);
  ForwardTask<Words, T>(p, task, dropout, ahead).run();
}

// ---- backward ----------------------------------------------------------------------------------------

template <typename T>
FASTBERT_INLINE float dot(const T* a, const T* b, int64_t size) {
  vfloat sum = {};
  sweep<1>(size,
           [&](int64_t d, int, auto lanes) FASTBERT_LAMBDA { sum += lanes.load(a + d) * lanes.load(b + d); });
  return reduce_add(sum);
}

// A run of queries, packed a span at a time, against a run of keys, a block of either at a time.
template <typename Words, typename T>
struct BackwardTask {
  static constexpr int64_t kRow = row_of(kBackwardKeys);  // of scores, and of k and v by columns
  static constexpr bool kPaired = Words::kDepth == 2;

  const AttentionBackward& p;
  const Task& task;
  const HeadSizes<Words> sizes;
  const bool some_masked;  // so there may be blocks to which no product is added
  int64_t span;            // the first query of the span
  // Of a block of keys.
  uint32_t* part;                   // room to pack in
  uint32_t *k_columns, *v_columns;  // [width, kRow]
  uint32_t* k;                      // [kBackwardKeys, columns]
  float *dk, *dv;                   // [kBackwardKeys, columns]
  // Of a span of queries.
  uint32_t *q, *dout;                // [kSpan, width]
  uint32_t *q_summed, *dout_summed;  // [kSpan / words' depth, columns]: to be summed over
  float *lse, *delta;                // [kSpan]: less log c and over c, see Query
  float* dq;                         // [kSpan, columns]
  // Of a block of queries and keys.
  float *scores, *products;     // [kBackwardQueries, kRow]: q k^T and dout v^T, then drop(P) and dS
  uint32_t *weights, *dscores;  // [kBackwardQueries / words' depth, kRow]: these, to be summed over queries
  TokenMask<kBackwardKeys> mask;
  int64_t packed;  // the first key of those that are
  WeightDropout<kBackwardKeys>& dropout;
  Ahead& ahead;

  BackwardTask(const AttentionBackward& p, const Task& task, WeightDropout<kBackwardKeys>& dropout,
               Ahead& ahead)
      : p(p),
        task(task),
        sizes(p.head_size),
        some_masked(p.query_ranks || min(p.window_left, p.window_right) < length_of(p, task.sequence) - 1),
        span(task.query),
        mask(p, task.sequence),
        packed(task.key),
        dropout(dropout),
        ahead(ahead) {
    const int64_t columns = sizes.columns, width = sizes.width;
    Scratch scratch(width * (2 * kRow + kLanes + 2 * kSpan) + 3 * kBackwardKeys * columns +
                    2 * kSpan * columns + 3 * kBackwardQueries * kRow + kSpan * 2 + 512);
    part = scratch.words(kLanes * width);
    k_columns = scratch.words(width * kRow);
    v_columns = scratch.words(width * kRow);
    k = scratch.words(kBackwardKeys * columns);
    dk = scratch.floats(kBackwardKeys * columns);
    dv = scratch.floats(kBackwardKeys * columns);
    dq = scratch.floats(kSpan * columns);
    q = scratch.words(kSpan * width);
    dout = scratch.words(kSpan * width);
    lse = scratch.floats(kSpan);
    delta = scratch.floats(kSpan);
    q_summed = kPaired ? scratch.words(kSpan / 2 * columns) : q;
    dout_summed = kPaired ? scratch.words(kSpan / 2 * columns) : dout;
    scores = scratch.floats(kBackwardQueries * kRow);
    products = scratch.floats(kBackwardQueries * kRow);
    weights = kPaired ? scratch.words(kBackwardQueries / 2 * kRow) : reinterpret_cast<uint32_t*>(scores);
    dscores = kPaired ? scratch.words(kBackwardQueries / 2 * kRow) : reinterpret_cast<uint32_t*>(products);
  }

  void run() {
    const int64_t last_query = task.query + task.queries, last_key = task.key + task.keys;
    if (some_masked) memset(dq, 0, min(kSpan, task.queries) * sizes.columns * sizeof(float));
    for (int64_t key = task.key; key < last_key; key += kBackwardKeys) {
      const int64_t keys = min(kBackwardKeys, last_key - key);
      pack_keys(key, keys);
      for (int64_t first = task.query; first < last_query; first += kSpan) {
        const int64_t queries = min(kSpan, last_query - first);
        if (key == task.key || task.queries > kSpan) pack_span(first, queries);
        for (int64_t i = 0; i < queries; i += kBackwardQueries)
          add_block({first + i, min(kBackwardQueries, queries - i), key, keys});
      }
      if (task.for_keys) store_dk_dv(key, keys);
    }
    if (task.for_queries) store_dq();
  }

  void pack_keys(int64_t key, int64_t keys) {
    const T* k_rows = row_at<T>(p, task, p.k, p.k_stride, key);
    const T* v_rows = row_at<T>(p, task, p.v, p.v_stride, key);
    packed = key;
    mask.at(key, keys);
    if (p.t) dropout.at(static_cast<uint32_t>(key / kCounterKeys), keys, static_cast<uint32_t>(task.head));
    pack_columns<Words>(k_rows, p.k_stride, keys, sizes.head_size, k_columns, kRow, sizes.width, part);
    pack_columns<Words>(v_rows, p.v_stride, keys, sizes.head_size, v_columns, kRow, sizes.width, part);
    pack_summed<Words>(k_rows, p.k_stride, keys, sizes.head_size, k, sizes.columns);
    if (some_masked) {
      memset(dk, 0, keys * sizes.columns * sizeof(float));
      memset(dv, 0, keys * sizes.columns * sizeof(float));
    }
  }

  void pack_span(int64_t first, int64_t queries) {
    const int64_t size = sizes.head_size, stride = p.heads * size;  // of out and dout
    const T* q_rows = row_at<T>(p, task, p.q, p.q_stride, first);
    const T* out_rows = row_at<T>(p, task, p.out, stride, first);
    const T* dout_rows = row_at<T>(p, task, p.dout, stride, first);
    span = first;
    pack_rows<Words>(q_rows, p.q_stride, queries, size, q, sizes.width);
    pack_rows<Words>(dout_rows, stride, queries, size, dout, sizes.width);
    if constexpr (kPaired) {
      pack_summed<Words>(q_rows, p.q_stride, queries, size, q_summed, sizes.columns);
      pack_summed<Words>(dout_rows, stride, queries, size, dout_summed, sizes.columns);
    }
    const float factor = dropout_scale(p.t, kAttentionLaneBits);
    const float c = factor > 0.f ? factor : 1.f;  // all dropped: out and delta are 0
    const float log_c = __builtin_logf(c), inverse = 1.f / c;
    const float* saved = p.lse + (p.cu_seqlens[task.sequence] + first) * p.heads + task.head;
    for (int64_t i = 0; i < queries; ++i) {
      lse[i] = saved[i * p.heads] - log_c;
      delta[i] = dot(dout_rows + i * stride, out_rows + i * stride, size) * inverse;
    }
  }

  // What the block adds to dq, dk and dv.
  void add_block(const Block& whole) {
    const Block block = mask.visible_part(p, whole);
    if (block.queries == 0) return;
    multiply_scores(block);
    softmax_gradients(block);
    if (task.for_keys) add_dk_dv(block);
    if (task.for_queries) add_dq(block);
  }

  // scores = q k^T, products = dout v^T
  void multiply_scores(const Block& block) {
    const int64_t first = (block.query - span) * sizes.width, padded = round_up(block.keys, kLanes);
    const int64_t j0 = block.key - packed;
    multiply<Words>(block.queries, padded, sizes.depth, {q + first, sizes.width, 1}, {k_columns + j0, kRow},
                    {scores, kRow}, false, ahead);
    multiply<Words>(block.queries, padded, sizes.depth, {dout + first, sizes.width, 1},
                    {v_columns + j0, kRow}, {products, kRow}, false, ahead);
  }

  // drop(P) and dS of two queries at a time.
  void softmax_gradients(const Block& block) {
    const int64_t padded = round_up(block.keys, kLanes);
    Query pair[2];
    for (int64_t i = 0; i < block.queries; i += 2) {
      if (p.t && i % kDrawn == 0) draw(dropout, p, task, block.query + i, block.key - packed, block.keys);
      for (int64_t r = 0; r < 2; ++r) pair[r] = query_at(block, i + r);
      gradients<Words>(p, pair, padded, weights + i / 2 * kRow, dscores + i / 2 * kRow);
    }
  }

  // Query i of the block; one behind the last sees nothing.
  FASTBERT_MEMBER Query query_at(const Block& block, int64_t i) const {
    const int64_t query = block.query + i, place = query - span;
    const bool sees = i < block.queries && lse[place] != -__builtin_inff();
    return {
        scores + i * kRow, products + i * kRow, sees ? mask.visible(p, block, query) : Visible{0, -1},
        lse[place],        delta[place],        p.t ? dropout.kept(i % kDrawn, block.key - packed) : nullptr};
  }

  // dv (+)= drop(P)^T dout, dk (+)= dS^T q, summed over queries
  void add_dk_dv(const Block& block) {
    const int64_t columns = sizes.columns, summed = ceil_div(block.queries, Words::kDepth);
    const int64_t first = (block.query - span) / Words::kDepth * columns;
    const int64_t sums = (block.key - packed) * columns;
    const bool add = some_masked || block.query > task.query;
    multiply<Words>(block.keys, columns, summed, {weights, 1, kRow}, {dout_summed + first, columns},
                    {dv + sums, columns}, add, ahead);
    multiply<Words>(block.keys, columns, summed, {dscores, 1, kRow}, {q_summed + first, columns},
                    {dk + sums, columns}, add, ahead);
  }

  // dq (+)= dS k, summed over keys
  void add_dq(const Block& block) {
    const int64_t columns = sizes.columns, first = (block.key - packed) / Words::kDepth * columns;
    multiply<Words>(block.queries, columns, ceil_div(block.keys, Words::kDepth),
                    {reinterpret_cast<uint32_t*>(products), kRow, 1}, {k + first, columns},
                    {dq + (block.query - span) * columns, columns}, some_masked || block.key > task.key,
                    ahead);
  }

  void store_dk_dv(int64_t key, int64_t keys) {
    for (int64_t j = 0; j < keys; ++j) {
      store_row(gradient(1, key + j), dk + j * sizes.columns, sizes.head_size, p.scale);
      store_row(gradient(2, key + j), dv + j * sizes.columns, sizes.head_size, 1.f);
    }
  }

  void store_dq() {
    for (int64_t i = 0; i < task.queries; ++i)
      store_row(gradient(0, task.query + i), dq + i * sizes.columns, sizes.head_size, p.scale);
  }

  // Of q, k or v at a token, in dqkv [T, 3, N, D].
  FASTBERT_MEMBER T* gradient(int64_t which, int64_t token) const {
    const int64_t place = ((p.cu_seqlens[task.sequence] + token) * 3 + which) * p.heads + task.head;
    return static_cast<T*>(p.dqkv) + place * sizes.head_size;
  }
};

template <typename Words, typename T>
void backward_task(const AttentionBackward& p, const Task& task, const Task* next) {
  Ahead ahead;
  if (next) {
    const int64_t stride = p.heads * p.head_size;
    prefetch_inputs<T>(p, *next, ahead);
    prefetch_rows<T>(p, *next, p.dout, stride, false, ahead);
    prefetch_rows<T>(p, *next, p.out, stride, false, ahead);
    for (int64_t i = 0; i < 3; ++i)
      prefetch_rows<T>(p, *next, static_cast<T*>(p.dqkv) + i * stride, 3 * stride, true, ahead);
  }
  WeightDropout<kBackwardKeys> dropout(p.seed, p.t, 1);
  BackwardTask<Words, T>(p, task, dropout, ahead).run();
}

// ---- launchers ---------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
using Bf16Words = Pairs;
#else
using Bf16Words = Floats;
#endif

}  // namespace

int64_t attention_forward(const AttentionForward& p) {
  const int64_t bad = check_sequences(p);
  if (bad >= 0) return bad;
  const auto plan = [&](auto emit) { plan_forward(p, emit); };
  switch (p.dtype) {
    case DType::f32:
      run_tasks(p, plan, forward_task<Floats, float>);
      break;
    case DType::bf16:
      run_tasks(p, plan, forward_task<Bf16Words, bf16>);
      break;
    case DType::f16:
      run_tasks(p, plan, forward_task<Floats, f16>);
      break;
  }
  return -1;
}

void attention_backward(const AttentionBackward& p) {
  const auto plan = [&](auto emit) { plan_backward(p, emit); };
  switch (p.dtype) {
    case DType::f32:
      return run_tasks(p, plan, backward_task<Floats, float>);
    case DType::bf16:
      return run_tasks(p, plan, backward_task<Bf16Words, bf16>);
    case DType::f16:
      return run_tasks(p, plan, backward_task<Floats, f16>);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
