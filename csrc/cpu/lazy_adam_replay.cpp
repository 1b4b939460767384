// Brings rows of a table [V, D] to where dense AdamW would have moved them while no gradient touched them.
//
// A row last stepped at s with moments m and v is moved, at each missed step i = s + 1 .. e, by momentum and
// weight decay alone. With D_i = prod_{j <= i} (1 - lr_j * decay_j) it then stands at
//
//   w * D_e / D_s - m * sum_i w_i / (a * q_i + eps),   m * beta1^(e - s),   v * beta2^(e - s)
//   a = sqrt(v),  w_i = lr_i * beta1^(i - s) / (1 - beta1^i) * D_e / D_i,  q_i = sqrt(beta2^(i - s) / (1 -
//   beta2^i))
//
// The sum is taken for all columns at once, by expanding it about q, the w-weighted mean of the q_i:
//
//   sum_k M_k * (-a)^k / (a * q + eps)^(k + 1),   M_k = sum_i w_i * (q_i - q)^k
//
// whose rest after K terms is at most M_K / q^K of the whole for an even K. Where that is too much (s is
// small, so that bias correction still moves the q_i) the steps are walked one by one. The raw moments T_k(s)
// = sum_i w_i * q_i^k of every s come from one recurrence, from the last recorded step backwards:
//
//   T_k(e) = 0,   T_k(s - 1) = beta1 * beta2^(k / 2) * (T_k(s) + lr_s / (1 - beta1^s) * (1 - beta2^s)^(-k /
//   2) * D_e / D_s)
//
// Scalars are float64, elements float32.
#include <math.h>

#include "row_ids.h"
#include "sweep.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

constexpr double kRest = 1e-7;         // of the movement: what the expansion may leave out,
constexpr double kEnd = 1e-10;         // and the walk: it ends when momentum has become so small a part
constexpr int64_t kPrefetchRows = 2;   // rows ahead that are prefetched
constexpr int64_t kPrefetchLines = 8;  // cache lines of each

// ---- recorded steps ---------------------------------------------------------------------------------

// What is known of the recorded steps i, at places 1 .. steps, and of the step before them, at place 0.
struct History {
  int64_t before;   // the number of the step at place 0
  double* moments;  // [steps + 1, kReplayMoments]: T_k(i)
  double* rate;     // [steps + 1]: w_i / beta1^(i - s), the same for every s
  double* spread;   // [steps + 1]: q_i / beta2^((i - s) / 2)
  double* keep_w;   // [steps + 1]: D_e / D_i
  double* keep_m;   // [steps + 1]: beta1^(e - i)
  double* keep_v;   // [steps + 1]: beta2^(e - i)
  int64_t longest;  // after so many steps momentum no longer counts
};

History history_in(const LazyAdamReplay& p) {
  const int64_t places = p.steps + 1;
  double* rate = p.scratch + places * kReplayMoments;
  const double slowest = ::log(p.beta1 / ::sqrt(p.beta2));
  const int64_t longest = p.beta1 > 0. ? 1 + static_cast<int64_t>(::log(kEnd) / slowest) : 0;
  return {p.step - p.steps,  p.scratch,         rate,   rate + places, rate + 2 * places,
          rate + 3 * places, rate + 4 * places, longest};
}

// rate without D_e / D_i, and spread: forwards.
void correct_bias(const LazyAdamReplay& p, History& history) {
  const bool corrected = !(p.flags & kLazyAdamNoBiasCorrection), beside = p.flags & kLazyAdamEpsUncorrected;
  double power1 = ::pow(p.beta1, history.before), power2 = ::pow(p.beta2, history.before);
  history.rate[0] = history.spread[0] = 0.;
  for (int64_t i = 1; i <= p.steps; ++i) {
    power1 *= p.beta1, power2 *= p.beta2;
    const double rest1 = corrected ? 1. - power1 : 1., root = corrected ? ::sqrt(1. - power2) : 1.;
    // eps beside sqrt(v): the root leaves the denominator
    history.rate[i] = p.lr[i - 1] / rest1 * (beside ? root : 1.);
    history.spread[i] = beside ? 1. : 1. / root;
  }
}

// Everything else: backwards.
void add_moments(const LazyAdamReplay& p, History& history) {
  double factor[kReplayMoments];
  for (int k = 0; k < kReplayMoments; ++k) {
    factor[k] = p.beta1 * ::pow(p.beta2, 0.5 * k);
    history.moments[p.steps * kReplayMoments + k] = 0.;
  }
  history.keep_w[p.steps] = history.keep_m[p.steps] = history.keep_v[p.steps] = 1.;
  for (int64_t i = p.steps; i > 0; --i) {
    history.rate[i] *= history.keep_w[i];
    history.keep_w[i - 1] = history.keep_w[i] * (1. - p.lr[i - 1] * p.decay[i - 1]);
    history.keep_m[i - 1] = history.keep_m[i] * p.beta1;
    history.keep_v[i - 1] = history.keep_v[i] * p.beta2;
    const double* from = history.moments + i * kReplayMoments;
    double *to = history.moments + (i - 1) * kReplayMoments, term = history.rate[i];
    for (int k = 0; k < kReplayMoments; ++k, term *= history.spread[i]) to[k] = factor[k] * (from[k] + term);
  }
}

// ---- one row ----------------------------------------------------------------------------------------

// A row's way from step s: m and v shrink, w shrinks and moves by m times a function of sqrt(v).
struct Walk {
  float keep_w, keep_m, keep_v, eps;
  bool expanded;
  float center, central[kReplayMoments - 1];  // q and M_k
  int64_t from, to;                           // places of s and of the last step to walk
};

Walk plan_walk(const LazyAdamReplay& p, const History& history, int64_t s) {
  const int64_t from = s - history.before;
  Walk walk;
  walk.keep_w = static_cast<float>(history.keep_w[from]),
  walk.keep_m = static_cast<float>(history.keep_m[from]);
  walk.keep_v = static_cast<float>(history.keep_v[from]), walk.eps = static_cast<float>(p.eps);
  walk.from = from, walk.to = min(p.steps, from + history.longest);
  const double* raw = history.moments + from * kReplayMoments;
  const double q = raw[0] > 0. ? raw[1] / raw[0] : 1.;
  // Before round j, mixed[k] is the moment of q_i^(k - j) * (q_i - q)^j.
  double mixed[kReplayMoments], bound = kRest * raw[0];
  for (int k = 0; k < kReplayMoments; ++k) mixed[k] = raw[k];
  for (int j = 1; j < kReplayMoments; ++j) {
    for (int k = kReplayMoments - 1; k >= j; --k) mixed[k] -= q * mixed[k - 1];
    bound *= q;
  }
  walk.expanded = mixed[kReplayMoments - 1] <= bound;
  walk.center = static_cast<float>(q);
  for (int k = 0; k < kReplayMoments - 1; ++k) walk.central[k] = static_cast<float>(mixed[k]);
  return walk;
}

FASTBERT_INLINE void move_expanded(const Walk& walk, float* w, float* m, float* v, int64_t n) {
  sweep<1>(n, [&](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
    const vfloat m0 = lanes.load(m + j), v0 = lanes.load(v + j), a = square_root(v0);
    const vfloat inverse = 1.f / (a * walk.center + walk.eps), x = a * inverse;
    vfloat sum = splat(walk.central[kReplayMoments - 2]);
    for (int k = kReplayMoments - 3; k >= 0; --k) sum = walk.central[k] - x * sum;
    const vfloat moved = m0 == 0.f ? vfloat{} : m0 * inverse * sum;
    lanes.store(w + j, lanes.load(w + j) * walk.keep_w - moved);
    lanes.store(m + j, m0 * walk.keep_m);
    lanes.store(v + j, v0 * walk.keep_v);
  });
}

void move_stepwise(const LazyAdamReplay& p, const History& history, const Walk& walk, float* w, float* m,
                   float* v, int64_t n) {
  constexpr int64_t kBlock = 8 * kLanes;
  const double root2 = ::sqrt(p.beta2);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = min(kBlock, n - first);
    float a[kBlock], moved[kBlock];
    sweep<1>(size, [&](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
      lanes.store(a + j, square_root(lanes.load(v + first + j)));
      lanes.store(moved + j, vfloat{});
    });
    double momentum = 1., shrunk = 1.;
    for (int64_t i = walk.from + 1; i <= walk.to; ++i) {
      momentum *= p.beta1, shrunk *= root2;
      const float rate = static_cast<float>(history.rate[i] * momentum);
      const float q = static_cast<float>(history.spread[i] * shrunk);
      sweep<1>(size, [&](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
        lanes.store(moved + j, lanes.load(moved + j) + rate / (lanes.load(a + j) * q + walk.eps));
      });
    }
    sweep<1>(size, [&](int64_t j, int, auto lanes) FASTBERT_LAMBDA {
      const int64_t at = first + j;
      const vfloat m0 = lanes.load(m + at);
      const vfloat by = m0 == 0.f ? vfloat{} : m0 * lanes.load(moved + j);
      lanes.store(w + at, lanes.load(w + at) * walk.keep_w - by);
      lanes.store(m + at, m0 * walk.keep_m);
      lanes.store(v + at, lanes.load(v + at) * walk.keep_v);
    });
  }
}

void move_row(const LazyAdamReplay& p, const History& history, int64_t row, int64_t s) {
  float *w = p.param + row * p.columns, *m = p.exp_avg + row * p.columns, *v = p.exp_avg_sq + row * p.columns;
  const Walk walk = plan_walk(p, history, s);
  if (walk.expanded)
    move_expanded(walk, w, m, v, p.columns);
  else
    move_stepwise(p, history, walk, w, m, v, p.columns);
}

FASTBERT_INLINE int64_t row_at(const LazyAdamReplay& p, int64_t i) { return p.rows ? p.rows[i] : i; }

FASTBERT_INLINE void prefetch_row(const LazyAdamReplay& p, int64_t row) {
  const int64_t first = row * p.columns;
  for (int64_t j = 0; j < min(p.columns, 16 * kPrefetchLines); j += 16) {
    __builtin_prefetch(p.param + first + j);
    __builtin_prefetch(p.exp_avg + first + j);
    __builtin_prefetch(p.exp_avg_sq + first + j);
  }
}

// The step at which a row stands, which is noted as the last from here on: of a row that is named twice, by
// two threads perhaps, the first to come gets the step to move it from, and the other p.step.
FASTBERT_INLINE int32_t claim(const LazyAdamReplay& p, int64_t row) {
  int32_t* place = p.last_step + row;
  int32_t s = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (s < p.step && !__atomic_compare_exchange_n(place, &s, static_cast<int32_t>(p.step), false,
                                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return s;
}

}  // namespace

// ---- launcher ---------------------------------------------------------------------------------------

int64_t lazy_adam_replay(const LazyAdamReplay& p) {
  const int64_t bad = first_outside(p.rows, p.rows ? p.named : 0, p.table_rows);
  if (bad >= 0) return bad;
  const int64_t count = p.rows ? p.named : p.table_rows, chunk = max(1, count / (16 * p.launch));
  for (int64_t i = 0; i < count; ++i)
    if (p.last_step[row_at(p, i)] < p.step - p.steps && row_at(p, i) != p.padding_idx) return i;
  History history = history_in(p);
  correct_bias(p, history);
  add_moments(p, history);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(p.launch)
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchRows < count) prefetch_row(p, row_at(p, i + kPrefetchRows));
    const int64_t row = row_at(p, i);
    const int32_t s = claim(p, row);
    if (s < p.step && row != p.padding_idx) move_row(p, history, row, s);
  }
  return -1;
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
