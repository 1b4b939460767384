// Embeddings looked up, added, normalized and dropped, [T, H]:
//
//   z = words[word_id] + positions[position_id] + types[type_id] + tasks[task_id]      rounded to y's dtype
//   y = dropout((z - mean) * rstd * weight + bias)          mean and variance over a row, of the rounded z
//
// z is not kept: `recompute` makes it again from the ids, and with it the gradient of what was dropped, for
// layer_norm's backward kernel. Arithmetic is float32 for every dtype. A table's rows are read once, y is
// written once: a row stays in registers. A token with an id outside its table is NaN.
//
// A block a row, of one warp for each 1,024 columns, which a warp takes as in layer_norm_row.h.
#include "launch.h"
//
#include "faults.h"
#include "kernels.h"
#include "layer_norm_row.h"

namespace fastbert::cuda {
namespace {

constexpr int kGroups = 4;     // of a warp, at most
constexpr int kThreads = 512;  // of a row, at most, so that registers hold it
constexpr int kQuad = 4;       // neighbours that a lane takes at a time, or 1 off boundaries of 16 bytes
constexpr int64_t kMostRows = 0x7fffffff, kMostColumns = int64_t{kThreads} / kWarp * kGroups * kGroup;

// Where a token's rows begin; `tasks` may be null, and ids that are null are all 0.
template <class T>
struct Rows {
  const void *word, *position, *type, *task;
  bool fit;  // all ids name rows of their tables

  DEVICE Rows(const EmbeddingSum& a, int64_t token) : fit(true) {
    word = find(a, a.words, a.word_ids, a.word_rows, token);
    position = find(a, a.positions, a.position_ids, a.position_rows, token);
    type = find(a, a.types, a.type_ids, a.type_rows, token);
    task = a.tasks ? find(a, a.tasks, a.task_ids, a.task_rows, token) : nullptr;
  }

 private:
  DEVICE const void* find(const EmbeddingSum& a, const void* table, const int64_t* ids, int64_t rows,
                          int64_t token) {
    const int64_t id = ids ? __ldg(ids + token) : 0;
    fit = fit && id >= 0 && id < rows;
    const int64_t bytes = a.table_dtype == DType::f32 ? sizeof(float) : sizeof(T);
    return static_cast<const char*>(table) + id * a.columns * bytes;
  }
};

// z of a group, rounded; 0 beyond the row.
template <class T, int kVector>
DEVICE void add_rows(const EmbeddingSum& a, const Rows<T>& rows, int group, float (&z)[kEach]) {
  const bool is_float = a.table_dtype == DType::f32;
  const int columns = a.columns;
#pragma unroll
  for (int i = 0; i < kSteps<kVector>; ++i) {
    float* values = z + i * kVector;
    const int column = column_of<kVector>(group, i);
    float each[4][kVector] = {};
    if (column < columns && rows.fit) {
      load_parameter<T, kVector>(rows.word, is_float, column, each[0]);
      load_parameter<T, kVector>(rows.position, is_float, column, each[1]);
      load_parameter<T, kVector>(rows.type, is_float, column, each[2]);
      if (rows.task) load_parameter<T, kVector>(rows.task, is_float, column, each[3]);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] = each[0][j] + each[1][j] + each[2][j] + each[3][j];
    unpack<T, kVector>(pack<T, kVector>(values), values);
    if (!rows.fit)
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = __uint_as_float(0x7fffffffu);
  }
}

// ---- forward -----------------------------------------------------------------------------------------

template <class T, int kVector, int kHeld>
__global__ void __launch_bounds__(kThreads, 1)
    embedding_norm_forward_kernel(const EmbeddingNormForward a, float scale, float per_column,
                                  int32_t* faults) {
  __shared__ float partial[2][1][kWarpsPerBlock];
  const Drop drop(a.t, scale, a.seed);
  const int columns = a.columns, first = warp_of_block() * kHeld * kGroup;
  const int64_t row = blockIdx.x;
  const Rows<T> rows(a, row);
  if (!rows.fit && threadIdx.x == 0) raise_fault(faults, kFaultEmbedding, row);
  float z[kHeld][kEach], sum[1] = {}, squares[1] = {};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    add_rows<T, kVector>(a, rows, first + k * kGroup, z[k]);
    sum[0] += sum_of(z[k]);
  }
  uint32_t kept[kHeld];
  drop.draw(row, first, kept);
  // statistics
  block_sum(sum, partial[0]);
  const float mean = sum[0] * per_column;
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    squares[0] += sum_of_squares<kVector>(z[k], mean, first + k * kGroup, columns);
  block_sum(squares, partial[1]);
  const float rstd = rsqrtf(squares[0] * per_column + a.eps);
  if (threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  // normalize, affine, dropout
  const bool is_float = a.weight_dtype == DType::f32;
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
#pragma unroll
    for (int i = 0; i < kSteps<kVector>; ++i) {
      const int column = column_of<kVector>(first + k * kGroup, i);
      float weight[kVector] = {}, bias[kVector] = {}, values[kVector];
      if (column < columns) {
        load_parameter<T, kVector>(a.weight, is_float, column, weight);
        load_parameter<T, kVector>(a.bias, is_float, column, bias);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        values[j] = (z[k][i * kVector + j] - mean) * rstd * weight[j] + bias[j];
      drop.apply<kVector>(kept[k], i, values);
      if (column < columns) store<kVector>(static_cast<T*>(a.y) + row * columns + column, values);
    }
}

// ---- recompute ---------------------------------------------------------------------------------------

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, 1)
    embedding_norm_recompute_kernel(const EmbeddingNormRecompute a, float scale) {
  const Drop drop(a.t, scale, a.seed);
  const int columns = a.columns, stride = blockDim.x * kEach;
  const int64_t row = blockIdx.x, at = row * columns;
  const Rows<T> rows(a, row);
  for (int group = warp_of_block() * kGroup; group < columns; group += stride) {
    Held<T, kVector> dy;
    dy.read(static_cast<const T*>(a.dy) + at, group, a.dropped ? columns : 0);
    float z[kEach];
    add_rows<T, kVector>(a, rows, group, z);
    uint32_t kept[1];
    drop.draw(row, group, kept);
#pragma unroll
    for (int i = 0; i < kSteps<kVector>; ++i) {
      const int column = column_of<kVector>(group, i);
      float values[kVector];
      unpack<T, kVector>(dy.steps[i], values);
      drop.apply<kVector>(kept[0], i, values);
      if (column >= columns) continue;
      store<kVector>(static_cast<T*>(a.z) + at + column, z + i * kVector);
      if (a.dropped) store<kVector>(static_cast<T*>(a.dropped) + at + column, values);
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether there are more rows or columns than a launch takes; that is an error.
bool too_large(const char* name, const EmbeddingSum& a) {
  if (a.rows <= kMostRows && a.columns <= kMostColumns) return false;
  snprintf(launch_error(), kErrorBytes, "%s: at most %lld tokens of %lld columns, got [%lld, %lld]", name,
           static_cast<long long>(kMostRows), static_cast<long long>(kMostColumns),
           static_cast<long long>(a.rows), static_cast<long long>(a.columns));
  return true;
}

template <class... Addresses>
bool are_wide(const EmbeddingSum& a, const Addresses*... others) {
  return a.columns % kQuad == 0 &&
         are_aligned(kAccessBytes, a.words, a.positions, a.types, a.tasks, others...);
}

template <class T, int kVector>
int forward(const EmbeddingNormForward& a) {
  const int64_t warps = ceil_div(a.columns, kGroups * kGroup), groups = ceil_div(a.columns, warps * kGroup);
  const auto start = [&](auto kernel) {
    return launch("embedding_norm_forward", kernel, a.rows, warps * kWarp, 0,
                  reinterpret_cast<void*>(a.launch), a, dropout_scale(a.t, kLaneBits),
                  1.f / static_cast<float>(a.columns), fault_words());
  };
  if (groups == 1) return start(embedding_norm_forward_kernel<T, kVector, 1>);
  if (groups <= 3) return start(embedding_norm_forward_kernel<T, kVector, 3>);
  return start(embedding_norm_forward_kernel<T, kVector, kGroups>);
}

template <class T, int kVector>
int recompute(const EmbeddingNormRecompute& a) {
  const int64_t threads = ceil_div(a.columns, kGroup) * kWarp;
  return launch("embedding_norm_recompute", embedding_norm_recompute_kernel<T, kVector>, a.rows,
                threads < kThreads ? threads : int64_t{kThreads}, 0, reinterpret_cast<void*>(a.launch), a,
                dropout_scale(a.t, kLaneBits));
}

}  // namespace

int embedding_norm_forward(const EmbeddingNormForward& a) {
  if (too_large("embedding_norm_forward", a)) return cudaErrorInvalidValue;
  if (a.rows == 0) return 0;
  const bool is_wide = are_wide(a, a.weight, a.bias, a.y);
  return with_type(
      a.dtype, [&](auto x) { return is_wide ? forward<decltype(x), kQuad>(a) : forward<decltype(x), 1>(a); });
}

int embedding_norm_recompute(const EmbeddingNormRecompute& a) {
  if (too_large("embedding_norm_recompute", a)) return cudaErrorInvalidValue;
  if (a.rows == 0) return 0;
  const bool is_wide = are_wide(a, a.dy, a.z, a.dropped);
  return with_type(a.dtype, [&](auto x) {
    return is_wide ? recompute<decltype(x), kQuad>(a) : recompute<decltype(x), 1>(a);
  });
}

}  // namespace fastbert::cuda
