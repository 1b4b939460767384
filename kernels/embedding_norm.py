"""Embeddings looked up, added, normalized and dropped, [T, H]:

    z = words[word_id] + positions[position_id] + types[type_id] + tasks[task_id]    rounded to y's dtype
    y = dropout((z - mean) * rstd * weight + bias)              mean and variance over a row, of the rounded z

z is not kept: `embedding_norm_recompute` makes it again from the ids, and with it the gradient of what was dropped, for
layer_norm's backward kernels. Arithmetic is float32 for every dtype. A table's rows are read once, y is written once: a
row stays in registers, as K chunks of C columns (see layer_norm.py). A token with an id outside its table is NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import faults
from fastbert.kernels.launch import launch
from fastbert.kernels.layer_norm import FORWARD_CHUNKS, WARP_COLUMNS, Tile, aligned, tile_of
from fastbert.kernels.layer_norm_row import keep_chunk, load_chunk, load_parameter, store_chunk
from fastbert.kernels.philox import ROW_BITS, bound, scale

MOST_COLUMNS = 16_384


@triton.jit
def load_ids(ids_ptr, row, rows):
    """int64 [R, 1]; 0 where there are no ids, and from `rows` on."""
    if ids_ptr is None:
        return (row * 0).to(tl.int64)
    else:
        return tl.load(ids_ptr + row, mask=row < rows, other=0)


@triton.jit
def load_row(table_ptr, ids, fit, first, H: tl.constexpr, C: tl.constexpr):
    """float32 [R, C] of the tables' rows `ids`, where they `fit`."""
    column = first + tl.arange(0, C)[None, :]
    return tl.load(table_ptr + ids * H + column, mask=fit & (column < H), other=0.0).to(tl.float32)


@triton.jit
def add_rows(
    words_ptr, positions_ptr, types_ptr, tasks_ptr, word, position, type_id, task, fit, first,
    dtype: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """float32 of the rounded z, chunks from column `first` on; NaN where ids do not fit."""
    z = load_row(words_ptr, word, fit, first, H, C) + load_row(positions_ptr, position, fit, first, H, C)
    z += load_row(types_ptr, type_id, fit, first, H, C)
    if tasks_ptr is not None:
        z += load_row(tasks_ptr, task, fit, first, H, C)
    return tl.where(fit, z.to(dtype).to(tl.float32), float("nan"))


@triton.jit
def all_fit(word, position, type_id, task, word_rows, position_rows, type_rows, task_rows):
    """bool [R, 1]"""
    fit = (word >= 0) & (word < word_rows) & (position >= 0) & (position < position_rows)
    return fit & (type_id >= 0) & (type_id < type_rows) & (task >= 0) & (task < task_rows)


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "word_rows", "position_rows", "type_rows", "task_rows"])
def embedding_norm_forward_kernel(
    words_ptr, positions_ptr, types_ptr, tasks_ptr, word_ids_ptr, position_ids_ptr, type_ids_ptr, task_ids_ptr,
    word_rows, position_rows, type_rows, task_rows, zero, weight_ptr, bias_ptr, eps, bound, scale, seed_ptr, y_ptr,
    mean_ptr, rstd_ptr, faults_ptr, rows, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Addresses of tasks, ids of types and of tasks, and the seed are None where there is none. `zero` is 0.0."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    word, position = load_ids(word_ids_ptr, row, rows), load_ids(position_ids_ptr, row, rows)
    type_id, task = load_ids(type_ids_ptr, row, rows), load_ids(task_ids_ptr, row, rows)
    fit = all_fit(word, position, type_id, task, word_rows, position_rows, type_rows, task_rows)
    faults.raise_fault(faults_ptr, faults.EMBEDDING, row, (fit == 0) & (row < rows))
    zs = ()
    total = tl.zeros([R, C], tl.float32)
    for i in tl.static_range(K):
        z = add_rows(
            words_ptr, positions_ptr, types_ptr, tasks_ptr, word, position, type_id, task, fit, i * C,
            y_ptr.dtype.element_ty, H, C,
        )  # fmt: skip
        zs = zs + (z,)
        total += z
    # statistics
    mean = tl.sum(total, 1, keep_dims=True) * (1.0 / H)
    squares = tl.zeros([R, C], tl.float32)
    for i in tl.static_range(K):
        deviation = tl.where(i * C + tl.arange(0, C)[None, :] < H, zs[i] - mean, 0.0)
        squares += deviation * deviation
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / H) + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    # normalize, affine, dropout
    for i in tl.static_range(K):
        weight, bias = load_parameter(weight_ptr, row, i * C, H, C), load_parameter(bias_ptr, row, i * C, H, C)
        y = (zs[i] - mean) * rstd * weight + bias
        if seed_ptr is not None:
            y = tl.where(keep_chunk(row, i * C, C, seed_ptr, bound), y * scale, zero)
        store_chunk(y_ptr, y, row, rows, i * C, H, C)


# ---- recompute -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "word_rows", "position_rows", "type_rows", "task_rows"])
def embedding_norm_recompute_kernel(
    words_ptr, positions_ptr, types_ptr, tasks_ptr, word_ids_ptr, position_ids_ptr, type_ids_ptr, task_ids_ptr,
    word_rows, position_rows, type_rows, task_rows, zero, dy_ptr, bound, scale, seed_ptr, z_ptr, dropped_ptr, rows,
    H: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    word, position = load_ids(word_ids_ptr, row, rows), load_ids(position_ids_ptr, row, rows)
    type_id, task = load_ids(type_ids_ptr, row, rows), load_ids(task_ids_ptr, row, rows)
    fit = all_fit(word, position, type_id, task, word_rows, position_rows, type_rows, task_rows)
    for i in tl.static_range(K):
        z = add_rows(
            words_ptr, positions_ptr, types_ptr, tasks_ptr, word, position, type_id, task, fit, i * C,
            z_ptr.dtype.element_ty, H, C,
        )  # fmt: skip
        store_chunk(z_ptr, z, row, rows, i * C, H, C)
        if seed_ptr is not None:
            dy = load_chunk(dy_ptr, row, rows, i * C, H, C).to(tl.float32)
            dropped = tl.where(keep_chunk(row, i * C, C, seed_ptr, bound), dy * scale, zero)
            store_chunk(dropped_ptr, dropped, row, rows, i * C, H, C)


# ---- launchers -----------------------------------------------------------------------------------------------------


def embedding_norm_forward(
    words: Tensor, positions: Tensor, types: Tensor, tasks: Tensor | None, word_ids: Tensor, position_ids: Tensor,
    type_ids: Tensor | None, task_ids: Tensor | None, weight: Tensor, bias: Tensor, eps: float, t: int,
    seed: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, H = len(word_ids), words.shape[1]
    y = words.new_empty(rows, H, dtype=dtype)
    mean, rstd = (words.new_empty(rows, dtype=torch.float32) for _ in range(2))
    tile = _tile(H)
    launch(
        embedding_norm_forward_kernel, (triton.cdiv(rows, tile.rows),),
        *_looked_up((words, positions, types, tasks), (word_ids, position_ids, type_ids, task_ids)),
        aligned(weight), aligned(bias), eps, bound(t, ROW_BITS), scale(t, ROW_BITS), seed if t > 0 else None, y, mean,
        rstd, faults.words(words), rows, H=H, R=tile.rows, C=tile.C, K=tile.K, num_warps=tile.warps,
    )  # fmt: skip
    faults.raise_interpreted(words)
    return y, mean, rstd


def embedding_norm_recompute(
    dy: Tensor, words: Tensor, positions: Tensor, types: Tensor, tasks: Tensor | None, word_ids: Tensor,
    position_ids: Tensor, type_ids: Tensor | None, task_ids: Tensor | None, t: int, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dy = aligned(dy)
    rows, H = dy.shape
    z, dropped = torch.empty_like(dy), torch.empty_like(dy) if t > 0 else dy.new_empty(0)
    tile = _tile(H)
    launch(
        embedding_norm_recompute_kernel, (triton.cdiv(rows, tile.rows),),
        *_looked_up((words, positions, types, tasks), (word_ids, position_ids, type_ids, task_ids)), dy,
        bound(t, ROW_BITS), scale(t, ROW_BITS), seed if t > 0 else None, z, dropped, rows, H=H, R=tile.rows, C=tile.C,
        K=tile.K, num_warps=tile.warps,
    )  # fmt: skip
    return z, dropped


def _tile(columns: int) -> Tile:
    if columns > MOST_COLUMNS:
        raise ValueError(f"embedding_norm: at most {MOST_COLUMNS} columns, got {columns}")
    return tile_of(columns, 1, triton.next_power_of_2(triton.cdiv(columns, FORWARD_CHUNKS * WARP_COLUMNS)))


def _looked_up(tables: tuple[Tensor | None, ...], ids: tuple[Tensor | None, ...]) -> tuple:
    """What both kernels take first: tables, ids, rows of each table, and 0.0."""
    given = (None if x is None else x.contiguous() for x in (*tables, *ids))
    return *given, *(1 if table is None else len(table) for table in tables), 0.0
