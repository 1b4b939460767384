"""The random numbers of the data path, each a pure function of (seed, purpose, epoch, item, place).

Nothing is drawn from a generator that moves, so a batch is the same whoever computes it: any worker, in any order,
before or after a resume. The numbers are Philox4x32-7 words with the counter (place, item, epoch, purpose).
"""

from enum import IntEnum

import numpy as np

from fastbert.counter_random import philox_words


class Purpose(IntEnum):
    """What a draw decides; different purposes never share a counter."""

    SPLIT = 0  # which document of a block is held out
    ORDER = 1  # the order of the samples in an epoch
    PAIR = 2  # where a sample is cut in two and whether its second half is replaced
    MASK = 3  # which tokens are masked, and by what
    PERMUTE = 4  # in which order tokens are predicted


def draw(
    purpose: Purpose, seed: int, epoch: int, item: np.ndarray, place: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Four int64 arrays of independent words, uniform in [0, 2**32).

    Args:
        seed: 64-bit key. epoch: counter word in [0, 2**32).
        item: int64 [N], the sample, document block... in [0, 2**32).
        place: int64 [N], the place inside the item; None means 0.
    """
    counter = np.zeros(len(item), np.int64) if place is None else place
    return philox_words(counter, item, epoch, int(purpose), seed)


def below(words: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """32-bit words scaled to integers uniform in [0, n), for n up to 2**31."""
    return (words * n) >> 32
