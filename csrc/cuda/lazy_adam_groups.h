// Which gradients of a sparse LazyAdam step belong to one row: the positions 0 .. R - 1 sorted by row id, so
// that those of a row stand side by side in order of occurrence, and the pieces of rows with many gradients.
// No time and no memory grows with V, and all of it follows from the ids alone.
//
// An id outside the table raises a fault and a verdict, which the kernels that would store look at.
#pragma once
#include "launch.h"
//
#include "faults.h"
#include "lazy_adam_scratch.h"
#include "lazy_adam_update.h"
#include "reduce.h"

namespace fastbert::cuda {

constexpr uint32_t kNoRow = 0xFFFFFFFFu;
constexpr int kPlaceThreads = 256;  // of kernels with a thread for each place of the sorted gradient rows

struct alignas(16) Piece {  // piece j of a row covers its gradients [kPiece * j, kPiece * (j + 1))
  int32_t start, count;     // where the row's gradients start in `position`, and how many there are
  int32_t base;             // number of the row's first piece; the others follow
  int32_t unused;
};

struct Groups {
  const int64_t* ids;  // [n]
  int64_t n, table_rows;
  uint32_t* row;           // [n] ascending
  int32_t* position;       // [n]
  Piece* pieces;           // [most_pieces(n)], of which so many are there:
  int32_t* piece_count;    // [1]
  int32_t* arrived;        // [most_pieces(n), slices], 0: see lazy_adam_rows.h
  int32_t* is_bad;         // [1]: an id of this or an earlier parameter of this call is outside its table
  const int32_t* was_bad;  // [1] of the earlier ones; null: there are none
  const float* found_inf;  // [1]: not 0, and it is as if one were; null: 0
  AdamCoefficients* coefficients;  // [1]
  int32_t* fault_words;
  int slices;
  bool has_pieces;   // the gradient is to be summed
  uint32_t padding;  // kNoRow: none
};

DEVICE bool was_bad(const Groups& g) {
  return (g.was_bad && *g.was_bad) || (g.found_inf && *g.found_inf != 0.f);
}

// The id of gradient row `i`, or one inside the table in its place.
DEVICE uint32_t checked_id(const Groups& g, int64_t i, bool& is_bad) {
  const int64_t id = g.ids[i];
  if (id >= 0 && id < g.table_rows) return static_cast<uint32_t>(id);
  is_bad = true;
  raise_fault(g.fault_words, kFaultRow, i);
  return 0;
}

// ---- pieces ----------------------------------------------------------------------------------------------

// Where the row that covers place `inside` ends. All lanes of a warp ask for the same: each probes a place,
// and those inside the row are a prefix of the warp.
DEVICE int64_t end_of_row(const uint32_t* row, int64_t n, int64_t inside) {
  const uint32_t id = row[inside];
  const int lane = lane_of_warp();
  const auto count_inside = [&](int64_t place) {
    return __popc(__ballot_sync(kAllLanes, place < n && row[place] == id));
  };
  const int doublings = count_inside(inside + (int64_t{1} << lane));
  int64_t low = doublings ? inside + (int64_t{1} << (doublings - 1)) : inside;  // covered
  int64_t high = min(n, inside + (int64_t{1} << doublings));                    // not covered
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp) / (kWarp + 1), probe = low + step * (lane + 1);
    low += step * count_inside(probe < high ? probe : n);
    high = min(high, low + step);
  }
  return high;
}

// Lists the pieces of long rows, by the lanes of a warp at a place `s` each. `row` are the sorted rows, in
// global or in shared memory.
DEVICE void list_pieces(const Groups& g, const uint32_t* row, int64_t s) {
  const uint32_t id = g.has_pieces && s + kPiece < g.n ? row[s] : g.padding;
  const bool is_long = id != g.padding && row[s + kPiece] == id && (s == 0 || row[s - 1] != id);
  const int lane = lane_of_warp();
  for (unsigned left = __ballot_sync(kAllLanes, is_long); left != 0; left &= left - 1) {
    const int64_t start = __shfl_sync(kAllLanes, s, __ffs(static_cast<int>(left)) - 1);
    const int32_t count = static_cast<int32_t>(end_of_row(row, g.n, start + kPiece) - start);
    const int32_t pieces = (count + kPiece - 1) / kPiece;
    int32_t base = lane == 0 ? atomicAdd(g.piece_count, pieces) : 0;
    base = __shfl_sync(kAllLanes, base, 0);
    const Piece piece = {static_cast<int32_t>(start), count, base, 0};
    for (int32_t j = lane; j < pieces; j += kWarp) g.pieces[base + j] = piece;
    for (int64_t j = lane; j < int64_t{pieces} * g.slices; j += kWarp)
      g.arrived[int64_t{base} * g.slices + j] = 0;
  }
}

}  // namespace fastbert::cuda
