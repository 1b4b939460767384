// c = a @ b + bias in float32, operands and result in float32 or bf16: the products of linear layers and of
// their gradients, for processors whose multipliers torch's libraries leave waiting.
//
// K. Goto, R. van de Geijn: Anatomy of high-performance matrix multiplication, 2008. Rows of a are copied
// into groups as high as a tile, once and by all threads; then each takes columns of c and copies its part of
// b into panels as wide as a tile. A block of groups stays in L2 while the panels pass by, one of them in L1.
// Both lie in the order in which a tile reads them: six rows apart from each other arrive late from L2. Sums
// are taken over kDepth at a time and these added up in order, in float32, so neither tasks nor threads
// change a bit of the result.
#include "matmul.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

constexpr int64_t kColumns = kPanel * kLanes;         // of b in a panel
constexpr int64_t kGroup = 6;                         // rows of a in a group
constexpr int64_t kDepth = kLanes == 16 ? 128 : 384;  // of a panel at a time: 12, 24 or 32 KB
constexpr int64_t kRows = 240;                        // of a block at a time: 370 KB, with 16 lanes 120
constexpr int64_t kWidth = 384;                       // columns of a task, at most
constexpr int64_t kLeast = 96;        // columns or rows of a task, at least, where there is more than one
constexpr int64_t kResident = 768;    // depth of a and b that is packed at a time
constexpr int64_t kShared = 1 << 22;  // words of a, and of sums, at a time: 16 MB each, or kRows rows
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

// b[depth, columns] -> panels [columns / kColumns][depth rounded up to lanes][kColumns], by a cache line's
// worth of rows at a time; 0 behind the last column.
template <typename T>
static void pack_panels(const T* b, int64_t row, int64_t column, int64_t depth, int64_t columns,
                        uint32_t* panels) {
  constexpr int64_t kPiece = 16;
  uint32_t part[kLanes * kPiece];
  const int64_t panel_words = round_up(depth, kLanes) * kColumns;
  if (columns % kColumns)
    memset(panels + columns / kColumns * panel_words, 0, panel_words * sizeof(uint32_t));
  if (column == 1) {
    for (int64_t k = 0; k < depth; k += kPiece)
      for (int64_t j = 0; j < columns; j += kColumns) {
        for (int64_t i = k + kPiece; i < min(depth, k + 2 * kPiece); ++i)
          __builtin_prefetch(b + i * row + j, 0, 2);
        pack_rows<Floats>(b + k * row + j, row, min(kPiece, depth - k), min(kColumns, columns - j),
                          panels + j / kColumns * panel_words + k * kColumns, kColumns);
      }
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

// Rows and columns of a part. Sums stand in c itself where it is float32.
static void run_task(const LinearProduct& p, const Part& part, Range rows, Range columns) {
  const bool rounded = p.c_dtype == DType::bf16, last = part.depth.end == p.depth;
  const int64_t width = round_up(columns.size(), kColumns), all_columns = round_up(p.columns, kColumns);
  const int64_t row = !rounded ? p.columns : part.sums ? all_columns : row_of(width);
  const int64_t right_words = p.packed ? 0 : round_up(part.depth.size(), kLanes) * width;
  const int64_t sum_words = rounded && !part.sums ? min(kRows, rows.size()) * row : 0;
  Scratch scratch(right_words + sum_words + width + 64);
  uint32_t* right = scratch.words(right_words);
  float *sums = scratch.floats(sum_words), *bias = nullptr;
  for_type(p.bias_dtype, p.bias, [&](auto* values) FASTBERT_LAMBDA {
    if (!values || !last) return;
    bias = scratch.floats(width);
    memset(bias, 0, width * sizeof(float));
    pack_rows<Floats>(values + columns.begin, 0, 1, columns.size(), reinterpret_cast<uint32_t*>(bias), 0);
  });

  for (int64_t i = rows.begin; i < rows.end; i += kRows) {
    const int64_t block = min(kRows, rows.end - i), place = (part.rows.begin + i) * p.columns + columns.begin;
    float* target = !rounded    ? static_cast<float*>(p.c) + place
                    : part.sums ? part.sums + i * row + columns.begin
                                : sums;
    for (int64_t k = 0; k < part.depth.size(); k += kDepth) {
      const Range depth{k, min(part.depth.size(), k + kDepth)};
      const Range all{part.depth.begin + k, part.depth.begin + depth.end};
      const uint32_t* panels = right + k * width;
      if (p.packed)
        panels = static_cast<const uint32_t*>(p.b) + all.begin * all_columns +
                 columns.begin * round_up(depth.size(), kLanes);
      else if (i == rows.begin)
        pack_right(p, all, columns, right + k * width);
      multiply_block(block, rounded ? width : columns.size(), depth.size(), part.groups.at(i, depth), panels,
                     {target, row}, all.begin > 0, all.end == p.depth ? bias : nullptr);
    }
    if (rounded && last)
      for (int64_t j = 0; j < block; ++j)
        store_row(static_cast<bf16*>(p.c) + place + j * p.columns, target + j * row, columns.size(), 1.f);
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
  const int64_t deep = min(p.depth, kResident), wide = round_up(p.columns, kColumns);
  const bool keep = p.c_dtype == DType::bf16 && p.depth > kResident;
  const int64_t words = max(Groups::stride(deep) / kGroup, keep ? wide : 0);  // for a row
  const int64_t chunk = max(1, kShared / words / kRows) * kRows;
  const int64_t across = p.launch * ceil_div(p.columns, p.launch * kWidth);
  const int64_t column_parts = min(across, ceil_div(p.columns, kLeast));
  const int64_t group_words = Groups::all(min(chunk, p.rows), deep);
  const int64_t sum_words = keep ? min(chunk, p.rows) * wide : 0;
  CallScratch scratch(group_words + sum_words + 16);
  uint32_t* groups = scratch.words(group_words);
  float* sums = scratch.floats(sum_words);
  for (int64_t i = 0; i < p.rows; i += chunk)
    for (int64_t k = 0; k < p.depth; k += kResident) {
      const Range rows{i, min(p.rows, i + chunk)}, depth{k, min(p.depth, k + kResident)};
      const Part part{rows, depth, {groups, rows.size()}, keep ? sums : nullptr};
      const int64_t row_parts = min(ceil_div(across, column_parts), ceil_div(rows.size(), kLeast));
      const int64_t blocks = ceil_div(rows.size(), kLeast), pieces = ceil_div(depth.size(), kDepth);
#pragma omp parallel num_threads(p.launch)
      {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < blocks * pieces; ++task) {
          const int64_t row = task % blocks * kLeast, first = task / blocks * kDepth;
          pack_left(p, part, {row, min(rows.size(), row + kLeast)},
                    {first, min(depth.size(), first + kDepth)});
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < column_parts * row_parts; ++task)
          run_task(p, part, share(rows.size(), row_parts, kGroup, task % row_parts),
                   share(p.columns, column_parts, kColumns, task / row_parts));
      }
    }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
