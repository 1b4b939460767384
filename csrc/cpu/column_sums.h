// Sums over the rows of a matrix, which do not depend on the number of threads: a kernel adds up
// `reduction_chunks(rows)` chunks of rows, each by itself, and `add_chunks` adds those in order.
#pragma once
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {

// out[j] = the sum of scratch[chunk, j], [chunks, columns], in the order of the chunks. Every thread of a
// parallel region calls it; they share the columns.
FASTBERT_INLINE void add_chunks(const float* scratch, int64_t chunks, int64_t columns, void* out,
                                DType dtype) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < columns; first += 64)
    sweep<1>(min(64, columns - first), [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
      vfloat sum = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        sum += lanes.load(scratch + chunk * columns + first + j);
      switch (dtype) {
        case DType::f32:
          return lanes.store(static_cast<float*>(out) + first + j, sum);
        case DType::bf16:
          return lanes.store(static_cast<bf16*>(out) + first + j, sum);
        case DType::f16:
          return lanes.store(static_cast<f16*>(out) + first + j, sum);
      }
    });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
