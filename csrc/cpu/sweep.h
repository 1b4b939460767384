// Sweeps over the elements of a row, a vector at a time, its last one in part.
#pragma once
#include "load_store.h"

namespace fastbert {
namespace FASTBERT_ISA {

// What a vector covers: all of its lanes, or the first n, n < kLanes, at the end of a row. load gives 0 in
// the other lanes, store leaves their places alone.
struct AllLanes {
  template <typename T>
  FASTBERT_MEMBER vfloat load(const T* p) const {
    return FASTBERT_ISA::load(p);
  }
  template <typename T>
  FASTBERT_MEMBER void store(T* p, vfloat v) const {
    FASTBERT_ISA::store(p, v);
  }
  FASTBERT_MEMBER vfloat keep(vfloat v) const { return v; }  // 0 in the lanes not covered
};

struct FirstLanes {
  int64_t n;

  template <typename T>
  FASTBERT_MEMBER vfloat load(const T* p) const {
    return load_n(p, n);
  }
  template <typename T>
  FASTBERT_MEMBER void store(T* p, vfloat v) const {
    store_n(p, v, n);
  }
  FASTBERT_MEMBER vfloat keep(vfloat v) const {
    vint index;
    for (int i = 0; i < kLanes; ++i) index[i] = i;
    return index < static_cast<int32_t>(n) ? v : vfloat{};
  }
};

// body(j, i, lanes) for the vectors at j = 0, kLanes, ... of n elements; i < kUnroll numbers independent
// accumulators, without which a sum waits for one addition after another.
template <int kUnroll, typename Body>
FASTBERT_INLINE void sweep(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= n; j += kUnroll * kLanes)
    for (int i = 0; i < kUnroll; ++i) body(j + i * kLanes, i, AllLanes{});
  if (kUnroll > 1)
    for (; j + kLanes <= n; j += kLanes) body(j, 0, AllLanes{});
  if (j < n) body(j, 0, FirstLanes{n - j});
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
