// LayerNorm with the dropout and the residual that come before it in a transformer, [T, H]:
//
//   z = residual + dropout(x + x_bias)             rounded to x's dtype; z = x when there is nothing of it
//   y = (z - mean) * rstd * weight + bias          mean and variance over a row, of the rounded z
//
// Backward takes z, mean [T], rstd [T] and one or two gradients of y, dy being their sum; with
// h = (z - mean) * rstd and g = dy * weight:
//
//   dz = rstd * (g - mean(g) - h * mean(g * h)),  dx = dropout'(dz),
//   dweight = sum(dy * h),  dbias = sum(dy),  dx_bias = sum(dx)
//
// Arithmetic is float32 for every dtype. A row is read from memory once and swept again from L1. The variance
// is the mean of squared deviations; sums run over blocks of a row, so that long rows lose no digits. The
// dropout mask is drawn again in backward, not stored. Ba, Kiros and Hinton, "Layer normalization" (2016).
#include "column_sums.h"
#include "dropout.h"
#include "layer_norm_row.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// ---- forward -----------------------------------------------------------------------------------------

// z = residual + dropout(x + x_bias) for a block at x, residual and z.
template <typename T, typename W>
FASTBERT_INLINE void add_dropped(const LayerNormForward& p, RowDropout& dropout, int64_t row, int64_t first,
                                 int64_t n, T* __restrict z) {
  const T* x = static_cast<const T*>(p.x) + row * p.columns + first;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.columns + first : nullptr;
  const W* x_bias = p.x_bias ? static_cast<const W*>(p.x_bias) + first : nullptr;
  const vfloat scale = splat(dropout_scale(p.t, kLaneBits));
  const uint16_t* kept = p.t ? draw_row(dropout, row, p.columns, first, n) : nullptr;
  sweep<4>(n, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    vfloat v = lanes.load(x + j);
    if (x_bias) v += lanes.load(x_bias + j);
    if (kept) v = drop(kept, j, v * scale);
    if (residual) v += lanes.load(residual + j);
    lanes.store(z + j, v);
  });
}

// The sum of a row, written to `z` first where it is not x.
template <typename T, typename W>
FASTBERT_INLINE float sum_row(const LayerNormForward& p, RowDropout& dropout, int64_t row, const T* z,
                              T* written) {
  vfloat total = {};
  for (int64_t first = 0; first < p.columns; first += kColumns) {
    const int64_t n = min(kColumns, p.columns - first);
    if (written) add_dropped<T, W>(p, dropout, row, first, n, written + first);
    total += sum_block(z + first, n);
  }
  return reduce_add(total);
}

template <typename T, typename W>
FASTBERT_INLINE void normalize(const T* z, int64_t columns, float mean, float rstd, const W* weight,
                               const W* bias, T* __restrict y) {
  sweep<4>(columns, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    const vfloat h = (lanes.load(z + j) - mean) * rstd;
    lanes.store(y + j, h * lanes.load(weight + j) + lanes.load(bias + j));
  });
}

template <typename T, typename W>
void forward(const LayerNormForward& p) {
  const int64_t columns = p.columns;
  const float share = 1.f / static_cast<float>(columns);
  const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
  const RowsAhead<T> ahead{p.x, p.residual, p.y, p.z};
#pragma omp parallel num_threads(p.launch)
  {
    RowDropout dropout(p.seed, p.t, 0);
    Scratch scratch(columns);
    T* row_alone = p.x_bias || p.residual || p.t ? reinterpret_cast<T*>(scratch.words(columns)) : nullptr;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      T* written = p.z ? static_cast<T*>(p.z) + row * columns : row_alone;
      const T* z = written ? written : static_cast<const T*>(p.x) + row * columns;
      const float mean = sum_row<T, W>(p, dropout, row, z, written) * share;
      const float variance = sum_squares(z, columns, mean, ahead, (row + 1) * columns) * share;
      const float rstd = 1.f / __builtin_sqrtf(variance + p.eps);
      if (p.mean) p.mean[row] = mean, p.rstd[row] = rstd;
      normalize(z, columns, mean, rstd, weight, bias, static_cast<T*>(p.y) + row * columns);
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------------

// Where a chunk of rows adds up its columns; dx_bias is null where there was no x_bias.
struct ColumnSums {
  float *dweight, *dbias, *dx_bias;
};

// Sums over a row of g and of g * h, with h = (z - mean) * rstd and g = dy * weight.
struct RowSums {
  float g, gh;
};

// Also adds the row to dweight and dbias, and draws its dropout where that can be kept for `row_gradients`.
template <typename T, typename W, bool kMore>
FASTBERT_INLINE RowSums sum_gradients(const LayerNormBackward& p, RowDropout& dropout, int64_t row,
                                      const ColumnSums& sums) {
  const int64_t columns = p.columns;
  float* __restrict dweight = sums.dweight, * __restrict dbias = sums.dbias;
  const T* dy = static_cast<const T*>(p.dy) + row * columns;
  const T* dy2 = p.dy2 ? static_cast<const T*>(p.dy2) + row * columns : nullptr;
  const T* z = static_cast<const T*>(p.z) + row * columns;
  const W* weight = static_cast<const W*>(p.weight);
  const float mean = p.mean[row], rstd = p.rstd[row];
  vfloat total_g = {}, total_gh = {};
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t n = min(kColumns, columns - first);
    if (p.t && columns <= kRowDrawn) draw_row(dropout, row, columns, first, n);
    vfloat sum_g[kSums] = {}, sum_gh[kSums] = {};
    sweep<kSums>(n, [&](int64_t k, int i, auto lanes) FASTBERT_LAMBDA {
      const int64_t j = first + k;
      vfloat d = lanes.load(dy + j);
      if (kMore && dy2) d += lanes.load(dy2 + j);
      const vfloat h = (lanes.load(z + j) - mean) * rstd, g = d * lanes.load(weight + j);
      sum_g[i] += g;
      sum_gh[i] += lanes.keep(g * h);
      lanes.store(dweight + j, lanes.load(dweight + j) + d * h);
      lanes.store(dbias + j, lanes.load(dbias + j) + d);
    });
    total_g += add_up(sum_g);
    total_gh += add_up(sum_gh);
  }
  return {reduce_add(total_g), reduce_add(total_gh)};
}

// dz of a row, and dx where something was dropped; what of them is x's gradient is added to dx_bias.
template <typename T, typename W, bool kMore>
FASTBERT_INLINE void row_gradients(const LayerNormBackward& p, RowDropout& dropout, int64_t row, float mean_g,
                                   float mean_gh, float* __restrict dx_bias, const RowsAhead<T>& ahead) {
  const int64_t columns = p.columns;
  const T* dy = static_cast<const T*>(p.dy) + row * columns;
  const T* dy2 = p.dy2 ? static_cast<const T*>(p.dy2) + row * columns : nullptr;
  const T* z = static_cast<const T*>(p.z) + row * columns;
  const W* weight = static_cast<const W*>(p.weight);
  T* __restrict dz = static_cast<T*>(p.dz) + row * columns;
  T* __restrict dx = static_cast<T*>(p.dx) + (p.t ? row * columns : 0);
  const float mean = p.mean[row], rstd = p.rstd[row];
  const vfloat scale = splat(dropout_scale(p.t, kLaneBits));
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t n = min(kColumns, columns - first);
    const uint16_t* kept = !p.t                   ? nullptr
                           : columns <= kRowDrawn ? dropout.kept(0, first)
                                                  : draw_row(dropout, row, columns, first, n);
    sweep<4>(n, [=](int64_t k, int i, auto lanes) FASTBERT_LAMBDA {
      const int64_t j = first + k;
      if (prefetches<T>(i)) ahead.prefetch((row + 1) * columns + j);
      vfloat d = lanes.load(dy + j);
      if (kMore && dy2) d += lanes.load(dy2 + j);
      const vfloat h = (lanes.load(z + j) - mean) * rstd, g = d * lanes.load(weight + j);
      d = rstd * (g - mean_g - h * mean_gh);
      lanes.store(dz + j, d);
      if (kept) {
        d = drop(kept, k, d * scale);
        lanes.store(dx + j, d);
      }
      if (kMore && dx_bias) lanes.store(dx_bias + j, lanes.load(dx_bias + j) + d);
    });
  }
}

// kMore: dy2 or dx_bias is there; a look at each in every vector took a tenth of the time of a row without.
template <typename T, typename W, bool kMore>
void backward(const LayerNormBackward& p) {
  const int64_t columns = p.columns, chunks = reduction_chunks(p.rows), outputs = p.dx_bias ? 3 : 2;
  const float share = 1.f / static_cast<float>(columns);
  const RowsAhead<T> ahead{p.dy, p.z, p.dz, p.dx};
#pragma omp parallel num_threads(p.launch)
  {
    RowDropout dropout(p.seed, p.t, 0);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      ColumnSums sums{};
      float** each[] = {&sums.dweight, &sums.dbias, &sums.dx_bias};
      for (int64_t i = 0; i < outputs; ++i) {
        *each[i] = p.scratch + (i * chunks + chunk) * columns;
        memset(*each[i], 0, columns * sizeof(float));
      }
      for (int64_t row = chunk * p.rows / chunks; row < (chunk + 1) * p.rows / chunks; ++row) {
        const RowSums of_row = sum_gradients<T, W, kMore>(p, dropout, row, sums);
        row_gradients<T, W, kMore>(p, dropout, row, of_row.g * share, of_row.gh * share, sums.dx_bias, ahead);
      }
    }
    void* const results[] = {p.dweight, p.dbias, p.dx_bias};
    for (int64_t i = 0; i < outputs; ++i)
      add_chunks(p.scratch + i * chunks * columns, chunks, columns, results[i], p.weight_dtype);
  }
}

template <typename T, typename W>
void backward(const LayerNormBackward& p) {
  return p.dy2 || p.dx_bias ? backward<T, W, true>(p) : backward<T, W, false>(p);
}

}  // namespace

// ---- launchers ---------------------------------------------------------------------------------------

void layer_norm_forward(const LayerNormForward& p) {
  const bool same = p.weight_dtype == p.dtype;
  switch (p.dtype) {
    case DType::f32:
      return forward<float, float>(p);
    case DType::bf16:
      return same ? forward<bf16, bf16>(p) : forward<bf16, float>(p);
    case DType::f16:
      return same ? forward<f16, f16>(p) : forward<f16, float>(p);
  }
}

void layer_norm_backward(const LayerNormBackward& p) {
  const bool same = p.weight_dtype == p.dtype;
  switch (p.dtype) {
    case DType::f32:
      return backward<float, float>(p);
    case DType::bf16:
      return same ? backward<bf16, bf16>(p) : backward<bf16, float>(p);
    case DType::f16:
      return same ? backward<f16, f16>(p) : backward<f16, float>(p);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
