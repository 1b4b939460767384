"""GELU of x + bias, [T, H] and [H]:

    y = u * Phi(u),                    u = x + bias                       exact form
    y = u * sigmoid(2w),               w = sqrt(2/pi) * (u + 0.044715 u^3)  tanh form

Both are relu(u) - tail(|u|) with tail(a) = a * Phi(-a), or a * sigmoid(-2w): neither subtracts nearly equal numbers,
and tail goes to 0 where u is infinite. The derivative is 1 - tail'(|u|) right of 0 and tail'(|u|) left of it, so
forward and backward share one exp2. Hendrycks and Gimpel, "Gaussian error linear units" (2016).

Arithmetic is float32 for every dtype. Backward reads x again rather than saving anything; dbias, the column sums of
dx before it is rounded, is taken in the same pass: programs leave parts of it in scratch, and a second kernel adds
those in order. The 16-bit types take a shorter polynomial: with the long one arithmetic is the limit, not memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.column_sums import sum_parts
from fastbert.kernels.fast import exp2, reciprocal
from fastbert.kernels.launch import launch

# From here on tail and its derivative are 0 by the exponential, whose argument stays finite.
EXACT_END = tl.constexpr(30.0)
TANH_END = tl.constexpr(1e4)

TILE = 2048  # elements that a program has at a time
MOST_COLUMNS = 512  # of them side by side


class BackwardPlan(NamedTuple):
    """What was fastest in a prototype on an H200, for 16,384 x 3,072."""

    tile: int  # elements that a program has at a time
    most_columns: int  # of them side by side
    warps: int
    stages: int  # of loads ahead through shared memory; 1: none
    programs: int  # about so many together: two or four on each multiprocessor


def backward_plan(itemsize: int) -> BackwardPlan:
    if itemsize == 2:
        return BackwardPlan(tile=4096, most_columns=1024, warps=8, stages=3, programs=264)
    return BackwardPlan(tile=2048, most_columns=512, warps=4, stages=1, programs=528)


# ---- gelu and its derivative ---------------------------------------------------------------------------------------


@triton.jit
def gauss(a):
    """exp(-a*a/2) within some ULP: a*a in two parts, as its rounding is multiplied by up to 100 in the result."""
    high = a * a
    low = tl.fma(a, a, -high)
    exponent = high * 0.72134752  # 1 / (2 ln 2), in two parts with the next
    rest = tl.fma(high, 0.72134752, -exponent) + (high * 9.629815e-9 + low * 0.72134752)  # below 1e-5
    density = exp2(-exponent)
    return tl.fma(density, rest * -0.6931472, density)


@triton.jit
def tail_exact(a, SHORT: tl.constexpr):
    """tail(a) and tail'(a).

    Phi(-a) = exp(-a*a/2) * s * Q(s), s = 1 / (a + k). Q is the minimax fit of exp(a*a/2) * Phi(-a) / s in relative
    error over 0 <= a <= 13.3: 8.8e-8 with degree 7 and k = 3.3, 4.5e-5 with degree 4 and k = 2.6.
    """
    if SHORT:  # the density without its factor 1 / sqrt(2 pi)
        density = exp2(a * a * -0.72134752)
        s = reciprocal(a + 2.6)
        q = s * -10.529969 + 8.111355
        q = q * s + 1.756674
        q = q * s + 1.06771
        q = q * s + 0.3983456
    else:
        density = gauss(a)
        s = reciprocal(a + 3.3)
        q = s * 516.5728 - 666.5993
        q = q * s + 253.97015
        q = q * s - 18.224339
        q = q * s + 14.850441
        q = q * s + 3.6540864
        q = q * s + 1.3269342
        q = q * s + 0.39878547
    q *= s
    return a * q * density, (q - a * 0.39894228) * density  # a first: density alone may be subnormal


@triton.jit
def tail_tanh(a):
    """tail(a) and tail'(a), with 2w = 1.5957691 a + 0.07135481 a^3."""
    square = a * a
    e = exp2(a * (square * -0.10294324 - 2.3022082))  # exp(-2w)
    gate = e * reciprocal(1.0 + e)  # sigmoid(-2w)
    turn = a * (square * 0.21406444 + 1.5957691)  # a * d(2w)/da
    return a * gate, gate - gate * (1.0 - gate) * turn


@triton.jit
def tail(u, TANH: tl.constexpr, SHORT: tl.constexpr):
    end: tl.constexpr = TANH_END if TANH else EXACT_END
    a = tl.minimum(tl.abs(u), end, propagate_nan=tl.PropagateNan.ALL)
    if TANH:
        return tail_tanh(a)
    else:
        return tail_exact(a, SHORT)


@triton.jit
def gelu(u, TANH: tl.constexpr, SHORT: tl.constexpr):
    value, _ = tail(u, TANH, SHORT)
    return tl.maximum(u, 0.0) - value


@triton.jit
def gelu_slope(u, TANH: tl.constexpr, SHORT: tl.constexpr):
    _, slope = tail(u, TANH, SHORT)
    return tl.where(u > 0, 1.0 - slope, slope)


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def load_bias(bias_ptr, row, column, columns):
    """[R, C], each row the same: in the layout of the tiles, so that nothing is moved between threads."""
    return tl.load(bias_ptr + column + row * 0, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def gelu_forward_kernel(
    x_ptr, bias_ptr, y_ptr, rows, columns, BIAS: tl.constexpr, TANH: tl.constexpr, SHORT: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program has R rows of C columns."""
    column_blocks = tl.cdiv(columns, C)
    row = tl.program_id(0) // column_blocks * R + tl.arange(0, R)[:, None]
    column = tl.program_id(0) % column_blocks * C + tl.arange(0, C)[None, :]
    place = row.to(tl.int64) * columns + column
    mask = (row < rows) & (column < columns)
    u = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        u += load_bias(bias_ptr, row, column, columns)
    y = gelu(u, TANH, SHORT)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "rows_of_part"])
def gelu_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, scratch_ptr, rows, columns, rows_of_part,
    BIAS: tl.constexpr, TANH: tl.constexpr, SHORT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program has a part of the rows, R at a time, and C columns, whose dbias stays in registers until the end."""
    column_blocks = tl.cdiv(columns, C)
    part = tl.program_id(0) // column_blocks
    first_column = tl.program_id(0) % column_blocks * C
    column = first_column + tl.arange(0, C)[None, :]
    lanes = tl.arange(0, R)[:, None]
    if BIAS:
        b = load_bias(bias_ptr, lanes, column, columns)
        dbias = tl.zeros([R, C], tl.float32)
    end = tl.minimum((part + 1) * rows_of_part, rows)
    for first in tl.range(part * rows_of_part, end, R, num_stages=STAGES):
        row = first + lanes
        place = row.to(tl.int64) * columns + column
        mask = (row < end) & (column < columns)
        u = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            u += b
        dx = dy * gelu_slope(u, TANH, SHORT)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if BIAS:
            dbias += dx
    if BIAS:
        column = first_column + tl.arange(0, C)
        tl.store(scratch_ptr + part.to(tl.int64) * columns + column, tl.sum(dbias, 0), mask=column < columns)


# ---- launchers -----------------------------------------------------------------------------------------------------


def tile_of(x: Tensor, bias: Tensor | None, tile: int, most_columns: int) -> tuple[int, int, int, int]:
    """Rows and columns of x, and R and C of a tile. Without a bias any rows will do, and are of whole accesses."""
    columns = x.shape[-1]
    if bias is None:
        columns = next((many for many in (256, 16) if x.numel() % many == 0), columns)
    block = min(most_columns, triton.next_power_of_2(columns))
    return x.numel() // columns, columns, tile // block, block


def gelu_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    x, bias = x.contiguous(), bias if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    rows, columns, R, C = tile_of(x, bias, TILE, MOST_COLUMNS)
    launch(
        gelu_forward_kernel, (triton.cdiv(rows, R) * triton.cdiv(columns, C),),
        x, x if bias is None else bias, y, rows, columns, BIAS=bias is not None, TANH=approximate == "tanh",
        SHORT=x.element_size() == 2, R=R, C=C, num_warps=4,
    )  # fmt: skip
    return y


def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    dy, x, bias = dy.contiguous(), x.contiguous(), bias if bias is None else bias.contiguous()
    dx, dbias = torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)
    if x.numel() == 0:
        return dx, dbias if bias is None else dbias.zero_()
    plan = backward_plan(x.element_size())
    rows, columns, R, C = tile_of(x, bias, plan.tile, plan.most_columns)
    # How rows are cut into parts follows from the shape alone, so that dbias is the same on every GPU.
    column_blocks = triton.cdiv(columns, C)
    rows_of_part = triton.cdiv(triton.cdiv(rows, triton.cdiv(plan.programs, column_blocks)), R) * R
    parts = triton.cdiv(rows, rows_of_part)
    scratch = dx if bias is None else x.new_empty(1, parts, columns, dtype=torch.float32)
    launch(
        gelu_backward_kernel, (parts * column_blocks,),
        dy, x, x if bias is None else bias, dx, scratch, rows, columns, rows_of_part, BIAS=bias is not None,
        TANH=approximate == "tanh", SHORT=x.element_size() == 2, R=R, C=C, STAGES=plan.stages, num_warps=plan.warps,
    )  # fmt: skip
    if bias is not None:
        sum_parts(scratch, dbias)
    return dx, dbias
