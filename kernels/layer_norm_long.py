"""LayerNorm of rows that are too long for registers: chunks pass through them one by one, again for every sum.

What is read again comes from a cache, and the mask is drawn again. Backward takes two kernels: one for dz and dx, a
program a row, and then one for the column sums, whose programs walk down the rows of a block of columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.launch import launch
from fastbert.kernels.layer_norm_row import add_dropped, keep_chunk, load_chunk, load_parameter, store_chunk

WARPS = 8
CHUNK = 2048  # columns
COLUMNS, COLUMN_ROWS, COLUMN_WARPS = 128, 16, 4  # of a tile of the kernel for column sums
MOST_PARTS = 32  # of the rows


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def layer_norm_long_forward_kernel(
    x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr, eps, bound, scale, seed_ptr, y_ptr, z_ptr, mean_ptr,
    rstd_ptr, H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    # dropout, residual
    total = tl.zeros([1, C], tl.float32)
    for first in tl.range(0, H, C):
        z = load_z(x_ptr, x_bias_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H, C)
        if z_ptr is not None:
            store_chunk(z_ptr, z, row, None, first, H, C)
        total += z
    # statistics
    mean = tl.sum(total, 1, keep_dims=True) * (1.0 / H)
    squares = tl.zeros([1, C], tl.float32)
    for first in tl.range(0, H, C):
        z = load_z(x_ptr, x_bias_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H, C)
        deviation = tl.where(first + tl.arange(0, C)[None, :] < H, z - mean, 0.0)
        squares += deviation * deviation
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / H) + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    # normalize, affine
    for first in tl.range(0, H, C):
        z = load_z(x_ptr, x_bias_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H, C)
        weight, bias = load_parameter(weight_ptr, row, first, H, C), load_parameter(bias_ptr, row, first, H, C)
        store_chunk(y_ptr, (z - mean) * rstd * weight + bias, row, None, first, H, C)


@triton.jit
def load_z(x_ptr, x_bias_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H: tl.constexpr, C: tl.constexpr):
    x = load_chunk(x_ptr, row, None, first, H, C)
    residual = x if residual_ptr is None else load_chunk(residual_ptr, row, None, first, H, C)
    return add_dropped(x, x_bias_ptr, residual, row, first, seed_ptr, bound, scale, residual_ptr is not None, H, C)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def layer_norm_long_backward_kernel(
    dy_ptr, dy2_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, bound, scale, zero, seed_ptr, dz_ptr, dx_ptr,
    H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    # statistics
    sum_g = tl.zeros([1, C], tl.float32)
    sum_gh = tl.zeros([1, C], tl.float32)
    for first in tl.range(0, H, C):
        g, h = load_g_and_h(dy_ptr, dy2_ptr, z_ptr, weight_ptr, mean, rstd, row, first, H, C)
        sum_g += g
        sum_gh += g * h
    mean_g = tl.sum(sum_g, 1, keep_dims=True) * (1.0 / H)
    mean_gh = tl.sum(sum_gh, 1, keep_dims=True) * (1.0 / H)
    # normalize
    for first in tl.range(0, H, C):
        g, h = load_g_and_h(dy_ptr, dy2_ptr, z_ptr, weight_ptr, mean, rstd, row, first, H, C)
        dz = rstd * (g - mean_g - h * mean_gh)
        store_chunk(dz_ptr, dz, row, None, first, H, C)
        if seed_ptr is not None:
            keep = keep_chunk(row, first, C, seed_ptr, bound)
            store_chunk(dx_ptr, tl.where(keep, dz * scale, zero), row, None, first, H, C)


@triton.jit
def load_g_and_h(dy_ptr, dy2_ptr, z_ptr, weight_ptr, mean, rstd, row, first, H: tl.constexpr, C: tl.constexpr):
    h = (load_chunk(z_ptr, row, None, first, H, C).to(tl.float32) - mean) * rstd
    return load_sum(dy_ptr, dy2_ptr, row, None, first, H, C) * load_parameter(weight_ptr, row, first, H, C), h


@triton.jit
def load_sum(dy_ptr, dy2_ptr, row, rows, first, H: tl.constexpr, C: tl.constexpr):
    """float32 of a chunk of one or two gradients."""
    dy = load_chunk(dy_ptr, row, rows, first, H, C).to(tl.float32)
    if dy2_ptr is not None:
        dy += load_chunk(dy2_ptr, row, rows, first, H, C).to(tl.float32)
    return dy


@triton.jit(do_not_specialize=["rows"])
def layer_norm_columns_kernel(
    dy_ptr, dy2_ptr, z_ptr, mean_ptr, rstd_ptr, dx_ptr, scratch_ptr, rows, H: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """scratch [2 or 3, parts, H]: part program_id(1) has every so-manieth tile of rows. dx is None without x_bias."""
    first_column = tl.program_id(0) * C
    column = first_column + tl.arange(0, C)[None, :]
    part, parts = tl.program_id(1), tl.num_programs(1)
    dweight = tl.zeros([R, C], tl.float32)
    dbias = tl.zeros([R, C], tl.float32)
    dx_bias = tl.zeros([R, C], tl.float32)
    for first in tl.range(part * R, rows, parts * R):
        row = first + tl.arange(0, R)[:, None]
        dy = load_sum(dy_ptr, dy2_ptr, row, rows, first_column, H, C)
        z = load_chunk(z_ptr, row, rows, first_column, H, C).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        dweight += dy * ((z - mean) * rstd)
        dbias += dy
        if dx_ptr is not None:
            dx_bias += load_chunk(dx_ptr, row, rows, first_column, H, C).to(tl.float32)
    # affine
    at = part * H + column
    tl.store(scratch_ptr + at, tl.sum(dweight, 0, keep_dims=True), mask=column < H)
    tl.store(scratch_ptr + parts * H + at, tl.sum(dbias, 0, keep_dims=True), mask=column < H)
    if dx_ptr is not None:
        tl.store(scratch_ptr + 2 * parts * H + at, tl.sum(dx_bias, 0, keep_dims=True), mask=column < H)


# ---- launcher ------------------------------------------------------------------------------------------------------


def backward(given: tuple, mask: tuple, results: tuple, rows: int, sums: int) -> Tensor:
    """dz and dx, which are `results`, and of the 2 or 3 column sums the parts [sums, parts, H].

    `given` are dy, dy2, z, weight, mean and rstd; `mask` is what the kernels take of dropout: bound, scale, 0.0 and the
    seed.
    """
    dy, dy2, z, _, mean, rstd = given
    dz, dx = results
    H = z.shape[-1]
    parts = min(MOST_PARTS, triton.cdiv(rows, COLUMN_ROWS))
    scratch = z.new_empty(sums, parts, H, dtype=mean.dtype)
    launch(
        layer_norm_long_backward_kernel, (rows,), *given, *mask, *results, H=H, C=CHUNK, num_warps=WARPS
    )  # fmt: skip
    summed = None if sums == 2 else dz if dx is None else dx
    launch(
        layer_norm_columns_kernel, (triton.cdiv(H, COLUMNS), parts), dy, dy2, z, mean, rstd, summed, scratch, rows, H=H,
        R=COLUMN_ROWS, C=COLUMNS, num_warps=COLUMN_WARPS,
    )  # fmt: skip
    return scratch
