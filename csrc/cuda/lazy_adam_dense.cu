// One Adam step with decoupled weight decay of many dense tensors in one launch; csrc/contract.h and
// fastbert/ops/lazy_adam.py have the formula and its variants.
//
// Each block takes kChunk elements of one tensor, in rounds of kUnroll times 16 bytes of float32 a thread,
// all of which are asked for before the first is used. Tensors are of any mixture of dtypes; those that are
// float32 throughout go by a kernel that knows it. A tensor with a row to leave alone is two tensors, the
// rows before and those behind it. An address that is no multiple of 16 bytes, or a last element or three, go
// one element a thread.
//
// Arithmetic is float32 for every dtype; w is rounded once, to nearest or stochastically. Learning rate, step
// count, seed and the gradients' factor are read on the device. What reads w, m, v and u also writes them, so
// results do not depend on the order of blocks.
#include "launch.h"
//
#include "kernels.h"
#include "lazy_adam_columns.h"
#include "lazy_adam_dense.h"
#include "tensor_list.h"

namespace fastbert::cuda {
namespace {

constexpr int kThreads = 256, kWidth = 4, kUnroll = 2;
constexpr int kRound = kThreads * kWidth;  // elements between a thread's accesses
constexpr int64_t kChunk = 4096;           // measured best of 4,096, 16,384 and 65,536
constexpr int kMostFormulas = 16;          // of parameter groups, in one launch

// ---- what the kernel takes -------------------------------------------------------------------------------

struct DenseTensor {
  AdamTable table;
  const void* grad;
  int64_t elements;
  uint32_t first_chunk;
  uint32_t first_row;  // of the table
  DType grad_dtype;
  uint8_t formula;
  bool takes_four;
};

struct DenseRest {
  AdamFormula formulas[kMostFormulas];
  const int32_t* is_bad;  // [1]: nothing may be stored; null: no id was looked at
};

constexpr int kMostDense = kMostTensors<DenseTensor, DenseRest>;
template <int kMost>
using DenseList = TensorList<DenseTensor, DenseRest, kMost>;

// ---- kernel ----------------------------------------------------------------------------------------------

struct Place {  // of a chunk's first element in its table, for rounding draws by rows; else 0
  uint32_t row = 0, column = 0;
};

DEVICE Place place_of(const DenseTensor& x, const AdamTable& t, int64_t begin) {
  if (!t.rounding.seed) return {};
  return {x.first_row + static_cast<uint32_t>(begin / t.columns), static_cast<uint32_t>(begin % t.columns)};
}

template <int kColumns>
struct Elements {  // of a thread, from where they are asked for to where they are stored
  AdamColumns<kColumns, false> state;
  Raw<kColumns> grad;

  DEVICE void load(const DenseTensor& x, const AdamTable& t, DType grad_dtype, int64_t at) {
    grad = load_raw<kColumns, Cache::streaming>(x.grad, grad_dtype, at);
    state.load(t, at);
  }

  // `at` is so many elements behind the first of the chunk.
  DEVICE void step_and_store(const AdamTable& t, DType grad_dtype, int64_t at, const Place& first,
                             uint32_t behind, const AdamCoefficients& c) {
    float g[kColumns];
    unpack_raw(grad, grad_dtype, g);
    uint32_t row = 0, column = 0;
    if (t.rounding.seed) {
      const uint32_t columns = t.columns;
      row = first.row + (first.column + behind) / columns, column = (first.column + behind) % columns;
    }
    state.step_and_store(t, at, row, static_cast<int>(column), g, 0.f, c);
  }
};

// kFloat32: every tensor of the list is, with all of its state and its gradient.
template <bool kFloat32, int kMost>
__global__ void __launch_bounds__(kThreads) dense_kernel(const __grid_constant__ DenseList<kMost> list) {
  const DenseTensor& x = list.tensors[tensor_of(list, blockIdx.x)];
  AdamTable t = x.table;
  if (kFloat32) t.dtype = t.exp_avg_dtype = DType::f32, t.rounding.seed = nullptr;
  const DType grad_dtype = kFloat32 ? DType::f32 : x.grad_dtype;
  const int64_t begin = int64_t{blockIdx.x - x.first_chunk} * kChunk;
  const int64_t end = min(x.elements, begin + kChunk);
  const int64_t whole = x.takes_four ? begin + (end - begin) / kWidth * kWidth : begin;

  Elements<kWidth> its[kUnroll];
  const auto load = [&](int64_t at) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (at + u * kRound < whole)
        its[u].load(x, t, grad_dtype, at + u * kRound);
      else
        its[u] = {};  // or the compiler would keep the old ones from turn to turn
  };
  int64_t at = begin + threadIdx.x * kWidth;
  load(at);

  // coefficients, while the first loads are under way
  __shared__ AdamCoefficients shared;
  __shared__ bool is_left_alone;
  if (threadIdx.x == 0) {
    const AdamFormula& f = list.rest.formulas[x.formula];
    shared = adam_coefficients(f, *t.step);
    is_left_alone = changes_nothing(f) || (list.rest.is_bad && *list.rest.is_bad);
  }
  __syncthreads();
  if (is_left_alone) return;
  const AdamCoefficients c = shared;
  const Place first = place_of(x, t, begin);

  // update
#pragma unroll 1
  while (at < whole) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (at + u * kRound < whole)
        its[u].step_and_store(t, grad_dtype, at + u * kRound, first,
                              static_cast<uint32_t>(at + u * kRound - begin), c);
    at += kUnroll * kRound;
    load(at);
  }
#pragma unroll 1
  for (at = whole + threadIdx.x; at < end; at += kThreads) {
    Elements<1> one;
    one.load(x, t, grad_dtype, at);
    one.step_and_store(t, grad_dtype, at, first, static_cast<uint32_t>(at - begin), c);
  }
}

// ---- list ------------------------------------------------------------------------------------------------

bool is_float32(const LazyAdamStep& p) {
  return p.dtype == DType::f32 && p.exp_avg_dtype == DType::f32 && p.grad_dtype == DType::f32;
}

bool are_same(const AdamFormula& a, const AdamFormula& b) {
  return a.lr == b.lr && a.weight_decay == b.weight_decay && a.beta1 == b.beta1 && a.beta2 == b.beta2 &&
         a.eps == b.eps && a.flags == b.flags && a.grad_factor == b.grad_factor && a.found_inf == b.found_inf;
}

template <class T>
T* advanced(T* address, DType dtype, int64_t elements) {
  if (!address) return nullptr;
  const int64_t bytes = elements * (dtype == DType::f32 ? 4 : 2);
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(address) + bytes);
}

// Tensors that wait for a launch.
class Waiting {
 public:
  Waiting(bool float32, const int32_t* is_bad, void* stream) : float32_(float32), stream_(stream) {
    list_.rest.is_bad = is_bad;
  }

  // All rows but padding_idx.
  int add(const LazyAdamStep& p) {
    if (p.padding_idx < 0) return add(p, 0, p.table_rows);
    const int error = add(p, 0, p.padding_idx);
    return error != 0 ? error : add(p, p.padding_idx + 1, p.table_rows);
  }

  int start() {
    if (list_.chunks == 0) return 0;
    const int error = list_.count <= kFewTensors ? start(shortened<kFewTensors>(list_)) : start(list_);
    list_.count = 0, list_.chunks = 0, formulas_ = 0;
    return error;
  }

 private:
  int add(const LazyAdamStep& p, int64_t first, int64_t end) {
    constexpr int64_t kMostChunks = 0x7fffffff;  // of a grid
    const int64_t skipped = first * p.columns, elements = (end - first) * p.columns;
    const int64_t chunks = (elements + kChunk - 1) / kChunk;
    if (chunks == 0) return 0;
    if (list_.count == kMostDense || list_.chunks + chunks > kMostChunks)
      if (const int error = start(); error != 0) return error;
    const int formula = formula_of(p);
    if (formula < 0) {
      const int error = start();
      return error != 0 ? error : add(p, first, end);
    }
    DenseTensor& x = list_.tensors[list_.count++];
    x.table = adam_table(p);
    x.table.param = advanced(p.param, p.dtype, skipped);
    x.table.exp_avg = advanced(p.exp_avg, p.exp_avg_dtype, skipped);
    x.table.exp_avg_sq = advanced(p.exp_avg_sq, DType::f32, skipped);
    x.table.max_exp_avg_sq = advanced(p.max_exp_avg_sq, DType::f32, skipped);
    x.table.bf16_copy = advanced(x.table.bf16_copy, DType::bf16, skipped);
    x.grad = advanced(p.grad, p.grad_dtype, skipped);
    x.grad_dtype = p.grad_dtype;
    x.elements = elements, x.first_row = static_cast<uint32_t>(first);
    x.first_chunk = list_.chunks, x.formula = static_cast<uint8_t>(formula);
    x.takes_four = are_aligned(16, x.table.param, x.table.exp_avg, x.table.exp_avg_sq, x.table.max_exp_avg_sq,
                               x.table.bf16_copy, x.grad) &&
                   (!p.seed || p.columns % kWidth == 0);
    list_.chunks += static_cast<uint32_t>(chunks);
    return 0;
  }

  // Its place among those of the launch, in which groups stand one after the other; -1 where there is no
  // room.
  int formula_of(const LazyAdamStep& p) {
    const AdamFormula formula = adam_formula(p);
    if (formulas_ > 0 && are_same(list_.rest.formulas[formulas_ - 1], formula)) return formulas_ - 1;
    if (formulas_ == kMostFormulas) return -1;
    list_.rest.formulas[formulas_] = formula;
    return formulas_++;
  }

  template <int kMost>
  int start(const DenseList<kMost>& list) {
    const auto kernel = float32_ ? dense_kernel<true, kMost> : dense_kernel<false, kMost>;
    return launch("lazy_adam dense", kernel, list.chunks, kThreads, 0, stream_, list);
  }

  const bool float32_;
  void* const stream_;
  DenseList<kMostDense> list_ = {};
  int formulas_ = 0;
};

// ---- step counts -----------------------------------------------------------------------------------------

struct CountRest {
  const float* found_inf;  // [1]: not 0, and nothing is counted; null: 0
  const int32_t* only_if;  // [1]: nothing is counted where it is 0; null: 1
  float by;
};
constexpr int kMostCounts = kMostTensors<float*, CountRest>;
template <int kMost>
using Counts = TensorList<float*, CountRest, kMost>;

template <int kMost>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Counts<kMost> counts) {
  const CountRest& rest = counts.rest;
  if ((rest.found_inf && *rest.found_inf != 0.f) || (rest.only_if && !*rest.only_if)) return;
  for (int i = threadIdx.x; i < counts.count; i += kThreads) *counts.tensors[i] += rest.by;
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------------

bool lazy_adam_is_dense(const LazyAdamStep& p) {
  return !(p.rows || is_empty(p) || p.row_steps || p.row_wise || (p.flags & kLazyAdamSkipZero));
}

int lazy_adam_dense(const LazyAdamStep* steps, int64_t count, const int32_t* is_bad, void* stream) {
  Waiting float32(true, is_bad, stream), mixed(false, is_bad, stream);
  int error = 0;
  for (int64_t i = 0; i < count && error == 0; ++i)
    if (lazy_adam_is_dense(steps[i])) error = (is_float32(steps[i]) ? float32 : mixed).add(steps[i]);
  if (error == 0) error = float32.start();
  return error != 0 ? error : mixed.start();
}

int lazy_adam_count(const LazyAdamStep* steps, int64_t count, float by, const int32_t* only_if,
                    void* stream) {
  int error = 0;
  for (int64_t first = 0; first < count && error == 0; first += kMostCounts) {
    Counts<kMostCounts> counts = {};
    counts.rest = {steps[first].found_inf, only_if, by};
    counts.count = static_cast<int>(min(count - first, int64_t{kMostCounts}));
    for (int i = 0; i < counts.count; ++i) counts.tensors[i] = const_cast<float*>(steps[first + i].step);
    error = counts.count <= kFewTensors
                ? launch("lazy_adam count", count_kernel<kFewTensors>, 1, kThreads, 0, stream,
                         shortened<kFewTensors>(counts))
                : launch("lazy_adam count", count_kernel<kMostCounts>, 1, kThreads, 0, stream, counts);
  }
  return error;
}

}  // namespace fastbert::cuda
