// Embeddings looked up, added, normalized and dropped, [T, H]:
//
//   z = words[word_id] + positions[position_id] + types[type_id] + tasks[task_id]      rounded to y's dtype
//   y = dropout((z - mean) * rstd * weight + bias)          mean and variance over a row, of the rounded z
//
// z is not kept: `recompute` makes it again from the ids, and with it the gradient of what was dropped, for
// layer_norm's backward kernel. Arithmetic is float32 for every dtype. A row lies in L1 between its sweeps.
#include "dropout.h"
#include "layer_norm_row.h"
#include "row_ids.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// One table's row of a token.
template <typename E>
FASTBERT_INLINE const E* row_of(const void* table, const int64_t* ids, int64_t token, int64_t columns) {
  return static_cast<const E*>(table) + (ids ? ids[token] * columns : 0);
}

// A token's rows; `task` is null where there is none.
template <typename E>
struct Rows {
  const E *word, *position, *type, *task;

  FASTBERT_MEMBER Rows(const EmbeddingSum& p, int64_t token)
      : word(row_of<E>(p.words, p.word_ids, token, p.columns)),
        position(row_of<E>(p.positions, p.position_ids, token, p.columns)),
        type(row_of<E>(p.types, p.type_ids, token, p.columns)),
        task(p.tasks ? row_of<E>(p.tasks, p.task_ids, token, p.columns) : nullptr) {}

  // z of the n columns from `first` on.
  template <typename T>
  FASTBERT_MEMBER void add_up(int64_t first, int64_t n, T* __restrict z) const {
    const E *word = this->word + first, *position = this->position + first, *type = this->type + first;
    const E* task = this->task ? this->task + first : nullptr;
    sweep<4>(n, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
      vfloat v = lanes.load(word + j) + lanes.load(position + j) + lanes.load(type + j);
      if (task) v += lanes.load(task + j);
      lanes.store(z + j, v);
    });
  }
};

// ---- forward -----------------------------------------------------------------------------------------

template <typename T, typename W>
FASTBERT_INLINE void normalize_and_drop(const EmbeddingNormForward& p, RowDropout& dropout, int64_t row,
                                        const T* z, float mean, float rstd, T* __restrict y) {
  const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
  const vfloat scale = splat(dropout_scale(p.t, kLaneBits));
  for (int64_t first = 0; first < p.columns; first += kColumns) {
    const int64_t n = min(kColumns, p.columns - first);
    const uint16_t* kept = p.t ? draw_row(dropout, row, p.columns, first, n) : nullptr;
    sweep<4>(n, [=](int64_t k, int, auto lanes) FASTBERT_LAMBDA {
      const int64_t j = first + k;
      const vfloat h = (lanes.load(z + j) - mean) * rstd;
      vfloat v = h * lanes.load(weight + j) + lanes.load(bias + j);
      if (kept) v = drop(kept, k, v * scale);
      lanes.store(y + j, v);
    });
  }
}

template <typename T, typename E, typename W>
void forward(const EmbeddingNormForward& p) {
  const int64_t columns = p.columns;
  const float share = 1.f / static_cast<float>(columns);
#pragma omp parallel num_threads(p.launch)
  {
    RowDropout dropout(p.seed, p.t, 0);
    Scratch scratch(columns);
    T* z = reinterpret_cast<T*>(scratch.words(columns));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      const Rows<E> rows(p, row), next(p, min(row + 1, p.rows - 1));
      T* y = static_cast<T*>(p.y) + row * columns;
      vfloat total = {};
      for (int64_t first = 0; first < columns; first += kColumns) {
        const int64_t n = min(kColumns, columns - first);
        rows.add_up(first, n, z + first);
        total += sum_block(z + first, n);
      }
      const float mean = reduce_add(total) * share;
      const RowsAhead<T, E> ahead{next.word, next.position, y + columns, nullptr};
      const float variance = sum_squares(z, columns, mean, ahead, 0) * share;
      const float rstd = 1.f / __builtin_sqrtf(variance + p.eps);
      p.mean[row] = mean, p.rstd[row] = rstd;
      normalize_and_drop<T, W>(p, dropout, row, z, mean, rstd, y);
    }
  }
}

// ---- recompute ---------------------------------------------------------------------------------------

template <typename T, typename E>
void recompute(const EmbeddingNormRecompute& p) {
  const int64_t columns = p.columns;
  const vfloat scale = splat(dropout_scale(p.t, kLaneBits));
#pragma omp parallel num_threads(p.launch)
  {
    RowDropout dropout(p.seed, p.t, 0);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      const Rows<E> rows(p, row);
      for (int64_t first = 0; first < columns; first += kColumns) {
        const int64_t n = min(kColumns, columns - first), at = row * columns + first;
        rows.add_up(first, n, static_cast<T*>(p.z) + at);
        if (!p.dropped) continue;
        const T* dy = static_cast<const T*>(p.dy) + at;
        T* __restrict dropped = static_cast<T*>(p.dropped) + at;
        const uint16_t* kept = draw_row(dropout, row, columns, first, n);
        sweep<4>(n, [=](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
          lanes.store(dropped + j, drop(kept, j, lanes.load(dy + j) * scale));
        });
      }
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

// call(T{}, E{}) of the types of y and of the tables.
template <typename Call>
FASTBERT_INLINE void with_types(DType dtype, DType table_dtype, Call call) {
  switch (dtype) {
    case DType::f32:
      return call(float{}, float{});
    case DType::bf16:
      return table_dtype == dtype ? call(bf16{}, bf16{}) : call(bf16{}, float{});
    case DType::f16:
      return table_dtype == dtype ? call(f16{}, f16{}) : call(f16{}, float{});
  }
}

}  // namespace

int64_t embedding_norm_forward(const EmbeddingNormForward& p) {
  const int64_t* const ids[] = {p.word_ids, p.position_ids, p.type_ids, p.task_ids};
  const int64_t tables[] = {p.word_rows, p.position_rows, p.type_rows, p.task_rows};
  for (int i = 0; i < 4; ++i)
    if (const int64_t wrong = ids[i] ? first_outside(ids[i], p.rows, tables[i]) : -1; wrong >= 0)
      return wrong;
  with_types(p.dtype, p.table_dtype, [&](auto y, auto table) FASTBERT_LAMBDA {
    using T = decltype(y);
    using E = decltype(table);
    return p.weight_dtype == p.dtype ? forward<T, E, T>(p) : forward<T, E, float>(p);
  });
  return -1;
}

void embedding_norm_recompute(const EmbeddingNormRecompute& p) {
  with_types(p.dtype, p.table_dtype,
             [&](auto y, auto table) FASTBERT_LAMBDA { return recompute<decltype(y), decltype(table)>(p); });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
