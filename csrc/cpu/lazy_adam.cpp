// One Adam step with decoupled weight decay, on the rows of a table [V, D] that a gradient touches or on all:
//
//   w -= lr * weight_decay * w
//   m += (1 - beta1) * (g - m),   v = beta2 * v + (1 - beta2) * g * g,   u = max(u, v)     u: amsgrad alone
//   w -= lr / (1 - beta1^t) * m / (sqrt(v or u) / sqrt(1 - beta2^t) + eps)
//
// Kingma and Ba, "Adam" (2015); Loshchilov and Hutter, "Decoupled weight decay regularization" (2019); Reddi,
// Kale and Kumar, "On the convergence of Adam and beyond" (2018). t counts the steps of the parameter, or of
// the row where row_steps are given.
//
// Arithmetic is float32 for every dtype; w is rounded once, to nearest or stochastically. State is float32,
// but m may be bf16, and v and u one number per row, fed by the mean of g * g. A sparse gradient is taken as
// it comes, R rows with their ids; rows of one id are added up in the order they stand in. Everything moves
// once: sums stay in L1.
#include <math.h>

#include <type_traits>

#include "dropout.h"
#include "lazy_adam_groups.h"
#include "reduce.h"
#include "row_ids.h"
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // columns of a task; the sum of its gradients stays in L1
constexpr int64_t kChunk = 32768;   // elements of a dense tensor's task; fewer in all are left to one thread
constexpr int64_t kPrefetchGroups = 4;  // groups ahead whose rows are prefetched
constexpr int64_t kPrefetchLines = 8;   // cache lines of a row prefetched: the processor foresees the rest
constexpr int64_t kLongGroup = 4096;    // gradients of one row, beyond which threads share its columns
constexpr int64_t kLongColumns = 32;    // columns of such a row's task

// ---- gradient -------------------------------------------------------------------------------------------

// sum[j] += the gradient at kRows positions, in order, n columns each. Several rows at a time are several
// streams from memory.
template <int kRows, bool kFirst, typename G>
FASTBERT_INLINE void add_rows(const G* grad, const int32_t* positions, int64_t columns, int64_t n,
                              float* sum) {
  const G* row[kRows];
  for (int k = 0; k < kRows; ++k) row[k] = grad + positions[k] * columns;
  sweep<1>(n, [&](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    vfloat s = kFirst ? lanes.load(row[0] + j) : lanes.load(sum + j) + lanes.load(row[0] + j);
    for (int k = 1; k < kRows; ++k) s += lanes.load(row[k] + j);
    lanes.store(sum + j, s);
  });
}

// The sum over `count` positions, in order, of n columns of the gradient, `grad` being the first of them at
// position 0. Returns `sum`, or the gradient itself where there is nothing to add or to convert.
template <typename G>
FASTBERT_INLINE const float* add_up(const G* grad, const int32_t* positions, int64_t count, int64_t columns,
                                    int64_t n, float* sum) {
  if (sizeof(G) == sizeof(float) && count == 1)
    return reinterpret_cast<const float*>(grad + positions[0] * columns);
  int64_t k;
  if (count >= 4)
    add_rows<4, true>(grad, positions, columns, n, sum), k = 4;
  else if (count >= 2)
    add_rows<2, true>(grad, positions, columns, n, sum), k = 2;
  else
    add_rows<1, true>(grad, positions, columns, n, sum), k = 1;
  for (; k + 4 <= count; k += 4) add_rows<4, false>(grad, positions + k, columns, n, sum);
  for (; k < count; ++k) add_rows<1, false>(grad, positions + k, columns, n, sum);
  return sum;
}

// ---- update ---------------------------------------------------------------------------------------------

struct Coefficients {
  float factor, decay, coupled, beta1, rest1, beta2, rest2, root, eps, size;
};

FASTBERT_INLINE Coefficients coefficients(const LazyAdamStep& p, double t) {
  const bool corrected = !(p.flags & kLazyAdamNoBiasCorrection), is_coupled = p.flags & kLazyAdamCoupledDecay;
  const double root = corrected ? 1. / ::sqrt(1. - ::pow(p.beta2, t)) : 1.;
  Coefficients c;
  c.factor = (p.flags & kLazyAdamMaximize ? -1.f : 1.f) * (p.grad_factor ? *p.grad_factor : 1.f);
  c.decay = is_coupled ? 1.f : static_cast<float>(1. - *p.lr * p.weight_decay);
  c.coupled = is_coupled ? static_cast<float>(p.weight_decay) : 0.f;
  c.beta1 = static_cast<float>(p.beta1), c.rest1 = static_cast<float>(1. - p.beta1);
  c.beta2 = static_cast<float>(p.beta2), c.rest2 = static_cast<float>(1. - p.beta2);
  c.root = static_cast<float>(root);
  c.eps = static_cast<float>(p.flags & kLazyAdamEpsUncorrected ? p.eps * root : p.eps);
  c.size = static_cast<float>(corrected ? *p.lr / (1. - ::pow(p.beta1, t)) : *p.lr);
  return c;
}

// What one row's v is worth where all of its columns share it: 1 / (sqrt(v or u) * root + eps).
FASTBERT_INLINE float shared_root(float* v, float* u, float mean_square, const Coefficients& c) {
  *v = c.beta2 * *v + c.rest2 * mean_square;
  if (u) *u = *u > *v || *u != *u ? *u : *v;
  return 1.f / (sqrtf(u ? *u : *v) * c.root + c.eps);
}

// n columns of a row. `to` is w, or where the new w is wanted in float32. kShared: v is done, `shared` is
// what it is worth.
template <bool kAmsgrad, bool kShared, typename T, typename O, typename M>
FASTBERT_INLINE void update(const T* w, O* to, M* m, float* v, float* u, float shared, const float* grad,
                            int64_t n, const Coefficients& c) {
  const bool is_coupled = c.coupled != 0.f;
  sweep<1>(n, [&](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    const vfloat w0 = lanes.load(w + j), m0 = lanes.load(m + j);
    vfloat g = lanes.load(grad + j) * c.factor;
    if (is_coupled) g += c.coupled * w0;
    // torch's lerp: the form whose factor is below 1/2
    const vfloat m1 = c.rest1 < 0.5f ? m0 + c.rest1 * (g - m0) : g - c.beta1 * (g - m0);
    lanes.store(m + j, m1);
    if (kShared) {
      lanes.store(to + j, w0 * c.decay - c.size * m1 * shared);
      return;
    }
    const vfloat v1 = c.beta2 * lanes.load(v + j) + c.rest2 * g * g;
    const vfloat u1 = kAmsgrad ? max(lanes.load(u + j), v1) : v1;
    lanes.store(to + j, w0 * c.decay - c.size * m1 / (square_root(u1) * c.root + c.eps));
    lanes.store(v + j, v1);
    if (kAmsgrad) lanes.store(u + j, u1);
  });
}

// n columns from `first` of a row, float32 -> bf16: the upper half of the bits and 16 random ones added up.
FASTBERT_INLINE void round_stochastically(const LazyAdamStep& p, int64_t row, int64_t first, int64_t n,
                                          const float* from, bf16* to) {
  alignas(64) uint16_t random[kColumns + kDropoutBlock<uint16_t>];
  dropout_lanes(static_cast<uint64_t>(*p.seed), static_cast<uint32_t>(first / 8), static_cast<uint32_t>(row),
                static_cast<uint32_t>(static_cast<int64_t>(*p.step)), 2 + 4 * p.number, ceil_div(n, 8),
                random);
  for (int64_t j = 0; j < n; ++j) {
    uint32_t bits;
    memcpy(&bits, from + j, 4);
    const bool is_finite = (bits & 0x7F800000u) != 0x7F800000u;
    const uint32_t quiet = (bits & 0x007FFFFFu) ? bits | 0x00400000u : bits;  // a NaN stays one
    to[j].bits = static_cast<uint16_t>((is_finite ? bits + random[j] : quiet) >> 16);
  }
}

template <typename T>
FASTBERT_INLINE void round_to_nearest(const T* from, int64_t n, bf16* to) {
  sweep<1>(n, [&](int64_t j, int, auto lanes) FASTBERT_LAMBDA { lanes.store(to + j, lanes.load(from + j)); });
}

// ---- rows -----------------------------------------------------------------------------------------------

// Where columns first.. of one row stand: in the tables and, `count` times, in the gradient.
struct Row {
  int64_t row, at, grad_at;
  const int32_t* positions;
  int64_t count;
};

FASTBERT_INLINE Row find(const LazyAdamStep& p, const Groups& groups, int64_t g, int64_t first) {
  static const int32_t none = 0;
  if (!groups.order) return {g, g * p.columns + first, g * p.columns + first, &none, 1};
  const int32_t* positions = groups.order + groups.start[g];
  const int64_t row = p.rows[positions[0]], at = row * p.columns + first;
  if (p.flags & kLazyAdamGradByRow) return {row, at, at, &none, 1};
  return {row, at, first, positions, groups.start[g + 1] - groups.start[g]};
}

FASTBERT_INLINE int64_t bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

FASTBERT_INLINE void prefetch(const LazyAdamStep& p, const Row& r, int64_t n) {
  const auto prefetch_row = [&](const void* table, DType dtype, int64_t at) FASTBERT_LAMBDA {
    const char* first = static_cast<const char*>(table) + bytes(dtype) * at;
    for (int64_t j = 0; j < min(bytes(dtype) * n, kPrefetchLines * 64); j += 64)
      __builtin_prefetch(first + j, 0, 2);  // into L2: it waits for more lines at once than L1 does
  };
  prefetch_row(p.param, p.dtype, r.at);
  prefetch_row(p.exp_avg, p.exp_avg_dtype, r.at);
  if (!p.row_wise) prefetch_row(p.exp_avg_sq, DType::f32, r.at);
  if (p.max_exp_avg_sq && !p.row_wise) prefetch_row(p.max_exp_avg_sq, DType::f32, r.at);
  for (int64_t k = 0; k < min(r.count, 4); ++k)
    prefetch_row(p.grad, p.grad_dtype, r.grad_at + r.positions[k] * p.columns);
}

const float* gradient(const LazyAdamStep& p, const Row& r, int64_t n, float* sum) {
  switch (p.grad_dtype) {
    case DType::f32:
      return add_up(static_cast<const float*>(p.grad) + r.grad_at, r.positions, r.count, p.columns, n, sum);
    case DType::bf16:
      return add_up(static_cast<const bf16*>(p.grad) + r.grad_at, r.positions, r.count, p.columns, n, sum);
    case DType::f16:
      return add_up(static_cast<const f16*>(p.grad) + r.grad_at, r.positions, r.count, p.columns, n, sum);
  }
  return nullptr;
}

// Whether the row steps at all: padding does not, and with kLazyAdamSkipZero none whose gradient is all zero.
bool moves(const LazyAdamStep& p, int64_t row) {
  if (row == p.padding_idx) return false;
  if (!(p.flags & kLazyAdamSkipZero)) return true;
  const int64_t size = bytes(p.grad_dtype), sign = size == 4 ? 0x7FFFFFFF : 0x7FFF;
  const char* grad = static_cast<const char*>(p.grad) + size * row * p.columns;
  for (int64_t j = 0; j < p.columns; ++j) {
    uint32_t bits = 0;
    memcpy(&bits, grad + size * j, size);
    if (bits & sign) return true;
  }
  return false;
}

// The mean of g * g over a row, its columns in blocks; g with the decay that joins it.
template <typename T>
float mean_square(const LazyAdamStep& p, Row r, float* sum, const Coefficients& c) {
  const bool is_coupled = c.coupled != 0.f;
  double total = 0.;
  for (int64_t first = 0; first < p.columns; first += kColumns) {
    const int64_t n = min(kColumns, p.columns - first);
    const float* grad = gradient(p, r, n, sum);
    const T* w = static_cast<const T*>(p.param) + r.at;
    vfloat part[4] = {};
    sweep<4>(n, [&](int64_t j, int i, auto lanes) FASTBERT_LAMBDA {
      vfloat g = lanes.load(grad + j) * c.factor;
      if (is_coupled) g += c.coupled * lanes.load(w + j);
      part[i] += g * g;
    });
    total += reduce_add((part[0] + part[1]) + (part[2] + part[3]));
    r.at += n, r.grad_at += n;
  }
  return static_cast<float>(total / p.columns);
}

// n columns of one row, from column `first` on.
template <typename T, typename M, bool kAmsgrad, bool kShared>
void step(const LazyAdamStep& p, const Row& r, int64_t first, int64_t n, float shared,
          const Coefficients& c) {
  float sum[kColumns], wide[kColumns];
  const float* grad = gradient(p, r, n, sum);
  T* w = static_cast<T*>(p.param) + r.at;
  M* m = static_cast<M*>(p.exp_avg) + r.at;
  float *v = kShared ? nullptr : p.exp_avg_sq + r.at, *u = kAmsgrad ? p.max_exp_avg_sq + r.at : nullptr;
  if (std::is_same<T, bf16>::value && p.seed) {
    update<kAmsgrad, kShared>(w, wide, m, v, u, shared, grad, n, c);
    round_stochastically(p, r.row, first, n, wide, static_cast<bf16*>(p.param) + r.at);
  } else {
    update<kAmsgrad, kShared>(w, w, m, v, u, shared, grad, n, c);
  }
  if (std::is_same<T, float>::value && p.bf16_copy)
    round_to_nearest(w, n, static_cast<bf16*>(p.bf16_copy) + r.at);
}

// One number of v for the whole row: it is done first, and the row is one task.
template <typename T, typename M>
void step_row_wise(const LazyAdamStep& p, Row r, const Coefficients& c) {
  float sum[kColumns];
  float* u = p.max_exp_avg_sq ? p.max_exp_avg_sq + r.row : nullptr;
  const float shared = shared_root(p.exp_avg_sq + r.row, u, mean_square<T>(p, r, sum, c), c);
  for (int64_t first = 0; first < p.columns; first += kColumns) {
    const int64_t n = min(kColumns, p.columns - first);
    step<T, M, false, true>(p, r, first, n, shared, c);
    r.at += n, r.grad_at += n;
  }
}

// A table whose rows differ in what they take; tasks are blocks of `width` columns of its groups.
struct Table {
  const LazyAdamStep& p;
  const Groups groups;
  const Coefficients same;  // of all rows, unless they count their own steps
  const int64_t width, blocks;
};

FASTBERT_INLINE Coefficients coefficients_of(const Table& table, int64_t row) {
  const LazyAdamStep& p = table.p;
  return p.row_steps ? coefficients(p, p.row_steps[row] + 1.) : table.same;
}

// One block of a group, unless the group is long.
template <typename T, typename M, bool kAmsgrad>
FASTBERT_INLINE void step_block(const Table& table, int64_t task) {
  const LazyAdamStep& p = table.p;
  const Groups& groups = table.groups;
  const int64_t g = task / table.blocks, first = task % table.blocks * table.width;
  const int64_t n = min(table.width, p.columns - first);
  if (groups.order && g + kPrefetchGroups < groups.count)
    prefetch(p, find(p, groups, g + kPrefetchGroups, first), n);
  const Row row = find(p, groups, g, first);
  if (!moves(p, row.row)) return;
  if (p.row_wise)
    step_row_wise<T, M>(p, row, coefficients_of(table, row.row));
  else if (row.count <= kLongGroup)
    step<T, M, kAmsgrad, false>(p, row, first, n, 0.f, coefficients_of(table, row.row));
}

// The long groups, one after the other. Every thread of a parallel region calls it.
template <typename T, typename M, bool kAmsgrad>
void step_long_groups(const Table& table) {
  const LazyAdamStep& p = table.p;
  for (int64_t g = 0; g < table.groups.count; ++g) {
    const Row row = find(p, table.groups, g, 0);
    if (row.count <= kLongGroup || !moves(p, row.row)) continue;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < p.columns; first += kLongColumns)
      step<T, M, kAmsgrad, false>(p, find(p, table.groups, g, first), first,
                                  min(kLongColumns, p.columns - first), 0.f, coefficients_of(table, row.row));
  }
}

template <typename T, typename M, bool kAmsgrad>
void step_table(const LazyAdamStep& p, int threads) {
  const int64_t width = p.row_wise ? max(1, p.columns) : kColumns, blocks = ceil_div(p.columns, width);
  const Table table{p, group(p, threads), coefficients(p, *p.step), width, blocks};
  const int64_t groups = table.groups.count, tasks = groups * blocks, chunk = max(1, tasks / (16 * threads));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, chunk)
    for (int64_t task = 0; task < tasks; ++task) step_block<T, M, kAmsgrad>(table, task);
    if (p.touched > kLongGroup && !p.row_wise) step_long_groups<T, M, kAmsgrad>(table);
    if (p.row_steps) {
#pragma omp for schedule(static)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t row = find(p, table.groups, g, 0).row;
        p.row_steps[row] += moves(p, row);
      }
    }
  }
}

// ---- dense tensors: one long row each -------------------------------------------------------------------

bool changes_nothing(const LazyAdamStep& p) { return p.found_inf && *p.found_inf != 0.f; }

bool is_dense(const LazyAdamStep& p) {
  return !(p.rows || p.row_steps || p.row_wise || p.seed || p.padding_idx >= 0 ||
           (p.flags & kLazyAdamSkipZero));
}

int64_t elements_of_dense(const LazyAdamStep& p) {
  return is_dense(p) && !changes_nothing(p) ? p.table_rows * p.columns : 0;
}

template <typename T, typename M, bool kAmsgrad>
void step_chunk(const LazyAdamStep& p, const Coefficients& c, int64_t chunk) {
  static const int32_t none = 0;
  const int64_t end = min((chunk + 1) * kChunk, p.table_rows * p.columns);
  for (int64_t at = chunk * kChunk; at < end; at += kColumns)
    step<T, M, kAmsgrad, false>(p, {0, at, at, &none, 1}, at, min(kColumns, end - at), 0.f, c);
}

// ---- by type --------------------------------------------------------------------------------------------

struct Instance {
  void (*table)(const LazyAdamStep&, int threads);
  void (*chunk)(const LazyAdamStep&, const Coefficients&, int64_t chunk);
};

template <typename T, typename M>
Instance instance(const LazyAdamStep& p) {
  if (p.max_exp_avg_sq && !p.row_wise) return {step_table<T, M, true>, step_chunk<T, M, true>};
  return {step_table<T, M, false>, step_chunk<T, M, false>};
}

template <typename T>
Instance instance(const LazyAdamStep& p) {
  return p.exp_avg_dtype == DType::bf16 ? instance<T, bf16>(p) : instance<T, float>(p);
}

Instance instance(const LazyAdamStep& p) {
  switch (p.dtype) {
    case DType::f32:
      return instance<float>(p);
    case DType::bf16:
      return instance<bf16>(p);
    case DType::f16:
      return instance<f16>(p);
  }
  return {};
}

// All dense tensors together: the threads take chunk after chunk and do not wait for one another in between.
void step_dense(const LazyAdamStep* steps, int64_t count, int threads) {
  int64_t elements = 0, next = 0;
  for (int64_t i = 0; i < count; ++i) elements += elements_of_dense(steps[i]);
#pragma omp parallel num_threads(elements < kChunk ? 1 : threads)
  {
    const auto take = [&]() {
      int64_t chunk;
#pragma omp atomic capture
      chunk = next++;
      return chunk;
    };
    int64_t mine = take(), before = 0;
    for (int64_t i = 0; i < count; ++i) {
      const LazyAdamStep& p = steps[i];
      const int64_t chunks = ceil_div(elements_of_dense(p), kChunk);
      if (mine < before + chunks) {
        const Coefficients c = coefficients(p, *p.step);
        for (const Instance run = instance(p); mine < before + chunks; mine = take())
          run.chunk(p, c, mine - before);
      }
      before += chunks;
    }
  }
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------

int64_t lazy_adam_steps(const LazyAdamStep* steps, int64_t count, int64_t launch) {
  const int threads = static_cast<int>(launch);
  for (int64_t i = 0; i < count; ++i)
    if (steps[i].rows && first_outside(steps[i].rows, steps[i].touched, steps[i].table_rows) >= 0) return i;
  for (int64_t i = 0; i < count; ++i) {
    const LazyAdamStep& p = steps[i];
    const int64_t rows = p.rows ? p.touched : p.table_rows;
    if (!is_dense(p) && !changes_nothing(p)) instance(p).table(p, rows * p.columns < kChunk ? 1 : threads);
  }
  step_dense(steps, count, threads);
  return -1;
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
