"""Hard attention over packed sequences, q, k, v and out [T, N, D], best and lse [T, N]: for a query i and the keys j of
its sequence that it sees, head by head, with temperature tau and Gumbel noise g, or none,

    s_ij = scale * q_i . k_j + g_ij,   b_i = the first j with the greatest s_ij,   out_i = v_{b_i}
    lse_i = log(sum_j exp(s_ij / tau)), for backward

Backward takes q, k, v, best and lse, computes s again, and gives the gradient of the softmax at tau for q and k, of
what was chosen for v (straight-through):

    P_ij = exp(s_ij / tau - lse_i),   dP_ij = dout_i . v_j,   delta_i = sum_j P_ij dP_ij
    dq_i = scale / tau * (sum_j P_ij dP_ij k_j - delta_i * sum_j P_ij k_j)
    dk_j = scale / tau * sum_i P_ij (dP_ij - delta_i) q_i,   dv_j = sum of dout_i over the i with b_i = j

so that dq needs one pass over the keys; it leaves delta for dk. Scores, P and all sums are float32; products of scores
are float32's own for every dtype, so that a choice does not hang on a rounding to 16 bits. The noise of four keys comes
from one call of Philox (philox.py); csrc/cpu/gumbel.h has the contract. Tiles are attention's (attention_tiles.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import faults
from fastbert.kernels.attention import heads_together, limits, ranks_of_globals, sizes
from fastbert.kernels.attention_ranks import load_ranks, next_block, ranked_rows, visible
from fastbert.kernels.attention_tiles import load_tile, product, spans, store_tile, work_of_program
from fastbert.kernels.fast import LOG2_E, exp2
from fastbert.kernels.launch import launch
from fastbert.kernels.philox import philox

NOISE = tl.constexpr(3)  # the counter's last word
TILE = {16: 32, 32: 32, 64: 32, 128: 16}  # rows of a tile, by the head's size


# ---- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def _log(x):
    """The natural logarithm of a normal number above 0; a GPU's own loses its last places near 1, where g is greatest.

    x = m 2^e with sqrt(1/2) <= m < sqrt(2), and log m = 2 atanh((m - 1) / (m + 1)) by its series.
    """
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    rest = (((z * (1.0 / 9) + 1.0 / 7) * z + 1.0 / 5) * z + 1.0 / 3) * z
    return (bits >> 23).to(tl.float32) * 0.6931471805599453 + (2.0 * s + 2.0 * s * rest)


@triton.jit
def _noise(key, query, head, seed, Q: tl.constexpr, K: tl.constexpr):
    """[Q, K] of the queries [Q], places in the packed batch, and the keys from `key` on, a multiple of 4."""
    group = (key // 4 + tl.arange(0, K // 4))[None, :]
    zero = (group + query[:, None]) * 0
    w0, w1, w2, w3 = philox(
        (zero + group).to(tl.uint32), (zero + query[:, None]).to(tl.uint32), (zero + head).to(tl.uint32),
        (zero + NOISE).to(tl.uint32), seed,
    )  # fmt: skip
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [Q, K])
    uniform = ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
    return -_log(-_log(uniform))


@triton.jit
def _scores(
    q, k, query_ranks_ptr, key_ranks_ptr, row, key, token, length, head, left, right, scale, seed, NOISY: tl.constexpr,
    WINDOW: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """[Q, K]: of the queries from `row` on, -inf where one does not see the key."""
    Q: tl.constexpr = q.shape[0]
    K: tl.constexpr = k.shape[0]
    queries = tl.arange(0, Q)
    s = product(q, tl.trans(k)) * scale
    if NOISY:
        s += _noise(key, token + row + queries, head, seed, Q, K)
    ranks = load_ranks(query_ranks_ptr, row, length, Q, False) if RANKS else 0
    seen = visible(row, ranks, key, key_ranks_ptr, length, left, right, Q, K, WINDOW, RANKS, False)
    return tl.where(seen, s, -float("inf"))


@triton.jit
def _tile(ptr, row, length, stride, ROWS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr):
    return load_tile(ptr, row, length, stride, ROWS, D, HEAD, False).to(tl.float32)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _choose(
    q, top, total, best, k_ptr, query_ranks_ptr, key_ranks_ptr, row, key, token, length, head, k_stride, left, right,
    scale, exponent, seed, HEAD: tl.constexpr, NOISY: tl.constexpr, WINDOW: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One block of keys: the greatest score so far, the sum of exp, and the key with that score."""
    ROWS: tl.constexpr = q.shape[0]
    k = _tile(k_ptr, key, length, k_stride, ROWS, q.shape[1], HEAD)
    s = _scores(
        q, k, query_ranks_ptr, key_ranks_ptr, row, key, token, length, head, left, right, scale, seed, NOISY, WINDOW,
        RANKS,
    )  # fmt: skip

    # choice
    undefined = tl.max((s != s).to(tl.int32), 1) > 0
    highest = tl.max(tl.where(s != s, -float("inf"), s), 1)
    keys = (key + tl.arange(0, ROWS))[None, :]
    place = tl.min(tl.where(s == highest[:, None], keys, 2147483647), 1)  # of equal ones the first
    best = tl.where(highest > top, place, best)

    # softmax
    higher = tl.maximum(top, highest)
    base = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)  # -inf - -inf would be NaN
    terms = exp2((tl.where(s == float("inf"), -float("inf"), s) - base[:, None]) * exponent)
    total = total * exp2((tl.where(top == float("inf"), base, top) - base) * exponent) + tl.sum(terms, 1)
    return higher, tl.where(undefined, float("nan"), total), best


@triton.jit(do_not_specialize=["tokens", "max_seqlen", "left", "right"])
def hard_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, seed_ptr, query_ranks_ptr, key_ranks_ptr, out_ptr, best_ptr, lse_ptr,
    faults_ptr, tokens, max_seqlen, heads, q_stride, k_stride, v_stride, left, right, scale, temperature,
    D: tl.constexpr, HEAD: tl.constexpr, NOISY: tl.constexpr, WINDOW: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    head, row, start, length = work_of_program(cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, ROWS, ALL=True)
    if length == 0:
        return
    seed = tl.load(seed_ptr) if NOISY else 0
    token = start.to(tl.int32)
    q = _tile(q_ptr + start * q_stride + head * HEAD, row, length, q_stride, ROWS, D, HEAD)
    k_ptr += start * k_stride + head * HEAD
    v_ptr += start * v_stride + head * HEAD

    exponent = LOG2_E / temperature
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    best = tl.full([ROWS], -1, tl.int32)
    if RANKS:
        query_ranks_ptr += start
        key_ranks_ptr += start
        _, greatest, first, last = ranked_rows(query_ranks_ptr, row, length, left, right, ROWS, ROWS, WINDOW, False)
        following = next_block(key_ranks_ptr, 0, length, first, last, greatest, ROWS, False)
        for key in tl.range(0, length, ROWS, num_stages=1, disable_licm=True):
            if key == following:
                top, total, best = _choose(
                    q, top, total, best, k_ptr, query_ranks_ptr, key_ranks_ptr, row, key, token, length, head, k_stride,
                    left, right, scale, exponent, seed, HEAD, NOISY, WINDOW, RANKS,
                )  # fmt: skip
                following = next_block(key_ranks_ptr, key + ROWS, length, first, last, greatest, ROWS, False)
    else:
        first, _, _, last = spans(row, length, left, right, ROWS, ROWS, WINDOW)
        for key in range(first, last, ROWS):
            top, total, best = _choose(
                q, top, total, best, k_ptr, 0, 0, row, key, token, length, head, k_stride, left, right, scale, exponent,
                seed, HEAD, NOISY, WINDOW, RANKS,
            )  # fmt: skip

    undefined = total != total
    rows = row + tl.arange(0, ROWS)
    chosen = (best >= 0) & ~undefined & (rows < length)  # one behind the last may see what is not there
    columns = tl.arange(0, D)[None, :]
    place = v_ptr + best.to(tl.int64)[:, None] * v_stride + columns
    out = tl.load(place, mask=chosen[:, None] & (columns < HEAD), other=0.0)
    out = tl.where(undefined[:, None], float("nan"), out)
    store_tile(out_ptr + start * (heads * HEAD) + head * HEAD, out, row, length, heads * HEAD, HEAD)
    infinite = tl.abs(top) == float("inf")
    lse = tl.where(infinite, top, top / temperature + tl.log(tl.where(infinite, 1.0, total)))
    at = start * heads + head + rows * heads
    tl.store(lse_ptr + at, tl.where(undefined, float("nan"), lse), mask=rows < length)
    tl.store(best_ptr + at, tl.where(chosen, best, -1), mask=rows < length)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _weights(s, lse, temperature):
    """P of scores [Q, K] and lse [Q], where that is -inf 0."""
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    return exp2((s / temperature - lse[:, None]) * LOG2_E)


@triton.jit
def _add_keys(
    weighted, mean, delta, q, dout, lse, k_ptr, v_ptr, query_ranks_ptr, key_ranks_ptr, row, key, token, length, head,
    k_stride, v_stride, left, right, scale, temperature, seed, HEAD: tl.constexpr, NOISY: tl.constexpr,
    WINDOW: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One block of keys: sums of P dP k, of P k and of P dP."""
    ROWS: tl.constexpr = q.shape[0]
    D: tl.constexpr = q.shape[1]
    k = _tile(k_ptr, key, length, k_stride, ROWS, D, HEAD)
    v = _tile(v_ptr, key, length, v_stride, ROWS, D, HEAD)
    s = _scores(
        q, k, query_ranks_ptr, key_ranks_ptr, row, key, token, length, head, left, right, scale, seed, NOISY, WINDOW,
        RANKS,
    )  # fmt: skip
    p = _weights(s, lse, temperature)
    pdp = p * product(dout, tl.trans(v))
    return product(pdp, k, weighted), product(p, k, mean), delta + tl.sum(pdp, 1)


@triton.jit(do_not_specialize=["tokens", "max_seqlen", "left", "right"])
def hard_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, seed_ptr, query_ranks_ptr, key_ranks_ptr, dout_ptr, best_ptr, lse_ptr,
    delta_ptr, dqkv_ptr, faults_ptr, tokens, max_seqlen, heads, q_stride, k_stride, v_stride, left, right, scale,
    temperature, D: tl.constexpr, HEAD: tl.constexpr, NOISY: tl.constexpr, WINDOW: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    head, row, start, length = work_of_program(cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, ROWS, ALL=False)
    if length == 0:
        return
    stride = heads * HEAD
    seed = tl.load(seed_ptr) if NOISY else 0
    token = start.to(tl.int32)
    q = _tile(q_ptr + start * q_stride + head * HEAD, row, length, q_stride, ROWS, D, HEAD)
    dout = _tile(dout_ptr + start * stride + head * HEAD, row, length, stride, ROWS, D, HEAD)
    k_ptr += start * k_stride + head * HEAD
    v_ptr += start * v_stride + head * HEAD
    rows = row + tl.arange(0, ROWS)
    at = start * heads + head + rows * heads
    lse = tl.load(lse_ptr + at, mask=rows < length, other=-float("inf"))

    weighted = tl.zeros([ROWS, D], tl.float32)  # sums of P dP k and of P k
    mean = tl.zeros([ROWS, D], tl.float32)
    delta = tl.zeros([ROWS], tl.float32)
    if RANKS:
        query_ranks_ptr += start
        key_ranks_ptr += start
        _, greatest, first, last = ranked_rows(query_ranks_ptr, row, length, left, right, ROWS, ROWS, WINDOW, False)
        following = next_block(key_ranks_ptr, 0, length, first, last, greatest, ROWS, False)
        for key in tl.range(0, length, ROWS, num_stages=1, disable_licm=True):
            if key == following:
                weighted, mean, delta = _add_keys(
                    weighted, mean, delta, q, dout, lse, k_ptr, v_ptr, query_ranks_ptr, key_ranks_ptr, row, key, token,
                    length, head, k_stride, v_stride, left, right, scale, temperature, seed, HEAD, NOISY, WINDOW, RANKS,
                )  # fmt: skip
                following = next_block(key_ranks_ptr, key + ROWS, length, first, last, greatest, ROWS, False)
    else:
        first, _, _, last = spans(row, length, left, right, ROWS, ROWS, WINDOW)
        for key in range(first, last, ROWS):
            weighted, mean, delta = _add_keys(
                weighted, mean, delta, q, dout, lse, k_ptr, v_ptr, 0, 0, row, key, token, length, head, k_stride,
                v_stride, left, right, scale, temperature, seed, HEAD, NOISY, WINDOW, RANKS,
            )  # fmt: skip

    tl.store(delta_ptr + at, delta, mask=rows < length)
    dq = (weighted - delta[:, None] * mean) * (scale / temperature)
    store_tile(dqkv_ptr + start * (3 * stride) + head * HEAD, dq, row, length, 3 * stride, HEAD)


@triton.jit
def _add_queries(
    dk, dv, k, v, q_ptr, dout_ptr, best_ptr, lse_ptr, delta_ptr, query_ranks_ptr, key_ranks_ptr, query, key, token,
    start, length, head, heads, q_stride, left, right, scale, temperature, seed, HEAD: tl.constexpr,
    NOISY: tl.constexpr, WINDOW: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One block of queries."""
    ROWS: tl.constexpr = k.shape[0]
    D: tl.constexpr = k.shape[1]
    queries = query + tl.arange(0, ROWS)
    at = start * heads + head + queries * heads
    lse = tl.load(lse_ptr + at, mask=queries < length, other=-float("inf"))
    delta = tl.load(delta_ptr + at, mask=queries < length, other=0.0)
    best = tl.load(best_ptr + at, mask=queries < length, other=-1)
    q = _tile(q_ptr, query, length, q_stride, ROWS, D, HEAD)
    dout = _tile(dout_ptr, query, length, heads * HEAD, ROWS, D, HEAD)
    s = _scores(
        q, k, query_ranks_ptr, key_ranks_ptr, query, key, token, length, head, left, right, scale, seed, NOISY, WINDOW,
        RANKS,
    )  # fmt: skip
    ds = _weights(s, lse, temperature) * (product(dout, tl.trans(v)) - delta[:, None])
    chosen = best[:, None] == (key + tl.arange(0, ROWS))[None, :]
    return product(tl.trans(ds), q, dk), product(tl.trans(chosen.to(tl.float32)), dout, dv)


@triton.jit(do_not_specialize=["tokens", "max_seqlen", "left", "right"])
def hard_attention_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, seed_ptr, query_ranks_ptr, key_ranks_ptr, dout_ptr, best_ptr, lse_ptr,
    delta_ptr, dqkv_ptr, faults_ptr, tokens, max_seqlen, heads, q_stride, k_stride, v_stride, left, right, scale,
    temperature, D: tl.constexpr, HEAD: tl.constexpr, NOISY: tl.constexpr, WINDOW: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    head, key, start, length = work_of_program(cu_seqlens_ptr, faults_ptr, tokens, max_seqlen, heads, ROWS, ALL=False)
    if length == 0:
        return
    stride = heads * HEAD
    seed = tl.load(seed_ptr) if NOISY else 0
    token = start.to(tl.int32)
    k = _tile(k_ptr + start * k_stride + head * HEAD, key, length, k_stride, ROWS, D, HEAD)
    v = _tile(v_ptr + start * v_stride + head * HEAD, key, length, v_stride, ROWS, D, HEAD)
    q_ptr += start * q_stride + head * HEAD
    dout_ptr += start * stride + head * HEAD

    dk = tl.zeros([ROWS, D], tl.float32)
    dv = tl.zeros([ROWS, D], tl.float32)
    if RANKS:
        query_ranks_ptr += start
        key_ranks_ptr += start
        _, greatest, first, last = ranked_rows(key_ranks_ptr, key, length, right, left, ROWS, ROWS, WINDOW, True)
        following = next_block(query_ranks_ptr, 0, length, first, last, greatest, ROWS, True)
        for query in tl.range(0, length, ROWS, num_stages=1, disable_licm=True):
            if query == following:
                dk, dv = _add_queries(
                    dk, dv, k, v, q_ptr, dout_ptr, best_ptr, lse_ptr, delta_ptr, query_ranks_ptr, key_ranks_ptr, query,
                    key, token, start, length, head, heads, q_stride, left, right, scale, temperature, seed, HEAD,
                    NOISY, WINDOW, RANKS,
                )  # fmt: skip
                following = next_block(query_ranks_ptr, query + ROWS, length, first, last, greatest, ROWS, True)
    else:
        first, _, _, last = spans(key, length, right, left, ROWS, ROWS, WINDOW)
        for query in range(first, last, ROWS):
            dk, dv = _add_queries(
                dk, dv, k, v, q_ptr, dout_ptr, best_ptr, lse_ptr, delta_ptr, 0, 0, query, key, token, start, length,
                head, heads, q_stride, left, right, scale, temperature, seed, HEAD, NOISY, WINDOW, RANKS,
            )  # fmt: skip

    dqkv_ptr += start * (3 * stride) + head * HEAD
    store_tile(dqkv_ptr + stride, dk * (scale / temperature), key, length, 3 * stride, HEAD)
    store_tile(dqkv_ptr + 2 * stride, dv, key, length, 3 * stride, HEAD)


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Call:
    """What both directions pass to their kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, temperature: float,
        seed: Tensor | None, causal: bool, window: list[int] | None, global_tokens: Tensor | None = None,
    ):  # fmt: skip
        q, k, v = heads_together(q), heads_together(k), heads_together(v)
        tokens, self.heads, head_size = q.shape
        self.sequences, self.longest = sizes(tokens, cu_seqlens, max_seqlen)
        left, right = limits(causal, window)
        has_window = min(left, right) < self.longest - 1
        has_ranks = global_tokens is not None and has_window  # without a window all is seen
        ranks = ranks_of_globals(global_tokens) if has_ranks else (None, None)
        self.inputs = q, k, v, cu_seqlens.contiguous(), seed, *ranks
        self.numbers = (
            tokens, self.longest, self.heads, q.stride(0), k.stride(0), v.stride(0), left, right, scale, temperature,
        )  # fmt: skip
        D = max(16, triton.next_power_of_2(head_size))
        self.constants = {
            "D": D, "HEAD": head_size, "NOISY": seed is not None, "WINDOW": has_window, "RANKS": has_ranks,
            "ROWS": TILE.get(D, 16),
        }  # fmt: skip

    def launch(self, kernel, *pointers: Tensor) -> None:
        grid = (triton.cdiv(self.longest, self.constants["ROWS"]) * self.heads * self.sequences,)
        given = *self.inputs, *pointers, faults.words(self.inputs[0]), *self.numbers
        launch(kernel, grid, *given, **self.constants, num_warps=4, num_stages=1)


def hard_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, cu_seqlens, *options)
    out = q.new_empty(q.shape)
    best, lse = (q.new_empty(q.shape[:2], dtype=dtype) for dtype in (torch.int32, torch.float32))
    call.launch(hard_attention_forward_kernel, out, best, lse)
    faults.raise_interpreted(q)
    return out, best, lse


def hard_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, best: Tensor, lse: Tensor, cu_seqlens: Tensor, *options
) -> Tensor:
    call = _Call(q, k, v, cu_seqlens, *options)
    tokens, heads, head_size = q.shape
    dqkv, delta = q.new_empty(tokens, 3, heads, head_size), torch.empty_like(lse)
    for kernel in (hard_attention_dq_kernel, hard_attention_dk_dv_kernel):
        call.launch(kernel, dout.contiguous(), best, lse, delta, dqkv)
    faults.raise_interpreted(q)
    return dqkv
