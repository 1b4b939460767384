"""Brings rows of a table [V, D] to where dense AdamW would have moved them while no gradient touched them.

csrc/cpu/lazy_adam_replay.cpp derives the formula: of a row last stepped at s, w shrinks and moves by m times a function
of a = sqrt(v), which is a sum over the missed steps, expanded about its mean, or walked where bias correction still
moves too much.

    history   on the host, of the recorded steps alone: what a step moves and how
    plan      for each step s that a row may stand at its walk: the moments of what follows
    check     ids and steps that cannot be: then nothing is changed
    move      of a row that is named twice, the first to come

Scalars are float64 until all that they enter is known, elements float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import faults
from fastbert.kernels.launch import launch
from fastbert.kernels.lazy_adam_update import EPS_UNCORRECTED, NO_BIAS_CORRECTION

MOMENTS = tl.constexpr(9)  # of the missed steps' weights; the last bounds the error
REST = tl.constexpr(1e-7)  # of the movement: what the expansion may leave out,
END = 1e-10  # and a walk: it ends when momentum has become so small a part
FIELDS = tl.constexpr(16)  # of a walk: what w, m and v keep, whether it is expanded, the center, MOMENTS - 1 moments
KEEP_W, KEEP_M, KEEP_V, IS_EXPANDED, CENTER, CENTRAL = (tl.constexpr(i) for i in range(6))

PLAN_PLACES, PLAN_STEPS = 8, 128  # of a program, and those of its steps that it adds up at a time
IDS = 1024  # that a program checks
TILE, WARPS = 512, 4  # elements of rows that a program works on at a time: four a thread


# ---- history -------------------------------------------------------------------------------------------------------


def history(lr: Tensor, decay: Tensor, step: int, beta1: float, beta2: float, flags: int) -> Tensor:
    """float64 [5, steps + 1] on lr's device: at place i, of the recorded steps i and at 0 of the one before them,

    keep: of w, that the steps behind i leave,
    rate and spread: step i moves w by m * rate * beta1^j / (a * spread * beta2^(j / 2) + eps), j steps behind s,
    momentum and shrunk: beta1^i and beta2^(i / 2).
    """
    steps = lr.numel()
    t = torch.arange(step - steps + 1, step + 1, dtype=torch.float64, device=lr.device)
    root = rest1 = torch.ones_like(t)
    if not flags & NO_BIAS_CORRECTION.value:
        root = (-torch.expm1(t * math.log(beta2))).sqrt()
        rest1 = -torch.expm1(t * math.log(beta1)) if beta1 > 0.0 else rest1
    made = torch.zeros(5, steps + 1, dtype=torch.float64, device=lr.device)
    keep, rate, spread, momentum, shrunk = made
    keep[-1] = 1.0
    keep[:-1] = (1.0 - lr * decay).flip(0).cumprod(0).flip(0)
    is_beside = flags & EPS_UNCORRECTED.value  # eps beside sqrt(v): the root leaves the denominator
    rate[1:] = lr / rest1 * (root if is_beside else 1.0) * keep[1:]
    spread[1:] = 1.0 if is_beside else 1.0 / root
    i = torch.arange(steps + 1, dtype=torch.float64, device=lr.device)
    torch.pow(beta1, i, out=momentum)
    torch.pow(beta2, 0.5 * i, out=shrunk)
    return made


# ---- plan ----------------------------------------------------------------------------------------------------------


@triton.jit
def missed_steps(history_ptr, place, first, steps, longest, STEPS: tl.constexpr):
    """Of the steps `first`, `first + 1`, .. behind each place their weights and how far they spread a, [P, STEPS]."""
    j = first + tl.arange(0, STEPS)[None, :]
    i = place[:, None] + j
    mask = (i <= steps) & (j <= longest)
    rate = tl.load(history_ptr + (steps + 1) + i, mask=mask, other=0.0)
    spread = tl.load(history_ptr + 2 * (steps + 1) + i, mask=mask, other=0.0)
    momentum = tl.load(history_ptr + 3 * (steps + 1) + j, mask=j <= steps, other=0.0)
    shrunk = tl.load(history_ptr + 4 * (steps + 1) + j, mask=j <= steps, other=0.0)
    return rate * momentum, spread * shrunk


@triton.jit(do_not_specialize=["steps", "longest"])
def plan_walks_kernel(history_ptr, walks_ptr, steps, longest, PLACES: tl.constexpr, STEPS: tl.constexpr):
    """walks [steps + 1, FIELDS]: a row's way from each place."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    is_in = place <= steps
    most = tl.minimum(longest, steps)
    # the mean of what a is multiplied by
    weights, products = tl.zeros([PLACES], tl.float64), tl.zeros([PLACES], tl.float64)
    for first in range(1, most + 1, STEPS):
        weight, by = missed_steps(history_ptr, place, first, steps, longest, STEPS)
        weights += tl.sum(weight, 1)
        products += tl.sum(weight * by, 1)
    center = tl.where(weights > 0.0, products / tl.where(weights > 0.0, weights, 1.0), 1.0)
    # moments about it
    field = tl.arange(0, FIELDS)[None, :]
    moments = tl.zeros([PLACES, FIELDS], tl.float32)
    for first in range(1, most + 1, STEPS):
        weight, by = missed_steps(history_ptr, place, first, steps, longest, STEPS)
        term, away = weight.to(tl.float32), (by - center[:, None]).to(tl.float32)
        for k in tl.static_range(MOMENTS):
            moments += tl.where(field == k, tl.sum(term, 1)[:, None], 0.0)
            term *= away
    bound = weights * REST
    for _ in tl.static_range(MOMENTS - 1):
        bound *= center
    rest = tl.sum(tl.where(field == MOMENTS - 1, moments, 0.0), 1)
    its_ptr = walks_ptr + place * FIELDS
    is_moment = is_in[:, None] & (field < MOMENTS - 1)
    tl.store(its_ptr[:, None] + (CENTRAL + field), moments, mask=is_moment)
    tl.store(its_ptr + IS_EXPANDED, (rest <= bound.to(tl.float32)).to(tl.float32), mask=is_in)
    tl.store(its_ptr + CENTER, center.to(tl.float32), mask=is_in)
    missed = steps - place
    shrunk = tl.load(history_ptr + 4 * (steps + 1) + missed, mask=is_in, other=0.0)
    momentum = tl.load(history_ptr + 3 * (steps + 1) + missed, mask=is_in, other=0.0)
    keep_w = tl.load(history_ptr + place, mask=is_in, other=0.0)
    tl.store(its_ptr + KEEP_W, keep_w.to(tl.float32), mask=is_in)
    tl.store(its_ptr + KEEP_M, momentum.to(tl.float32), mask=is_in)
    tl.store(its_ptr + KEEP_V, (shrunk * shrunk).to(tl.float32), mask=is_in)


# ---- check ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count", "table_rows", "before", "padding_idx"])
def check_rows_kernel(
    last_step_ptr, rows_ptr, is_bad_ptr, words_ptr, count, table_rows, before, padding_idx, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = place < count
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=is_in, other=0)
    is_outside = is_in & ((row < 0) | (row >= table_rows))
    looks = is_in & (is_outside == 0) & (row != padding_idx)
    is_missed = looks & (tl.load(last_step_ptr + row, mask=looks, other=before) < before)
    tl.store(is_bad_ptr + (place - place).to(tl.int32), tl.full([BLOCK], 1, tl.int32), mask=is_outside | is_missed)
    faults.raise_fault(words_ptr, faults.ROW, place, is_outside)
    faults.raise_fault(words_ptr, faults.MISSED, place, is_missed)


# ---- move ----------------------------------------------------------------------------------------------------------


@triton.jit
def expand(a, its_ptr, is_in, eps):
    """What m is to be multiplied by, [R, C]; its_ptr [R, 1] are the rows' walks."""
    center = tl.load(its_ptr + CENTER, mask=is_in, other=0.0)
    inverse = 1.0 / tl.fma(a, center, eps)
    x = -a * inverse
    total = tl.load(its_ptr + (CENTRAL + MOMENTS - 2), mask=is_in, other=0.0) + a * 0.0
    for k in tl.static_range(1, MOMENTS - 1):
        total = tl.fma(x, total, tl.load(its_ptr + (CENTRAL + MOMENTS - 2 - k), mask=is_in, other=0.0))
    return inverse * total


@triton.jit
def walk_steps(a, history_ptr, place, walks, most, steps, eps):
    """The same step by step for the rows [R, 1] that `walks`, from their places [R, 1] on."""
    moved = a * 0.0
    for j in range(1, most + 1):
        i = place + j
        is_one = walks & (i <= steps)
        rate = tl.load(history_ptr + (steps + 1) + i, mask=is_one, other=0.0)
        spread = tl.load(history_ptr + 2 * (steps + 1) + i, mask=is_one, other=1.0)
        rate *= tl.load(history_ptr + 3 * (steps + 1) + j)
        spread *= tl.load(history_ptr + 4 * (steps + 1) + j)
        by = rate.to(tl.float32) / tl.fma(a, spread.to(tl.float32), eps)
        moved += tl.where(is_one, by, 0.0)
    return moved


@triton.jit(do_not_specialize=["count", "padding_idx", "step", "steps", "longest"])
def move_kernel(
    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, last_step_ptr, rows_ptr, history_ptr, walks_ptr, is_bad_ptr, eps,
    count, padding_idx, step, steps, longest,
    D: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # rows, and where they stand: for whoever comes after this program they stand at `step`
    at = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    is_in = (at < count) & (tl.zeros([PLACES], tl.int32) + tl.load(is_bad_ptr) == 0)
    row = at
    if rows_ptr is not None:
        row = tl.load(rows_ptr + at, mask=is_in, other=0)
    stands = tl.atomic_max(last_step_ptr + row, tl.zeros([PLACES], tl.int32) + step, mask=is_in)
    moves = is_in & (stands < step) & (row != padding_idx)
    place = tl.where(moves, stands - (step - steps), 0)[:, None]
    row, moves = row[:, None], moves[:, None]
    its_ptr = walks_ptr + place * FIELDS
    walks = moves & (tl.load(its_ptr + IS_EXPANDED, mask=moves, other=1.0) == 0.0)
    most = tl.minimum(longest, tl.max(tl.max(tl.where(walks, steps - place, 0), 1), 0))
    keep_w = tl.load(its_ptr + KEEP_W, mask=moves, other=0.0)
    keep_m = tl.load(its_ptr + KEEP_M, mask=moves, other=0.0)
    keep_v = tl.load(its_ptr + KEEP_V, mask=moves, other=0.0)

    # movement
    for begin in range(0, D, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        mask = moves & (column < D)
        element = row * D + column
        w = tl.load(param_ptr + element, mask=mask, other=0.0)
        m = tl.load(exp_avg_ptr + element, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq_ptr + element, mask=mask, other=0.0)
        a = tl.sqrt(v)
        by = tl.where(
            walks, walk_steps(a, history_ptr, place, walks, most, steps, eps), expand(a, its_ptr, moves, eps)
        )  # fmt: skip
        by = tl.where(m == 0.0, 0.0, m * by)  # not 0 * inf
        tl.store(param_ptr + element, tl.fma(w, keep_w, -by), mask=mask)
        tl.store(exp_avg_ptr + element, m * keep_m, mask=mask)
        tl.store(exp_avg_sq_ptr + element, v * keep_v, mask=mask)


# ---- launcher ------------------------------------------------------------------------------------------------------


def lazy_adam_replay(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last_step: Tensor, rows: Tensor | None, lr: Tensor,
    decay: Tensor, step: int, beta1: float, beta2: float, eps: float, flags: int, padding_idx: int,
) -> int:  # fmt: skip
    """-1: what cannot be brought is reported as a fault, and then nothing was changed."""
    count = param.shape[0] if rows is None else rows.numel()
    if param.numel() == 0 or count == 0:
        return -1
    columns, steps = param.numel() // param.shape[0], lr.numel()
    rows = None if rows is None else rows.contiguous()
    recorded = history(lr, decay, step, beta1, beta2, flags).to(param.device, non_blocking=True)
    longest = 1 + int(math.log(END) / math.log(beta1 / math.sqrt(beta2))) if beta1 > 0.0 else 0
    walks = param.new_empty(steps + 1, FIELDS.value)
    is_bad, words = param.new_zeros(1, dtype=torch.int32), faults.words(param)
    block = min(128, triton.next_power_of_2(columns))
    launch(
        plan_walks_kernel, (triton.cdiv(steps + 1, PLAN_PLACES),), recorded, walks, steps, longest,
        PLACES=PLAN_PLACES, STEPS=PLAN_STEPS, num_warps=WARPS,
    )  # fmt: skip
    launch(
        check_rows_kernel, (triton.cdiv(count, IDS),), last_step, rows, is_bad, words, count, param.shape[0],
        step - steps, padding_idx, BLOCK=IDS, num_warps=WARPS,
    )  # fmt: skip
    faults.raise_interpreted(param)
    launch(
        move_kernel, (triton.cdiv(count, TILE // block),), param, exp_avg, exp_avg_sq, last_step, rows, recorded, walks,
        is_bad, eps, count, padding_idx, step, steps, longest, D=columns, PLACES=TILE // block, BLOCK=block,
        num_warps=WARPS,
    )  # fmt: skip
    return -1
