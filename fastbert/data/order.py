"""The random order of an epoch, computed place by place: nothing is shuffled, and nothing is kept, before it is asked.

Up to `BLOCK` items are sorted by random numbers. More are permuted by a Feistel network (Luby and Rackoff, "How to
construct pseudorandom permutations from pseudorandom functions", 1988) whose round function is Philox: a number is cut
into two halves of bits, and each half in turn is changed by a function of the other, which can be undone and so maps no
two numbers to the same. It permutes the numbers of so many bits; one that comes out at or above the count is put in
again until it does not, which permutes those below the count (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002).
"""

import numpy as np

from fastbert.data.draws import Purpose, draw

BLOCK = 1 << 16  # samples that are put into batches together
_ROUNDS = 6  # four are enough against any statistical test where the halves are long


def at_places(first: int, last: int, count: int, seed: int, epoch: int) -> np.ndarray:
    """The items at places first to last - 1 in the order of `count` items, up to 2**32, of an epoch: int64."""
    if count <= BLOCK:
        high, low, *_ = draw(Purpose.ORDER, seed, epoch, np.arange(count))
        return np.argsort((high << 31) | (low >> 1), kind="stable")[first:last]
    bits = (count - 1).bit_length()
    items = _permuted(np.arange(first, last), bits, seed, epoch)
    while (beyond := np.flatnonzero(items >= count)).size:
        items[beyond] = _permuted(items[beyond], bits, seed, epoch)
    return items


def _permuted(numbers: np.ndarray, bits: int, seed: int, epoch: int) -> np.ndarray:
    right_bits = bits // 2
    masks = (1 << bits - right_bits) - 1, (1 << right_bits) - 1
    halves = [numbers >> right_bits, numbers & masks[1]]
    for number in range(_ROUNDS):
        changed, other = number % 2, 1 - number % 2
        word, *_ = draw(Purpose.ORDER, seed, epoch, np.full(len(numbers), number), 1 + halves[other])
        halves[changed] = halves[changed] ^ (word & masks[changed])
    return halves[0] << right_bits | halves[1]
