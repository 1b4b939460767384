"""The random numbers of dropout: Philox4x32-7, bit for bit those of csrc/philox.h and fastbert/ops/philox.py.

One call gives four words of 32 bits for neighbours: eight lanes of 16 bits along a row, or sixteen of 8 in attention.
With lanes of b bits an element is kept where its lane is at least t. Lanes stand at the top of a word here, above bits
that do not matter: the lane is at least t where the word is greater than `bound(t, bits)`.

A backward pass draws the numbers again. The functions below differ in which thread computes which call, and so in
what threads must exchange; the numbers do not depend on it.
Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
ROW_BITS, SCORE_BITS = 16, 8  # of a lane


# ---- on the host: what launchers pass -----------------------------------------------------------------------------


def bound(t: int, bits: int) -> int:
    """What a word with its lane on top must exceed to be kept, 1 <= t <= 2**bits: the int32 of these 32 bits."""
    word = (t << 32 - bits) - 1 & 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def scale(t: int, bits: int) -> float:
    """What a kept element is multiplied by; 0.0 where everything is dropped."""
    return 2**bits / (2**bits - t) if t < 2**bits else 0.0


# ---- words ---------------------------------------------------------------------------------------------------------


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Four words for counters of uint32 of one shape; seed is an int64. `tl.philox` multiplies twice where this does
    once.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _words(zero, c0, c1, c2, c3, seed):
    """[..., 2, 2] in order, of integer counters that broadcast to the shape of `zero`, and in its layout."""
    w0, w1, w2, w3 = philox(
        (zero + c0).to(tl.uint32), (zero + c1).to(tl.uint32), (zero + c2).to(tl.uint32), (zero + c3).to(tl.uint32), seed
    )  # fmt: skip
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _halves(w):
    """[..., 2]: the lanes of 16 bits of a word, the low one first."""
    return tl.join(w << 16, w)


@triton.jit
def _bytes(w):
    """[..., 2, 2]: the lanes of 8 bits of a word, the lowest first."""
    return tl.join(tl.join(w << 24, w << 8), tl.join(w << 16, w))


# ---- rows: layer_norm, dropout, stochastic rounding ----------------------------------------------------------------


@triton.jit
def row_lanes(group, row, c2, c3, seed):
    """[R, 8 * G] words with the lanes of `group` [1, G] (eight columns each) in `row` [R, 1] on top; `>> 16` is a lane.

    With 16-bit types a thread loads eight neighbours, 16 bytes, and computes their call: nothing is exchanged.
    """
    w = _words((group + row) * 0, group, row, c2, c3, seed)
    return tl.reshape(_halves(w), [w.shape[0], 8 * w.shape[1]])


@triton.jit
def keep_row(group, row, seed, bound):
    """[R, 8 * G]: what layer_norm and dropout keep; `bound` is `bound(t, ROW_BITS)`."""
    return row_lanes(group, row, 0, 0, seed) > bound.to(tl.uint32, bitcast=True)


# ---- scores of attention -------------------------------------------------------------------------------------------
#
# Arithmetic counts as cheap to the compiler: left alone it computes a call in all four threads that hold scores of it,
# rather than move words between them. So the counters get the layout of the scores, less what the threads of a call
# have in common: a zero that is made of the scores by reshape and max, and of which the compiler sees that it is one
# only after it has laid out the data. The bound is laid out in the same way, so that words are what goes between
# threads, within a warp; with what is kept as bits, setting and testing them would cost more than Philox.


@triton.jit
def keep_scores(s, key, query, head, seed, bound):
    """[Q, K]: what is kept of a tile of scores, queries by keys.

    Args:
        s: [Q, K] float32, any result of a product: it gives the layout alone.
        key: the tile's first key, a multiple of 16, counted within its sequence.
        query: [Q], the places of the queries in the packed batch.
        head, seed: which head; the int64 that was loaded.
        bound: `bound(t, SCORE_BITS)`, an int32.
    """
    Q: tl.constexpr = s.shape[0]
    K: tl.constexpr = s.shape[1]
    limit = bound.to(tl.uint32, bitcast=True)
    if K % 64 == 0:
        # Four threads share a row, and have two of eight keys each: a thread computes one call of four.
        bits = s.to(tl.int32, bitcast=True)
        zero = tl.reshape(bits, [Q, K // 64, 4, 2, 4, 2])  # .., group of 16, its half, thread, neighbours
        zero = (tl.max(tl.max(tl.max(zero, 5), 3), 2) & 1) >> 1  # [Q, K / 64, 4]
        group = key // 16 + tl.arange(0, K // 64)[:, None] * 4 + tl.arange(0, 4)[None, :]
        w = _words(zero, group[None, :, :], query[:, None, None], head, 1, seed)
        keep = tl.reshape(_bytes(w), [Q, K]) > ((bits & 1) >> 1).to(tl.uint32) + limit
    else:
        group = (key // 16 + tl.arange(0, K // 16))[None, :]
        w = _words((group + query[:, None]) * 0, group, query[:, None], head, 1, seed)
        keep = tl.reshape(_bytes(w), [Q, K]) > limit
    return keep


@triton.jit
def keep_scores_transposed(s, key, query, head, seed, bound):
    """[K, Q], keys by queries: as `keep_scores`, but `query` is the tile's first, which the others follow."""
    K: tl.constexpr = s.shape[0]
    Q: tl.constexpr = s.shape[1]
    limit = bound.to(tl.uint32, bitcast=True)
    if Q % 64 == 0:
        # Eight threads have keys i and i + 8 of a group for the same queries: each computes one query of eight.
        bits = s.to(tl.int32, bitcast=True)
        zero = tl.reshape(bits, [K // 16, 2, 8, Q // 64, 8, 8])  # group, half, thread, .., eight queries, query
        zero = (tl.max(tl.max(zero, 4), 1) & 1) >> 1  # [K / 16, 8, Q / 64, 8]
        group = (key // 16 + tl.arange(0, K // 16))[:, None, None, None]
        token = query + tl.arange(0, Q // 64)[:, None] * 64 + tl.arange(0, 8)[None, :]
        token = token[None, None, :, :] + tl.arange(0, 8)[None, :, None, None] * 8
        w = _bytes(_words(zero, group, token, head, 1, seed))
        lanes = tl.permute((w >> 24).to(tl.uint8), (0, 4, 5, 6, 7, 2, 1, 3))  # the key's four halvings before queries
        keep = tl.reshape(lanes, [K, Q]) > ((bits & 1) >> 1).to(tl.uint8) + (limit >> 24).to(tl.uint8)
    else:
        group = (key // 16 + tl.arange(0, K // 16))[None, :]
        token = (query + tl.arange(0, Q))[:, None]
        w = _words((group + token) * 0, group, token, head, 1, seed)
        keep = tl.trans(tl.reshape(_bytes(w), [Q, K])) > limit
    return keep
