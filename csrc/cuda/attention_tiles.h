// What the attention kernels share: tiles of rows in shared memory, the fragments that mma takes out of them,
// rows on their way back to global memory, and which keys a query sees.
//
// A tile is [rows, kD] of 16-bit elements; kD is 32, 64 or 128, and columns from the head size on are zeros.
// A row is kD / 8 chunks of 16 bytes, and chunk c of row r lies at place c ^ swizzle(r), so that ldmatrix
// meets each bank once, both for eight rows in a line and for eight rows of the order below.
//
// The order of keys. A lane of an accumulator [16, 8] holds columns 2i and 2i + 1 (i = lane % 4), and one
// call of Philox serves 16 neighbouring keys. So 64 keys stand in eight accumulators in an order that gives
// each lane the 16 keys of a call: column 2i + e of accumulator j is key 16i + 2j + e. ldmatrix takes any
// eight rows, so the order costs nothing.
#pragma once
#include "attention_work.h"
#include "ptx.h"
#include "vectors.h"

namespace fastbert::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kKeys = 64;  // of a tile of keys or of queries that a warp walks through

DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ---- tiles -------------------------------------------------------------------------------------------

template <int kD>
constexpr int kRowBytes = kD * 2;
template <int kD>
constexpr int kSteps = kD / 16;  // mma steps through a row

template <int kD>
DEVICE uint32_t offset(uint32_t row, uint32_t chunk) {
  const uint32_t swizzle = ((row >> 1 ^ row >> 4) & 3) | (kD >= 64 ? (row & 1) << 2 : 0);
  return row * kRowBytes<kD> + ((chunk ^ swizzle) << 4);
}

// From the offset of a row below 16: of the row 16 n further, and of the one 2 j further in the order of
// keys, which changes the swizzle. 16 columns further is `^ n << 5`.
template <int kD>
DEVICE uint32_t rows_down(uint32_t at, int n) {
  return n * 16 * kRowBytes<kD> + (at ^ (n & 3) << 4);
}
template <int kD>
DEVICE uint32_t pairs_down(uint32_t at, int j) {
  return j * 2 * kRowBytes<kD> + (at ^ (j & 3) << 4);
}

// The row and chunk of which a lane gives ldmatrix the address:
// of A [16, 16] whose rows are the tile's, and of B [16, 16] whose rows are the tile's (transposed);
template <int kD>
DEVICE uint32_t rows_at(int lane) {
  return offset<kD>(lane & 15, lane >> 4);
}
// of B [16, 16] whose columns are the tile's rows;
template <int kD>
DEVICE uint32_t columns_at(int lane) {
  return offset<kD>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
}
// of B whose columns, or rows (transposed), are the 16 keys of accumulators 0 and 1.
template <int kD>
DEVICE uint32_t key_columns_at(int lane) {
  return offset<kD>((lane & 6) * 8 + (lane & 1) + (lane >> 4) * 2, lane >> 3 & 1);
}
template <int kD>
DEVICE uint32_t key_rows_at(int lane) {
  return offset<kD>((lane & 6) * 8 + (lane & 1) + (lane >> 3 & 1) * 2, lane >> 4);
}

template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  mma_m16n8k16<T>(c, a, b);
}

// c [16, 16] in two accumulators += a b, and a of two B that one ldmatrix brought.
template <class T>
DEVICE void mma_pair(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma<T>(c0, a, b[0], b[1]);
  mma<T>(c1, a, b[2], b[3]);
}

// Begins to copy kRows rows of one head, `stride` apart, from `row` on; those from `end` on become zeros.
template <int kD, int kRows, int kThreads, class T>
DEVICE void load_tile(SharedAddress tile, const T* source, int stride, int row, int end, int head,
                      int head_size) {
  constexpr int kChunks = kD / 8, kStep = kThreads / kChunks;  // rows at a time: a multiple of 8
  static_assert(kStep % 8 == 0 && kRows % kStep == 0, "the rows of a step differ in bits of their own");
  const int place = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const uint32_t at = offset<kD>(place, chunk);
  const bool has_columns = chunk * 8 < head_size;
#pragma unroll
  for (int n = 0; n < kRows; n += kStep) {
    const int r = row + place + n;
    copy_async<16>(tile + (n * kRowBytes<kD> + (at ^ (n >> 4 & 3) << 4)),
                   source + static_cast<int64_t>(r) * stride + (head * head_size + chunk * 8),
                   has_columns && r < end);
  }
}

// ---- rows to global memory ---------------------------------------------------------------------------

// Transposes 4 x 4 words over the four lanes of a quad: word j of lane i becomes word i of lane j.
DEVICE void transpose_quad(uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int a = bit == 1 ? 2 * n : n, b = a + bit;
      const bool upper = lane & bit;
      const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? w[a] : w[b], bit);
      w[a] = upper ? got : w[a];
      w[b] = upper ? w[b] : got;
    }
}

// 16 rows of accumulators, times a factor for each of a lane's two rows, 16 bytes a lane.
template <class T, int kTiles>
DEVICE void store_rows(T* target, int stride, int valid, int head_size, const float (&c)[kTiles][4],
                       const float (&factor)[2]) {
  const int lane = again(threadIdx.x) % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int n = 0; n < kTiles; n += 4) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        w[j] = pack_pair<T>(c[n + j][2 * h] * factor[h], c[n + j][2 * h + 1] * factor[h]);
      transpose_quad(w, lane);
      const int row = lane / 4 + 8 * h, column = (n + lane % 4) * 8;
      if (row < valid && column < head_size)
        __stwb(reinterpret_cast<uint4*>(target + static_cast<int64_t>(row) * stride + column),
               make_uint4(w[0], w[1], w[2], w[3]));  // by this name nvcc cannot split it
    }
}

// ---- what a query sees -------------------------------------------------------------------------------

// A rectangle of scores: queries from `query` on and keys from `key` on.
struct Block {
  int query, queries, key, keys;
};

template <class T>
DEVICE bool sees_nothing(const Arguments<T>& a, const Block& b) {
  return b.key > b.query + b.queries - 1 + a.right || b.key + b.keys - 1 < b.query - a.left;
}
template <class T>
DEVICE bool sees_all(const Arguments<T>& a, const Block& b, int length) {
  return b.key + b.keys <= length && b.key + b.keys - 1 <= b.query + a.right &&
         b.key >= b.query + b.queries - 1 - a.left;
}
template <class T>
DEVICE bool sees(const Arguments<T>& a, int query, int key, int length) {
  return (key < length) & (key - query >= -a.left) & (key - query <= a.right);  // no branches
}

}  // namespace fastbert::attention
