// The rows of a table that take a LazyAdam step, each with the float32 sum of its gradients.
//
// Sums  A row of up to kPiece gradients is summed by whoever updates it. Of a longer one each piece is
//       summed by another worker, which leaves the sum in memory and tells the node above, of up to kFan
//       pieces; the last to arrive there adds its children up, in order, and goes on upwards. Who is last
//       depends on the run; what it adds up, and in which order, does not.
// Work  update_slices_kernel cuts rows into slices of columns, one for each worker (1 to 32 lanes). Where
//       something is asked of a row as a whole (one v for all its columns, whether its gradient is zero), a
//       warp takes a row, in update_rows_kernel, and where every row steps, in update_table_kernel.
#pragma once
#include "launch.h"
//
#include "lazy_adam_columns.h"
#include "lazy_adam_groups.h"

namespace fastbert::cuda {

constexpr int kUpdateThreads = 256;
constexpr int kBatch = 4;  // rows asked for before the first is added: what registers allow

struct AdamRows {
  AdamTable table;
  AdamFormula formula;
  const void* grad;
  DType grad_dtype;
  bool is_by_row;         // grad is [V, D] instead of [n, D]
  bool skips_zero;        // a row whose gradient is all zero is left alone
  int32_t* row_steps;     // [V]; null: all rows count as the parameter does
  uint32_t padding;       // this row is left alone; kNoRow: none
  const int32_t* is_bad;  // [1]: nothing may be stored; null: no id was looked at
  float per_column;       // 1 / D
  float* sums;            // [most_pieces(n), D] of pieces, and of the nodes that begin with them
};

// ---- sums ------------------------------------------------------------------------------------------------

struct Source {  // rows that are to be summed: `position`, or `count` of them from `first` on, `step` apart
  const void* rows;
  DType dtype;
  const int32_t* position;
  uint32_t first, step;
  int count;

  DEVICE uint32_t row(int k) const {
    return position ? static_cast<uint32_t>(position[k]) : first + k * step;
  }
};

// The sum of kWidth columns, in order: kAtOnce rows in registers, all others on their way to L2. Where a load
// depends on a condition the other branch gives a value too: without it the compiler would keep the old one,
// and the whole batch with it, from turn to turn.
template <int kWidth, int kAtOnce, Cache kCache>
DEVICE void add_up(const Source& from, int columns, int column, float (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] = 0.f;
#pragma unroll 1
  for (int k = kAtOnce; k < from.count; ++k)
    prefetch_element(from.rows, from.dtype, element(from.row(k), columns, column));
#pragma unroll 1
  for (int first = 0; first < from.count; first += kAtOnce) {
    uint32_t at[kAtOnce];
    Raw<kWidth> its[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) at[k] = first + k < from.count ? from.row(first + k) : 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      its[k] = first + k < from.count
                   ? load_raw<kWidth, kCache>(from.rows, from.dtype, element(at[k], columns, column))
                   : Raw<kWidth>{};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      float x[kWidth];
      unpack_raw(its[k], from.dtype, x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        sum[i] = first + k == 0 ? x[i] : first + k < from.count ? sum[i] + x[i] : sum[i];
    }
  }
}

// ---- workers ---------------------------------------------------------------------------------------------

struct Geometry {  // of a block: `places` times `slices` workers
  int lanes;       // of a worker: a power of two, and 32 where there are several slices
  int slices, places;
};

struct Worker {
  int lane, lanes;
  unsigned mask;  // of its lanes in the warp
  int slice;      // of the row
  int64_t place;  // its block's first place, and its own after that

  DEVICE Worker(const Geometry& of, int64_t block) {
    const int thread = threadIdx.x, number = thread / of.lanes, first = thread % kWarp / of.lanes * of.lanes;
    lanes = of.lanes, lane = thread % of.lanes;
    mask = (of.lanes == kWarp ? kAllLanes : (1u << of.lanes) - 1) << first;
    slice = blockIdx.y * of.slices + number % of.slices;
    place = block * of.places + number / of.slices;
  }

  // Tells the node at `counter` that a child is done. True for the worker that is the last of so many: it
  // sees what the others have written.
  DEVICE bool is_last_to_arrive(int32_t* counter, int children) const {
    int before = 0;
    __syncwarp(mask);
    if (lane == 0) {
      __threadfence();
      before = atomicAdd(counter, 1);
      __threadfence();
    }
    before = __shfl_sync(mask, before, 0, lanes);
    __syncwarp(mask);
    return before + 1 == children;
  }
};

// How many gradients, up to kPiece + 1, the row has that starts at place `s`; 0 where none starts. All lanes
// of a warp call it, those of a worker for the same place.
DEVICE int gradients_of_row(const Groups& g, const Worker& worker, int64_t s) {
  const bool is_in = s < g.n;
  const uint32_t id = is_in ? g.row[s] : kNoRow, before = is_in && s > 0 ? g.row[s - 1] : kNoRow;
  int count = 0;
  for (int first = 0; first <= kPiece; first += worker.lanes) {
    const int64_t at = s + first + worker.lane;
    const bool is_asked = first + worker.lane <= kPiece && at < g.n;
    const unsigned same = __ballot_sync(kAllLanes, is_asked && g.row[at] == id) & worker.mask;
    count += __popc(same);  // rows are sorted: a lane that differs is followed by none that does not
  }
  return is_in && before != id ? count : 0;
}

// Sums one piece of a row and goes up the row's tree as far as it can. The sum of the row as a source, for
// the worker that was the last to come; false for all others. The worker's columns are `first`, `first +
// step`, ... below `end`.
template <int kWidth>
DEVICE bool climb(const AdamRows& r, const Groups& g, const Worker& worker, int number, int first, int end,
                  int step, Source& sum_of_row) {
  const Piece piece = g.pieces[number];
  const int j = number - piece.base, pieces = (piece.count + kPiece - 1) / kPiece;
  const int columns = r.table.columns;
  const int32_t* position = g.position + piece.start + j * kPiece;
  Source from = {r.grad, r.grad_dtype, position, 0, 0, min(kPiece, piece.count - j * kPiece)};
  int to = number, stride = 1, level = 0;
  while (true) {
    for (int column = first; column < end; column += step) {
      float sum[kWidth];
      add_up<kWidth, kBatch, Cache::plain>(from, columns, column, sum);
      store<kWidth>(r.sums + element(to, columns, column), sum);
    }
    if (stride >= pieces) break;
    const int node = j / (stride * kFan) * (stride * kFan);
    const int children = min(kFan, (pieces - node + stride - 1) / stride);
    to = piece.base + node;
    // A node of several children at level l covers more than l pieces, whose counters are its own.
    int32_t* counter = g.arrived + int64_t{to + level} * g.slices + worker.slice;
    if (children > 1 && !worker.is_last_to_arrive(counter, children)) return false;
    from = {r.sums, DType::f32, nullptr, static_cast<uint32_t>(to), static_cast<uint32_t>(stride), children};
    stride *= kFan, ++level;
  }
  sum_of_row = {r.sums, DType::f32, nullptr, static_cast<uint32_t>(to), 0, 1};
  return true;
}

// ---- rows by slices --------------------------------------------------------------------------------------

template <int kWidth, int kAtOnce, Cache kCache>
DEVICE void update_slice(const AdamRows& r, const AdamCoefficients* coefficients, uint32_t id, int column,
                         const Source& from) {
  const bool is_bad = *r.is_bad;  // asked for first and looked at last: nothing waits for it
  const int64_t at = element(id, r.table.columns, column);
  AdamColumns<kWidth, false> x;
  x.load_all_but_u(r.table, at);
  float sum[kWidth];
  add_up<kWidth, kAtOnce, kCache>(from, r.table.columns, column, sum);
  x.load_u(r.table, at);  // in the registers of gradients
  const AdamCoefficients c =
      r.row_steps ? adam_coefficients(r.formula, static_cast<float>(r.row_steps[id] + 1)) : *coefficients;
  if (!is_bad) x.step_and_store(r.table, at, id, column, sum, 0.f, c);
}

DEVICE Source source_of(const AdamRows& r, const Groups& g, int64_t s, uint32_t id, int count) {
  if (r.is_by_row) return {r.grad, r.grad_dtype, nullptr, id, 0, 1};
  return {r.grad, r.grad_dtype, g.position + s, 0, 0, count};
}

// The first `piece_blocks` blocks take pieces, the others rows without. Where rows count their own steps,
// count_rows_kernel follows: here several workers read a row's count.
template <int kWidth>
__global__ void __launch_bounds__(kUpdateThreads, 4)
    update_slices_kernel(AdamRows r, Groups g, Geometry geometry, int piece_blocks) {
  const bool takes_pieces = static_cast<int>(blockIdx.x) < piece_blocks;
  const Worker worker(geometry, takes_pieces ? blockIdx.x : int64_t{blockIdx.x} - piece_blocks);
  const int column = (worker.slice * worker.lanes + worker.lane) * kWidth;
  const int end = min(column + 1, r.table.columns);  // one turn of a loop over columns, or none
  if (takes_pieces) {
    const int pieces = *g.piece_count;
    for (int k = static_cast<int>(worker.place); k < pieces && worker.slice < g.slices;
         k += piece_blocks * geometry.places) {
      Source root;
      if (!climb<kWidth>(r, g, worker, k, column, end, kWidth, root)) continue;
      if (column < end)
        update_slice<kWidth, 1, Cache::plain>(r, g.coefficients, g.row[g.pieces[k].start], column, root);
    }
    return;
  }
  const int64_t s = worker.place;
  const int count = gradients_of_row(g, worker, s);
  if (count == 0 || (count > kPiece && g.has_pieces) || column >= end) return;
  const uint32_t id = g.row[s];
  if (id != r.padding)
    update_slice<kWidth, kBatch, Cache::streaming>(r, g.coefficients, id, column,
                                                   source_of(r, g, s, id, count));
}

__global__ void __launch_bounds__(kPlaceThreads) count_rows_kernel(AdamRows r, Groups g) {
  const int64_t s = int64_t{blockIdx.x} * kPlaceThreads + threadIdx.x;
  if (s >= g.n || *r.is_bad) return;
  const uint32_t id = g.row[s];
  if (id != r.padding && (s == 0 || g.row[s - 1] != id)) ++r.row_steps[id];
}

// ---- whole rows ------------------------------------------------------------------------------------------

// What one row's v is worth where all of its columns share it: v is fed by the mean of g * g. Lane 0 has read
// v and u, and writes them.
template <int kWidth>
DEVICE float shared_divisor(const AdamRows& r, uint32_t id, const Source& from, const AdamCoefficients& c) {
  const int lane = lane_of_warp();
  const AdamTable& t = r.table;
  float v = 0.f, u = 0.f, square = 0.f;
  if (lane == 0) v = t.exp_avg_sq[id], u = t.max_exp_avg_sq ? t.max_exp_avg_sq[id] : 0.f;
  for (int column = lane * kWidth; column < t.columns; column += kWarp * kWidth) {
    float g[kWidth], w[kWidth];
    const Raw<kWidth> raw = load_raw<kWidth, Cache::plain>(t.param, t.dtype, element(id, t.columns, column));
    add_up<kWidth, kBatch, Cache::plain>(from, t.columns, column, g);
    unpack_raw(raw, t.dtype, w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float mine = adam_gradient(g[i], w[i], c);
      square = fmaf(mine, mine, square);
    }
  }
  v = adam_second_moment(v, warp_sum(square) * r.per_column, c);
  if (t.max_exp_avg_sq) u = adam_maximum(u, v);
  if (lane == 0) {
    t.exp_avg_sq[id] = v;
    if (t.max_exp_avg_sq) t.max_exp_avg_sq[id] = u;
  }
  return __shfl_sync(kAllLanes, adam_divisor(t.max_exp_avg_sq ? u : v, c), 0);
}

template <int kWidth>
DEVICE bool is_all_zero(const AdamRows& r, uint32_t id) {
  for (int first = 0; first < r.table.columns; first += kWarp * kWidth) {
    const int column = first + lane_of_warp() * kWidth;
    const bool is_in = column < r.table.columns;
    const Raw<kWidth> raw =
        is_in ? load_raw<kWidth, Cache::plain>(r.grad, r.grad_dtype, element(id, r.table.columns, column))
              : Raw<kWidth>{};
    if (__any_sync(kAllLanes, is_nonzero(raw, r.grad_dtype))) return false;
  }
  return true;
}

// All lanes of a warp call it.
template <int kWidth, bool kShared>
DEVICE void update_row(const AdamRows& r, uint32_t id, const Source& from) {
  if (id == r.padding || (r.skips_zero && is_all_zero<kWidth>(r, id))) return;
  if ((r.is_bad && *r.is_bad) || changes_nothing(r.formula)) return;
  const int lane = lane_of_warp();
  int steps = lane == 0 && r.row_steps ? r.row_steps[id] + 1 : 0;
  if (lane == 0 && r.row_steps) r.row_steps[id] = steps;
  steps = __shfl_sync(kAllLanes, steps, 0);
  const AdamCoefficients c =
      adam_coefficients(r.formula, r.row_steps ? static_cast<float>(steps) : *r.formula.step);
  const float divisor = kShared ? shared_divisor<kWidth>(r, id, from, c) : 0.f;
  for (int column = lane * kWidth; column < r.table.columns; column += kWarp * kWidth) {
    AdamColumns<kWidth, kShared> x;
    x.load(r.table, element(id, r.table.columns, column));
    float sum[kWidth];
    add_up<kWidth, kBatch, Cache::plain>(from, r.table.columns, column, sum);
    x.step_and_store(r.table, element(id, r.table.columns, column), id, column, sum, divisor, c);
  }
}

// Of rows that ids name: blocks as above.
template <int kWidth, bool kShared>
__global__ void __launch_bounds__(kUpdateThreads, 3)
    update_rows_kernel(AdamRows r, Groups g, Geometry geometry, int piece_blocks) {
  const bool takes_pieces = static_cast<int>(blockIdx.x) < piece_blocks;
  const Worker worker(geometry, takes_pieces ? blockIdx.x : int64_t{blockIdx.x} - piece_blocks);
  if (takes_pieces) {
    const int pieces = *g.piece_count;
    for (int k = static_cast<int>(worker.place); k < pieces; k += piece_blocks * geometry.places) {
      Source root;
      if (climb<kWidth>(r, g, worker, k, worker.lane * kWidth, r.table.columns, kWarp * kWidth, root))
        update_row<kWidth, kShared>(r, g.row[g.pieces[k].start], root);
    }
    return;
  }
  const int64_t s = worker.place;
  const int count = gradients_of_row(g, worker, s);
  if (count == 0 || (count > kPiece && g.has_pieces)) return;
  const uint32_t id = g.row[s];
  update_row<kWidth, kShared>(r, id, source_of(r, g, s, id, count));
}

// Of all rows.
template <int kWidth, bool kShared>
__global__ void __launch_bounds__(kUpdateThreads, 4) update_table_kernel(AdamRows r, uint32_t table_rows) {
  const uint32_t id = blockIdx.x * (kUpdateThreads / kWarp) + warp_of_block();
  if (id < table_rows) update_row<kWidth, kShared>(r, id, {r.grad, r.grad_dtype, nullptr, id, 0, 1});
}

}  // namespace fastbert::cuda
