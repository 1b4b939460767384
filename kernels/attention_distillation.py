"""How far a student's attention scores are from a teacher's over packed sequences, with dq and dk in the same pass:

    e_ij = scale * q_i . k_j - teacher_scale * teacher_q_i . teacher_k_j,    loss = 1 / (H P) sum of all e_ij^2
    dq_i = 2 scale / (H P) sum_j e_ij k_j,   dk_j = 2 scale / (H P) sum_i e_ij q_i,   P = sum_b S_b^2

q, k, dq and dk are [T, N, D], the teacher's [T, M, E]. H, the smaller of N and M, counts the heads here: of the model
that has more of them neighbours lie end to end, and are read as one head of N D / H, or M E / H, columns.

dk is dq with queries and keys exchanged, so one kernel is launched twice: for dq, where each program also leaves its
part of the loss, and for dk, where the first program adds the parts up. A program takes ROWS queries of a head, walks
through the keys in blocks and computes e again from all columns. It takes W columns at a time, and so do its sums: with
more than W columns a gradient has a program for each W of them. Where there is no query or no key, e is 0.

Scores and sums are float32. Of one 16-bit type both models go through matrix instructions, for which e is rounded to it
before it is multiplied by q or k; all else is computed in float32, never tf32. Each result is written by one program,
in one order, and the parts of the loss lie as the tokens do: the same bits at every call, for any max_seqlen.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import faults
from fastbert.kernels.attention import heads_together, sizes
from fastbert.kernels.attention_tiles import load_tile, product, store_tile, work_of_program
from fastbert.kernels.launch import launch

WIDEST = 64  # columns that are taken at a time
SEQUENCES, PARTS = tl.constexpr(128), tl.constexpr(1024)  # that are added up at a time


# ---- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(ptr, row, length, stride, ROWS: tl.constexpr, W: tl.constexpr, HEAD: tl.constexpr, FLOAT32: tl.constexpr):
    x = load_tile(ptr, row, length, stride, ROWS, W, HEAD, False)
    return x.to(tl.float32) if FLOAT32 else x


@triton.jit
def _rest_of_scores(
    scores, x_ptr, y_ptr, row, other, length, x_stride, y_stride, W: tl.constexpr, COLUMNS: tl.constexpr,
    FLOAT32: tl.constexpr,
):  # fmt: skip
    """scores [ROWS, ROWS] + x y^T of the columns from W on."""
    ROWS: tl.constexpr = scores.shape[0]
    LEFT: tl.constexpr = COLUMNS % W
    for column in range(W, COLUMNS - LEFT, W):
        x = _tile(x_ptr + column, row, length, x_stride, ROWS, W, W, FLOAT32)
        y = _tile(y_ptr + column, other, length, y_stride, ROWS, W, W, FLOAT32)
        scores = product(x, tl.trans(y), scores)
    if LEFT and COLUMNS > W:
        x = _tile(x_ptr + (COLUMNS - LEFT), row, length, x_stride, ROWS, W, LEFT, FLOAT32)
        y = _tile(y_ptr + (COLUMNS - LEFT), other, length, y_stride, ROWS, W, LEFT, FLOAT32)
        scores = product(x, tl.trans(y), scores)
    return scores


# ---- loss ------------------------------------------------------------------------------------------------------------


@triton.jit
def _pairs(cu_seqlens_ptr, sequences):
    """P, at least 1."""
    squares = tl.zeros([SEQUENCES], tl.int64)
    for first in range(0, sequences, SEQUENCES):
        sequence = first + tl.arange(0, SEQUENCES)
        start = tl.load(cu_seqlens_ptr + sequence, mask=sequence < sequences, other=0)
        end = tl.load(cu_seqlens_ptr + 1 + sequence, mask=sequence < sequences, other=0)
        length = (end - start).to(tl.int64)
        squares += length * length
    return tl.maximum(tl.sum(squares, 0), 1).to(tl.float32)


@triton.jit
def _store_loss(parts_ptr, loss_ptr, parts):
    """The sum of all parts, by the first program."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        loss = tl.zeros([PARTS], tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            loss += tl.load(parts_ptr + part, mask=part < parts, other=0.0)
        tl.store(loss_ptr, tl.sum(loss, 0))


# ---- gradients -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "max_seqlen", "sequences"])
def attention_distillation_kernel(
    x_ptr, y_ptr, teacher_x_ptr, teacher_y_ptr, cu_seqlens_ptr, parts_ptr, loss_ptr, dx_ptr, faults_ptr, tokens,
    max_seqlen, sequences, heads, x_stride, y_stride, teacher_x_stride, teacher_y_stride, scale, teacher_scale,
    W: tl.constexpr, COLUMNS: tl.constexpr, TEACHER_W: tl.constexpr, TEACHER_COLUMNS: tl.constexpr,
    FLOAT32: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dx of x, from all y: first dq of q from k, with the parts of the loss; LAST: dk of k from q, and their sum."""
    place, group = tl.program_id(0), tl.program_id(1)
    parts = tokens // ROWS + sequences  # of a head: all tiles have one, and none is another's
    if LAST:
        _store_loss(parts_ptr, loss_ptr, heads * parts)
    head, row, start, length = work_of_program(
        cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, ROWS, ALL=not LAST
    )
    if length == 0:
        return
    x_ptr += start * x_stride + head * COLUMNS
    y_ptr += start * y_stride + head * COLUMNS
    teacher_x_ptr += start * teacher_x_stride + head * TEACHER_COLUMNS
    teacher_y_ptr += start * teacher_y_stride + head * TEACHER_COLUMNS
    # The last group ends with the columns: two programs give the same results for what it shares with the one before.
    column = tl.minimum(group * W, COLUMNS - W) if COLUMNS > W else 0

    HEAD: tl.constexpr = min(W, COLUMNS)
    TEACHER_HEAD: tl.constexpr = min(TEACHER_W, TEACHER_COLUMNS)
    x = _tile(x_ptr, row, length, x_stride, ROWS, W, HEAD, FLOAT32)
    teacher_x = _tile(teacher_x_ptr, row, length, teacher_x_stride, ROWS, TEACHER_W, TEACHER_HEAD, FLOAT32)
    each = tl.arange(0, ROWS)
    dx = tl.zeros([ROWS, W], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for other in tl.range(0, length, ROWS, disable_licm=COLUMNS > W or TEACHER_COLUMNS > TEACHER_W):
        # scores: the teacher's first, scaled so that the student's can be added to them
        teacher_y = _tile(teacher_y_ptr, other, length, teacher_y_stride, ROWS, TEACHER_W, TEACHER_HEAD, FLOAT32)
        e = _rest_of_scores(
            product(teacher_x, tl.trans(teacher_y)), teacher_x_ptr, teacher_y_ptr, row, other, length,
            teacher_x_stride, teacher_y_stride, TEACHER_W, TEACHER_COLUMNS, FLOAT32,
        )  # fmt: skip
        y = _tile(y_ptr, other, length, y_stride, ROWS, W, HEAD, FLOAT32)
        e = product(x, tl.trans(y), e * (-teacher_scale / scale))
        e = _rest_of_scores(e, x_ptr, y_ptr, row, other, length, x_stride, y_stride, W, COLUMNS, FLOAT32) * scale
        # What is not there was read as 0, which times inf is NaN.
        e = tl.where((row + each < length)[:, None] & (other + each < length)[None, :], e, 0.0)

        # loss and dx
        if not LAST:
            squares += tl.sum(e * e, 1)
        if COLUMNS > W:
            y = _tile(y_ptr + column, other, length, y_stride, ROWS, W, W, FLOAT32)
        dx = product(e.to(y.dtype), y, dx)

    share = 1.0 / (heads * _pairs(cu_seqlens_ptr, sequences))
    if not LAST:
        sequence = place // (tl.cdiv(max_seqlen, ROWS) * heads)
        part = head * parts + start // ROWS + sequence + row // ROWS
        tl.store(parts_ptr + part, tl.sum(squares, 0) * share, mask=group == 0)
    stride = heads * COLUMNS
    dx_ptr += start * stride + head * COLUMNS + column
    store_tile(dx_ptr, dx * (2.0 * scale * share), row, length, stride, HEAD)


# ---- launcher --------------------------------------------------------------------------------------------------------


def _plan(columns: int, teacher_columns: int, is_float32: bool) -> dict[str, int]:
    """How the kernel is cut, and compiled."""
    is_wide = max(columns, teacher_columns) > WIDEST
    W, teacher_W = (min(WIDEST, max(16, triton.next_power_of_2(width))) for width in (columns, teacher_columns))
    return {
        "W": W, "COLUMNS": columns, "TEACHER_W": teacher_W, "TEACHER_COLUMNS": teacher_columns,
        "FLOAT32": is_float32, "ROWS": 32 if is_float32 else 64, "num_warps": 8 if is_float32 or is_wide else 4,
        # Two stages of wide heads would leave registers in memory, or half of an SM without threads.
        "num_stages": 1 if is_wide else 2,
    }  # fmt: skip


def attention_distillation(
    q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, own_heads, head_size), (_, teacher_heads, teacher_size) = q.shape, teacher_q.shape
    heads = min(own_heads, teacher_heads)
    columns, teacher_columns = own_heads // heads * head_size, teacher_heads // heads * teacher_size
    sequences, longest = sizes(tokens, cu_seqlens, max_seqlen)
    dq, dk = (q.new_empty(q.shape, dtype=torch.float32) for _ in range(2))
    if tokens == 0:
        return dq.new_zeros(()), dq, dk
    is_float32 = q.dtype != teacher_q.dtype or q.dtype == torch.float32
    plan = _plan(columns, teacher_columns, is_float32)
    parts, loss = dq.new_zeros(heads, tokens // plan["ROWS"] + sequences), dq.new_empty(())
    queries, keys = (heads_together(q), heads_together(teacher_q)), (heads_together(k), heads_together(teacher_k))
    grid = triton.cdiv(longest, plan["ROWS"]) * heads * sequences, triton.cdiv(columns, plan["W"])
    cu_seqlens = cu_seqlens.contiguous()
    for (x, teacher_x), (y, teacher_y), dx in ((queries, keys, dq), (keys, queries, dk)):
        launch(
            attention_distillation_kernel, grid,
            x, y, teacher_x, teacher_y, cu_seqlens, parts, loss, dx, faults.words(q), tokens, longest, sequences, heads,
            x.stride(0), y.stride(0), teacher_x.stride(0), teacher_y.stride(0),
            heads / own_heads / math.sqrt(head_size), heads / teacher_heads / math.sqrt(teacher_size),
            **plan, LAST=dx is dk,
        )  # fmt: skip
    faults.raise_interpreted(q)
    return loss, dq, dk
