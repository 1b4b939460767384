"""Softmax cross entropy of logits [T, V] with one label a row:

    m = max_j x_j,   s = sum_j exp(x_j - m),   loss = log(s) + (m - x_label)
    dx_j = (exp(x_j - m) / s - [j = label]) * dloss

m and s are saved. A row whose label is `ignore_index` is not read: its loss and its dx are 0. A row whose label lies
outside of [0, V) is not read by forward, which reports it: its loss and its dx are NaN. Rows lie `stride` >= V elements
apart; dx is 0 between them. Arithmetic is float32.

Where a mean or a sum of the losses is wanted, a second kernel adds them up, and backward takes one dloss for all rows,
for a mean with the number that it was divided by. It counts rows that are right beside it: no logit exceeds their
label's, so that loss = log(s).

Each direction moves its bytes once. Forward gives a row to a program; a thread's running maximum moves once for eight
elements, so that an element costs one exp (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
Backward gives a block of a row to a program.

A row of 30,522 16-bit logits begins at any multiple of 4 bytes, and a compiler that knows no more than that loads
single elements. So its elements are counted from the last multiple of 16 bytes before it: the groups of 16 bytes that
lie within the row, its body, are read and written at once, and what stands over at its two ends element by element.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import faults
from fastbert.kernels.fast import exp
from fastbert.kernels.launch import launch

GROUP = tl.constexpr(8)  # elements that share a thread's running maximum: one or two accesses
PADDING = 128  # a vocabulary is padded by fewer columns, as fastbert/backends/cross_entropy.py has it
ENDS = 256  # elements: those before the body, and those behind it with the padding
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 4
REDUCED = 1024  # losses that are added up at a time


class ForwardPlan(NamedTuple):
    """What was fastest in a prototype on an H200, for 2,458 x 30,522, and as many elements a thread for short rows."""

    block: int  # elements of a row at a time
    warps: int


def forward_plan(columns: int) -> ForwardPlan:
    block = min(4096, max(256, triton.next_power_of_2(columns)))
    return ForwardPlan(block, max(1, block // 512))


# ---- rows in groups of 16 bytes ------------------------------------------------------------------------------------


@triton.jit
def body_of(row, columns, stride, ALIGN: tl.constexpr):
    """Where the aligned group begins in which the row does, the row's first element from there, and its body."""
    start = row.to(tl.int64) * stride
    shift = (start % ALIGN).to(tl.int32)
    first = (shift + ALIGN - 1) // ALIGN * ALIGN
    last = tl.maximum((shift + columns) // ALIGN * ALIGN, first)
    return tl.multiple_of(start - shift, ALIGN), shift, tl.multiple_of(first, ALIGN), tl.multiple_of(last, ALIGN)


@triton.jit
def ends_of(shift, end, first, last, ALIGN: tl.constexpr, ENDS: tl.constexpr):
    """Places of the row, which ends before `end`, to the left and to the right of its body, and which of them count."""
    i = tl.arange(0, ENDS)
    place = tl.where(i < ALIGN, i, last + i - ALIGN)
    return place, (place >= shift) & (place < end) & ((place < first) | (i >= ALIGN))


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def shift_of(maximum):
    """What is subtracted before exp: -inf - -inf would be NaN where no number has come yet."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def softmax_of_row(x_ptr, columns, shift, first, last, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """The maximum m of a row, and its sum of exp(x - m). NaN in the row shows in the sum.

    The difference is rounded before it is scaled to base 2: with large logits m * log2(e) would lose it.
    """
    place = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    maxima = tl.full([BLOCK // GROUP], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK // GROUP], tl.float32)
    for block in tl.range(0, last, BLOCK):
        mask = (block + place >= first) & (block + place < last)
        x = tl.load(x_ptr + block + place, mask=mask, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(maxima, tl.max(x, 1))
        totals = totals * exp(maxima - shift_of(larger)) + tl.sum(exp(x - shift_of(larger)[:, None]), 1)
        maxima = larger
    place, mask = ends_of(shift, shift + columns, first, last, ALIGN, 2 * ALIGN)
    x = tl.load(x_ptr + place, mask=mask, other=-float("inf")).to(tl.float32)
    maximum = tl.maximum(tl.max(maxima, 0), tl.max(x, 0))
    total = tl.sum(totals * exp(maxima - shift_of(maximum)), 0) + tl.sum(exp(x - shift_of(maximum)), 0)
    return maximum, total


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_forward_kernel(
    logits_ptr, labels_ptr, ignore_index, losses_ptr, maximum_ptr, total_ptr, faults_ptr, columns, stride,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # label
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    ignored = label == ignore_index
    wrong = ((label < 0) | (label >= columns)) & ~ignored
    if ignored | wrong:
        faults.raise_fault(faults_ptr, faults.LABEL, row, wrong)
        nothing = tl.where(wrong, float("nan"), 0.0)
        tl.store(losses_ptr + row, nothing)
        tl.store(maximum_ptr + row, 0.0)
        tl.store(total_ptr + row, nothing)
    else:
        # logits
        base, shift, first, last = body_of(row, columns, stride, ALIGN)
        logits_ptr += base
        maximum, total = softmax_of_row(logits_ptr, columns, shift, first, last, ALIGN, BLOCK)
        # loss
        picked = tl.load(logits_ptr + shift + label).to(tl.float32)
        tl.store(losses_ptr + row, tl.log(total) + (maximum - picked))
        tl.store(maximum_ptr + row, maximum)
        tl.store(total_ptr + row, total)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def reduce_losses_kernel(
    losses_ptr, total_ptr, labels_ptr, ignore_index, rows, result_ptr, count_ptr, hits_ptr,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. Counts are exact up to 2^24 rows."""
    sums = tl.zeros([BLOCK], tl.float32)
    counts, hits = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        losses = tl.load(losses_ptr + row, mask=row < rows, other=0.0)
        total = tl.load(total_ptr + row, mask=row < rows, other=0.0)
        sums += losses
        hits += tl.where((total > 0) & (losses <= tl.log(total)), 1.0, 0.0)  # an ignored row's total is 0
        label = tl.load(labels_ptr + row, mask=row < rows, other=ignore_index)
        counts += tl.where(label != ignore_index, 1.0, 0.0)
    result, rows_that_count = tl.sum(sums, 0), tl.sum(counts, 0)
    count = tl.maximum(rows_that_count, 1.0)
    tl.store(result_ptr, result / count if MEAN else result)
    tl.store(count_ptr, count)
    tl.store(hits_ptr, tl.sum(hits, 0))
    tl.store(hits_ptr + 1, rows_that_count)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def gradient(x, place, label, maximum, scale, dloss):
    share = exp(x.to(tl.float32) - maximum) * scale
    return tl.where(place == label, share - dloss, share)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward_kernel(
    dlosses_ptr, logits_ptr, labels_ptr, maximum_ptr, total_ptr, count_ptr, ignore_index, dlogits_ptr, columns, stride,
    ONE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """ONE: there is one dloss for all rows. count is None where nothing divides it.

    A program has a block of a row's body; the first has its ends and what follows up to the next row.
    """
    # label
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    counts = label != ignore_index
    dloss = tl.load(dlosses_ptr + (0 if ONE else row), mask=counts, other=0.0)
    if count_ptr is not None:
        dloss = dloss / tl.load(count_ptr)
    maximum = tl.load(maximum_ptr + row)
    scale = dloss / tl.load(total_ptr + row, mask=counts, other=1.0)

    # logits
    base, shift, first, last = body_of(row, columns, stride, ALIGN)
    logits_ptr += base
    dlogits_ptr += base
    inside = (label >= 0) & (label < columns)
    label = tl.where(inside, label + shift, -1).to(tl.int32)  # from here on its place, where it has one
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (place >= first) & (place < last)
    read = (place >= first) & (place < tl.multiple_of(tl.where(counts, last, 0), ALIGN))
    x = tl.load(logits_ptr + place, mask=read, other=-float("inf"))

    # gradient
    dx = gradient(x, place, label, maximum, scale, dloss)
    tl.store(dlogits_ptr + place, dx.to(dlogits_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        ends, of_ends = ends_of(shift, shift + stride, first, last, ALIGN, ENDS)
        read_ends = of_ends & (ends < tl.where(counts, shift + columns, 0))
        x_ends = tl.load(logits_ptr + ends, mask=read_ends, other=-float("inf"))
        dx_ends = tl.where(read_ends, gradient(x_ends, ends, label, maximum, scale, dloss), 0.0)
        tl.store(dlogits_ptr + ends, dx_ends.to(dlogits_ptr.dtype.element_ty), mask=of_ends)


# ---- launchers -----------------------------------------------------------------------------------------------------


def rows_of(logits: Tensor) -> tuple[Tensor, int]:
    """Logits, and how far apart their rows lie: as they are, or V where they must be copied first.

    Rows further apart than padding explains, as of every other row, are copied: the gradient would be as wide.
    """
    columns, (between, within) = logits.shape[1], logits.stride()
    if within == 1 and columns <= between < columns + PADDING:
        return logits, between
    return logits.contiguous(), columns


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (logits, stride), labels = rows_of(logits), labels.contiguous()
    rows, columns = logits.shape
    losses, maximum, total = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    result, count, hits = (losses.new_empty(0 if reduction == "none" else shape) for shape in ((), (), 2))
    plan = forward_plan(columns)
    launch(
        cross_entropy_forward_kernel, (rows,),
        logits, labels, ignore_index, losses, maximum, total, faults.words(logits), columns, stride,
        ALIGN=16 // logits.element_size(), BLOCK=plan.block, num_warps=plan.warps,
    )  # fmt: skip
    faults.raise_interpreted(logits)
    if reduction != "none":
        launch(
            reduce_losses_kernel, (1,), losses, total, labels, ignore_index, rows, result, count, hits,
            MEAN=reduction == "mean", BLOCK=REDUCED, num_warps=4,
        )  # fmt: skip
    return losses, maximum, total, result, count, hits


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, count: Tensor | None,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    (logits, stride), dlosses, labels = rows_of(logits), dlosses.contiguous(), labels.contiguous()
    rows, columns = logits.shape
    dlogits = logits.new_empty(rows, stride)
    if rows > 0:
        align = 16 // logits.element_size()
        launch(
            cross_entropy_backward_kernel, (rows, triton.cdiv(align - 1 + columns, BACKWARD_BLOCK)),
            dlosses, logits, labels, maximum, total, count, ignore_index, dlogits, columns, stride,
            ONE=dlosses.dim() == 0, ALIGN=align, BLOCK=BACKWARD_BLOCK, ENDS=ENDS, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    return dlogits if stride == columns else dlogits[:, :columns]
