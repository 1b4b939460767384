"""Who sees whom by ranks, int [T], of queries and of keys: a query sees the keys of its sequence whose rank is at most
its own and, where there is a window too, those within it.

Global tokens are ranks beside a window: of a query 1 where it is global and else 0, of a key 0 where it is global and
else 1. So a global query sees every key, and any other query the global keys.

Where the rows of a program are keys, ranks of both kinds are TURNED into ~rank, whose order is the opposite: a row
always sees the others whose rank is at most its own. A program takes the blocks of the window and, before and behind
it, those with a rank that is at most the greatest of its rows'; it finds the next of these by SCAN ranks at once, so
that the blocks between cost next to nothing:

    others    0 . . [by rank] . . first [window] [window] last . . [by rank] . . length
"""

import triton
import triton.language as tl

from fastbert.kernels.attention_tiles import sees, spans

SCAN = tl.constexpr(512)


@triton.jit
def load_ranks(ptr, place, length, COUNT: tl.constexpr, TURNED: tl.constexpr):
    """[COUNT] int32 from `place` on; behind the sequence's end its last one's again."""
    ranks = tl.load(ptr + tl.minimum(place + tl.arange(0, COUNT), length - 1)).to(tl.int32)
    if TURNED:
        ranks = ~ranks
    return ranks


@triton.jit
def ranked_rows(
    ptr, row, length, before, after, ROWS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Of a program's rows the ranks [ROWS], the greatest of them, and the others in the window of some row, from first,
    a block's, to last: none without a window.
    """
    ranks = load_ranks(ptr, row, length, ROWS, TURNED)
    first, last = 0, 0
    if WINDOW:
        first, _, _, last = spans(row, length, before, after, ROWS, BLOCK, WINDOW)
    return ranks, tl.max(ranks, 0), first, last


@triton.jit
def next_block(ptr, place, length, first, last, greatest, BLOCK: tl.constexpr, TURNED: tl.constexpr):
    """The block at `place`, a block's first, or the next behind it that is to be computed; `length` if there is none.

    `ptr` has the others' ranks; `first`, `last` and `greatest` are those of `ranked_rows`.
    """
    at = tl.cast(place, tl.int32)  # a tensor, of a constant too
    end = tl.where(at < first, first, length)
    found = tl.where((at >= first) & (at < last), at, end)
    while (found == end) & (at < end):
        seen = load_ranks(ptr, at, length, SCAN, TURNED) <= greatest
        found = tl.minimum(tl.min(tl.where(seen, at + tl.arange(0, SCAN), end), 0), end)
        at += SCAN
    return tl.where(found < length, found // BLOCK * BLOCK, length)


@triton.jit
def visible(
    row, ranks, other, ranks_ptr, length, before, after, ROWS: tl.constexpr, OTHERS: tl.constexpr,
    WINDOW: tl.constexpr, RANKS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """[ROWS, OTHERS]: whether the rows from `row` on, of such ranks [ROWS], see the others from `other` on.

    Without RANKS it is what the window lets them see, and their ranks and the others' `ranks_ptr` are of no account.
    """
    rows, others = (row + tl.arange(0, ROWS))[:, None], (other + tl.arange(0, OTHERS))[None, :]
    if RANKS:
        seen = load_ranks(ranks_ptr, other, length, OTHERS, TURNED)[None, :] <= ranks[:, None]
        seen = seen & (others < length)
        if WINDOW:
            seen = seen | sees(rows, others, length, before, after, WINDOW)
        return seen
    else:
        return sees(rows, others, length, before, after, WINDOW)
