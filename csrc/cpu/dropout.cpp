// Dropout of [T, H]: y = x * scale where an element is kept, 0 where it is dropped. Which are kept follows
// from the seed and from where they stand, so that the gradient is this very function of dy.
//
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
#include "dropout.h"

#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

constexpr int64_t kColumns = 256;  // of a block: its random numbers are drawn before it is read

// Both directions.
template <typename T>
void rows(const Dropout& p) {
  const vfloat scale = splat(dropout_scale(p.t, kLaneBits));
#pragma omp parallel num_threads(p.launch)
  {
    RowDropout dropout(p.seed, p.t, 0);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t first = 0; first < p.columns; first += kColumns) {
        const int64_t n = min(kColumns, p.columns - first), at = row * p.columns + first;
        const T* x = static_cast<const T*>(p.x) + at;
        T* __restrict y = static_cast<T*>(p.y) + at;
        const uint16_t* kept = draw_row(dropout, row, p.columns, first, n);
        sweep<4>(n, [=](int64_t j, int, auto lanes)
                        FASTBERT_LAMBDA { lanes.store(y + j, drop(kept, j, lanes.load(x + j) * scale)); });
      }
    }
  }
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------------

void dropout(const Dropout& p) {
  switch (p.dtype) {
    case DType::f32:
      return rows<float>(p);
    case DType::bf16:
      return rows<bf16>(p);
    case DType::f16:
      return rows<f16>(p);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
