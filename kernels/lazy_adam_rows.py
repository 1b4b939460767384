"""The rows of a table [V, D] that take a LazyAdam step, each with the float32 sum of its gradients.

Grouped  Row ids are checked and sorted: those of one row stand side by side, in order of occurrence. Kernels find where
         a row begins and how long it is from the sorted ids alone; nothing is counted that a host would have to know.
Sums     A row of up to PIECE gradients is summed by whoever updates it. Of a longer one each piece is summed by another
         program, which leaves the sum in memory, where further launches add up FAN at a time, in order, until one is
         left: the row's, which is updated at once. What is added up, and in which order, depends on the ids alone.
Work     A program takes PLACES places of the sorted ids, or rows of the table, and BLOCKS blocks of BLOCK columns.
         Where something is asked of a row as a whole (one v for all its columns, whether its gradient is zero, its own
         count of steps) these are all columns.

The places of a long row's pieces are its first one, `start`, and every PIECE behind it. Piece j leaves its sum in row
ceil(start / 8) + j of `sums`: a row of n > PIECE gradients has at most n // 8 pieces, so no two rows meet there. A node
of the tree above leaves its own where its first piece did. A level's nodes cover `window` gradients each, as the
children of the nodes that it makes, which cover `period`.

      level 0: window 16, period 16      level 1: window 16, period 512      level 2: window 512, period 16384

In `window` neighbouring places at most two nodes of a row longer than `window` begin: one of the row that covers the
first place, and that of a row which begins behind it and covers the last. These are the candidates of a launch.
"""

import triton
import triton.language as tl

from fastbert.kernels import faults
from fastbert.kernels.lazy_adam_update import (
    SKIP_ZERO,
    adam_gradient,
    coefficients,
    divisor,
    first_moment,
    maximum,
    round_stochastically,
    second_moment,
    verdict,
    weight,
)

PIECE_BITS, FAN_BITS = tl.constexpr(4), tl.constexpr(5)
PIECE, FAN = tl.constexpr(16), tl.constexpr(32)
AT_ONCE = tl.constexpr(4)  # rows that are asked for before the first is added

# What a program's places are.
TABLE = tl.constexpr(0)  # rows of the table, each with its own gradient
BY_ROW = tl.constexpr(1)  # sorted ids of rows, each with its own gradient
SHORT = tl.constexpr(2)  # sorted ids, of which rows of up to PIECE gradients step
NODES = tl.constexpr(3)  # candidates of a level of the tree above pieces


# ---- group ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "table_rows"])
def check_ids_kernel(rows_ptr, keys_ptr, is_bad_ptr, words_ptr, n, table_rows, BLOCK: tl.constexpr):
    """Ids [n] as keys to be sorted; one outside the table raises a fault and the verdict that nothing may be stored."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = place < n
    row = tl.load(rows_ptr + place, mask=is_in, other=0)
    is_outside = (row < 0) | (row >= table_rows)
    tl.store(keys_ptr + place, tl.where(is_outside, 0, row).to(keys_ptr.dtype.element_ty), mask=is_in)
    tl.store(is_bad_ptr + (place - place).to(tl.int32), tl.full([BLOCK], 1, tl.int32), mask=is_outside)
    faults.raise_fault(words_ptr, faults.ROW, place, is_outside)


@triton.jit
def node_of(keys_ptr, n, halvings, candidate, window_bits, period_bits):
    """The node of a row longer than a window that begins in the candidate's window, if any.

    Returns:
        its place, its row, the place where that row starts, and whether there is one.
    """
    window = tl.full([], 1, tl.int64) << window_bits
    first = candidate // 2 << window_bits
    last = tl.minimum(first + window, n) - 1
    is_in = first < n
    inside = tl.where(candidate % 2 == 0, first, last)
    row = tl.load(keys_ptr + inside, mask=is_in, other=-1)
    # the row starts at `low` or behind it, up to `start`
    low, start = inside * 0, inside
    for _ in range(halvings):
        middle = (low + start) // 2
        is_before = tl.load(keys_ptr + middle, mask=is_in & (low < start), other=0x7FFFFFFF) < row
        low = tl.where(is_before, middle + 1, low)
        start = tl.where(is_before, start, middle)
    periods = (first - start + ((tl.full([], 1, tl.int64) << period_bits) - 1)) >> period_bits
    place = tl.where(candidate % 2 == 0, start + (periods << period_bits), start)
    is_node = is_in & (place <= last) & ((candidate % 2 == 0) | (start > first))
    is_node = is_node & (tl.load(keys_ptr + place, mask=is_node, other=-1) == row)
    is_long = is_node & (start + window < n)
    is_long = is_long & (tl.load(keys_ptr + start + window, mask=is_long, other=-1) == row)
    return place, row, start, is_long


# ---- sums ----------------------------------------------------------------------------------------------------------


@triton.jit
def sum_of(start, place):
    """The row of `sums` that is for the node at `place` of a row that starts at `start`."""
    return (start + 7) // 8 + (place - start) // PIECE


@triton.jit
def is_of_row(keys_ptr, n, place, key, is_asked):
    """Whether the place is one of the row `key`."""
    is_in = is_asked & (place < n)
    return is_in & (tl.load(keys_ptr + place, mask=is_in, other=-1) == key)


@triton.jit
def add_up(
    rows_ptr, position_ptr, first, step_bits, keys_ptr, n, place, key, is_asked, spacing_bits, column,
    MOST: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[R, C] float32: of each of R rows of the table the sum, in order, of up to MOST rows of rows_ptr [.., D], at
    columns [1, C].

    There is one for each of the places `place`, `place + 2^spacing_bits`, ... that are of the row `key`. They stand at
    `first`, `first + 2^step_bits`, ... of position_ptr or, without it, of rows_ptr.
    """
    total = tl.zeros([place.shape[0], column.shape[1]], tl.float32)
    k = 0
    goes_on = tl.max(is_asked.to(tl.int32))
    while goes_on != 0:
        for i in tl.static_range(AT_ONCE):
            is_one = is_of_row(keys_ptr, n, place + ((k + i) << spacing_bits), key, is_asked)
            at = first + ((k + i) << step_bits)
            if position_ptr is not None:
                at = tl.load(position_ptr + at, mask=is_one, other=0)
            x = tl.load(rows_ptr + at[:, None] * D + column, mask=is_one[:, None] & (column < D), other=0.0)
            x = x.to(tl.float32)
            total = tl.where(is_one[:, None], tl.where(k + i == 0, x, total + x), total)
        k += AT_ONCE
        others = is_of_row(keys_ptr, n, place + (k << spacing_bits), key, is_asked)
        goes_on = tl.where(k < MOST, tl.max(others.to(tl.int32)), 0)
    return total


@triton.jit(do_not_specialize=["n", "halvings"])
def sum_pieces_kernel(
    keys_ptr, position_ptr, grad_ptr, sums_ptr, n, halvings, D: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Level 0 of the tree."""
    candidate = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    place, key, start, is_node = node_of(keys_ptr, n, halvings, candidate, PIECE_BITS, PIECE_BITS)
    total = add_up(grad_ptr, position_ptr, place, 0, keys_ptr, n, place, key, is_node, 0, column, PIECE, D)
    to = sum_of(start, place)[:, None] * D + column
    tl.store(sums_ptr + to, total, mask=is_node[:, None] & (column < D))


@triton.jit
def gradient_of(
    grad_ptr, sums_ptr, position_ptr, keys_ptr, places, place, row, key, node, is_node, window_bits, column,
    FROM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[R, C] float32: of each row at columns [1, C], or of a node of its tree."""
    if FROM == SHORT:
        return add_up(grad_ptr, position_ptr, place, 0, keys_ptr, places, place, key, is_node, 0, column, PIECE, D)
    elif FROM == NODES:
        step_bits = window_bits - PIECE_BITS
        return add_up(
            sums_ptr, None, node, step_bits, keys_ptr, places, place, key, is_node, window_bits, column, FAN, D
        )
    else:
        mask = is_node[:, None] & (column < D)
        return tl.load(grad_ptr + row[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)


# ---- update --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["counter", "padding_idx", "places", "halvings", "window_bits", "period_bits"])
def update_rows_kernel(
    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, row_steps_ptr, bf16_copy_ptr, keys_ptr, position_ptr,
    grad_ptr, sums_ptr, lr_ptr, step_ptr, seed_ptr, grad_factor_ptr, found_inf_ptr, is_bad_ptr,
    weight_decay, beta1, rest1, beta2, rest2, log_beta1, log_beta2, eps,
    counter, padding_idx, places, halvings, window_bits, period_bits,
    FROM: tl.constexpr, FLAGS: tl.constexpr, ROW_WISE: tl.constexpr, D: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # places: rows that move, and where their gradients are
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    is_in = place < places
    if FROM == TABLE:
        row, key, node, moves, is_node = place, place, place, is_in, is_in
    elif FROM == NODES:
        place, key, start, is_node = node_of(keys_ptr, places, halvings, place, window_bits, period_bits)
        row, node = key.to(tl.int64), sum_of(start, place)
        is_part = is_of_row(keys_ptr, places, start + (tl.full([], 1, tl.int64) << period_bits), key, is_node)
        moves = is_node & ~is_part
    else:
        key = tl.load(keys_ptr + place, mask=is_in, other=-1)
        moves = is_in & (key != tl.load(keys_ptr + place - 1, mask=is_in & (place > 0), other=-1))
        if FROM == SHORT:
            moves = moves & ~is_of_row(keys_ptr, places, place + PIECE, key, moves)
        row, node, is_node = key.to(tl.int64), place, moves
    moves = moves & (row != padding_idx) & (tl.zeros([PLACES], tl.int32) + verdict(is_bad_ptr, found_inf_ptr) == 0)
    first_column = tl.program_id(1) * BLOCKS * BLOCK + tl.arange(0, BLOCK)[None, :]
    if SKIP_ZERO & FLAGS:
        is_zero = tl.full([PLACES], 1, tl.int32)
        for i in range(BLOCKS):
            column = first_column + i * BLOCK
            g = tl.load(grad_ptr + row[:, None] * D + column, mask=moves[:, None] & (column < D), other=0.0)
            is_zero = tl.minimum(is_zero, tl.min((g == 0.0).to(tl.int32), 1))
        moves = moves & (is_zero == 0)

    # coefficients
    t = tl.load(step_ptr)
    if row_steps_ptr is not None:
        row_step = tl.load(row_steps_ptr + row, mask=moves, other=0) + 1
        t = row_step.to(tl.float32)[:, None]
    factor, decay, root, eps, size = coefficients(
        lr_ptr, grad_factor_ptr, t, weight_decay, log_beta1, log_beta2, eps, FLAGS
    )
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    rounding_step = tl.load(step_ptr).to(tl.int64)
    shared = size  # of a row's columns: what m is divided by
    if ROW_WISE:
        square = tl.zeros([PLACES], tl.float32)
        for i in range(BLOCKS):
            column = first_column + i * BLOCK
            mask = moves[:, None] & (column < D)
            w = tl.load(param_ptr + row[:, None] * D + column, mask=mask, other=0.0).to(tl.float32)
            g = gradient_of(
                grad_ptr, sums_ptr, position_ptr, keys_ptr, places, place, row, key, node, is_node, window_bits, column,
                FROM, D,
            )  # fmt: skip
            g = tl.where(mask, adam_gradient(g, w, factor, weight_decay, FLAGS), 0.0)
            square += tl.sum(g * g, 1)
        v = second_moment(tl.load(exp_avg_sq_ptr + row, mask=moves, other=0.0), square / D, beta2, rest2)
        largest = v
        if max_exp_avg_sq_ptr is not None:
            largest = maximum(tl.load(max_exp_avg_sq_ptr + row, mask=moves, other=0.0), v)
        shared = divisor(largest[:, None], root, eps)
    if ROW_WISE or row_steps_ptr is not None:
        tl.debug_barrier()  # all threads have read what some of them write
    if ROW_WISE:
        tl.store(exp_avg_sq_ptr + row, v, mask=moves)
        if max_exp_avg_sq_ptr is not None:
            tl.store(max_exp_avg_sq_ptr + row, largest, mask=moves)
    if row_steps_ptr is not None:
        tl.store(row_steps_ptr + row, row_step, mask=moves)

    # update
    for i in range(BLOCKS):
        column = first_column + i * BLOCK
        mask = moves[:, None] & (column < D)
        at = row[:, None] * D + column
        w = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(exp_avg_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if not ROW_WISE:
            v = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
            largest = v
            if max_exp_avg_sq_ptr is not None:
                largest = tl.load(max_exp_avg_sq_ptr + at, mask=mask, other=0.0)
        g = gradient_of(
            grad_ptr, sums_ptr, position_ptr, keys_ptr, places, place, row, key, node, is_node, window_bits, column,
            FROM, D,
        )  # fmt: skip
        if FROM == NODES:
            tl.store(sums_ptr + node[:, None] * D + column, g, mask=is_part[:, None] & (column < D))
        g = adam_gradient(g, w, factor, weight_decay, FLAGS)
        m = first_moment(m, g, beta1, rest1)
        divided_by = shared
        if not ROW_WISE:
            v = second_moment(v, g * g, beta2, rest2)
            tl.store(exp_avg_sq_ptr + at, v, mask=mask)
            if max_exp_avg_sq_ptr is None:
                divided_by = divisor(v, root, eps)
            else:
                largest = maximum(largest, v)
                tl.store(max_exp_avg_sq_ptr + at, largest, mask=mask)
                divided_by = divisor(largest, root, eps)
        w = weight(w, m, divided_by, decay, size)
        tl.store(exp_avg_ptr + at, m.to(exp_avg_ptr.dtype.element_ty), mask=mask)
        if bf16_copy_ptr is not None:
            tl.store(bf16_copy_ptr + at, w.to(tl.bfloat16), mask=mask)
        if seed_ptr is None:
            tl.store(param_ptr + at, w.to(param_ptr.dtype.element_ty), mask=mask)
        else:
            group = (tl.program_id(1) * BLOCKS + i) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
            w = round_stochastically(w, group, row[:, None], rounding_step, counter, seed)
            tl.store(param_ptr + at, w, mask=mask)
