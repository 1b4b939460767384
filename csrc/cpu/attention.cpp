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
// product; then P and dS are rounded to bf16. Sums are float32. How the work is cut into tasks depends on the
// number of threads, what a query or a key gets does not: its blocks are summed in the same order in any
// task. Dao, "FlashAttention-2" (2023).
#include "attention_tasks.h"
#include "dropout.h"
#include "exp.h"
#include "matmul.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

// Blocks of keys, multiples of 8 for dropout's counters, and of queries.
constexpr int64_t kKeys = 512;
constexpr int64_t kBackwardKeys = 128, kBackwardQueries = 64;  // even, for pairs

// ---- what a query sees of a block of keys: lanes first to last of it, none where last < first --------

struct Visible {
  int64_t first, last;
};

FASTBERT_INLINE Visible visible_keys(const Attention& p, int64_t query, int64_t key0, int64_t keys) {
  return {max(0, query - p.window_left - key0), min(keys - 1, query + p.window_right - key0)};
}

struct AllSeen {
  FASTBERT_MEMBER vfloat pick(Visible, int64_t, vfloat v, float) const { return v; }
};

struct SomeSeen {  // `otherwise` in lanes whose key is not visible
  FASTBERT_MEMBER vfloat pick(Visible s, int64_t j, vfloat v, float otherwise) const {
    vint key;
    for (int i = 0; i < kLanes; ++i) key[i] = i;
    key += static_cast<int32_t>(j);
    const vint seen = (key >= static_cast<int32_t>(s.first)) & (key <= static_cast<int32_t>(s.last));
    return seen ? v : splat(otherwise);
  }
};

// body(j, seen, i) for the vectors j = 0, kLanes, ... of a row of scores; most are seen whole. i < 2 numbers
// independent accumulators.
template <typename Body>
FASTBERT_INLINE void over_keys(Visible s, int64_t width, Body body) {
  const int64_t first = min(width, round_up(max(0, s.first), kLanes));
  const int64_t last = max(first, (s.last + 1) / kLanes * kLanes);
  for (int64_t j = 0; j < first; j += kLanes) body(j, SomeSeen{}, 0);
  int64_t j = first;
  for (; j + 2 * kLanes <= last; j += 2 * kLanes) body(j, AllSeen{}, 0), body(j + kLanes, AllSeen{}, 1);
  if (j < last) body(j, AllSeen{}, 0);
  for (j = last; j < width; j += kLanes) body(j, SomeSeen{}, 0);
}

// e^(score * scale - base), where base is at least the score less 11 (log of dropout's factor); as exact as
// the words that it is rounded to.
template <typename Words>
FASTBERT_INLINE vfloat weight(vfloat score, float scale, float base) {
  constexpr float log2e = 1.44269504f;
  if constexpr (Words::kDepth == 2)
    return exp2_short(score * (scale * log2e) - base * log2e);
  else
    return exp_below(score * scale - base);
}

// Dropout is drawn for so many queries at a time, of which some may stand behind the last.
constexpr int kDrawn = 4;

// What a task reads of its sequence, and what it will write, by tokens a stride apart.
template <typename T>
FASTBERT_INLINE void prefetch_tokens(const Attention& p, const Task& task, const void* x, int64_t stride,
                                     bool written, Ahead& ahead) {
  const int64_t first = p.cu_seqlens[task.sequence] * stride + task.head * p.head_size;
  ahead.add(static_cast<const T*>(x) + first, stride * sizeof(T), written);
}

template <typename T>
FASTBERT_INLINE void prefetch_inputs(const Attention& p, const Task& task, Ahead& ahead) {
  ahead.begin(length_of(p, task.sequence), p.head_size * sizeof(T));
  prefetch_tokens<T>(p, task, p.q, p.q_stride, false, ahead);
  prefetch_tokens<T>(p, task, p.k, p.k_stride, false, ahead);
  prefetch_tokens<T>(p, task, p.v, p.v_stride, false, ahead);
}

// ---- forward -----------------------------------------------------------------------------------------

// Scores of one query against a block become dropped, unnormalised weights, in place (as bf16 in the row's
// first half where words are pairs). `highest` and `sum` run over the blocks; returns what earlier sums must
// be multiplied by.
template <typename Words>
FASTBERT_INLINE float softmax_block(const Attention& p, float* scores, Visible s, int64_t width,
                                    const uint16_t* kept, float* highest, float* sum) {
  if (s.last < s.first) {
    memset(scores, 0, width * sizeof(float));
    return 1.f;
  }
  const float scale = p.scale;  // stores could alias what stands in p
  vfloat most[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
  over_keys(s, width, [&](int64_t j, auto seen, int i) FASTBERT_LAMBDA {
    most[i] = max(seen.pick(s, j, load(scores + j) * scale, -__builtin_inff()), most[i]);
  });
  const float before = *highest, block = reduce_max(max(most[0], most[1])),
              now = before > block ? before : block;
  const float base = now == -__builtin_inff() ? 0.f : now;  // where all seen scores are -inf
  vfloat total[2] = {};
  over_keys(s, width, [&](int64_t j, auto seen, int i) FASTBERT_LAMBDA {
    vfloat e = seen.pick(s, j, weight<Words>(load(scores + j), scale, base), 0.f);
    total[i] += e;
    if (kept) e = drop(kept, j, e);
    if constexpr (Words::kDepth == 2)
      store(reinterpret_cast<bf16*>(scores) + j, e);
    else
      store(scores + j, e);
  });
  const bool same = before == now || before == -__builtin_inff();
  const float shrink = same ? 1.f : exp(splat(before - base))[0];
  *highest = now;
  *sum = *sum * shrink + reduce_add(total[0] + total[1]);
  return shrink;
}

template <typename Words, typename T>
void forward_task(const AttentionForward& p, const Task& task, const Task* next) {
  const int64_t token0 = p.cu_seqlens[task.sequence], length = task.keys, queries = task.queries;
  const int64_t size = p.head_size, columns = round_up(size, kLanes);
  const int64_t depth = ceil_div(size, Words::kDepth), width = round_up(depth, kLanes), row = row_of(kKeys);
  Scratch scratch(width * (row + kLanes) + kKeys * columns + kRun * (width + columns + 2) + kQueries * row +
                  256);
  uint32_t* part = scratch.words(kLanes * width);
  uint32_t* kt = scratch.words(width * row);
  uint32_t* v = scratch.words(kKeys * columns);
  uint32_t* q = scratch.words(kRun * width);
  float* out = scratch.floats(kRun * columns);
  float* highest = scratch.floats(kRun);
  float* sum = scratch.floats(kRun);
  float* scores = scratch.floats(kQueries * row);
  DropoutMask<kKeys, kDrawn> dropout(p.seed, p.t, 1);
  const auto at = [&](const void* x, int64_t stride, int64_t token) {
    return static_cast<const T*>(x) + (token0 + token) * stride + task.head * size;
  };
  Ahead ahead;
  if (next) {
    prefetch_inputs<T>(p, *next, ahead);
    prefetch_tokens<T>(p, *next, p.out, p.heads * size, true, ahead);
  }
  pack_rows<Words>(at(p.q, p.q_stride, task.query), p.q_stride, queries, size, q, width);
  for (int64_t i = 0; i < queries; ++i) highest[i] = -__builtin_inff(), sum[i] = 0.f;

  const int64_t first_seen = max(0, task.query - p.window_left);
  const int64_t last_seen = min(length - 1, task.query + queries - 1 + p.window_right);
  for (int64_t key0 = first_seen / kKeys * kKeys; key0 <= last_seen; key0 += kKeys) {
    const int64_t keys = min(kKeys, length - key0), padded = round_up(keys, kLanes);
    if (p.t) dropout.at(static_cast<uint32_t>(key0 / 8), keys, static_cast<uint32_t>(task.head));
    pack_columns<Words>(at(p.k, p.k_stride, key0), p.k_stride, keys, size, kt, row, width, part);
    pack_summed<Words>(at(p.v, p.v_stride, key0), p.v_stride, keys, size, v, columns);
    for (int64_t i0 = 0; i0 < queries; i0 += kQueries) {
      const int64_t n = min(kQueries, queries - i0), query0 = task.query + i0;
      const int64_t first_key = max(0, query0 - p.window_left) / kKeys * kKeys;
      if (key0 < first_key || key0 > query0 + n - 1 + p.window_right) continue;  // sees none of them
      multiply<Words>(n, padded, depth, {q + i0 * width, width, 1}, {kt, row}, {scores, row}, false, ahead);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t query = query0 + i;
        if (p.t && i % kDrawn == 0) dropout.draw(static_cast<uint32_t>(token0 + query), 0, keys);
        const float shrink =
            softmax_block<Words>(p, scores + i * row, visible_keys(p, query, key0, keys), padded,
                                 p.t ? dropout.kept(i % kDrawn, 0) : nullptr, highest + i0 + i, sum + i0 + i);
        if (shrink != 1.f) {
          float* earlier = out + (i0 + i) * columns;
          for (int64_t d = 0; d < columns; d += kLanes) store(earlier + d, load(earlier + d) * shrink);
        }
      }
      const Left weights{reinterpret_cast<uint32_t*>(scores), row, 1};
      multiply<Words>(n, columns, ceil_div(keys, Words::kDepth), weights, {v, columns},
                      {out + i0 * columns, columns}, key0 > first_key, ahead);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t place = (token0 + task.query + i) * p.heads + task.head;
    const bool fully_masked = sum[i] == 0.f;  // sees no key, or scores of -inf alone
    if (fully_masked) memset(out + i * columns, 0, size * sizeof(float));
    p.lse[place] = fully_masked ? -__builtin_inff() : highest[i] + __builtin_logf(sum[i]);
    store_row(static_cast<T*>(p.out) + place * size, out + i * columns, size,
              fully_masked ? 0.f : dropout_scale(p.t) / sum[i]);
  }
}

// ---- backward ----------------------------------------------------------------------------------------

// One query against a block. Dropout's factor is in `lse` and `delta`: with c = 1 / (1 - p),
// c P = exp(s - (lse - log c)) and dS = c P * (kept(dout . v) - delta / c).
struct Query {
  float *scores, *products;  // q . k and dout . v
  Visible visible;
  float lse, delta;
  const uint16_t* kept;  // of the block; null where nothing is dropped
};

// Scores of two queries become drop(P) and their products dS: in place, or, where words are pairs, side by
// side in `weights` and `dscores`, and dS also by rows in the first half of the products.
template <typename Words>
FASTBERT_INLINE void gradients(const Attention& p, const Query (&queries)[2], int64_t width,
                               uint32_t* weights, uint32_t* dscores) {
  const Visible both = {max(queries[0].visible.first, queries[1].visible.first),
                        min(queries[0].visible.last, queries[1].visible.last)};
  const Query a = queries[0], b = queries[1];
  const float scale = p.scale;  // stores could alias what stands in p
  over_keys(both, width, [&](int64_t j, auto seen, int) FASTBERT_LAMBDA {
    vfloat w[2], ds[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Query& q = i == 0 ? a : b;
      const vfloat full = seen.pick(q.visible, j, weight<Words>(load(q.scores + j), scale, q.lse), 0.f);
      vfloat dw = load(q.products + j);
      w[i] = full;
      if (q.kept) {
        w[i] = drop(q.kept, j, full);
        dw = drop(q.kept, j, dw);
      }
      ds[i] = seen.pick(q.visible, j, full * (dw - q.delta), 0.f);
    }
    if constexpr (Words::kDepth == 2) {
      const vuint rows = Words::round(ds[0], ds[1]);
      const vuint pairs = Words::join(Words::round(w[0], w[1])), dpairs = Words::join(rows);
      memcpy(weights + j, &pairs, sizeof pairs);
      memcpy(dscores + j, &dpairs, sizeof dpairs);
      memcpy(a.products + j / 2, &rows, sizeof rows / 2);
      memcpy(b.products + j / 2, reinterpret_cast<const char*>(&rows) + sizeof rows / 2, sizeof rows / 2);
    } else {
      for (int i = 0; i < 2; ++i)
        store((i == 0 ? a : b).scores + j, w[i]), store((i == 0 ? a : b).products + j, ds[i]);
    }
  });
}

// What products want of up to kSpan queries.
struct Span {
  uint32_t *q, *dout;                // by rows
  uint32_t *q_summed, *dout_summed;  // to be summed over
  float *lse, *delta;
};

template <typename T>
FASTBERT_INLINE float dot(const T* a, const T* b, int64_t size) {
  vfloat sum = {};
  sweep<1>(size,
           [&](int64_t d, int, auto lanes) FASTBERT_LAMBDA { sum += lanes.load(a + d) * lanes.load(b + d); });
  return reduce_add(sum);
}

template <typename Words, typename T>
void backward_task(const AttentionBackward& p, const Task& task, const Task* next) {
  const int64_t token0 = p.cu_seqlens[task.sequence];
  const int64_t size = p.head_size, columns = round_up(size, kLanes), row = row_of(kBackwardKeys);
  const int64_t depth = ceil_div(size, Words::kDepth), width = round_up(depth, kLanes);
  constexpr bool paired = Words::kDepth == 2;
  Scratch scratch(width * (2 * row + kLanes + 2 * kSpan) + 3 * kBackwardKeys * columns + 2 * kSpan * columns +
                  3 * kBackwardQueries * row + kSpan * 2 + 512);
  uint32_t* part = scratch.words(kLanes * width);
  uint32_t* kt = scratch.words(width * row);
  uint32_t* vt = scratch.words(width * row);
  uint32_t* k = scratch.words(kBackwardKeys * columns);
  float* dk = scratch.floats(kBackwardKeys * columns);
  float* dv = scratch.floats(kBackwardKeys * columns);
  float* dq = scratch.floats(kSpan * columns);
  Span span = {scratch.words(kSpan * width), scratch.words(kSpan * width), nullptr, nullptr,
               scratch.floats(kSpan),        scratch.floats(kSpan)};
  span.q_summed = paired ? scratch.words(kSpan / 2 * columns) : span.q;
  span.dout_summed = paired ? scratch.words(kSpan / 2 * columns) : span.dout;
  float* scores = scratch.floats(kBackwardQueries * row);
  float* products = scratch.floats(kBackwardQueries * row);
  uint32_t* weights =
      paired ? scratch.words(kBackwardQueries / 2 * row) : reinterpret_cast<uint32_t*>(scores);
  uint32_t* dscores =
      paired ? scratch.words(kBackwardQueries / 2 * row) : reinterpret_cast<uint32_t*>(products);
  Query pair[2];
  DropoutMask<kBackwardKeys, kDrawn> dropout(p.seed, p.t, 1);

  const float scale = p.t < 65536 ? dropout_scale(p.t) : 1.f;  // all dropped: out and delta are 0
  const float log_scale = __builtin_logf(scale), inverse = 1.f / scale;
  const auto at = [&](const void* x, int64_t stride, int64_t token) {
    return static_cast<const T*>(x) + (token0 + token) * stride + task.head * size;
  };
  const int64_t packed = p.heads * size;  // between the tokens of out and dout
  const auto gradient = [&](int64_t which, int64_t token) {
    return static_cast<T*>(p.dqkv) + ((token0 + token) * 3 + which) * packed + task.head * size;
  };
  const auto pack_span = [&](int64_t first, int64_t n) {
    pack_rows<Words>(at(p.q, p.q_stride, first), p.q_stride, n, size, span.q, width);
    pack_rows<Words>(at(p.dout, packed, first), packed, n, size, span.dout, width);
    if constexpr (paired) {
      pack_summed<Words>(at(p.q, p.q_stride, first), p.q_stride, n, size, span.q_summed, columns);
      pack_summed<Words>(at(p.dout, packed, first), packed, n, size, span.dout_summed, columns);
    }
    for (int64_t i = 0; i < n; ++i) {
      span.lse[i] = p.lse[(token0 + first + i) * p.heads + task.head] - log_scale;
      span.delta[i] = dot(at(p.dout, packed, first + i), at(p.out, packed, first + i), size) * inverse;
    }
  };
  Ahead ahead;
  if (next) {
    prefetch_inputs<T>(p, *next, ahead);
    prefetch_tokens<T>(p, *next, p.dout, packed, false, ahead);
    prefetch_tokens<T>(p, *next, p.out, packed, false, ahead);
    for (int64_t i = 0; i < 3; ++i)
      prefetch_tokens<T>(p, *next, static_cast<T*>(p.dqkv) + i * packed, 3 * packed, true, ahead);
  }
  const int64_t last_query = task.query + task.queries, last_key = task.key + task.keys;
  const int64_t reach = length_of(p, task.sequence) - 1;
  const bool some_unseen =
      p.window_left < reach || p.window_right < reach;  // blocks that nothing is added to
  if (some_unseen) memset(dq, 0, min(kSpan, task.queries) * columns * sizeof(float));
  for (int64_t key0 = task.key; key0 < last_key; key0 += kBackwardKeys) {
    const int64_t keys = min(kBackwardKeys, last_key - key0), padded = round_up(keys, kLanes);
    if (p.t) dropout.at(static_cast<uint32_t>(key0 / 8), keys, static_cast<uint32_t>(task.head));
    pack_columns<Words>(at(p.k, p.k_stride, key0), p.k_stride, keys, size, kt, row, width, part);
    pack_columns<Words>(at(p.v, p.v_stride, key0), p.v_stride, keys, size, vt, row, width, part);
    pack_summed<Words>(at(p.k, p.k_stride, key0), p.k_stride, keys, size, k, columns);
    if (some_unseen) {
      memset(dk, 0, keys * columns * sizeof(float));
      memset(dv, 0, keys * columns * sizeof(float));
    }
    for (int64_t span0 = task.query; span0 < last_query; span0 += kSpan) {
      const int64_t queries = min(kSpan, last_query - span0);
      if (key0 == task.key || task.queries > kSpan) pack_span(span0, queries);
      for (int64_t i0 = 0; i0 < queries; i0 += kBackwardQueries) {
        const int64_t query0 = span0 + i0, n = min(kBackwardQueries, queries - i0);
        if (query0 - p.window_left >= key0 + keys || query0 + n - 1 + p.window_right < key0)
          continue;  // sees none of them
        multiply<Words>(n, padded, depth, {span.q + i0 * width, width, 1}, {kt, row}, {scores, row}, false,
                        ahead);
        multiply<Words>(n, padded, depth, {span.dout + i0 * width, width, 1}, {vt, row}, {products, row},
                        false, ahead);
        for (int64_t i = 0; i < n; i += 2) {
          if (p.t && i % kDrawn == 0) dropout.draw(static_cast<uint32_t>(token0 + query0 + i), 0, keys);
          for (int64_t r = 0; r < 2; ++r) {
            const int64_t at_row = (i + r) * row, query = query0 + i + r;
            Query& q = pair[r];
            q.scores = scores + at_row, q.products = products + at_row,
            q.kept = p.t ? dropout.kept((i + r) % kDrawn, 0) : nullptr;
            q.lse = span.lse[i0 + i + r], q.delta = span.delta[i0 + i + r];
            q.visible =
                i + r < n && q.lse != -__builtin_inff() ? visible_keys(p, query, key0, keys) : Visible{0, -1};
          }
          gradients<Words>(p, pair, padded, weights + i / 2 * row, dscores + i / 2 * row);
        }
        // Over queries go drop(P) and dS by columns, over keys dS by rows.
        const int64_t over_queries = ceil_div(n, Words::kDepth), over_keys = ceil_div(keys, Words::kDepth);
        const int64_t summed = i0 / Words::kDepth * columns;
        const bool add = some_unseen || query0 > task.query;
        if (task.for_keys) {
          multiply<Words>(keys, columns, over_queries, {weights, 1, row},
                          {span.dout_summed + summed, columns}, {dv, columns}, add, ahead);
          multiply<Words>(keys, columns, over_queries, {dscores, 1, row}, {span.q_summed + summed, columns},
                          {dk, columns}, add, ahead);
        }
        if (task.for_queries)
          multiply<Words>(n, columns, over_keys, {reinterpret_cast<uint32_t*>(products), row, 1},
                          {k, columns}, {dq + i0 * columns, columns}, some_unseen || key0 > task.key, ahead);
      }
    }
    for (int64_t j = 0; task.for_keys && j < keys; ++j) {
      store_row(gradient(1, key0 + j), dk + j * columns, size, p.scale);
      store_row(gradient(2, key0 + j), dv + j * columns, size, 1.f);
    }
  }
  for (int64_t i = 0; task.for_queries && i < task.queries; ++i)
    store_row(gradient(0, task.query + i), dq + i * columns, size, p.scale);
}

// ---- launchers ---------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
using Bf16Words = Pairs;
#else
using Bf16Words = Floats;
#endif

}  // namespace

int64_t attention_forward(const AttentionForward& p) {
  if (p.max_seqlen < 0 || p.max_seqlen > INT32_MAX || p.cu_seqlens[0] != 0) return 0;
  for (int64_t b = 0; b < p.sequences; ++b)
    if (length_of(p, b) < 0 || length_of(p, b) > p.max_seqlen) return b;
  if (p.cu_seqlens[p.sequences] != p.tokens) return p.sequences;
  const auto plan = [&](auto emit) { plan_forward(p, emit); };
  switch (p.dtype) {
    case DType::f32:
      run(p, plan, forward_task<Floats, float>);
      break;
    case DType::bf16:
      run(p, plan, forward_task<Bf16Words, bf16>);
      break;
    case DType::f16:
      run(p, plan, forward_task<Floats, f16>);
      break;
  }
  return -1;
}

void attention_backward(const AttentionBackward& p) {
  const auto plan = [&](auto emit) { plan_backward(p, emit); };
  switch (p.dtype) {
    case DType::f32:
      return run(p, plan, backward_task<Floats, float>);
    case DType::bf16:
      return run(p, plan, backward_task<Bf16Words, bf16>);
    case DType::f16:
      return run(p, plan, backward_task<Floats, f16>);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
