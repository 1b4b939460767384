// Attention backward. Up to 128 tokens a block takes a head of a sequence whole: everything is read once and
// stays in shared memory. Longer sequences take two kernels, of the same two halves (attention_gradients.h):
// tiles of queries for dq, then tiles of keys for dk and dv.
#pragma once
#include "attention_gradients.h"

namespace fastbert::attention {

// ---- whole sequences ---------------------------------------------------------------------------------

constexpr int kWholeRows = 128;
template <int kD>
constexpr int kWholeWarps = kD == 128 ? 8 : 4;
template <int kD>
constexpr int kWholeBytes = kWholeRows * (4 * kRowBytes<kD> + sizeof(float2));

template <class T, int kD, bool kDrop, int kBlocks>
__global__ void __launch_bounds__(kWholeWarps<kD>* kWarp, kBlocks)
    attention_backward_whole_kernel(const Backward<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kWarps = kWholeWarps<kD>, kThreads = kWarps * kWarp, kTileBytes = kWholeRows * kRowBytes<kD>,
                kRowsOfWarp = kWholeRows / kWarps;
  DYNAMIC_SHARED(unsigned char, shared);
  const SharedAddress q = shared_address(shared), k = q + kTileBytes, v = k + kTileBytes,
                      dout = v + kTileBytes;
  auto* rows = reinterpret_cast<float2*>(shared + 4 * kTileBytes);
  const int warp = uniform_warp_index(), lane = lane_of_warp();
  const Work work(a, kWholeRows, lane);
  if (work.length == 0) return;

  const auto load = [&](SharedAddress tile, const T* source, int stride) {
    load_tile<kD, kWholeRows, kThreads>(tile, source, stride, work.start, work.start + work.length, work.head,
                                        a.head_size);
  };
  load(dout, a.dout, a.heads * a.head_size);
  load(q, a.q, a.q_stride);
  load(k, a.k, a.k_stride);
  load(v, a.v, a.v_stride);
  commit_copies();
  const RowStatistics<T, kD, kRowsOfWarp> statistics(a, work, warp * kRowsOfWarp, lane);
  wait_for_copies<0>();
  __syncthreads();
  statistics.finish(a, shared + 3 * kTileBytes, warp * kRowsOfWarp, rows, lane);
  __syncthreads();

  // From here on warps work alone: 16 keys at a time, then 16 queries at a time.
#pragma unroll 1
  for (int part = warp;; part += kWarps) {
    const int parts = (again(work.length) + 15) / 16;
    if (part >= 2 * parts) break;
    if (part < parts) {
      KeyGradient<T, kD, kDrop> keys(a, work, k, v, part, part * 16, lane);
#pragma unroll 1
      for (int query = 0; query < work.length; query += 32)
        keys.add_queries(query, q, dout, rows, query / 16);
      keys.store();
    } else {
      const int first = part - parts;
      QueryGradient<T, kD, 1, kDrop> queries(a, work, q, dout, rows, first, first * 16, lane);
#pragma unroll 1
      for (int key = 0; key < work.length; key += kKeys)
        queries.add_keys(key, k + key * kRowBytes<kD>, v + key * kRowBytes<kD>);
      queries.store();
    }
  }
#endif
}

// ---- in tiles: dq ------------------------------------------------------------------------------------

template <int kD, int kRows>
constexpr int kQueriesBytes =
    (2 * kRows + 4 * kKeys) * kRowBytes<kD> + kRows * static_cast<int>(sizeof(float2));

template <class T, int kD, int kWarps, int kM, bool kDrop, int kBlocks>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks)
    attention_backward_queries_kernel(const Backward<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kRows = kWarps * kM * 16, kThreads = kWarps * kWarp, kRowsBytes = kRows * kRowBytes<kD>,
                kTileBytes = kKeys * kRowBytes<kD>;
  DYNAMIC_SHARED(unsigned char, shared);
  const SharedAddress q = shared_address(shared), dout = q + kRowsBytes, k_tiles = dout + kRowsBytes,
                      v_tiles = k_tiles + 2 * kTileBytes;
  auto* rows = reinterpret_cast<float2*>(shared + 2 * kRowsBytes + 4 * kTileBytes);
  const int warp = uniform_warp_index(), lane = lane_of_warp();
  const Work work(a, kRows, lane);
  if (work.length == 0) return;

  const int first = max(0, work.row - a.left) / kKeys * kKeys;
  const int last = min(work.length, work.row + kRows + a.right);
  const int end = work.start + work.length;
  const auto load_keys = [&](int key) {
    const int stage = key / kKeys % 2 * kTileBytes;
    if (key < last) {
      load_tile<kD, kKeys, kThreads>(k_tiles + stage, a.k, a.k_stride, work.start + key, end, work.head,
                                     a.head_size);
      load_tile<kD, kKeys, kThreads>(v_tiles + stage, a.v, a.v_stride, work.start + key, end, work.head,
                                     a.head_size);
    }
    commit_copies();
  };
  load_tile<kD, kRows, kThreads>(dout, a.dout, a.heads * a.head_size, work.start + work.row, end, work.head,
                                 a.head_size);
  load_tile<kD, kRows, kThreads>(q, a.q, a.q_stride, work.start + work.row, end, work.head, a.head_size);
  commit_copies();
  load_keys(first);
  const int skipped = warp * kM, row = work.row + skipped * 16;
  const RowStatistics<T, kD, kM * 16> statistics(a, work, row, lane);
  wait_for_copies<1>();
  __syncthreads();
  statistics.finish(a, shared + kRowsBytes, skipped * 16, rows, lane);
  __syncwarp();
  for (int r = lane; r < kM * 16; r += kWarp)
    if (row + r < work.length)
      a.rows[static_cast<int64_t>(work.head) * a.tokens + work.start + row + r] = rows[skipped * 16 + r];

  QueryGradient<T, kD, kM, kDrop> queries(a, work, q, dout, rows, skipped, row, lane);
  const bool active = row < work.length;
  for (int key = first; key < last; key += kKeys) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and all are done with the one before
    load_keys(key + kKeys);
    const int stage = key / kKeys % 2 * kTileBytes;
    if (active) queries.add_keys(key, k_tiles + stage, v_tiles + stage);
  }
  wait_for_copies<0>();
  if (active) queries.store();
#endif
}

// ---- in tiles: dk and dv -----------------------------------------------------------------------------

template <int kD, int kRows>
constexpr int kKeysBytes =
    (2 * kRows + 4 * kKeys) * kRowBytes<kD> + 2 * kKeys * static_cast<int>(sizeof(float2));

template <class T, int kD, int kWarps, bool kDrop, int kBlocks>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks)
    attention_backward_keys_kernel(const Backward<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kRows = kWarps * 16, kThreads = kWarps * kWarp, kRowsBytes = kRows * kRowBytes<kD>,
                kTileBytes = kKeys * kRowBytes<kD>;
  DYNAMIC_SHARED(unsigned char, shared);
  const SharedAddress k = shared_address(shared), v = k + kRowsBytes, q_tiles = v + kRowsBytes,
                      dout_tiles = q_tiles + 2 * kTileBytes, rows_tiles = dout_tiles + 2 * kTileBytes;
  const auto* rows = reinterpret_cast<const float2*>(shared + 2 * kRowsBytes + 4 * kTileBytes);
  const int warp = uniform_warp_index(), lane = lane_of_warp();
  const Work work(a, kRows, lane);
  if (work.length == 0) return;

  const int first = max(0, work.row - a.right) / kKeys * kKeys;
  const int last = min(work.length, work.row + kRows + a.left);
  const int end = work.start + work.length;
  const auto load_queries = [&](int query) {
    const int stage = query / kKeys % 2, row = work.start + query;
    if (query < last) {
      load_tile<kD, kKeys, kThreads>(q_tiles + stage * kTileBytes, a.q, a.q_stride, row, end, work.head,
                                     a.head_size);
      load_tile<kD, kKeys, kThreads>(dout_tiles + stage * kTileBytes, a.dout, a.heads * a.head_size, row, end,
                                     work.head, a.head_size);
      const int r = threadIdx.x;
      if (r < kKeys)
        copy_async<8>(rows_tiles + (stage * kKeys + r) * sizeof(float2),
                      a.rows + static_cast<int64_t>(work.head) * a.tokens + row + r, row + r < end);
    }
    commit_copies();
  };
  load_tile<kD, kRows, kThreads>(k, a.k, a.k_stride, work.start + work.row, end, work.head, a.head_size);
  load_tile<kD, kRows, kThreads>(v, a.v, a.v_stride, work.start + work.row, end, work.head, a.head_size);
  commit_copies();
  load_queries(first);
  wait_for_copies<1>();
  __syncthreads();

  KeyGradient<T, kD, kDrop> keys(a, work, k, v, warp, work.row + warp * 16, lane);
  const bool active = keys.key < work.length;
  for (int query = first; query < last; query += kKeys) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and all are done with the one before
    load_queries(query + kKeys);
    const int stage = query / kKeys % 2;
    for (int half = 0; half < 2; ++half)
      if (active && query + 32 * half < last)
        keys.add_queries(query + 32 * half, q_tiles + stage * kTileBytes, dout_tiles + stage * kTileBytes,
                         rows + stage * kKeys, 2 * half);
  }
  wait_for_copies<0>();
  if (active) keys.store();
#endif
}

}  // namespace fastbert::attention
