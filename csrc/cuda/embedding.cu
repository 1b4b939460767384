// The gradient of an embedding table [V, H], added to what its rows already have, or where the table holds
// nothing yet (`fills`) put there, with zeros in the rows of no token:
//
//   dtable[id] += sum of dx over the tokens of that id            dx [T, H], ids [T]
//
// There is no sort: a block has kSlab rows of the table and some of the columns, and reads all ids. It lists
// its tokens in order, and then adds up row by row, each warp a part of the list. Sums are float32 and in an
// order that follows from the ids alone; a row is rounded once for each kListed tokens of its slab. Ids
// outside the table, of which the look-up has spoken, and `padding_idx` are left out.
#include "launch.h"
//
#include "kernels.h"
#include "reduce.h"
#include "vectors.h"

namespace fastbert::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kSlab = 32;                          // rows of the table: a bit each
constexpr int kItems = 4;                          // ids that a thread reads at a time
constexpr int kRound = kItems * kThreads;          // tokens that a block reads at a time
constexpr int kListed = 4096;                      // of its tokens that a block keeps, at most
constexpr int kAhead = 4;                          // rows of dx that a lane loads side by side
constexpr int64_t kMostTokens = int64_t{1} << 26;  // five bits of a word are the row's

// A block's tokens: `token * kSlab + row`, in order of tokens.
struct List {
  uint32_t entries[kListed];
  uint32_t count_of_warp[kWarps];
};

// Appends those of tokens [first, first + kRound) that are the slab's; returns the new length.
DEVICE int list_tokens(const EmbeddingBackward& a, int64_t first, int64_t slab, int length, List& list) {
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int64_t own = first + warp * kItems * kWarp + lane;
  unsigned lanes[kItems];
  uint32_t entries[kItems], count = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t token = own + i * kWarp, id = token < a.rows ? a.ids[token] : -1;
    const bool is_own = id >= 0 && id < a.table_rows && id != a.padding_idx && id / kSlab == slab;
    lanes[i] = __ballot_sync(kAllLanes, is_own);
    entries[i] = static_cast<uint32_t>(token * kSlab + id % kSlab);
    count += __popc(lanes[i]);
  }
  if (lane == 0) list.count_of_warp[warp] = count;
  __syncthreads();
  int place = length;
  for (int before = 0; before < kWarps; ++before) {
    if (before < warp) place += list.count_of_warp[before];
    length += list.count_of_warp[before];
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (lanes[i] >> lane & 1) list.entries[place + __popc(lanes[i] & ((1u << lane) - 1))] = entries[i];
    place += __popc(lanes[i]);
  }
  __syncthreads();
  return length;
}

// A warp's sum of dx over its part of the list, of the tokens of one row.
template <class T, int kCount>
DEVICE void add_tokens(const EmbeddingBackward& a, const List& list, int first, int end, int row,
                       int64_t column, float (&sum)[kCount]) {
  const T* dx = static_cast<const T*>(a.dx) + column;
  for (int base = first; base < end; base += kWarp) {
    const int at = base + lane_of_warp();
    const uint32_t entry = at < end ? list.entries[at] : 0;
    unsigned left = __ballot_sync(kAllLanes, at < end && static_cast<int>(entry % kSlab) == row);
    while (left != 0) {
      int64_t token[kAhead];
      float values[kAhead][kCount] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int lane = left != 0 ? __ffs(left) - 1 : 0;
        token[i] = left != 0 ? static_cast<int64_t>(__shfl_sync(kAllLanes, entry, lane) / kSlab) : -1;
        left &= left - 1;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (token[i] >= 0 && column < a.columns) load<kCount>(dx + token[i] * a.columns, values[i]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum[j] += values[i][j];
    }
  }
}

// Adds what is listed to the table's rows. `written`: rows that hold something.
template <class T, int kCount>
DEVICE void add_listed(const EmbeddingBackward& a, const List& list, int length, int64_t slab, int64_t first,
                       uint32_t& written) {
  constexpr int kColumns = kWarp * kCount;
  __shared__ uint32_t present;
  __shared__ __align__(16) float sums[kWarps][kColumns];
  const int lane = lane_of_warp(), warp = warp_of_block();
  if (threadIdx.x == 0) present = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < length; i += kThreads) atomicOr(&present, 1u << list.entries[i] % kSlab);
  __syncthreads();
  const uint32_t rows = present;
  const int begin = warp * length / kWarps, end = (warp + 1) * length / kWarps;
  for (uint32_t left = rows; left != 0; left &= left - 1) {
    const int row = __ffs(left) - 1;
    float own[kCount] = {};
    add_tokens<T, kCount>(a, list, begin, end, row, first + lane * kCount, own);
    store<kCount>(&sums[warp][lane * kCount], own);
    __syncthreads();
    const int64_t column = first + threadIdx.x;
    if (threadIdx.x < kColumns && column < a.columns) {
      T* target = static_cast<T*>(a.dtable) + (slab * kSlab + row) * a.columns + column;
      float total = 0;
#pragma unroll
      for (int from = 0; from < kWarps; ++from) total += sums[from][threadIdx.x];
      *target = from_float<T>(written >> row & 1 ? to_float(*target) + total : total);
    }
    __syncthreads();
  }
  written |= rows;
}

// Block (slab, columns).
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) embedding_backward_kernel(const EmbeddingBackward a) {
  __shared__ List list;
  const int64_t slab = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kWarp * kCount;
  uint32_t written = a.fills ? 0 : ~0u;
  int length = 0;
  for (int64_t token = 0; token < a.rows; token += kRound) {
    length = list_tokens(a, token, slab, length, list);
    if (length + kRound <= kListed && token + kRound < a.rows) continue;
    if (length > 0) add_listed<T, kCount>(a, list, length, slab, first, written);
    length = 0;
  }
  // zeros
  const int64_t column = first + threadIdx.x;
  if (threadIdx.x >= kWarp * kCount || column >= a.columns) return;
#pragma unroll 1
  for (int row = 0; row < kSlab && slab * kSlab + row < a.table_rows; ++row)
    if (!(written >> row & 1))
      static_cast<T*>(a.dtable)[(slab * kSlab + row) * a.columns + column] = from_float<T>(0.f);
}

// ---- launcher ------------------------------------------------------------------------------------------

template <class T>
int start(const EmbeddingBackward& a) {
  constexpr int kWidest = kAccessBytes / static_cast<int>(sizeof(T));
  const bool is_wide = are_aligned(kAccessBytes, a.dx) && a.columns % kWidest == 0;
  const int64_t across = kWarp * (is_wide ? kWidest : 1);
  const dim3 grid((a.table_rows + kSlab - 1) / kSlab, (a.columns + across - 1) / across);
  return launch("embedding_backward",
                is_wide ? embedding_backward_kernel<T, kWidest> : embedding_backward_kernel<T, 1>, grid,
                kThreads, 0, reinterpret_cast<void*>(a.launch), a);
}

}  // namespace

int embedding_backward(const EmbeddingBackward& a) {
  if (a.rows > kMostTokens) {
    snprintf(launch_error(), kErrorBytes, "embedding_backward: at most %lld tokens, got %lld",
             static_cast<long long>(kMostTokens), static_cast<long long>(a.rows));
    return cudaErrorInvalidValue;
  }
  if (a.table_rows == 0 || a.columns == 0 || (a.rows == 0 && !a.fills)) return 0;
  return with_type(a.dtype, [&](auto x) { return start<decltype(x)>(a); });
}

}  // namespace fastbert::cuda
