// Which keys a query of attention_plain.cu and hard_attention.cu sees, of its own sequence:
//
//   Window        those in a window
//   GlobalTokens  those, and global tokens, which also see all
//   Ranks         those whose rank is at most the query's
//
// A block goes through the tiles of the others of which its rows see anything. In a window they are
// neighbours. Else each warp looks at 32 tiles at a time, 64 tokens each, and has a bit for each: whether the
// block's row that sees most, or is seen by most, sees one of them.
//
//                     keys      . . | . G | . . | . .
//     queries  . .              #     #                 # computed, with window (1, 1)
//              . .              #     #     #
//              . G              #     #     #     #
//              . .                    #     #     #
#pragma once
#include "launch.h"
//
#include "attention_plain_work.h"

namespace fastbert::cuda {
namespace {

struct Window {
  static constexpr bool kByToken = false;
};

// What a token has, 0 or 1 or a rank, says together with the window what it sees.
struct GlobalTokens {
  static constexpr bool kByToken = true;

  template <bool kIsKey>
  DEVICE static int of_token(const Attention& p, int token) {
    return p.global_tokens[token];
  }

  DEVICE static bool sees(int query, int key, bool in_window) { return in_window || query != 0 || key != 0; }

  template <bool kIsKey>
  DEVICE static int more_visible(int a, int b) {
    return max(a, b);
  }
};

struct Ranks {
  static constexpr bool kByToken = true;

  template <bool kIsKey>
  DEVICE static int of_token(const Attention& p, int token) {
    return kIsKey ? p.key_ranks[token] : p.query_ranks[token];
  }

  DEVICE static bool sees(int query, int key, bool) { return key <= query; }

  template <bool kIsKey>
  DEVICE static int more_visible(int a, int b) {
    return kIsKey ? min(a, b) : max(a, b);
  }
};

struct Visible {  // keys first to last
  int first, last;

  DEVICE bool has(int key) const { return key >= first && key <= last; }
};

DEVICE Visible visible_to(int query, const Plan& plan, const Work& work) {
  return {query - plan.left, min(query + plan.right, work.length - 1)};
}

// ---- tiles -------------------------------------------------------------------------------------------

constexpr int kAhead = 32;  // tiles that are looked at at a time
constexpr int kSpan = kAhead * kTile;

// The tiles of the others, keys or queries, of which the block's rows see anything; of keys by:
//
//   for (int key = tiles.first(); key < tiles.end(); key = tiles.next(key))
//
// All warps find the same.
template <class Mask, bool kOfKeys>
class OtherTiles {
 public:
  DEVICE OtherTiles(const Attention& p, const Plan& plan, const Work& work, int rows)
      : p_(p), plan_(plan), work_(work), rows_(rows) {}

  DEVICE int first() {
    if constexpr (Mask::kByToken)
      return from(0);
    else
      return window().first / kTile * kTile;
  }

  DEVICE int next(int tile) {
    if constexpr (Mask::kByToken)
      return from(tile + kTile);
    else
      return tile + kTile;
  }

  DEVICE int end() const { return Mask::kByToken ? work_.length : window().last + 1; }

 private:
  // Of all rows.
  DEVICE Visible window() const {
    const int before = kOfKeys ? plan_.left : plan_.right, after = kOfKeys ? plan_.right : plan_.left;
    return {max(0, work_.row - before), min(work_.row + rows_ - 1 + after, work_.length - 1)};
  }

  // What those of the rows have that sees most, or is seen by most.
  DEVICE int most_visible() const {
    const int begin = work_.begin + work_.row;
    int most = Mask::template of_token<!kOfKeys>(p_, begin);
    for (int row = lane_of_warp(); row < rows_; row += kWarp) {
      const int its = Mask::template of_token<!kOfKeys>(p_, begin + row);
      most = Mask::template more_visible<!kOfKeys>(most, its);
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      most = Mask::template more_visible<!kOfKeys>(most, __shfl_xor_sync(kAllLanes, most, offset));
    return most;
  }

  // The first tile from `tile` on. Where that begins a span, nobody has looked at the span yet.
  DEVICE int from(int tile) {
    for (; tile < work_.length; tile = (tile / kSpan + 1) * kSpan) {
      if (tile % kSpan == 0) seen_ = look_ahead(tile);
      const uint32_t left = seen_ >> tile % kSpan / kTile;
      if (left != 0) return tile + (__ffs(static_cast<int>(left)) - 1) * kTile;
    }
    return tile;
  }

  // Bit n: whether anything is seen of the tile that is n behind this one.
  DEVICE uint32_t look_ahead(int tile) const {
    const Visible window = this->window();
    const int most = most_visible();
    uint32_t seen = 0;
#pragma unroll 4
    for (int n = 0; n < kAhead; ++n, tile += kTile) {
      if (tile >= work_.length) break;
      const bool in_window = tile + kTile > window.first && tile <= window.last;
      const int token = tile + lane_of_warp();
      const bool is_seen = sees(most, token, in_window) | sees(most, token + kWarp, in_window);
      if (__any_sync(kAllLanes, is_seen)) seen |= 1u << n;
    }
    return seen;
  }

  DEVICE bool sees(int most, int token, bool in_window) const {
    if (token >= work_.length) return false;
    const int its = Mask::template of_token<kOfKeys>(p_, work_.begin + token);
    return kOfKeys ? Mask::sees(most, its, in_window) : Mask::sees(its, most, in_window);
  }

  const Attention& p_;
  const Plan& plan_;
  const Work& work_;
  int rows_;
  uint32_t seen_ = 0;  // of the span
};

// ---- products ----------------------------------------------------------------------------------------

// Whether a query sees a key, of a thread's products of the block's rows and the tile from `tile` on.
template <class Mask, bool kOfKeys>
class SeenProducts {
 public:
  DEVICE SeenProducts(const Attention& p, const Plan& plan, const Work& work, int tile)
      : plan_(plan), work_(work), tile_(tile) {
    if constexpr (Mask::kByToken) bits_ = bits_by_token(p);
  }

  DEVICE bool has(int i, int j) const {
    if constexpr (Mask::kByToken)
      return bits_ >> (i * kColumns + j) & 1;
    else
      return in_window(i, j);
  }

 private:
  DEVICE int own(int i) const { return work_.row + first_row() + 2 * i; }
  DEVICE int other(int j) const { return tile_ + column() + j * kHalfWarp; }

  DEVICE bool in_window(int i, int j) const {
    const int query = kOfKeys ? own(i) : other(j), key = kOfKeys ? other(j) : own(i);
    return visible_to(query, plan_, work_).has(key);
  }

  DEVICE uint32_t bits_by_token(const Attention& p) const {
    const int last = work_.length - 1;
    int others[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      others[j] = Mask::template of_token<kOfKeys>(p, work_.begin + min(other(j), last));
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int its = Mask::template of_token<!kOfKeys>(p, work_.begin + min(own(i), last));
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int query = kOfKeys ? its : others[j], key = kOfKeys ? others[j] : its;
        const bool seen = other(j) <= last && Mask::sees(query, key, in_window(i, j));
        bits |= static_cast<uint32_t>(seen) << (i * kColumns + j);
      }
    }
    return bits;
  }

  const Plan& plan_;
  const Work& work_;
  int tile_;
  uint32_t bits_ = 0;
};

}  // namespace
}  // namespace fastbert::cuda
