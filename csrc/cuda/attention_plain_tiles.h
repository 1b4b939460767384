// What attention_plain.cu computes with: tiles of 64 rows by 64 columns in shared memory, float32 whatever
// the dtype of what they are copied from, and products of them in registers by plain multiply-adds.
//
// A block has 128 threads. Of 64 x 64 products or results a warp has 16 whole rows, and a thread 8 rows by 4
// columns: rows first_row() + 2 * i, of products the columns column() + 16 * j, of results 4 * column() + j.
// So a row lies in half a warp. Over 4 columns of the head, or 4 rows of a product, a thread reads 12 vectors
// of 16 bytes from shared memory for 128 multiply-adds; no read meets a bank conflict.
#pragma once
#include "launch.h"
//
#include "reduce.h"
#include "vectors.h"

namespace fastbert::cuda {

constexpr int kTile = 64;  // rows, and columns of the head, that a block works on at a time
constexpr int kThreads = 128;
constexpr int kRows = 8, kColumns = 4;  // of a tile, that are a thread's
constexpr int kHalfWarp = 16;           // the lanes that share rows
constexpr int kWarpRows = 16;
constexpr int kTileStride = kTile + 4;  // floats: eight rows' 16 bytes of one column lie in different banks
constexpr int kStrip = 32;              // columns of products that are in shared memory at a time
constexpr int kStripStride = kStrip + 16;  // floats: two neighbouring rows lie in different banks
constexpr int kTileFloats = kTile * kTileStride, kStripFloats = kTile * kStripStride;
static_assert(kTile == kHalfWarp * kColumns && kWarpRows == 2 * kRows, "a half warp holds whole rows");

using Products = float[kRows][kColumns];  // a thread's
using Results = float[kRows][4];

DEVICE int column() { return lane_of_warp() % kHalfWarp; }
DEVICE int first_row() { return warp_of_block() * kWarpRows + lane_of_warp() / kHalfWarp; }

DEVICE float half_warp_sum(float value) {
#pragma unroll
  for (int offset = kHalfWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// ---- tiles -------------------------------------------------------------------------------------------

// `count` rows of one head of a tensor, at most kTile.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;  // elements
  int count;
};

// Whether a tile of so many rows has any for this warp; if not, it computes nothing.
DEVICE bool has_rows(int count) {
  return __shfl_sync(kAllLanes, warp_of_block(), 0) * kWarpRows <
         count;  // known to be the whole warp's answer
}

template <int kVector, class T>
DEVICE void copy_vectors(float* tile, const Rows<T>& rows, int first_column, int columns) {
  constexpr int kPerRow = kTile / kVector;
  const int column = static_cast<int>(threadIdx.x) % kPerRow * kVector;
#pragma unroll 2
  for (int row = static_cast<int>(threadIdx.x) / kPerRow; row < kTile; row += kThreads / kPerRow) {
    float values[kVector] = {};
    if (row < rows.count && column < columns)
      load<kVector>(rows.first + row * rows.stride + first_column + column, values);
    store<kVector>(tile + row * kTileStride + column, values);
  }
}

// Up to 64 columns of rows to shared memory; zeros behind the last row and column.
template <class T>
DEVICE void copy_tile(float* tile, const Rows<T>& rows, int first_column, int head_size, bool vectors) {
  const int columns = min(kTile, head_size - first_column);
  if (vectors)
    copy_vectors<kAccessBytes / static_cast<int>(sizeof(T))>(tile, rows, first_column, columns);
  else
    copy_vectors<1>(tile, rows, first_column, columns);
}

// ---- products ----------------------------------------------------------------------------------------

DEVICE float4 read_vector(const float* address) { return *reinterpret_cast<const float4*>(address); }

// products += a b^T over `depth` columns of two tiles.
DEVICE void multiply_tiles(Products& products, const float* a, const float* b, int depth) {
  const float *a_row = a + first_row() * kTileStride, *b_row = b + column() * kTileStride;
#pragma unroll 1
  for (int d = 0; d < depth; d += 4) {
    float4 others[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) others[j] = read_vector(b_row + j * kHalfWarp * kTileStride + d);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float4 own = read_vector(a_row + 2 * i * kTileStride + d);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float sum = products[i][j];
        sum += own.x * others[j].x, sum += own.y * others[j].y;
        sum += own.z * others[j].z, sum += own.w * others[j].w;
        products[i][j] = sum;
      }
    }
  }
}

// products = a b^T over the whole head. `a_there`: the tile of a holds it already, and it has no more
// columns.
template <class T>
DEVICE void multiply_rows(Products& products, float* a_tile, const Rows<T>& a, bool a_there, float* b_tile,
                          const Rows<T>& b, int head_size, bool vectors) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) products[i][j] = 0;
#pragma unroll 1
  for (int d = 0; d < head_size; d += kTile) {
    __syncthreads();  // nobody reads the tiles any more
    if (!a_there) copy_tile(a_tile, a, d, head_size, vectors);
    copy_tile(b_tile, b, d, head_size, vectors);
    __syncthreads();
    if (has_rows(a.count)) multiply_tiles(products, a_tile, b_tile, min(kTile, head_size - d));
  }
}

// result += products b, of whose tile the first `depth` rows are not zero. A warp's products pass through its
// own rows of the strip, kStrip columns at a time, so that no other warp is waited for.
DEVICE void add_products(Results& result, const Products& products, float* strip, const float* b, int depth) {
  float* row = strip + first_row() * kStripStride;
  const float* b_column = b + 4 * column();
#pragma unroll
  for (int half = 0; half < kTile / kStrip; ++half) {
    if (half * kStrip >= depth) break;
    __syncwarp();  // nobody reads the strip any more
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kStrip / kHalfWarp; ++j)
        row[2 * i * kStripStride + j * kHalfWarp + column()] = products[i][half * kStrip / kHalfWarp + j];
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < kStrip; k += 4) {
      float4 others[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) others[n] = read_vector(b_column + (half * kStrip + k + n) * kTileStride);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 own = read_vector(row + 2 * i * kStripStride + k);
        const float factors[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          result[i][0] += factors[n] * others[n].x, result[i][1] += factors[n] * others[n].y;
          result[i][2] += factors[n] * others[n].z, result[i][3] += factors[n] * others[n].w;
        }
      }
    }
  }
}

// Four results times `factor` to a row of a head, of which the block writes 64 columns; `vectors`: they are
// aligned, and the head is a multiple of four wide.
template <class T>
DEVICE void store_row(T* row, const float (&values)[4], float factor, int slice, int head_size,
                      bool vectors) {
  const int first = slice * kTile + 4 * column();
  const float scaled[4] = {values[0] * factor, values[1] * factor, values[2] * factor, values[3] * factor};
  if (vectors) {
    if (first < head_size) store<4>(row + first, scaled);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (first + j < head_size) row[first + j] = from_float<T>(scaled[j]);
}

}  // namespace fastbert::cuda
