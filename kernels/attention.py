"""Attention over packed sequences with dropout, q, k, v and out [T, N, D], lse [T, N]: for a query i and the keys j of
its sequence that it sees, head by head,

    s_ij = scale * q_i . k_j,   lse_i = log(sum_j exp(s_ij)),   P_ij = exp(s_ij - lse_i)
    out_i = sum_j drop(P_ij) v_j

Backward takes q, k, v, out and lse, and computes P and the dropout mask again (attention_backward.py). Sequence b has
the tokens cu_seqlens[b] to cu_seqlens[b + 1]; a query that sees no key gives 0 and lse -inf, and passes no gradient.
q, k and v may be views of one projection. Scores, P and all sums are float32; 16-bit types go through matrix
instructions, for which P and dS are rounded to them, and float32 stays float32, never tf32. What drops a weight does
not scale it: 1 / (1 - p) is multiplied into sums at their end. Each result is written by one program, in one order: the
same call gives the same bits. Dao, "FlashAttention-2" (2023).

Exponentials are of base 2: the scores' factor has log2(e) in it. `nought` is 0.0 as an argument: with a constant the
compiler would first round both arms of a selection and then select and pack the rounded ones, one by one.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import faults, philox
from fastbert.kernels.attention_backward import attention_dk_dv_kernel, attention_dq_kernel
from fastbert.kernels.attention_ranks import next_block, ranked_rows, visible
from fastbert.kernels.attention_tiles import (
    edge,
    edges,
    inputs_of,
    load_tile,
    product,
    spans,
    store_tile,
    work_of_program,
)
from fastbert.kernels.fast import LOG2_E, exp2
from fastbert.kernels.launch import launch

LN_2 = tl.constexpr(0.6931471805599453)
NO_LIMIT = 1 << 30  # of a window: past every sequence, and sums of two places stay in 32 bits


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    q, ranks, top, total, out, k_ptr, v_ptr, key_ranks_ptr, key, row, token, length, head, k_stride, v_stride, left,
    right, exponent, seed, bound, nought, BK: tl.constexpr, HEAD: tl.constexpr, DROPOUT: tl.constexpr,
    WINDOW: tl.constexpr, RANKS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One block of keys; ALL: each query sees each of them."""
    BQ: tl.constexpr = q.shape[0]
    D: tl.constexpr = q.shape[1]
    # scores
    k = load_tile(k_ptr, key, length, k_stride, BK, D, HEAD, ALL)
    s = product(q, tl.trans(k))
    queries = tl.arange(0, BQ)
    if not ALL:
        seen = visible(
            row, ranks, key, key_ranks_ptr, length, left, right, BQ, BK, WINDOW, RANKS, False
        )  # fmt: skip
        s = tl.where(seen, s, -float("inf"))

    # softmax
    higher = tl.maximum(top, tl.max(s, 1) * exponent)
    base = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf would be NaN
    p = exp2(s * exponent - base[:, None])
    shrink = exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(philox.keep_scores(s, key, token + queries, head, seed, bound), p, nought)

    # out
    v = load_tile(v_ptr, key, length, v_stride, BK, D, HEAD, ALL)
    return higher, total, product(p.to(v.dtype), v, out * shrink[:, None])


@triton.jit(do_not_specialize=["tokens", "max_seqlen", "left", "right", "bound"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, seed_ptr, query_ranks_ptr, key_ranks_ptr, out_ptr, lse_ptr, faults_ptr, tokens,
    max_seqlen, heads, q_stride, k_stride, v_stride, left, right, scale, keep_scale, bound, nought, D: tl.constexpr,
    HEAD: tl.constexpr, DROPOUT: tl.constexpr, WINDOW: tl.constexpr, RANKS: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    head, row, start, length = work_of_program(cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, BQ, ALL=True)
    if length == 0:
        return
    out_stride = heads * HEAD
    q_ptr, k_ptr, v_ptr, seed = inputs_of(
        q_ptr, k_ptr, v_ptr, seed_ptr, start, head, q_stride, k_stride, v_stride, HEAD, DROPOUT
    )
    out_ptr += start * out_stride + head * HEAD
    lse_ptr += start * heads + head
    token = start.to(tl.int32) + row
    q = load_tile(q_ptr, row, length, q_stride, BQ, D, HEAD, False)
    q = tl.where(scale < 0, -q, q)  # so that the highest product is the highest score
    exponent = tl.maximum(tl.abs(scale) * LOG2_E, 1e-30)  # -inf times 0 would be NaN

    top = tl.full([BQ], -float("inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    out = tl.zeros([BQ, D], tl.float32)
    if RANKS:
        key_ranks_ptr += start
        ranks, greatest, first, last = ranked_rows(
            query_ranks_ptr + start, row, length, left, right, BQ, BK, WINDOW, False
        )  # fmt: skip
        following = next_block(key_ranks_ptr, 0, length, first, last, greatest, BK, False)
        for key in tl.range(0, length, BK, num_stages=1, disable_licm=True):
            if key == following:
                top, total, out = _attend(
                    q, ranks, top, total, out, k_ptr, v_ptr, key_ranks_ptr, key, row, token, length, head, k_stride,
                    v_stride, left, right, exponent, seed, bound, nought, BK, HEAD, DROPOUT, WINDOW, RANKS, False,
                )  # fmt: skip
                following = next_block(key_ranks_ptr, key + BK, length, first, last, greatest, BK, False)
    else:
        first, full_first, full_last, last = spans(row, length, left, right, BQ, BK, WINDOW)
        for key in range(full_first, full_last, BK):
            top, total, out = _attend(
                q, 0, top, total, out, k_ptr, v_ptr, 0, key, row, token, length, head, k_stride, v_stride, left, right,
                exponent, seed, bound, nought, BK, HEAD, DROPOUT, WINDOW, RANKS, True,
            )  # fmt: skip
        for n in tl.range(0, edges(first, full_first, full_last, last, BK), num_stages=1, disable_licm=True):
            key = edge(n, first, full_first, full_last, BK)
            top, total, out = _attend(
                q, 0, top, total, out, k_ptr, v_ptr, 0, key, row, token, length, head, k_stride, v_stride, left, right,
                exponent, seed, bound, nought, BK, HEAD, DROPOUT, WINDOW, RANKS, False,
            )  # fmt: skip

    sees_nothing = total == 0.0  # no key, or scores of -inf alone
    out *= tl.where(sees_nothing, 0.0, keep_scale / total)[:, None]
    store_tile(out_ptr, out, row, length, out_stride, HEAD)
    rows = row + tl.arange(0, BQ)
    lse = tl.where(sees_nothing, -float("inf"), (top + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + rows * heads, lse, mask=rows < length)


# ---- launchers -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a kernel is cut, and compiled."""

    BQ: int  # queries of a tile
    BK: int  # keys of a tile
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; a window or ranks need more


# By target, kernel and head size. What sm_90 has up to a size of 64 was fastest in a prototype on an H200; the rest is
# what leaves no register in memory; a head of 256 leaves some. With 16-bit types a tile of keys, and for dk and dv one
# of queries, is of 64 where dropout is to draw each call in one thread (philox.py).
_SQUARE = Plan(64, 64, 4, 3)
PLANS = {
    "sm_80": {
        "forward": {32: _SQUARE, 64: _SQUARE, 128: Plan(64, 64, 8, 2), 256: Plan(64, 32, 8, 1)},
        "dq": {32: _SQUARE, 64: Plan(64, 64, 8, 3), 128: Plan(32, 64, 8, 1), 256: Plan(32, 32, 8, 1)},
        "dk_dv": {32: Plan(64, 64, 8, 3), 64: Plan(32, 64, 4, 2), 128: Plan(32, 64, 8, 1), 256: Plan(32, 32, 8, 1)},
        "whole": {32: Plan(64, 128, 8, 1)},
    },
    "sm_90": {
        "forward": {32: _SQUARE, 64: _SQUARE, 128: Plan(128, 64, 8, 2), 256: Plan(64, 64, 8, 2)},
        "dq": {32: _SQUARE, 64: Plan(64, 64, 4, 3, 168), 128: Plan(128, 64, 8, 2), 256: Plan(64, 32, 8, 1)},
        "dk_dv": {32: _SQUARE, 64: _SQUARE, 128: Plan(64, 64, 8, 2), 256: Plan(32, 32, 8, 1)},
        "whole": {32: Plan(64, 128, 8, 1), 64: Plan(64, 128, 8, 1)},
    },
    "sm_100": {
        "forward": {32: _SQUARE, 64: _SQUARE, 128: Plan(64, 64, 4, 2), 256: Plan(64, 32, 8, 1)},
        "dq": {32: _SQUARE, 64: _SQUARE, 128: Plan(64, 64, 4, 2), 256: Plan(32, 32, 8, 1)},
        "dk_dv": {32: Plan(64, 64, 8, 3), 64: Plan(64, 64, 8, 3), 128: Plan(64, 64, 8, 2), 256: Plan(32, 32, 8, 1)},
        "whole": {},
    },
    "amd": {
        "forward": {32: _SQUARE, 64: _SQUARE, 128: Plan(64, 64, 4, 2), 256: Plan(32, 32, 4, 1)},
        "dq": {32: _SQUARE, 64: _SQUARE, 128: Plan(64, 64, 4, 1), 256: Plan(32, 32, 4, 1)},
        "dk_dv": {32: _SQUARE, 64: _SQUARE, 128: Plan(64, 64, 4, 1), 256: Plan(32, 32, 4, 1)},
        "whole": {},
    },
}
# float32, which has no matrix instructions on NVIDIA's GPUs, and heads above 256.
FLOAT32 = {
    "forward": {32: Plan(32, 32, 8, 1), 64: Plan(32, 32, 8, 1), 128: Plan(16, 32, 8, 1)},
    "dq": {32: Plan(16, 32, 8, 1), 64: Plan(32, 32, 8, 1), 128: Plan(16, 16, 8, 1)},
    "dk_dv": {32: Plan(32, 32, 8, 1), 64: Plan(32, 32, 8, 1), 128: Plan(32, 32, 8, 1)},
    "whole": {},
}
LARGE = Plan(16, 16, 4, 1)
# sm_75 has 64 KB of shared memory, which the plans of sm_80 pass for heads above 64, and LARGE by 1 KB for float32.
LARGE_75 = Plan(16, 16, 2, 1)


def plan(kernel: str, D: int, dtype: torch.dtype, target: str) -> Plan | None:
    """Of attention_<kernel>_kernel, or of "whole", which is attention_dk_dv_kernel where it gives dq too, or None."""
    if target == "sm_75" and D > 64:
        return None if kernel == "whole" else LARGE_75
    plans = FLOAT32 if dtype == torch.float32 else PLANS["sm_80" if target == "sm_75" else target]
    found = plans[kernel].get(max(D, 32), None if kernel == "whole" else LARGE)
    # A warp of AMD's has 64 threads, and threads of eight would have half of the registers.
    return found._replace(warps=4) if found and target == "amd" else found


@functools.cache
def target_of(device: torch.device) -> str:
    if device.type == "cpu":  # interpreted
        return "sm_90"
    if torch.version.hip:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return {7: "sm_75", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


class _Call:
    """What both directions pass to their kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, t: int,
        seed: Tensor | None, causal: bool, window: list[int] | None, global_tokens: Tensor | None,
        query_ranks: Tensor | None, key_ranks: Tensor | None,
    ):  # fmt: skip
        q, k, v = heads_together(q), heads_together(k), heads_together(v)
        tokens, self.heads, head_size = q.shape
        self.sequences, self.longest = sizes(tokens, cu_seqlens, max_seqlen)
        left, right = limits(causal, window)
        has_window = min(left, right) < self.longest - 1
        if global_tokens is not None and has_window:  # without a window all is seen
            query_ranks, key_ranks = ranks_of_globals(global_tokens)
        self.inputs = q, k, v, cu_seqlens.contiguous(), seed, query_ranks, key_ranks
        self.numbers = (
            tokens, self.longest, self.heads, q.stride(0), k.stride(0), v.stride(0), left, right, scale,
            philox.scale(t, philox.SCORE_BITS), philox.bound(t, philox.SCORE_BITS), 0.0,
        )  # fmt: skip
        self.constants = {
            "D": max(16, triton.next_power_of_2(head_size)), "HEAD": head_size, "DROPOUT": t > 0,
            "WINDOW": has_window, "RANKS": query_ranks is not None,
        }  # fmt: skip
        self.is_masked = has_window or query_ranks is not None

    def plan(self, kernel: str) -> Plan | None:
        q = self.inputs[0]
        return plan(kernel, self.constants["D"], q.dtype, target_of(q.device))

    def launch(self, kernel, plan: Plan, rows: int, *pointers: Tensor | None, **constants) -> None:
        """Programs for tiles of `rows`."""
        options = {"num_warps": plan.warps, "num_stages": plan.stages}
        if plan.registers and not self.is_masked:
            options["maxnreg"] = plan.registers
        grid = (triton.cdiv(self.longest, rows) * self.heads * self.sequences,)
        launch(
            kernel, grid, *self.inputs, *pointers, faults.words(self.inputs[0]), *self.numbers, **self.constants,
            **constants, BQ=plan.BQ, BK=plan.BK, **options,
        )  # fmt: skip


def heads_together(x: Tensor) -> Tensor:
    """[T, N, D] as the kernels take it: any stride between tokens, heads D apart."""
    _, between_heads, within = x.stride()
    return x if within == 1 and between_heads == x.shape[2] else x.contiguous()


def sizes(tokens: int, cu_seqlens: Tensor, max_seqlen: int) -> tuple[int, int]:
    """How many sequences there are, and the tokens of the longest."""
    sequences, longest = cu_seqlens.numel() - 1, min(max_seqlen, tokens)
    if tokens > 0 and (longest <= 0 or sequences == 0):  # no program would run to report it
        raise ValueError(
            f"cu_seqlens and max_seqlen must make up the {tokens} tokens, got {sequences} sequences of at most "
            f"{max_seqlen}"
        )
    return sequences, longest


def ranks_of_globals(global_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [T] of queries and of keys (attention_ranks.py) of bool [T]."""
    return global_tokens.view(torch.int8), (~global_tokens).view(torch.int8)


def limits(causal: bool, window: list[int] | None) -> tuple[int, int]:
    """How many keys to the left and to the right a query sees."""
    left, right = (NO_LIMIT, NO_LIMIT) if window is None else (min(limit, NO_LIMIT) for limit in window)
    return left, min(right, 0) if causal else right


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, t: int, seed: Tensor | None,
    causal: bool, window: list[int] | None, global_tokens: Tensor | None = None, query_ranks: Tensor | None = None,
    key_ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of_tokens = global_tokens, query_ranks, key_ranks
    call = _Call(q, k, v, cu_seqlens, max_seqlen, scale, t, seed, causal, window, *of_tokens)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    plan = call.plan("forward")
    call.launch(attention_forward_kernel, plan, plan.BQ, out, lse)
    faults.raise_interpreted(q)
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, t: int, seed: Tensor | None, causal: bool, window: list[int] | None,
    global_tokens: Tensor | None = None, query_ranks: Tensor | None = None, key_ranks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    of_tokens = global_tokens, query_ranks, key_ranks
    call = _Call(q, k, v, cu_seqlens, max_seqlen, scale, t, seed, causal, window, *of_tokens)
    tokens, heads, head_size = q.shape
    dqkv = q.new_empty(tokens, 3, heads, head_size)
    given = dout.contiguous(), out.contiguous(), lse
    whole = call.plan("whole")
    if whole and call.longest <= whole.BK and not call.is_masked:
        call.launch(attention_dk_dv_kernel, whole, whole.BK, *given, None, dqkv, WHOLE=True)
    else:
        rows = q.new_empty(heads, tokens, 2, dtype=torch.float32)
        plan = call.plan("dq")
        call.launch(attention_dq_kernel, plan, plan.BQ, *given, rows, dqkv)
        plan = call.plan("dk_dv")
        call.launch(attention_dk_dv_kernel, plan, plan.BK, *given, rows, dqkv, WHOLE=False)
    faults.raise_interpreted(q)
    return dqkv
