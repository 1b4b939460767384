// What a block of attention_plain.cu, hard_attention.cu and attention_distillation.cu works on: its rows, and
// what dropout keeps. Which of the others they see is attention_plain_visible.h's.
#pragma once
#include "launch.h"
//
#include "attention_plain_tiles.h"
#include "dropout.h"
#include "faults.h"

namespace fastbert::cuda {
namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// What a launch decides for all blocks.
struct Plan {
  int tiles;              // of the longest sequence
  int slices;             // of kTile columns that a head has
  float scale_log2;       // scores times this are exponents of 2
  float keep;             // what is kept is multiplied by this
  int left, right;        // key j is visible to query i where i - left <= j <= i + right
  bool vectors, results;  // whether 16 bytes of inputs, and a thread's four results, are aligned
  int32_t* faults;
};

// What a block works on.
struct Work {
  int begin, length;  // of the sequence, in tokens
  int head, row, slice;
};

// A token of no sequence would leave its results as nobody wrote them.
DEVICE bool is_usable(const Attention& p, int64_t sequence) {
  const int begin = p.cu_seqlens[sequence], end = p.cu_seqlens[sequence + 1];
  const bool is_covered = (sequence > 0 || begin == 0) && (sequence + 1 < p.sequences || end == p.tokens);
  return begin >= 0 && begin <= end && end <= p.tokens && end - begin <= p.max_seqlen && is_covered;
}

// Nothing, row >= length, where a tile lies behind its sequence or cu_seqlens cannot be used.
DEVICE Work work_of_block(const Attention& p, const Plan& plan) {
  const int x = blockIdx.x, sequence = x / (plan.slices * plan.tiles), head = blockIdx.y;
  const int begin = p.cu_seqlens[sequence];
  const Work work = {begin, p.cu_seqlens[sequence + 1] - begin, head, x / plan.slices % plan.tiles * kTile,
                     x % plan.slices};
  if (is_usable(p, sequence)) return work;
  if (work.row == 0 && head == 0 && threadIdx.x == 0) raise_fault(plan.faults, kFaultSequence, sequence);
  return {};
}

template <class T>
DEVICE Rows<T> rows_of(const void* tensor, int64_t stride, const Attention& p, const Work& work, int row) {
  const T* head = static_cast<const T*>(tensor) + work.head * p.head_size;
  return {head + (work.begin + row) * stride, stride, min(kTile, work.length - row)};
}

DEVICE uint64_t seed_of(const Attention& p) { return p.t != 0 ? static_cast<uint64_t>(*p.seed) : 0; }

// ---- what is kept ------------------------------------------------------------------------------------

// One word of bits for a thread's products: bit kHalfWarp * (j % 2) + lane of the word that lane 2 * i + j /
// 2 holds says whether row i, column j is kept, where rows are queries and columns are keys. A lane draws for
// one query and twice 16 keys.
DEVICE uint32_t kept_keys(const Attention& p, const Work& work, uint64_t seed, int key) {
  const int lane = column();
  const uint32_t token = work.begin + work.row + first_row() + 2 * (lane / 2),
                 group = key / 16 + lane % 2 * 2;
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n)
    kept |= kept_bits<kAttentionLaneBits>(seed, group + n, token, work.head, 1, p.t) << 16 * n;
  return kept;
}

DEVICE bool is_kept(uint32_t drawn, int i, int j) {
  const uint32_t word = __shfl_sync(kAllLanes, drawn, 2 * i + j / 2, kHalfWarp);
  return word >> (j % 2 * 16 + column()) & 1;
}

// The same where rows are keys and columns are queries: a warp's rows are the 16 keys of one call. Bit
// 16 * (j % 2) + row of word j / 2 belongs to column j.
struct KeptQueries {
  uint32_t words[2];

  DEVICE bool has(int i, int j) const {
    return words[j / 2] >> (j % 2 * 16 + 2 * i + lane_of_warp() / kHalfWarp) & 1;
  }
};

DEVICE KeptQueries kept_queries(const Attention& p, const Work& work, uint64_t seed, int query) {
  const int half = lane_of_warp() / kHalfWarp;
  const uint32_t group = work.row / 16 + warp_of_block();
  uint32_t drawn = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t token = work.begin + query + column() + (2 * half + n) * kHalfWarp;
    drawn |= kept_bits<kAttentionLaneBits>(seed, group, token, work.head, 1, p.t) << 16 * n;
  }
  const uint32_t others = __shfl_xor_sync(kAllLanes, drawn, kHalfWarp);
  return {{half == 0 ? drawn : others, half == 0 ? others : drawn}};
}

// The rows of dk and dv that this thread has, of a block of `count` keys.
template <class T>
DEVICE void store_dk_dv(void* dqkv, const Results& dk, const Results& dv, float dk_factor, int count,
                        const Attention& p, const Plan& plan, const Work& work) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row() + 2 * i;
    if (row >= count) continue;
    const int64_t place = ((work.begin + work.row + row) * 3 + 1) * p.heads + work.head;
    T* its_dk = static_cast<T*>(dqkv) + place * p.head_size;
    store_row(its_dk, dk[i], dk_factor, work.slice, p.head_size, plan.results);
    store_row(its_dk + p.heads * p.head_size, dv[i], 1.f, work.slice, p.head_size, plan.results);
  }
}

// ---- on the host -------------------------------------------------------------------------------------

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// `aligned`: whether inputs beside q, k and v are.
template <class T>
Plan plan_of(const Attention& p, bool aligned, const void* result) {
  constexpr int64_t kVector = kAccessBytes / static_cast<int64_t>(sizeof(T));
  const int64_t limit = p.tokens;  // of what is added to a row
  const bool strides = (p.q_stride | p.k_stride | p.v_stride | p.head_size) % kVector == 0;
  return {ceil_div(p.max_seqlen < p.tokens ? p.max_seqlen : p.tokens, kTile),
          ceil_div(p.head_size, kTile),
          p.scale * kLog2e,
          p.t == 0 ? 1.f : dropout_scale(p.t, kAttentionLaneBits),
          static_cast<int>(p.window_left < limit ? p.window_left : limit),
          static_cast<int>(p.window_right < limit ? p.window_right : limit),
          aligned && strides && are_aligned(kAccessBytes, p.q, p.k, p.v),
          p.head_size % 4 == 0 && are_aligned(kAccessBytes, result),
          fault_words()};
}

dim3 grid_of(const Attention& p, const Plan& plan) {
  return dim3(static_cast<unsigned>(p.sequences * plan.tiles * plan.slices), static_cast<unsigned>(p.heads));
}

bool is_empty(const Attention& p) { return p.tokens == 0 || p.sequences == 0 || p.max_seqlen == 0; }

// dq, then dk and dv.
template <class P, class Kernel>
int launch_backward(const char* op, Kernel* dq, Kernel* dk_dv, int bytes, const P& p, const Plan& plan) {
  void* stream = reinterpret_cast<void*>(p.launch);
  const int error = launch(op, dq, grid_of(p, plan), kThreads, bytes, stream, p, plan);
  return error ? error : launch(op, dk_dv, grid_of(p, plan), kThreads, bytes, stream, p, plan);
}

}  // namespace
}  // namespace fastbert::cuda
