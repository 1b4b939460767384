// c = a @ b + bias in float32, operands and result in float32 or bf16: the products of linear layers and of
// their gradients, for processors whose multipliers torch's libraries leave waiting.
//
// Columns of c are shared out to threads. A part of b is copied into panels as wide as a tile, and blocks of
// a into rows that L2 holds while the panels pass by, one of them in L1 (K. Goto, R. van de Geijn: Anatomy of
// high-performance matrix multiplication, 2008). Sums are taken over kDepth at a time and these added up in
// order, in float32 and in a place of their own, so neither tasks nor threads change a bit of the result.
#include "matmul.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

constexpr int64_t kColumns = kPanel * kLanes;         // of b in a panel
constexpr int64_t kDepth = kLanes == 16 ? 128 : 384;  // of a panel at a time: 12, 24 or 32 KB
constexpr int64_t kRows = 96;                         // of a at a time: 150 KB
constexpr int64_t kWidth = 384;                       // columns of a task, at most
constexpr int64_t kResident = 1536;                   // depth of b that is packed at a time
constexpr int64_t kChunk = 2048;  // rows whose sums are kept for that, where b is deeper than kResident
constexpr int64_t kLeast = 96;    // columns of a task, at least, where its rows can be split instead
static_assert(kResident % kDepth == 0 && kDepth % kLanes == 0, "a piece of the depth is packed whole");

struct Range {
  int64_t begin, end;
  FASTBERT_MEMBER int64_t size() const { return end - begin; }
};

// Part i of `count` parts of [0, n), as even as can be in multiples of `multiple`.
FASTBERT_INLINE Range part(int64_t n, int64_t count, int64_t multiple, int64_t i) {
  const int64_t blocks = ceil_div(n, multiple);
  return {min(n, blocks * i / count * multiple), min(n, blocks * (i + 1) / count * multiple)};
}

template <typename Body>
FASTBERT_INLINE void for_type(DType dtype, const void* data, Body body) {
  if (dtype == DType::bf16)
    body(static_cast<const bf16*>(data));
  else
    body(static_cast<const float*>(data));
}

// ---- packing
// ------------------------------------------------------------------------------------------------

// b[depth, columns] -> panels [columns / kColumns][depth rounded up to lanes][kColumns], by a cache line's
// worth of rows at a time.
template <typename T>
static void pack_panels(const T* b, int64_t row, int64_t column, int64_t depth, int64_t columns,
                        uint32_t* panels) {
  constexpr int64_t kPiece = 16;
  uint32_t part[kLanes * kPiece];
  const int64_t panel_words = round_up(depth, kLanes) * kColumns;
  if (column == 1) {
    for (int64_t k = 0; k < depth; k += kPiece)
      for (int64_t j = 0; j < columns; j += kColumns)
        pack_rows<Floats>(b + k * row + j, row, min(kPiece, depth - k), min(kColumns, columns - j),
                          panels + j / kColumns * panel_words + k * kColumns, kColumns);
    return;
  }
  for (int64_t j = 0; j < columns; j += kColumns, b += kColumns * column, panels += panel_words)
    for (int64_t k = 0; k < depth; k += kPiece) {
      // The next panel's rows are too far from these for the processor to foresee them.
      for (int64_t i = kColumns; i < min(2 * kColumns, columns - j); ++i)
        __builtin_prefetch(b + i * column + k, 0, 2);
      const int64_t some = min(kPiece, depth - k);
      pack_columns<Floats>(b + k, column, min(kColumns, columns - j), some, panels + k * kColumns, kColumns,
                           round_up(some, kLanes), part);
    }
}

static void pack_right(const LinearProduct& p, Range depth, Range columns, uint32_t* panels) {
  for_type(p.b_dtype, p.b, [&](auto* b) FASTBERT_LAMBDA {
    pack_panels(b + depth.begin * p.b_row + columns.begin * p.b_column, p.b_row, p.b_column, depth.size(),
                columns.size(), panels);
  });
}

// a[rows, depth] as it lies in memory: rows along the depth, or transposed.
static Left pack_left(const LinearProduct& p, Range rows, Range depth, uint32_t* target) {
  const bool along = p.a_column == 1;
  const int64_t row = row_of(along ? depth.size() : rows.size());
  for_type(p.a_dtype, p.a, [&](auto* a) FASTBERT_LAMBDA {
    a += rows.begin * p.a_row + depth.begin * p.a_column;
    if (along)
      pack_rows<Floats>(a, p.a_row, rows.size(), depth.size(), target, row);
    else
      pack_rows<Floats>(a, p.a_column, depth.size(), rows.size(), target, row);
  });
  return along ? Left{target, row, 1} : Left{target, 1, row};
}

// ---- one task
// -----------------------------------------------------------------------------------------------

template <typename T, typename Bias>
FASTBERT_INLINE void store_sums(const LinearProduct& p, Range rows, Range columns, const float* sums,
                                int64_t row, const Bias* bias) {
  const auto store_columns = [&](T* target, const float* source, int64_t j, auto lanes) FASTBERT_LAMBDA {
    vfloat sum = load(source + j);
    if (bias) sum += lanes.load(bias + columns.begin + j);
    lanes.store(target + j, sum);
  };
  for (int64_t i = rows.begin; i < rows.end; ++i, sums += row) {
    T* target = static_cast<T*>(p.c) + i * p.columns + columns.begin;
    int64_t j = 0;
    for (; j + kLanes <= columns.size(); j += kLanes) store_columns(target, sums, j, AllLanes{});
    if (j < columns.size()) store_columns(target, sums, j, FirstLanes{columns.size() - j});
  }
}

// sums[rows, columns] (+)= left @ panels over `depth`; the next panel is asked for between tiles.
static void multiply_block(int64_t rows, int64_t columns, int64_t depth, Left left, const uint32_t* panel,
                           float* sums, int64_t row, bool add) {
  const int64_t words = round_up(depth, kLanes) * kColumns, quarter = words / 4;
  const int64_t tiles = max(1, rows / 6), portion = round_up(ceil_div(quarter, tiles), 16) * 4;
  for (int64_t j = 0; j < columns; j += kColumns, panel += words) {
    Ahead ahead;
    ahead.begin(j + kColumns < columns ? tiles : 0, portion);
    for (int64_t i = 0; i < 4; ++i) ahead.add(panel + words + i * quarter, portion, false);
    multiply<Floats>(rows, round_up(min(kColumns, columns - j), kLanes), depth, left, {panel, kColumns},
                     {sums + j, row}, add, ahead);
  }
}

static void run_task(const LinearProduct& p, Range rows, Range columns) {
  const bool resident = p.packed || p.depth <= kResident;
  const int64_t chunk = resident ? kRows : kChunk, width = round_up(columns.size(), kColumns);
  const int64_t row = row_of(width), all_columns = round_up(p.columns, kColumns);
  const int64_t left_words = max(kRows * row_of(kDepth), kDepth * row_of(kRows));
  const int64_t right_words = p.packed ? 0 : round_up(min(p.depth, kResident), kLanes) * width;
  const int64_t sum_words = min(chunk, rows.size()) * row;
  Scratch scratch(left_words + right_words + sum_words + 64);
  uint32_t *left = scratch.words(left_words), *right = scratch.words(right_words);
  float* sums = scratch.floats(sum_words);

  for (int64_t i0 = rows.begin; i0 < rows.end; i0 += chunk) {
    const Range chunk_rows{i0, min(rows.end, i0 + chunk)};
    for (int64_t k0 = 0; k0 < p.depth; k0 += kResident) {
      for (int64_t i = i0; i < chunk_rows.end; i += kRows) {
        const Range block{i, min(chunk_rows.end, i + kRows)};
        for (int64_t k = k0; k < min(p.depth, k0 + kResident); k += kDepth) {
          const Range depth{k, min(p.depth, k + kDepth)};
          const uint32_t* panels = right + (k - k0) * width;
          if (p.packed)
            panels = static_cast<const uint32_t*>(p.b) + k * all_columns +
                     columns.begin * round_up(depth.size(), kLanes);
          else if (i == (resident ? rows.begin : i0))
            pack_right(p, depth, columns, right + (k - k0) * width);
          multiply_block(block.size(), columns.size(), depth.size(), pack_left(p, block, depth, left), panels,
                         sums + (i - i0) * row, row, k > 0);
        }
      }
    }
    for_type(p.bias_dtype, p.bias, [&](auto* bias) FASTBERT_LAMBDA {
      if (p.c_dtype == DType::bf16)
        store_sums<bf16>(p, chunk_rows, columns, sums, row, bias);
      else
        store_sums<float>(p, chunk_rows, columns, sums, row, bias);
    });
  }
}

}  // namespace

// ---- launchers
// ---------------------------------------------------------------------------------------------------

int64_t linear_packed(int64_t depth, int64_t columns) {
  return round_up(columns, kColumns) * round_up(depth, kLanes);
}

void linear_pack(const LinearProduct& p) {
  const int64_t panels = ceil_div(p.columns, kColumns);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < panels; ++i)
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      const Range depth{k, min(p.depth, k + kDepth)};
      pack_right(p, depth, {i * kColumns, min(p.columns, (i + 1) * kColumns)},
                 static_cast<uint32_t*>(p.c) + (k * panels + i * round_up(depth.size(), kLanes)) * kColumns);
    }
}

void linear_product(const LinearProduct& p) {
  const int64_t across = p.threads * ceil_div(p.columns, p.threads * kWidth);
  const int64_t column_parts = min(across, ceil_div(p.columns, kLeast));
  const int64_t row_parts = min(ceil_div(across, column_parts), ceil_div(p.rows, kRows));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < column_parts * row_parts; ++task)
    run_task(p, part(p.rows, row_parts, 6, task % row_parts),
             part(p.columns, column_parts, kColumns, task / row_parts));
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
