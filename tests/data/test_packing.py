"""Batches of one shape: by hand, held to their limits on drawn lengths, and full on lengths as real text has them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.masking import budget
from fastbert.data.packing import WINDOW, Shape, choose_shape, pack_samples


def predictions(longest, extra=3):
    return budget((np.arange(longest + 1) - extra).clip(min=0))


def pack(lengths, shape, longest):
    order, cuts = pack_samples(np.array(lengths), predictions(longest), shape, longest)
    return [order[a:b].tolist() for a, b in pairwise(cuts)]


def test_by_hand():
    """The oldest, 6, leaves 4 of ten, which 4 fills; then 5 leaves 5, which 3 + 2 fill."""
    assert pack([6, 5, 3, 4, 2], Shape(10, 8, 8), 6) == [[0, 3], [1, 2, 4]]
    # 2 leaves 8: 4 + 4 is no pair while there is one 4. Of two pairs the more alike is taken: 5 + 3, not 7 + 1.
    assert pack([2, 4, 3, 5, 7, 1], Shape(10, 8, 8), 7) == [[0, 3, 2], [1, 5], [4]]
    # Behind 4 nothing fills 4 and the oldest, 5, is too long: 3 fills most.
    assert pack([7, 4, 5, 1, 3], Shape(8, 8, 8), 7) == [[0, 3], [1, 4], [2]]
    # Four samples at most, one of which the padding needs: three of 1 leave 7, the fourth would leave 6 and no sample.
    assert pack([1, 1, 1, 1, 1], Shape(10, 4, 8), 7) == [[0, 1, 2], [3, 4]]
    # Two predictions: a sample of 8 + 3 special tokens has one, as one of 3 + 3 has.
    assert pack([11, 6, 6, 11], Shape(40, 8, 2), 11) == [[0, 1], [2, 3]]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=120), tokens=st.integers(40, 200), spare=st.integers(0, 3)
)
def test_every_sample_once_and_no_limit_exceeded(lengths, tokens, spare):
    lengths, needed = np.array(lengths), predictions(40)
    for shape in (
        choose_shape(lengths, needed, tokens, 40),
        Shape(tokens, 1 + spare - -tokens // 40, int(needed.max()) + spare),  # as tight as can be
    ):
        order, cuts = pack_samples(lengths, needed, shape, 40)
        assert sorted(order) == list(range(len(lengths)))
        assert cuts[0] == 0 and cuts[-1] == len(lengths) and (np.diff(cuts) > 0).all()
        filled = np.add.reduceat(lengths[order], cuts[:-1])
        assert (filled <= shape.tokens).all()
        assert (np.diff(cuts) - -(shape.tokens - filled) // 40 <= shape.samples).all(), "no room for the padding"
        assert (np.add.reduceat(needed[lengths[order]], cuts[:-1]) <= shape.masked).all()


RANDOM, SAMPLES = np.random.default_rng(0), 20_000
FULL, ANY = RANDOM.integers(480, 513, SAMPLES), RANDOM.integers(4, 513, SAMPLES)
REAL = {
    # Reviews: a document is a sample, the longer ones are cut. Articles: as full as the next sentence allows, and the
    # ends of documents. Books: nearly no ends, so that eight samples leave 3 % of 4,096 tokens, and T is less.
    "reviews": (128, RANDOM.lognormal(4.0, 0.7, SAMPLES).clip(4, 128).astype(int), 4096),
    "articles": (512, np.where(RANDOM.random(SAMPLES) < 0.5, FULL, ANY), 4096),
    "books": (512, np.where(RANDOM.random(SAMPLES) < 0.98, FULL, ANY), 3968),
    "messages": (128, 3 + RANDOM.geometric(0.1, SAMPLES).clip(max=125), 4096),
}


@pytest.mark.parametrize("kind", REAL)
def test_less_than_a_fiftieth_stays_empty(kind):
    """And a tenth of M, a third of B; none comes far ahead of its turn or late, and the epoch ends as it began."""
    longest, lengths, tokens = REAL[kind]
    needed = predictions(longest)
    shape = choose_shape(lengths[:8192], needed, 4096, longest)
    order, cuts = pack_samples(lengths, needed, shape, longest)
    filled = np.add.reduceat(lengths[order], cuts[:-1])
    assert shape.tokens == tokens and 1 - filled.mean() / tokens < 0.02
    masked = np.add.reduceat(needed[lengths[order]], cuts[:-1])
    assert masked[:-1].mean() > 0.9 * shape.masked and np.diff(cuts)[:-1].mean() > 0.5 * shape.samples
    late = np.arange(len(order)) - order
    assert late.min() > -WINDOW and late.max() < WINDOW / 8
    assert lengths[order][-2000:].mean() == pytest.approx(lengths.mean(), rel=0.1)
