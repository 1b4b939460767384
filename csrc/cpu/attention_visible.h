// What attention's queries see of the keys: a window, and with it global tokens, which see all of their
// sequence and are seen by all of it; or the keys whose rank is at most the query's.
//
// Blocks of queries and keys of which nothing is visible are skipped. Outside the window a block is cut down
// to what global tokens make of it: to the queries from the first to the last global one, or to such keys.
//
//                 keys    . . . . G . . . . . . .
//     query  .            # #     #                # computed
//            .            # # #   #
//            .              # # # #
//            .                # # #
//            G            # # # # # # # # # # # #
//            .                    # # #
//            .                    # # # #
//
// By ranks a block is skipped where the least rank of its keys is above the greatest of its queries; a query
// that sees all keys of a block, or none, is not compared with each.
#pragma once
#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

namespace {

// Some queries and some keys of one sequence, counted from its first token.
struct Block {
  int64_t query, queries, key, keys;
};

// None of the queries sees any of the keys.
FASTBERT_INLINE bool fully_masked(const Attention& p, const Block& b) {
  return b.query - p.window_left >= b.key + b.keys || b.query + b.queries - 1 + p.window_right < b.key;
}

// ---- what a query sees of a block of keys ------------------------------------------------------------

struct Visible {  // lanes first to last of it, none where last < first,
  int64_t first, last;
  const int8_t* global = nullptr;      // and those where this, by lanes, is -1; null: no others
  const int32_t* key_ranks = nullptr;  // only where this, by lanes, is at most `rank`; null: wherever
  int32_t rank = 0;
};

FASTBERT_INLINE Visible visible_keys(const Attention& p, int64_t query, int64_t key0, int64_t keys) {
  return {max(0, query - p.window_left - key0), min(keys - 1, query + p.window_right - key0)};
}

struct AllSeen {
  FASTBERT_MEMBER vfloat pick(Visible, int64_t, vfloat v, float) const { return v; }
};

struct SomeSeen {  // `otherwise` in lanes whose key is not visible
  FASTBERT_MEMBER vfloat pick(Visible s, int64_t j, vfloat v, float otherwise) const {
    vint key;
    for (int i = 0; i < kLanes; ++i) key[i] = i;
    key += static_cast<int32_t>(j);
    vint seen = (key >= static_cast<int32_t>(s.first)) & (key <= static_cast<int32_t>(s.last));
    if (s.global) {
      typedef int8_t vbytes __attribute__((vector_size(kLanes)));
      vbytes global;
      memcpy(&global, s.global + j, sizeof global);
      seen |= __builtin_convertvector(global, vint);
    }
    if (s.key_ranks) {
      vint ranks;
      memcpy(&ranks, s.key_ranks + j, sizeof ranks);
      seen &= ranks <= s.rank;
    }
    return seen ? v : splat(otherwise);
  }
};

// body(j, seen, i) for the vectors j = 0, kLanes, ... of a row of scores; most are seen whole. i < 2 numbers
// independent accumulators.
template <typename Body>
FASTBERT_INLINE void over_keys(Visible s, int64_t width, Body body) {
  const int64_t first = s.key_ranks ? width : min(width, round_up(max(0, s.first), kLanes));
  const int64_t last = max(first, (s.last + 1) / kLanes * kLanes);
  for (int64_t j = 0; j < first; j += kLanes) body(j, SomeSeen{}, 0);
  int64_t j = first;
  for (; j + 2 * kLanes <= last; j += 2 * kLanes) body(j, AllSeen{}, 0), body(j + kLanes, AllSeen{}, 1);
  if (j < last) body(j, AllSeen{}, 0);
  for (j = last; j < width; j += kLanes) body(j, SomeSeen{}, 0);
}

// ---- global tokens and ranks -------------------------------------------------------------------------

// Those of one sequence, and of up to kKeys keys of it by lanes.
template <int kKeys>
class TokenMask {
 public:
  FASTBERT_MEMBER TokenMask(const Attention& p, int64_t sequence)
      : tokens_(p.global_tokens ? p.global_tokens + p.cu_seqlens[sequence] : nullptr),
        query_ranks_(p.query_ranks ? p.query_ranks + p.cu_seqlens[sequence] : nullptr),
        key_ranks_(p.key_ranks ? p.key_ranks + p.cu_seqlens[sequence] : nullptr) {}

  FASTBERT_MEMBER bool is_given() const { return tokens_ || query_ranks_; }

  // The keys are those from `key` on.
  FASTBERT_MEMBER void at(int64_t key, int64_t keys) {
    if (query_ranks_) ranks_at(key, keys);
    if (!tokens_) return;
    key_ = key, found_ = within(key, keys);
    for (int64_t j = 0; j < kKeys; ++j) lanes_[j] = j < keys && tokens_[key + j] ? -1 : 0;
  }

  // What there is to compute of a block whose keys are those of `at`: all of it, some, or nothing, which has
  // no queries. Queries begin a multiple of 4 behind the block's, keys one of 16.
  FASTBERT_MEMBER Block visible_part(const Attention& p, const Block& b) const {
    if (query_ranks_) return {b.query, greatest_rank(b) < least_ ? 0 : b.queries, b.key, b.keys};
    if (!fully_masked(p, b)) return b;
    const Run queries = tokens_ ? within(b.query, b.queries) : Run{0, 0};
    if (queries.count && found_.count) return b;
    if (queries.count) {
      const Run rows = aligned<4>(queries, b.query, b.queries);
      return {rows.first, rows.count, b.key, b.keys};
    }
    if (!found_.count) return {b.query, 0, b.key, 0};
    const Run columns = aligned<16>(found_, b.key, b.keys);
    return {b.query, b.queries, columns.first, columns.count};
  }

  FASTBERT_MEMBER Visible visible(const Attention& p, const Block& b, int64_t query) const {
    if (query_ranks_) return visible_by_rank(b, query_ranks_[query]);
    if (!tokens_) return visible_keys(p, query, b.key, b.keys);
    if (tokens_[query]) return {0, b.keys - 1};
    Visible seen = visible_keys(p, query, b.key, b.keys);
    if (found_.count) seen.global = lanes_ + (b.key - key_);
    return seen;
  }

 private:
  struct Run {
    int64_t first, count;
  };

  FASTBERT_MEMBER void ranks_at(int64_t key, int64_t keys) {
    key_ = key, least_ = INT32_MAX, greatest_ = INT32_MIN;
    for (int64_t j = 0; j < keys; ++j) {
      const int32_t rank = ranks_[j] = key_ranks_[key + j];
      least_ = rank < least_ ? rank : least_, greatest_ = rank > greatest_ ? rank : greatest_;
    }
    for (int64_t j = keys; j < kKeys; ++j) ranks_[j] = INT32_MAX;
  }

  FASTBERT_MEMBER int32_t greatest_rank(const Block& b) const {
    int32_t greatest = INT32_MIN;
    for (int64_t i = b.query; i < b.query + b.queries; ++i)
      greatest = query_ranks_[i] > greatest ? query_ranks_[i] : greatest;
    return greatest;
  }

  // The block has all keys of `at`.
  FASTBERT_MEMBER Visible visible_by_rank(const Block& b, int32_t rank) const {
    if (rank < least_) return {0, -1};
    if (rank >= greatest_) return {0, b.keys - 1};
    return {0, b.keys - 1, nullptr, ranks_, rank};
  }

  // From the first to the last global token of so many; none has count 0.
  FASTBERT_MEMBER Run within(int64_t first, int64_t count) const {
    int64_t last = first + count;
    while (first < last && !tokens_[first]) ++first;
    while (first < last && !tokens_[last - 1]) --last;
    return {first, last - first};
  }

  // The run widened to multiples of `multiple` from the first of `count` on, of which it has no others.
  template <int multiple>
  FASTBERT_MEMBER Run aligned(const Run& run, int64_t first, int64_t count) const {
    const int64_t from = first + (run.first - first) / multiple * multiple;
    return {from, min(round_up(run.first + run.count - from, multiple), first + count - from)};
  }

  const uint8_t* tokens_;                    // of the sequence; null: none is global
  const int32_t *query_ranks_, *key_ranks_;  // of the sequence; null: there are none
  int64_t key_ = 0;                          // of `at`, and its global tokens
  Run found_ = {0, 0};
  int32_t least_ = 0, greatest_ = 0;  // of the ranks of its keys
  alignas(64) int8_t lanes_[kKeys];
  alignas(64) int32_t ranks_[kKeys];
};

}  // namespace

}  // namespace FASTBERT_ISA
}  // namespace fastbert
