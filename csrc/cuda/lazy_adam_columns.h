// The columns of a table that a lane works on, of a dtype known when the kernel runs: kWidth of them, 4 in an
// access of 16 or 8 bytes, or 1. That lanes hold 4 in every dtype keeps the accesses of all tensors side by
// side: with 8 columns of bf16 each, their float32 moments would lie 32 bytes apart and take two sectors.
#pragma once
#include "launch.h"
//
#include "lazy_adam_update.h"
#include "vectors.h"

namespace fastbert::cuda {

template <int kWidth>
struct Raw {  // as they lie in memory; of 16 bits each, half of the words
  uint32_t words[kWidth];
};

// Columns `at` .. of a tensor.
template <int kWidth, Cache kCache>
DEVICE Raw<kWidth> load_raw(const void* tensor, DType dtype, int64_t at) {
  Raw<kWidth> raw;
  if (dtype == DType::f32) {
    const auto packed = load_packed<kWidth, kCache>(static_cast<const float*>(tensor) + at);
    memcpy(&raw, &packed, sizeof packed);
  } else {
    const auto packed = load_packed<kWidth, kCache>(static_cast<const __half*>(tensor) + at);
    raw = {};
    memcpy(&raw, &packed, sizeof packed);
  }
  return raw;
}

DEVICE void prefetch_element(const void* tensor, DType dtype, int64_t at) {
  prefetch_l2(static_cast<const char*>(tensor) + at * (dtype == DType::f32 ? 4 : 2));
}

template <int kWidth, class T>
DEVICE void unpack_raw(const Raw<kWidth>& raw, float (&x)[kWidth]) {
  Packed<T, kWidth> packed;
  memcpy(&packed, &raw, sizeof packed);
  unpack<T, kWidth>(packed, x);
}

template <int kWidth>
DEVICE void unpack_raw(const Raw<kWidth>& raw, DType dtype, float (&x)[kWidth]) {
  if (dtype == DType::f32)
    unpack_raw<kWidth, float>(raw, x);
  else if (dtype == DType::bf16)
    unpack_raw<kWidth, __nv_bfloat16>(raw, x);
  else
    unpack_raw<kWidth, __half>(raw, x);
}

template <int kWidth>
DEVICE void store_raw(void* tensor, DType dtype, int64_t at, const float (&x)[kWidth]) {
  if (dtype == DType::f32)
    store<kWidth>(static_cast<float*>(tensor) + at, x);
  else if (dtype == DType::bf16)
    store<kWidth>(static_cast<__nv_bfloat16*>(tensor) + at, x);
  else
    store<kWidth>(static_cast<__half*>(tensor) + at, x);
}

// Whether any of them is not zero, of either sign.
template <int kWidth>
DEVICE bool is_nonzero(const Raw<kWidth>& raw, DType dtype) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) bits |= raw.words[i];
  return bits & (dtype == DType::f32 ? 0x7FFFFFFFu : 0x7FFF7FFFu);
}

// ---- a table and its state -------------------------------------------------------------------------------

struct AdamTable {
  void *param, *exp_avg;               // [V, D]
  float *exp_avg_sq, *max_exp_avg_sq;  // [V, D], or [V] where row-wise
  int columns;
  DType dtype, exp_avg_dtype;
  AdamRounding rounding;
  const float* step;
  __nv_bfloat16* bf16_copy;  // [V, D] of a float32 param; null: none
};

DEVICE int64_t element(uint32_t row, int columns, int column) { return int64_t{row} * columns + column; }

inline AdamTable adam_table(const LazyAdamStep& p) {
  return {p.param,
          p.exp_avg,
          p.exp_avg_sq,
          p.max_exp_avg_sq,
          static_cast<int>(p.columns),
          p.dtype,
          p.exp_avg_dtype,
          {p.seed, p.number},
          p.step,
          static_cast<__nv_bfloat16*>(p.bf16_copy)};
}

// kWidth columns of one row, from where they are asked for to where they are stored. kShared: one v for the
// whole row, which the caller sees to.
template <int kWidth, bool kShared>
struct AdamColumns {
  Raw<kWidth> w, m;
  float v[kWidth], u[kWidth];

  DEVICE void load(const AdamTable& t, int64_t at) {
    load_all_but_u(t, at);
    load_u(t, at);
  }

  DEVICE void load_all_but_u(const AdamTable& t, int64_t at) {
    w = load_raw<kWidth, Cache::plain>(t.param, t.dtype, at);
    m = load_raw<kWidth, Cache::plain>(t.exp_avg, t.exp_avg_dtype, at);
    if (!kShared) fastbert::load<kWidth, Cache::plain>(t.exp_avg_sq + at, v);
  }

  DEVICE void load_u(const AdamTable& t, int64_t at) {
    if (kShared) return;
    if (t.max_exp_avg_sq) {
      fastbert::load<kWidth, Cache::plain>(t.max_exp_avg_sq + at, u);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) u[i] = 0.f;
    }
  }

  // With the gradient g; `divisor` where it is shared. Rounding draws by row and column.
  DEVICE void step_and_store(const AdamTable& t, int64_t at, uint32_t row, int column,
                             const float (&g)[kWidth], float divisor, const AdamCoefficients& c) {
    float w1[kWidth], m1[kWidth];
    unpack_raw(w, t.dtype, w1);
    unpack_raw(m, t.exp_avg_dtype, m1);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float mine = adam_gradient(g[i], w1[i], c);
      m1[i] = adam_first_moment(m1[i], mine, c);
      if (!kShared) {
        v[i] = adam_second_moment(v[i], mine * mine, c);
        if (t.max_exp_avg_sq) u[i] = adam_maximum(u[i], v[i]);
        divisor = adam_divisor(t.max_exp_avg_sq ? u[i] : v[i], c);
      }
      w1[i] = adam_weight(w1[i], m1[i], divisor, c);
    }
    if (t.rounding.seed)
      store_rounded(t, at, row, column, w1);
    else
      store_raw(t.param, t.dtype, at, w1);
    if (t.bf16_copy) store<kWidth>(t.bf16_copy + at, w1);
    store_raw(t.exp_avg, t.exp_avg_dtype, at, m1);
    if (kShared) return;
    store<kWidth>(t.exp_avg_sq + at, v);
    if (t.max_exp_avg_sq) store<kWidth>(t.max_exp_avg_sq + at, u);
  }

 private:
  DEVICE static void store_rounded(const AdamTable& t, int64_t at, uint32_t row, int column,
                                   const float (&x)[kWidth]) {
    uint32_t words[4], bits[kWidth];
    rounding_words(t.rounding, column, row, *t.step, words);
    const bool is_upper = column & 4;  // of the eight columns that share words
    const uint32_t low = is_upper ? words[2] : words[0], high = is_upper ? words[3] : words[1];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t lane = column % 4u + i, word = lane & 2 ? high : low;
      bits[i] = round_stochastically(x[i], lane & 1 ? word >> 16 : word & 0xFFFFu);
    }
    auto* to = static_cast<__nv_bfloat16*>(t.param) + at;
    if constexpr (kWidth == 1)
      store_packed<1>(to, static_cast<unsigned short>(bits[0]));
    else
      store_packed<4>(to, uint2{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16});
  }
};

}  // namespace fastbert::cuda
