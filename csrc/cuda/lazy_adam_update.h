// LazyAdam's formula, element by element, for the row step and the dense step alike. csrc/contract.h and
// fastbert/ops/lazy_adam.py say what it computes.
//
// All of it is float32. Learning rate and step count are read on the device. Every product that is fused with
// a sum is written as fmaf: left to the compiler, the choice would differ from kernel to kernel, and with it
// the last bit. Square root and quotient are approximate, within 1 and 2 ULP.
#pragma once
#include "../contract.h"
#include "../philox.h"
#include "launch.h"
#include "ptx.h"

namespace fastbert::cuda {

// ---- coefficients ----------------------------------------------------------------------------------------

struct AdamFormula {  // what the host knows of them
  const double* lr;
  const float* step;
  double weight_decay;
  float beta1, rest1, beta2, rest2, log_beta1, log_beta2, eps;
  int flags;
  const float *grad_factor, *found_inf;
};

inline AdamFormula adam_formula(const LazyAdamStep& p) {
  return {p.lr,
          p.step,
          p.weight_decay,
          static_cast<float>(p.beta1),
          static_cast<float>(1. - p.beta1),
          static_cast<float>(p.beta2),
          static_cast<float>(1. - p.beta2),
          static_cast<float>(::log(p.beta1)),
          static_cast<float>(::log(p.beta2)),
          static_cast<float>(p.eps),
          static_cast<int>(p.flags),
          p.grad_factor,
          p.found_inf};
}

DEVICE bool changes_nothing(const AdamFormula& f) { return f.found_inf && *f.found_inf != 0.f; }

struct AdamCoefficients {
  float factor;           // of the gradient, with its sign
  float coupled, decay;   // the part of w that joins the gradient; what w shrinks to
  float beta1, rest1;     // of m
  float beta2, rest2;     // of v
  float root, eps, size;  // w -= size * m / (sqrt(v) * root + eps)
};

// `t`: the number of this step, of the parameter or of the row.
DEVICE AdamCoefficients adam_coefficients(const AdamFormula& f, float t) {
  const bool is_corrected = !(f.flags & kLazyAdamNoBiasCorrection);
  const bool is_coupled = f.flags & kLazyAdamCoupledDecay;
  const double lr = *f.lr;
  // 1 - beta^t, of which a power near 1 would leave few bits
  const float rest1 = is_corrected ? -expm1f(t * f.log_beta1) : 1.f;
  const float rest2 = is_corrected ? -expm1f(t * f.log_beta2) : 1.f;
  AdamCoefficients c;
  c.factor = (f.flags & kLazyAdamMaximize ? -1.f : 1.f) * (f.grad_factor ? *f.grad_factor : 1.f);
  c.coupled = is_coupled ? static_cast<float>(f.weight_decay) : 0.f;
  c.decay = is_coupled ? 1.f : static_cast<float>(1. - lr * f.weight_decay);
  c.beta1 = f.beta1, c.rest1 = f.rest1;
  c.beta2 = f.beta2, c.rest2 = f.rest2;
  c.root = rsqrtf(rest2);
  c.eps = f.flags & kLazyAdamEpsUncorrected ? f.eps * c.root : f.eps;
  c.size = __fdividef(static_cast<float>(lr), rest1);
  return c;
}

// ---- one element -----------------------------------------------------------------------------------------

// The gradient as the moments take it; `w` is yet to be updated.
DEVICE float adam_gradient(float g, float w, const AdamCoefficients& c) {
  g *= c.factor;
  return c.coupled != 0.f ? fmaf(c.coupled, w, g) : g;
}

// torch's lerp: the form whose factor is below 1/2.
DEVICE float adam_first_moment(float m, float g, const AdamCoefficients& c) {
  return c.rest1 < 0.5f ? fmaf(c.rest1, g - m, m) : fmaf(-c.beta1, g - m, g);
}

DEVICE float adam_second_moment(float v, float square, const AdamCoefficients& c) {
  return fmaf(c.rest2, square, c.beta2 * v);
}

DEVICE float adam_maximum(float u, float v) { return u > v || u != u ? u : v; }  // NaN stays, in either

// What the first moment is divided by; v, or u with amsgrad.
DEVICE float adam_divisor(float v, const AdamCoefficients& c) {
  return fmaf(sqrt_approximate(v), c.root, c.eps);
}

DEVICE float adam_weight(float w, float m, float divisor, const AdamCoefficients& c) {
  return fmaf(w, c.decay, -__fdividef(c.size * m, divisor));
}

// w, m and v, and u with amsgrad, after a step with the gradient g.
template <bool kAmsgrad>
DEVICE void adam_step(float& w, float& m, float& v, float& u, float g, const AdamCoefficients& c) {
  g = adam_gradient(g, w, c);
  m = adam_first_moment(m, g, c);
  v = adam_second_moment(v, g * g, c);
  if (kAmsgrad) u = adam_maximum(u, v);
  w = adam_weight(w, m, adam_divisor(kAmsgrad ? u : v, c), c);
}

// ---- stochastic rounding ---------------------------------------------------------------------------------

struct AdamRounding {   // float32 to bf16
  const int64_t* seed;  // null: to nearest
  uint32_t number;      // of the parameter
};

// The bits of bf16(w) where `random`, 16 bits, are added to w's before the lower half goes; inf stays, and a
// NaN stays one.
DEVICE uint32_t round_stochastically(float w, uint32_t random) {
  const uint32_t bits = __float_as_uint(w);
  const uint32_t quiet = bits & 0x007FFFFFu ? bits | 0x00400000u : bits;
  return ((bits & 0x7F800000u) == 0x7F800000u ? quiet : bits + random) >> 16;
}

// The random words of columns `column` .. + 7, of which `column` is the first: two columns a word, low half
// first.
DEVICE void rounding_words(const AdamRounding& r, uint32_t column, uint32_t row, float step,
                           uint32_t (&words)[4]) {
  const uint32_t counter[4] = {column / 8, row, static_cast<uint32_t>(static_cast<int64_t>(step)),
                               2 + 4 * r.number};
  philox4x32(static_cast<uint64_t>(*r.seed), counter, words);
}

}  // namespace fastbert::cuda
