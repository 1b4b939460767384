// GELU of x + bias, [T, H] and [H]:
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
#include "column_sums.h"
#include "exp.h"
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// Columns of a tile: whole rows of BERT base, as memory likes it, while bias and dbias stay in cache.
constexpr int64_t kColumns = 4096;

// Here the exponential becomes 0 on every instruction set, and with it tail and its derivative, which are
// below 1e-37. Up to here exponents stay within the range of `exp`.
constexpr float kExactEnd = 13.25f, kTanhEnd = 10.03f;         // by exp
constexpr float kExactEndShort = 15.f, kTanhEndShort = 10.8f;  // by exp2_short

// Vectors computed side by side, in a row, or in as many rows, whose share of dbias is then added up in
// registers. One after the other they would wait for themselves: a vector is a chain of 60 cycles, and a
// processor looks ahead over one or two. GCC interleaves them by -fschedule-insns (see setup.py), as far as
// results that it knows to stand elsewhere (__restrict) let it.
constexpr int kTogether = 4;

FASTBERT_INLINE vfloat absolute(vfloat x) { return as_float(as_uint(x) & 0x7FFFFFFFu); }

// ---- gelu and its derivative ------------------------------------------------------------------------

struct Tail {
  vfloat value, slope;  // tail(a), tail'(a)
};

// 1 / x: to 2^-14 is enough for the 16-bit types.
template <bool kShort>
FASTBERT_INLINE vfloat reciprocal(vfloat x) {
#if defined(__AVX512F__)
  if (kShort) return (vfloat)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
#endif
  return 1.f / x;
}

// exp(-a*a/2) up to the end. In float32 the square needs more than its own digits, so it comes in
// two parts: the square of a's upper 12 bits is exact, and the rest enters where exp's argument has been
// reduced. That gives about 1 ULP.
template <bool kShort>
FASTBERT_INLINE vfloat gauss(vfloat a) {
  if (kShort) return exp2_short(a * a * -0.72134752f);
  const vfloat head = as_float(as_uint(a) & 0xFFFFF000u);
  Reduced x = reduce(-0.5f * (head * head));
  x.r -= 0.5f * ((a - head) * (a + head));
  return exp(x);
}

// Phi(-a) = exp(-a*a/2) * s * Q(s), s = 1 / (a + k). Q is the minimax fit of exp(a*a/2) * Phi(-a) / s in
// relative error over 0 <= a <= 13.3: 8.8e-8 with degree 7 and k = 3.3, 4.5e-5 with degree 4 and k = 2.6.
template <bool kShort>
FASTBERT_INLINE Tail tail_exact(vfloat a) {
  const vfloat density = gauss<kShort>(a);  // without its factor 1 / sqrt(2 pi)
  const vfloat s = reciprocal<kShort>(a + (kShort ? 2.6f : 3.3f));
  vfloat q;
  if (kShort) {
    q = s * -10.529969f + 8.111355f;
    q = q * s + 1.756674f;
    q = q * s + 1.06771f;
    q = q * s + 0.3983456f;
  } else {
    q = s * 516.5728f - 666.5993f;
    q = q * s + 253.97015f;
    q = q * s - 18.224339f;
    q = q * s + 14.850441f;
    q = q * s + 3.6540864f;
    q = q * s + 1.3269342f;
    q = q * s + 0.39878547f;
  }
  q *= s;
  return {a * q * density, (q - a * 0.39894228f) * density};  // a first: density alone may be subnormal
}

template <bool kShort>
FASTBERT_INLINE Tail tail_tanh(vfloat a) {
  constexpr float k = 2.f * 0.79788456f;  // 2 sqrt(2/pi): 2w = k * (a + 0.044715 a^3)
  const vfloat square = a * a;
  const vfloat e = kShort ? exp2_short(a * (square * (k * 0.044715f * -1.442695f) + k * -1.442695f))
                          : exp(reduce(a * (square * (k * -0.044715f) - k)));
  const vfloat s = reciprocal<kShort>(e + 1.f), q = e * s;
  const vfloat turn = a * (square * (k * 3.f * 0.044715f) + k);  // a * d(2w)/da
  return {a * q, q - q * (turn * s)};
}

template <typename T, bool kTanh>
FASTBERT_INLINE Tail tail(vfloat u) {
  constexpr bool is_short = sizeof(T) == 2;
  constexpr float exact_end = is_short ? kExactEndShort : kExactEnd;
  constexpr float tanh_end = is_short ? kTanhEndShort : kTanhEnd;
  const vfloat a = min(splat(kTanh ? tanh_end : exact_end), absolute(u));  // NaN stays
  return kTanh ? tail_tanh<is_short>(a) : tail_exact<is_short>(a);
}

template <typename T, bool kTanh>
FASTBERT_INLINE vfloat gelu(vfloat u) {
  return max(u, vfloat{}) - tail<T, kTanh>(u).value;
}

template <typename T, bool kTanh>
FASTBERT_INLINE vfloat gelu_slope(vfloat u) {
  const vfloat slope = tail<T, kTanh>(u).slope;
  return u > 0.f ? 1.f - slope : slope;
}

// ---- tiles ------------------------------------------------------------------------------------------

// x in chunks of rows by blocks of kColumns columns; without bias it is one long row.
struct Tiles {
  int64_t rows, columns, chunks, blocks;
};

template <typename Arguments>
FASTBERT_INLINE Tiles tiles(const Arguments& p) {
  const int64_t rows = p.bias ? p.rows : 1, columns = p.bias ? p.columns : p.rows * p.columns;
  return {rows, columns, reduction_chunks(rows), ceil_div(columns, kColumns)};
}

// Rows `row` to `end` of columns `first` to `first + n`.
struct Tile {
  int64_t chunk, row, end, first, n;
};

FASTBERT_INLINE Tile tile_at(const Tiles& grid, int64_t i) {
  const int64_t chunk = i / grid.blocks, first = i % grid.blocks * kColumns;
  return {chunk, chunk * grid.rows / grid.chunks, (chunk + 1) * grid.rows / grid.chunks, first,
          min(kColumns, grid.columns - first)};
}

// Bias of a tile's columns, in float32.
template <typename Arguments>
FASTBERT_INLINE void read_bias(const Arguments& p, int64_t first, int64_t n, float* bias) {
  sweep<1>(n, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    switch (p.bias_dtype) {
      case DType::f32:
        return lanes.store(bias + j, lanes.load(static_cast<const float*>(p.bias) + first + j));
      case DType::bf16:
        return lanes.store(bias + j, lanes.load(static_cast<const bf16*>(p.bias) + first + j));
      case DType::f16:
        return lanes.store(bias + j, lanes.load(static_cast<const f16*>(p.bias) + first + j));
    }
  });
}

// ---- forward ----------------------------------------------------------------------------------------

template <typename T, bool kTanh, bool kBias>
FASTBERT_INLINE void forward_row(const T* x, const float* bias, int64_t n, T* __restrict y) {
  sweep<kTogether>(n, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    vfloat u = lanes.load(x + j);
    if (kBias) u += lanes.load(bias + j);
    lanes.store(y + j, gelu<T, kTanh>(u));
  });
}

template <typename T, bool kTanh, bool kBias>
void forward_tiles(const GeluForward& p) {
  const Tiles grid = tiles(p);
#pragma omp parallel for num_threads(p.launch) schedule(static)
  for (int64_t i = 0; i < grid.chunks * grid.blocks; ++i) {
    const Tile tile = tile_at(grid, i);
    float bias[kBias ? kColumns : 1];
    if (kBias) read_bias(p, tile.first, tile.n, bias);
    for (int64_t row = tile.row; row < tile.end; ++row) {
      const int64_t start = row * grid.columns + tile.first;
      forward_row<T, kTanh, kBias>(static_cast<const T*>(p.x) + start, bias, tile.n,
                                   static_cast<T*>(p.y) + start);
    }
  }
}

// ---- backward ---------------------------------------------------------------------------------------

// kRows rows, `columns` apart, whose sum is added to dbias.
template <typename T, bool kTanh, bool kBias, int kRows>
FASTBERT_INLINE void backward_rows(const T* dy, const T* x, const float* bias, int64_t columns, int64_t n,
                                   T* __restrict dx, float* dbias) {
  sweep<kTogether / kRows>(n, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    const vfloat b = kBias ? lanes.load(bias + j) : vfloat{};
    vfloat sum = kBias ? lanes.load(dbias + j) : vfloat{};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = i * columns + j;
      const vfloat u = kBias ? lanes.load(x + at) + b : lanes.load(x + at);
      const vfloat d = lanes.load(dy + at) * gelu_slope<T, kTanh>(u);
      lanes.store(dx + at, d);
      sum += d;
    }
    if (kBias) lanes.store(dbias + j, sum);
  });
}

template <typename T, bool kTanh, bool kBias>
FASTBERT_INLINE void backward_tile(const GeluBackward& p, const Tiles& grid, const Tile& tile) {
  float bias[kBias ? kColumns : 1], dbias[kBias ? kColumns : 1] = {};
  if (kBias) read_bias(p, tile.first, tile.n, bias);
  int64_t row = tile.row;
  const auto rows = [&](auto count) FASTBERT_LAMBDA {
    const int64_t start = row * grid.columns + tile.first;
    backward_rows<T, kTanh, kBias, count.value>(static_cast<const T*>(p.dy) + start,
                                                static_cast<const T*>(p.x) + start, bias, grid.columns,
                                                tile.n, static_cast<T*>(p.dx) + start, dbias);
    row += count.value;
  };
  while (kBias && row + kTogether <= tile.end) rows(Count<kTogether>{});
  while (row < tile.end) rows(Count<1>{});
  if (kBias) memcpy(p.scratch + tile.chunk * grid.columns + tile.first, dbias, tile.n * sizeof(float));
}

template <typename T, bool kTanh, bool kBias>
void backward_tiles(const GeluBackward& p) {
  const Tiles grid = tiles(p);
#pragma omp parallel num_threads(p.launch)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < grid.chunks * grid.blocks; ++i)
      backward_tile<T, kTanh, kBias>(p, grid, tile_at(grid, i));
    if (kBias) add_chunks(p.scratch, grid.chunks, p.columns, p.dbias, p.bias_dtype);
  }
}

// ---- launchers --------------------------------------------------------------------------------------

template <typename T, bool kTanh>
void forward(const GeluForward& p) {
  p.bias ? forward_tiles<T, kTanh, true>(p) : forward_tiles<T, kTanh, false>(p);
}

template <typename T, bool kTanh>
void backward(const GeluBackward& p) {
  p.bias ? backward_tiles<T, kTanh, true>(p) : backward_tiles<T, kTanh, false>(p);
}

}  // namespace

void gelu_forward(const GeluForward& p) {
  switch (p.dtype) {
    case DType::f32:
      return p.tanh_form ? forward<float, true>(p) : forward<float, false>(p);
    case DType::bf16:
      return p.tanh_form ? forward<bf16, true>(p) : forward<bf16, false>(p);
    case DType::f16:
      return p.tanh_form ? forward<f16, true>(p) : forward<f16, false>(p);
  }
}

void gelu_backward(const GeluBackward& p) {
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
