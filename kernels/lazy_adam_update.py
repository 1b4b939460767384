"""LazyAdam's formula, element by element, for all of its kernels; fastbert/ops/lazy_adam.py says what it computes.

All of it is float32. Learning rate and step count are read on the device. Products that are fused with a sum are
written as `tl.fma`: left to the compiler, the choice would differ from kernel to kernel, and with it the last bit.
Square root and quotient are approximate, within 1 and 2 ULP.
"""

import math
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastbert.kernels import philox
from fastbert.kernels.fast import INTERPRETED

# Flags, as in csrc/contract.h and fastbert/ops/lazy_adam.py.
GRAD_BY_ROW = 1
FORMULA_FLAGS = 2 + 4 + 8 + 16 + 32  # which kernels are compiled for
MAXIMIZE = tl.constexpr(2)
EPS_UNCORRECTED = tl.constexpr(4)
NO_BIAS_CORRECTION = tl.constexpr(8)
COUPLED_DECAY = tl.constexpr(16)
SKIP_ZERO = tl.constexpr(32)


def formula(s: Any) -> tuple[float, ...]:
    """The numbers of a step that kernels take, in this order: differences and logarithms would lose bits in float32."""
    log_beta1, log_beta2 = (math.log(beta) if beta > 0.0 else -math.inf for beta in (s.beta1, s.beta2))
    return s.weight_decay, s.beta1, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2, log_beta1, log_beta2, s.eps


@triton.jit
def verdict(is_bad_ptr, found_inf_ptr):
    """Not 0 where nothing may be stored: an id is bad, or a gradient infinite. Either may be None."""
    stops = 0
    if is_bad_ptr is not None:
        stops = tl.load(is_bad_ptr)
    if found_inf_ptr is not None:
        stops = tl.where(tl.load(found_inf_ptr) == 0.0, stops, 1)
    return stops


# ---- coefficients --------------------------------------------------------------------------------------------------


@triton.jit
def one_minus_power(log_base, t):
    """1 - base^t, of which a power near 1 would leave few bits."""
    x = log_base * t
    if INTERPRETED:  # which knows no libdevice
        return (1.0 - tl.exp(x.to(tl.float64))).to(tl.float32)
    else:
        return -libdevice.expm1(x)


@triton.jit
def coefficients(lr_ptr, grad_factor_ptr, t, weight_decay, log_beta1, log_beta2, eps, FLAGS: tl.constexpr):
    """Of step number t, float32, of the parameter or of each row: `factor` of the gradient, with its sign, what w
    shrinks to by `decay`, and w -= size * m / (sqrt(v) * root + eps).
    """
    lr = tl.load(lr_ptr)  # float64
    factor = 1.0
    if grad_factor_ptr is not None:
        factor = tl.load(grad_factor_ptr).to(tl.float32)
    if MAXIMIZE & FLAGS:
        factor = -factor
    decay = 1.0
    if not (COUPLED_DECAY & FLAGS):
        decay = (1.0 - lr * weight_decay).to(tl.float32)
    size, root = t * 0.0 + lr.to(tl.float32), t * 0.0 + 1.0
    if not (NO_BIAS_CORRECTION & FLAGS):
        size = size / one_minus_power(log_beta1, t)
        root = tl.rsqrt(one_minus_power(log_beta2, t))
    if EPS_UNCORRECTED & FLAGS:
        eps = eps * root
    return factor, decay, root, eps, size


# ---- one element ---------------------------------------------------------------------------------------------------


@triton.jit
def adam_gradient(g, w, factor, weight_decay, FLAGS: tl.constexpr):
    """The gradient as the moments take it; w is yet to be updated."""
    g = g * factor
    if COUPLED_DECAY & FLAGS:
        g = tl.fma(w, weight_decay, g)
    return g


@triton.jit
def first_moment(m, g, beta1, rest1):
    """torch's lerp: the form whose factor is below 1/2."""
    return tl.where(rest1 < 0.5, tl.fma(g - m, rest1, m), tl.fma(g - m, -beta1, g))


@triton.jit
def second_moment(v, square, beta2, rest2):
    return tl.fma(square, rest2, beta2 * v)


@triton.jit
def maximum(u, v):
    """NaN stays, in either."""
    return tl.where((u > v) | (u != u), u, v)


@triton.jit
def divisor(v, root, eps):
    """What the first moment is divided by; v, or u with amsgrad."""
    return tl.fma(tl.sqrt(v), root, eps)


@triton.jit
def weight(w, m, divided_by, decay, size):
    return tl.fma(w, decay, -(size * m / divided_by))


# ---- stochastic rounding -------------------------------------------------------------------------------------------


@triton.jit
def round_stochastically(w, group, row, step, counter, seed):
    """bfloat16 of w, float32 [R, 8 * G]: its bits and 16 random ones added up, of which the upper half is kept.

    group [1, G] of eight columns each and row [R, 1] say where w stands; counter is 2 + 4 * the parameter's number.
    inf stays, and a NaN stays one.
    """
    random = philox.row_lanes(group, row, step, counter, seed) >> 16
    bits = w.to(tl.uint32, bitcast=True)
    quiet = tl.where((bits & 0x007FFFFF) != 0, bits | 0x00400000, bits)
    bits = tl.where((bits & 0x7F800000) == 0x7F800000, quiet, bits + random)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
