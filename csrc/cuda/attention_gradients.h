// The two halves of attention's backward as a warp works on them, alone and without barriers: some queries
// walk through the keys for dq, and some keys through the queries for dk and dv. Scores and mask are made in
// both, which costs two more products than to make them once, and saves the exchange of P and dS between
// warps and all sums of dq.
//
//   P_ij = exp(s_ij - lse_i)   dS_ij = P_ij (m_ij (dout_i . v_j) - delta_i)   delta_i = (1 - p) dout_i .
//   out_i dq_i = f scale sum_j dS_ij k_j    dk_j = f scale sum_i dS_ij q_i    dv_j = f sum_i m_ij P_ij dout_i
//
// with m_ij 0 or 1 and f = 1 / (1 - p).
#pragma once
#include "attention_dropout.h"

namespace fastbert::attention {

// ---- of each query: lse for base 2, and delta --------------------------------------------------------

DEVICE float lse_of_base_2(float lse) {
  return lse == -infinity() ? infinity() : lse * kLog2e;
}  // then P is 0

// A warp's part of kRows queries, between the copy of dout to a tile and its end: out is on its way
// meanwhile.
template <class T, int kD, int kRows>
class RowStatistics {
  static constexpr int kChunks = kD / 8, kAtOnce = kWarp / kChunks, kLoads = kRows / kAtOnce;
  static_assert(kRows <= kWarp, "a lane reads the lse of a row");
  uint4 out_[kLoads];
  float lse_;

 public:
  // Rows from `row` of the sequence on.
  DEVICE RowStatistics(const Backward<T>& a, const Work& work, int row, int lane) {
    const int stride = a.heads * a.head_size, column = work.head * a.head_size + lane % kChunks * 8;
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int r = n * kAtOnce + lane / kChunks;
      out_[n] = make_uint4(0, 0, 0, 0);
      if (row + r < work.length && lane % kChunks * 8 < a.head_size)
        out_[n] = load_packed<8>(a.out + static_cast<int64_t>(work.start + row + r) * stride + column);
    }
    lse_ = 0;
    if (lane < kRows && row + lane < work.length)
      lse_ = lse_of_base_2(a.lse[static_cast<int64_t>(work.start + row + lane) * a.heads + work.head]);
  }

  // `dout` is the tile's first row, and rows[first] the first of these.
  DEVICE void finish(const Backward<T>& a, const unsigned char* dout, int first, float2* rows,
                     int lane) const {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int r = first + n * kAtOnce + lane / kChunks;
      const auto* place = reinterpret_cast<const T*>(dout + offset<kD>(r, lane % kChunks));
      float x[8], y[8], delta = 0;
      unpack<T, 8>(out_[n], x);
      unpack<T, 8>(load_packed<8, Cache::plain>(place), y);
#pragma unroll
      for (int i = 0; i < 8; ++i) delta = fmaf(x[i], y[i], delta);
#pragma unroll
      for (int distance = 1; distance < kChunks; distance *= 2)
        delta += __shfl_xor_sync(kAllLanes, delta, distance);
      if (lane % kChunks == 0) rows[r].y = delta * a.unkeep;
    }
    if (lane < kRows) rows[first + lane].x = lse_;
  }
};

// ---- dq ----------------------------------------------------------------------------------------------

// kM * 16 queries of a warp from `row` on, which are rows of a tile from 16 * `skipped` on.
template <class T, int kD, int kM, bool kDrop>
struct QueryGradient {
  static constexpr int kLaneRows = 2 * kM;

  const Backward<T>& a;
  const Work& work;
  const int row, lane;
  const Philox philox;
  const uint32_t key_columns, key_rows;
  const float2* const rows;  // of the lane's first row; read again for each 16 keys, as registers are short
  uint32_t q[kM][kSteps<kD>][4], dout[kM][kSteps<kD>][4];
  float dq[kM][kD / 8][4];

  DEVICE QueryGradient(const Backward<T>& a, const Work& work, SharedAddress q_tile, SharedAddress dout_tile,
                       const float2* rows, int skipped, int row, int lane)
      : a(a),
        work(work),
        row(row),
        lane(lane),
        philox(kDrop ? *a.seed : 0, work.head),
        key_columns(key_columns_at<kD>(lane)),
        key_rows(key_rows_at<kD>(lane)),
        rows(rows + skipped * 16 + lane / 4) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps<kD>; ++step) {
        const uint32_t at = rows_down<kD>(rows_at<kD>(lane), skipped + m) ^ step << 5;
        ldmatrix_x4(q[m][step], q_tile + at);
        ldmatrix_x4(dout[m][step], dout_tile + at);
#pragma unroll
        for (int n = 0; n < 4; ++n) q[m][step][n] ^= a.sign;
      }
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) dq[m][n][0] = dq[m][n][1] = dq[m][n][2] = dq[m][n][3] = 0;
    }
  }

  DEVICE int lane_row(int r) const { return row + 8 * r + lane / 4; }

  // 64 keys from `key` on, in tiles k and v.
  DEVICE void add_keys(int key, SharedAddress k, SharedAddress v) {
    const Block block{row, kM * 16, key, kKeys};
    if (sees_nothing(a, block)) return;
    const bool masked = !sees_all(a, block, work.length);
    uint32_t words[kLaneRows][4];
    if constexpr (kDrop) {
      philox.start(work.start + lane_row(0), philox.keys(key / 16 + lane % 4), words);
#pragma unroll
      for (int step = 0; step < 4; ++step) philox.template advance<4>(step, words);
    }
#pragma unroll 1
    for (int j = 0; j < 8; j += 2) {
      float s[kM][2][4] = {}, dp[kM][2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps<kD>; ++step) {
        const uint32_t at = pairs_down<kD>(key_columns, j) ^ step << 5;
        uint32_t b[4];
        ldmatrix_x4(b, k + at);
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_pair<T>(s[m][0], s[m][1], q[m][step], b);
        ldmatrix_x4(b, v + at);
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_pair<T>(dp[m][0], dp[m][1], dout[m][step], b);
      }
      if (masked) mask(key + 16 * (lane % 4) + 2 * j, s);

      uint32_t ds[kM][4];
#pragma unroll
      for (int r = 0; r < kLaneRows; ++r) {
        const float lse = rows[8 * r].x, delta = rows[8 * r].y;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float p = exp2_approximate(fmaf(s[r / 2][n][r % 2 * 2 + e], a.exponent, -lse));
            const float dweight = dp[r / 2][n][r % 2 * 2 + e];
            if constexpr (kDrop)
              pair[e] = p * fmaf(factor(words[r][0], n * 2 + e, a.bias), dweight, -delta);
            else
              pair[e] = p * (dweight - delta);
          }
          ds[r / 2][2 * n + r % 2] = pack_pair<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kD / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, k + (pairs_down<kD>(key_rows, j) ^ n << 4));
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_pair<T>(dq[m][n], dq[m][n + 1], ds[m], b);
      }
      if constexpr (kDrop)
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r)
          words[r][0] = words[r][1], words[r][1] = words[r][2], words[r][2] = words[r][3];
    }
  }

  // Accumulators of keys `key`, key + 1 and key + 2, key + 3.
  DEVICE void mask(int key, float (&s)[kM][2][4]) const {
    uint32_t first_row = lane_row(0);
    keep_in_place(first_row);  // worked out where it is needed, which is seldom
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int r = 0; r < kLaneRows; ++r) {
          float& score = s[r / 2][n][r % 2 * 2 + e];
          score = sees(a, first_row + 8 * r, key + 2 * n + e, work.length) ? score : -infinity();
        }
  }

  DEVICE void store() const {
    const float factors[2] = {a.keep * a.scale, a.keep * a.scale};
    const int stride = 3 * a.heads * a.head_size;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      T* target = a.dqkv + static_cast<int64_t>(work.start + row + 16 * m) * stride + work.head * a.head_size;
      store_rows<T, kD / 8>(target, stride, work.length - row - 16 * m, a.head_size, dq[m], factors);
    }
  }
};

// ---- dk and dv ---------------------------------------------------------------------------------------

// 16 keys of a warp from `key` on, which are rows of a tile from 16 * `skipped` on. Where rows are
// short enough, the fragments of k and v stay in registers.
template <class T, int kD, bool kDrop>
struct KeyGradient {
  static constexpr bool kHold = kD < 128;
  static constexpr int kHeld = kHold ? kSteps<kD> : 1;

  const Backward<T>& a;
  const Work& work;
  const int key, lane;
  const Philox philox;
  const KeyMajor key_major;
  const Philox::Keys group;
  const uint32_t columns, rows_of_b;
  const SharedAddress k_tile, v_tile;
  const int skipped;
  uint32_t k[kHeld][4], v[kHeld][4];
  float dk[kD / 8][4], dv[kD / 8][4];

  DEVICE KeyGradient(const Backward<T>& a, const Work& work, SharedAddress k_tile, SharedAddress v_tile,
                     int skipped, int key, int lane)
      : a(a),
        work(work),
        key(key),
        lane(lane),
        philox(kDrop ? *a.seed : 0, work.head),
        key_major(lane),
        group(philox.keys(key / 16)),
        columns(columns_at<kD>(lane)),
        rows_of_b(rows_at<kD>(lane)),
        k_tile(k_tile),
        v_tile(v_tile),
        skipped(skipped) {
    if constexpr (kHold)
#pragma unroll
      for (int step = 0; step < kSteps<kD>; ++step) load_keys(step, step);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[n][e] = dv[n][e] = 0;
  }

  DEVICE void load_keys(int step, int place) {
    const uint32_t at = rows_down<kD>(rows_of_b, skipped) ^ step << 5;
    ldmatrix_x4(k[place], k_tile + at);
    ldmatrix_x4(v[place], v_tile + at);
#pragma unroll
    for (int n = 0; n < 4; ++n) k[place][n] ^= a.sign;
  }

  // 32 queries from `query` on, which are rows of the tiles and of `rows` from 16 * `above` on.
  DEVICE void add_queries(int query, SharedAddress q_tile, SharedAddress dout_tile, const float2* rows,
                          int above) {
    const Block block{query, 32, key, 16};
    if (sees_nothing(a, block)) return;
    const bool masked = !sees_all(a, block, work.length);  // of keys past the end nothing is stored
    uint32_t words[1][4] = {};
    if constexpr (kDrop) {
      philox.start(work.start + query + KeyMajor::drawn_query(lane), group, words);
#pragma unroll
      for (int step = 0; step < 4; ++step) philox.template advance<4>(step, words);
      key_major.exchange(words[0]);
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps<kD>; ++step) {
        const uint32_t at = rows_down<kD>(columns, above + half) ^ step << 5;
        const int held = kHold ? step : 0;
        if constexpr (!kHold) load_keys(step, 0);
        uint32_t b[4];
        ldmatrix_x4(b, q_tile + at);
        mma_pair<T>(s[0], s[1], k[held], b);
        ldmatrix_x4(b, dout_tile + at);
        mma_pair<T>(dp[0], dp[1], v[held], b);
      }
      if (masked) mask(query + 16 * half, s);

      uint32_t p_words[4], ds_words[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 pair =
            *reinterpret_cast<const float4*>(rows + (above + half) * 16 + n * 8 + lane % 4 * 2);
        const float lse[2] = {pair.x, pair.z}, delta[2] = {pair.y, pair.w};
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // keys g and g + 8
          float p[2], ds[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            p[e] = exp2_approximate(fmaf(s[n][2 * h + e], a.exponent, -lse[e]));
            if constexpr (kDrop) {
              const float kept = factor(words[0][n], 2 * e + h, a.bias);
              ds[e] = p[e] * fmaf(kept, dp[n][2 * h + e], -delta[e]);
              p[e] *= kept;
            } else {
              ds[e] = p[e] * (dp[n][2 * h + e] - delta[e]);
            }
          }
          p_words[2 * n + h] = pack_pair<T>(p[0], p[1]);
          ds_words[2 * n + h] = pack_pair<T>(ds[0], ds[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kD / 8; n += 2) {
        const uint32_t at = rows_down<kD>(rows_of_b, above + half) ^ n << 4;
        uint32_t b[4];
        ldmatrix_x4<true>(b, dout_tile + at);
        mma_pair<T>(dv[n], dv[n + 1], p_words, b);
        ldmatrix_x4<true>(b, q_tile + at);
        mma_pair<T>(dk[n], dk[n + 1], ds_words, b);
      }
      words[0][0] = words[0][2], words[0][1] = words[0][3];
    }
  }

  DEVICE void mask(int query, float (&s)[2][4]) const {
    uint32_t lowest_key = key + lane / 4;
    keep_in_place(lowest_key);  // worked out where it is needed, which is seldom
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query_of_score = query + 8 * n + lane % 4 * 2 + e % 2,
                  key_of_score = lowest_key + e / 2 * 8;
        s[n][e] = sees(a, query_of_score, key_of_score, work.length) ? s[n][e] : -infinity();
      }
  }

  DEVICE void store() const {
    const float of_dk[2] = {a.keep * a.scale, a.keep * a.scale}, of_dv[2] = {a.keep, a.keep};
    const int width = a.heads * a.head_size;
    T* target =
        a.dqkv + static_cast<int64_t>(work.start + key) * (3 * width) + width + work.head * a.head_size;
    store_rows<T, kD / 8>(target, 3 * width, work.length - key, a.head_size, dk, of_dk);
    store_rows<T, kD / 8>(target + width, 3 * width, work.length - key, a.head_size, dv, of_dv);
  }
};

}  // namespace fastbert::attention
