// The mask of attention's dropout as mma's accumulators want it. The contract (fastbert/ops/attention.py):
// one call of Philox4x32-7 with counter (key / 16, query, head, 1) serves 16 keys, a byte each; a weight is
// kept where it is >= t.
#pragma once
#include "../philox.h"
#include "attention_tiles.h"

namespace fastbert::attention {

static_assert(kPhiloxRounds == 7 && kAttentionLaneBits == 8,
              "the rounds are split as three and four, and bytes read");

// Philox in parts. In the first three rounds most words depend on the query alone or on the keys alone: those
// are worked out once per row and once per column. The other four rounds are dealt out between matrix
// products, whose tensor cores leave the other units idle.
class Philox {
  uint32_t key0_, key1_, head_high_, head_low_;

  struct Product {
    uint32_t high, low;
  };
  static DEVICE Product multiply(uint32_t a, uint32_t b) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
  }

 public:
  struct Keys {
    uint32_t word0, word1, word2, word3;
  };

  DEVICE Philox(uint64_t seed, uint32_t head)
      : key0_(static_cast<uint32_t>(seed)), key1_(static_cast<uint32_t>(seed >> 32)) {
    const Product product = multiply(head, kPhiloxM1);
    head_high_ = product.high, head_low_ = product.low;
  }

  DEVICE Keys keys(uint32_t group) const {
    const Product p = multiply(group, kPhiloxM0), q = multiply(p.high ^ 1u ^ key1_, kPhiloxM1);
    const Product r = multiply(q.high ^ head_low_ ^ (key0_ + kPhiloxW0), kPhiloxM0);
    return {p.low ^ (key1_ + kPhiloxW1), q.low ^ (key0_ + 2 * kPhiloxW0), r.high ^ (key1_ + 2 * kPhiloxW1),
            r.low};
  }

  // Rounds one to three of kCalls queries, 8 apart, and the same keys.
  template <int kCalls>
  DEVICE void start(uint32_t token, const Keys& keys, uint32_t (&words)[kCalls][4]) const {
    keep_in_place(
        token);  // the queries' part is worked out again for each tile, rather than kept in registers
#pragma unroll
    for (int n = 0; n < kCalls; ++n) {
      const Product p = multiply(head_high_ ^ (token + 8 * n) ^ key0_, kPhiloxM0);
      const Product q = multiply(p.high ^ keys.word0, kPhiloxM1);
      words[n][0] = q.high ^ keys.word1, words[n][1] = q.low;
      words[n][2] = keys.word2 ^ p.low, words[n][3] = keys.word3;
    }
  }

  // The part of rounds four to seven that belongs to step `step` of kOf.
  template <int kOf, int kCalls>
  DEVICE void advance(int step, uint32_t (&words)[kCalls][4]) const {
#pragma unroll
    for (int round = 3 + step * 4 / kOf; round < 3 + (step + 1) * 4 / kOf; ++round)
#pragma unroll
      for (int n = 0; n < kCalls; ++n) {
        uint32_t (&w)[4] = words[n];
        const Product p = multiply(w[0], kPhiloxM0), q = multiply(w[2], kPhiloxM1);
        w[0] = q.high ^ w[1] ^ (key0_ + round * kPhiloxW0),
        w[2] = p.high ^ w[3] ^ (key1_ + round * kPhiloxW1);
        w[1] = q.low, w[3] = p.low;
        keep_in_place(w[0]), keep_in_place(w[2]);
      }
  }
};

// ---- from bytes to masks -----------------------------------------------------------------------------

constexpr uint32_t kHalf1024 = 0x64006400u;    // a byte in the low end of such a half: 1024 + byte in fp16
constexpr uint32_t kFloat2To23 = 0x4B000000u;  // and here: 2^23 + byte in float

// Of bytes `first` and the next: all ones in the half of a weight that is kept.
DEVICE uint32_t pair_mask(uint32_t word, int first, uint32_t threshold) {
  return halves_at_least(__byte_perm(word, kHalf1024, 0x5050 + first * 0x101 + 0x100),
                         kHalf1024 + threshold * 0x10001u);
}

// 1 where the byte is kept, else 0: one subtraction, clamped to [0, 1].
DEVICE float factor(uint32_t word, int byte, float bias) {
  return __saturatef(__uint_as_float(__byte_perm(word, kFloat2To23, 0x7540 + byte)) - bias);
}
FASTBERT_HOST_DEVICE float factor_bias(uint32_t threshold) {
  return 8388607.f + static_cast<float>(threshold);
}  // 2^23 - 1 + t

// Where keys are the rows of accumulators, a lane has two keys, g and g + 8 of 16 (g = lane / 4), and eight
// queries of 32, 8j + 2i + e. So each lane draws for one query, 8 (g / 2) + 2i + g % 2, and eight lanes
// exchange: word j then has in its bytes 2e and 2e + 1 those of query 8j + 2i + e and keys g and g + 8.
class KeyMajor {
  int lane_;
  uint32_t hold_, lower_;  // what byte_perm takes; the other halves of two words are kOther away
  static constexpr uint32_t kOther = 0x2222;

 public:
  DEVICE explicit KeyMajor(int lane)
      : lane_(lane), hold_(lane & 4 ? 0x7632 : 0x5410), lower_(lane & 4 ? 0x1054 : 0x5410) {}

  static DEVICE int drawn_query(int lane) { return (lane >> 3) * 8 + (lane & 3) * 2 + (lane >> 2 & 1); }

  DEVICE void exchange(uint32_t (&w)[4]) const {
    // two keys in each word: 2m and 2m + 1, each with the one 8 further
    const uint32_t u[4] = {__byte_perm(w[0], w[2], 0x5140), __byte_perm(w[0], w[2], 0x7362),
                           __byte_perm(w[1], w[3], 0x5140), __byte_perm(w[1], w[3], 0x7362)};
    uint32_t hold = hold_, lower = lower_;
    keep_in_place(hold), keep_in_place(lower);
    uint32_t a[2][2], b[2][2];  // by the query's highest bit, and then its middle one
    const bool far = lane_ & 16, middle = lane_ & 8;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint32_t own = far ? u[2 + m] : u[m];
      const uint32_t got = __shfl_xor_sync(kAllLanes, far ? u[m] : u[2 + m], 16);
      a[0][m] = far ? got : own, a[1][m] = far ? own : got;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t own = middle ? a[n][1] : a[n][0];
      const uint32_t got = __shfl_xor_sync(kAllLanes, middle ? a[n][0] : a[n][1], 8);
      b[n][0] = middle ? got : own, b[n][1] = middle ? own : got;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t own = __byte_perm(b[n][0], b[n][1], hold);
      const uint32_t got = __shfl_xor_sync(kAllLanes, __byte_perm(b[n][0], b[n][1], hold ^ kOther), 4);
      w[2 * n] = __byte_perm(own, got, lower), w[2 * n + 1] = __byte_perm(own, got, lower ^ kOther);
    }
  }
};

}  // namespace fastbert::attention
