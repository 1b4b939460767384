"""Attention's gradients from q, k, v, out, lse and dout, all [T, N, D] but lse [T, N], as one dqkv [T, 3, N, D]:

    P_ij = exp(s_ij - lse_i)   delta_i = dout_i . out_i   dS_ij = P_ij * (drop'(dout_i . v_j) - delta_i)
    dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i,   dv_j = sum_i drop(P_ij) dout_i

P and the mask are computed again. With m_ij 0 or 1 and f = 1 / (1 - p) the sums below are of P_ij m_ij and of
P_ij (m_ij dout_i . v_j - delta_i / f), and f is multiplied into them at their end.

Two kernels, each with one order of its sums, so that nothing is added atomically: tiles of queries walk through the
keys for dq, and write what the second needs of each query, lse to base 2 and delta / f, side by side [N, T, 2]; then
tiles of keys walk through the queries for dk and dv, with keys as the rows of all products. Where all sequences fit
into one tile of keys, and neither window nor ranks are given, each block of queries sees all its keys in the second
kernel, which then gives dq as well (WHOLE), so that P, dP and the mask are computed once.
"""

import triton
import triton.language as tl

from fastbert.kernels import philox
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


@triton.jit
def _statistics(lse, dout, out, keep_scale):
    """Of each query: lse to base 2, inf where it sees no key and its weights are to be 0, and delta / f."""
    lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E)
    kept = 1.0 / tl.maximum(keep_scale, 1.0)  # keep_scale is 0 where all is dropped, and out with it
    return lse, tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) * kept


# ---- dq --------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_keys(
    dq, q, ranks, dout, lse, delta, k_ptr, v_ptr, key_ranks_ptr, key, row, token, length, head, k_stride, v_stride,
    left, right, exponent, seed, bound, nought, BK: tl.constexpr, HEAD: tl.constexpr, DROPOUT: tl.constexpr,
    WINDOW: tl.constexpr, RANKS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One block of keys; ALL: each query sees each of them."""
    D: tl.constexpr = q.shape[1]
    queries = tl.arange(0, q.shape[0])
    # products
    k = load_tile(k_ptr, key, length, k_stride, BK, D, HEAD, ALL)
    v = load_tile(v_ptr, key, length, v_stride, BK, D, HEAD, ALL)
    s = product(q, tl.trans(k))
    dp = product(dout, tl.trans(v))

    # softmax
    p = exp2(s * exponent - lse[:, None])
    if not ALL:
        seen = visible(
            row, ranks, key, key_ranks_ptr, length, left, right, queries.shape[0], BK, WINDOW, RANKS, False
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
    if DROPOUT:
        dp = tl.where(philox.keep_scores(s, key, token + queries, head, seed, bound), dp, nought)

    # dq
    ds = p * (dp - delta[:, None])
    return product(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["tokens", "max_seqlen", "left", "right", "bound"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, seed_ptr, query_ranks_ptr, key_ranks_ptr, dout_ptr, out_ptr, lse_ptr, rows_ptr,
    dqkv_ptr, faults_ptr, tokens, max_seqlen, heads, q_stride, k_stride, v_stride, left, right, scale, keep_scale,
    bound, nought, D: tl.constexpr, HEAD: tl.constexpr, DROPOUT: tl.constexpr, WINDOW: tl.constexpr,
    RANKS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head, row, start, length = work_of_program(cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, BQ, ALL=False)
    if length == 0:
        return
    stride = heads * HEAD
    q_ptr, k_ptr, v_ptr, seed = inputs_of(
        q_ptr, k_ptr, v_ptr, seed_ptr, start, head, q_stride, k_stride, v_stride, HEAD, DROPOUT
    )
    dout_ptr += start * stride + head * HEAD
    out_ptr += start * stride + head * HEAD
    token = start.to(tl.int32) + row

    q = load_tile(q_ptr, row, length, q_stride, BQ, D, HEAD, False)

    # statistics
    rows = row + tl.arange(0, BQ)
    there = rows < length
    dout = load_tile(dout_ptr, row, length, stride, BQ, D, HEAD, False)
    out = load_tile(out_ptr, row, length, stride, BQ, D, HEAD, False)
    lse = tl.load(lse_ptr + start * heads + head + rows * heads, mask=there, other=0.0)
    lse, delta = _statistics(lse, dout, out, keep_scale)
    pair = tl.arange(0, 2)[None, :]
    rows_ptr += (tl.cast(head, tl.int64) * tokens + start) * 2
    tl.store(rows_ptr + rows[:, None] * 2 + pair, tl.join(lse, delta), mask=there[:, None])

    exponent = scale * LOG2_E
    dq = tl.zeros([BQ, D], tl.float32)
    if RANKS:
        key_ranks_ptr += start
        ranks, greatest, first, last = ranked_rows(
            query_ranks_ptr + start, row, length, left, right, BQ, BK, WINDOW, False
        )  # fmt: skip
        following = next_block(key_ranks_ptr, 0, length, first, last, greatest, BK, False)
        for key in tl.range(0, length, BK, num_stages=1, disable_licm=True):
            if key == following:
                dq = _add_keys(
                    dq, q, ranks, dout, lse, delta, k_ptr, v_ptr, key_ranks_ptr, key, row, token, length, head,
                    k_stride, v_stride, left, right, exponent, seed, bound, nought, BK, HEAD, DROPOUT, WINDOW, RANKS,
                    False,
                )  # fmt: skip
                following = next_block(key_ranks_ptr, key + BK, length, first, last, greatest, BK, False)
    else:
        first, full_first, full_last, last = spans(row, length, left, right, BQ, BK, WINDOW)
        for key in tl.range(full_first, full_last, BK, disable_licm=D > 64):
            dq = _add_keys(
                dq, q, 0, dout, lse, delta, k_ptr, v_ptr, 0, key, row, token, length, head, k_stride, v_stride, left,
                right, exponent, seed, bound, nought, BK, HEAD, DROPOUT, WINDOW, RANKS, True,
            )  # fmt: skip
        for n in tl.range(0, edges(first, full_first, full_last, last, BK), num_stages=1, disable_licm=True):
            key = edge(n, first, full_first, full_last, BK)
            dq = _add_keys(
                dq, q, 0, dout, lse, delta, k_ptr, v_ptr, 0, key, row, token, length, head, k_stride, v_stride, left,
                right, exponent, seed, bound, nought, BK, HEAD, DROPOUT, WINDOW, RANKS, False,
            )  # fmt: skip
    dq_ptr = dqkv_ptr + start * (3 * stride) + head * HEAD
    store_tile(dq_ptr, dq * (scale * keep_scale), row, length, 3 * stride, HEAD)


# ---- dk and dv -------------------------------------------------------------------------------------------------------


@triton.jit
def _add_queries(
    dk, dv, k, v, ranks, q_ptr, dout_ptr, out_ptr, statistics_ptr, dq_ptr, query_ranks_ptr, query, key, token, length,
    head, heads, q_stride, left, right, scale, keep_scale, seed, bound, nought, BQ: tl.constexpr, HEAD: tl.constexpr,
    DROPOUT: tl.constexpr, WINDOW: tl.constexpr, RANKS: tl.constexpr, WHOLE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One block of queries; ALL: each of them sees each key of the sequence that is in the tile."""
    D: tl.constexpr = k.shape[1]
    stride = heads * HEAD
    # statistics
    queries = query + tl.arange(0, BQ)
    there = queries < length
    dout = load_tile(dout_ptr, query, length, stride, BQ, D, HEAD, ALL)
    if WHOLE:
        out = load_tile(out_ptr, query, length, stride, BQ, D, HEAD, ALL)
        lse = tl.load(statistics_ptr + queries * heads, mask=there, other=-float("inf"))
        lse, delta = _statistics(lse, dout, out, keep_scale)
    else:
        place = statistics_ptr + (queries[:, None] * 2 + tl.arange(0, 2)[None, :])
        if ALL:
            lse, delta = tl.split(tl.load(place))
        else:
            lse, delta = tl.split(tl.load(place, mask=there[:, None], other=float("inf")))  # their weights are 0
            delta = tl.where(there, delta, 0.0)

    # products
    q = load_tile(q_ptr, query, length, q_stride, BQ, D, HEAD, ALL)
    s = product(k, tl.trans(q))
    dp = product(v, tl.trans(dout))

    # softmax
    p = exp2(s * (scale * LOG2_E) - lse[None, :])
    keys = (key + tl.arange(0, k.shape[0]))[:, None]
    if WHOLE:
        p = tl.where(keys < length, p, 0.0)  # in dq they would count; their rows of dk and dv are not stored
    elif (WINDOW or RANKS) and not ALL:
        seen = visible(
            key, ranks, query, query_ranks_ptr, length, right, left, k.shape[0], BQ, WINDOW, RANKS, True
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
    dropped = p
    if DROPOUT:
        dropped = tl.where(philox.keep_scores_transposed(s, key, token + query, head, seed, bound), p, nought)

    # dv, dk and dq
    dv = product(dropped.to(dout.dtype), dout, dv)
    ds = (dropped * dp - p * delta[None, :]).to(q.dtype)  # one selection serves both products
    dk = product(ds, q, dk)
    if WHOLE:
        store_tile(dq_ptr, product(tl.trans(ds), k) * (scale * keep_scale), query, length, 3 * stride, HEAD)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "max_seqlen", "left", "right", "bound"])
def attention_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, seed_ptr, query_ranks_ptr, key_ranks_ptr, dout_ptr, out_ptr, lse_ptr, rows_ptr,
    dqkv_ptr, faults_ptr, tokens, max_seqlen, heads, q_stride, k_stride, v_stride, left, right, scale, keep_scale,
    bound, nought, D: tl.constexpr, HEAD: tl.constexpr, DROPOUT: tl.constexpr, WINDOW: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dk and dv, from what attention_dq_kernel left in rows; WHOLE: dq too, from lse, where all is seen."""
    head, key, start, length = work_of_program(cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, BK, ALL=False)
    if length == 0:
        return
    stride = heads * HEAD
    q_ptr, k_ptr, v_ptr, seed = inputs_of(
        q_ptr, k_ptr, v_ptr, seed_ptr, start, head, q_stride, k_stride, v_stride, HEAD, DROPOUT
    )
    dout_ptr += start * stride + head * HEAD
    out_ptr += start * stride + head * HEAD
    dqkv_ptr += start * (3 * stride) + head * HEAD
    if WHOLE:
        statistics_ptr = lse_ptr + start * heads + head
    else:
        statistics_ptr = rows_ptr + (tl.cast(head, tl.int64) * tokens + start) * 2
    token = start.to(tl.int32)

    k = load_tile(k_ptr, key, length, k_stride, BK, D, HEAD, False)
    v = load_tile(v_ptr, key, length, v_stride, BK, D, HEAD, False)
    dk = tl.zeros([BK, D], tl.float32)
    dv = tl.zeros([BK, D], tl.float32)
    if RANKS:
        query_ranks_ptr += start
        ranks, greatest, first, last = ranked_rows(
            key_ranks_ptr + start, key, length, right, left, BK, BQ, WINDOW, True
        )  # fmt: skip
        following = next_block(query_ranks_ptr, 0, length, first, last, greatest, BQ, True)
        for query in tl.range(0, length, BQ, num_stages=1, disable_licm=True):
            if query == following:
                dk, dv = _add_queries(
                    dk, dv, k, v, ranks, q_ptr, dout_ptr, out_ptr, statistics_ptr, dqkv_ptr, query_ranks_ptr, query,
                    key, token, length, head, heads, q_stride, left, right, scale, keep_scale, seed, bound, nought, BQ,
                    HEAD, DROPOUT, WINDOW, RANKS, WHOLE, False,
                )  # fmt: skip
                following = next_block(query_ranks_ptr, query + BQ, length, first, last, greatest, BQ, True)
    else:
        first, full_first, full_last, last = spans(key, length, right, left, BK, BQ, WINDOW)
        for query in tl.range(full_first, full_last, BQ, disable_licm=WHOLE or D > 64):
            dk, dv = _add_queries(
                dk, dv, k, v, 0, q_ptr, dout_ptr, out_ptr, statistics_ptr, dqkv_ptr, 0, query, key, token, length, head,
                heads, q_stride, left, right, scale, keep_scale, seed, bound, nought, BQ, HEAD, DROPOUT, WINDOW, RANKS,
                WHOLE, True,
            )  # fmt: skip
        for n in tl.range(0, edges(first, full_first, full_last, last, BQ), num_stages=1, disable_licm=True):
            query = edge(n, first, full_first, full_last, BQ)
            dk, dv = _add_queries(
                dk, dv, k, v, 0, q_ptr, dout_ptr, out_ptr, statistics_ptr, dqkv_ptr, 0, query, key, token, length, head,
                heads, q_stride, left, right, scale, keep_scale, seed, bound, nought, BQ, HEAD, DROPOUT, WINDOW, RANKS,
                WHOLE, False,
            )  # fmt: skip

    store_tile(dqkv_ptr + stride, dk * (scale * keep_scale), key, length, 3 * stride, HEAD)
    store_tile(dqkv_ptr + 2 * stride, dv * keep_scale, key, length, 3 * stride, HEAD)
