// Host twins of what csrc/cuda/ptx.h does with tensor cores, by the fragment layouts of the PTX ISA ("Matrix
// fragments for mma.m16n8k16"). With g = lane / 4 and i = lane % 4 a lane holds
//   A: a0 (g, 2i and 2i + 1), a1 (g + 8, ..), a2 (g, 2i + 8 and 2i + 9), a3 (g + 8, ..)
//   B: b0 (2i and 2i + 1, g), b1 (2i + 8 and 2i + 9, g)
//   C: c0, c1 (g, 2i and 2i + 1), c2, c3 (g + 8, ..)
#pragma once
#include <stdint.h>
#include <string.h>

#include "scheduler.h"

namespace emulator {

template <class T>
float half_of(uint32_t word, int half) {  // 0: the low one
  const uint16_t bits = half ? word >> 16 : word & 0xffff;
  T value;
  memcpy(static_cast<void*>(&value), &bits, sizeof bits);
  return static_cast<float>(value);
}

// set.ge.u32.f16x2
inline uint32_t halves_at_least(uint32_t x, uint32_t bound) {
  uint32_t mask = 0;
  for (int half = 0; half < 2; ++half)
    if (half_of<__half>(x, half) >= half_of<__half>(bound, half)) mask |= 0xffffu << 16 * half;
  return mask;
}

inline float tf32(uint32_t word) {  // the hardware reads the upper 19 bits
  const uint32_t bits = word & 0xffffe000u;
  float value;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

struct MmaLane {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// C += A B in float32; k in order, where the hardware's order is its own.
template <int kDepth>
void multiply(const float (&a)[16][kDepth], const float (&b)[kDepth][8], Lanes<MmaLane> lanes) {
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    for (int j = 0; j < 4; ++j) {
      const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
      float sum = lanes[lane].c[j];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      lanes[lane].c[j] = sum;
    }
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location from) {
  MmaLane mine{c, a, b};
  warp_collective<MmaLane>(
      "mma.m16n8k16", kFullMask, mine,
      [](Lanes<MmaLane> lanes) {
        float a[16][16], b[16][8];
        for (unsigned lane = 0; lane < kWarpSize; ++lane)
          for (int half = 0; half < 2; ++half) {
            const int g = lane / 4, k = lane % 4 * 2 + half;
            for (int j = 0; j < 4; ++j) a[g + j % 2 * 8][k + j / 2 * 8] = half_of<T>(lanes[lane].a[j], half);
            for (int j = 0; j < 2; ++j) b[k + j * 8][g] = half_of<T>(lanes[lane].b[j], half);
          }
        multiply<16>(a, b, lanes);
      },
      from);
}

// A: a0 (g, i), a1 (g + 8, i), a2 (g, i + 4), a3 (g + 8, i + 4); B: b0 (i, g), b1 (i + 4, g).
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location from) {
  MmaLane mine{c, a, b};
  warp_collective<MmaLane>(
      "mma.m16n8k8", kFullMask, mine,
      [](Lanes<MmaLane> lanes) {
        float a[16][8], b[8][8];
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
          const int g = lane / 4, i = lane % 4;
          for (int j = 0; j < 4; ++j) a[g + j % 2 * 8][i + j / 2 * 4] = tf32(lanes[lane].a[j]);
          for (int j = 0; j < 2; ++j) b[i + j * 4][g] = tf32(lanes[lane].b[j]);
        }
        multiply<8>(a, b, lanes);
      },
      from);
}

struct LdmatrixLane {
  uint32_t* fragment;
  const char* row;
};

template <bool kTransposed>
void ldmatrix_x4(uint32_t (&fragment)[4], const char* row, Location from) {
  check_alignment(row, 16, "ldmatrix", from);
  note_access(row, 16, Access::read, from);
  LdmatrixLane mine{fragment, row};
  warp_collective<LdmatrixLane>(
      "ldmatrix", kFullMask, mine,
      [](Lanes<LdmatrixLane> lanes) {
        for (unsigned lane = 0; lane < kWarpSize; ++lane)
          for (int matrix = 0; matrix < 4; ++matrix)
            for (int half = 0; half < 2; ++half) {
              const int g = lane / 4, i = lane % 4 * 2 + half;
              const int row = kTransposed ? i : g, column = kTransposed ? g : i;
              memcpy(reinterpret_cast<char*>(&lanes[lane].fragment[matrix]) + 2 * half,
                     lanes[matrix * 8 + row].row + 2 * column, 2);
            }
      },
      from);
}

}  // namespace emulator
