// Column sums over rows: blocks leave the sums of their rows, parts, in scratch [outputs, parts, stride], and
// the last block to be done adds the parts up, always in the same order.
#pragma once
#include "column_parts.h"
#include "last_block.h"
#include "reduce.h"
#include "vectors.h"

namespace fastbert::cuda {
namespace {

// kCount columns of every part from `first` to `parts`, `step` further each time; parts lie `stride` apart.
template <int kCount>
DEVICE void add_parts(const float* scratch, int first, int parts, int step, int64_t stride,
                      float (&sum)[kCount]) {
#pragma unroll 8
  for (int part = first; part < parts; part += step) {
    float values[kCount];
    load<kCount, Cache::plain>(scratch + part * stride, values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += values[i];
  }
}

// kCount sums as elements of a gradient in the dtype of its parameter, float32 or T.
template <class T, int kCount>
DEVICE void store_sums(void* gradient, bool is_float, int64_t column, const float (&sums)[kCount]) {
  if (is_float)
    store<kCount>(static_cast<float*>(gradient) + column, sums);
  else
    store<kCount>(static_cast<T*>(gradient) + column, sums);
}

// Where every block has left a part of all columns: kPartsOfGroup neighbours are a group, whose last block
// adds them up into the first of them; the last of these blocks adds up the groups. One block for all parts
// would take as long as the kernel. counters [1 + groups]. `finish(output, column, sums of four columns)`.
template <int kThreads, class Finish>
DEVICE void finish_column_sums(float* scratch, int outputs, int64_t stride, const Counters& counters,
                               Finish finish) {
  const int parts = gridDim.x, groups = (parts + kPartsOfGroup - 1) / kPartsOfGroup;
  const int group = blockIdx.x / kPartsOfGroup, first = group * kPartsOfGroup;
  const int end = min(parts, first + kPartsOfGroup), quads = static_cast<int>(stride / 4);
  if (!is_last_block(counters.at(1 + group), end - first)) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs * quads; i += kThreads) {
    float* own = scratch + i / quads * parts * stride + i % quads * 4;
    float sum[4] = {};
    add_parts(own, first, end, 1, stride, sum);
    if (groups > 1)
      store<4>(own + first * stride, sum);
    else
      finish(i / quads, i % quads * 4, sum);
  }
  if (groups == 1 || !is_last_block(counters.at(0), groups)) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs * quads; i += kThreads) {
    float sum[4] = {};
    add_parts(scratch + i / quads * parts * stride + i % quads * 4, 0, parts, kPartsOfGroup, stride, sum);
    finish(i / quads, i % quads * 4, sum);
  }
}

}  // namespace
}  // namespace fastbert::cuda
