"""Batches of one shape: which samples together fill T tokens with at most B samples and M predictions.

CUDA graphs and torch.compile want every batch to have the same shape. What T tokens leave empty is computed for
nothing, so samples are chosen to leave little: out of a window of those that come next in the epoch's random order, the
oldest go into the batch until one or two of the others fill exactly what is left.

So a sample is taken in its turn or up to `WINDOW` places ahead of it, and its length alone decides; one that does not
fit in its turn begins the next batch. The order stays random over the whole corpus, and the end of an epoch does not
gather the lengths that fit badly, as it would where the best fit alone decides.

It is best fit (Johnson, "Near-optimal bin packing algorithms", 1973) with two at a time; Krell et al., "Efficient
sequence packing without cross-contamination" (2021), measure what packing saves BERT.
"""

from array import array
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

WINDOW = 4096  # samples that wait for a batch
_EMPTY = 0.01  # of a batch's tokens, with which no other T is tried


class Shape(NamedTuple):
    """What a batch holds: T, B and M."""

    tokens: int
    samples: int
    masked: int


def choose_shape(lengths: np.ndarray, predictions: np.ndarray, tokens: int, longest: int) -> Shape:
    """T, B and M for batches of samples such as these.

    T is `tokens`, or less by a multiple of 64 and at most a sample, where samples of one length would leave more than a
    hundredth of it empty: eight of 496 tokens do not fill 4,096. B is what T tokens have on average and a quarter
    more, as empty samples cost next to nothing, and enough for a batch that is nearly all padding, in samples of
    `longest` tokens. M has a thirty-second more, as every prediction costs a row of logits. B and M are rounded up, to
    multiples of 8 and 32.

    Args:
        lengths: int64 [samples], tokens of some thousand samples in a random order.
        predictions: int64 [longest + 1], how many predictions a sample of every length has at most, never decreasing.
        tokens: the largest T, at least longest. longest: most tokens of a sample.
    """
    tried: list[tuple[float, Shape]] = []
    for fewer in range(tokens, max(longest, tokens - longest) - 1, -64):
        shape = _around(lengths, predictions, fewer, longest)
        order, cuts = pack_samples(lengths, predictions, shape, longest)
        filled = np.add.reduceat(lengths[order], cuts[:-1])[:-1]  # the last batch is what remains
        tried.append((1 - filled.mean() / fewer if len(filled) else 0.0, shape))
        if tried[-1][0] <= _EMPTY:
            break
    return min(tried, key=lambda each: each[0])[1]


def _around(lengths: np.ndarray, predictions: np.ndarray, tokens: int, longest: int) -> Shape:
    """The shape with this T."""
    total = lengths.sum()
    samples = max(1 - -tokens // longest, 1.25 * tokens * len(lengths) / total)
    masked = max(predictions[longest], min(tokens, tokens * predictions[lengths].sum() / total * 33 / 32))
    return Shape(tokens, int(-(-samples // 8) * 8), int(-(-masked // 32) * 32))


def pack_samples(
    lengths: np.ndarray, predictions: np.ndarray, shape: Shape, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts samples, given in a random order, into batches.

    No batch exceeds the shape: B also holds the samples of at most `longest` tokens into which its padding is cut.

    Args:
        lengths, predictions, longest: as of `choose_shape`, which gave the shape.

    Returns:
        int64 [samples], the samples batch by batch; int64 [batches + 1], where the batches begin there, and its end.
    """
    sizes, needed = lengths.tolist(), predictions.tolist()
    waiting, untaken = _Waiting(longest), bytearray(b"\1") * len(sizes)  # 1 for a sample that no batch has
    order, cuts = array("q"), array("q", [0])
    oldest = arrived = 0
    while len(order) < len(sizes):
        tokens, samples, masked = shape
        while masked > 0 and len(order) < len(sizes):
            while arrived < len(sizes) and arrived < len(order) + WINDOW:
                waiting.add(arrived, sizes[arrived])
                arrived += 1
            oldest = untaken.index(1, oldest)
            first = sizes[oldest]
            # Most of a batch is more than two samples can fill. There it is the oldest one's turn, if it fits.
            if tokens > 2 * longest and masked >= needed[first] and (samples - 1) * longest >= tokens - first:
                tokens, samples, masked = tokens - first, samples - 1, masked - needed[first]
                order.append(waiting.take(first))
                untaken[oldest] = 0
                continue
            for chosen in [(first,)] if tokens == shape.tokens else waiting.candidates(tokens, first):
                left = _after(Shape(tokens, samples, masked), chosen, needed, longest)
                if left is not None:
                    break
            else:
                break
            tokens, samples, masked = left
            for length in chosen:
                order.append(waiting.take(length))
                untaken[order[-1]] = 0
        cuts.append(len(order))
    return np.array(order, np.int64), np.array(cuts, np.int64)


def _after(left: Shape, chosen: tuple[int, ...], needed: list[int], longest: int) -> Shape | None:
    """What is left behind samples of these lengths; None where they do not fit."""
    tokens, samples, masked = left
    for length in chosen:
        tokens, samples, masked = tokens - length, samples - 1, masked - needed[length]
    padding = -(-tokens // longest)  # samples that it makes
    return Shape(tokens, samples, masked) if tokens >= 0 and masked >= 0 and samples >= padding else None


class _Waiting:
    """Samples that wait for a batch, by their length.

    Bit n of `present` says whether there are any of length n, bit `longest - n` of `mirrored` says the same: shifted by
    `total - longest` it has a bit where `total - n` is there, so that one operation finds all pairs with a sum.
    """

    def __init__(self, longest: int):
        self.longest, self.present, self.mirrored = longest, 0, 0
        self.queues: dict[int, deque[int]] = defaultdict(deque)

    def add(self, sample: int, length: int) -> None:
        queue = self.queues[length]
        if not queue:
            self.present |= 1 << length
            self.mirrored |= 1 << self.longest - length
        queue.append(sample)

    def take(self, length: int) -> int:
        """The one that waits longest of those with this length."""
        queue = self.queues[length]
        sample = queue.popleft()
        if not queue:
            self.present ^= 1 << length
            self.mirrored ^= 1 << self.longest - length
        return sample

    def candidates(self, tokens: int, oldest: int) -> Iterator[tuple[int, ...]]:
        """Lengths to take, the best first: what fills all tokens, the oldest sample, what fills less and less."""
        yield from self._with_sum(tokens)
        yield (oldest,)
        shortest = (self.present & -self.present).bit_length() - 1
        for total in range(min(tokens - 1, 2 * self.longest), shortest - 1, -1):
            yield from self._with_sum(total)

    def _with_sum(self, total: int) -> Iterator[tuple[int, ...]]:
        """The length itself where there is one, and the two most alike whose sum it is."""
        if self.present >> total & 1:
            yield (total,)
        if total <= 2 * self.longest:
            shift, half = total - self.longest, (total + 1) // 2
            summands = self.present & (self.mirrored << shift if shift > 0 else self.mirrored >> -shift)
            if total % 2 == 0 and len(self.queues[half]) == 1:
                summands &= ~(1 << half)
            upper = summands >> half
            if upper:
                long = half + (upper & -upper).bit_length() - 1
                yield (long, total - long)
