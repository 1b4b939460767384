// Attention of packed sequences without tensor cores: float32 as it is, on any GPU, and 16-bit types where
// csrc/cuda/attention.cu does not take the GPU or the head size. q, k, v and out [T, N, D], lse [T, N]; for
// a query i and the keys j it sees, head by head,
//
//   s_ij = scale * q_i . k_j,   lse_i = log(sum_j exp(s_ij)),   P_ij = exp(s_ij - lse_i)
//   out_i = sum_j drop(P_ij) v_j
//
// Backward takes q, k, v, out and lse and computes P and the dropout mask again:
//
//   delta_i = dout_i . out_i,   dS_ij = P_ij * (drop'(dout_i . v_j) - delta_i)
//   dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i,   dv_j = sum_i drop(P_ij) dout_i
//
// Everything is float32, whatever the dtype of what is read and written, and summed in a fixed order.
//
// A block takes 64 rows of one sequence and head, queries or, for dk and dv, keys, and goes through the rows
// of the other kind by 64:
//
//   for each 64 of the others:
//     for each 64 columns of the head: copy both tiles, products += rows others^T     multiply_rows
//     softmax of the products, in registers
//     copy 64 columns of the others, result += products others                        add_products
//
// Heads wider than 64 give each 64 columns of the result to a block of its own, which computes the products
// again: D = 128 costs 1.5 times as much as it might. Such heads are rare without tensor cores, and one
// kernel of each kind serves all sizes. Dao, "FlashAttention-2" (2023).
#include "launch.h"
//
#include "attention_plain_visible.h"
#include "attention_plain_work.h"
#include "kernels.h"
#include "ptx.h"

namespace fastbert::cuda {
namespace {

constexpr int kForwardBytes = 4 * (2 * kTileFloats + kStripFloats);
constexpr int kBackwardBytes = 4 * (3 * kTileFloats + kStripFloats + 2 * kTile);
static_assert(kBackwardBytes <= 64 << 10, "sm_75 gives a block 64 KB");

// ---- forward -----------------------------------------------------------------------------------------

DEVICE float half_warp_max(float value) {
#pragma unroll
  for (int offset = kHalfWarp / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// A thread's rows of queries so far.
struct Softmax {
  float highest[kRows], sum[kRows];  // of exponents of 2; the sums of this thread's columns alone
};

// Scores of a tile of keys become weights without their common factor; where the highest moves, what there is
// of sums and results is scaled.
template <class Seen>
DEVICE void add_scores(Softmax& softmax, Products& scores, Results& results, float scale_log2,
                       const Seen& seen) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float highest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      scores[i][j] = seen.has(i, j) ? scores[i][j] * scale_log2 : -INFINITY;
      highest = fmaxf(highest, scores[i][j]);
    }
    highest = fmaxf(softmax.highest[i], half_warp_max(highest));
    const float base = highest == -INFINITY ? 0.f : highest;  // -inf - -inf would be NaN
    const float shrink = exp2_approximate(softmax.highest[i] - base);
    softmax.highest[i] = highest;
    softmax.sum[i] *= shrink;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      scores[i][j] = exp2_approximate(scores[i][j] - base);
      softmax.sum[i] += scores[i][j];
      results[i][j] *= shrink;
    }
  }
}

DEVICE void drop(Products& weights, uint32_t kept) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) weights[i][j] = is_kept(kept, i, j) ? weights[i][j] : 0.f;
}

template <class T, class Mask>
__global__ void __launch_bounds__(kThreads, 3) attention_plain_forward_kernel(AttentionForward p, Plan plan) {
  DYNAMIC_SHARED(float, memory);
  float *q_tile = memory, *tile = q_tile + kTileFloats, *strip = tile + kTileFloats;
  const Work work = work_of_block(p, plan);
  if (work.row >= work.length) return;
  const uint64_t seed = seed_of(p);
  const int head_size = p.head_size;
  const Rows<T> q = rows_of<T>(p.q, p.q_stride, p, work, work.row);
  OtherTiles<Mask, true> keys(p, plan, work, q.count);
  const int first_key = keys.first();

  Results out = {};
  Softmax softmax;
#pragma unroll
  for (int i = 0; i < kRows; ++i) softmax.highest[i] = -INFINITY, softmax.sum[i] = 0;
#pragma unroll 1
  for (int key = first_key; key < keys.end(); key = keys.next(key)) {
    // scores
    const Rows<T> k = rows_of<T>(p.k, p.k_stride, p, work, key);
    const Rows<T> v = rows_of<T>(p.v, p.v_stride, p, work, key);
    const SeenProducts<Mask, true> seen(p, plan, work, key);
    const bool q_there = head_size <= kTile && key > first_key;
    Products scores;
    multiply_rows(scores, q_tile, q, q_there, tile, k, head_size, plan.vectors);

    // softmax
    if (has_rows(q.count)) {
      add_scores(softmax, scores, out, plan.scale_log2, seen);
      if (p.t != 0) drop(scores, kept_keys(p, work, seed, key));
    }

    // out
    __syncthreads();
    copy_tile(tile, v, work.slice * kTile, head_size, plan.vectors);
    __syncthreads();
    if (has_rows(q.count)) add_products(out, scores, strip, tile, v.count);
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row() + 2 * i;
    const float total = half_warp_sum(softmax.sum[i]);
    if (row >= q.count) continue;
    const bool sees_nothing = total == 0.f;  // no key, or scores of -inf alone
    const int64_t place = (work.begin + work.row + row) * p.heads + work.head;
    store_row(static_cast<T*>(p.out) + place * head_size, out[i], sees_nothing ? 0.f : plan.keep / total,
              work.slice, head_size, plan.results);
    if (column() == 0 && work.slice == 0)
      p.lse[place] = sees_nothing ? -INFINITY : softmax.highest[i] * kLn2 + logf(total);
  }
}

// ---- backward ----------------------------------------------------------------------------------------

// Of the 64 queries from `query` on: log2(e) times lse, and delta. A query that sees nothing, or is none, has
// lse inf, and with it weights of 0.
template <class T>
DEVICE void copy_statistics(float* lse, float* delta, const AttentionBackward& p, const Work& work,
                            int query) {
  const int lane = lane_of_warp(), head_size = p.head_size;
#pragma unroll 4
  for (int i = 0; i < kWarpRows; ++i) {
    const int row = warp_of_block() * kWarpRows + i;
    float product = 0, saved = -INFINITY;
    if (query + row < work.length) {
      const int64_t place = (work.begin + query + row) * p.heads + work.head;
      const T* dout = static_cast<const T*>(p.dout) + place * head_size;
      const T* out = static_cast<const T*>(p.out) + place * head_size;
#pragma unroll 2
      for (int d = lane; d < head_size; d += kWarp) product += to_float(dout[d]) * to_float(out[d]);
      saved = p.lse[place];
    }
    product = warp_sum(product);
    if (lane == 0) lse[row] = saved == -INFINITY ? INFINITY : saved * kLog2e, delta[row] = product;
  }
}

// A score becomes drop(P), and dout . v becomes dS.
DEVICE void differentiate(float& score, float& product, const Plan& plan, float lse, float delta, bool seen,
                          bool kept) {
  const float weight = seen ? exp2_approximate(score * plan.scale_log2 - lse) : 0.f;
  score = kept ? weight * plan.keep : 0.f;
  product = seen ? weight * ((kept ? product * plan.keep : 0.f) - delta) : 0.f;
}

// What is seen by token takes more registers than three blocks leave.
template <class T, class Mask>
__global__ void __launch_bounds__(kThreads, Mask::kByToken ? 2 : 3)
    attention_plain_dq_kernel(AttentionBackward p, Plan plan) {
  DYNAMIC_SHARED(float, memory);
  float *q_tile = memory, *dout_tile = q_tile + kTileFloats, *tile = dout_tile + kTileFloats;
  float *strip = tile + kTileFloats, *lse = strip + kStripFloats, *delta = lse + kTile;
  const Work work = work_of_block(p, plan);
  if (work.row >= work.length) return;
  const uint64_t seed = seed_of(p);
  const int head_size = p.head_size;
  const bool narrow = head_size <= kTile;
  const Rows<T> q = rows_of<T>(p.q, p.q_stride, p, work, work.row);
  const Rows<T> dout = rows_of<T>(p.dout, p.heads * p.head_size, p, work, work.row);
  OtherTiles<Mask, true> keys(p, plan, work, q.count);
  const int first_key = keys.first();
  copy_statistics<T>(lse, delta, p, work, work.row);

  Results dq = {};
#pragma unroll 1
  for (int key = first_key; key < keys.end(); key = keys.next(key)) {
    // products
    const Rows<T> k = rows_of<T>(p.k, p.k_stride, p, work, key);
    const Rows<T> v = rows_of<T>(p.v, p.v_stride, p, work, key);
    const SeenProducts<Mask, true> seen(p, plan, work, key);
    const bool there = narrow && key > first_key;
    Products scores, products;
    multiply_rows(products, dout_tile, dout, there, tile, v, head_size, plan.vectors);
    multiply_rows(scores, q_tile, q, there, tile, k, head_size, plan.vectors);

    // softmax
    if (has_rows(q.count)) {
      const uint32_t kept = p.t != 0 ? kept_keys(p, work, seed, key) : ~0u;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = first_row() + 2 * i;
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          differentiate(scores[i][j], products[i][j], plan, lse[row], delta[row], seen.has(i, j),
                        is_kept(kept, i, j));
      }
    }

    // dq
    if (!narrow) {
      __syncthreads();
      copy_tile(tile, k, work.slice * kTile, head_size, plan.vectors);
      __syncthreads();
    }
    if (has_rows(q.count)) add_products(dq, products, strip, tile, k.count);
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row() + 2 * i;
    if (row >= q.count) continue;
    const int64_t place = (work.begin + work.row + row) * 3 * p.heads + work.head;
    store_row(static_cast<T*>(p.dqkv) + place * head_size, dq[i], p.scale, work.slice, head_size,
              plan.results);
  }
}

template <class T, class Mask>
__global__ void __launch_bounds__(kThreads, 2) attention_plain_dk_dv_kernel(AttentionBackward p, Plan plan) {
  DYNAMIC_SHARED(float, memory);
  float *k_tile = memory, *v_tile = k_tile + kTileFloats, *tile = v_tile + kTileFloats;
  float *strip = tile + kTileFloats, *lse = strip + kStripFloats, *delta = lse + kTile;
  const Work work = work_of_block(p, plan);
  if (work.row >= work.length) return;
  const uint64_t seed = seed_of(p);
  const int head_size = p.head_size;
  const bool narrow = head_size <= kTile;
  const Rows<T> k = rows_of<T>(p.k, p.k_stride, p, work, work.row);
  const Rows<T> v = rows_of<T>(p.v, p.v_stride, p, work, work.row);
  OtherTiles<Mask, false> queries(p, plan, work, k.count);
  const int first_query = queries.first();

  Results dk = {}, dv = {};
#pragma unroll 1
  for (int query = first_query; query < queries.end(); query = queries.next(query)) {
    // products
    const Rows<T> q = rows_of<T>(p.q, p.q_stride, p, work, query);
    const Rows<T> dout = rows_of<T>(p.dout, p.heads * p.head_size, p, work, query);
    const SeenProducts<Mask, false> seen(p, plan, work, query);
    const bool there = narrow && query > first_query;
    Products scores, products;
    copy_statistics<T>(lse, delta, p, work, query);
    multiply_rows(scores, k_tile, k, there, tile, q, head_size, plan.vectors);
    multiply_rows(products, v_tile, v, there, tile, dout, head_size, plan.vectors);

    // softmax
    if (has_rows(k.count)) {
      const KeptQueries kept = p.t != 0 ? kept_queries(p, work, seed, query) : KeptQueries{{~0u, ~0u}};
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int other = column() + j * kHalfWarp;
        const float its_lse = lse[other], its_delta = delta[other];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          differentiate(scores[i][j], products[i][j], plan, its_lse, its_delta, seen.has(i, j),
                        kept.has(i, j));
      }
    }

    // dv
    if (!narrow) {
      __syncthreads();
      copy_tile(tile, dout, work.slice * kTile, head_size, plan.vectors);
      __syncthreads();
    }
    if (has_rows(k.count)) add_products(dv, scores, strip, tile, q.count);

    // dk
    __syncthreads();
    copy_tile(tile, q, work.slice * kTile, head_size, plan.vectors);
    __syncthreads();
    if (has_rows(k.count)) add_products(dk, products, strip, tile, q.count);
  }

  store_dk_dv<T>(p.dqkv, dk, dv, p.scale, k.count, p, plan, work);
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class T, class Mask>
int forward(const AttentionForward& p) {
  const Plan plan = plan_of<T>(p, true, p.out);
  return launch("attention_forward", attention_plain_forward_kernel<T, Mask>, grid_of(p, plan), kThreads,
                kForwardBytes, reinterpret_cast<void*>(p.launch), p, plan);
}

template <class T, class Mask>
int backward(const AttentionBackward& p) {
  const Plan plan = plan_of<T>(p, are_aligned(kAccessBytes, p.dout), p.dqkv);
  return launch_backward("attention_backward", attention_plain_dq_kernel<T, Mask>,
                         attention_plain_dk_dv_kernel<T, Mask>, kBackwardBytes, p, plan);
}

// call(T(), Mask()) for the dtype, and for what says which keys are seen.
template <class Call>
int with_type_and_mask(const Attention& p, Call call) {
  return with_type(p.dtype, [&](auto x) {
    if (p.global_tokens) return call(x, GlobalTokens());
    if (p.query_ranks) return call(x, Ranks());
    return call(x, Window());
  });
}

}  // namespace

int attention_plain_forward(const AttentionForward& p) {
  if (is_empty(p)) return 0;
  return with_type_and_mask(p, [&](auto x, auto mask) { return forward<decltype(x), decltype(mask)>(p); });
}

int attention_plain_backward(const AttentionBackward& p) {
  if (is_empty(p)) return 0;
  return with_type_and_mask(p, [&](auto x, auto mask) { return backward<decltype(x), decltype(mask)>(p); });
}

}  // namespace fastbert::cuda
