// Brings rows of a table [V, D] to where dense AdamW would have moved them while no gradient touched them.
// csrc/cpu/lazy_adam_replay.cpp derives the formula: of a row last stepped at s, w shrinks and moves by m
// times a function of a = sqrt(v), which is a sum over the missed steps, expanded about its mean, or walked
// where bias correction still moves too much.
//
//   history   what follows from the recorded steps alone: for each step s that a row may stand at its Walk
//   check     ids and steps that cannot be: then nothing is changed
//   move      a warp takes a row; of a row that is named twice, the first to come
//
// Scalars are float64, elements float32.
#include "launch.h"
//
#include "faults.h"
#include "kernels.h"
#include "reduce.h"
#include "vectors.h"

namespace fastbert::cuda {
namespace {

constexpr double kRest = 1e-7;  // of the movement: what the expansion may leave out,
constexpr double kEnd = 1e-10;  // and the walk: it ends when momentum has become so small a part
constexpr int kHistoryThreads = 256, kCheckThreads = 256, kMoveThreads = 256;

// A row's way from step s: m and v shrink, w shrinks and moves.
struct alignas(16) Walk {
  float keep_w, keep_m, keep_v;
  bool is_expanded;
  float center;  // of the expansion
  float central[kReplayMoments - 1];
};

struct Replay {
  float *param, *exp_avg, *exp_avg_sq;  // [V, D]
  int32_t* last_step;                   // [V]
  const int64_t* rows;                  // [count]; null: all
  const double *lr, *decay;             // [steps]
  int64_t count, table_rows;
  int columns, steps, step;
  double beta1, beta2;
  float eps;
  bool is_corrected, is_beside;  // bias correction; eps stands beside sqrt(v) before it
  int64_t padding_idx;
  int longest;            // after so many steps momentum no longer counts
  Walk* walks;            // [steps + 1], by place: that of the step before the recorded ones is 0
  double *rate, *spread;  // [steps + 1]
  int32_t* is_bad;        // [1]
  int32_t* fault_words;
};

DEVICE int64_t row_at(const Replay& p, int64_t i) { return p.rows ? p.rows[i] : i; }

// ---- history ---------------------------------------------------------------------------------------------

// rate without D_e / D_i, and spread.
DEVICE void correct_bias(const Replay& p, int i) {
  const double t = static_cast<double>(p.step - p.steps + i);
  const double root = p.is_corrected ? sqrt(-expm1(t * log(p.beta2))) : 1.;
  const double rest1 = p.is_corrected ? -expm1(t * log(p.beta1)) : 1.;
  // eps beside sqrt(v): the root leaves the denominator
  p.rate[i] = p.lr[i - 1] / rest1 * (p.is_beside ? root : 1.);
  p.spread[i] = p.is_beside ? 1. : 1. / root;
}

struct Factors {  // of the moments, from one step to the one before
  double of[kReplayMoments];
};

// From place `last` back to `first`: what the terms of the steps behind a place leave at it. `visit` gets
// each place but the last, with its moments, and the rate of the step behind it.
template <class Visit>
DEVICE void walk_back(const Replay& p, int first, int last, const Factors& factors, double keep_w,
                      double (&moments)[kReplayMoments], const Visit& visit) {
#pragma unroll 1
  for (int i = last; i > first; --i) {
    const double rate = p.rate[i] * keep_w, spread = p.spread[i];
    double term = rate;
#pragma unroll
    for (int k = 0; k < kReplayMoments; ++k, term *= spread) moments[k] = factors.of[k] * (moments[k] + term);
    keep_w *= 1. - p.lr[i - 1] * p.decay[i - 1];
    visit(i - 1, rate, keep_w);
  }
}

DEVICE Walk plan_walk(double keep_w, double keep_m, double keep_v, const double (&raw)[kReplayMoments]) {
  const double q = raw[0] > 0. ? raw[1] / raw[0] : 1.;
  // Before round j, mixed[k] is the moment of q_i^(k - j) * (q_i - q)^j.
  double mixed[kReplayMoments], bound = kRest * raw[0];
#pragma unroll
  for (int k = 0; k < kReplayMoments; ++k) mixed[k] = raw[k];
#pragma unroll
  for (int j = 1; j < kReplayMoments; ++j) {
#pragma unroll
    for (int k = kReplayMoments - 1; k >= j; --k) mixed[k] -= q * mixed[k - 1];
    bound *= q;
  }
  Walk walk;
  walk.keep_w = static_cast<float>(keep_w);
  walk.keep_m = static_cast<float>(keep_m), walk.keep_v = static_cast<float>(keep_v);
  walk.is_expanded = mixed[kReplayMoments - 1] <= bound;
  walk.center = static_cast<float>(q);
#pragma unroll
  for (int k = 0; k < kReplayMoments - 1; ++k) walk.central[k] = static_cast<float>(mixed[k]);
  return walk;
}

// One block, each thread of which has an equal share of the places. The moments follow a recurrence from the
// last step backwards, which a thread first does for its own share from nothing; then it knows what comes
// from behind it, and does it again.
__global__ void __launch_bounds__(kHistoryThreads) history_kernel(Replay p) {
  __shared__ double products[kHistoryThreads], behind[kReplayMoments][kHistoryThreads];
  const int thread = threadIdx.x, size = (p.steps + kHistoryThreads - 1) / kHistoryThreads;
  const int first = min(p.steps, thread * size), last = min(p.steps, first + size);
  if (thread == 0) *p.is_bad = 0;

  for (int i = 1 + thread; i <= p.steps; i += kHistoryThreads) correct_bias(p, i);
  double product = 1.;
  for (int i = first + 1; i <= last; ++i) product *= 1. - p.lr[i - 1] * p.decay[i - 1];
  products[thread] = product;
  __syncthreads();
  double keep_w = 1.;  // of what the shares behind this one do
  for (int other = kHistoryThreads - 1; other > thread; --other) keep_w *= products[other];

  Factors factors;
#pragma unroll
  for (int k = 0; k < kReplayMoments; ++k) factors.of[k] = p.beta1 * pow(p.beta2, 0.5 * k);
  double moments[kReplayMoments] = {};
  walk_back(p, first, last, factors, keep_w, moments, [](int, double, double) {});
#pragma unroll
  for (int k = 0; k < kReplayMoments; ++k) behind[k][thread] = moments[k];
  __syncthreads();
  if (thread < kReplayMoments) {
    const double factor = pow(p.beta1 * pow(p.beta2, 0.5 * thread), size);  // behind a shorter share all is 0
    double sum = 0.;
    for (int other = kHistoryThreads - 1; other >= 0; --other) {
      const double its = behind[thread][other];
      behind[thread][other] = sum;
      sum = its + factor * sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kReplayMoments; ++k) moments[k] = behind[k][thread];
  double keep_m = pow(p.beta1, p.steps - last), keep_v = pow(p.beta2, p.steps - last);
  walk_back(p, first, last, factors, keep_w, moments, [&](int place, double rate, double its_keep_w) {
    keep_m *= p.beta1, keep_v *= p.beta2;
    p.rate[place + 1] = rate;
    p.walks[place] = plan_walk(its_keep_w, keep_m, keep_v, moments);
  });
}

// ---- check -----------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kCheckThreads) check_kernel(Replay p) {
  const int64_t i = int64_t{blockIdx.x} * kCheckThreads + threadIdx.x;
  if (i >= p.count) return;
  const int64_t row = row_at(p, i);
  const bool is_outside = row < 0 || row >= p.table_rows;
  if (!is_outside && (row == p.padding_idx || p.last_step[row] >= p.step - p.steps)) return;
  store_relaxed(p.is_bad, 1);
  raise_fault(p.fault_words, is_outside ? kFaultRow : kFaultMissed, i);
}

// ---- move ------------------------------------------------------------------------------------------------

// What m is to be multiplied by, of kWidth columns with a = sqrt(v).
template <int kWidth>
DEVICE void expand(const Replay& p, const Walk& walk, const float (&a)[kWidth], float (&moved)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float inverse = __fdividef(1.f, fmaf(a[i], walk.center, p.eps)), x = a[i] * inverse;
    float sum = walk.central[kReplayMoments - 2];
#pragma unroll
    for (int k = kReplayMoments - 3; k >= 0; --k) sum = fmaf(-x, sum, walk.central[k]);
    moved[i] = inverse * sum;
  }
}

template <int kWidth>
DEVICE void walk_steps(const Replay& p, int from, const float (&a)[kWidth], float (&moved)[kWidth]) {
  const double root2 = sqrt(p.beta2);
  double momentum = 1., shrunk = 1.;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) moved[i] = 0.f;
#pragma unroll 1
  for (int step = from + 1; step <= min(p.steps, from + p.longest); ++step) {
    momentum *= p.beta1, shrunk *= root2;
    const float rate = static_cast<float>(p.rate[step] * momentum);
    const float q = static_cast<float>(p.spread[step] * shrunk);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) moved[i] += __fdividef(rate, fmaf(a[i], q, p.eps));
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kMoveThreads) move_kernel(Replay p) {
  const int64_t i = int64_t{blockIdx.x} * (kMoveThreads / kWarp) + warp_of_block();
  if (i >= p.count || *p.is_bad) return;
  const int64_t row = row_at(p, i);
  int s = 0;  // where the row stands, and for whoever comes after it p.step
  if (lane_of_warp() == 0) s = atomicMax(p.last_step + row, p.step);
  s = __shfl_sync(kAllLanes, s, 0);
  if (s >= p.step || row == p.padding_idx) return;
  const int from = s - (p.step - p.steps);
  const Walk walk = p.walks[from];
  for (int column = lane_of_warp() * kWidth; column < p.columns; column += kWarp * kWidth) {
    const int64_t at = row * p.columns + column;
    float w[kWidth], m[kWidth], v[kWidth], a[kWidth], moved[kWidth];
    load<kWidth, Cache::plain>(p.param + at, w);
    load<kWidth, Cache::plain>(p.exp_avg + at, m);
    load<kWidth, Cache::plain>(p.exp_avg_sq + at, v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) a[k] = sqrt_approximate(v[k]);
    if (walk.is_expanded)
      expand(p, walk, a, moved);
    else
      walk_steps(p, from, a, moved);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float by = m[k] == 0.f ? 0.f : m[k] * moved[k];  // not 0 * inf
      w[k] = fmaf(w[k], walk.keep_w, -by), m[k] *= walk.keep_m, v[k] *= walk.keep_v;
    }
    store<kWidth>(p.param + at, w);
    store<kWidth>(p.exp_avg + at, m);
    store<kWidth>(p.exp_avg_sq + at, v);
  }
}

Replay replay_of(const LazyAdamReplay& a) {
  Replay p;
  p.param = a.param, p.exp_avg = a.exp_avg, p.exp_avg_sq = a.exp_avg_sq, p.last_step = a.last_step;
  p.rows = a.rows, p.lr = a.lr, p.decay = a.decay;
  p.count = a.rows ? a.named : a.table_rows, p.table_rows = a.table_rows;
  p.columns = static_cast<int>(a.columns), p.steps = static_cast<int>(a.steps),
  p.step = static_cast<int>(a.step);
  p.beta1 = a.beta1, p.beta2 = a.beta2, p.eps = static_cast<float>(a.eps);
  p.is_corrected = !(a.flags & kLazyAdamNoBiasCorrection), p.is_beside = a.flags & kLazyAdamEpsUncorrected;
  p.padding_idx = a.padding_idx;
  p.longest = a.beta1 > 0. ? 1 + static_cast<int>(::log(kEnd) / ::log(a.beta1 / ::sqrt(a.beta2))) : 0;
  // Walks, rates and spreads take (steps + 1) * 10 of (steps + 1) * 14 numbers of scratch.
  static_assert(sizeof(Walk) == 8 * sizeof(double), "a walk takes eight numbers of scratch");
  p.walks = reinterpret_cast<Walk*>(a.scratch);
  p.rate = a.scratch + 8 * (a.steps + 1), p.spread = p.rate + a.steps + 1;
  p.is_bad = reinterpret_cast<int32_t*>(p.spread + a.steps + 1);
  p.fault_words = fault_words();
  return p;
}

}  // namespace

// ---- launcher --------------------------------------------------------------------------------------------

int lazy_adam_replay(const LazyAdamReplay& a) {
  const Replay p = replay_of(a);
  void* stream = reinterpret_cast<void*>(a.launch);
  const auto blocks = [&](int64_t size) { return static_cast<unsigned>((p.count + size - 1) / size); };
  const bool takes_four = p.columns % 4 == 0 && are_aligned(16, p.param, p.exp_avg, p.exp_avg_sq);
  int error = launch("lazy_adam_replay history", history_kernel, 1, kHistoryThreads, 0, stream, p);
  if (error == 0)
    error =
        launch("lazy_adam_replay check", check_kernel, blocks(kCheckThreads), kCheckThreads, 0, stream, p);
  if (error == 0)
    error = launch("lazy_adam_replay move", takes_four ? move_kernel<4> : move_kernel<1>,
                   blocks(kMoveThreads / kWarp), kMoveThreads, 0, stream, p);
  return error;
}

}  // namespace fastbert::cuda
