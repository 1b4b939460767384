// Small matrix products out of L1 and L2, of packed operands: C[m, n] (+)= sum over k of A[m, k] * B[k, n].
//
//   for a panel of C's columns             up to kPanel vectors, all about as wide           multiply
//     for a tile of its rows               as many as leave registers for A and B            multiply_rows
//       for k                              C stays in registers over the whole sum           multiply_tile
//         for rows i, for vectors j        A[i, k] broadcast, B[k, j] a vector
//           sum[i][j] += A[i, k] * B[k, j]
//
// With 16 lanes the scores of 48 queries and 128 keys of 64 floats are two panels of 4 vectors, each of 8
// tiles of 6 rows: 24 registers hold sums, 4 a row of B and one a word of A, through 64 steps.
//
// Operands are 32-bit words: a float, or two bf16 that are neighbours along the summed index and go through
// the dot product instruction of AVX-512-BF16. With AMX, whole tiles of 16 x 16 words are multiplied at a
// time.
#pragma once
#include "amx.h"
#include "load_store.h"
#include "transpose.h"

namespace fastbert {
namespace FASTBERT_ISA {

// ---- words -------------------------------------------------------------------------------------------

struct Floats {
  static constexpr int kDepth = 1;  // summed elements in a word
  FASTBERT_INLINE vfloat fma(vfloat c, vuint a, vuint b) { return c + as_float(a) * as_float(b); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kDepth = 2;
  FASTBERT_INLINE vfloat fma(vfloat c, vuint a, vuint b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }

  // Rows `low` and `high` rounded to bf16, one behind the other.
  FASTBERT_INLINE vuint round(vfloat low, vfloat high) {
    return (vuint)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }

  // The same with each column's two elements side by side: words to be summed over two rows.
  FASTBERT_INLINE vuint join(vuint rows) {
    alignas(64) static const uint16_t kSideBySide[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vuint)_mm512_maskz_permutexvar_epi16(0xFFFFFFFF, _mm512_load_si512(kSideBySide), (__m512i)rows);
  }
};
#endif

// ---- tiles -------------------------------------------------------------------------------------------

constexpr int kPanel = kLanes == 16 ? 4 : 2;  // vectors of a panel: there are 32 or 16 registers

// A[m, k] stands at words[m * row + k * step].
struct Left {
  const uint32_t* words;
  int64_t row, step;
};

// B[k, n] and C[m, n] stand at their row, contiguous along n.
struct Right {
  const uint32_t* words;
  int64_t row;
};

struct Result {
  float* values;
  int64_t row;
};

constexpr int kUnrolled = kLanes == 8 ? 4 : 1;  // steps of k together; with 16 lanes it made no difference

// One tile of C, kept in registers over the whole sum; `bias` is added to every row, or is null.
template <typename Words, int rows, int vectors>
FASTBERT_INLINE void multiply_tile(int64_t depth, Left a, Right b, Result c, bool add,
                                   const float* bias = nullptr) {
  vfloat sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = vfloat{};
#pragma GCC unroll kUnrolled
  for (int64_t k = 0; k < depth; ++k) {
    vuint right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) memcpy(&right[j], b.words + k * b.row + j * kLanes, sizeof(vuint));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const vuint left = splat(a.words[i * a.row + k * a.step]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = Words::fma(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* place = c.values + i * c.row + j * kLanes;
      vfloat value = add ? load(place) + sum[i][j] : sum[i][j];
      if (bias) value += load(bias + j * kLanes);
      store(place, value);
    }
}

// ---- prefetch ----------------------------------------------------------------------------------------

// Rows that will be read or written soon, prefetched between tiles, where memory has nothing to do: a few
// after each, as a core waits for some 24 lines at a time and is held up by more.
class Ahead {
 public:
  void begin(int64_t rows, int64_t bytes) { count_ = array_ = 0, row_ = 0, rows_ = rows, bytes_ = bytes; }

  // One of kAtOnce or kArrays; `stride` bytes from row to row.
  void add(const void* first, int64_t stride, bool written) {
    arrays_[count_++] = {static_cast<const char*>(first), stride, written};
  }

  FASTBERT_MEMBER void some() {
    for (int turn = 0; turn < kTurns && row_ < rows_; ++turn) {
      for (int i = 0; i < kAtOnce; ++i) prefetch_row(arrays_[array_ + i]);
      array_ += kAtOnce;
      if (array_ == count_) array_ = 0, ++row_;
    }
  }

 private:
  static constexpr int kArrays = 8, kAtOnce = 4, kTurns = kLanes == 16 ? 2 : 1;
  struct Array {
    const char* first;
    int64_t stride;
    bool written;
  } arrays_[kArrays];

  FASTBERT_MEMBER void prefetch_row(const Array& array) const {
    const char* row = array.first + row_ * array.stride;
    for (int64_t b = 0; b < bytes_; b += 64) {
      if (array.written)
        __builtin_prefetch(row + b, 1, 2);
      else
        __builtin_prefetch(row + b, 0, 2);
    }
  }

  int count_ = 0, array_ = 0;  // this array and row come next
  int64_t row_ = 0, rows_ = 0, bytes_ = 0;
};

// ---- panels and products -----------------------------------------------------------------------------

template <typename Words, int vectors>
static void multiply_rows(int64_t m, int64_t depth, Left a, Right b, Result c, bool add, Ahead& ahead) {
  constexpr int most = vectors == 4 ? 6 : vectors == 3 ? 8 : kLanes == 16 ? 12 : vectors == 2 ? 6 : 8;
  int64_t i = 0;
  const auto step = [&](auto rows) FASTBERT_LAMBDA {
    const Left left{a.words + i * a.row, a.row, a.step};
    multiply_tile<Words, rows.value, vectors>(depth, left, b, Result{c.values + i * c.row, c.row}, add);
    i += rows.value;
  };
  while (m - i >= most) step(Count<most>{}), ahead.some();
  while (m - i >= 4) step(Count<4>{});
  if (m - i >= 2) step(Count<2>{});
  if (m - i >= 1) step(Count<1>{});
}

#if defined(__AMX_BF16__)
// body(Count<0>{}), body(Count<1>{}), ...
template <int count, typename Body>
FASTBERT_INLINE void for_each(Body body) {
  if constexpr (count > 0) for_each<count - 1>(body), body(Count<count - 1>{});
}

// One row of tiles of C, in registers over the whole sum; depth is a multiple of kTile.
template <int vectors>
FASTBERT_INLINE void multiply_tiles(int64_t depth, Left a, Right b, Result c, bool add) {
  constexpr int kLeft = vectors, kRight = vectors + 1;  // behind the tiles of C
  for_each<vectors>([&](auto j) FASTBERT_LAMBDA {
    if (add)
      tile_load<j.value>(c.values + j.value * kTile, c.row);
    else
      tile_zero<j.value>();
  });
  for (int64_t k = 0; k < depth; k += kTile) {
    if (a.step == 1) {
      tile_load<kLeft>(a.words + k, a.row);
    } else {
      alignas(64) uint32_t square[kTile * kTile];
      transpose(a.words + k * a.step, a.step, square, kTile);
      tile_load<kLeft>(square, kTile);
    }
    for_each<vectors>([&](auto j) FASTBERT_LAMBDA {
      constexpr int right = kRight + j.value % (8 - kRight);
      tile_load<right>(b.words + k * b.row + j.value * kTile, b.row);
      tile_multiply<j.value, kLeft, right>();
    });
  }
  for_each<vectors>([&](auto j) FASTBERT_LAMBDA { tile_store<j.value>(c.values + j.value * kTile, c.row); });
}
#endif

// What fills no tile, of the rows or of the depth, goes through vectors. Tasks begin at multiples of kTile,
// so which rows those are follows from the length of the sequence alone, and with it every bit of the result.
template <typename Words, int vectors>
static void multiply_panel(int64_t m, int64_t depth, Left a, Right b, Result c, bool add, Ahead& ahead) {
#if defined(__AMX_BF16__)
  const int64_t rows = m - m % kTile, words = depth - depth % kTile;
  if (Words::kDepth == 2 && rows > 0 && words > 0) {
    for (int64_t i = 0; i < rows; i += kTile, ahead.some())
      multiply_tiles<vectors>(words, {a.words + i * a.row, a.row, a.step}, b, {c.values + i * c.row, c.row},
                              add);
    if (words < depth)
      multiply_rows<Words, vectors>(rows, depth - words, {a.words + words * a.step, a.row, a.step},
                                    {b.words + words * b.row, b.row}, c, true, ahead);
    m -= rows, a.words += rows * a.row, c.values += rows * c.row;
  }
#endif
  multiply_rows<Words, vectors>(m, depth, a, b, c, add, ahead);
}

// n is a multiple of kLanes; depth counts words. Panels of at most kPanel vectors, as even as can be.
template <typename Words>
static void multiply(int64_t m, int64_t n, int64_t depth, Left a, Right b, Result c, bool add, Ahead& ahead) {
  const int64_t vectors = n / kLanes, panels = ceil_div(vectors, kPanel);
  for (int64_t panel = 0, j = 0; panel < panels; ++panel) {
    const int64_t width = (vectors - j) / (panels - panel) + ((vectors - j) % (panels - panel) != 0);
    const Right right{b.words + j * kLanes, b.row};
    const Result result{c.values + j * kLanes, c.row};
    switch (width) {
      case 1:
        multiply_panel<Words, 1>(m, depth, a, right, result, add, ahead);
        break;
      case 2:
        multiply_panel<Words, 2>(m, depth, a, right, result, add, ahead);
        break;
#if defined(__AVX512F__)
      case 3:
        multiply_panel<Words, 3>(m, depth, a, right, result, add, ahead);
        break;
      case 4:
        multiply_panel<Words, 4>(m, depth, a, right, result, add, ahead);
        break;
#endif
    }
    j += width;
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
