// Which gradients of a sparse LazyAdam step belong to one row. The positions 0..R-1 are sorted by row id (a
// stable radix sort): no time and no memory that grows with V, and the table is then walked in the order of
// memory.
#pragma once
#include <omp.h>

#include "common.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kSorted = 16384;  // positions that one thread sorts before another is worth starting

struct Groups {
  const int32_t* order;  // [R] positions; null: row g is touched by gradient g alone
  const int32_t* start;  // [count + 1]: group g is order[start[g]..start[g + 1])
  int64_t count;
};

FASTBERT_INLINE int32_t* counters(const LazyAdamStep& p) { return p.scratch + 2 * (p.touched + 1); }

// The positions that a thread works on; none for those behind the first `threads`.
struct Stretch {
  int64_t begin, end;
};

FASTBERT_INLINE Stretch stretch_of(const LazyAdamStep& p, int thread, int threads) {
  const int64_t begin = p.touched * thread / threads;
  return {begin, thread < threads ? p.touched * (thread + 1) / threads : begin};
}

// Counts of digits [threads, digits] become the first place of each in the sorted positions.
static void counts_to_places(int32_t* counts, int threads, int digits) {
  for (int32_t d = 0, sum = 0; d < digits; ++d)
    for (int t = 0; t < threads; ++t) {
      int32_t* place = counts + t * digits + d;
      const int32_t count = *place;
      *place = sum;
      sum += count;
    }
}

// Sorts the positions by id, first the lowest digit. Every thread of a parallel region calls it, those behind
// the first `threads` only to wait. Each counts the digits of its own stretch and later places it, so that
// equal ids stay in order for any number of threads.
FASTBERT_INLINE int32_t* sort_positions(const LazyAdamStep& p, int thread, int threads) {
  const int bits = p.table_rows > 1 ? 64 - __builtin_clzll(p.table_rows - 1) : 1;
  const int passes = ceil_div(bits, kLazyAdamDigit), digit = ceil_div(bits, passes), digits = 1 << digit;
  const Stretch stretch = stretch_of(p, thread, threads);
  int32_t *from = p.scratch, *to = from + p.touched + 1;
  int32_t* mine = counters(p) + thread * digits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit;
    if (thread < threads) memset(mine, 0, digits * sizeof(int32_t));
    for (int64_t i = stretch.begin; i < stretch.end; ++i)
      ++mine[p.rows[pass == 0 ? i : from[i]] >> shift & (digits - 1)];
#pragma omp barrier
#pragma omp single
    counts_to_places(counters(p), threads, digits);
    for (int64_t i = stretch.begin; i < stretch.end; ++i) {
      const int32_t position = pass == 0 ? static_cast<int32_t>(i) : from[i];
      to[mine[p.rows[position] >> shift & (digits - 1)]++] = position;
    }
#pragma omp barrier
    int32_t* swap = from;
    from = to;
    to = swap;
  }
  return from;
}

// Every thread of a parallel region calls it and gets the same answer; the first `threads` share the work.
FASTBERT_INLINE Groups group(const LazyAdamStep& p, int thread, int threads) {
  const int32_t* order = sort_positions(p, thread, threads);
  int32_t* start = order == p.scratch ? p.scratch + p.touched + 1 : p.scratch;
  const Stretch stretch = stretch_of(p, thread, threads);
  const auto opens = [&](int64_t i) { return i == 0 || p.rows[order[i]] != p.rows[order[i - 1]]; };
  int32_t opened = 0;
  for (int64_t i = stretch.begin; i < stretch.end; ++i) opened += opens(i);
  if (thread < threads) counters(p)[thread] = opened;
#pragma omp barrier
  int64_t before = 0, count = 0;
  for (int t = 0; t < threads; ++t) {
    before += t < thread ? counters(p)[t] : 0;
    count += counters(p)[t];
  }
  for (int64_t i = stretch.begin; i < stretch.end; ++i)
    if (opens(i)) start[before++] = static_cast<int32_t>(i);
  if (thread == 0) start[count] = static_cast<int32_t>(p.touched);
#pragma omp barrier
  return {order, start, count};
}

static Groups group(const LazyAdamStep& p, int threads) {
  if (!p.rows) return {nullptr, nullptr, p.table_rows};
  Groups groups = {};
  const int sorters = static_cast<int>(min(kLazyAdamSorters, max(1, p.touched / kSorted)));
  // All threads or one: between the two, OpenMP would end the others and start them anew at its next call.
#pragma omp parallel num_threads(sorters == 1 ? 1 : threads)
  {
    const Groups same = group(p, omp_get_thread_num(), min(sorters, omp_get_num_threads()));
    if (omp_get_thread_num() == 0) groups = same;
  }
  return groups;
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
