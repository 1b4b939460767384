// Gumbel noise for the scores of hard attention, and the logarithm that it takes.
//
// Of (query, head, key): g = -log(-log(u)), u = (word / 2^9 + 0.5) / 2^23 with word key % 4 of Philox's
// counter (key / 4, query, head, 3), `query` being the token's place in the packed batch. The words are the
// same on every device, g but for the last places of its two logarithms.
#pragma once
#include "dropout.h"

namespace fastbert {
namespace FASTBERT_ISA {

// The natural logarithm of a normal number above 0: x = m 2^e with sqrt(1/2) <= m < sqrt(2), and log m =
// 2 atanh((m - 1) / (m + 1)) by its series, whose next term is below 2e-9 of it. So it has float32's own
// relative error where the result is near 0, too.
FASTBERT_INLINE vfloat log(vfloat x) {
  constexpr int32_t kRootOfHalf = 0x3F3504F3;  // its bits
  const vint bits = (vint)as_uint(x) - kRootOfHalf;
  const vfloat e = __builtin_convertvector(bits >> 23, vfloat);
  const vfloat m = as_float((vuint)((bits & 0x7FFFFF) + kRootOfHalf));
  const vfloat s = (m - 1.f) / (m + 1.f), z = s * s;
  const vfloat rest = (((z * (1.f / 9) + 1.f / 7) * z + 1.f / 5) * z + 1.f / 3) * z;
  return e * 0.693147181f + (2.f * s + 2.f * s * rest);
}

// g for one query and the n keys from `key` on, a multiple of 4; n up to kMost, and rounded up to kLanes.
template <int kMost>
class GumbelNoise {
 public:
  // `seed` null: there is no noise.
  FASTBERT_MEMBER explicit GumbelNoise(const int64_t* seed)
      : given_(seed), seed_(seed ? static_cast<uint64_t>(*seed) : 0) {}

  FASTBERT_MEMBER bool is_given() const { return given_; }

  FASTBERT_MEMBER void draw(int64_t token, int64_t head, int64_t key, int64_t n) {
    dropout_lanes(seed_, static_cast<uint32_t>(key / 4), static_cast<uint32_t>(token),
                  static_cast<uint32_t>(head), 3, ceil_div(n, 4), reinterpret_cast<uint16_t*>(words_));
    for (int64_t j = 0; j < n; j += kLanes) {
      vint word;
      memcpy(&word, words_ + j, sizeof word);
      const vint places = (vint)((vuint)word >> 9);
      const vfloat u = (__builtin_convertvector(places, vfloat) + 0.5f) * 0x1p-23f;
      store(noise_ + j, -log(-log(u)));
    }
  }

  FASTBERT_MEMBER vfloat at(int64_t j) const { return load(noise_ + j); }

 private:
  const bool given_;
  const uint64_t seed_;
  alignas(64) uint32_t words_[kMost + 2 * kLanes];
  alignas(64) float noise_[kMost + kLanes];
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
