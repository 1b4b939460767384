// Attention over packed sequences [T, H, D], with dropout; for query i and the keys j of its sequence:
//
//   s = scale * q_i . k_j,   lse_i = log(sum_j exp(s)),   P = exp(s - lse_i),   out_i = sum_j dropout(P) v_j
//
// Backward takes out and lse, computes P and draws the mask again; with delta_i = dout_i . out_i:
//
//   dS = P * (dropout'(dout_i . v_j) - delta_i),   dq_i = scale * sum_j dS k_j,   dk_j = scale * sum_i dS
//   q_i, dv_j = sum_i dropout(P) dout_i
//
// Arithmetic is float32 for every dtype.
#include <math.h>

#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

template <typename T>
FASTBERT_INLINE float value(const T* p) {
  return load_n(p, 1)[0];
}

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
  float sum = 0.f;
  for (int64_t i = 0; i < n; ++i) sum += value(a + i) * value(b + i);
  return sum;
}

bool is_kept(const Attention& p, int64_t query, int64_t head, int64_t key) {
  const uint32_t counter[4] = {static_cast<uint32_t>(key / 8), static_cast<uint32_t>(query),
                               static_cast<uint32_t>(head), 1};
  uint32_t words[4];
  philox4x32(p.seed, counter, words);
  return (words[key % 8 / 2] >> (key % 2 * 16) & 0xFFFF) >= p.drop_below;
}

float dropped(const Attention& p, int64_t query, int64_t head, int64_t key, float x) {
  if (p.drop_below == 0) return x;
  return is_kept(p, query, head, key) ? x * dropout_scale(p.drop_below) : 0.f;
}

// The sequence that holds each token, and the keys a query may see.
struct Place {
  int64_t start, length;
};

Place place_of(const Attention& p, int64_t token) {
  int64_t b = 0;
  while (p.cu_seqlens[b + 1] <= token) ++b;
  return {p.cu_seqlens[b], p.cu_seqlens[b + 1] - p.cu_seqlens[b]};
}

bool visible(const Attention& p, int64_t query, int64_t key) {
  return key - query <= p.window_right && query - key <= p.window_left;
}

template <typename T>
void forward(const Attention& p) {
  const int64_t d = p.head_dim, h = p.heads;
#pragma omp parallel for num_threads(p.threads) collapse(2)
  for (int64_t token = 0; token < p.tokens; ++token)
    for (int64_t head = 0; head < h; ++head) {
      const Place at = place_of(p, token);
      const int64_t query = token - at.start;
      const T* q = static_cast<const T*>(p.q) + token * p.q_stride + head * d;
      const T* k = static_cast<const T*>(p.k) + at.start * p.k_stride + head * d;
      const T* v = static_cast<const T*>(p.v) + at.start * p.v_stride + head * d;
      T* out = static_cast<T*>(p.result) + (token * h + head) * d;
      float largest = -INFINITY, sum = 0.f;
      for (int64_t j = 0; j < at.length; ++j)
        if (visible(p, query, j)) largest = fmaxf(largest, p.scale * dot(q, k + j * p.k_stride, d));
      for (int64_t j = 0; j < at.length; ++j)
        if (visible(p, query, j)) sum += expf(p.scale * dot(q, k + j * p.k_stride, d) - largest);
      const float lse = largest + logf(sum);
      p.lse[token * h + head] = lse;
      for (int64_t c = 0; c < d; ++c) {
        float total = 0.f;
        for (int64_t j = 0; j < at.length; ++j)
          if (visible(p, query, j))
            total += dropped(p, token, head, j, expf(p.scale * dot(q, k + j * p.k_stride, d) - lse)) *
                     value(v + j * p.v_stride + c);
        store_n(out + c, splat(total), 1);
      }
    }
}

template <typename T>
void backward(const Attention& p) {
  const int64_t d = p.head_dim, h = p.heads;
#pragma omp parallel for num_threads(p.threads) collapse(2)
  for (int64_t token = 0; token < p.tokens; ++token)
    for (int64_t head = 0; head < h; ++head) {
      const Place at = place_of(p, token);
      const int64_t own = token - at.start;
      const T* q = static_cast<const T*>(p.q) + at.start * p.q_stride + head * d;
      const T* k = static_cast<const T*>(p.k) + at.start * p.k_stride + head * d;
      const T* v = static_cast<const T*>(p.v) + at.start * p.v_stride + head * d;
      const T* dout = static_cast<const T*>(p.dout) + (at.start * h + head) * d;
      const T* out = static_cast<const T*>(p.out) + (at.start * h + head) * d;
      const auto weight = [&](int64_t i, int64_t j) {
        return expf(p.scale * dot(q + i * p.q_stride, k + j * p.k_stride, d) -
                    p.lse[(at.start + i) * h + head]);
      };
      const auto dscore = [&](int64_t i, int64_t j) {
        const float dweight = dropped(p, at.start + i, head, j, dot(dout + i * h * d, v + j * p.v_stride, d));
        return weight(i, j) * (dweight - dot(dout + i * h * d, out + i * h * d, d));
      };
      for (int64_t c = 0; c < d; ++c) {
        float dq = 0.f, dk = 0.f, dv = 0.f;
        for (int64_t j = 0; j < at.length; ++j) {
          if (visible(p, own, j)) dq += dscore(own, j) * value(k + j * p.k_stride + c);
          if (visible(p, j, own)) {
            dk += dscore(j, own) * value(q + j * p.q_stride + c);
            dv += dropped(p, at.start + j, head, own, weight(j, own)) * value(dout + j * h * d + c);
          }
        }
        const int64_t place = (token * h + head) * d + c;
        store_n(static_cast<T*>(p.dq) + place, splat(p.scale * dq), 1);
        store_n(static_cast<T*>(p.dk) + place, splat(p.scale * dk), 1);
        store_n(static_cast<T*>(p.dv) + place, splat(dv), 1);
      }
    }
}

}  // namespace

void attention_forward(const Attention& p) {
  switch (p.dtype) {
    case DType::f32:
      return forward<float>(p);
    case DType::bf16:
      return forward<bf16>(p);
    case DType::f16:
      return forward<f16>(p);
  }
}

void attention_backward(const Attention& p) {
  switch (p.dtype) {
    case DType::f32:
      return backward<float>(p);
    case DType::bf16:
      return backward<bf16>(p);
    case DType::f16:
      return backward<f16>(p);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
