// Three small kernels written as the package's own are: they show the emulator at work and are the pattern to
// copy for a first kernel of one's own. Launchers take addresses, sizes as int64_t and a stream, and return
// launch()'s number.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.h"

namespace fastbert {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- row_sum: y[r] = sum over c of x[r, c] ----
// A block per row: 16-byte loads, shuffles within a warp, shared memory between warps. columns % 4 == 0.

constexpr int kRowThreads = 128;

DEVICE float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

__global__ void __launch_bounds__(kRowThreads)
    row_sum_kernel(const float* __restrict__ x, float* __restrict__ y, int columns) {
  __shared__ float partial[kRowThreads / kWarp];
  const float4* row = reinterpret_cast<const float4*>(x + static_cast<size_t>(blockIdx.x) * columns);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  float sum = 0;
  for (int i = threadIdx.x; i < columns / 4; i += kRowThreads) {
    const float4 v = row[i];
    sum += (v.x + v.y) + (v.z + v.w);
  }
  sum = warp_sum(sum);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < kRowThreads / kWarp ? partial[lane] : 0);
    if (lane == 0) y[blockIdx.x] = sum;
  }
}

// ---- transpose: y[c, r] = x[r, c] ----
// A tile of 32 x 32 through shared memory, so that reads and writes both go along rows; a column of padding
// keeps the 32 elements of a tile's column in 32 banks.

constexpr int kTile = 32, kTileRows = 8;

__global__ void __launch_bounds__(kTile* kTileRows)
    transpose_kernel(const float* __restrict__ x, float* __restrict__ y, int rows, int columns) {
  __shared__ float tile[kTile][kTile + 1];
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;

  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int row = row0 + i, column = column0 + threadIdx.x;
    if (row < rows && column < columns) tile[i][threadIdx.x] = x[static_cast<size_t>(row) * columns + column];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int row = column0 + i, column = row0 + threadIdx.x;  // of y
    if (row < columns && column < rows) y[static_cast<size_t>(row) * rows + column] = tile[threadIdx.x][i];
  }
}

// ---- matmul: c[m, n] = sum over k of a[m, k] b[n, k], in float32; a and b of 16 bits ----
// A block of 2 x 2 warps takes 32 x 32 of c, a warp 16 x 16, in steps of 32 along k; the next step's tiles
// are copied while this one's are multiplied. k % 8 == 0, n % 2 == 0.

constexpr int kBlockMN = 32, kStep = 32, kMatmulThreads = 128;
constexpr int kChunk = 8, kChunksPerRow = kStep / kChunk;  // 16 bytes; a row of a tile is 64 bytes
constexpr int kTileElements = kBlockMN * kStep;
constexpr int kMatmulBytes = 2 * 2 * kTileElements * 2;  // two buffers of two tiles

// Where a chunk of a tile lies: eight rows' chunks of one column lie in eight different groups of banks, as
// ldmatrix reads them.
DEVICE int chunk_offset(int row, int chunk) {
  return row * kStep + (chunk ^ (row / 2 % kChunksPerRow)) * kChunk;
}

template <class T>
__global__ void __launch_bounds__(kMatmulThreads)
    matmul_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ c, int m, int n,
                  int k) {
  DYNAMIC_SHARED(T, memory);
  T* tiles_a = memory;
  T* tiles_b = memory + 2 * kTileElements;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int m0 = blockIdx.y * kBlockMN, n0 = blockIdx.x * kBlockMN;
  const int warp_m = warp % 2 * 16, warp_n = warp / 2 * 16;

  const auto load_tile = [&](T* tile, const T* matrix, int row0, int rows, int k0) {
    static_assert(kBlockMN * kChunksPerRow == kMatmulThreads, "a thread copies one chunk of each tile");
    const int row = threadIdx.x / kChunksPerRow, chunk = threadIdx.x % kChunksPerRow,
              column = k0 + chunk * kChunk;
    const bool inside = row0 + row < rows && column < k;
    const T* source = inside ? matrix + static_cast<size_t>(row0 + row) * k + column : matrix;
    copy_async<16>(shared_address(tile + chunk_offset(row, chunk)), source, inside);
  };
  const auto load_step = [&](int step) {
    load_tile(tiles_a + step % 2 * kTileElements, a, m0, m, step * kStep);
    load_tile(tiles_b + step % 2 * kTileElements, b, n0, n, step * kStep);
    commit_copies();
  };

  float sums[2][4] = {};  // two fragments of 16 x 8
  const int steps = (k + kStep - 1) / kStep;
  load_step(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load_step(step + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    const T* tile_a = tiles_a + step % 2 * kTileElements;
    const T* tile_b = tiles_b + step % 2 * kTileElements;
#pragma unroll
    for (int half = 0; half < kStep / 16; ++half) {
      uint32_t rows_a[4], rows_b[4];
      ldmatrix_x4(rows_a, shared_address(tile_a + chunk_offset(warp_m + lane % 16, half * 2 + lane / 16)));
      const int row_b = warp_n + lane % 8 + lane / 16 * 8;
      ldmatrix_x4(rows_b, shared_address(tile_b + chunk_offset(row_b, half * 2 + lane / 8 % 2)));
      mma_m16n8k16<T>(sums[0], rows_a, {rows_b[0], rows_b[1]});
      mma_m16n8k16<T>(sums[1], rows_a, {rows_b[2], rows_b[3]});
    }
    __syncthreads();  // before the next copies overwrite what was read
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {  // pairs of neighbours
    const int row = m0 + warp_m + lane / 4 + i % 2 * 8, column = n0 + warp_n + i / 2 * 8 + lane % 4 * 2;
    const float2 pair = {sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]};
    if (row < m && column < n) *reinterpret_cast<float2*>(c + static_cast<size_t>(row) * n + column) = pair;
  }
}

template <class T>
int matmul(const T* a, const T* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  const dim3 grid((n + kBlockMN - 1) / kBlockMN, (m + kBlockMN - 1) / kBlockMN);
  return launch("matmul", matmul_kernel<T>, grid, kMatmulThreads, kMatmulBytes, stream, a, b, c, m, n, k);
}

}  // namespace
}  // namespace fastbert

using namespace fastbert;

extern "C" {

int row_sum(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  return launch("row_sum", row_sum_kernel, rows, kRowThreads, 0, stream, x, y, columns);
}

int transpose(const float* x, float* y, int64_t rows, int64_t columns, void* stream) {
  const dim3 grid((columns + kTile - 1) / kTile, (rows + kTile - 1) / kTile), block(kTile, kTileRows);
  return launch("transpose", transpose_kernel, grid, block, 0, stream, x, y, rows, columns);
}

int matmul_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int64_t m, int64_t n, int64_t k,
                void* stream) {
  return matmul(a, b, c, m, n, k, stream);
}

int matmul_fp16(const __half* a, const __half* b, float* c, int64_t m, int64_t n, int64_t k, void* stream) {
  return matmul(a, b, c, m, n, k, stream);
}
}
