"""Philox4x32-7 on whatever counts in integers: tensors of torch, arrays of numpy.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds are the
fewest that the authors found to pass BigCrush.
"""

from typing import Any

ROUNDS = 7
MASK = 0xFFFFFFFF


def philox_words(c0: Any, c1: Any, c2: Any, c3: Any, seed: Any) -> tuple[Any, Any, Any, Any]:
    """Four words in [0, 2**32) for a counter of four, all of them int64 tensors, int64 arrays or ints that broadcast.

    Args:
        c0, c1, c2, c3: the counter's words, at least one a tensor or an array, never one of no dimensions.
        seed: the 64-bit key, low word first.
    """
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # Products of two 32-bit words wrap in int64, and the masks take the right bits all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3
