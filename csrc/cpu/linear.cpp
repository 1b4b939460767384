// c = a @ b + bias, a [M, K], b [K, N], bias [N], c [M, N], in float32, operands and result in float32 or
// bf16: the products of linear layers, x [T, K] @ weight^T, and of their gradients, for processors whose
// multipliers torch's libraries leave waiting.
//
//   for a chunk of a's rows, for kResident of the depth                     linear_product
//     all threads copy that part of a into groups of kGroup rows            pack_left
//     for a task, columns of c (and rows, where columns are few)            run_task, by one thread
//       for a block of kRows rows, for kDepth of the depth                  packs b at the first block
//         for a panel of kColumns columns, for a group of rows              multiply_block, multiply_groups
//           for k of the depth: tile += a[group, k] * b[k, panel]           multiply_tile, in registers
//
// (K. Goto, R. van de Geijn: Anatomy of high-performance matrix multiplication, 2008.) A block of groups
// stays in L2 while the panels pass by, one of them in L1. Both lie in the order in which a tile reads them:
// six rows apart from each other arrive late from L2. Sums are taken over kDepth at a time and these added up
// in order, in float32, so neither tasks nor threads change a bit of the result; a bf16 c is rounded once, at
// the end.
//
// With 16 lanes, two threads and [4096, 768] @ [768, 3072]: all of a is one chunk and one kResident, 683
// groups in 6 pieces of the depth. Each of 8 tasks has 384 columns, 6 panels of 64, and all rows, 18 blocks
// of 40 groups; a panel of 128 x 64 floats, 32 KB, meets the 40 groups of a block, 120 KB, before the next
// one comes.
#include "matmul.h"
#include "packing.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

constexpr int64_t kColumns = kPanel * kLanes;         // columns of a panel of b
constexpr int64_t kGroup = 6;                         // rows of a group of a
constexpr int64_t kDepth = kLanes == 16 ? 128 : 384;  // depth of a panel: 12, 24 or 32 KB
constexpr int64_t kRows = 240;                        // rows of a block: 370 KB, with 16 lanes 120
constexpr int64_t kWidth = 384;                       // columns of a task, at most
constexpr int64_t kLeast = 96;        // columns or rows of a task, at least, where there is more than one
constexpr int64_t kResident = 768;    // depth of a and b that is packed at a time
constexpr int64_t kShared = 1 << 22;  // words of a chunk of a, and of its sums: 16 MB each, or kRows rows
static_assert(kResident % kDepth == 0 && kDepth % kLanes == 0, "a piece of the depth is packed whole");
static_assert(kRows % kGroup == 0 && kLeast % kGroup == 0, "blocks begin with a group");

struct Range {
  int64_t begin, end;
  FASTBERT_MEMBER int64_t size() const { return end - begin; }
};

// Share i of `count` of [0, n), as even as can be in multiples of `multiple`.
FASTBERT_INLINE Range share(int64_t n, int64_t count, int64_t multiple, int64_t i) {
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

// ---- packing -----------------------------------------------------------------------------------------

constexpr int64_t kPiece = 16;  // rows or columns of b packed at a time: a cache line of the other

// b[depth, columns] -> panels [columns / kColumns][depth rounded up to lanes][kColumns], its rows along the
// columns.
template <typename T>
static void pack_panels_by_rows(const T* b, int64_t row, int64_t depth, int64_t columns, uint32_t* panels) {
  const int64_t panel_words = round_up(depth, kLanes) * kColumns;
  for (int64_t k = 0; k < depth; k += kPiece)
    for (int64_t j = 0; j < columns; j += kColumns) {
      for (int64_t i = k + kPiece; i < min(depth, k + 2 * kPiece); ++i)
        __builtin_prefetch(b + i * row + j, 0, 2);
      pack_rows<Floats>(b + k * row + j, row, min(kPiece, depth - k), min(kColumns, columns - j),
                        panels + j / kColumns * panel_words + k * kColumns, kColumns);
    }
}

// The same, its rows along the depth.
template <typename T>
static void pack_panels_by_columns(const T* b, int64_t column, int64_t depth, int64_t columns,
                                   uint32_t* panels) {
  uint32_t part[kLanes * kPiece];
  const int64_t panel_words = round_up(depth, kLanes) * kColumns;
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

// Either; 0 behind the last column.
template <typename T>
static void pack_panels(const T* b, int64_t row, int64_t column, int64_t depth, int64_t columns,
                        uint32_t* panels) {
  const int64_t panel_words = round_up(depth, kLanes) * kColumns;
  if (columns % kColumns)
    memset(panels + columns / kColumns * panel_words, 0, panel_words * sizeof(uint32_t));
  if (column == 1)
    pack_panels_by_rows(b, row, depth, columns, panels);
  else
    pack_panels_by_columns(b, column, depth, columns, panels);
}

template <typename Arguments>
static void pack_right(const Arguments& p, Range depth, Range columns, uint32_t* panels) {
  for_type(p.b_dtype, p.b, [&](auto* b) FASTBERT_LAMBDA {
    pack_panels(b + depth.begin * p.b_row + columns.begin * p.b_column, p.b_row, p.b_column, depth.size(),
                columns.size(), panels);
  });
}

// Rows of a in groups [rows / kGroup][depth rounded up to lanes][kGroup], kDepth of them after the other.
struct Groups {
  uint32_t* words;
  int64_t rows;

  // Words from one to the next, which begins in another set of the cache.
  static int64_t stride(int64_t depth) { return kGroup * round_up(depth, kLanes) + 16; }
  static int64_t all(int64_t rows, int64_t depth) {
    return ceil_div(rows, kGroup) * (depth / kDepth * stride(kDepth) + stride(depth % kDepth));
  }
  // Depths are counted from the first that is packed.
  uint32_t* at(int64_t row, Range depth) const {
    return words + depth.begin / kDepth * ceil_div(rows, kGroup) * stride(kDepth) +
           row / kGroup * stride(depth.size());
  }
};

// a[rows, depth], its rows along the depth or transposed, and behind it rows up to `known` -> groups. A line
// behind each may be written as well.
template <typename T>
static void pack_groups(const T* a, int64_t row, int64_t column, int64_t rows, int64_t known, int64_t depth,
                        uint32_t* groups) {
  constexpr int64_t kPrefetchRows = 16, kLine = 64 / sizeof(T);
  const int64_t stride = Groups::stride(depth);
  uint32_t part[kLanes * kDepth];
  if (column == 1) {
    for (int64_t i = 0; i < rows; i += kGroup, groups += stride)
      pack_columns<Floats>(a + i * row, row, min(max(kGroup, kLanes), known - i), depth, groups, kGroup,
                           round_up(depth, kLanes), part);
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t i = 0; i < rows && k + kPrefetchRows < depth; i += kLine)
      __builtin_prefetch(a + (k + kPrefetchRows) * column + i, 0, 3);
    pack_rows<Floats>(a + k * column, 0, 1, rows, part, 0);
    for (int64_t i = 0; i < rows; i += kGroup)
      memcpy(groups + i / kGroup * stride + k * kGroup, part + i, kGroup * sizeof(uint32_t));
  }
}

// ---- one task ----------------------------------------------------------------------------------------

// c[rows, kColumns] (+)= groups @ panel + bias. The next rows of c are prefetched before a tile, the next
// panel after it.
static void multiply_groups(int64_t rows, int64_t depth, const uint32_t* groups, const uint32_t* panel,
                            Result c, bool add, const float* bias, Ahead& ahead) {
  for (int64_t i = 0; i < rows; i += kGroup, groups += Groups::stride(depth), ahead.some()) {
    const auto step = [&](int64_t first, auto count) FASTBERT_LAMBDA {
      multiply_tile<Floats, count.value, kPanel>(depth, {groups + first, 1, kGroup}, {panel, kColumns},
                                                 {c.values + (i + first) * c.row, c.row}, add, bias);
    };
    const int64_t left = min(kGroup, rows - i);
    if (left == kGroup) {
      for (int64_t next = i + kGroup; next < min(rows, i + 2 * kGroup); ++next)
        __builtin_prefetch(c.values + next * c.row, 1, 3);
      step(0, Count<kGroup>{});
      continue;
    }
    if (left & 4) step(0, Count<4>{});
    if (left & 2) step(left & 4, Count<2>{});
    if (left & 1) step(left & 6, Count<1>{});
  }
}

// c[rows, columns] (+)= groups @ panels + bias, and nothing behind the last column.
static void multiply_block(int64_t rows, int64_t columns, int64_t depth, const uint32_t* groups,
                           const uint32_t* panel, Result c, bool add, const float* bias) {
  const int64_t words = round_up(depth, kLanes) * kColumns, quarter = words / 4,
                tiles = max(1, rows / kGroup);
  const int64_t portion = round_up(ceil_div(quarter, tiles), 16) * 4;
  for (int64_t j = 0; j < columns; j += kColumns, panel += words) {
    Ahead ahead;
    ahead.begin(j + kColumns < columns ? tiles : 0, portion);
    for (int64_t i = 0; i < 4; ++i) ahead.add(panel + words + i * quarter, portion, false);
    const float* some_bias = bias ? bias + j : nullptr;
    float* values = c.values + j;
    if (columns - j >= kColumns) {
      multiply_groups(rows, depth, groups, panel, {values, c.row}, add, some_bias, ahead);
      continue;
    }
    float edge[kRows * kColumns];
    const size_t size = (columns - j) * sizeof(float);
    for (int64_t i = 0; i < rows && add; ++i) memcpy(edge + i * kColumns, values + i * c.row, size);
    multiply_groups(rows, depth, groups, panel, {edge, kColumns}, add, some_bias, ahead);
    for (int64_t i = 0; i < rows; ++i) memcpy(values + i * c.row, edge + i * kColumns, size);
  }
}

// What all threads work on at a time: c[rows, :] (+)= a[rows, depth] @ b[depth, :].
struct Part {
  Range rows, depth;
  Groups groups;
  float* sums;  // [rows, columns rounded up to panels], where they are rounded after a later part; or null
};

static void pack_left(const LinearProduct& p, const Part& part, Range rows, Range depth) {
  const int64_t row = part.rows.begin + rows.begin;
  for_type(p.a_dtype, p.a, [&](auto* a) FASTBERT_LAMBDA {
    pack_groups(a + row * p.a_row + (part.depth.begin + depth.begin) * p.a_column, p.a_row, p.a_column,
                rows.size(), p.rows - row, depth.size(), part.groups.at(rows.begin, depth));
  });
}

// What a task works in: its rows and columns of a part, counted from the part's first row.
struct Task {
  Range rows, columns;
  int64_t width;     // columns rounded up to panels
  uint32_t* panels;  // [depth of the part, width], unless b is packed
  float* bias;       // [width] float32; null where it is not added, or not yet
  // Sums stand in c itself where it is float32; in `part.sums`, or here, where they are rounded later.
  float* sums;  // [kRows, sum_row]
  int64_t sum_row;
};

// The bias of columns, in float32, 0 behind the last.
static void read_bias(const LinearProduct& p, Range columns, int64_t width, float* bias) {
  for_type(p.bias_dtype, p.bias, [&](auto* values) FASTBERT_LAMBDA {
    memset(bias, 0, width * sizeof(float));
    pack_rows<Floats>(values + columns.begin, 0, 1, columns.size(), reinterpret_cast<uint32_t*>(bias), 0);
  });
}

static Task allocate_task(const LinearProduct& p, const Part& part, Range rows, Range columns) {
  const bool rounded = p.c_dtype == DType::bf16, last = part.depth.end == p.depth;
  const int64_t width = round_up(columns.size(), kColumns);
  const int64_t row = !rounded ? p.columns : part.sums ? round_up(p.columns, kColumns) : row_of(width);
  const int64_t panel_words = p.packed ? 0 : round_up(part.depth.size(), kLanes) * width;
  const int64_t sum_words = rounded && !part.sums ? min(kRows, rows.size()) * row : 0;
  Scratch scratch(panel_words + sum_words + width + 64);
  Task task{rows, columns, width, scratch.words(panel_words), nullptr, scratch.floats(sum_words), row};
  if (p.bias && last) read_bias(p, columns, width, task.bias = scratch.floats(width));
  return task;
}

// Panels of the task's columns of b over some of the part's depth; packed here, unless they are already.
static const uint32_t* panels_of(const LinearProduct& p, const Part& part, const Task& task, Range depth,
                                 bool pack) {
  const Range all{part.depth.begin + depth.begin, part.depth.begin + depth.end};
  if (p.packed)
    return static_cast<const uint32_t*>(p.b) + all.begin * round_up(p.columns, kColumns) +
           task.columns.begin * round_up(depth.size(), kLanes);
  uint32_t* panels = task.panels + depth.begin * task.width;
  if (pack) pack_right(p, all, task.columns, panels);
  return panels;
}

static void run_task(const LinearProduct& p, const Part& part, Range rows, Range columns) {
  const bool rounded = p.c_dtype == DType::bf16;
  const Task task = allocate_task(p, part, rows, columns);
  for (int64_t i = rows.begin; i < rows.end; i += kRows) {
    const int64_t block = min(kRows, rows.end - i), place = (part.rows.begin + i) * p.columns + columns.begin;
    float* target = !rounded    ? static_cast<float*>(p.c) + place
                    : part.sums ? part.sums + i * task.sum_row + columns.begin
                                : task.sums;
    for (int64_t k = 0; k < part.depth.size(); k += kDepth) {
      const Range depth{k, min(part.depth.size(), k + kDepth)};
      const bool first = part.depth.begin + k == 0, last = part.depth.begin + depth.end == p.depth;
      const uint32_t* panels = panels_of(p, part, task, depth, i == rows.begin);
      multiply_block(block, rounded ? task.width : columns.size(), depth.size(), part.groups.at(i, depth),
                     panels, {target, task.sum_row}, !first, last ? task.bias : nullptr);
    }
    if (rounded && part.depth.end == p.depth)
      for (int64_t j = 0; j < block; ++j)
        store_row(static_cast<bf16*>(p.c) + place + j * p.columns, target + j * task.sum_row, columns.size(),
                  1.f);
  }
}

// ---- all tasks ---------------------------------------------------------------------------------------

// How c is plan.
struct Plan {
  bool keeps_sums;       // from part to part, as c is rounded once
  int64_t chunk;         // rows of a part
  int64_t across;        // tasks that there should be for each chunk
  int64_t column_parts;  // of which so many beside each other
};

static Plan plan_product(const LinearProduct& p) {
  const bool keeps_sums = p.c_dtype == DType::bf16 && p.depth > kResident;
  const int64_t words = max(Groups::stride(min(p.depth, kResident)) / kGroup,
                            keeps_sums ? round_up(p.columns, kColumns) : 0);  // for a row
  const int64_t across = p.launch * ceil_div(p.columns, p.launch * kWidth);
  return {keeps_sums, max(1, kShared / words / kRows) * kRows, across,
          min(across, ceil_div(p.columns, kLeast))};
}

static void run_part(const LinearProduct& p, const Plan& plan, const Part& part) {
  const int64_t blocks = ceil_div(part.rows.size(), kLeast), pieces = ceil_div(part.depth.size(), kDepth);
  const int64_t row_parts = min(ceil_div(plan.across, plan.column_parts), blocks);
#pragma omp parallel num_threads(p.launch)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks * pieces; ++i) {
      const int64_t row = i % blocks * kLeast, first = i / blocks * kDepth;
      pack_left(p, part, {row, min(part.rows.size(), row + kLeast)},
                {first, min(part.depth.size(), first + kDepth)});
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan.column_parts * row_parts; ++i)
      run_task(p, part, share(part.rows.size(), row_parts, kGroup, i % row_parts),
               share(p.columns, plan.column_parts, kColumns, i / row_parts));
  }
}

}  // namespace

// ---- launchers ---------------------------------------------------------------------------------------

int64_t linear_packed(int64_t depth, int64_t columns) {
  return round_up(columns, kColumns) * round_up(depth, kLanes);
}

void linear_pack(const LinearPack& p) {
  const int64_t panels = ceil_div(p.columns, kColumns);
#pragma omp parallel for num_threads(p.launch) schedule(static)
  for (int64_t i = 0; i < panels; ++i)
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      const Range depth{k, min(p.depth, k + kDepth)};
      pack_right(
          p, depth, {i * kColumns, min(p.columns, (i + 1) * kColumns)},
          static_cast<uint32_t*>(p.packed) + (k * panels + i * round_up(depth.size(), kLanes)) * kColumns);
    }
}

void linear_product(const LinearProduct& p) {
  const Plan plan = plan_product(p);
  const int64_t rows_at_most = min(plan.chunk, p.rows);
  const int64_t group_words = Groups::all(rows_at_most, min(p.depth, kResident));
  const int64_t sum_words = plan.keeps_sums ? rows_at_most * round_up(p.columns, kColumns) : 0;
  CallScratch scratch(group_words + sum_words + 16);
  uint32_t* groups = scratch.words(group_words);
  float* sums = plan.keeps_sums ? scratch.floats(sum_words) : nullptr;
  for (int64_t i = 0; i < p.rows; i += plan.chunk)
    for (int64_t k = 0; k < p.depth; k += kResident) {
      const Range rows{i, min(p.rows, i + plan.chunk)}, depth{k, min(p.depth, k + kResident)};
      run_part(p, plan, {rows, depth, {groups, rows.size()}, sums});
    }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
