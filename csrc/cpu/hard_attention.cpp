// Hard attention of packed sequences, q, k, v and out [T, N, D], best and lse [T, N]: for a query i and the
// keys j it sees, head by head, with temperature tau and Gumbel noise g, or none,
//
//   s_ij = scale * q_i . k_j + g_ij,   b_i = the first j with the greatest s_ij,   out_i = v_{b_i}
//   lse_i = log(sum_j exp(s_ij / tau)), for backward
//
// Backward takes q, k, v, best and lse, computes s again, and gives the gradient of the softmax at tau for q
// and k, of what was chosen for v (straight-through):
//
//   P_ij = exp(s_ij / tau - lse_i),   dP_ij = dout_i . v_j,   dS_ij = P_ij * (dP_ij - sum_k P_ik dP_ik)
//   dq_i = scale / tau * sum_j dS_ij k_j,   dk_j = scale / tau * sum_i dS_ij q_i
//   dv_j = sum of dout_i over the i with b_i = j
//
// Forward is attention's with another softmax: tasks are runs of queries of one head, which go through blocks
// of keys that stay in L2, and the choice runs over the blocks; of v one row a query is read. Backward takes
// a head of a sequence whole, so there are B * N tasks, and for each few queries the scores of all keys, as
// dS needs a sum over them first:
//
//   for every block of queries             kBackwardQueries of them
//     scores = q k^T, products = dout v^T  rows over all keys that they see
//     dS, row by row
//     dq = dS k, dk += dS^T q, and dv      in the queries' order
//
// Everything is float32, whatever the dtype of what is read and written, and in an order that depends on the
// shapes alone.
#include "attention_softmax.h"
#include "attention_tasks.h"
#include "gumbel.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

constexpr int64_t kKeys = 512;            // of a block, for which noise is drawn at a time
constexpr int64_t kBackwardQueries = 32;  // of a block in backward
constexpr int64_t kFirstKeys = 16;        // blocks of keys begin at multiples of it: vectors, and counters
constexpr float kInfinity = __builtin_inff();

// Products of queries and keys become scores, in rows `row` apart: -inf where a key is not visible.
FASTBERT_INLINE void finish_scores(const Attention& p, const Task& task, const Block& block,
                                   const TokenMask<kKeys>& mask, GumbelNoise<kKeys>& noise, float* scores,
                                   int64_t row) {
  const int64_t padded = round_up(block.keys, kLanes);
  const float scale = p.scale;  // stores could alias what stands in p
  for (int64_t i = 0; i < block.queries; ++i, scores += row) {
    const int64_t query = block.query + i;
    const Visible visible = mask.visible(p, block, query);
    const bool noisy = noise.is_given();
    if (noisy) noise.draw(p.cu_seqlens[task.sequence] + query, task.head, block.key, padded);
    over_keys(visible, padded, [&](int64_t j, auto seen, int) FASTBERT_LAMBDA {
      vfloat s = load(scores + j) * scale;
      if (noisy) s += noise.at(j);
      store(scores + j, seen.pick(visible, j, s, -kInfinity));
    });
  }
}

// ---- forward -----------------------------------------------------------------------------------------

// Of one query, over the keys so far.
struct Choice {
  float highest, sum;  // of exp((s - highest) / tau); NaN where a score is
  int32_t best;

  // The row of scores begins with that of `key`.
  FASTBERT_MEMBER void add(const float* scores, int64_t width, int64_t key, float inverse) {
    vint place, which = splat(-1), nan = {};
    for (int i = 0; i < kLanes; ++i) place[i] = i;
    vfloat most = splat(-kInfinity);
    for (int64_t j = 0; j < width; j += kLanes) {
      const vfloat s = load(scores + j);
      const vint better = s > most;  // the first of equal ones stays
      most = better ? s : most;
      which = better ? place + static_cast<int32_t>(j) : which;
      nan |= s != s;
    }
    for (int i = 0; i < kLanes; ++i)
      if (nan[i]) sum = __builtin_nanf("");
    const float block = reduce_max(most), before = highest;
    if (block > before) {
      int32_t first = INT32_MAX;
      for (int i = 0; i < kLanes; ++i)
        if (most[i] == block && which[i] < first) first = which[i];
      best = static_cast<int32_t>(key) + first, highest = block;
    }
    if (block == -kInfinity || highest == kInfinity) return;
    vfloat total = {};
    for (int64_t j = 0; j < width; j += kLanes) total += exp_below((load(scores + j) - highest) * inverse);
    if (highest > before) sum *= exp(splat((before - highest) * inverse))[0];
    sum += reduce_add(total);
  }

  FASTBERT_MEMBER bool is_nan() const { return sum != sum; }
  FASTBERT_MEMBER float lse(float inverse) const {
    if (is_nan()) return sum;
    const bool finite = -kInfinity < highest && highest < kInfinity;
    return finite ? highest * inverse + __builtin_logf(sum) : highest;
  }
};

// A run of queries against all keys, a block of either at a time.
template <typename T>
void forward_task(const HardAttentionForward& p, const Task& task, const Task*) {
  constexpr int64_t kRow = row_of(kKeys);  // of scores, and of k by columns
  const HeadSizes<Floats> sizes(p.head_size);
  const float inverse = 1.f / p.temperature;
  Scratch scratch(sizes.width * (kRow + kLanes + kRun) + kQueries * kRow + kRun * 3 + sizes.columns + 128);
  uint32_t* part = scratch.words(kLanes * sizes.width);  // room to pack in
  uint32_t* k_columns = scratch.words(sizes.width * kRow);
  uint32_t* q = scratch.words(kRun * sizes.width);
  float* scores = scratch.floats(kQueries * kRow);
  Choice* choices = reinterpret_cast<Choice*>(scratch.words(kRun * 3));
  TokenMask<kKeys> mask(p, task.sequence);
  GumbelNoise<kKeys> noise(p.seed);
  Ahead nothing;

  pack_rows<Floats>(row_at<T>(p, task, p.q, p.q_stride, task.query), p.q_stride, task.queries, p.head_size, q,
                    sizes.width);
  for (int64_t i = 0; i < task.queries; ++i) choices[i] = {-kInfinity, 0.f, -1};
  for (int64_t key = 0; key < task.keys; key += kKeys) {
    const int64_t keys = min(kKeys, task.keys - key);
    bool packed = false;
    mask.at(key, keys);
    for (int64_t i = 0; i < task.queries; i += kQueries) {
      const Block block = mask.visible_part(p, {task.query + i, min(kQueries, task.queries - i), key, keys});
      if (block.queries == 0) continue;
      if (!packed)
        pack_columns<Floats>(row_at<T>(p, task, p.k, p.k_stride, key), p.k_stride, keys, p.head_size,
                             k_columns, kRow, sizes.width, part);
      packed = true;
      const int64_t first = block.query - task.query, width = round_up(block.keys, kLanes);
      multiply<Floats>(block.queries, width, sizes.depth, {q + first * sizes.width, sizes.width, 1},
                       {k_columns + block.key - key, kRow}, {scores, kRow}, false, nothing);
      finish_scores(p, task, block, mask, noise, scores, kRow);
      for (int64_t r = 0; r < block.queries; ++r)
        choices[first + r].add(scores + r * kRow, width, block.key, inverse);
    }
  }

  float* otherwise = scratch.floats(sizes.columns);  // a row without a choice
  for (int64_t i = 0; i < task.queries; ++i) {
    const Choice& choice = choices[i];
    const int64_t at = (p.cu_seqlens[task.sequence] + task.query + i) * p.heads + task.head;
    const bool chosen = choice.best >= 0 && !choice.is_nan();
    T* out = static_cast<T*>(p.out) + at * p.head_size;
    p.lse[at] = choice.lse(inverse);
    p.best[at] = chosen ? choice.best : -1;
    if (chosen) {
      memcpy(out, row_at<T>(p, task, p.v, p.v_stride, choice.best), p.head_size * sizeof(T));
    } else {
      for (int64_t d = 0; d < sizes.columns; ++d) otherwise[d] = choice.is_nan() ? choice.sum : 0.f;
      store_row(out, otherwise, p.head_size, 1.f);
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------------

// A head of a sequence.
template <typename T>
struct BackwardTask {
  const HardAttentionBackward& p;
  const Task& task;
  const HeadSizes<Floats> sizes;
  const int64_t row;                // of scores, and of k and v by columns
  const float inverse;              // of the temperature
  uint32_t *k_columns, *v_columns;  // [width, row]
  uint32_t* k;                      // [keys, columns]
  float *dk, *dv;                   // [keys, columns]
  // Of a block of queries.
  uint32_t *q, *dout;        // [kBackwardQueries, width]
  float* dq;                 // [kBackwardQueries, columns]
  float *scores, *products;  // [kBackwardQueries, row]: q k^T and dout v^T, then P and dS
  TokenMask<kKeys> mask;
  GumbelNoise<kKeys> noise;
  Ahead nothing;

  BackwardTask(const HardAttentionBackward& p, const Task& task)
      : p(p),
        task(task),
        sizes(p.head_size),
        row(row_of(task.keys)),
        inverse(1.f / p.temperature),
        mask(p, task.sequence),
        noise(p.seed) {
    const int64_t columns = sizes.columns, width = sizes.width;
    Scratch scratch(width * (2 * row + kLanes + 2 * kBackwardQueries) + 3 * task.keys * columns +
                    kBackwardQueries * (columns + 2 * row) + 256);
    uint32_t* part = scratch.words(kLanes * width);  // room to pack in
    k_columns = scratch.words(width * row);
    v_columns = scratch.words(width * row);
    k = scratch.words(task.keys * columns);
    dk = scratch.floats(task.keys * columns);
    dv = scratch.floats(task.keys * columns);
    q = scratch.words(kBackwardQueries * width);
    dout = scratch.words(kBackwardQueries * width);
    dq = scratch.floats(kBackwardQueries * columns);
    scores = scratch.floats(kBackwardQueries * row);
    products = scratch.floats(kBackwardQueries * row);
    const T *k_rows = row_at<T>(p, task, p.k, p.k_stride, 0),
            *v_rows = row_at<T>(p, task, p.v, p.v_stride, 0);
    pack_columns<Floats>(k_rows, p.k_stride, task.keys, p.head_size, k_columns, row, width, part);
    pack_columns<Floats>(v_rows, p.v_stride, task.keys, p.head_size, v_columns, row, width, part);
    pack_rows<Floats>(k_rows, p.k_stride, task.keys, p.head_size, k, columns);
    memset(dk, 0, task.keys * columns * sizeof(float));
    memset(dv, 0, task.keys * columns * sizeof(float));
  }

  void run() {
    const int64_t stride = p.heads * p.head_size;  // of dout
    for (int64_t query = 0; query < task.queries; query += kBackwardQueries) {
      const Block block = keys_of(query, min(kBackwardQueries, task.queries - query));
      pack_rows<Floats>(row_at<T>(p, task, p.q, p.q_stride, query), p.q_stride, block.queries, p.head_size, q,
                        sizes.width);
      pack_rows<Floats>(row_at<T>(p, task, p.dout, stride, query), stride, block.queries, p.head_size, dout,
                        sizes.width);
      if (block.keys > 0) add_block(block);
      for (int64_t i = 0; i < block.queries; ++i) {
        if (block.keys == 0) memset(dq + i * sizes.columns, 0, sizes.columns * sizeof(float));
        store_row(gradient(0, query + i), dq + i * sizes.columns, p.head_size, p.scale * inverse);
      }
    }
    for (int64_t j = 0; j < task.keys; ++j) {
      store_row(gradient(1, j), dk + j * sizes.columns, p.head_size, p.scale * inverse);
      store_row(gradient(2, j), dv + j * sizes.columns, p.head_size, 1.f);
    }
  }

  // All keys that some of the queries see, or more.
  FASTBERT_MEMBER Block keys_of(int64_t query, int64_t queries) const {
    if (mask.is_given()) return {query, queries, 0, task.keys};
    const int64_t first = max(0, query - p.window_left) / kFirstKeys * kFirstKeys;
    const int64_t end = min(task.keys, query + queries + p.window_right);
    return {query, queries, first, max(0, end - first)};
  }

  void add_block(const Block& block) {
    const int64_t width = round_up(block.keys, kLanes), columns = sizes.columns;
    multiply<Floats>(block.queries, width, sizes.depth, {q, sizes.width, 1}, {k_columns + block.key, row},
                     {scores, row}, false, nothing);
    multiply<Floats>(block.queries, width, sizes.depth, {dout, sizes.width, 1}, {v_columns + block.key, row},
                     {products, row}, false, nothing);
    for (int64_t done = 0; done < block.keys; done += kKeys) {
      const Block part = {block.query, block.queries, block.key + done, min(kKeys, block.keys - done)};
      mask.at(part.key, part.keys);
      finish_scores(p, task, part, mask, noise, scores + done, row);
    }
    for (int64_t i = 0; i < block.queries; ++i) add_query(block, i, width);
    uint32_t* dscores = reinterpret_cast<uint32_t*>(products);
    multiply<Floats>(block.queries, columns, block.keys, {dscores, row, 1},
                     {k + block.key * columns, columns}, {dq, columns}, false, nothing);
    multiply<Floats>(block.keys, columns, block.queries, {dscores, 1, row}, {q, columns},
                     {dk + block.key * columns, columns}, true, nothing);
  }

  // dS of query i of the block, and what it gives to the key that it chose.
  void add_query(const Block& block, int64_t i, int64_t width) {
    const int64_t at = (p.cu_seqlens[task.sequence] + block.query + i) * p.heads + task.head;
    const float lse = p.lse[at];
    float *weights = scores + i * row, *dscores = products + i * row;
    if (lse == -kInfinity) {
      memset(dscores, 0, width * sizeof(float));
      return;
    }
    vfloat total = {};
    for (int64_t j = 0; j < width; j += kLanes) {
      const vfloat weight = exp_below(load(weights + j) * inverse - lse);
      total += weight * load(dscores + j);
      store(weights + j, weight);
    }
    const float delta = reduce_add(total);
    for (int64_t j = 0; j < width; j += kLanes)
      store(dscores + j, load(weights + j) * (load(dscores + j) - delta));
    if (p.best[at] < 0) return;
    const float* given = reinterpret_cast<const float*>(dout + i * sizes.width);
    float* its = dv + p.best[at] * sizes.columns;
    for (int64_t d = 0; d < sizes.columns; d += kLanes) store(its + d, load(its + d) + load(given + d));
  }

  // Of q, k or v at a token, in dqkv [T, 3, N, D].
  FASTBERT_MEMBER T* gradient(int64_t which, int64_t token) const {
    const int64_t place = ((p.cu_seqlens[task.sequence] + token) * 3 + which) * p.heads + task.head;
    return static_cast<T*>(p.dqkv) + place * p.head_size;
  }
};

template <typename T>
void backward_task(const HardAttentionBackward& p, const Task& task, const Task*) {
  BackwardTask<T>(p, task).run();
}

// ---- launchers ---------------------------------------------------------------------------------------

template <typename Emit>
void plan_whole_heads(const Attention& p, Emit emit) {
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t length = length_of(p, b);
    if (length == 0) continue;
    over_heads(p,
               [&](int64_t head) { emit(Task{b, head, 0, length, 0, length, true, true, length * length}); });
  }
}

}  // namespace

int64_t hard_attention_forward(const HardAttentionForward& p) {
  const int64_t bad = check_sequences(p);
  if (bad >= 0) return bad;
  const auto plan = [&](auto emit) { plan_forward(p, emit); };
  switch (p.dtype) {
    case DType::f32:
      run_tasks(p, plan, forward_task<float>);
      break;
    case DType::bf16:
      run_tasks(p, plan, forward_task<bf16>);
      break;
    case DType::f16:
      run_tasks(p, plan, forward_task<f16>);
      break;
  }
  return -1;
}

void hard_attention_backward(const HardAttentionBackward& p) {
  const auto plan = [&](auto emit) { plan_whole_heads(p, emit); };
  switch (p.dtype) {
    case DType::f32:
      return run_tasks(p, plan, backward_task<float>);
    case DType::bf16:
      return run_tasks(p, plan, backward_task<bf16>);
    case DType::f16:
      return run_tasks(p, plan, backward_task<f16>);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
