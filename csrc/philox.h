// Philox4x32-7, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3" (SC 2011): seven rounds are the fewest that they found to pass BigCrush. Shared by CPU and
// CUDA, so that both draw the same dropout mask from the same seed and place.
//
// The four words of a counter are read from the lowest bit of the first word on: as eight lanes of 16 bits,
// or as sixteen of 8 in attention. An element is kept where its lane >= t.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define FASTBERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTBERT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastbert {

constexpr int kPhiloxRounds = 7;
constexpr int kLaneBits = 16, kAttentionLaneBits = 8;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments (Weyl sequence)

// The upper word of a product. One instruction gives both words on a GPU, where nvcc would spend two more on
// a product in 64 bits.
FASTBERT_HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
#endif
}

// counter [4] -> words [4]; the key is the seed, low word first.
FASTBERT_HOST_DEVICE void philox4x32(uint64_t seed, const uint32_t counter[4], uint32_t words[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = high_product(c0, kPhiloxM0), low0 = c0 * kPhiloxM0;
    const uint32_t high1 = high_product(c2, kPhiloxM1), low1 = c2 * kPhiloxM1;
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// What a kept element is multiplied by, where lanes have so many bits; 0 where everything is dropped.
FASTBERT_HOST_DEVICE float dropout_scale(uint32_t t, int lane_bits) {
  const uint32_t values = 1u << lane_bits;
  return t < values ? static_cast<float>(values) / static_cast<float>(values - t) : 0.f;
}

}  // namespace fastbert
