// Sorts the gradient rows of a sparse LazyAdam step by row id: radix sorts from the lowest digit on, stable,
// by one block in shared memory where they fit, or in tiles over the whole device.
//
//   by block   one launch
//   by tiles   count_digits; scan_tiles and scatter for each digit; list_pieces
//
// A pass moves a tile's items by one digit: each warp counts its own items (rank_items), the warps' counts
// become places among the tile's items of a digit (scan_warps), and a digit's first place is added.
#pragma once
#include "launch.h"
//
#include "lazy_adam_groups.h"

namespace fastbert::cuda {

constexpr int kBlockThreads = 1024;
constexpr int kBlockDigit = 9;  // bits that a pass sorts by, at most

struct Digit {
  int shift, bits;

  DEVICE int count() const { return 1 << bits; }
  DEVICE uint32_t of(uint32_t row) const { return row >> shift & ((1u << bits) - 1); }
};

struct alignas(4) TwoCounts {  // of digits 2 * i and 2 * i + 1
  uint16_t of[2];
};

// kItems of each of kThreads threads; those of a warp stand side by side.
template <int kThreads, int kItems>
struct Tile {
  static constexpr int kWarps = kThreads / kWarp, kSize = kThreads * kItems;

  uint32_t row[kItems];
  int32_t position[kItems];
  uint32_t place[kItems];

  DEVICE static int index(int i) { return (warp_of_block() * kItems + i) * kWarp + lane_of_warp(); }

  // place: among the warp's items of equal digit; count [kWarps, digits]: how many each warp has. Only the
  // first `size` items are there.
  DEVICE void rank_items(int size, Digit digit, TwoCounts* count) {
    const int pairs = digit.count() / 2;
    for (int i = threadIdx.x; i < kWarps * pairs; i += kThreads) count[i] = {};
    __syncthreads();
    TwoCounts* mine = count + warp_of_block() * pairs;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_in = index(i) < size;
      const uint32_t d = is_in ? digit.of(row[i]) : kNoRow;
      const unsigned peers = __match_any_sync(kAllLanes, d), below = peers & ((1u << lane_of_warp()) - 1);
      const int before = is_in ? mine[d / 2].of[d % 2] : 0;
      place[i] = before + __popc(below);
      __syncwarp();
      if (is_in && below == 0) mine[d / 2].of[d % 2] = static_cast<uint16_t>(before + __popc(peers));
      __syncwarp();
    }
    __syncthreads();
  }

  // The place of item i, where digits begin at `base`.
  DEVICE uint32_t final_place(int i, Digit digit, const TwoCounts* count, const uint32_t* base) const {
    const uint32_t d = digit.of(row[i]);
    return base[d] + count[warp_of_block() * digit.count() / 2 + d / 2].of[d % 2] + place[i];
  }
};

// Exclusive sum over the threads of a block; `sums` are kWarp numbers of shared memory that nobody reads.
DEVICE uint32_t sum_before(uint32_t x, uint32_t* sums) {
  const int lane = lane_of_warp();
  const auto up_to_lane = [&](uint32_t sum) {
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    return sum;
  };
  const uint32_t inclusive = up_to_lane(x);
  if (lane == kWarp - 1) sums[warp_of_block()] = inclusive;
  __syncthreads();
  const uint32_t total = lane < warps_of_block() ? sums[lane] : 0;
  const uint32_t before_warps = up_to_lane(total) - total;
  return __shfl_sync(kAllLanes, before_warps, warp_of_block()) + inclusive - x;
}

// count [kWarps, digits] becomes each warp's place among the tile's items of a digit. Thread i gets the
// totals of digits 2 * i and 2 * i + 1.
template <int kWarps>
DEVICE uint2 scan_warps(TwoCounts* count, int pairs) {
  uint2 sum = {0, 0};
  constexpr int kAhead = 8;  // loads before the first store, which they cannot pass
  if (static_cast<int>(threadIdx.x) >= pairs) return sum;
#pragma unroll 1
  for (int first = 0; first < kWarps; first += kAhead) {
    TwoCounts* at = count + first * pairs + threadIdx.x;
    TwoCounts its[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) its[i] = at[i * pairs];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      at[i * pairs] = {{static_cast<uint16_t>(sum.x), static_cast<uint16_t>(sum.y)}};
      sum.x += its[i].of[0], sum.y += its[i].of[1];
    }
  }
  return sum;
}

// ---- up to kSortedByBlock gradient rows: one block -------------------------------------------------------

template <int kItems>
struct BlockMemory {  // shared memory, in which the sorted items take the place of the counts
  using Its = Tile<kBlockThreads, kItems>;
  static constexpr int kCountBytes = Its::kWarps * sizeof(uint16_t) << kBlockDigit;
  static constexpr int kBaseBytes = sizeof(uint32_t) << kBlockDigit;
  static constexpr int kItemBytes = Its::kSize * (sizeof(uint32_t) + sizeof(uint16_t));
  static constexpr int kSumsAt =
      kCountBytes + kBaseBytes > kItemBytes ? kCountBytes + kBaseBytes : kItemBytes;
  static constexpr int kBytes = kSumsAt + kWarp * sizeof(uint32_t);

  unsigned char* memory;

  DEVICE TwoCounts* count() const { return reinterpret_cast<TwoCounts*>(memory); }
  DEVICE uint32_t* base() const { return reinterpret_cast<uint32_t*>(memory + kCountBytes); }
  DEVICE uint32_t* row() const { return reinterpret_cast<uint32_t*>(memory); }
  DEVICE uint16_t* position() const {
    return reinterpret_cast<uint16_t*>(memory + Its::kSize * sizeof(uint32_t));
  }
  DEVICE uint32_t* sums() const { return reinterpret_cast<uint32_t*>(memory + kSumsAt); }
};

// One pass, after which the items stand in memory and in the tile, in their new order.
template <int kItems>
DEVICE void sort_by_digit(Tile<kBlockThreads, kItems>& tile, int size, Digit digit,
                          BlockMemory<kItems> shared) {
  using Its = Tile<kBlockThreads, kItems>;
  const int pairs = digit.count() / 2;
  tile.rank_items(size, digit, shared.count());
  const uint2 totals = scan_warps<Its::kWarps>(shared.count(), pairs);
  const uint32_t before = sum_before(totals.x + totals.y, shared.sums());
  if (static_cast<int>(threadIdx.x) < pairs) {
    shared.base()[2 * threadIdx.x] = before;
    shared.base()[2 * threadIdx.x + 1] = before + totals.x;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (Its::index(i) < size) tile.place[i] = tile.final_place(i, digit, shared.count(), shared.base());
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (Its::index(i) >= size) continue;
    shared.row()[tile.place[i]] = tile.row[i];
    shared.position()[tile.place[i]] = static_cast<uint16_t>(tile.position[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = Its::index(i);
    if (at < size) tile.row[i] = shared.row()[at], tile.position[i] = shared.position()[at];
  }
}

// Two blocks: the second computes the coefficients meanwhile.
template <int kItems>
__global__ void __launch_bounds__(kBlockThreads)
    sort_block_kernel(Groups g, AdamFormula formula, int passes, int bits) {
  using Its = Tile<kBlockThreads, kItems>;
  DYNAMIC_SHARED(unsigned char, memory);
  if (blockIdx.x == 1) {
    if (threadIdx.x == 0) *g.coefficients = adam_coefficients(formula, *formula.step);
    return;
  }
  const BlockMemory<kItems> shared = {memory};
  const int size = static_cast<int>(g.n);
  Its tile;
  bool is_bad = was_bad(g);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = Its::index(i);
    tile.row[i] = at < size ? checked_id(g, at, is_bad) : kNoRow;
    tile.position[i] = at;
  }
  if (threadIdx.x == 0) *g.piece_count = 0;
  is_bad = __syncthreads_or(is_bad);
  if (threadIdx.x == 0) *g.is_bad = is_bad;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    if (pass > 0) __syncthreads();
    sort_by_digit(tile, size, {pass * bits, bits}, shared);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int at = Its::index(i);
    if (at < size) g.row[at] = tile.row[i], g.position[at] = tile.position[i];
  }
#pragma unroll 1
  for (int i = 0; i < kItems; ++i) list_pieces(g, shared.row(), Its::index(i));
}

// ---- more: tiles of the whole device ---------------------------------------------------------------------

struct SortPass {
  Digit digit;
  bool is_first, is_last;   // the first takes ids, the others what the pass before has left
  const uint32_t* row;      // [n]
  const int32_t* position;  // [n]
  uint32_t* row_out;        // [n]
  int32_t* position_out;    // [n]
  int tiles, passes;
  int32_t* tile_is_bad;          // [tiles]
  uint32_t *count, *next_count;  // [tiles + 1, digits] of this pass and the next; the last row: totals
};

DEVICE uint32_t row_of(const SortPass& p, const Groups& g, int64_t at, bool& is_bad) {
  return p.is_first ? checked_id(g, at, is_bad) : p.row[at];
}

// Before the first pass: its counts, and zeros for those of the others. One block more for the coefficients.
template <int kItems>
__global__ void __launch_bounds__(kTileThreads)
    count_digits_kernel(SortPass p, Groups g, AdamFormula formula) {
  using Its = Tile<kTileThreads, kItems>;
  __shared__ uint32_t count[1 << kTileDigit];
  const int tile = blockIdx.x, digits = p.digit.count();
  if (tile == p.tiles) {
    if (threadIdx.x == 0) *g.coefficients = adam_coefficients(formula, *formula.step), *g.piece_count = 0;
    return;
  }
  for (int i = threadIdx.x; i < digits; i += kTileThreads) {
    count[i] = 0;
    for (int pass = 1; pass < p.passes; ++pass)
      p.count[(int64_t{pass} * (p.tiles + 1) + tile) * digits + i] = 0;
  }
  __syncthreads();
  bool is_bad = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t at = int64_t{tile} * Its::kSize + Its::index(i);
    if (at < g.n) atomicAdd(&count[p.digit.of(checked_id(g, at, is_bad))], 1u);
  }
  is_bad = __syncthreads_or(is_bad);
  if (threadIdx.x == 0) p.tile_is_bad[tile] = is_bad;
  for (int i = threadIdx.x; i < digits; i += kTileThreads) p.count[int64_t{tile} * digits + i] = count[i];
}

// The tiles' counts become places among all items of a digit. A lane stands for a digit, and the warps of a
// block share the tiles.
__global__ void __launch_bounds__(kBlockThreads) scan_tiles_kernel(SortPass p, Groups g) {
  constexpr int kWarps = kBlockThreads / kWarp;
  __shared__ uint32_t sums[kWarps][kWarp];
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int digits = p.digit.count(), digit = blockIdx.x * kWarp + lane;
  const int share = (p.tiles + kWarps - 1) / kWarps;
  const int first = min(p.tiles, warp * share), end = min(p.tiles, first + share);
  const bool is_in = digit < digits;
  uint32_t* count = p.count + digit;
  uint32_t sum = 0;
#pragma unroll 8
  for (int tile = first; tile < end; ++tile) sum += is_in ? count[int64_t{tile} * digits] : 0;
  sums[warp][lane] = sum;
  __syncthreads();
  uint32_t before = 0;
#pragma unroll 8
  for (int other = 0; other < kWarps; ++other) before += other < warp ? sums[other][lane] : 0;
  constexpr int kAhead = 8;  // loads before the first store, which they cannot pass
#pragma unroll 1
  for (int tile = first; is_in && tile < end; tile += kAhead) {
    uint32_t its[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) its[i] = tile + i < end ? count[int64_t{tile + i} * digits] : 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (tile + i < end) count[int64_t{tile + i} * digits] = before;
      before += its[i];
    }
  }
  if (is_in && warp == kWarps - 1) count[int64_t{p.tiles} * digits] = before;
  if (p.is_first && blockIdx.x == 0) {
    bool is_bad = was_bad(g);
    for (int tile = threadIdx.x; tile < p.tiles; tile += kBlockThreads) is_bad |= p.tile_is_bad[tile] != 0;
    is_bad = __syncthreads_or(is_bad);
    if (threadIdx.x == 0) *g.is_bad = is_bad;
  }
}

// Moves the items, and counts the next digit's of the tiles that they move to.
template <int kItems>
__global__ void __launch_bounds__(kTileThreads) scatter_kernel(SortPass p, Groups g) {
  using Its = Tile<kTileThreads, kItems>;
  __shared__ TwoCounts count[Its::kWarps << (kTileDigit - 1)];
  __shared__ uint32_t base[1 << kTileDigit], sums[kWarp];
  const int digits = p.digit.count(), pairs = digits / 2;
  const int64_t first = int64_t{blockIdx.x} * Its::kSize;
  const int size = static_cast<int>(min(g.n - first, int64_t{Its::kSize}));
  Its tile;
  bool is_bad = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t at = first + Its::index(i);
    const bool is_in = Its::index(i) < size;
    tile.row[i] = is_in ? row_of(p, g, at, is_bad) : kNoRow;
    tile.position[i] = is_in && !p.is_first ? p.position[at] : static_cast<int32_t>(at);
  }
  const bool has_digits = static_cast<int>(threadIdx.x) < pairs;
  uint2 before = {0, 0}, totals = {0, 0};  // of this tile; of all
  if (has_digits) {
    before = reinterpret_cast<const uint2*>(p.count + int64_t{blockIdx.x} * digits)[threadIdx.x];
    totals = reinterpret_cast<const uint2*>(p.count + int64_t{p.tiles} * digits)[threadIdx.x];
  }
  tile.rank_items(size, p.digit, count);
  scan_warps<Its::kWarps>(count, pairs);
  const uint32_t smaller = sum_before(totals.x + totals.y, sums);
  if (has_digits) {
    base[2 * threadIdx.x] = smaller + before.x;
    base[2 * threadIdx.x + 1] = smaller + totals.x + before.y;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (Its::index(i) >= size) continue;
    const uint32_t place = tile.final_place(i, p.digit, count, base);
    p.row_out[place] = tile.row[i], p.position_out[place] = tile.position[i];
    if (p.is_last) continue;
    const Digit next = {p.digit.shift + p.digit.bits, p.digit.bits};
    atomicAdd(&p.next_count[int64_t{place / Its::kSize} * digits + next.of(tile.row[i])], 1u);
  }
}

__global__ void __launch_bounds__(kPlaceThreads) list_pieces_kernel(Groups g) {
  list_pieces(g, g.row, int64_t{blockIdx.x} * kPlaceThreads + threadIdx.x);
}

}  // namespace fastbert::cuda
