// Dropout's random numbers in vectors: Philox4x32-7 for neighbouring counters, and what of it is kept.
//
// Counters (first, c1, c2, c3), (first + 1, c1, c2, c3), ... give 16 bytes each, read as lanes of one byte or
// two; c1 is the row. Over the first three of seven rounds the row reaches only half of the words, and there
// as exclusive or's: the other half and all that stands beside it are computed once for many rows
// (`DropoutColumns`), the row's own part is one number (`dropout_row`). So a row costs 9 multiplications for
// kLanes / 2 counters instead of 14.
#pragma once
#include "../philox.h"
#include "load_store.h"

namespace fastbert {
namespace FASTBERT_ISA {

typedef uint64_t vulong __attribute__((vector_size(kLanes * 4)));  // kLanes / 2 wide numbers

// A lane is a uint16_t, or a uint8_t in attention.
template <typename Lane>
constexpr int kCounterLanes = 16 / sizeof(Lane);  // of one counter

template <typename Lane>
constexpr int kDropoutBlock = kLanes / 2 * kCounterLanes<Lane>;  // lanes drawn at a time

FASTBERT_INLINE vulong multiply_wide(vulong a, uint32_t b) {  // low words of a, times b, in full
#if defined(__AVX512F__)
  return (vulong)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vulong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (vulong)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// What a round makes of a product and of what stands beside it: the next counter's word in the low half, as
// the other multiplication wants it, and rubbish in the upper one, which multiply_wide never reads.
FASTBERT_INLINE vulong mix(vulong product, vulong beside, uint32_t key) {
#if defined(__AVX512F__)  // GCC would overwrite the key, and copy it first
  return (vulong)_mm512_ternarylogic_epi64((__m512i)(product >> 32), (__m512i)beside, _mm512_set1_epi64(key),
                                           0x96);
#else
  return (product >> 32) ^ (beside ^ static_cast<uint64_t>(key));  // these two need not wait for the product
#endif
}

// The same in the last round, where the product's low word follows it in the upper half.
FASTBERT_INLINE vulong last_mix(vulong product, vulong beside, uint32_t key) {
  const vulong turned = product >> 32 | product << 32;
#if defined(__AVX512F__)
  return (vulong)_mm512_mask_ternarylogic_epi32((__m512i)turned, 0x5555, (__m512i)beside,
                                                _mm512_set1_epi32(key), 0x96);
#else
  return turned ^ ((beside ^ static_cast<uint64_t>(key)) & 0xFFFFFFFFull);
#endif
}

// A block of counters ahead of the third round's meeting with its row.
struct DropoutColumns {
  vulong mixed, b, c, d;
};

// The row's part in it.
FASTBERT_INLINE uint64_t dropout_row(uint64_t seed, uint32_t c1, uint32_t c2) {
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
  return static_cast<uint64_t>(kPhiloxM0) *
         (static_cast<uint32_t>(p1 >> 32) ^ c1 ^ static_cast<uint32_t>(seed));
}

FASTBERT_INLINE DropoutColumns dropout_columns(uint64_t seed, uint32_t first, uint32_t c2, uint32_t c3) {
  constexpr int width = kLanes / 2;
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  vulong place;  // even places ahead of odd ones, so that `drawn` has them in order
  for (int i = 0; i < width; ++i) place[i] = i / 2 + i % 2 * (width / 2);
  const vulong p0 = multiply_wide(place + static_cast<uint64_t>(first), kPhiloxM0);
  const vulong beside = static_cast<uint64_t>(kPhiloxM1 * c2) - vulong{};
  const vulong p1 = multiply_wide(mix(p0, c3 - vulong{}, k1), kPhiloxM1);
  const vulong p2 = multiply_wide(mix(p1, beside, k0 + kPhiloxW0), kPhiloxM0);
  return {p0 ^ static_cast<uint64_t>(k1 + kPhiloxW1), p1 ^ static_cast<uint64_t>(k0 + 2 * kPhiloxW0),
          (p2 >> 32) ^ static_cast<uint64_t>(k1 + 2 * kPhiloxW1), p2};
}

// The lanes of kBlocks blocks in each of kRows rows, interleaved because one chain of multiplications leaves
// the multiplier idle. take(block, row, half, vector) gets the two vectors of each.
template <int kBlocks, int kRows, typename Take>
FASTBERT_INLINE void drawn(uint64_t seed, const DropoutColumns* columns, const uint64_t* rows, Take take) {
  constexpr int chains = kBlocks * kRows;
  vulong a[chains], b[chains], c[chains], d[chains];
  for (int i = 0; i < chains; ++i) {
    const DropoutColumns& block = columns[i / kRows];
    const uint64_t row = rows[i % kRows];
    b[i] = multiply_wide(block.mixed ^ (row >> 32), kPhiloxM1);
    a[i] = (b[i] >> 32) ^ block.b;
    c[i] = block.c ^ row;
    d[i] = block.d;
  }
  uint32_t k0 = static_cast<uint32_t>(seed) + 3 * kPhiloxW0;
  uint32_t k1 = static_cast<uint32_t>(seed >> 32) + 3 * kPhiloxW1;
  for (int round = 3; round < kPhiloxRounds - 1; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
    for (int i = 0; i < chains; ++i) {
      const vulong p0 = multiply_wide(a[i], kPhiloxM0), p1 = multiply_wide(c[i], kPhiloxM1);
      a[i] = mix(p1, b[i], k0), c[i] = mix(p0, d[i], k1);
      b[i] = p1, d[i] = p0;
    }
  for (int i = 0; i < chains; ++i) {
    const vulong first = last_mix(multiply_wide(c[i], kPhiloxM1), b[i], k0);   // words 0 and 1
    const vulong second = last_mix(multiply_wide(a[i], kPhiloxM0), d[i], k1);  // words 2 and 3
#if defined(__AVX512F__)
    take(i / kRows, i % kRows, 0, (vulong)_mm512_maskz_unpacklo_epi64(0xFF, (__m512i)first, (__m512i)second));
    take(i / kRows, i % kRows, 1, (vulong)_mm512_maskz_unpackhi_epi64(0xFF, (__m512i)first, (__m512i)second));
#elif defined(__AVX2__)
    take(i / kRows, i % kRows, 0, (vulong)_mm256_unpacklo_epi64((__m256i)first, (__m256i)second));
    take(i / kRows, i % kRows, 1, (vulong)_mm256_unpackhi_epi64((__m256i)first, (__m256i)second));
#else
    take(i / kRows, i % kRows, 0, vulong{first[0], second[0]});
    take(i / kRows, i % kRows, 1, vulong{first[1], second[1]});
#endif
  }
}

// Random 16-bit lanes for so many counters, in order; `counters * 8` of them, rounded up to a multiple of
// kDropoutBlock.
FASTBERT_INLINE void dropout_lanes(uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3,
                                   int64_t counters, uint16_t* lanes) {
  constexpr int width = kLanes / 2;
  const uint64_t row = dropout_row(seed, c1, c2);
  for (int64_t done = 0; done < counters; done += 2 * width) {
    DropoutColumns columns[2];
    for (int i = 0; i < 2; ++i)
      columns[i] = dropout_columns(seed, first + static_cast<uint32_t>(done + i * width), c2, c3);
    const int64_t left = counters - done;
    drawn<2, 1>(seed, columns, &row, [&](int block, int, int half, vulong random) FASTBERT_LAMBDA {
      if (block * width < left)
        memcpy(lanes + 8 * (done + block * width) + half * 2 * kLanes, &random, sizeof random);
    });
  }
}

// ---- what is kept ------------------------------------------------------------------------------------

// Of kLanes elements: AVX-512 has a bit for each, the others a lane of ones or zeros.
#if defined(__AVX512F__)
template <typename Lane>
using Kept = uint16_t;
constexpr int kKeptWords = 1;
#else
template <typename Lane>
using Kept = Lane;
constexpr int kKeptWords = kLanes;
#endif

// Where lane >= t; t >= 1.
template <typename Lane>
FASTBERT_INLINE void store_kept(Kept<Lane>* kept, vulong random, uint32_t t) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Lane) == 1) {
    const __m512i last_dropped = _mm512_set1_epi8(static_cast<char>(t - 1));
    const uint64_t mask = _mm512_cmpgt_epu8_mask((__m512i)random, last_dropped);
    memcpy(kept, &mask, sizeof mask);
  } else {
    const __m512i last_dropped = _mm512_set1_epi16(static_cast<int16_t>(t - 1));
    const uint32_t mask = _mm512_cmpgt_epu16_mask((__m512i)random, last_dropped);
    memcpy(kept, &mask, sizeof mask);
  }
#else
  typedef Lane vlanes __attribute__((vector_size(kLanes * 4)));
  const auto mask = (vlanes)random > static_cast<Lane>(t - 1);
  memcpy(kept, &mask, sizeof mask);
#endif
}

// v, of the row's elements from j on, a multiple of kLanes, where they are kept; 0 where they are dropped.
FASTBERT_INLINE vfloat drop(const uint16_t* kept, int64_t j, vfloat v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_mov_ps(kept[j / kLanes], (__m512)v);
#elif defined(__AVX2__)
  const __m256i twice = _mm256_setr_epi8(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7,  //
                                         8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 12, 13, 14, 15, 14, 15);
  return as_float(as_uint(v) & (vuint)spread(kept + j, twice));
#else
  return (vint)widen(kept + j) != 0 ? v : vfloat{};
#endif
}

#if !defined(__AVX512F__)
FASTBERT_INLINE vfloat drop(const uint8_t* kept, int64_t j, vfloat v) {
#if defined(__AVX2__)
  const __m256i mask = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kept + j)));
#elif defined(__x86_64__)
  int32_t bytes;
  memcpy(&bytes, kept + j, sizeof bytes);
  __m128i mask = _mm_cvtsi32_si128(bytes);
  mask = _mm_unpacklo_epi8(mask, mask);
  mask = _mm_unpacklo_epi16(mask, mask);
#else
  typedef int8_t vbytes __attribute__((vector_size(kLanes)));
  vbytes bytes;
  memcpy(&bytes, kept + j, sizeof bytes);
  const vint mask = __builtin_convertvector(bytes, vint);
#endif
  return as_float(as_uint(v) & (vuint)mask);
}
#endif

// Dropout of up to kColumns neighbours in many rows: which of them are kept in kRows rows at a time.
template <typename Lane, int kColumns, int kRows>
class DropoutMask {
 public:
  // `seed` is not read where nothing is dropped.
  FASTBERT_MEMBER DropoutMask(const int64_t* seed, uint32_t t, uint32_t c3)
      : seed_(t ? static_cast<uint64_t>(*seed) : 0), t_(t), c3_(c3) {}

  // The neighbours are those of counters (first, ., c2, c3) and after; free where they are the last call's.
  FASTBERT_MEMBER void at(uint32_t first, int64_t n, uint32_t c2) {
    const int64_t blocks = ceil_div(n, kBlock);
    if (first == first_ && blocks == blocks_ && c2 == c2_) return;
    first_ = first, blocks_ = blocks, c2_ = c2;
    for (int64_t i = 0; i < blocks; ++i)
      columns_[i] = dropout_columns(seed_, first + static_cast<uint32_t>(i * (kLanes / 2)), c2, c3_);
  }

  // Draws the n neighbours from place `from` on, a multiple of kBlock, for rows c1, c1 + 1, ...
  FASTBERT_MEMBER void draw(uint32_t c1, int64_t from, int64_t n) {
    uint64_t rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = dropout_row(seed_, c1 + i, c2_);
    const int64_t end = ceil_div(from + n, kBlock);
    int64_t block = from / kBlock;
    if constexpr (kRows == 1) draw_blocks<kLanes == 16 ? 4 : 2>(rows, block, end);  // what the registers hold
    if constexpr (kRows == 1) draw_blocks<2>(rows, block, end);
    draw_blocks<1>(rows, block, end);
  }

  // What was drawn of row i from place j on, for `drop`.
  FASTBERT_MEMBER const Kept<Lane>* kept(int64_t i, int64_t j) const {
    return kept_[i] + j / kLanes * kKeptWords;
  }

 private:
  static constexpr int kBlock = kDropoutBlock<Lane>;
  static constexpr int kBlocks = (kColumns + kBlock - 1) / kBlock;
  static constexpr int kWords = kBlock / kLanes * kKeptWords;  // of a block

  // From `block` on, so many at a time, and moves it behind the last.
  template <int kTogether>
  FASTBERT_MEMBER void draw_blocks(const uint64_t (&rows)[kRows], int64_t& block, int64_t end) {
    for (; block + kTogether <= end; block += kTogether)
      drawn<kTogether, kRows>(
          seed_, columns_ + block, rows, [&](int i, int row, int half, vulong random) FASTBERT_LAMBDA {
            store_kept<Lane>(kept_[row] + (block + i) * kWords + half * (kWords / 2), random, t_);
          });
  }

  uint64_t seed_;
  uint32_t t_, c3_, first_ = 0, c2_ = 0;
  int64_t blocks_ = 0;
  DropoutColumns columns_[kBlocks];
  Kept<Lane> kept_[kRows][kBlocks * kWords];
};

// ---- of one row --------------------------------------------------------------------------------------

constexpr int64_t kRowDrawn = 1024;  // columns of a row whose random numbers are kept

using RowDropout = DropoutMask<uint16_t, kRowDrawn, 1>;

// Which of the n columns from `first` on, a multiple of a block, of a row are kept.
FASTBERT_INLINE const uint16_t* draw_row(RowDropout& dropout, int64_t row, int64_t columns, int64_t first,
                                         int64_t n) {
  const int64_t start = first / kRowDrawn * kRowDrawn;
  dropout.at(static_cast<uint32_t>(start / 8), min(kRowDrawn, columns - start), 0);
  dropout.draw(static_cast<uint32_t>(row), first - start, n);
  return dropout.kept(0, first - start);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
