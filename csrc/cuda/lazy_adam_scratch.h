// The scratch of LazyAdam's row step: one allocation whose size follows from the number of gradient rows and
// of columns alone, so that nothing waits for what the ids are. Plain C++: bindings ask for the size.
#pragma once
#include <cstdint>

namespace fastbert::cuda {

// A row's gradients are summed in a tree: pieces of kPiece in order of occurrence, kFan neighbouring pieces,
// kFan of those, and so on. A row of up to kPiece gradients is one piece, with the bits of a plain sum.
constexpr int kPiece = 16, kFan = 32;

constexpr int64_t kSortedByBlock = 8192;                          // gradient rows that one block sorts
constexpr int kTileThreads = 512;                                 // beyond them, tiles of the whole device do
constexpr int kFewItems = 2, kManyItems = 8;                      // of a tile's thread,
constexpr int64_t kSortedByFew = 256 * kFewItems * kTileThreads;  // up to so many rows, and beyond
constexpr int kTileDigit = 10;                                    // bits that a pass sorts by, at most
constexpr int64_t kTileCounts = 3 << kTileDigit;  // of digits, over all passes: 3 of 10 bits, or 4 of 8

inline int64_t tile_size(int64_t touched) {
  return kTileThreads * (touched <= kSortedByFew ? kFewItems : kManyItems);
}

// A row in pieces has c > kPiece gradients, and ceil(c / kPiece) <= 2 * c / (kPiece + 1).
inline int64_t most_pieces(int64_t touched) { return 2 * touched / (kPiece + 1) + 1; }

struct LazyAdamScratch {  // where each part begins, in int32
  int64_t coefficients, counters, rows, positions, other_rows, other_positions, pieces, arrived, sums, tiles,
      counts, size;
};

inline LazyAdamScratch lazy_adam_layout(int64_t touched, int64_t columns) {
  LazyAdamScratch s;
  s.size = 0;
  const auto take = [&](int64_t count) {
    const int64_t first = s.size;
    s.size += (count + 31) / 32 * 32;  // 128 bytes: any access is aligned
    return first;
  };
  const bool by_block = touched <= kSortedByBlock;
  const int64_t pieces = most_pieces(touched),
                tiles = by_block ? 0 : (touched + tile_size(touched) - 1) / tile_size(touched);
  s.coefficients = take(16), s.counters = take(2);
  s.rows = take(touched), s.positions = take(touched);
  s.other_rows = take(by_block ? 0 : touched), s.other_positions = take(by_block ? 0 : touched);
  s.pieces = take(4 * pieces);
  s.arrived = take(pieces * ((columns + 31) / 32));  // a worker takes 32 columns or more, or all
  s.sums = take(pieces * columns);
  s.tiles = take(tiles), s.counts = take(tiles ? (tiles + 1) * kTileCounts : 0);
  return s;
}

// Numbers of int32.
inline int64_t lazy_adam_scratch(int64_t touched, int64_t columns) {
  return lazy_adam_layout(touched, columns).size;
}

}  // namespace fastbert::cuda
