// LayerNorm with the dropout and the residual that come before it in a transformer, [M, N]:
//
//   z = residual + dropout(x)                      rounded to x's dtype; z = x when there is neither
//   y = (z - mean) * rstd * weight + bias          mean and variance over a row, of the rounded z
//
// Backward takes z, mean and rstd; with h = (z - mean) * rstd and g = dy * weight:
//
//   dz = rstd * (g - mean(g) - h * mean(g * h)),  dx = dropout'(dz),  dweight = sum(dy * h),  dbias = sum(dy)
//
// Arithmetic is float32 for every dtype. A row is read from memory once and swept again from L1. The variance
// is the mean of squared deviations. The dropout mask is drawn again in backward, not stored. Ba, Kiros and
// Hinton, "Layer normalization" (2016).
#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // columns whose dropout lanes are drawn at a time

// The lanes of columns first to first + kColumns of a row.
FASTBERT_INLINE void draw(const LayerNorm& p, int64_t row, int64_t first, uint16_t* lanes) {
  dropout_lanes(p.seed, static_cast<uint32_t>(first / 8), static_cast<uint32_t>(row), 0, 0,
                ceil_div(min(kColumns, p.columns - first), 8), lanes);
}

template <typename T>
FASTBERT_INLINE vfloat load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}

template <typename T>
FASTBERT_INLINE void store_some(T* p, vfloat v, int64_t n) {
  n >= kLanes ? store(p, v) : store_n(p, v, n);
}

// Lanes from n on become 0.
FASTBERT_INLINE vfloat first_n(vfloat v, int64_t n) {
  vint index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index < static_cast<int32_t>(min(n, kLanes)) ? v : vfloat{};
}

// z = residual + dropout(x)
template <typename T>
FASTBERT_INLINE void add_dropped(const LayerNorm& p, int64_t row, T* z) {
  const T* x = static_cast<const T*>(p.x) + row * p.columns;
  const T* residual = static_cast<const T*>(p.residual) + (p.residual ? row * p.columns : 0);
  const vfloat scale = splat(dropout_scale(p.drop_below));
  uint16_t lanes[kColumns];
  for (int64_t first = 0; first < p.columns; first += kColumns) {
    if (p.drop_below) draw(p, row, first, lanes);
    for (int64_t j = first; j < min(first + kColumns, p.columns); j += kLanes) {
      const int64_t n = p.columns - j;
      vfloat v = load_some(x + j, n);
      if (p.drop_below) v = kept(lanes + (j - first), p.drop_below) ? v * scale : vfloat{};
      if (p.residual) v += load_some(residual + j, n);
      store_some(z + j, v, n);
    }
  }
}

template <typename T, typename W>
void forward(const LayerNorm& p) {
  const int64_t columns = p.columns;
  const float share = 1.f / static_cast<float>(columns);
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* z = static_cast<const T*>(p.x) + row * columns;
    T* y = static_cast<T*>(p.y) + row * columns;
    if (p.z) {
      T* sum = static_cast<T*>(p.z) + row * columns;
      add_dropped(p, row, sum);
      z = sum;
    }

    // statistics
    vfloat total = {};
    for (int64_t j = 0; j < columns; j += kLanes) total += load_some(z + j, columns - j);
    const float mean = reduce_add(total) * share;
    vfloat squares = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const vfloat d = first_n(load_some(z + j, columns - j) - mean, columns - j);
      squares += d * d;
    }
    const float rstd = 1.f / __builtin_sqrtf(reduce_add(squares) * share + p.eps);
    p.mean[row] = mean;
    p.rstd[row] = rstd;

    // normalize, affine
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = columns - j;
      const vfloat h = (load_some(z + j, n) - mean) * rstd;
      store_some(y + j, h * load_some(weight + j, n) + load_some(bias + j, n), n);
    }
  }
}

template <typename T, typename W>
void backward(const LayerNorm& p) {
  const int64_t columns = p.columns, chunks = reduction_chunks(p.rows);
  const float share = 1.f / static_cast<float>(columns);
  const W* weight = static_cast<const W*>(p.weight);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      float* dweight = p.scratch + chunk * columns;
      float* dbias = p.scratch + (chunks + chunk) * columns;
      memset(dweight, 0, columns * sizeof(float));
      memset(dbias, 0, columns * sizeof(float));
      for (int64_t row = chunk * p.rows / chunks; row < (chunk + 1) * p.rows / chunks; ++row) {
        const T* dy = static_cast<const T*>(p.dy) + row * columns;
        const T* z = static_cast<const T*>(p.x) + row * columns;
        T* dz = static_cast<T*>(p.y) + row * columns;
        const float mean = p.mean[row], rstd = p.rstd[row];

        // sums over the row, and over the rows
        vfloat sum_g = {}, sum_gh = {};
        for (int64_t j = 0; j < columns; j += kLanes) {
          const int64_t n = columns - j;
          const vfloat d = load_some(dy + j, n), h = first_n((load_some(z + j, n) - mean) * rstd, n);
          const vfloat g = d * load_some(weight + j, n);
          sum_g += g;
          sum_gh += g * h;
          store_some(dweight + j, load_some(dweight + j, n) + d * h, n);
          store_some(dbias + j, load_some(dbias + j, n) + d, n);
        }
        const float mean_g = reduce_add(sum_g) * share, mean_gh = reduce_add(sum_gh) * share;

        // gradients of the row
        const vfloat scale = splat(dropout_scale(p.drop_below));
        uint16_t lanes[kColumns];
        for (int64_t first = 0; first < columns; first += kColumns) {
          if (p.drop_below) draw(p, row, first, lanes);
          for (int64_t j = first; j < min(first + kColumns, columns); j += kLanes) {
            const int64_t n = columns - j;
            const vfloat h = (load_some(z + j, n) - mean) * rstd;
            const vfloat g = load_some(dy + j, n) * load_some(weight + j, n);
            const vfloat d = rstd * (g - mean_g - h * mean_gh);
            store_some(dz + j, d, n);
            if (p.drop_below)
              store_some(static_cast<T*>(p.z) + row * columns + j,
                         kept(lanes + (j - first), p.drop_below) ? d * scale : vfloat{}, n);
          }
        }
      }
    }
    add_chunks(p.scratch, chunks, columns, p.dweight, p.weight_dtype);
    add_chunks(p.scratch + chunks * columns, chunks, columns, p.dbias, p.weight_dtype);
  }
}

}  // namespace

void layer_norm_forward(const LayerNorm& p) {
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

void layer_norm_backward(const LayerNorm& p) {
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
