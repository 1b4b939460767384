// Softmax cross entropy of logits [T, V] with one label a row:
//
//   m = max_j x_j,   s = sum_j exp(x_j - m),   loss = log(s) + (m - x_label)
//   dx_j = (exp(x_j - m) / s - [j = label]) * dloss
//
// A row whose label is `ignore_index` is not read: its loss and its dx are 0. m and s are kept apart, not as
// m + log(s), whose rounding would enter every exp of the backward pass where logits are large. Rows lie
// `stride` >= V elements apart; dx is 0 between them, so that products over the whole width are right.
//
// Where a mean or a sum is wanted, it is added up in double behind the rows, and backward takes one dloss for
// all rows, for a mean with the number that it was divided by. Rows that are right are counted beside it: no
// logit exceeds their label's, so that loss = log(s).
//
// Arithmetic is float32 for every dtype. Forward reads the logits once: a block of a row stays in the L1
// cache for its maximum and then its sum, and the sum so far is scaled when the maximum moves (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018). Backward reads them once and writes dx
// once. One thread does a whole row, so results do not depend on the number of threads.
#include "exp.h"
#include "reduce.h"
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // columns of a block; in float32 half of a small L1 cache
constexpr int kUnroll = 4;        // vectors of it side by side

// ---- forward ----------------------------------------------------------------------------------------

// `fill` in the lanes behind the last number.
template <typename T>
FASTBERT_INLINE vfloat load_or(AllLanes, const T* p, float) {
  return load(p);
}

template <typename T>
FASTBERT_INLINE vfloat load_or(FirstLanes lanes, const T* p, float fill) {
  return load_n(p, lanes.n, fill);
}

// The maximum m of numbers, and their sum of exp(x - m).
struct Softmax {
  float maximum, sum;
};

// Takes n more numbers in, from L1 the second time.
template <typename T>
FASTBERT_INLINE void add_block(const T* x, int64_t n, Softmax& softmax) {
  const float lowest = -__builtin_inff();
  vfloat highest[kUnroll], part[kUnroll] = {};
  for (int i = 0; i < kUnroll; ++i) highest[i] = splat(lowest);
  sweep<kUnroll>(n, [&](int64_t j, int i, auto lanes)
                        FASTBERT_LAMBDA { highest[i] = max(highest[i], load_or(lanes, x + j, lowest)); });
  const float top = reduce_max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
  if (top > softmax.maximum) {  // false for NaN, which comes through the sum instead
    softmax.sum *= exp(splat(softmax.maximum - top))[0];
    softmax.maximum = top;
  }
  // -inf - -inf is NaN: not yet, a number may come
  const float shift = softmax.maximum == lowest ? 0.f : softmax.maximum;
  sweep<kUnroll>(n, [&](int64_t j, int i, auto lanes)
                        FASTBERT_LAMBDA { part[i] += exp(load_or(lanes, x + j, lowest) - shift); });
  softmax.sum += reduce_add((part[0] + part[1]) + (part[2] + part[3]));
}

template <typename T>
void forward(const CrossEntropyForward& p) {
#pragma omp parallel for num_threads(p.launch) schedule(dynamic)
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.labels[r] == p.ignore_index) {
      p.losses[r] = p.maximum[r] = p.total[r] = 0.f;
      continue;
    }
    const T* x = static_cast<const T*>(p.logits) + r * p.stride;
    Softmax softmax = {-__builtin_inff(), 0.f};
    for (int64_t first = 0; first < p.columns; first += kBlock)
      add_block(x + first, min(kBlock, p.columns - first), softmax);
    p.losses[r] = __builtin_logf(softmax.sum) + (softmax.maximum - load_n(x + p.labels[r], 1)[0]);
    p.maximum[r] = softmax.maximum;
    p.total[r] = softmax.sum;
  }
}

// The sum of all losses, or their mean over the rows that count, 0 where none does; and how many are right.
void reduce(const CrossEntropyForward& p) {
  double sum = 0;
  int64_t count = 0, right = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    sum += p.losses[r];
    count += p.labels[r] != p.ignore_index;
    right += p.losses[r] <= __builtin_logf(p.total[r]);  // not an ignored one: log(0) is -inf
  }
  *p.count = count > 0 ? static_cast<float>(count) : 1.f;
  *p.result = static_cast<float>(p.mean ? sum / *p.count : sum);
  p.hits[0] = static_cast<float>(right), p.hits[1] = static_cast<float>(count);
}

// ---- backward ---------------------------------------------------------------------------------------

template <typename T>
void backward(const CrossEntropyBackward& p) {
#pragma omp parallel for num_threads(p.launch) schedule(dynamic)
  for (int64_t r = 0; r < p.rows; ++r) {
    const float dloss = p.dlosses[p.one_dloss ? 0 : r] / (p.count ? *p.count : 1.f);
    T* __restrict dx = static_cast<T*>(p.dlogits) + r * p.stride;
    const int64_t columns = p.labels[r] == p.ignore_index ? 0 : p.columns;
    memset(dx + columns, 0, (p.stride - columns) * sizeof(T));
    if (columns == 0) continue;
    const T* x = static_cast<const T*>(p.logits) + r * p.stride;
    const float maximum = p.maximum[r], scale = dloss / p.total[r];
    sweep<kUnroll>(columns, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
      lanes.store(dx + j, exp(lanes.load(x + j) - maximum) * scale);
    });
    const int64_t label = p.labels[r];
    store_n(dx + label, exp(load_n(x + label, 1) - maximum) * scale - dloss, 1);
  }
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------------

int64_t cross_entropy_forward(const CrossEntropyForward& p) {
  for (int64_t r = 0; r < p.rows; ++r)
    if (p.labels[r] != p.ignore_index && (p.labels[r] < 0 || p.labels[r] >= p.columns)) return r;
  switch (p.dtype) {
    case DType::f32:
      forward<float>(p);
      break;
    case DType::bf16:
      forward<bf16>(p);
      break;
    case DType::f16:
      forward<f16>(p);
      break;
  }
  if (p.result) reduce(p);
  return -1;
}

void cross_entropy_backward(const CrossEntropyBackward& p) {
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
