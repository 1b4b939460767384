// Attention forward: online softmax over tiles of 64 keys, of which two are under way or in use. A block
// takes some queries of a head; a warp keeps its queries, scores and outputs in registers, and works alone
// but for the copies.
#pragma once
#include "attention_dropout.h"

namespace fastbert::attention {

// kM * 16 queries of a warp, from `row` of their sequence on, and what is known of them so far. Each lane has
// of every 16 queries rows g and g + 8 (g = lane / 4), so 2 kM rows. kHold: fragments of q stay in registers,
// else they are read for each tile of keys.
template <class T, int kD, int kM, bool kDrop, bool kHold>
struct QueryTile {
  static constexpr int kLaneRows = 2 * kM, kColumnTiles = kD / 8, kHeld = kHold ? kSteps<kD> : 1;

  const Arguments<T>& a;
  const int row, start, length, lane;
  const Philox philox;
  const uint32_t key_columns, key_rows;
  const SharedAddress q_tile;  // of which the first 16 * `skipped` rows are other warps'
  const int skipped;
  uint32_t q[kM][kHeld][4];
  float out[kM][kColumnTiles][4];  // sum of weights times v, and of weights, which are
  float sum[kLaneRows];            // 2^(exponent (score - top))
  float top[kLaneRows];            // at most 2^8 times less than the greatest weight: see follow_maximum

  DEVICE QueryTile(const Arguments<T>& a, const Work& work, SharedAddress q_tile, int skipped, int lane)
      : a(a),
        row(work.row + 16 * skipped),
        start(work.start),
        length(work.length),
        lane(lane),
        philox(kDrop ? *a.seed : 0, work.head),
        key_columns(key_columns_at<kD>(lane)),
        key_rows(key_rows_at<kD>(lane)),
        q_tile(q_tile),
        skipped(skipped) {
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      sum[r] = 0, top[r] = -infinity();
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0;
  }

  DEVICE int lane_row(int r) const { return row + 8 * r + lane / 4; }

  DEVICE void load_queries(int step, int place) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ldmatrix_x4(q[m][place], q_tile + (rows_down<kD>(rows_at<kD>(lane), skipped + m) ^ step << 5));
#pragma unroll
      for (int n = 0; n < 4; ++n) q[m][place][n] ^= a.sign;
    }
  }

  // Once the tile is there.
  DEVICE void hold_queries() {
    if constexpr (kHold)
#pragma unroll
      for (int step = 0; step < kSteps<kD>; ++step) load_queries(step, step);
  }

  // 64 keys from `key` on, in tiles k and v.
  DEVICE void attend(int key, SharedAddress k, SharedAddress v) {
    const Block block{row, kM * 16, key, kKeys};
    if (sees_nothing(a, block)) return;
    float s[kM][8][4];
    uint32_t words[kLaneRows][4];
    scores(key, k, s, words);
    if (!sees_all(a, block, length)) mask(key, s);
    follow_maximum(s);
    add_values(v, s, words);
  }

  // s = q k^T, and the random numbers of its keys
  DEVICE void scores(int key, SharedAddress k, float (&s)[kM][8][4], uint32_t (&words)[kLaneRows][4]) {
    if constexpr (kDrop) philox.start(start + lane_row(0), philox.keys(key / 16 + lane % 4), words);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = 0;
#pragma unroll
    for (int step = 0; step < kSteps<kD>; ++step) {
      const int held = kHold ? step : 0;
      if constexpr (!kHold) load_queries(step, 0);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, k + (pairs_down<kD>(key_columns, j) ^ step << 5));
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_pair<T>(s[m][j], s[m][j + 1], q[m][held], b);
      }
      if constexpr (kDrop) philox.template advance<kSteps<kD>>(step, words);
    }
  }

  DEVICE void mask(int key, float (&s)[kM][8][4]) {
    uint32_t first_row = lane_row(0), first_key = key + 16 * (lane % 4);
    keep_in_place(first_row), keep_in_place(first_key);  // worked out where they are needed, which is seldom
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
          float& score = s[r / 2][j][r % 2 * 2 + e];
          score = sees(a, first_row + 8 * r, first_key + 2 * j + e, length) ? score : -infinity();
        }
  }

  // The running maximum follows only where weights would pass 2^8, which is rare after the first tile: then
  // nothing has to be scaled.
  DEVICE void follow_maximum(const float (&s)[kM][8][4]) {
    float peak[kLaneRows];
    bool grows = false;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      peak[r] = -infinity();
#pragma unroll
      for (int j = 0; j < 8; ++j)
        peak[r] = fmaxf(peak[r], fmaxf(s[r / 2][j][r % 2 * 2], s[r / 2][j][r % 2 * 2 + 1]));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAllLanes, peak[r], 2));
      grows |= peak[r] > top[r] && (peak[r] - top[r]) * a.exponent > 8;
    }
    if (!__any_sync(kAllLanes, grows)) return;
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const bool higher = peak[r] > top[r];
      const float shrink = higher ? exp2_approximate((top[r] - peak[r]) * a.exponent) : 1;
      if (higher) top[r] = peak[r];
      sum[r] *= shrink;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
        out[r / 2][n][r % 2 * 2] *= shrink, out[r / 2][n][r % 2 * 2 + 1] *= shrink;
    }
  }

  // out += dropout(2^(exponent (s - top))) v
  DEVICE void add_values(SharedAddress v, const float (&s)[kM][8][4], const uint32_t (&words)[kLaneRows][4]) {
    float base[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) base[r] = top[r] == -infinity() ? 0 : top[r] * a.exponent;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t weights[kM][4];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float* pair = &s[r / 2][j + n][r % 2 * 2];
          const float p0 = exp2_approximate(fmaf(pair[0], a.exponent, -base[r]));
          const float p1 = exp2_approximate(fmaf(pair[1], a.exponent, -base[r]));
          sum[r] += p0 + p1;
          uint32_t& weight = weights[r / 2][2 * n + r % 2];
          weight = pack_pair<T>(p0, p1);
          if constexpr (kDrop) weight &= pair_mask(words[r][(j + n) / 2], (j + n) % 2 * 2, a.threshold);
        }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, v + (pairs_down<kD>(key_rows, j) ^ n << 4));
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_pair<T>(out[m][n], out[m][n + 1], weights[m], b);
      }
    }
  }

  DEVICE void store(const Forward<T>& a, int head) {
    const int quad_lane = again(threadIdx.x) % 4, stride = a.heads * a.head_size;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int first = again(row) + 16 * m;
      float normalize[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = 2 * m + h, row_of_lane = first + 8 * h + lane / 4;
        float total = sum[r];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        normalize[h] = total == 0 ? 0 : __fdividef(kDrop ? a.keep : 1, total);  // 0: it sees no key
        const float lse = total == 0 ? -infinity() : fmaf(top[r], a.exponent, log2f(total)) * kLn2;
        if (quad_lane == 0 && row_of_lane < length)
          a.lse[static_cast<int64_t>(start + row_of_lane) * a.heads + head] = lse;
      }
      store_rows<T, kColumnTiles>(a.out + static_cast<int64_t>(start + first) * stride + head * a.head_size,
                                  stride, length - first, a.head_size, out[m], normalize);
    }
  }
};

template <int kD, int kRows>
constexpr int kForwardBytes = (kRows + 4 * kKeys) * kRowBytes<kD>;

template <class T, int kD, int kWarps, int kM, bool kDrop, int kBlocks>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks) attention_forward_kernel(const Forward<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kRows = kWarps * kM * 16, kThreads = kWarps * kWarp, kTileBytes = kKeys * kRowBytes<kD>;
  DYNAMIC_SHARED(unsigned char, shared);
  const SharedAddress q_tile = shared_address(shared), k_tiles = q_tile + kRows * kRowBytes<kD>,
                      v_tiles = k_tiles + 2 * kTileBytes;
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
  load_tile<kD, kRows, kThreads>(q_tile, a.q, a.q_stride, work.start + work.row, end, work.head, a.head_size);
  load_keys(first);

  constexpr bool kHold = kM > 1 || kBlocks <= 2;
  QueryTile<T, kD, kM, kDrop, kHold> tile(a, work, q_tile, warp * kM, lane);
  const bool active = tile.row < work.length;
  for (int key = first; key < last; key += kKeys) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, and all are done with the one before
    load_keys(key + kKeys);
    if (!active) continue;
    if (key == first) tile.hold_queries();
    const int stage = key / kKeys % 2 * kTileBytes;
    tile.attend(key, k_tiles + stage, v_tiles + stage);
  }
  wait_for_copies<0>();
  if (active) tile.store(a, head_again(a, kRows));
#endif
}

}  // namespace fastbert::attention
