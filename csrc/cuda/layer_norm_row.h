// What the kernels of LayerNorm have in common: how a warp takes the columns of a row, and z.
//
// A warp takes 256 neighbouring columns at a time, a group, since one call of Philox in each lane draws what
// is kept of them. A lane has eight columns of a group, in steps of kVector neighbours:
//
//   column = group + (step * 32 + lane) * kVector
#pragma once
#include "../contract.h"
#include "dropout.h"
#include "vectors.h"

namespace fastbert::cuda {

constexpr int kGroup = kWarp * kPerCall;  // columns
constexpr int kEach = kPerCall;           // of them in a lane

template <int kVector>
constexpr int kSteps = kEach / kVector;

template <int kVector>
DEVICE int column_of(int group, int step) {
  return group + (step * kWarp + lane_of_warp()) * kVector;
}

// What a lane holds of a group, as it lies in memory; 0 beyond the row.
template <class T, int kVector>
struct Held {
  Packed<T, kVector> steps[kSteps<kVector>];

  // `row` may be null where there are no columns.
  DEVICE void read(const T* row, int group, int columns) {
#pragma unroll
    for (int i = 0; i < kSteps<kVector>; ++i) {
      const int column = column_of<kVector>(group, i);
      steps[i] = column < columns ? load_packed<kVector>(row + column) : Packed<T, kVector>{};
    }
  }
};

// What dropout does to x, or to dz. t = 0 drops nothing: everything is kept, times 1.
struct Drop {
  uint32_t t;
  float scale;
  uint64_t seed;

  DEVICE Drop(uint32_t t, float scale, const int64_t* seed)
      : t(t), scale(scale), seed(t ? static_cast<uint64_t>(__ldg(seed)) : 0) {}

  // What is kept of neighbouring groups from column `first` on, for `apply`; all lanes of a warp call both.
  template <int kGroups>
  DEVICE void draw(int64_t row, int first, uint32_t (&kept)[kGroups]) const {
    if (t) {
#pragma unroll
      for (int k = 0; k < kGroups; ++k)
        kept[k] = kept_of_row(seed, row, first / kPerCall + k * kWarp + lane_of_warp(), t);
    } else {
#pragma unroll
      for (int k = 0; k < kGroups; ++k) kept[k] = ~0u;
    }
  }

  template <int kVector>
  DEVICE void apply(uint32_t kept, int step, float* values) const {
    const uint32_t bits = kept_in_step<kVector>(kept, step);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] = bits >> j & 1 ? values[j] * scale : 0.f;
  }
};

// kVector elements of weight, bias or x_bias, which are float32 or T.
template <class T, int kVector, Cache kCache = Cache::read_only>
DEVICE void load_parameter(const void* parameter, bool is_float, int column, float (&values)[kVector]) {
  if (is_float)
    load<kVector, kCache>(static_cast<const float*>(parameter) + column, values);
  else
    load<kVector, kCache>(static_cast<const T*>(parameter) + column, values);
}

// z = residual + dropout(x + x_bias) of a group, rounded; `written` is the row of z, of which so many columns
// are wanted.
template <class T, int kVector>
DEVICE void add_dropped(const LayerNormForward& a, bool is_float, const Drop& drop, uint32_t kept,
                        const Held<T, kVector>& x, const Held<T, kVector>& residual, int group, T* written,
                        int columns_written, float (&z)[kEach]) {
  const int columns_biased = a.x_bias ? static_cast<int>(a.columns) : 0;
#pragma unroll
  for (int i = 0; i < kSteps<kVector>; ++i) {
    const int column = column_of<kVector>(group, i);
    float *values = z + i * kVector, added[kVector], x_bias[kVector] = {};
    if (column < columns_biased) load_parameter<T, kVector>(a.x_bias, is_float, column, x_bias);
    unpack<T, kVector>(x.steps[i], values);
    unpack<T, kVector>(residual.steps[i], added);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] += x_bias[j];
    drop.apply<kVector>(kept, i, values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] += added[j];
    const Packed<T, kVector> rounded = pack<T, kVector>(values);
    if (column < columns_written) store_packed<kVector>(written + column, rounded);
    unpack<T, kVector>(rounded, values);
  }
}

DEVICE float sum_of(const float (&z)[kEach]) {
  return ((z[0] + z[1]) + (z[2] + z[3])) + ((z[4] + z[5]) + (z[6] + z[7]));
}

// The sum of squared deviations of a group's columns that lie within the row.
template <int kVector>
DEVICE float sum_of_squares(const float (&z)[kEach], float mean, int group, int columns) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kSteps<kVector>; ++i)
    if (column_of<kVector>(group, i) < columns)
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float d = z[i * kVector + j] - mean;
        sum += d * d;
      }
  return sum;
}

// y = (z - mean) * rstd * weight + bias of a group.
template <class T, int kVector>
DEVICE void normalize(const LayerNormForward& a, bool is_float, const float (&z)[kEach], float mean,
                      float rstd, int64_t row, int group) {
#pragma unroll
  for (int i = 0; i < kSteps<kVector>; ++i) {
    const int column = column_of<kVector>(group, i);
    if (column >= static_cast<int>(a.columns)) continue;
    float weight[kVector], bias[kVector], values[kVector];
    load_parameter<T, kVector>(a.weight, is_float, column, weight);
    load_parameter<T, kVector>(a.bias, is_float, column, bias);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] = (z[i * kVector + j] - mean) * rstd * weight[j] + bias[j];
    store<kVector>(static_cast<T*>(a.y) + row * a.columns + column, values);
  }
}

// Where the column sums of backward go, in the order that they have in scratch.
DEVICE void* gradient_of(const LayerNormBackward& a, int which) {
  return which == 0 ? a.dweight : which == 1 ? a.dbias : a.dx_bias;
}

}  // namespace fastbert::cuda
