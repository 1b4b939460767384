// One Adam step with decoupled weight decay, on the rows of a table [V, D] that a gradient touches or on all;
// csrc/contract.h and fastbert/ops/lazy_adam.py have the formula and its variants.
//
//   group    lazy_adam_sort.h    gradient rows sorted by row id: 1 launch for up to 8,192 of them, else 4 to
//   8 update   lazy_adam_rows.h    1 launch: sums each row's gradients and takes the row's step; rows that
//   count
//                               their own steps take 1 more
//
// Arithmetic is float32 for every dtype; w is rounded once, to nearest or stochastically. A gradient's rows
// are read where they lie, once; those of one row are added up in float32, in an order that follows from the
// ids alone: a row of up to 16 in order of occurrence, and so in the CPU's bits, a longer one as a tree of
// such pieces. Learning rate, step count and seed are read on the device.
//
// All parameters of a call are grouped before any is updated: where an id lies outside its table nothing at
// all is changed.
#include "launch.h"
//
#include "kernels.h"
#include "lazy_adam_dense.h"
#include "lazy_adam_rows.h"
#include "lazy_adam_sort.h"

namespace fastbert::cuda {
namespace {

constexpr int kPieceBlocks = 264;  // two on each multiprocessor of an H200; they share all pieces

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of kPlaceThreads threads, one for each place.
unsigned place_blocks(int64_t n) { return static_cast<unsigned>(ceil_div(n, kPlaceThreads)); }

// ---- what kernels take -----------------------------------------------------------------------------------

// Kernels take four columns a lane where every row begins at a multiple of an access.
bool takes_four(const LazyAdamStep& p) {
  return p.columns % 4 == 0 &&
         are_aligned(16, p.param, p.exp_avg, p.exp_avg_sq, p.max_exp_avg_sq, p.grad, p.bf16_copy);
}

// Whether something is asked of a row as a whole.
bool takes_whole_rows(const LazyAdamStep& p) { return p.row_wise || (p.flags & kLazyAdamSkipZero); }

Geometry geometry_of(const LazyAdamStep& p) {
  if (takes_whole_rows(p)) return {kWarp, 1, kUpdateThreads / kWarp};
  constexpr int kSlices = kUpdateThreads / kWarp;  // of a block, at most
  const int64_t packs = takes_four(p) ? p.columns / 4 : p.columns;
  int lanes = 1;
  while (lanes < kWarp && lanes < packs) lanes *= 2;
  const int slices = static_cast<int>(max(int64_t{1}, min(int64_t{kSlices}, ceil_div(packs, lanes))));
  return {lanes, slices, kUpdateThreads / (lanes * slices)};
}

// Of a whole row.
int slices_of(const LazyAdamStep& p, const Geometry& geometry) {
  if (takes_whole_rows(p)) return 1;
  const int64_t packs = takes_four(p) ? p.columns / 4 : p.columns;
  return static_cast<int>(max(int64_t{1}, ceil_div(packs, geometry.lanes)));
}

Groups groups_of(const LazyAdamStep& p, const int32_t* was_bad) {
  const LazyAdamScratch at = lazy_adam_layout(p.touched, p.columns);
  int32_t* scratch = p.scratch;
  Groups g;
  g.ids = p.rows, g.n = p.touched, g.table_rows = p.table_rows;
  g.row = reinterpret_cast<uint32_t*>(scratch + at.rows), g.position = scratch + at.positions;
  g.pieces = reinterpret_cast<Piece*>(scratch + at.pieces), g.arrived = scratch + at.arrived;
  g.piece_count = scratch + at.counters, g.is_bad = scratch + at.counters + 1, g.was_bad = was_bad;
  g.found_inf = p.found_inf;
  g.coefficients = reinterpret_cast<AdamCoefficients*>(scratch + at.coefficients);
  g.fault_words = fault_words();
  g.slices = slices_of(p, geometry_of(p));
  g.has_pieces = !(p.flags & kLazyAdamGradByRow);
  g.padding = p.padding_idx < 0 ? kNoRow : static_cast<uint32_t>(p.padding_idx);
  return g;
}

AdamRows rows_of(const LazyAdamStep& p, const int32_t* is_bad) {
  AdamRows r;
  r.table = adam_table(p), r.formula = adam_formula(p);
  r.grad = p.grad, r.grad_dtype = p.grad_dtype;
  r.is_by_row = p.flags & kLazyAdamGradByRow, r.skips_zero = p.flags & kLazyAdamSkipZero;
  r.row_steps = p.row_steps, r.padding = p.padding_idx < 0 ? kNoRow : static_cast<uint32_t>(p.padding_idx);
  r.is_bad = is_bad, r.per_column = 1.f / static_cast<float>(p.columns);
  r.sums =
      p.rows ? reinterpret_cast<float*>(p.scratch + lazy_adam_layout(p.touched, p.columns).sums) : nullptr;
  return r;
}

// ---- group -----------------------------------------------------------------------------------------------

int bits_of_rows(int64_t table_rows) {
  int bits = 1;
  while (table_rows > int64_t{1} << bits) ++bits;
  return bits;
}

template <int kItems>
int sort_by_block(const Groups& g, const AdamFormula& formula, void* stream) {
  const int bits = bits_of_rows(g.table_rows), passes = static_cast<int>(ceil_div(bits, kBlockDigit));
  return launch("lazy_adam sort_block", sort_block_kernel<kItems>, 2, kBlockThreads,
                BlockMemory<kItems>::kBytes, stream, g, formula, passes,
                static_cast<int>(ceil_div(bits, passes)));
}

template <int kItems>
int sort_by_tiles(const LazyAdamStep& p, const Groups& g, const AdamFormula& formula, void* stream) {
  const LazyAdamScratch at = lazy_adam_layout(p.touched, p.columns);
  const int all_bits = bits_of_rows(g.table_rows), passes = static_cast<int>(ceil_div(all_bits, kTileDigit));
  const int bits = static_cast<int>(ceil_div(all_bits, passes)), digits = 1 << bits;
  const int tiles = static_cast<int>(ceil_div(g.n, Tile<kTileThreads, kItems>::kSize));
  uint32_t* rows[2] = {g.row, reinterpret_cast<uint32_t*>(p.scratch + at.other_rows)};
  int32_t* positions[2] = {g.position, p.scratch + at.other_positions};
  SortPass pass = {};
  pass.tiles = tiles, pass.passes = passes, pass.tile_is_bad = p.scratch + at.tiles;
  pass.next_count = reinterpret_cast<uint32_t*>(p.scratch + at.counts);
  int error = 0;
  for (int i = 0; i < passes && error == 0; ++i) {
    const int to = (passes - 1 - i) % 2;  // the last pass ends in g
    pass.digit = {i * bits, bits};
    pass.is_first = i == 0, pass.is_last = i == passes - 1;
    pass.row = rows[1 - to], pass.position = positions[1 - to];
    pass.row_out = rows[to], pass.position_out = positions[to];
    pass.count = pass.next_count, pass.next_count = pass.count + int64_t{tiles + 1} * digits;
    if (pass.is_first)
      error = launch("lazy_adam count_digits", count_digits_kernel<kItems>, tiles + 1, kTileThreads, 0,
                     stream, pass, g, formula);
    if (error == 0)
      error = launch("lazy_adam scan_tiles", scan_tiles_kernel,
                     static_cast<unsigned>(ceil_div(digits, kWarp)), kBlockThreads, 0, stream, pass, g);
    if (error == 0)
      error = launch("lazy_adam scatter", scatter_kernel<kItems>, tiles, kTileThreads, 0, stream, pass, g);
  }
  if (error != 0 || !g.has_pieces) return error;
  return launch("lazy_adam list_pieces", list_pieces_kernel, place_blocks(g.n), kPlaceThreads, 0, stream, g);
}

int group(const LazyAdamStep& p, const int32_t* was_bad, void* stream) {
  const Groups g = groups_of(p, was_bad);
  const AdamFormula formula = adam_formula(p);
  if (g.n <= kBlockThreads) return sort_by_block<1>(g, formula, stream);
  if (g.n <= 4 * kBlockThreads) return sort_by_block<4>(g, formula, stream);
  if (g.n <= kSortedByBlock) return sort_by_block<kSortedByBlock / kBlockThreads>(g, formula, stream);
  if (g.n <= kSortedByFew) return sort_by_tiles<kFewItems>(p, g, formula, stream);
  return sort_by_tiles<kManyItems>(p, g, formula, stream);
}

// ---- update ----------------------------------------------------------------------------------------------

template <int kWidth>
int update_named_rows(const LazyAdamStep& p, const AdamRows& r, void* stream) {
  const Groups g = groups_of(p, nullptr);
  const Geometry geometry = geometry_of(p);
  const int64_t most = g.has_pieces ? ceil_div(most_pieces(g.n), geometry.places) : 0;
  const int piece_blocks = static_cast<int>(min(int64_t{kPieceBlocks}, most));
  const dim3 grid(static_cast<unsigned>(piece_blocks + ceil_div(g.n, geometry.places)),
                  static_cast<unsigned>(ceil_div(g.slices, geometry.slices)));
  const dim3 block(geometry.lanes * geometry.slices * geometry.places);
  const auto kernel = !takes_whole_rows(p) ? update_slices_kernel<kWidth>
                      : p.row_wise         ? update_rows_kernel<kWidth, true>
                                           : update_rows_kernel<kWidth, false>;
  const int error = launch("lazy_adam update", kernel, grid, block, 0, stream, r, g, geometry, piece_blocks);
  if (error != 0 || !p.row_steps || takes_whole_rows(p)) return error;
  return launch("lazy_adam count_rows", count_rows_kernel, place_blocks(g.n), kPlaceThreads, 0, stream, r, g);
}

template <int kWidth>
int update_table(const LazyAdamStep& p, const AdamRows& r, void* stream) {
  const auto kernel = p.row_wise ? update_table_kernel<kWidth, true> : update_table_kernel<kWidth, false>;
  const auto blocks = static_cast<unsigned>(ceil_div(p.table_rows, kUpdateThreads / kWarp));
  return launch("lazy_adam update_table", kernel, blocks, kUpdateThreads, 0, stream, r, p.table_rows);
}

int update(const LazyAdamStep& p, const int32_t* is_bad, void* stream) {
  if (p.table_rows == 0) return 0;  // any id is outside
  const AdamRows r = rows_of(p, is_bad);
  if (p.rows) return takes_four(p) ? update_named_rows<4>(p, r, stream) : update_named_rows<1>(p, r, stream);
  return takes_four(p) ? update_table<4>(p, r, stream) : update_table<1>(p, r, stream);
}

// All steps. `is_bad` becomes the address of whether an id was bad; null where none was
// looked at.
int start(const LazyAdamStep* steps, int64_t count, const int32_t** is_bad, void* stream) {
  int error = 0;
  for (int64_t i = 0; i < count && error == 0; ++i) {
    if (!steps[i].rows) continue;
    error = group(steps[i], *is_bad, stream);
    *is_bad = groups_of(steps[i], nullptr).is_bad;  // of all that are grouped so far
  }
  for (int64_t i = 0; i < count && error == 0; ++i)
    if (!is_empty(steps[i]) && !lazy_adam_is_dense(steps[i])) error = update(steps[i], *is_bad, stream);
  return error != 0 ? error : lazy_adam_dense(steps, count, *is_bad, stream);
}

}  // namespace

// ---- launcher --------------------------------------------------------------------------------------------

int lazy_adam_steps(const LazyAdamStep* steps, int64_t count, int64_t launch) {
  const int32_t* is_bad = nullptr;
  return start(steps, count, &is_bad, reinterpret_cast<void*>(launch));
}

// Counts are raised first, as kernels read the number of the step that they are taking, and lowered again
// where an id turned out to be bad.
int lazy_adam_next_steps(const LazyAdamStep* steps, int64_t count, int64_t launch) {
  void* stream = reinterpret_cast<void*>(launch);
  const int32_t* is_bad = nullptr;
  int error = lazy_adam_count(steps, count, 1.f, nullptr, stream);
  if (error == 0) error = start(steps, count, &is_bad, stream);
  if (error == 0 && is_bad) error = lazy_adam_count(steps, count, -1.f, is_bad, stream);
  return error;
}

}  // namespace fastbert::cuda
