"""One Adam step with decoupled weight decay of many dense tensors in one launch.

Each program takes CHUNK elements of one tensor; tensors of a launch share dtypes and formula. Tensors with an address
that is no multiple of 16 bytes go without vectors, and so do the last seven elements or less of all others. What reads
w, m, v and u also writes them, so results do not depend on the order of programs.
"""

import triton
import triton.language as tl

from fastbert.kernels.lazy_adam_update import (
    adam_gradient,
    coefficients,
    divisor,
    first_moment,
    maximum,
    second_moment,
    verdict,
    weight,
)
from fastbert.kernels.tensor_table import address, find_tensor

CHUNK, WARPS = 1024, 8  # elements of a program, four a thread in every dtype


@triton.jit
def update_elements(
    param, exp_avg, exp_avg_sq, max_exp_avg_sq, bf16_copy, grad, at, mask, factor, decay, root, eps, size,
    weight_decay, beta1, rest1, beta2, rest2, FLAGS: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    g = adam_gradient(g, w, factor, weight_decay, FLAGS)
    m = first_moment(m, g, beta1, rest1)
    v = second_moment(v, g * g, beta2, rest2)
    largest = v
    if max_exp_avg_sq is not None:
        largest = maximum(tl.load(max_exp_avg_sq + at, mask=mask, other=0.0), v)
        tl.store(max_exp_avg_sq + at, largest, mask=mask)
    w = weight(w, m, divisor(largest, root, eps), decay, size)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    tl.store(param + at, w.to(param.dtype.element_ty), mask=mask)
    if bf16_copy is not None:
        tl.store(bf16_copy + at, w.to(tl.bfloat16), mask=mask)


@triton.jit
def update_tensors_kernel(
    table_ptr, lr_ptr, grad_factor_ptr, found_inf_ptr, is_bad_ptr,
    weight_decay, beta1, rest1, beta2, rest2, log_beta1, log_beta2, eps,
    PARAM: tl.constexpr, EXP_AVG: tl.constexpr, GRAD: tl.constexpr, AMSGRAD: tl.constexpr, COPY: tl.constexpr,
    ALIGNED: tl.constexpr, FLAGS: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Table: first chunk, elements, step, param, exp_avg, exp_avg_sq, grad, max_exp_avg_sq, bf16_copy."""
    column_ptr, elements, begin = find_tensor(table_ptr, CHUNK, MOST)
    step_ptr = address(column_ptr, 2, MOST, tl.float32, False)
    param = address(column_ptr, 3, MOST, PARAM, ALIGNED)
    exp_avg = address(column_ptr, 4, MOST, EXP_AVG, ALIGNED)
    exp_avg_sq = address(column_ptr, 5, MOST, tl.float32, ALIGNED)
    grad = address(column_ptr, 6, MOST, GRAD, ALIGNED)
    max_exp_avg_sq, bf16_copy = None, None
    if AMSGRAD:
        max_exp_avg_sq = address(column_ptr, 7, MOST, tl.float32, ALIGNED)
    if COPY:
        bf16_copy = address(column_ptr, 8, MOST, tl.bfloat16, ALIGNED)

    # coefficients
    factor, decay, root, eps, size = coefficients(
        lr_ptr, grad_factor_ptr, tl.load(step_ptr), weight_decay, log_beta1, log_beta2, eps, FLAGS
    )
    elements = tl.where(verdict(is_bad_ptr, found_inf_ptr) == 0, elements, 0)

    # update
    at = begin + tl.arange(0, CHUNK)
    whole = elements
    if ALIGNED:
        whole = elements // 8 * 8
    update_elements(
        param, exp_avg, exp_avg_sq, max_exp_avg_sq, bf16_copy, grad, at, at < whole, factor, decay, root, eps, size,
        weight_decay, beta1, rest1, beta2, rest2, FLAGS,
    )  # fmt: skip
    if (whole < elements) & (elements <= begin + CHUNK):  # this chunk is the last, and some elements are left
        at += whole - begin
        update_elements(
            param, exp_avg, exp_avg_sq, max_exp_avg_sq, bf16_copy, grad, at, at < elements, factor, decay, root, eps,
            size, weight_decay, beta1, rest1, beta2, rest2, FLAGS,
        )  # fmt: skip
