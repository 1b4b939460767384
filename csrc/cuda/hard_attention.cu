// Hard attention of packed sequences, q, k, v and out [T, N, D], best and lse [T, N]: for a query i and the
// keys j it sees, head by head, with temperature tau and Gumbel noise g, or none,
//
//   s_ij = scale * q_i . k_j + g_ij,   b_i = the first j with the greatest s_ij,   out_i = v_{b_i}
//   lse_i = log(sum_j exp(s_ij / tau)), for backward
//
// Backward takes q, k, v, best and lse, computes s again, and gives the gradient of the softmax at tau for q
// and k, of what was chosen for v (straight-through):
//
//   P_ij = exp(s_ij / tau - lse_i),   dP_ij = dout_i . v_j,   delta_i = sum_j P_ij dP_ij
//   dq_i = scale / tau * (sum_j P_ij dP_ij k_j - delta_i * sum_j P_ij k_j)
//   dk_j = scale / tau * sum_i P_ij (dP_ij - delta_i) q_i,   dv_j = sum of dout_i over the i with b_i = j
//
// so that dq needs one pass over the keys; it leaves delta for dk. dv is a product with the choices as
// weights of 1 and 0.
//
// It is built as attention_plain.cu is, from the same tiles: no tensor cores, for any dtype, head size and
// GPU. Everything is float32, whatever the dtype of what is read and written, and in a fixed order. Of v the
// forward pass reads one row for each query.
#include "launch.h"
//
#include "attention_plain_visible.h"
#include "attention_plain_work.h"
#include "gumbel.h"
#include "kernels.h"
#include "ptx.h"

namespace fastbert::cuda {
namespace {

constexpr int kForwardBytes = 4 * 2 * kTileFloats;
constexpr int kBackwardBytes = 4 * (3 * kTileFloats + kStripFloats + 3 * kTile);
static_assert(kBackwardBytes <= 64 << 10, "sm_75 gives a block 64 KB");

DEVICE uint64_t noise_seed(const Attention& p) { return p.seed ? static_cast<uint64_t>(*p.seed) : 0; }

DEVICE void scale_scores(Products& scores, float scale) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) scores[i][j] *= scale;
}

// ---- forward -----------------------------------------------------------------------------------------

// The first of the highest scores of some keys, and the sum of exp((s - highest) / tau), NaN where a score
// is.
struct Choice {
  float highest, sum;
  int best;

  DEVICE void add(float score, int key, float exponent) {  // keys ascend
    if (score > highest) {
      sum *= exp2_approximate((highest - score) * exponent);
      highest = score, best = key;
    }
    const bool counts = highest < INFINITY || score != score;
    if (counts) sum += score == -INFINITY ? 0.f : exp2_approximate((score - highest) * exponent);
  }

  // With another's, of other keys.
  DEVICE void join(const Choice& other, float exponent) {
    const float top = fmaxf(highest, other.highest);
    const float own = highest == top ? 1.f : exp2_approximate((highest - top) * exponent);
    const float its = other.highest == top ? 1.f : exp2_approximate((other.highest - top) * exponent);
    const bool later = best < 0 || (other.best >= 0 && other.best < best);
    if (other.highest > highest || (other.highest == highest && later)) best = other.best;
    sum = sum * own + other.sum * its, highest = top;
  }
};

DEVICE Choice join_half_warp(Choice choice, float exponent) {
#pragma unroll
  for (int offset = 1; offset < kHalfWarp; offset *= 2) {
    const Choice other = {__shfl_xor_sync(kAllLanes, choice.highest, offset),
                          __shfl_xor_sync(kAllLanes, choice.sum, offset),
                          __shfl_xor_sync(kAllLanes, choice.best, offset)};
    choice.join(other, exponent);
  }
  return choice;
}

template <class T, class Mask>
__global__ void __launch_bounds__(kThreads, 2)
    hard_attention_forward_kernel(HardAttentionForward p, Plan plan) {
  DYNAMIC_SHARED(float, memory);
  float *q_tile = memory, *tile = q_tile + kTileFloats;
  const Work work = work_of_block(p, plan);
  if (work.row >= work.length) return;
  const uint64_t seed = noise_seed(p);
  const int head_size = p.head_size;
  const float exponent = kLog2e / p.temperature;
  const Rows<T> q = rows_of<T>(p.q, p.q_stride, p, work, work.row);
  OtherTiles<Mask, true> keys(p, plan, work, q.count);
  const int first_key = keys.first();

  Choice choices[kRows];  // of this thread's columns
#pragma unroll
  for (int i = 0; i < kRows; ++i) choices[i] = {-INFINITY, 0, -1};
#pragma unroll 1
  for (int key = first_key; key < keys.end(); key = keys.next(key)) {
    const Rows<T> k = rows_of<T>(p.k, p.k_stride, p, work, key);
    const bool q_there = head_size <= kTile && key > first_key;
    Products scores;
    multiply_rows(scores, q_tile, q, q_there, tile, k, head_size, plan.vectors);
    if (!has_rows(q.count)) continue;
    scale_scores(scores, p.scale);
    if (p.seed) add_noise(scores, work, seed, key);
    const SeenProducts<Mask, true> seen(p, plan, work, key);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (seen.has(i, j)) choices[i].add(scores[i][j], key + column() + j * kHalfWarp, exponent);
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Choice choice = join_half_warp(choices[i], exponent);
    const int row = first_row() + 2 * i;
    if (row >= q.count) continue;
    const bool is_nan = choice.sum != choice.sum, chosen = choice.best >= 0 && !is_nan;
    const int64_t place = (work.begin + work.row + row) * p.heads + work.head;
    T* out = static_cast<T*>(p.out) + place * head_size;
    const Rows<T> v = rows_of<T>(p.v, p.v_stride, p, work, chosen ? choice.best : 0);
    for (int d = column(); d < head_size; d += kHalfWarp)
      out[d] = chosen ? v.first[d] : from_float<T>(is_nan ? choice.sum : 0.f);
    if (column() > 0) continue;
    const bool finite = choice.highest > -INFINITY && choice.highest < INFINITY;
    p.best[place] = chosen ? choice.best : -1;
    p.lse[place] = is_nan   ? choice.sum
                   : finite ? choice.highest / p.temperature + logf(choice.sum)
                            : choice.highest;
  }
}

// ---- backward ----------------------------------------------------------------------------------------

// Of the 64 queries from `query` on: log2(e) times lse. One that sees nothing, or is none, has inf, and with
// it weights of 0.
DEVICE void copy_lse(float* lse, const HardAttentionBackward& p, const Work& work, int query) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kTile) return;
  const bool there = query + row < work.length;
  const float saved = there ? p.lse[(work.begin + query + row) * p.heads + work.head] : -INFINITY;
  lse[row] = saved == -INFINITY ? INFINITY : saved * kLog2e;
}

DEVICE float weight_of(float score, float exponent, float lse, bool seen) {
  return seen ? exp2_approximate(score * exponent - lse) : 0.f;
}

template <class T, class Mask>
__global__ void __launch_bounds__(kThreads, 2) hard_attention_dq_kernel(HardAttentionBackward p, Plan plan) {
  DYNAMIC_SHARED(float, memory);
  float *q_tile = memory, *dout_tile = q_tile + kTileFloats, *tile = dout_tile + kTileFloats;
  float *strip = tile + kTileFloats, *lse = strip + kStripFloats;
  const Work work = work_of_block(p, plan);
  if (work.row >= work.length) return;
  const uint64_t seed = noise_seed(p);
  const int head_size = p.head_size;
  const float exponent = kLog2e / p.temperature;
  const Rows<T> q = rows_of<T>(p.q, p.q_stride, p, work, work.row);
  const Rows<T> dout = rows_of<T>(p.dout, p.heads * p.head_size, p, work, work.row);
  OtherTiles<Mask, true> keys(p, plan, work, q.count);
  const int first_key = keys.first();
  copy_lse(lse, p, work, work.row);

  Results weighted = {}, mean = {};  // sums of P dP k and of P k
  float delta[kRows] = {};           // of this thread's columns
#pragma unroll 1
  for (int key = first_key; key < keys.end(); key = keys.next(key)) {
    // softmax, ahead of the other products: noise takes registers
    const Rows<T> k = rows_of<T>(p.k, p.k_stride, p, work, key);
    const Rows<T> v = rows_of<T>(p.v, p.v_stride, p, work, key);
    const bool there = head_size <= kTile && key > first_key;
    Products scores, products;
    multiply_rows(scores, q_tile, q, there, tile, k, head_size, plan.vectors);
    if (has_rows(q.count)) {
      scale_scores(scores, p.scale);
      if (p.seed) add_noise(scores, work, seed, key);
      const SeenProducts<Mask, true> seen(p, plan, work, key);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          scores[i][j] = weight_of(scores[i][j], exponent, lse[first_row() + 2 * i], seen.has(i, j));
    }

    // products
    multiply_rows(products, dout_tile, dout, there, tile, v, head_size, plan.vectors);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        products[i][j] *= scores[i][j];
        delta[i] += products[i][j];
      }

    // dq
    __syncthreads();
    copy_tile(tile, k, work.slice * kTile, head_size, plan.vectors);
    __syncthreads();
    if (has_rows(q.count)) {
      add_products(weighted, products, strip, tile, k.count);
      add_products(mean, scores, strip, tile, k.count);
    }
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float its_delta = half_warp_sum(delta[i]);
    const int row = first_row() + 2 * i;
    if (row >= q.count) continue;
    const int64_t place = (work.begin + work.row + row) * p.heads + work.head;
    if (column() == 0 && work.slice == 0) p.scratch[place] = its_delta;
#pragma unroll
    for (int j = 0; j < 4; ++j) weighted[i][j] -= its_delta * mean[i][j];
    const int64_t first = (work.begin + work.row + row) * 3 * p.heads + work.head;
    store_row(static_cast<T*>(p.dqkv) + first * head_size, weighted[i], p.scale / p.temperature, work.slice,
              head_size, plan.results);
  }
}

// What the queries from `query` on chose, -1 for those behind the last, and their delta.
DEVICE void copy_choices(int* best, float* delta, const HardAttentionBackward& p, const Work& work,
                         int query) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kTile) return;
  const bool there = query + row < work.length;
  const int64_t place = (work.begin + query + row) * p.heads + work.head;
  best[row] = there ? p.best[place] : -1;
  delta[row] = there ? p.scratch[place] : 0.f;
}

template <class T, class Mask>
__global__ void __launch_bounds__(kThreads, 2)
    hard_attention_dk_dv_kernel(HardAttentionBackward p, Plan plan) {
  DYNAMIC_SHARED(float, memory);
  float *k_tile = memory, *v_tile = k_tile + kTileFloats, *tile = v_tile + kTileFloats;
  float *strip = tile + kTileFloats, *lse = strip + kStripFloats, *delta = lse + kTile;
  int* best = reinterpret_cast<int*>(delta + kTile);
  const Work work = work_of_block(p, plan);
  if (work.row >= work.length) return;
  const uint64_t seed = noise_seed(p);
  const int head_size = p.head_size;
  const float exponent = kLog2e / p.temperature;
  const bool narrow = head_size <= kTile;
  const Rows<T> k = rows_of<T>(p.k, p.k_stride, p, work, work.row);
  const Rows<T> v = rows_of<T>(p.v, p.v_stride, p, work, work.row);
  OtherTiles<Mask, false> queries(p, plan, work, k.count);
  const int first_query = queries.first();

  Results dk = {}, dv = {};
#pragma unroll 1
  for (int query = first_query; query < queries.end(); query = queries.next(query)) {
    // softmax, ahead of the other products as above
    const Rows<T> q = rows_of<T>(p.q, p.q_stride, p, work, query);
    const Rows<T> dout = rows_of<T>(p.dout, p.heads * p.head_size, p, work, query);
    const bool there = narrow && query > first_query;
    Products scores, products;
    __syncthreads();  // the last tile's statistics have been read
    copy_lse(lse, p, work, query);
    copy_choices(best, delta, p, work, query);
    multiply_rows(scores, k_tile, k, there, tile, q, head_size, plan.vectors);
    if (has_rows(k.count)) {
      scale_scores(scores, p.scale);
      if (p.seed) add_noise_transposed(scores, work, seed, query);
      const SeenProducts<Mask, false> seen(p, plan, work, query);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float its_lse = lse[column() + j * kHalfWarp];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          scores[i][j] = weight_of(scores[i][j], exponent, its_lse, seen.has(i, j));
      }
    }

    // products: dS, and the choices
    multiply_rows(products, v_tile, v, there, tile, dout, head_size, plan.vectors);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int other = column() + j * kHalfWarp, its_best = best[other];
      const float its_delta = delta[other];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        products[i][j] = scores[i][j] * (products[i][j] - its_delta);
        scores[i][j] = its_best == work.row + first_row() + 2 * i ? 1.f : 0.f;
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

  store_dk_dv<T>(p.dqkv, dk, dv, p.scale / p.temperature, k.count, p, plan, work);
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class T, class Mask>
int forward(const HardAttentionForward& p) {
  Plan plan = plan_of<T>(p, true, p.out);
  plan.slices = 1;  // a block copies whole rows of v
  return launch("hard_attention_forward", hard_attention_forward_kernel<T, Mask>, grid_of(p, plan), kThreads,
                kForwardBytes, reinterpret_cast<void*>(p.launch), p, plan);
}

template <class T, class Mask>
int backward(const HardAttentionBackward& p) {
  const Plan plan = plan_of<T>(p, are_aligned(kAccessBytes, p.dout), p.dqkv);
  return launch_backward("hard_attention_backward", hard_attention_dq_kernel<T, Mask>,
                         hard_attention_dk_dv_kernel<T, Mask>, kBackwardBytes, p, plan);
}

}  // namespace

int hard_attention_forward(const HardAttentionForward& p) {
  if (is_empty(p)) return 0;
  return with_type(p.dtype, [&](auto x) {
    using T = decltype(x);
    return p.global_tokens ? forward<T, GlobalTokens>(p) : forward<T, Window>(p);
  });
}

int hard_attention_backward(const HardAttentionBackward& p) {
  if (is_empty(p)) return 0;
  return with_type(p.dtype, [&](auto x) {
    using T = decltype(x);
    return p.global_tokens ? backward<T, GlobalTokens>(p) : backward<T, Window>(p);
  });
}

}  // namespace fastbert::cuda
