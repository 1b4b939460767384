// GELU of x + bias, [M, N] and [N]:
//
//   y = u * Phi(u),                    u = x + bias                       exact form
//   y = u * sigmoid(2w),               w = sqrt(2/pi) * (u + 0.044715 u^3)  tanh form
//
// Both are relu(u) - tail(|u|) with tail(a) = a * Phi(-a), or a * sigmoid(-2w): neither subtracts nearly
// equal numbers, and tail goes to 0 where u is infinite. The derivative is 1 + c(|u|) right of 0 and -c(|u|)
// left of it, with c = -tail', so forward and backward share one exp. Hendrycks and Gimpel, "Gaussian error
// linear units" (2016).
//
// Arithmetic is float32 for every dtype. Backward reads x again rather than saving anything; dbias, the
// column sums of dx before it is rounded, is taken in the same pass.
#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // columns of a tile: its bias and dbias stay in L1
constexpr float kTailEnd = 15.f;    // tail(a) and c(a) are 0 in float32 from here on
constexpr float kSqrt2OverPi = 0.79788456f;

struct Tail {
  vfloat value, slope;  // tail(a), c(a)
};

// exp(-a*a/2) for 0 <= a <= kTailEnd to about 1 ULP. The square needs more than float32's digits, so it comes
// in two parts: `high`, the square of a's upper 12 bits, is exact, and the rest enters where exp's argument
// has been reduced.
FASTBERT_INLINE vfloat gauss(vfloat a) {
  const vfloat head = as_float(as_uint(a) & 0xFFFFF000u);
  const vfloat high = -0.5f * (head * head), low = -0.5f * ((a - head) * (a + head));
  return exp(high, low);
}

// Phi(-a) = exp(-a*a/2) * s * Q(s), s = 1 / (a + 2 sqrt 2). The polynomial is the minimax fit (Remez) of
// exp(a*a/2) * Phi(-a) / s in relative error over 0 <= a <= 15.1: 4.4e-8.
FASTBERT_INLINE Tail tail_exact(vfloat a) {
  const vfloat density = gauss(a);  // without its factor 1 / sqrt(2 pi)
  const vfloat s = 1.f / (a + 2.8284271f);
  vfloat q = splat(-343.10312f);
  q = q * s + 584.4319f;
  q = q * s - 353.95984f;
  q = q * s + 71.667015f;
  q = q * s - 2.5274062f;
  q = q * s + 6.503586f;
  q = q * s + 2.7488298f;
  q = q * s + 1.1295779f;
  q = q * s + 0.39892888f;
  q *= s;
  return {a * q * density, (a * 0.39894228f - q) * density};  // a first: density alone may be subnormal
}

FASTBERT_INLINE Tail tail_tanh(vfloat a) {
  const vfloat square = a * a;
  const vfloat e = exp((-2.f * kSqrt2OverPi) * a * (square * 0.044715f + 1.f));
  const vfloat s = 1.f / (e + 1.f);
  const vfloat slope = (2.f * kSqrt2OverPi) * a * (square * (3.f * 0.044715f) + 1.f);  // a * d(2w)/da
  return {a * e * s, e * s * (slope * s - 1.f)};
}

template <bool kTanh>
FASTBERT_INLINE Tail tail(vfloat u) {
  vfloat a = u < 0.f ? -u : u;
  a = a > kTailEnd ? splat(kTailEnd) : a;  // NaN stays
  return kTanh ? tail_tanh(a) : tail_exact(a);
}

template <bool kTanh>
FASTBERT_INLINE vfloat gelu(vfloat u) {
  return (u > 0.f ? u : vfloat{}) - tail<kTanh>(u).value;
}

template <bool kTanh>
FASTBERT_INLINE vfloat gelu_slope(vfloat u) {
  const vfloat c = tail<kTanh>(u).slope;
  return u > 0.f ? 1.f + c : -c;
}

// A tile: kColumns columns of one run of rows. Without bias x is one long row.
struct Tiles {
  int64_t rows, columns, chunks, blocks;
};

FASTBERT_INLINE Tiles tiles(const Gelu& p) {
  const int64_t rows = p.bias ? p.rows : 1, columns = p.bias ? p.columns : p.rows * p.columns;
  return {rows, columns, reduction_chunks(rows), ceil_div(columns, kColumns)};
}

FASTBERT_INLINE void read_bias(const Gelu& p, int64_t first, int64_t n, float* bias) {
  for (int64_t j = 0; j < n; ++j) {
    if (!p.bias)
      bias[j] = 0.f;
    else if (p.bias_dtype == DType::f32)
      bias[j] = static_cast<const float*>(p.bias)[first + j];
    else if (p.bias_dtype == DType::bf16)
      bias[j] = load_n(static_cast<const bf16*>(p.bias) + first + j, 1)[0];
    else
      bias[j] = load_n(static_cast<const f16*>(p.bias) + first + j, 1)[0];
  }
}

template <typename T, bool kTanh>
void forward(const Gelu& p) {
  const Tiles grid = tiles(p);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t tile = 0; tile < grid.chunks * grid.blocks; ++tile) {
    const int64_t chunk = tile / grid.blocks, first = tile % grid.blocks * kColumns;
    const int64_t n = min(kColumns, grid.columns - first), whole = n - n % kLanes;
    float bias[kColumns];
    read_bias(p, first, n, bias);
    for (int64_t r = chunk * grid.rows / grid.chunks; r < (chunk + 1) * grid.rows / grid.chunks; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * grid.columns + first;
      T* y = static_cast<T*>(p.out) + r * grid.columns + first;
      for (int64_t j = 0; j < whole; j += kLanes) store(y + j, gelu<kTanh>(load(x + j) + load(bias + j)));
      if (whole < n)
        store_n(y + whole, gelu<kTanh>(load_n(x + whole, n - whole) + load_n(bias + whole, n - whole)),
                n - whole);
    }
  }
}

template <typename T, bool kTanh>
void backward(const Gelu& p) {
  const Tiles grid = tiles(p);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < grid.chunks * grid.blocks; ++tile) {
      const int64_t chunk = tile / grid.blocks, first = tile % grid.blocks * kColumns;
      const int64_t n = min(kColumns, grid.columns - first), whole = n - n % kLanes;
      float bias[kColumns], dbias[kColumns];
      read_bias(p, first, n, bias);
      memset(dbias, 0, sizeof dbias);
      for (int64_t r = chunk * grid.rows / grid.chunks; r < (chunk + 1) * grid.rows / grid.chunks; ++r) {
        const T* x = static_cast<const T*>(p.x) + r * grid.columns + first;
        const T* dy = static_cast<const T*>(p.dy) + r * grid.columns + first;
        T* dx = static_cast<T*>(p.out) + r * grid.columns + first;
        for (int64_t j = 0; j < whole; j += kLanes) {
          const vfloat d = load(dy + j) * gelu_slope<kTanh>(load(x + j) + load(bias + j));
          store(dx + j, d);
          store(dbias + j, load(dbias + j) + d);
        }
        if (whole < n) {
          const vfloat u = load_n(x + whole, n - whole) + load_n(bias + whole, n - whole);
          const vfloat d = load_n(dy + whole, n - whole) * gelu_slope<kTanh>(u);
          store_n(dx + whole, d, n - whole);
          store_n(dbias + whole, load_n(dbias + whole, n - whole) + d, n - whole);
        }
      }
      if (p.dbias) memcpy(p.scratch + chunk * grid.columns + first, dbias, n * sizeof(float));
    }
    if (p.dbias) add_chunks(p.scratch, grid.chunks, p.columns, p.dbias, p.bias_dtype);
  }
}

}  // namespace

void gelu_forward(const Gelu& p) {
  switch (p.dtype) {
    case DType::f32:
      return p.tanh_form ? forward<float, true>(p) : forward<float, false>(p);
    case DType::bf16:
      return p.tanh_form ? forward<bf16, true>(p) : forward<bf16, false>(p);
    case DType::f16:
      return p.tanh_form ? forward<f16, true>(p) : forward<f16, false>(p);
  }
}

void gelu_backward(const Gelu& p) {
  switch (p.dtype) {
    case DType::f32:
      return p.tanh_form ? backward<float, true>(p) : backward<float, false>(p);
    case DType::bf16:
      return p.tanh_form ? backward<bf16, true>(p) : backward<bf16, false>(p);
    case DType::f16:
      return p.tanh_form ? backward<f16, true>(p) : backward<f16, false>(p);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
