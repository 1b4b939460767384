"""LayerNorm of rows that are too long for registers: chunks pass through them one by one, again for every sum.

What is read again comes from a cache, and the mask is drawn again. Backward takes two kernels: one for dz and dx, a
program a row, and one for dweight and dbias, whose programs walk down the rows of a block of columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.launch import launch
from fastbert.kernels.layer_norm_row import add_dropped, keep_chunk, load_chunk, load_parameter, store_chunk

WARPS = 8
CHUNK = 2048  # columns
COLUMNS, COLUMN_ROWS, COLUMN_WARPS = 128, 16, 4  # of a tile of the kernel for dweight and dbias
MOST_PARTS = 32  # of the rows


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def layer_norm_long_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, eps, bound, scale, seed_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr,
    H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    # dropout, residual
    total = tl.zeros([1, C], tl.float32)
    for first in tl.range(0, H, C):
        z = load_z(x_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H, C)
        if z_ptr is not None:
            store_chunk(z_ptr, z, row, None, first, H, C)
        total += z
    # statistics
    mean = tl.sum(total, 1, keep_dims=True) * (1.0 / H)
    squares = tl.zeros([1, C], tl.float32)
    for first in tl.range(0, H, C):
        z = load_z(x_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H, C)
        deviation = tl.where(first + tl.arange(0, C)[None, :] < H, z - mean, 0.0)
        squares += deviation * deviation
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / H) + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    # normalize, affine
    for first in tl.range(0, H, C):
        z = load_z(x_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H, C)
        weight, bias = load_parameter(weight_ptr, row, first, H, C), load_parameter(bias_ptr, row, first, H, C)
        store_chunk(y_ptr, (z - mean) * rstd * weight + bias, row, None, first, H, C)


@triton.jit
def load_z(x_ptr, residual_ptr, row, first, seed_ptr, bound, scale, H: tl.constexpr, C: tl.constexpr):
    x = load_chunk(x_ptr, row, None, first, H, C)
    residual = x if residual_ptr is None else load_chunk(residual_ptr, row, None, first, H, C)
    return add_dropped(x, residual, row, first, seed_ptr, bound, scale, residual_ptr is not None, C)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def layer_norm_long_backward_kernel(
    dy_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, bound, scale, zero, seed_ptr, dz_ptr, dx_ptr, H: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    # statistics
    sum_g = tl.zeros([1, C], tl.float32)
    sum_gh = tl.zeros([1, C], tl.float32)
    for first in tl.range(0, H, C):
        g, h = load_g_and_h(dy_ptr, z_ptr, weight_ptr, mean, rstd, row, first, H, C)
        sum_g += g
        sum_gh += g * h
    mean_g = tl.sum(sum_g, 1, keep_dims=True) * (1.0 / H)
    mean_gh = tl.sum(sum_gh, 1, keep_dims=True) * (1.0 / H)
    # normalize
    for first in tl.range(0, H, C):
        g, h = load_g_and_h(dy_ptr, z_ptr, weight_ptr, mean, rstd, row, first, H, C)
        dz = rstd * (g - mean_g - h * mean_gh)
        store_chunk(dz_ptr, dz, row, None, first, H, C)
        if seed_ptr is not None:
            keep = keep_chunk(row, first, C, seed_ptr, bound)
            store_chunk(dx_ptr, tl.where(keep, dz * scale, zero), row, None, first, H, C)


@triton.jit
def load_g_and_h(dy_ptr, z_ptr, weight_ptr, mean, rstd, row, first, H: tl.constexpr, C: tl.constexpr):
    h = (load_chunk(z_ptr, row, None, first, H, C).to(tl.float32) - mean) * rstd
    return load_chunk(dy_ptr, row, None, first, H, C).to(tl.float32) * load_parameter(weight_ptr, row, first, H, C), h


@triton.jit(do_not_specialize=["rows"])
def layer_norm_columns_kernel(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, scratch_ptr, rows, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """scratch [2, parts, H]: part program_id(1) has every so-manieth tile of rows."""
    column = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    part, parts = tl.program_id(1), tl.num_programs(1)
    dweight = tl.zeros([R, C], tl.float32)
    dbias = tl.zeros([R, C], tl.float32)
    for first in tl.range(part * R, rows, parts * R):
        row = first + tl.arange(0, R)[:, None]
        dy = load_chunk(dy_ptr, row, rows, tl.program_id(0) * C, H, C).to(tl.float32)
        z = load_chunk(z_ptr, row, rows, tl.program_id(0) * C, H, C).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        dweight += dy * ((z - mean) * rstd)
        dbias += dy
    # affine
    at = part * H + column
    tl.store(scratch_ptr + at, tl.sum(dweight, 0, keep_dims=True), mask=column < H)
    tl.store(scratch_ptr + parts * H + at, tl.sum(dbias, 0, keep_dims=True), mask=column < H)


# ---- launcher ------------------------------------------------------------------------------------------------------


def backward(
    dy: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: tuple, results: tuple, rows: int
) -> Tensor:
    """dz and dx, which are `results`, and of dweight and dbias the parts [2, parts, H].

    `mask` is what the kernels take of dropout: bound, scale, 0.0 and the seed.
    """
    H = z.shape[-1]
    parts = min(MOST_PARTS, triton.cdiv(rows, COLUMN_ROWS))
    scratch = z.new_empty(2, parts, H, dtype=mean.dtype)
    launch(
        layer_norm_columns_kernel, (triton.cdiv(H, COLUMNS), parts), dy, z, mean, rstd, scratch, rows, H=H,
        R=COLUMN_ROWS, C=COLUMNS, num_warps=COLUMN_WARPS,
    )  # fmt: skip
    launch(
        layer_norm_long_backward_kernel, (rows,), dy, z, weight, mean, rstd, *mask, *results, H=H, C=CHUNK,
        num_warps=WARPS,
    )  # fmt: skip
    return scratch
