"""LayerNorm with the dropout and the residual that come before it in a transformer, [T, H]:

    z = residual + dropout(x + x_bias)             rounded to x's dtype; z = x when there is nothing of it
    y = (z - mean) * rstd * weight + bias          mean and variance over a row, of the rounded z

Backward takes z, mean [T], rstd [T] and one or two gradients of y, dy being their sum; with h = (z - mean) * rstd and
g = dy * weight:

    dz = rstd * (g - mean(g) - h * mean(g * h)),  dx = dropout'(dz),
    dweight = sum(dy * h),  dbias = sum(dy),  dx_bias = sum(dx)

Arithmetic is float32 for every dtype, and the variance is the mean of squared deviations. Memory is read once and
written once: a row stays in registers. The dropout mask is drawn again in backward, not stored. Sums are in an order
that follows from the shape alone. Ba, Kiros and Hinton, "Layer normalization" (2016).

Forward: a program a row, of one warp for each 1,024 columns, or several narrow rows. Backward: a fixed number of
programs walk over the rows and keep their column sums in registers, each row of a tile its own; a second kernel adds
these parts up. Longer rows: layer_norm_long.py.

A row is K chunks of C columns, not one block of the next power of two: 768 bfloat16 are three loads of 16 bytes in each
lane of a warp, where one block of 1,024 would leave a quarter of the lanes idle.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import layer_norm_long as long
from fastbert.kernels.column_sums import sum_parts
from fastbert.kernels.launch import launch
from fastbert.kernels.layer_norm_row import add_dropped, keep_chunk, load_chunks, load_parameter, store_chunk
from fastbert.kernels.philox import ROW_BITS, bound, scale

WARP_COLUMNS = 256  # of a chunk, for each warp that shares a row: eight a lane where a warp has 32
FORWARD_CHUNKS = 4  # of a row, at most
NARROW_TILE, NARROW_WARPS = 1024, 4  # elements of a tile of rows that are shorter than a warp's columns
IN_REGISTERS = 8192  # columns, at most


class Tile(NamedTuple):
    rows: int
    warps: int  # of all rows
    C: int  # columns of a chunk
    K: int  # chunks of a row


def tile_of(columns: int, rows: int, warps: int) -> Tile:
    """`warps` to a row; narrow rows have tiles of more rows instead."""
    C = WARP_COLUMNS * warps
    if columns > C // 2:
        return Tile(rows, rows * warps, C, triton.cdiv(columns, C))
    C = max(8, triton.next_power_of_2(columns))
    return Tile(NARROW_TILE // C, NARROW_WARPS, C, 1)


class BackwardPlan(NamedTuple):
    """Fastest in a prototype on an H200, for 16,384 rows of 768, 1,024 and 4,096; between them by registers."""

    warps: int  # of a row
    rows: int  # of a tile
    programs: int  # at most
    prefetch: bool  # the next tile, into registers
    stages: int  # of loads ahead through shared memory; 1: none
    registers: int | None  # of a thread, at most: 128 let 16 warps onto a multiprocessor


def backward_plan(columns: int, itemsize: int, more: bool) -> BackwardPlan:
    """`more`: with dy2 or x_bias, whose registers need room. So that none spills, by the compiler's counts."""
    if columns <= 768 and itemsize == 2:
        return BackwardPlan(warps=1, rows=4, programs=264, prefetch=False, stages=3, registers=None)
    if columns <= 768:
        return BackwardPlan(
            warps=1, rows=4, programs=264, prefetch=not more, stages=2 if more else 1, registers=None
        )  # fmt: skip
    if columns <= 1024:
        # In float32 128 registers are too few.
        registers = None if itemsize == 4 else 168 if more else 128
        return BackwardPlan(warps=2, rows=1, programs=1056, prefetch=True, stages=1, registers=registers)
    if columns <= 4096:
        return BackwardPlan(warps=8 if more else 4, rows=1, programs=264, prefetch=True, stages=1, registers=None)
    return BackwardPlan(warps=16 if more else 8, rows=1, programs=264, prefetch=False, stages=1, registers=None)


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def layer_norm_forward_kernel(
    x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr, eps, bound, scale, seed_ptr, y_ptr, z_ptr, mean_ptr,
    rstd_ptr, rows, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of x_bias, residual, seed, z, mean and rstd addresses are None where there is none; so is `rows` if R is 1."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    xs = load_chunks(x_ptr, row, rows, H, C, K)
    residuals = xs if residual_ptr is None else load_chunks(residual_ptr, row, rows, H, C, K)
    # dropout, residual
    zs = ()
    total = tl.zeros([R, C], tl.float32)
    for i in tl.static_range(K):
        z = add_dropped(
            xs[i], x_bias_ptr, residuals[i], row, i * C, seed_ptr, bound, scale, residual_ptr is not None, H, C
        )  # fmt: skip
        if z_ptr is not None:
            store_chunk(z_ptr, z, row, rows, i * C, H, C)
        zs = zs + (z,)
        total += z
    # statistics
    mean = tl.sum(total, 1, keep_dims=True) * (1.0 / H)
    squares = tl.zeros([R, C], tl.float32)
    for i in tl.static_range(K):
        deviation = zs[i] - mean
        if H % C != 0:
            deviation = tl.where(i * C + tl.arange(0, C)[None, :] < H, deviation, 0.0)
        squares += deviation * deviation
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / H) + eps)
    if mean_ptr is not None:
        mask = None if rows is None else row < rows
        tl.store(mean_ptr + row, mean, mask=mask)
        tl.store(rstd_ptr + row, rstd, mask=mask)
    # normalize, affine
    for i in tl.static_range(K):
        weight, bias = load_parameter(weight_ptr, row, i * C, H, C), load_parameter(bias_ptr, row, i * C, H, C)
        store_chunk(y_ptr, (zs[i] - mean) * rstd * weight + bias, row, rows, i * C, H, C)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(dy_ptr, dy2_ptr, z_ptr, mean_ptr, rstd_ptr, row, rows, H: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """Rows of dy, dy2 (of dy again where there is none) and z, as K chunks each, of mean and of rstd."""
    dys, zs = load_chunks(dy_ptr, row, rows, H, C, K), load_chunks(z_ptr, row, rows, H, C, K)
    dy2s = dys if dy2_ptr is None else load_chunks(dy2_ptr, row, rows, H, C, K)
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    return dys, dy2s, zs, mean, rstd


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    dy_ptr, dy2_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, bound, scale, zero, seed_ptr, dz_ptr, dx_ptr, scratch_ptr,
    rows, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    X_BIAS: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """scratch [2, or 3 with X_BIAS, programs * PARTS, H], PARTS being R or 1. dy2 may be None; seed and dx are where
    nothing was dropped.

    `zero` is 0.0 as an argument: with a constant the compiler rounds before it selects, and packs halves one by one.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, R)[:, None]
    weights, dweights, dbiases, dx_biases = (), (), (), ()
    for i in tl.static_range(K):
        weights = weights + (load_parameter(weight_ptr, lane, i * C, H, C),)
        dweights = dweights + (tl.zeros([R, C], tl.float32),)
        dbiases = dbiases + (tl.zeros([R, C], tl.float32),)
        if X_BIAS:
            dx_biases = dx_biases + (tl.zeros([R, C], tl.float32),)
    if PREFETCH:
        dys, dy2s, zs, mean, rstd = load_tile(
            dy_ptr, dy2_ptr, z_ptr, mean_ptr, rstd_ptr, program * R + lane, rows, H, C, K
        )  # fmt: skip
    for first in tl.range(program * R, rows, programs * R, num_stages=STAGES):
        row = first + lane
        if PREFETCH:
            later = row + programs * R
            next_dys, next_dy2s, next_zs, next_mean, next_rstd = load_tile(
                dy_ptr, dy2_ptr, z_ptr, mean_ptr, rstd_ptr, later, rows, H, C, K
            )  # fmt: skip
        else:
            dys, dy2s, zs, mean, rstd = load_tile(dy_ptr, dy2_ptr, z_ptr, mean_ptr, rstd_ptr, row, rows, H, C, K)
        # statistics
        gs, hs, new_dweights, new_dbiases, new_dx_biases = (), (), (), (), ()
        sum_g = tl.zeros([R, C], tl.float32)
        sum_gh = tl.zeros([R, C], tl.float32)
        for i in tl.static_range(K):
            dy = dys[i].to(tl.float32)
            if dy2_ptr is not None:
                dy += dy2s[i].to(tl.float32)
            h = (zs[i].to(tl.float32) - mean) * rstd
            g = dy * weights[i]
            sum_g += g
            sum_gh += g * h
            new_dweights = new_dweights + (dweights[i] + dy * h,)
            new_dbiases = new_dbiases + (dbiases[i] + dy,)
            gs, hs = gs + (g,), hs + (h,)
        dweights, dbiases = new_dweights, new_dbiases
        mean_g = tl.sum(sum_g, 1, keep_dims=True) * (1.0 / H)
        mean_gh = tl.sum(sum_gh, 1, keep_dims=True) * (1.0 / H)
        # normalize
        for i in tl.static_range(K):
            dz = rstd * (gs[i] - mean_g - hs[i] * mean_gh)
            store_chunk(dz_ptr, dz, row, rows, i * C, H, C)
            dx = dz
            if seed_ptr is not None:
                dx = tl.where(keep_chunk(row, i * C, C, seed_ptr, bound), dz * scale, zero)
                store_chunk(dx_ptr, dx, row, rows, i * C, H, C)
            if X_BIAS:
                new_dx_biases = new_dx_biases + (dx_biases[i] + dx,)
        if X_BIAS:
            dx_biases = new_dx_biases
        if PREFETCH:
            dys, dy2s, zs, mean, rstd = next_dys, next_dy2s, next_zs, next_mean, next_rstd
    # affine: a tile's rows are parts of their own. Added here, they would meet eight to a bank of shared memory.
    part = program * PARTS + tl.arange(0, PARTS)[:, None]
    for i in tl.static_range(K):
        at, stride = scratch_ptr + part * H + i * C, programs * PARTS * H
        store_part(at, dweights[i], i * C, H, C, PARTS)
        store_part(at + stride, dbiases[i], i * C, H, C, PARTS)
        if X_BIAS:
            store_part(at + 2 * stride, dx_biases[i], i * C, H, C, PARTS)


@triton.jit
def store_part(ptr, sums, first, H: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """Column sums [R, C] from column `first` on, as they are or added up to one row."""
    if PARTS == 1:
        sums = tl.sum(sums, 0, keep_dims=True)
    column = tl.arange(0, C)[None, :]
    tl.store(ptr + column, sums, mask=first + column < H)


# ---- launchers -----------------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    x = aligned(x)
    y = torch.empty_like(x)
    _forward(x, x_bias, residual, weight, bias, eps, t, seed, y, None, None, None)
    return y


def layer_norm_forward(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = aligned(x)
    is_changed = x_bias is not None or residual is not None or t > 0
    y = torch.empty_like(x)
    z = torch.empty_like(x) if is_changed else x.new_empty(0)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    _forward(x, x_bias, residual, weight, bias, eps, t, seed, y, z if is_changed else None, mean, rstd)
    return y, z, mean, rstd


def _forward(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int,
    seed: Tensor | None, y: Tensor, z: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
) -> None:  # fmt: skip
    if x.numel() == 0:
        return
    H = x.shape[-1]
    arguments = (
        x, None if x_bias is None else aligned(x_bias), None if residual is None else aligned(residual),
        aligned(weight), aligned(bias), eps, bound(t, ROW_BITS), scale(t, ROW_BITS), seed if t > 0 else None, y, z,
        mean, rstd,
    )  # fmt: skip
    rows = x.numel() // H
    if H > IN_REGISTERS:
        launch(long.layer_norm_long_forward_kernel, (rows,), *arguments, H=H, C=long.CHUNK, num_warps=long.WARPS)
        return
    tile = tile_of(H, 1, triton.next_power_of_2(triton.cdiv(H, FORWARD_CHUNKS * WARP_COLUMNS)))
    launch(
        layer_norm_forward_kernel, (triton.cdiv(rows, tile.rows),), *arguments, None if tile.rows == 1 else rows, H=H,
        R=tile.rows, C=tile.C, K=tile.K, num_warps=tile.warps,
    )  # fmt: skip


def layer_norm_backward(
    dy: Tensor, dy2: Tensor | None, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, t: int, seed: Tensor | None,
    with_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, dy2, z, weight = aligned(dy), None if dy2 is None else aligned(dy2), aligned(z), aligned(weight)
    H = z.shape[-1]
    rows = z.numel() // H if H else 0
    dz = torch.empty_like(z)
    dx = torch.empty_like(z) if t > 0 else z.new_empty(0)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    dx_bias = torch.empty_like(weight) if with_x_bias else weight.new_empty(0)
    given, sums = (dy, dy2, z, weight, mean, rstd), 3 if with_x_bias else 2
    mask = bound(t, ROW_BITS), scale(t, ROW_BITS), 0.0, seed if t > 0 else None
    results = dz, dx if t > 0 else None
    if H > IN_REGISTERS:
        scratch = long.backward(given, mask, results, rows, sums)
    else:
        plan = backward_plan(H, z.element_size(), with_x_bias or dy2 is not None)
        tile = tile_of(H, plan.rows, plan.warps)
        programs, parts = min(plan.programs, triton.cdiv(rows, tile.rows)), 1 if tile.rows > plan.rows else tile.rows
        scratch = z.new_empty(sums, programs * parts, H, dtype=torch.float32)
        launch(
            layer_norm_backward_kernel, (programs,), *given, *mask, *results, scratch, rows, H=H, R=tile.rows,
            C=tile.C, K=tile.K, PARTS=parts, X_BIAS=with_x_bias, PREFETCH=plan.prefetch, STAGES=plan.stages,
            num_warps=tile.warps, maxnreg=plan.registers,
        )  # fmt: skip
    if H:
        sum_parts(scratch, dweight, dbias, dx_bias if with_x_bias else None)
    return dz, dx, dweight, dbias, dx_bias


def aligned(x: Tensor) -> Tensor:
    """x, contiguous, from a multiple of 16 bytes on: rows that begin elsewhere would be added up in another order."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
